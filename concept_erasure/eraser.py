"""The fitted artefact: what every eraser can do, how it is saved, and where it may be used."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import ClassVar, Literal, Self, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from concept_erasure import registry
from concept_erasure.edit import (
    BiasPatch,
    DensePatch,
    Edit,
    HookPatch,
    Patch,
    base_fingerprint,
    check_writable,
)
from concept_erasure.errors import EditError, FormatError, ShapeError, SpaceError
from concept_erasure.linalg import LowRankAffine
from concept_erasure.sites import Site, Space, resolve, width_at

__all__ = ["Eraser", "EraserConfig", "ModelEraser", "RepresentationEraser"]

FORMAT_VERSION = 1
WEIGHTS_FILE, CONFIG_FILE, CARD_FILE = "eraser.safetensors", "eraser_config.json", "README.md"
CONFIG_KEYS = {
    "format_version",
    "library_version",
    "method",
    "config",
    "space",
    "report",
    "tensors",
}
UPGRADE = "pip install --upgrade deconcept"


@dataclass(frozen=True, kw_only=True)
class EraserConfig:
    """Options an eraser was fitted with; subclasses add fields of plain JSON types."""


@dataclass(frozen=True, repr=False, eq=False)
class Eraser(ABC):
    """A fitted, immutable eraser. Tensors are dataclass fields; so are the three below.

    Attributes:
        config: The options of the fit.
        space: Where the representations came from; None when fitted on bare tensors.
        report: What the fit measured: rank, residual, edit size, held-out leakage and so on.
    """

    method: ClassVar[str]
    config_type: ClassVar[type[EraserConfig]] = EraserConfig

    config: EraserConfig = field(default_factory=EraserConfig, kw_only=True)
    space: Space | None = field(default=None, kw_only=True)
    report: Mapping[str, object] = field(default_factory=dict, kw_only=True)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by field name."""
        pairs = ((f.name, getattr(self, f.name)) for f in fields(self))
        return {name: value for name, value in pairs if isinstance(value, Tensor)}

    @property
    def digest(self) -> str:
        """Hash of method, tensors and options: equal erasers have equal digests."""
        sha = hashlib.sha256(self.method.encode())
        for name, value in sorted(self.tensors().items()):
            sha.update(name.encode())
            flat = value.detach().cpu().contiguous().reshape(-1)
            sha.update(flat.view(torch.uint8).numpy().tobytes())
        return sha.hexdigest()[:16]

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Self:
        """Return a copy on another device or in another floating dtype."""
        moved = {
            name: value.to(device=device, dtype=dtype if value.is_floating_point() else None)
            for name, value in self.tensors().items()
        }
        return replace(self, **moved)  # type: ignore[arg-type]  # names of tensor fields

    def with_space(self, space: Space | None) -> Self:
        """Return a copy that claims another space (None: any, with ``sites=`` said and widths checked)."""
        return replace(self, space=space)

    def save_pretrained(self, path: str | Path) -> Path:
        """Write tensors, config and card to a folder; each file appears whole or not at all.

        Returns:
            The folder.
        """
        folder = Path(path)
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is a file; give a folder")
        folder.mkdir(parents=True, exist_ok=True)
        stored = {k: v.detach().cpu().contiguous().clone() for k, v in self.tensors().items()}
        record = {
            "format_version": FORMAT_VERSION,
            "library_version": _library_version(),
            "method": self.method,
            "config": asdict(self.config),
            "space": None if self.space is None else self.space.to_dict(),
            "report": dict(self.report),
            "tensors": _manifest(stored),
        }
        text = json.dumps(record, indent=2, sort_keys=True, allow_nan=False) + "\n"
        _write(folder / WEIGHTS_FILE, lambda p: save_file(stored, p))
        _write(folder / CARD_FILE, lambda p: p.write_text(self.card(), encoding="utf-8"))
        _write(folder / CONFIG_FILE, lambda p: p.write_text(text, encoding="utf-8"))
        return folder

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, token: str | None = None
    ) -> str:
        """Upload to the Hugging Face hub and return the address of the commit."""
        from huggingface_hub import HfApi  # noqa: PLC0415 slow to import

        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            commit = api.upload_folder(
                repo_id=repo_id, folder_path=folder, commit_message=f"Add {self.method} eraser"
            )
        return str(commit.commit_url)

    @classmethod
    def from_pretrained(cls, path_or_repo: str | Path, *, revision: str | None = None) -> Self:
        """Load from a folder or a hub repository; ``Eraser.from_pretrained`` finds the class itself.

        Raises:
            FileNotFoundError: If the folder or repository holds no eraser.
            FormatError: If a file is damaged, newer than this library, or not what it claims to be.
        """
        folder = _local_folder(path_or_repo, revision)
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} holds no {name}; is it a saved eraser?")
        record = _read_config(folder / CONFIG_FILE)
        try:
            kind = registry.load(cast("str", record["method"]))
        except KeyError as error:
            raise FormatError(f"{folder / CONFIG_FILE}: {error.args[0]}; or {UPGRADE}") from None
        if not issubclass(kind, cls):
            raise FormatError(f"{folder} holds a {kind.__name__}; you asked for a {cls.__name__}")
        tensors = _read_tensors(folder / WEIGHTS_FILE)
        if _manifest(tensors) != record["tensors"]:
            raise FormatError(
                f"{folder / WEIGHTS_FILE} holds {_manifest(tensors)}; {CONFIG_FILE} says {record['tensors']}"
            )
        return kind._build(record, tensors, folder)

    @classmethod
    def _build(cls, record: dict[str, object], tensors: dict[str, Tensor], folder: Path) -> Self:
        config = _dataclass_from(cls.config_type, record["config"], folder / CONFIG_FILE)
        own = {f.name: f for f in fields(cls) if f.name not in {"config", "space", "report"}}
        missing = (
            {n for n, f in own.items() if f.default is MISSING and f.default_factory is MISSING}
            - set(tensors)
            - cls._optional_tensors()
        )
        if unknown := sorted(set(tensors) - set(own)):
            raise FormatError(f"{folder / WEIGHTS_FILE}: unknown tensors {unknown}")
        if missing:
            raise FormatError(f"{folder / WEIGHTS_FILE}: missing tensors {sorted(missing)}")
        try:
            space = (
                None
                if record["space"] is None
                else Space.from_dict(cast("dict[str, object]", record["space"]))
            )
            absent: dict[str, Tensor | None] = dict.fromkeys(cls._optional_tensors() - set(tensors))
            built = cls(**tensors, **absent, config=config, space=space, report=record["report"])  # type: ignore[arg-type]
            built._check()
        except (ShapeError, SpaceError, TypeError, ValueError, KeyError) as error:
            raise FormatError(f"{folder}: {error}") from None
        return built

    @classmethod
    def _optional_tensors(cls) -> set[str]:
        """Names of tensor fields that may be None."""
        return set()

    def _check(self) -> None:  # noqa: B027 most erasers have nothing to check
        """Raise ShapeError if the tensors do not fit together; called on load."""

    def card(self) -> str:
        """Return the erasure card: what was fitted, what was measured, what was not tried."""
        from concept_erasure.report import erasure_card  # noqa: PLC0415 evals are optional

        return erasure_card(self)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{k}={tuple(v.shape)}" for k, v in self.tensors().items())
        where = "bare tensors" if self.space is None else f"{self.space.site} of {self.space.model}"
        return f"{type(self).__name__}({shapes}; fitted on {where})"


class RepresentationEraser(Eraser):
    """An eraser with a map on vectors, so it works on tensors and at any site of a model."""

    @property
    @abstractmethod
    def map(self) -> LowRankAffine:
        """The low-rank affine map that is applied."""

    def __call__(self, x: Tensor) -> Tensor:
        """Erase the concept from ``x`` of shape ``(..., d)``; device, dtype and shape are kept."""
        return self.map(x)

    def attach(self, model: nn.Module, *, sites: str | Sequence[str] | None = None) -> Edit:
        """Erase at sites by forward hooks; works at every site and touches no weight.

        Args:
            model: A Hugging Face transformer.
            sites: Site names or patterns; default the site the eraser was fitted at.

        Raises:
            SpaceError: If the eraser was fitted in another model or at another site.
            SiteNotFoundError: If nothing matches.
            ShapeError: If a site has another width.
        """
        places = self._places(model, sites)
        function = partial(_apply_map, self.map)
        return Edit(
            model,
            [HookPatch(site, function) for site in places],
            label=self._label(places),
            key=self._key(places),
        )

    def apply(
        self,
        model: nn.Module,
        *,
        sites: str | Sequence[str] | None = None,
        bias: Literal["add", "refuse"] = "add",
    ) -> Edit:
        """Fold the map into the weights beside the sites, where that is exact.

        Args:
            model: A Hugging Face transformer.
            sites: Site names or patterns; default the site the eraser was fitted at.
            bias: The affine offset needs a bias: ``"add"`` one to linear modules that have none, or ``"refuse"``.

        Raises:
            EditError: If the fold would not be exact (use `attach`), or a weight cannot be changed.
            SpaceError: If the eraser was fitted in another model or at another site.
            SiteNotFoundError: If nothing matches.
            ShapeError: If a site has another width.
        """
        if bias not in ("add", "refuse"):
            raise ValueError(f"bias must be 'add' or 'refuse'; got {bias!r}")
        places = self._places(model, sites)
        patches: list[Patch] = []
        for site in places:
            patches.extend(fold_patches(model, site, self.map, add_bias=bias == "add"))
        return Edit(model, patches, label=self._label(places), key=self._key(places))

    def _label(self, places: Sequence[Site]) -> str:
        return f"{self.method} at {', '.join(site.name for site in places)}"

    def _key(self, places: Sequence[Site]) -> str:
        return f"{self.digest}:{','.join(sorted(site.name for site in places))}"

    def _places(self, model: nn.Module, sites: str | Sequence[str] | None) -> list[Site]:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch module; got {type(model).__name__}")
        if self.space is not None:
            found = base_fingerprint(model)
            if found != self.space.fingerprint:
                raise SpaceError(
                    f"this eraser was fitted in {self.space.model} (weights {self.space.fingerprint[:12]}); "
                    f"this model has weights {found[:12]}. Fit it again, or use with_space(None) if you are sure"
                )
            sites = self.space.site if sites is None else sites
        if sites is None:
            raise SpaceError(
                "this eraser was fitted on bare tensors and does not know its place; say sites='residual.9'"
            )
        places = resolve(model, sites)
        for site in places:
            if self.space is not None and site.name != self.space.site:
                raise SpaceError(
                    f"this eraser was fitted at {self.space.site!r}, not at {site.name!r}; "
                    "fit one per site, or use with_space(None) if you are sure"
                )
            width = width_at(model, site)
            if width is not None and width != self.map.width:
                raise ShapeError(
                    f"site {site.name!r} has width {width}; the eraser has width {self.map.width}"
                )
        return places


@dataclass(frozen=True, repr=False, eq=False)
class ModelEraser(Eraser):
    """An eraser that is a change of weights and has no map on vectors."""

    @abstractmethod
    def apply(self, model: nn.Module) -> Edit:
        """Change the weights in place and return the way back."""


def _apply_map(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return function(x)


def fold_patches(
    model: nn.Module, site: Site, function: LowRankAffine, *, add_bias: bool
) -> list[Patch]:
    """Return the patches that fold a map into the weights beside a site.

    Raises:
        EditError: If no linear module is the only writer, or the only readers, of the activation.
    """
    if site.writer is None and not site.readers:
        raise EditError(
            f"folding at {site.name!r} would not be exact (its activation is also used elsewhere); use attach()"
        )
    patches: list[Patch] = []
    modules = (site.writer,) if site.writer is not None else site.readers
    for path in modules:
        patches.extend(_fold_one(model, path, function, site.writer is not None, add_bias))
    return patches


def _fold_one(
    model: nn.Module, path: str, function: LowRankAffine, writing: bool, add_bias: bool
) -> list[Patch]:
    module = model.get_submodule(path)
    transposed = type(module).__name__ == "Conv1D"  # GPT-2 stores (in, out)
    weight = check_writable(model, f"{path}.weight").detach().double()
    weight = weight.T if transposed else weight
    old = getattr(module, "bias", None)
    bias = None if old is None else check_writable(model, f"{path}.bias").detach().double()
    wide = function.to(weight.device, torch.float64)
    folded, shift = (wide.fold_writing if writing else wide.fold_reading)(weight, bias)
    patches: list[Patch] = [DensePatch(f"{path}.weight", folded.T if transposed else folded)]
    if shift is not None and old is not None:
        patches.append(DensePatch(f"{path}.bias", shift))
    elif shift is not None:
        if not add_bias or not isinstance(module, nn.Linear):
            raise EditError(
                f"{path!r} has no bias to hold the offset; use bias='add', affine=False or attach()"
            )
        patches.append(BiasPatch(path, shift))
    return patches


def _manifest(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return dtype and shape by name, as written beside the tensors."""
    return {
        name: f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
        for name, value in sorted(tensors.items())
    }


def _library_version() -> str:
    try:
        return version("deconcept")
    except PackageNotFoundError:
        return "0+unknown"


def _write(path: Path, write: Callable[[Path], object]) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _local_folder(path_or_repo: str | Path, revision: str | None) -> Path:
    folder = Path(path_or_repo)
    if folder.is_dir():
        return folder
    name = str(path_or_repo)
    if isinstance(path_or_repo, Path) or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"no folder {name!r}; give a folder or a hub id like 'user/name'")
    from huggingface_hub import snapshot_download  # noqa: PLC0415 slow to import

    wanted = [WEIGHTS_FILE, CONFIG_FILE]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"no folder {name!r}, and the hub gave no such repository ({type(error).__name__})"
        ) from error


def _read_config(path: Path) -> dict[str, object]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise FormatError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(record, dict):
        raise FormatError(f"{path} must hold a JSON object; got {type(record).__name__}")
    found = record.get("format_version")
    if type(found) is not int or found < 1:
        raise FormatError(f"{path}: format_version must be a whole number from 1; got {found!r}")
    if found > FORMAT_VERSION:
        raise FormatError(
            f"{path} has format_version {found}; this library reads up to {FORMAT_VERSION}. {UPGRADE}"
        )
    if set(record) != CONFIG_KEYS:
        unknown, missing = sorted(set(record) - CONFIG_KEYS), sorted(CONFIG_KEYS - set(record))
        raise FormatError(
            f"{path}: unknown keys {unknown}, missing keys {missing}; perhaps {UPGRADE}"
        )
    for key, kinds in (
        ("method", str),
        ("config", dict),
        ("space", (dict, type(None))),
        ("report", dict),
        ("tensors", dict),
    ):
        if not isinstance(record[key], kinds):
            raise FormatError(f"{path}: {key!r} has type {type(record[key]).__name__}")
    return record


def _dataclass_from(kind: type[EraserConfig], values: object, path: Path) -> EraserConfig:
    known = {f.name for f in fields(kind)}
    given = cast("dict[str, object]", values)
    if unknown := sorted(set(given) - known):
        raise FormatError(f"{path}: unknown options {unknown}; perhaps {UPGRADE}")
    try:
        return kind(**given)
    except (TypeError, ValueError) as error:
        raise FormatError(f"{path}: {error}") from None


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors = load_file(path)
    except Exception as error:  # noqa: BLE001 safetensors raises its own untyped errors
        raise FormatError(f"{path} is not a readable safetensors file: {error}") from None
    for name, value in tensors.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise FormatError(f"{path}: tensor {name!r} holds values that are not finite")
    return tensors
