"""Sharing through the hub, with the hub's client replaced: what is sent, and what is asked for."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import load_file

from concept_erasure import LeaceEraser
from concept_erasure.eraser import Eraser
from concept_erasure.errors import FormatError

Data = tuple[torch.Tensor, torch.Tensor]
FILES = {"README.md", "eraser.safetensors", "eraser_config.json"}


@dataclass
class Hub:
    """Stands in for `HfApi` and `snapshot_download`, and keeps what it was told."""

    folder: Path
    created: list[dict[str, Any]] = field(default_factory=list)
    uploaded: list[dict[str, Any]] = field(default_factory=list)
    asked: list[dict[str, Any]] = field(default_factory=list)
    tokens: list[str | None] = field(default_factory=list)
    fault: Exception | None = None

    def __call__(self, *, token: str | None = None) -> Hub:
        self.tokens.append(token)
        return self

    def create_repo(self, repo_id: str, *, private: bool | None, exist_ok: bool) -> None:
        self.created.append({"repo_id": repo_id, "private": private, "exist_ok": exist_ok})

    def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> Any:
        assert self.created, "the repository comes first"
        files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
        self.uploaded.append({"repo_id": repo_id, "message": commit_message, "files": files})
        for name, data in files.items():
            (self.folder / name).write_bytes(data)
        address = f"https://huggingface.co/{repo_id}/commit/1"
        return type("Commit", (), {"commit_url": address})()

    def snapshot_download(self, repo_id: str, **options: Any) -> str:
        self.asked.append({"repo_id": repo_id, **options})
        if self.fault is not None:
            raise self.fault
        return str(self.folder)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    folder = tmp_path / "hub"
    folder.mkdir()
    made = Hub(folder)
    monkeypatch.setattr(huggingface_hub, "HfApi", made)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made.snapshot_download)
    return made


@pytest.fixture
def eraser(labelled: Data) -> LeaceEraser:
    return LeaceEraser.fit(*labelled)


def test_push_creates_and_uploads_three_files(hub: Hub, eraser: LeaceEraser) -> None:
    address = eraser.push_to_hub("user/gender", private=True, token="secret")
    assert address == "https://huggingface.co/user/gender/commit/1"
    assert hub.tokens == ["secret"]
    assert hub.created == [{"repo_id": "user/gender", "private": True, "exist_ok": True}]
    (sent,) = hub.uploaded
    assert (sent["repo_id"], set(sent["files"])) == ("user/gender", FILES)
    assert "leace" in sent["message"]
    assert all(b"secret" not in data for data in sent["files"].values())


def test_what_is_uploaded_is_what_is_saved(hub: Hub, eraser: LeaceEraser, tmp_path: Path) -> None:
    eraser.push_to_hub("user/gender")
    eraser.save_pretrained(tmp_path / "local")
    assert hub.uploaded[0]["files"] == {
        path.name: path.read_bytes() for path in (tmp_path / "local").iterdir()
    }
    assert hub.created[0]["private"] is None
    torch.testing.assert_close(load_file(hub.folder / "eraser.safetensors"), eraser.tensors())
    assert json.loads((hub.folder / "eraser_config.json").read_text("utf-8"))["method"] == "leace"
    assert (hub.folder / "README.md").read_text("utf-8") == eraser.card()


def test_round_trip_with_a_revision(hub: Hub, eraser: LeaceEraser, labelled: Data) -> None:
    eraser.push_to_hub("user/gender")
    loaded = Eraser.from_pretrained("user/gender", revision="v1")
    (asked,) = hub.asked
    assert (asked["repo_id"], asked["revision"]) == ("user/gender", "v1")
    assert set(asked["allow_patterns"]) == FILES - {"README.md"}
    assert isinstance(loaded, LeaceEraser)
    assert loaded.digest == eraser.digest
    assert torch.equal(loaded(labelled[0]), eraser(labelled[0]))
    LeaceEraser.from_pretrained("user/gender")
    assert hub.asked[1]["revision"] is None


def not_found(kind: type[errors.HfHubHTTPError]) -> errors.HfHubHTTPError:
    """The client's own error, made without the network library it is built on."""
    made = kind.__new__(kind)
    made.args = ("not found",)
    return made


@pytest.mark.parametrize("kind", [errors.RepositoryNotFoundError, errors.RevisionNotFoundError])
def test_missing_repository_or_revision(hub: Hub, kind: type[errors.HfHubHTTPError]) -> None:
    hub.fault = not_found(kind)
    with pytest.raises(FileNotFoundError, match="'user/gender'") as caught:
        Eraser.from_pretrained("user/gender", revision="v9")
    assert kind.__name__ in str(caught.value)


@pytest.mark.parametrize(
    "fault",
    [
        errors.LocalEntryNotFoundError("nothing cached"),
        errors.OfflineModeIsEnabled("offline"),
        errors.HFValidationError("bad name"),
        ConnectionError("no route"),
    ],
    ids=lambda fault: type(fault).__name__,
)
def test_offline_and_bad_names(hub: Hub, fault: Exception) -> None:
    hub.fault = fault
    with pytest.raises(FileNotFoundError, match="no folder 'user/gender', and the hub"):
        Eraser.from_pretrained("user/gender")


def test_the_real_client_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no-such-user/no-such-eraser"):
        Eraser.from_pretrained("no-such-user/no-such-eraser")


@pytest.mark.parametrize("name", ["gender", "./user/gender", "/user/gender", "a/b/c", "~/gender"])
def test_paths_are_never_asked_for(hub: Hub, name: str) -> None:
    with pytest.raises(FileNotFoundError, match="give a folder or a hub id"):
        Eraser.from_pretrained(name)
    assert hub.asked == []


def test_a_repository_without_an_eraser(hub: Hub) -> None:
    (hub.folder / "README.md").write_text("hello", encoding="utf-8")
    with pytest.raises(FileNotFoundError, match="eraser_config.json"):
        Eraser.from_pretrained("user/gender")


def test_a_damaged_repository(hub: Hub, eraser: LeaceEraser) -> None:
    eraser.push_to_hub("user/gender")
    (hub.folder / "eraser.safetensors").write_bytes(b"rubbish")
    with pytest.raises(FormatError, match="safetensors"):
        Eraser.from_pretrained("user/gender")
