"""Mean projection: remove the differences of class means; what the field calls directional ablation.

For two classes the one direction is ``v = (mean_1 - mean_0) / |.|`` and the map ``x - v v^T x``; for more, the
means of all classes against the mean of the data span what is removed (C - 1 directions). On the data of the fit
all class means become equal, so no affine predictor of the class is left; non-linear probes are not addressed.

In a model (Arditi et al. 2024, arXiv:2406.11717) one direction is removed wherever the residual stream is written:

* ``attach(model, sites="residual.*")`` projects activations, at any number of sites;
* ``ablate(model)`` folds the projection into every weight that writes to the residual stream (embeddings, the
  output projections of attention and MLP, and their biases), so that the stream never holds the direction.

The published form is linear, ``x - v v^T x``: fit with ``affine=False``, or take `MeanProjectionEraser.linear`. The
affine form (the default, the mean of the data stays) belongs to the site it was fitted at: each of many writers
would add the mean again. Deviations: more than two classes, and the affine form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar, Literal, Self, get_args

import torch
from torch import Tensor, nn

from concept_erasure.collect import Representations
from concept_erasure.data import read_data
from concept_erasure.edit import DensePatch, Edit, Patch
from concept_erasure.eraser import EraserConfig, RepresentationEraser
from concept_erasure.errors import EditError, ShapeError
from concept_erasure.fold import fold_patches
from concept_erasure.labels import LabelKind, as_tensor
from concept_erasure.linalg import LowRankAffine, Moments, statistics_dtype
from concept_erasure.sites import Site, Space, find_sites, resolve, width_at
from concept_erasure.spectral import SpectralFitter, concept_basis, relative_edit, row_shape

__all__ = ["MeanProjectionConfig", "MeanProjectionEraser", "MeanProjectionFitter"]

Tied = Literal["refuse", "untie"]
STREAM = (
    "embedding",
    "residual",
    "attention",
    "mlp",
)  # kinds of sites that hold or write the stream
POSITIONS = ("wpe", "embed_positions", "position_embeddings", "embed_pos", "pos_embed")
ROWS_PER_CHUNK = 8192


@dataclass(frozen=True, kw_only=True)
class MeanProjectionConfig(EraserConfig):
    """Options of the fit, see `MeanProjectionEraser.fit`."""

    affine: bool = True


@dataclass(frozen=True, repr=False, eq=False)
class MeanProjectionEraser(RepresentationEraser):
    """The fitted map ``x - (x - bias) proj_right^T proj_left^T``, an orthogonal projection.

    Attributes:
        proj_left: Orthonormal directions, shape ``(d, k)``; for two classes the difference of means.
        proj_right: The same, shape ``(k, d)``.
        bias: Mean of the fit data, shape ``(d,)``; None in the linear form.

    Example:
        >>> import torch
        >>> x = torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
        >>> z = x[:, 0] > 0
        >>> clean = MeanProjectionEraser.fit(x, z)(x)
        >>> bool((clean[z].mean(0) - clean[~z].mean(0)).abs().max() < 1e-5)
        True
    """

    method: ClassVar[str] = "mean-projection"
    config_type: ClassVar[type[EraserConfig]] = MeanProjectionConfig

    @classmethod
    def fit(
        cls,
        x: object,
        z: object = None,
        *,
        affine: bool = True,
        z_kind: LabelKind = "auto",
        mask: Tensor | None = None,
        weight: Tensor | None = None,
        held_out: tuple[object, object] | Representations | None = None,
        dtype: torch.dtype | None = None,
    ) -> MeanProjectionEraser:
        """Fit on representations ``x`` ``(..., d)`` and class labels ``z``.

        Args:
            x: Tensor, array or table of numbers, or `Representations` (then z may be left out).
            z: Class labels, one a row, or 0/1 columns (one-hot, several binary concepts).
            affine: Keep the mean of the data. False is directional ablation as published.
            z_kind: ``"classes"`` takes floats as class labels.
            mask: Rows of x to use, shape ``x.shape[:-1]``.
            weight: Row weights, same shape.
            held_out: ``(x, z)`` never fitted on, for the report; default five-fold cross-fitting.
            dtype: Dtype of the factors; default float64.

        Raises:
            ValueError: For fewer than two rows, values that are not finite, or labels that are real numbers.
            ShapeError: If x and z disagree.

        Warns:
            ErasureWarning: If there is one class only; the eraser is then the identity.
        """
        data, labels, space = read_data(x, z, z_kind)
        fitter = MeanProjectionFitter(
            data.shape[-1],
            labels.width,
            affine=affine,
            classes=labels.names or None,
            device=data.device,
            dtype=dtype,
        )
        groups = x.rows if isinstance(x, Representations) else None
        fitter._add(data, row_shape(data, labels.values), mask, weight, groups)
        if fitter.n < 2:
            raise ValueError(f"at least 2 rows are needed to fit; the mask leaves {fitter.n}")
        if held_out is not None:
            other = (held_out.x, held_out.z) if isinstance(held_out, Representations) else held_out
            fitter.hold_out(*other, z_kind=z_kind)
        fitter.space = space
        eraser = fitter.eraser
        size = relative_edit(eraser.map, data, fitter.mean_x, mask=mask, weight=weight)
        return replace(eraser, report={**eraser.report, "edit_size": size})

    @classmethod
    def from_directions(cls, directions: object, *, space: Space | None = None) -> Self:
        """Return the linear eraser of given directions, such as a refusal direction.

        Args:
            directions: Shape ``(d,)`` or ``(k, d)``, of any length; made orthonormal.
            space: Where they were found.

        Raises:
            ShapeError: If the shape is another.
            ValueError: If they are not finite, or all zero.
        """
        rows = as_tensor(directions, name="directions")
        rows = rows[None] if rows.ndim == 1 else rows
        if rows.ndim != 2 or rows.numel() == 0:
            raise ShapeError(f"directions must be (d,) or (k, d); got {tuple(rows.shape)}")
        rows = rows.detach().to(statistics_dtype(rows.device))
        if not bool(torch.isfinite(rows).all()) or not bool(rows.any()):
            raise ValueError("directions must be finite and not all zero")
        rtol = max(rows.shape) * torch.finfo(rows.dtype).eps
        basis, rank, _ = concept_basis(rows.T, rtol=rtol)
        config = MeanProjectionConfig(affine=False)
        return cls(
            basis, basis.T.contiguous(), None, config=config, space=space, report={"rank": rank}
        )

    def linear(self) -> Self:
        """Return the published form ``x - v v^T x``, without the mean."""
        if self.bias is None:
            return self
        report = {key: value for key, value in self.report.items() if key != "edit_size"}
        return replace(self, bias=None, config=MeanProjectionConfig(affine=False), report=report)

    def ablate(self, model: nn.Module, *, tied: Tied = "refuse") -> Edit:
        """Fold the projection into every weight that writes to the residual stream.

        Token embedding, learned positions, and the output projections of attention and MLP of every block, with
        their biases. The model then computes what it would with the projection hooked to every writer; a vector
        passed in as ``inputs_embeds`` is not projected.

        Args:
            model: A Hugging Face transformer with norms before its sub-layers, in eval mode.
            tied: What to do when the head shares the embedding. ``"untie"`` gives the head a copy of its own and
                turns the setting off in the configuration; ``"refuse"`` raises.

        Returns:
            One edit; ``undo()`` restores every bit.

        Raises:
            EditError: If the eraser is affine, the fold would not be exact (a norm after the writer, an
                unfamiliar module in a block, training mode), a weight cannot be changed or is tied.
            SpaceError: If the eraser was fitted in another model.
            ShapeError: If the model has another width.
        """
        if tied not in get_args(Tied):
            raise ValueError(f"tied must be 'refuse' or 'untie'; got {tied!r}")
        if self.bias is not None:
            raise EditError(
                "this eraser is affine: each of many writers would add the mean again. Use linear().ablate(model), "
                "or fit with affine=False"
            )
        embeddings, writers = _stream_writers(model)
        places = self._places(model, ["embedding", *(site.name for site in writers)])
        patches: list[Patch] = []
        untied = _tied_head(model, embeddings[0])
        if untied and tied == "refuse":
            raise EditError(
                f"'{embeddings[0]}.weight' is tied to '{untied}.weight': folding would change what the head reads "
                "too. Pass tied='untie', or use attach(model, sites='residual.*')"
            )
        if untied:
            patches.append(_UntiePatch(f"{untied}.weight"))
        for path in embeddings:
            patches.append(
                DensePatch(f"{path}.weight", partial(_project_rows, path=path, function=self.map))
            )
        patches += fold_patches(model, writers, self.map, bias="refuse")
        label = (
            f"{self.method} in all {len(embeddings) + len(writers)} writers of the residual stream"
        )
        return Edit(model, patches, label=label, key=self._keys(model, places))

    def _check_place(self, model: nn.Module, site: Site) -> None:
        """One linear direction serves the whole residual stream; anything else is checked as usual."""
        own = resolve(model, self.space.site)[0].kind if self.space is not None else ""
        if self.bias is not None or not {own, site.kind} <= set(STREAM):
            super()._check_place(model, site)
            return
        width = width_at(model, site)
        if width is not None and width != self.map.width:
            raise ShapeError(
                f"site {site.name!r} has width {width}; the eraser has width {self.map.width}"
            )


class MeanProjectionFitter(SpectralFitter):
    """Streams data and gives the mean projection of all of it: O(n d c) time, O(d c) memory.

    Args:
        x_dim: Width d.
        z_dim: Number of classes (or 0/1 columns) c.
        affine: Keep the mean of the data.
        classes: Class names, so that batches of labels of any type can be streamed.
        device: Where the statistics live.
        dtype: Dtype of the factors given out; statistics stay float64.
    """

    def __init__(
        self,
        x_dim: int,
        z_dim: int,
        *,
        affine: bool = True,
        classes: Sequence[object] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.config = MeanProjectionConfig(affine=affine)
        super().__init__(x_dim, z_dim, affine=affine, classes=classes, device=device, dtype=dtype)

    @property
    def eraser(self) -> MeanProjectionEraser:
        """The eraser of all data seen.

        Raises:
            NotFittedError: If fewer than two rows were seen.
            ValueError: If z are not classes.
        """
        map_, report = self._solve()
        return MeanProjectionEraser(
            map_.left,
            map_.right.T.contiguous(),
            map_.center,
            config=self.config,
            space=self.space,
            report=report,
        )

    def _directions(self, moments: Moments) -> Tensor:
        """Return each class's mean against the mean of the data, shape ``(d, c)``."""
        if not self._binary:
            raise ValueError(
                "mean projection needs classes, and z are real numbers; pass z_kind='classes', 0/1 columns, or use "
                "SalEraser"
            )
        share = moments.mean_z
        return moments.sigma_xz * torch.where(share > 0, 1 / share, torch.zeros_like(share))


def _project_rows(model: nn.Module, *, path: str, function: LowRankAffine) -> Tensor:
    """Return an embedding with the map applied to its rows, a chunk in a wide dtype at a time."""
    weight = model.get_parameter(f"{path}.weight").detach()
    dtype = statistics_dtype(weight.device)
    wide = function.to(weight.device, dtype)
    chunks = [wide(rows.to(dtype)).to(weight.dtype) for rows in weight.split(ROWS_PER_CHUNK)]
    return torch.cat(chunks)


def _tied_head(model: nn.Module, embedding: str) -> str | None:
    """Return the path of the output head if it shares the token embedding."""
    getter = getattr(model, "get_output_embeddings", None)
    head: object = getter() if getter is not None else None
    weight = model.get_submodule(embedding).weight
    if not isinstance(head, nn.Module) or getattr(head, "weight", None) is not weight:
        return None
    return next((path for path, module in model.named_modules() if module is head), None)


def _stream_writers(model: nn.Module) -> tuple[list[str], list[Site]]:
    """Return the embeddings and the sites whose writers together write the residual stream.

    Raises:
        EditError: If the model may hold a writer, or a change of the stream, that is not known.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch module; got {type(model).__name__}")
    sites = find_sites(model)
    blocks = [site for site in sites.values() if site.kind == "residual"]
    embedding, final = sites.get("embedding"), sites.get("norm.final")
    after = getattr(getattr(model, "config", None), "do_layer_norm_before", True) is False
    inside = f"{blocks[0].module.rpartition('.')[0]}."  # a last norm in a block: post-norm models
    if embedding is None or final is None or after or final.module.startswith(inside):
        raise _inexact(
            f"{type(model).__name__} has no token embedding, or norms on the residual stream itself"
        )
    if model.training:
        raise _inexact("the model is in training mode, where dropout may follow; call model.eval()")
    writers: list[Site] = []
    for block in blocks:
        writers += _block_writers(model, block, sites)
    return _embeddings(model, blocks[0].module, embedding, final), writers


def _embeddings(model: nn.Module, block: str, embedding: Site, final: Site) -> list[str]:
    """Return the paths of the token embedding and of learned positions."""
    blocks = block.rpartition(".")[0]
    decoder = blocks.rpartition(".")[0]
    width = width_at(model, embedding)
    paths = [embedding.module]
    for name, child in model.get_submodule(decoder).named_children():
        path = f"{decoder}.{name}".lstrip(".")
        if path in (blocks, embedding.module, final.module) or not any(
            True for _ in child.parameters()
        ):
            continue
        if name in POSITIONS and isinstance(child, nn.Embedding) and child.embedding_dim == width:
            paths.append(path)
        elif decoder:
            raise _inexact(f"{path!r} ({type(child).__name__}) may change the residual stream")
    if embedding.module.rpartition(".")[0] != decoder:
        raise _inexact(f"{embedding.module!r} is not read by the blocks directly")
    return paths


def _block_writers(model: nn.Module, block: Site, sites: dict[str, Site]) -> list[Site]:
    """Return the attention and MLP of a block, if they and norms before them are all there is."""
    index = block.name.partition(".")[2]
    parts = [sites.get(f"{kind}.{index}") for kind in ("attention", "mlp")]
    writers = [site for site in parts if site is not None and site.writer is not None]
    if len(writers) != 2:
        raise _inexact(
            f"the writers of {block.module!r} are not known for sure (shared, unfamiliar)"
        )
    norms = [sites.get(f"{kind}.{index}") for kind in ("norm1", "norm2")]
    known = {site.module for site in norms if site is not None}
    known.update(*(site.readers for site in norms if site is not None))
    module = model.get_submodule(block.module)
    if any(parameter is not None for parameter in module._parameters.values()):
        raise _inexact(f"{block.module!r} has parameters of its own")
    for name, child in module.named_children():
        path = f"{block.module}.{name}"
        writes = any(f"{site.writer}.".startswith(f"{path}.") for site in writers)
        if not writes and path not in known and any(True for _ in child.parameters()):
            raise _inexact(f"{path!r} ({type(child).__name__}) may change what a writer writes")
    return writers


def _inexact(why: str) -> EditError:
    return EditError(
        f"folding into the writers would not be exact: {why}. Use attach(model, sites='residual.*')"
    )


@dataclass
class _UntiePatch:
    """Give the head a copy of the weight it shares with the embedding.

    Attributes:
        target: Name of the head's weight.
    """

    target: str
    _shared: nn.Parameter | None = field(default=None, repr=False)
    _settings: list[tuple[object, str, object]] = field(default_factory=list, repr=False)
    _written: int = 0

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of the parameters that `undo` overwrites."""
        return (self.target,)

    @property
    def bytes_held(self) -> int:
        """Bytes of the weight that is shared again on `undo`."""
        return 0 if self._shared is None else self._shared.numel() * self._shared.element_size()

    def apply(self, model: nn.Module) -> float:
        """Untie; what the model computes does not change."""
        head = model.get_submodule(self.target.rpartition(".")[0])
        shared = model.get_parameter(self.target)
        if shared.is_meta or not shared.is_floating_point():
            raise EditError(f"{self.target!r} is off-loaded or quantised; use attach()")
        head.register_parameter(
            "weight", nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)
        )
        self._shared, self._written = shared, _bits(shared)
        config = getattr(model, "config", None)
        for holder in (config, getattr(config, "text_config", None)):
            if getattr(holder, "tie_word_embeddings", None) is True:
                self._set(holder, "tie_word_embeddings", False)
        ties = getattr(model, "all_tied_weights_keys", None)  # what save_pretrained leaves out
        if isinstance(ties, dict):
            kept = {key: value for key, value in ties.items() if key != self.target}
            self._set(model, "all_tied_weights_keys", kept)
        return 0.0

    def _set(self, holder: object, name: str, value: object) -> None:
        self._settings.append((holder, name, getattr(holder, name)))
        setattr(holder, name, value)

    def before(self, value: Tensor | None) -> Tensor | None:
        """Return the value: it was the same before."""
        return value

    def changed(self, model: nn.Module) -> tuple[str, ...]:
        """Return the target if something else was written there since."""
        if self._shared is None:
            return ()
        return self.targets if _bits(model.get_parameter(self.target)) != self._written else ()

    def undo(self, model: nn.Module) -> None:
        """Tie again."""
        if self._shared is None:
            return
        head = model.get_submodule(self.target.rpartition(".")[0])
        head.register_parameter("weight", self._shared)
        for holder, name, value in reversed(self._settings):
            setattr(holder, name, value)
        self._shared, self._settings = None, []

    def commit(self) -> None:
        """Drop what is kept for the way back."""
        self._shared, self._settings = None, []


def _bits(value: Tensor) -> int:
    """Return the sum of the bytes of a tensor."""
    return int(value.detach().contiguous().view(torch.uint8).sum(dtype=torch.int64))
