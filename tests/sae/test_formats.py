"""Reading dictionaries: ours and those of other libraries, and refusing what cannot be read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from concept_erasure.errors import ErasureWarning, FormatError
from concept_erasure.sae.disentangler import Disentangler
from concept_erasure.sae.formats import assemble, site_of
from tests.models import tiny
from tests.sae.test_disentangler import random, vectors


def folder_with(
    folder: Path, cfg: dict[str, Any], tensors: dict[str, torch.Tensor], name: str
) -> Path:
    folder.mkdir(parents=True)
    (folder / "cfg.json").write_text(json.dumps(cfg))
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / name)
    return folder


def same(a: Disentangler, b: Disentangler) -> None:
    x = vectors()
    torch.testing.assert_close(a.encode(x), b.encode(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(a(x), b(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(a.W_dec.norm(dim=1), torch.ones(a.n))


@pytest.mark.parametrize(
    "change", [{}, {"k": 3}, {"post_norm_gain": torch.rand(8)}, {"model": "m"}]
)
def test_saved_and_loaded_is_the_same(tmp_path: Path, change: dict[str, Any]) -> None:
    dis = replace(random(), report={"fvu": 0.25, "levels": [1, 2]}, **change)
    dis.save_pretrained(tmp_path / "dis")
    back = Disentangler.from_pretrained(tmp_path / "dis")
    for name, value in dis.tensors().items():
        assert torch.equal(getattr(back, name), value)
    for name in ("site", "widths", "model", "k", "after_post_norm", "apply_b_dec_to_input"):
        assert getattr(back, name) == getattr(dis, name)
    assert back.report == {"fvu": 0.25, "levels": [1, 2]}
    same(dis, back)


def test_inner_folder_site_and_model(tmp_path: Path) -> None:
    random().save_pretrained(tmp_path / "a" / "b")
    made = Disentangler.from_pretrained(tmp_path / "a", "b", site="mlp.2", model="name")
    assert (made.site, made.model) == ("mlp.2", "name")
    with pytest.raises(ValueError, match="width 8"):
        Disentangler.from_pretrained(tmp_path / "a", "b", model=tiny("llama"))


@pytest.mark.parametrize(
    ("name", "site", "behind"),
    [
        ("blocks.9.hook_mlp_out", "mlp.9", True),
        ("blocks.9.hook_attn_out", "attention.9", True),
        ("blocks.9.hook_resid_post", "residual.9", False),
        ("blocks.9.hook_resid_pre", "residual.8", False),
        ("blocks.0.hook_resid_pre", "embedding", False),
        ("model.layers.9.mlp", "mlp.9", False),
        ("transformer.h.3.mlp", "mlp.3", False),
        ("model.layers.9.post_feedforward_layernorm.output", "mlp.9", True),
        ("model.layers.9", "residual.9", False),
        ("layers.4.mlp", "mlp.4", False),
        ("blocks.2.attn.hook_z", "blocks.2.attn.hook_z", False),
    ],
)
def test_places(name: str, site: str, behind: bool) -> None:
    assert site_of(name) == (site, behind)


def test_sae_lens_folder(tmp_path: Path) -> None:
    dis = random()
    norms = torch.linspace(0.5, 3, dis.n)
    tensors = {
        "W_enc": dis.W_enc / norms,
        "b_enc": dis.b_enc / norms,
        "W_dec": dis.W_dec * norms[:, None],
        "b_dec": dis.b_dec,
        "threshold": dis.threshold / norms,
    }
    about = {
        "hook_name": "blocks.3.hook_mlp_out",
        "model_name": "g",
        "matryoshka_widths": [4, 9, 20],
    }
    cfg = {"architecture": "jumprelu", "apply_b_dec_to_input": True, "metadata": about}
    made = Disentangler.from_pretrained(
        folder_with(tmp_path / "a", cfg, tensors, "sae_weights.safetensors")
    )
    same(dis, made)
    assert (made.site, made.after_post_norm, made.widths, made.model) == (
        "mlp.3",
        True,
        (4, 9, 20),
        "g",
    )
    old = {
        "architecture": "standard",
        "hook_point": "blocks.3.hook_resid_post",
        "activation_fn_str": "relu",
    }
    del tensors["threshold"]
    made = Disentangler.from_pretrained(
        folder_with(tmp_path / "b", old, tensors, "sae_weights.safetensors")
    )
    same(replace(dis, threshold=torch.zeros(20)), made)
    assert made.site == "residual.3"


def test_the_training_form_of_sae_lens(tmp_path: Path) -> None:
    dis = replace(random(), threshold=torch.full((20,), 0.7))
    norms = torch.linspace(0.5, 3, dis.n)
    tensors = {
        "W_enc": dis.W_enc / norms,
        "b_enc": dis.b_enc / norms,
        "W_dec": dis.W_dec * norms[:, None],
        "b_dec": dis.b_dec,
        "topk_threshold": torch.tensor(0.7, dtype=torch.float64),
    }
    cfg = {"architecture": "matryoshka_batchtopk", "matryoshka_widths": [4, 9, 20], "k": 5}
    path = folder_with(tmp_path / "a", cfg, tensors, "sae_weights.safetensors")
    made = Disentangler.from_pretrained(path)
    same(dis, made)
    assert made.widths == (4, 9, 20) and made.k is None


def test_dictionary_learning_folder(tmp_path: Path) -> None:
    dis = replace(random(), threshold=torch.full((20,), 0.7))
    config = {"trainer": {"dict_class": "MatryoshkaBatchTopKSAE", "layer": 5, "lm_name": "m/n"}}
    state = {
        "W_enc": dis.W_enc, "b_enc": dis.b_enc, "W_dec": dis.W_dec, "b_dec": dis.b_dec, "k": torch.tensor(4),
        "threshold": torch.tensor(0.7), "group_sizes": torch.tensor([4, 5, 11]),
    }  # fmt: skip
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    torch.save(state, tmp_path / "a" / "ae.pt")
    made = Disentangler.from_pretrained(tmp_path / "a")
    same(dis, made)
    assert (made.site, made.widths, made.model, made.k) == ("residual.5", (4, 9, 20), "m/n", None)
    state["threshold"] = torch.tensor(-1.0)
    torch.save(state, tmp_path / "a" / "ae.pt")
    with pytest.warns(ErasureWarning, match="never set"):
        made = Disentangler.from_pretrained(tmp_path / "a")
    assert float(made.threshold.max()) == 0


def test_dictionary_learning_topk_and_linear_names(tmp_path: Path) -> None:
    dis = replace(random(), k=3, threshold=torch.zeros(20))
    config = {"trainer": {"dict_class": "AutoEncoderTopK", "submodule_name": "mlp_out_layer_2"}}
    state = {
        "encoder.weight": dis.W_enc.T, "encoder.bias": dis.b_enc, "decoder.weight": dis.W_dec.T,
        "b_dec": dis.b_dec, "k": torch.tensor(3), "threshold": torch.tensor(5.0),
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save(state, tmp_path / "ae.pt")
    made = Disentangler.from_pretrained(tmp_path)
    same(dis, made)
    assert (made.k, made.site) == (3, "mlp.2")


def test_pickled_objects_are_not_run(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    torch.save({"a": Path("x")}, tmp_path / "ae.pt")
    with pytest.raises(FormatError, match="not a readable state dict"):
        Disentangler.from_pretrained(tmp_path)


def test_an_archive_of_something_else_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    torch.save([torch.zeros(2)], tmp_path / "ae.pt")
    with pytest.raises(FormatError, match="holds a list"):
        Disentangler.from_pretrained(tmp_path)


def test_sparsify_folder(tmp_path: Path) -> None:
    dis = replace(random(), k=3, threshold=torch.zeros(20))
    tensors = {
        "encoder.weight": dis.W_enc.T, "encoder.bias": dis.b_enc, "W_dec": dis.W_dec, "b_dec": dis.b_dec,
    }  # fmt: skip
    path = folder_with(tmp_path / "layers.4.mlp", {"k": 3, "d_in": 8}, tensors, "sae.safetensors")
    made = Disentangler.from_pretrained(path)
    same(dis, made)
    assert (made.site, made.k) == ("mlp.4", 3)
    path = folder_with(
        tmp_path / "layers.5", {"k": 3, "transcode": True}, tensors, "sae.safetensors"
    )
    with pytest.raises(FormatError, match="transcoder"):
        Disentangler.from_pretrained(path)
    loose = {**tensors, "W_dec": 2 * dis.W_dec}
    path = folder_with(tmp_path / "layers.6", {"k": 3}, loose, "sae.safetensors")
    with pytest.warns(ErasureWarning, match="k largest"):
        Disentangler.from_pretrained(path)


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_gemma_scope_files(tmp_path: Path, kind: str) -> None:
    dis = replace(random(), apply_b_dec_to_input=False)
    names = {"w_enc": dis.W_enc, "b_enc": dis.b_enc, "w_dec": dis.W_dec, "b_dec": dis.b_dec}
    tensors = {**names, "threshold": dis.threshold}
    folder = tmp_path / "gemma-scope-2b-pt-mlp" / "layer_7" / "width_16k"
    folder.mkdir(parents=True)
    if kind == "npz":
        np.savez(folder / "params.npz", **{k: v.numpy() for k, v in tensors.items()})
    else:
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "params.safetensors")
    made = Disentangler.from_pretrained(folder)
    same(dis, made)
    assert (made.site, made.after_post_norm) == ("mlp.7", True)


def test_plain_file_is_turned_by_shape(tmp_path: Path) -> None:
    dis = random()
    tensors = {"W_enc": dis.W_enc.T, "b_enc": dis.b_enc, "W_dec": dis.W_dec.T, "b_dec": dis.b_dec}
    save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "x.safetensors")
    made = Disentangler.from_pretrained(tmp_path / "x.safetensors", site="mlp.0")
    same(replace(dis, threshold=torch.zeros(20)), made)
    assert made.widths == (20,)


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    tensors = {"W_enc": torch.eye(3), "W_dec": torch.eye(3), "b_dec": torch.zeros(3)}
    gated = {**tensors, "gate_bias": torch.zeros(3)}
    with pytest.raises(FormatError, match="gated"):
        assemble(gated, origin="it")
    with pytest.raises(FormatError, match="no encoder"):
        assemble({"a": torch.eye(3)}, origin="it")
    with pytest.raises(FormatError, match="one side must be 3"):
        assemble({**tensors, "W_enc": torch.zeros(4, 5)}, origin="it")
    for key, value in (("architecture", "temporal"), ("normalize_activations", "layer_norm")):
        path = folder_with(tmp_path / key, {key: value}, tensors, "sae_weights.safetensors")
        with pytest.raises(FormatError, match=value):
            Disentangler.from_pretrained(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FormatError, match="no dictionary of a known kind"):
        Disentangler.from_pretrained(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="for a release give its id"):
        Disentangler.from_pretrained(str(tmp_path / "nothing"))
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(FormatError, match=r"\.safetensors"):
        Disentangler.from_pretrained(tmp_path / "a.txt")


@pytest.mark.parametrize("damage", ["truncate", "version", "missing", "shape", "json"])
def test_damaged_folders_are_refused(tmp_path: Path, damage: str) -> None:
    path = random().save_pretrained(tmp_path / "dis")
    weights, cfg = path / "sae_weights.safetensors", path / "cfg.json"
    if damage == "truncate":
        weights.write_bytes(weights.read_bytes()[:-9])
    elif damage == "json":
        cfg.write_text("{")
    else:
        record = json.loads(cfg.read_text())
        if damage == "version":
            record["deconcept"]["format_version"] = 99
        elif damage == "missing":
            del record["deconcept"]["site"]
        else:
            record["deconcept"]["widths"] = [3]
        cfg.write_text(json.dumps(record))
    with pytest.raises(FormatError):
        Disentangler.from_pretrained(path)


def test_a_release_without_sae_lens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sae_lens", None)
    with pytest.raises(ImportError, match=r"deconcept\[sae\]"):
        Disentangler.from_pretrained("gemma-scope-2-270m-pt-mlp", "layer_9_width_16k_l0_medium")


def test_a_release_is_sae_lens_business(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    class Registry:
        """Stands in for the package: the network is not asked in tests."""

        class SAE:
            @staticmethod
            def from_pretrained(release: str, sae_id: str, device: str) -> Any:
                asked.append((release, sae_id))
                if release == "unknown":
                    raise ValueError("Release unknown not found")
                if release == "far":
                    raise OSError("no network")
                return Sae()

    class Sae:
        def __init__(self) -> None:
            self.cfg = type("Cfg", (), {})()
            self.cfg.apply_b_dec_to_input = False
            self.cfg.normalize_activations = "none"
            self.cfg.architecture = lambda: "jumprelu"
            about = {
                "hf_hook_name": "model.layers.9.post_feedforward_layernorm.output",
                "model_name": "g",
            }
            self.cfg.metadata = type("M", (), {"to_dict": lambda _: about})()

        def state_dict(self) -> dict[str, torch.Tensor]:
            return random().tensors()

    monkeypatch.setitem(__import__("sys").modules, "sae_lens", Registry)
    made = Disentangler.from_pretrained("gemma-scope-2-270m-pt-mlp", "layer_9_width_16k_l0_medium")
    same(replace(random(), apply_b_dec_to_input=False), made)
    assert (made.site, made.after_post_norm, made.model) == ("mlp.9", True, "g")
    assert made.report["sae_id"] == "layer_9_width_16k_l0_medium"
    with pytest.raises(FormatError, match="does not know"):
        Disentangler.from_pretrained("unknown", "x")
    with pytest.raises(FileNotFoundError, match="could not be downloaded"):
        Disentangler.from_pretrained("far", "x")
    assert len(asked) == 3
