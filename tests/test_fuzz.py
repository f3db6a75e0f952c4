"""Loaders meet truncated, oversized and mistyped files: each ends in FormatError, never elsewhere."""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from concept_erasure._storage import manifest
from concept_erasure.eraser import Eraser
from concept_erasure.errors import FormatError
from concept_erasure.linear.leace import LeaceEraser
from tests.linear.samples import sample

TENSORS, CONFIG = "eraser.safetensors", "eraser_config.json"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "eraser"
    LeaceEraser.fit(*sample(200, 6, 3)).save_pretrained(folder)
    return folder


@pytest.fixture
def broken(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "broken"))


def _refused(folder: Path) -> None:
    for kind in (Eraser, LeaceEraser):
        with pytest.raises(FormatError) as caught:
            kind.from_pretrained(folder)
        assert len(str(caught.value)) > 10


def _seal(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make manifest and digest agree with what was changed: what is refused now is refused by its own check."""
    tensors = load_file(folder / TENSORS)
    values = json.loads((folder / CONFIG).read_text())
    values["tensors"] = manifest(tensors)
    (folder / CONFIG).write_text(json.dumps(values))
    monkeypatch.setattr(Eraser, "digest", values["digest"])


def test_the_unbroken_one_loads(saved: Path) -> None:
    assert isinstance(Eraser.from_pretrained(saved), LeaceEraser)
    assert isinstance(LeaceEraser.from_pretrained(str(saved)), LeaceEraser)


# -------------------------------------------------------------------------- the tensors


@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.5, 0.9, 0.999])
def test_truncated_tensors(broken: Path, share: float) -> None:
    data = (broken / TENSORS).read_bytes()
    (broken / TENSORS).write_bytes(data[: int(share * len(data))])
    _refused(broken)


@pytest.mark.parametrize("extra", [b"\0", b"x" * 4096])
def test_oversized_tensors(broken: Path, extra: bytes) -> None:
    with (broken / TENSORS).open("ab") as file:
        file.write(extra)
    _refused(broken)


@pytest.mark.parametrize("length", [0, 2**20, 2**40, 2**63, 2**64 - 1])
def test_header_of_another_length(broken: Path, length: int) -> None:
    data = (broken / TENSORS).read_bytes()
    (broken / TENSORS).write_bytes(struct.pack("<Q", length) + data[8:])
    _refused(broken)


def test_a_pickle_is_never_opened(broken: Path) -> None:
    torch.save({"left": torch.ones(2)}, broken / TENSORS)
    _refused(broken)


def test_header_noise(broken: Path) -> None:
    """Flip bytes of the header: refused, or read as something that still is an eraser."""
    data = (broken / TENSORS).read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    dice = random.Random(0)  # noqa: S311 not for secrets
    for _ in range(150):
        noisy = bytearray(data)
        for _ in range(dice.randint(1, 4)):
            noisy[dice.randrange(8, 8 + size)] = dice.randrange(256)
        (broken / TENSORS).write_bytes(bytes(noisy))
        try:
            eraser = Eraser.from_pretrained(broken)
        except FormatError:
            continue
        assert isinstance(eraser, LeaceEraser)


Change = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
CHANGES: dict[str, Change] = {
    "no proj_left": lambda t: {n: v for n, v in t.items() if n != "proj_left"},
    "no proj_right": lambda t: {n: v for n, v in t.items() if n != "proj_right"},
    "affine, but no bias": lambda t: {n: v for n, v in t.items() if n != "bias"},
    "no tensors": lambda t: {},
    "an unknown tensor": lambda t: {**t, "surprise": torch.ones(1)},
    "integers": lambda t: {name: value.long() for name, value in t.items()},
    "bytes": lambda t: {name: value.to(torch.uint8) for name, value in t.items()},
    "a nan": lambda t: {name: torch.full_like(value, float("nan")) for name, value in t.items()},
    "an inf": lambda t: {name: torch.full_like(value, float("inf")) for name, value in t.items()},
    "flat": lambda t: {name: value.flatten() for name, value in t.items()},
    "one more dimension": lambda t: {name: value[None] for name, value in t.items()},
    "another width": lambda t: {
        name: torch.cat([value, value]) if name == "proj_left" else value
        for name, value in t.items()
    },
    "half of each": lambda t: {
        name: value[: len(value) // 2].contiguous() if name != "bias" else value
        for name, value in t.items()
    },
}


@pytest.mark.parametrize("change", CHANGES)
def test_mistyped_tensors(broken: Path, change: str) -> None:
    tensors = load_file(broken / TENSORS)
    save_file(CHANGES[change](tensors), broken / TENSORS)
    _refused(broken)


SEALED = sorted(set(CHANGES) - {"affine, but no bias", "half of each"})  # erasers of their own


@pytest.mark.parametrize("change", SEALED)
def test_mistyped_tensors_with_a_manifest_that_agrees(
    broken: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = load_file(broken / TENSORS)
    save_file(CHANGES[change](tensors), broken / TENSORS)
    _seal(broken, monkeypatch)
    _refused(broken)


@pytest.mark.parametrize("change", ["another value", "rounded", "half of each"])
def test_tensors_of_another_eraser(broken: Path, change: str) -> None:
    """Same names; the digest in the description tells them apart, even with a manifest that agrees."""
    more: dict[str, Change] = {
        "another value": lambda t: {name: value + 1e-9 for name, value in t.items()},
        "rounded": lambda t: {name: value.float() for name, value in t.items()},
    }
    tensors = {**CHANGES, **more}[change](load_file(broken / TENSORS))
    save_file(tensors, broken / TENSORS)
    values = json.loads((broken / CONFIG).read_text())
    (broken / CONFIG).write_text(json.dumps({**values, "tensors": manifest(tensors)}))
    _refused(broken)


@pytest.mark.parametrize("stop", ["README.md", CONFIG])
def test_interrupted_overwrite(broken: Path, stop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saving over another eraser of the same shape ends half-way: never a mixture of the two."""
    other = LeaceEraser.fit(*sample(200, 6, 3, seed=1))
    replace = Path.replace

    def stopping(self: Path, target: Path) -> Path:
        if target.name == stop:
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", stopping)
    with pytest.raises(KeyboardInterrupt):
        other.save_pretrained(broken)
    _refused(broken)
    assert {path.name for path in broken.iterdir()} == {TENSORS, CONFIG, "README.md"}
    monkeypatch.undo()
    other.save_pretrained(broken)
    assert Eraser.from_pretrained(broken).digest == other.digest


# ------------------------------------------------------------------------ the description


@pytest.mark.parametrize("name", [TENSORS, CONFIG])
def test_missing_file(broken: Path, name: str) -> None:
    (broken / name).unlink()
    with pytest.raises((FormatError, FileNotFoundError), match=name.split(".")[0]):
        Eraser.from_pretrained(broken)


def test_a_folder_instead_of_a_file(broken: Path) -> None:
    for name in (TENSORS, CONFIG):
        (broken / name).unlink()
        (broken / name).mkdir()
    with pytest.raises((FormatError, FileNotFoundError)):
        Eraser.from_pretrained(broken)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.95])
def test_truncated_description(broken: Path, share: float) -> None:
    data = (broken / CONFIG).read_bytes().rstrip()
    (broken / CONFIG).write_bytes(data[: int(share * len(data))])
    _refused(broken)


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "null",
        "3",
        '"text"',
        "{}",
        "\ufeff{}",
        "{" * 50_000,
        '{"a":' * 50_000,
        "NaN",
        "1" * 10_000,
    ],
    ids=lambda text: text[:8],
)
def test_description_of_another_kind(broken: Path, text: str) -> None:
    (broken / CONFIG).write_text(text, encoding="utf-8")
    _refused(broken)


def test_description_is_not_text(broken: Path) -> None:
    (broken / CONFIG).write_bytes(bytes(range(256)))
    _refused(broken)


def test_description_is_huge(broken: Path) -> None:
    values = json.loads((broken / CONFIG).read_text())
    (broken / CONFIG).write_text(json.dumps({**values, "padding": "x" * (20 * 2**20)}))
    _refused(broken)


def _keys(values: object, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    if isinstance(values, dict):
        for key, value in values.items():
            found.append((*path, key))
            if key != "report":
                found += _keys(value, (*path, key))
    return found


def test_newer_format_names_the_upgrade(broken: Path) -> None:
    values = json.loads((broken / CONFIG).read_text())
    values["format_version"] = 999
    (broken / CONFIG).write_text(json.dumps(values))
    with pytest.raises(FormatError, match="(?s)999.*(upgrade|pip)"):
        Eraser.from_pretrained(broken)


def test_unknown_key_is_named(broken: Path) -> None:
    values = json.loads((broken / CONFIG).read_text())
    (broken / CONFIG).write_text(json.dumps({**values, "surprise": 1}))
    with pytest.raises(FormatError, match="surprise"):
        Eraser.from_pretrained(broken)


@pytest.mark.parametrize("method", ["nonsense", "", None, 3, ["leace"], "os:system"])
def test_unknown_method(broken: Path, method: object) -> None:
    values = json.loads((broken / CONFIG).read_text())
    (broken / CONFIG).write_text(json.dumps({**values, "method": method}))
    _refused(broken)


def test_mistyped_values(broken: Path) -> None:
    """Any value of the description replaced by one of another type: FormatError or a working eraser."""
    text = (broken / CONFIG).read_text()
    x, _ = sample(20, 6, 3)
    for path in _keys(json.loads(text)):
        for wrong in (None, -1, 1.5, "text", [], {}, [1], {"a": 1}, True):
            values = json.loads(text)
            inside = values
            for key in path[:-1]:
                inside = inside[key]
            inside[path[-1]] = wrong
            (broken / CONFIG).write_text(json.dumps(values))
            try:
                eraser = Eraser.from_pretrained(broken)
            except FormatError:
                continue
            except Exception as error:  # noqa: BLE001 the point of the test
                pytest.fail(f"{'.'.join(path)} = {wrong!r} raised {type(error).__name__}: {error}")
            assert eraser(x).shape == x.shape  # type: ignore[operator]


@pytest.mark.parametrize(
    ("key", "wrong"),
    [
        ("method", True),
        ("affine", 1),
        ("affine", "yes"),
        ("shrinkage", 1),
        ("shrinkage", None),
        ("rank", True),
        ("rank", 1.0),
        ("svd_tol", "0.1"),
        ("strength", True),
        ("strength", None),
        ("strength", "1"),
    ],
)
def test_mistyped_options(
    broken: Path, key: str, wrong: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = json.loads((broken / CONFIG).read_text())
    values["config"][key] = wrong
    (broken / CONFIG).write_text(json.dumps(values))
    _seal(broken, monkeypatch)
    _refused(broken)


SPACE = {"model": "m", "fingerprint": "f", "site": "s", "tokens": "last", "width": 6}


@pytest.mark.parametrize(
    "wrong", [{"width": 7}, {"width": True}, {"tokens": "middle"}, {"tokens": ""}, {"model": 1}]
)
def test_a_space_that_cannot_be(broken: Path, wrong: dict[str, object]) -> None:
    values = json.loads((broken / CONFIG).read_text())
    (broken / CONFIG).write_text(json.dumps({**values, "space": SPACE}))
    assert Eraser.from_pretrained(broken).space is not None
    (broken / CONFIG).write_text(json.dumps({**values, "space": {**SPACE, **wrong}}))
    _refused(broken)


def test_constants_that_are_no_json(broken: Path) -> None:
    text = (broken / CONFIG).read_text()
    for word in ("NaN", "Infinity", "-Infinity"):
        (broken / CONFIG).write_text(text.replace('"report": {', f'"report": {{"a": {word},'))
        _refused(broken)


def test_nowhere(tmp_path: Path) -> None:
    with pytest.raises((FormatError, FileNotFoundError), match="missing"):
        Eraser.from_pretrained(tmp_path / "missing")
