"""Dictionaries on disk: ours, and those of sae-lens, dictionary_learning, sparsify and plain safetensors files.

| given | read from | kept |
|---|---|---|
| a folder of this library or of sae-lens | `cfg.json`, `sae_weights.safetensors` | site, widths, threshold or k |
| a folder of dictionary_learning | `config.json`, `ae.pt` (only tensors are unpickled) | widths, threshold or k |
| a folder of sparsify | `cfg.json`, `sae.safetensors` | k |
| a folder or file of Gemma Scope | `params.npz` or `params.safetensors` | threshold |
| any other safetensors or npz file | names such as `W_enc`, `encoder.weight`; turned by shape | what is there |
| a release and an id | sae-lens' registry, downloaded | as sae-lens gives it |

Only encoders of the form `JumpReLU(x W + b)`, ReLU and per-vector TopK included, are read; gated dictionaries,
transcoders and inputs that are normalised at run time are refused by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from concept_erasure._storage import json_default, library_version, read_tensors, write
from concept_erasure.errors import FormatError, missing_extra
from concept_erasure.sae._assemble import assemble, site_of
from concept_erasure.sae.disentangler import Disentangler

__all__ = ["assemble", "from_sae_lens", "read", "site_of", "write_folder"]

CONFIG, WEIGHTS, GAIN = "cfg.json", "sae_weights.safetensors", "post_norm_gain.safetensors"
FORMAT_VERSION = 1
_KINDS = {"jumprelu", "standard", "topk", "batchtopk", "matryoshka_batchtopk", "jump_relu"}


# --- folders and files -------------------------------------------------------------------------------------------


def read(release_or_folder: str | Path, sae_id: str | None = None) -> Disentangler:
    """Return the dictionary in a folder, file or release; see `Disentangler.from_pretrained`.

    Raises:
        FileNotFoundError: If a folder or file is not there.
        FormatError: If it is of no known kind.
        ImportError: If a release is asked for without sae-lens.
    """
    path = Path(release_or_folder)
    local = path / sae_id if sae_id is not None and path.is_dir() else path
    if local.is_dir():
        return _read_folder(local)
    if local.is_file():
        return _read_file(local)
    name = str(release_or_folder)
    if sae_id is None or isinstance(release_or_folder, Path) or name.startswith((".", "/", "~")):
        inside = f" with a dictionary {sae_id!r} in it" if sae_id is not None else ""
        raise FileNotFoundError(
            f"no folder or file {name!r}{inside}; for a release give its id too, such as "
            "('gemma-scope-2-270m-pt-mlp', 'layer_9_width_16k_l0_medium')"
        )
    return _read_release(name, sae_id)


def _read_folder(folder: Path) -> Disentangler:
    names = {path.name for path in folder.iterdir()}
    if {CONFIG, WEIGHTS} <= names:
        return _read_sae_lens(folder)
    if {CONFIG, "sae.safetensors"} <= names:
        return _read_sparsify(folder)
    if {"config.json", "ae.pt"} <= names:
        return _read_dictionary_learning(folder)
    for name in ("params.safetensors", "params.npz"):
        if name in names:
            return _read_file(folder / name)
    files = sorted(name for name in names if name.endswith((".safetensors", ".npz")))
    if len(files) == 1:
        return _read_file(folder / files[0])
    raise FormatError(
        f"{folder} is no dictionary of a known kind: it needs {CONFIG} with {WEIGHTS} (sae-lens, this library) or "
        f"sae.safetensors (sparsify), config.json with ae.pt (dictionary_learning), params.npz (Gemma Scope), or one "
        f"safetensors file; it holds {sorted(names)[:8]}"
    )


def _read_file(path: Path) -> Disentangler:
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as data:
            tensors = {name: torch.from_numpy(np.asarray(data[name])) for name in data}
    elif path.suffix == ".safetensors":
        tensors = read_tensors(path)
    else:
        raise FormatError(f"{path} must be a .safetensors or .npz file, or a folder")
    gemma = "w_enc" in tensors or path.stem == "params"  # Gemma Scope does not subtract b_dec
    sizes = tensors.pop("group_sizes", None)
    widths = () if sizes is None else tuple(int(w) for w in sizes.cumsum(0))
    layer = re.search(r"layer_(\d+)", str(path.parent))
    kinds = {"mlp": "hook_mlp_out", "res": "hook_resid_post", "resid_post": "hook_resid_post"}
    kind = next(
        (v for k, v in kinds.items() if re.search(rf"[-/_]{k}[-/_]", f"/{path.parent}/")), None
    )
    hook_name = f"blocks.{layer[1]}.{kind}" if gemma and layer and kind else ""
    return assemble(
        tensors,
        origin=str(path),
        hook_name=hook_name,
        widths=widths,
        apply_b_dec_to_input=not gemma,
    )


def _read_sae_lens(folder: Path) -> Disentangler:
    cfg = _json(folder / CONFIG)
    tensors = read_tensors(folder / WEIGHTS)
    own = cfg.get("deconcept")
    if isinstance(own, dict):
        return _read_own(folder, cfg, own, tensors)
    options = {**_flat(cfg.get("activation_fn_kwargs")), **cfg}
    said = {**cfg, **_flat(cfg.get("metadata"))}
    _refuse_run_time(cfg, str(folder))
    kind = str(cfg.get("architecture", "standard"))
    training = "topk_threshold" in tensors
    unit = training and bool(cfg.get("rescale_acts_by_decoder_norm", True))
    topk = kind == "topk" or said.get("activation_fn", said.get("activation_fn_str")) == "topk"
    if topk and cfg.get("rescale_acts_by_decoder_norm", False):
        unit = True
    return assemble(
        tensors,
        origin=str(folder),
        hook_name=str(
            said.get("hf_hook_name") or said.get("hook_name") or said.get("hook_point") or ""
        ),
        model=str(said.get("model_name") or ""),
        widths=_levels(said),
        k=int(options["k"]) if topk else None,
        apply_b_dec_to_input=bool(cfg.get("apply_b_dec_to_input", True)),
        threshold_of_unit_rows=unit,
        report={"format": "sae-lens"},
    )


def _refuse_run_time(cfg: Mapping[str, Any], origin: str) -> None:
    kind = str(cfg.get("architecture", "standard"))
    if kind not in _KINDS:
        raise FormatError(f"{origin} is of kind {kind!r}; can be read: {', '.join(sorted(_KINDS))}")
    how = cfg.get("normalize_activations", "none")
    if how not in ("none", None, False):
        raise FormatError(
            f"{origin} normalises its input at run time ({how!r}), which five tensors cannot say; train with 'none', "
            "or with 'expected_average_only_in' and save it after training (save_inference_model folds the scale)"
        )


def _read_own(
    folder: Path, cfg: Mapping[str, Any], own: Mapping[str, Any], tensors: dict[str, Tensor]
) -> Disentangler:
    version = own.get("format_version")
    if version != FORMAT_VERSION:
        raise FormatError(
            f"{folder} has format_version {version!r}; this library reads {FORMAT_VERSION}: upgrade it"
        )
    gain = folder / GAIN
    if own.get("post_norm_gain"):
        if not gain.is_file():
            raise FormatError(f"{gain} is missing, though {CONFIG} says there is one")
        tensors |= read_tensors(gain)
    n = tensors["W_dec"].shape[0] if "W_dec" in tensors else 0
    tensors.setdefault("threshold", torch.zeros(n, dtype=tensors["b_enc"].dtype))
    wanted = {"W_enc", "b_enc", "W_dec", "b_dec", "threshold"}
    if not wanted <= set(tensors) <= wanted | {"post_norm_gain"}:
        raise FormatError(f"{folder} must hold {sorted(wanted)}; got {sorted(tensors)}")
    try:
        return Disentangler(
            **cast("Any", tensors),
            site=str(own["site"]),
            widths=_widths(own["widths"]),
            model=str(own["model"]),
            report=_flat(own["report"]),
            apply_b_dec_to_input=bool(cfg["apply_b_dec_to_input"]),
            after_post_norm=bool(own["after_post_norm"]),
            k=None if own["k"] is None else int(own["k"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{folder}: {type(error).__name__}: {error}") from None


def _read_dictionary_learning(folder: Path) -> Disentangler:
    trainer = _flat(_json(folder / "config.json").get("trainer"))
    path = folder / "ae.pt"
    try:  # weights_only: an unpickler for tensors and nothing else
        tensors = torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251 their only format
    except Exception as error:  # noqa: BLE001 whatever a damaged archive raises
        raise FormatError(f"{path} is not a readable state dict: {error}") from None
    if not isinstance(tensors, dict):
        raise FormatError(f"{path} holds a {type(tensors).__name__}; a state dict is wanted")
    tensors = {name: v for name, v in tensors.items() if isinstance(v, Tensor)}
    kind = str(trainer.get("dict_class", ""))
    sizes = tensors.pop("group_sizes", None)
    layer, where = trainer.get("layer"), str(trainer.get("submodule_name") or "")
    hook_name = (
        where if re.search(r"\d", where) or layer is None else f"blocks.{layer}.hook_resid_post"
    )
    plain_input = kind in ("JumpReluAutoEncoder", "AutoEncoderNew")
    return assemble(
        tensors,
        origin=str(folder),
        hook_name=hook_name,
        model=str(trainer.get("lm_name") or ""),
        widths=() if sizes is None else tuple(int(w) for w in sizes.cumsum(0)),
        k=int(tensors["k"]) if kind == "AutoEncoderTopK" and "k" in tensors else None,
        apply_b_dec_to_input=not plain_input,
        report={"format": "dictionary_learning", "kind": kind},
    )


def _read_sparsify(folder: Path) -> Disentangler:
    cfg = _json(folder / CONFIG)
    if cfg.get("transcode") or cfg.get("skip_connection"):
        raise FormatError(f"{folder} is a transcoder, which reads one site and writes another")
    if cfg.get("signed") or cfg.get("activation", "topk") != "topk":
        raise FormatError(
            f"{folder} has codes of another kind: {cfg.get('activation', 'signed')!r}; only topk is read"
        )
    k = int(cfg.get("k", 0))
    return assemble(
        read_tensors(folder / "sae.safetensors"),
        origin=str(folder),
        hook_name=folder.name,
        k=k if k > 0 else None,
        report={"format": "sparsify"},
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise FormatError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(record, dict):
        raise FormatError(f"{path} must hold a JSON object; got {type(record).__name__}")
    return record


def _flat(value: object) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}


def _levels(said: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the Matryoshka widths, which inference files of sae-lens keep among the details of training."""
    details = _flat(said.get("training_architecture_details"))
    return _widths(said.get("matryoshka_widths") or details.get("matryoshka_widths"))


def _widths(value: object) -> tuple[int, ...]:
    return tuple(int(w) for w in value) if isinstance(value, list | tuple) else ()


# --- sae-lens ----------------------------------------------------------------------------------------------------


def _read_release(release: str, sae_id: str) -> Disentangler:
    try:
        from sae_lens import SAE  # noqa: PLC0415 optional and slow to import
    except ImportError:
        raise missing_extra("sae-lens", "sae") from None
    try:
        sae = SAE.from_pretrained(release, sae_id, device="cpu")
    except ValueError as error:
        raise FormatError(f"sae-lens does not know {release!r}, {sae_id!r}: {error}") from error
    except OSError as error:
        raise FileNotFoundError(
            f"{release!r}, {sae_id!r} could not be downloaded ({type(error).__name__}: {error}); "
            "with no network, give a folder"
        ) from error
    made = from_sae_lens(sae)
    kept = {**made.report, "release": release, "sae_id": sae_id}
    return replace(made, report=kept)


def from_sae_lens(sae: Any) -> Disentangler:  # noqa: ANN401 a class of an optional package
    """Return the dictionary in an SAE object of sae-lens.

    Args:
        sae: Of kind standard, topk, jumprelu, or the training form of batchtopk and matryoshka_batchtopk.

    Raises:
        FormatError: If it is of another kind, or normalises its input at run time.
    """
    said = sae.cfg.metadata.to_dict()
    cfg = {
        **{name: getattr(sae.cfg, name) for name in vars(sae.cfg)},
        "architecture": sae.cfg.architecture(),
    }
    _refuse_run_time(cfg, "the SAE")
    tensors = {name: value.detach().clone() for name, value in sae.state_dict().items()}
    topk = cfg["architecture"] == "topk"
    return assemble(
        tensors,
        origin="the SAE",
        hook_name=str(said.get("hf_hook_name") or said.get("hook_name") or ""),
        model=str(said.get("model_name") or ""),
        widths=_levels({**said, **cfg}),
        k=int(cfg["k"]) if topk else None,
        apply_b_dec_to_input=bool(cfg["apply_b_dec_to_input"]),
        threshold_of_unit_rows=bool(cfg.get("rescale_acts_by_decoder_norm", False)),
        report={"format": "sae-lens"},
    )


def write_folder(made: Disentangler, folder: Path) -> Path:
    """Write a dictionary as a folder that `read` and ``sae_lens.SAE.load_from_disk`` read; return the folder.

    Files are written whole or not at all. What sae-lens has no field for is under ``"deconcept"`` in ``cfg.json``,
    and a post-norm's gain in a file of its own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    held = {name: value.detach().cpu().contiguous() for name, value in made.tensors().items()}
    gain = held.pop("post_norm_gain", None)
    if made.k is not None and not bool((made.threshold > 0).any()):
        held.pop("threshold")  # sae-lens' TopK has none
    cfg = {
        "architecture": "jumprelu" if made.k is None else "topk",
        "d_in": made.d,
        "d_sae": made.n,
        "dtype": str(made.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": made.apply_b_dec_to_input,
        "normalize_activations": "none",
        "reshape_activations": "none",
        **({} if made.k is None else {"k": made.k}),
        "metadata": {
            "sae_lens_version": "6.0.0",
            "model_name": made.model,
            "hook_name": made.site,
            "matryoshka_widths": list(made.widths),
        },
        "deconcept": {
            "format_version": FORMAT_VERSION,
            "library_version": library_version(),
            "site": made.site,
            "widths": list(made.widths),
            "model": made.model,
            "after_post_norm": made.after_post_norm,
            "post_norm_gain": gain is not None,
            "k": made.k,
            "report": dict(made.report),
        },
    }
    text = json.dumps(cfg, indent=1, default=json_default)
    write(folder / WEIGHTS, lambda path: save_file(held, path))
    if gain is not None:
        write(folder / GAIN, lambda path: save_file({"post_norm_gain": gain}, path))
    write(folder / CONFIG, lambda path: path.write_text(text, encoding="utf-8"))
    return folder
