"""The fitted artefact: what every eraser can do, how it is saved, and where it may be used."""

from __future__ import annotations

import hashlib
import json
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, cast, get_args, overload

import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

from concept_erasure import registry
from concept_erasure._storage import (
    CARD_FILE,
    CONFIG_FILE,
    FORMAT_VERSION,
    UPGRADE,
    WEIGHTS_FILE,
    config_from,
    json_default,
    library_version,
    local_folder,
    manifest,
    plain,
    read_config,
    read_tensors,
    write,
)
from concept_erasure.diffusion.maps import PIPELINE_SITES, is_pipeline
from concept_erasure.diffusion.tokens import TokenRule
from concept_erasure.edit import Edit, HookPatch, base_fingerprint, lineage, same_lineage
from concept_erasure.errors import (
    EditError,
    FormatError,
    ShapeError,
    SiteNotFoundError,
    SpaceError,
)
from concept_erasure.fold import Bias, fold_patches
from concept_erasure.labels import as_tensor
from concept_erasure.linalg import LowRankAffine
from concept_erasure.sites import Site, Space, base_of, find_sites, resolve, width_at

if TYPE_CHECKING:
    from concept_erasure.collect import Representations

__all__ = ["Eraser", "EraserConfig", "ModelEraser", "RepresentationEraser", "Table", "place_keys"]
TOKEN_RULES = ("last", "first", "mean", "all")


class Table(Protocol):
    """A pandas table, or what has its ``to_numpy``."""

    def to_numpy(self) -> NDArray[Any]:
        """Return the values, shape ``(n, d)``."""
        ...


@dataclass(frozen=True, kw_only=True)
class EraserConfig:
    """Options an eraser was fitted with; subclasses add fields of plain JSON types.

    NumPy scalars and tensors of one element become plain numbers before the subclass checks them.
    """

    def __init_subclass__(cls) -> None:
        check = cls.__dict__.get("__post_init__")
        if check is None:
            return

        def cast_and_check(self: EraserConfig) -> None:
            EraserConfig.__post_init__(self)
            check(self)

        cls.__post_init__ = cast_and_check  # type: ignore[method-assign]

    def __post_init__(self) -> None:
        for option in fields(self):
            object.__setattr__(self, option.name, plain(getattr(self, option.name)))


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
        """Hash of method, options, and the tensors with their shapes and dtypes: equal erasers have equal digests."""
        tensors = self.tensors()
        header = {
            "method": self.method,
            "config": asdict(self.config),
            "tensors": manifest(tensors),
        }
        sha = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
        for _, value in sorted(tensors.items()):
            flat = value.detach().cpu().contiguous().reshape(-1)
            sha.update(flat.view(torch.uint8).numpy().tobytes())
        return sha.hexdigest()[:16]

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Self:
        """Return a copy on another device or in another floating dtype."""
        moved = _moved(self.tensors(), device, dtype)
        return self._same_as(replace(self, **moved))  # type: ignore[arg-type]  # names of tensor fields

    def with_space(self, space: Space | None) -> Self:
        """Return a copy that claims another space (None: any, with ``sites=`` said and widths checked)."""
        return self._same_as(replace(self, space=space))

    @property
    def _identity(self) -> str:
        """Digest of the eraser this is a copy of, in whatever dtype; its own if it is not a copy.

        It is saved with the copy.
        """
        return cast("str | None", getattr(self, "_copy_of", None)) or self.digest

    def _same_as(self, copy: Self) -> Self:
        object.__setattr__(copy, "_copy_of", self._identity)
        return copy

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
            "library_version": library_version(),
            "method": self.method,
            "config": asdict(self.config),
            "space": None if self.space is None else self.space.to_dict(),
            "report": dict(self.report),
            "tensors": manifest(stored),
            "digest": self.digest,
        }
        if self._identity != record["digest"]:
            record["identity"] = self._identity
        text = (
            json.dumps(record, indent=2, sort_keys=True, allow_nan=False, default=json_default)
            + "\n"
        )
        write(folder / WEIGHTS_FILE, lambda p: save_file(stored, p))
        write(folder / CARD_FILE, lambda p: p.write_text(self.card(), encoding="utf-8"))
        write(folder / CONFIG_FILE, lambda p: p.write_text(text, encoding="utf-8"))
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
        folder = local_folder(path_or_repo, revision)
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} holds no {name}; is it a saved eraser?")
        record = read_config(folder / CONFIG_FILE)
        try:
            kind = registry.load(cast("str", record["method"]))
        except KeyError as error:
            raise FormatError(f"{folder / CONFIG_FILE}: {error.args[0]}; or {UPGRADE}") from None
        if not issubclass(kind, cls):
            raise FormatError(f"{folder} holds a {kind.__name__}; you asked for a {cls.__name__}")
        tensors = read_tensors(folder / WEIGHTS_FILE)
        if manifest(tensors) != record["tensors"]:
            raise FormatError(
                f"{folder / WEIGHTS_FILE} holds {manifest(tensors)}; {CONFIG_FILE} says {record['tensors']}"
            )
        built = kind._build(record, tensors, folder)
        if built.digest != record["digest"]:
            raise FormatError(
                f"{folder}: {WEIGHTS_FILE} and {CONFIG_FILE} do not belong together (digest {built.digest}, "
                f"not {record['digest']}): changed by hand, or saving was interrupted. Save the eraser again"
            )
        object.__setattr__(built, "_copy_of", record.get("identity"))
        return built

    @classmethod
    def _build(cls, record: dict[str, object], tensors: dict[str, Tensor], folder: Path) -> Self:
        config = config_from(cls.config_type, record["config"], folder / CONFIG_FILE)
        held = cls._fields(tensors, folder / WEIGHTS_FILE)
        try:
            space = (
                None
                if record["space"] is None
                else Space.from_dict(cast("dict[str, object]", record["space"]))
            )
            report = cast("dict[str, object]", record["report"])
            built = cls(**held, config=config, space=space, report=report)
            built._check()
            built._check_space()
        except (ShapeError, SpaceError, TypeError, ValueError, KeyError) as error:
            raise FormatError(f"{folder}: {error}") from None
        return built

    @classmethod
    def _fields(cls, tensors: dict[str, Tensor], file: Path) -> dict[str, Any]:
        """Return the fields that hold these tensors; raise FormatError if there are too many or too few."""
        own = {f.name: f for f in fields(cls) if f.name not in {"config", "space", "report"}}
        missing = (
            {n for n, f in own.items() if f.default is MISSING and f.default_factory is MISSING}
            - set(tensors)
            - cls._optional_tensors()
        )
        if unknown := sorted(set(tensors) - set(own)):
            raise FormatError(f"{file}: unknown tensors {unknown}")
        if missing:
            raise FormatError(f"{file}: missing tensors {sorted(missing)}")
        return {**tensors, **dict.fromkeys(cls._optional_tensors() - set(tensors))}

    @classmethod
    def _optional_tensors(cls) -> set[str]:
        """Names of tensor fields that may be None."""
        return set()

    def _check(self) -> None:  # noqa: B027 most erasers have nothing to check
        """Raise ShapeError or TypeError if the tensors do not fit together; called on load."""

    def _check_space(self) -> None:
        """Raise SpaceError if the space cannot be this eraser's; called on load."""
        if self.space is None:
            return
        rules = tuple(TokenRule) if self.space.site in PIPELINE_SITES else TOKEN_RULES
        if self.space.tokens not in rules:
            raise SpaceError(
                f"space.tokens must be one of {', '.join(rules)}; got {self.space.tokens!r}"
            )

    def _check_model(self, model: nn.Module) -> None:
        """Raise SpaceError if this eraser was fitted in another model."""
        if self.space is not None and self.space.fingerprint not in lineage(model):
            raise SpaceError(
                f"this eraser was fitted in {self.space.model} (weights {self.space.fingerprint[:12]}); this model "
                f"has weights {base_fingerprint(model)[:12]}. Fit it again, or use with_space(None) if you are sure"
            )

    def card(self) -> str:
        """Return the erasure card: what was fitted, what was measured, what was not tried."""
        from concept_erasure.report import erasure_card  # noqa: PLC0415 evals are optional

        return erasure_card(self)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{k}={tuple(v.shape)}" for k, v in self.tensors().items())
        where = "bare tensors" if self.space is None else f"{self.space.site} of {self.space.model}"
        return f"{type(self).__name__}({shapes}; fitted on {where})"


@dataclass(frozen=True, repr=False, eq=False)
class RepresentationEraser(Eraser):
    """The map ``x - (x - bias) proj_right^T proj_left^T`` on vectors, so it works on tensors and in models.

    Attributes:
        proj_left: Thin factor, shape ``(d, k)``.
        proj_right: Thin factor, shape ``(k, d)``.
        bias: Point that stays where it is, usually the mean of the fit data, shape ``(d,)``; None is the origin.
    """

    proj_left: Tensor
    proj_right: Tensor
    bias: Tensor | None

    @property
    def map(self) -> LowRankAffine:
        """The low-rank affine map that is applied."""
        return LowRankAffine(self.proj_left, self.proj_right.T, self.bias)

    @property
    def P(self) -> Tensor:  # noqa: N802 the papers' symbol
        """The dense projection, shape ``(d, d)``; for looking, never for applying."""
        return self.map.matrix

    @overload
    def __call__(self, x: Tensor) -> Tensor: ...

    @overload
    def __call__(self, x: Representations) -> Representations: ...

    @overload
    def __call__(self, x: NDArray[Any] | Table | Sequence[Sequence[float]]) -> NDArray[Any]: ...

    def __call__(
        self, x: Tensor | Representations | NDArray[Any] | Table | Sequence[Sequence[float]]
    ) -> Tensor | Representations | NDArray[Any]:
        """Erase the concept.

        Args:
            x: Tensor of shape ``(..., d)``, `Representations` of width d, or, as with scikit-learn's
                transformers, a NumPy array, a pandas table or nested lists.

        Returns:
            A tensor for a tensor, on its device and with its dtype and shape; `Representations` with labels and
            space kept; a NumPy array for anything else, with the dtype kept if it is floating point and float64
            for whole numbers.

        Raises:
            SpaceError: If the representations come from another model or site than the eraser, or were read by
                another token rule. One fitted on ``"all"`` tokens takes every rule: what comes out is what the
                attached eraser leaves of these tokens, or of their mean. Its guarantee is for all tokens
                together, not for a selection of them.
            ShapeError: If the width is another.
            TypeError: If x is none of these, or a tensor that is not floating point.
        """
        from concept_erasure.collect import Representations  # noqa: PLC0415 needed for them only

        if isinstance(x, Representations):
            if self.space is not None and x.space is not None:
                _check_same_space(self.space, x.space)
            return replace(x, x=self._map(x.x))
        if isinstance(x, Tensor):
            return self._map(x)
        data = as_tensor(x)
        whole = not data.is_floating_point() and not data.is_complex()
        erased: NDArray[Any] = self._map(data.double() if whole else data).detach().numpy()
        return erased

    def _map(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            raise TypeError(
                f"x must be floating point, because its dtype is kept; got {x.dtype}, pass x.float() or x.double()"
            )
        return self.map(x)

    def attach(
        self, model: nn.Module | object, *, sites: str | Sequence[str] | None = None
    ) -> Edit:
        """Erase at sites by forward hooks; works at every site and touches no weight.

        Args:
            model: A Hugging Face transformer, or a text-to-image pipeline (see `diffusion.projections`).
            sites: Site names or patterns; default the site the eraser was fitted at. Names of one place count once.

        Raises:
            EditError: If this eraser, in whatever dtype, is in force at one of the places already.
            SpaceError: If the eraser was fitted in another model or at another site.
            SiteNotFoundError: If nothing matches.
            ShapeError: If a site has another width.
        """
        if is_pipeline(model):
            from concept_erasure.diffusion import projections  # noqa: PLC0415 it imports this module

            return projections.attach_to_pipeline(self, model, sites)
        model = _module(model)
        places = self._places(model, sites)
        function = partial(_apply_map, self.map)
        return Edit(
            model,
            [HookPatch(site, function) for site in places],
            label=self._label(places),
            key=self._keys(model, places),
        )

    def apply(
        self,
        model: nn.Module | object,
        *,
        sites: str | Sequence[str] | None = None,
        bias: Bias = "auto",
    ) -> Edit:
        """Fold the map into the weights beside the sites, where that is exact.

        Args:
            model: A Hugging Face transformer, or a text-to-image pipeline (see `diffusion.projections`).
            sites: Site names or patterns; default the site the eraser was fitted at. Names of one place count once.
            bias: What to do where the affine offset needs a bias that a linear module lacks. ``"auto"``: add it if
                the architecture can save it. Its configuration then gets the setting (such as ``attention_bias``)
                and every module the setting covers a bias of zeros; otherwise refuse. ``"add"``: the same where
                the architecture can save it, so that nothing is lost; added in memory
                elsewhere, where ``save_pretrained`` and ``from_pretrained`` lose it. ``"refuse"``: never add one.

        Raises:
            EditError: If the fold would not be exact (use `attach`), a weight cannot be changed, a bias is missing
                and must not be added, or this eraser is in force at one of the places already.
            SpaceError: If the eraser was fitted in another model or at another site.
            SiteNotFoundError: If nothing matches.
            ShapeError: If a site has another width.
        """
        if bias not in get_args(Bias):
            raise ValueError(f"bias must be 'auto', 'add' or 'refuse'; got {bias!r}")
        if is_pipeline(model):
            from concept_erasure.diffusion import projections  # noqa: PLC0415 it imports this module

            return projections.apply_to_pipeline(self, model, sites, bias)
        model = _module(model)
        places = self._places(model, sites)
        return Edit(
            model,
            fold_patches(model, places, self.map, bias=bias),
            label=self._label(places),
            key=self._keys(model, places),
        )

    def _label(self, places: Sequence[Site]) -> str:
        return f"{self.method} at {', '.join(site.name for site in places)}"

    def _keys(self, model: nn.Module, places: Iterable[Site]) -> frozenset[str]:
        return place_keys(model, [(self, site) for site in places])

    def _places(self, model: nn.Module, sites: str | Sequence[str] | None) -> list[Site]:
        model = _module(model)
        self._check_model(model)
        if self.space is not None and sites is None:
            sites = self.space.site
        if sites is None:
            raise SpaceError(
                "this eraser was fitted on bare tensors and does not know its place; say sites='residual.9'"
            )
        places = _distinct(resolve(model, sites), _aliases(model))
        for site in places:
            self._check_place(model, site)
        return places

    def _check_place(self, model: nn.Module, site: Site) -> None:
        if self.space is not None and site.name != self.space.site:
            own = resolve(model, self.space.site)
            if len(_distinct([*own, site], _aliases(model))) > len(own):
                raise SpaceError(
                    f"this eraser was fitted at {self.space.site!r}, not at {site.name!r}; "
                    "fit one per site, or use with_space(None) if you are sure"
                )
        width = width_at(model, site)
        if width is not None and width != self.map.width:
            raise ShapeError(
                f"site {site.name!r} has width {width}; the eraser has width {self.map.width}"
            )

    @classmethod
    def _optional_tensors(cls) -> set[str]:
        return {"bias"}

    def _check(self) -> None:
        if self.proj_left.ndim != 2 or self.proj_left.shape != self.proj_right.T.shape:
            raise ShapeError(
                f"proj_left {tuple(self.proj_left.shape)} and proj_right {tuple(self.proj_right.shape)} "
                "must be (d, k) and (k, d)"
            )
        _ = self.map

    def _check_space(self) -> None:
        super()._check_space()
        kinds = {name: value.dtype for name, value in self.tensors().items()}
        if len(set(kinds.values())) > 1 or not self.proj_left.is_floating_point():
            raise TypeError(f"the factors must have one floating dtype; got {kinds}")
        if self.space is not None and self.space.width != self.map.width:
            raise SpaceError(
                f"space.width is {self.space.width}; the factors have width {self.map.width}"
            )


@dataclass(frozen=True, repr=False, eq=False)
class ModelEraser(Eraser):
    """An eraser that is a change of weights and has no map on vectors."""

    @abstractmethod
    def apply(self, model: nn.Module) -> Edit:
        """Change the weights in place and return the way back."""


@dataclass(frozen=True, repr=False, eq=False)
class WeightsEraser(ModelEraser):
    """A model eraser whose tensors have names that depend on the model.

    Attributes:
        weights: Tensors by name; each class says which.
    """

    weights: Mapping[str, Tensor]

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name."""
        return dict(self.weights)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Self:
        """Return a copy on another device or in another floating dtype."""
        return self._same_as(replace(self, weights=_moved(self.weights, device, dtype)))

    @classmethod
    def _fields(cls, tensors: dict[str, Tensor], file: Path) -> dict[str, Any]:
        return {"weights": tensors}  # `_check` knows their names

    @property
    def _title(self) -> str:
        concept = getattr(self.config, "concept", "")
        return f"{self.method}{f' of {concept}' if concept else ''}"


def _moved(
    tensors: Mapping[str, Tensor], device: torch.device | str | None, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    return {
        name: value.to(device=device, dtype=dtype if value.is_floating_point() else None)
        for name, value in tensors.items()
    }


def place_keys(
    model: nn.Module, pairs: Iterable[tuple[RepresentationEraser, Site]]
) -> frozenset[str]:
    """Return the keys of an edit: one for each eraser and place, all names of the place included.

    Places are named relative to the base of the model, so that they are the same with its head and without.

    Raises:
        EditError: If an eraser stands twice at one place.
    """
    aliases = _aliases(model)
    prefix = base_of(model)[0]
    keys: set[str] = set()
    for eraser, site in pairs:
        names = aliases.get(_place(site), frozenset({_place(site)}))
        below = {name.removeprefix(f"{prefix}.") if prefix else name for name in names}
        added = {f"{eraser._identity}@{name}" for name in below}
        if keys & added:
            raise EditError(f"the same eraser is given twice for one place, {site.name!r}")
        keys |= added
    return frozenset(keys)


def _module(model: object) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch module; got {type(model).__name__}")
    return model


def _apply_map(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return function(x)


def _aliases(model: nn.Module) -> dict[str, frozenset[str]]:
    """Return the places that are one activation, by each of them: a part's output is its last module's."""
    try:
        sites = find_sites(model)
    except SiteNotFoundError:
        return {}
    groups = ({_place(s), f"{s.writer}:output"} for s in sites.values() if s.writer)
    return {place: frozenset(group) for group in groups for place in group}


def _place(site: Site) -> str:
    return f"{site.module}:{site.when}"


def _distinct(sites: Iterable[Site], aliases: Mapping[str, frozenset[str]]) -> list[Site]:
    """Return one site for each place: of several names, the first that can be folded, else the first."""
    places: dict[frozenset[str], Site] = {}
    for site in sites:
        group = aliases.get(_place(site), frozenset({_place(site)}))
        kept = places.setdefault(group, site)
        if kept.writer is None and not kept.readers:
            places[group] = site
    return list(places.values())


def _check_same_space(own: Space, other: Space) -> None:
    """Raise SpaceError unless vectors of one space may be given to an eraser of the other."""
    if not same_lineage(own.fingerprint, other.fingerprint):
        marks = own.fingerprint[:12], other.fingerprint[:12]
        what = f"in {own.model} (weights {marks[0]}), not in {other.model} (weights {marks[1]})"
    elif own.site != other.site:
        what = f"at {own.site!r}, not at {other.site!r}"
    elif own.width != other.width:
        what = f"on width {own.width}, not {other.width}"
    elif own.tokens not in (other.tokens, "all"):
        what = f"on tokens={own.tokens!r}, not on tokens={other.tokens!r}"
    else:
        return
    raise SpaceError(
        f"this eraser was fitted {what}; fit it again there, or use with_space(None) if you are sure"
    )
