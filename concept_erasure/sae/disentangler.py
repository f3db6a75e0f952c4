"""A dictionary of directions at one site of a model: which of them a vector uses, and how much of each.

A sparse autoencoder writes an activation as ``x = b_dec + sum_f z_f(x) d_f + rest`` with few ``z_f`` other than
zero. Five tensors say all of it, whichever library trained them::

    h = (x - b_dec) W_enc + b_enc        pre-activation (some dictionaries do not subtract b_dec)
    z = h where h > threshold, else 0    JumpReLU: each vector for itself
    x^ = z W_dec + b_dec                 rows d_f of W_dec have norm 1

In training, BatchTopK keeps the ``k B`` largest entries of a batch of B vectors; which latents of a vector survive then
depends on the other vectors. It is never used here: one threshold per latent stands in its place (Bussmann et al. 2025,
arXiv:2503.17547, section 3). A *Matryoshka* dictionary is trained so that its first ``widths[g]`` latents alone
reconstruct x as well as so few can: they hold the general concepts, later ones the special cases.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from concept_erasure.errors import ShapeError
from concept_erasure.sae._places import named_site, one_site, post_norm
from concept_erasure.sites import width_at

__all__ = ["Disentangler", "Firing", "by_site", "normalise", "post_norm"]

CHUNK_VALUES = 2**24  # codes of one chunk: 64 MiB in float32
_TOLERANCE = 2e-2  # of a row's norm; bfloat16 rounds to 4e-3


@dataclass(frozen=True, eq=False)
class Firing:
    """How often and how strongly each latent fires on some vectors.

    Attributes:
        count: Number of vectors it fires on, shape ``(n,)``, int64.
        total: Sum of its codes, shape ``(n,)``, float32.
        largest: Largest code, 0 where it never fires, shape ``(n,)``, float32.
        vectors: Number of vectors seen.
    """

    count: Tensor
    total: Tensor
    largest: Tensor
    vectors: int

    @property
    def rate(self) -> Tensor:
        """Share of the vectors it fires on, shape ``(n,)``."""
        return self.count.float() / max(self.vectors, 1)

    @property
    def mean(self) -> Tensor:
        """Mean code over all vectors, those without it included, shape ``(n,)``."""
        return self.total / max(self.vectors, 1)


@dataclass(frozen=True, eq=False, repr=False)
class Disentangler:
    """A sparse dictionary at one site.

    Attributes:
        W_enc: Encoder, shape ``(d, n)``; column ``e_f`` reads latent f.
        b_enc: Shape ``(n,)``.
        W_dec: Decoder, shape ``(n, d)``; row ``d_f``, of norm 1 (or 0), is what latent f writes.
        b_dec: Shape ``(d,)``.
        threshold: Shape ``(n,)``, not negative; a higher one fires less.
        site: Name of the site its vectors come from, such as ``"mlp.9"``.
        post_norm_gain: Gain of the norm between the site and the vectors, shape ``(d,)``; None where there is no
            norm, or the model was not at hand to say (see `after_post_norm`).
        widths: Sizes of the Matryoshka levels, rising, the last is n; ``(n,)`` for a flat dictionary.
        model: Name of the model it was trained on.
        report: What is known about it: training options, measured quality.
        apply_b_dec_to_input: Whether ``b_dec`` is subtracted before encoding.
        after_post_norm: The vectors lie behind the norm that follows the site, if the model has one there; call
            `for_model` to fill in the gain.
        k: Keep only the k largest codes of each vector, as dictionaries trained with TopK do; None keeps all.
    """

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    threshold: Tensor
    site: str = ""
    post_norm_gain: Tensor | None = None
    widths: tuple[int, ...] = ()
    model: str = ""
    report: Mapping[str, object] = field(default_factory=dict)
    apply_b_dec_to_input: bool = True
    after_post_norm: bool = False
    k: int | None = None

    def __post_init__(self) -> None:
        _check_shapes(self)
        if not self.widths:
            object.__setattr__(self, "widths", (self.n,))
        rising = all(a < b for a, b in zip(self.widths, self.widths[1:], strict=False))
        if not rising or self.widths[0] < 1 or self.widths[-1] != self.n:
            raise ShapeError(
                f"widths must rise strictly from at least 1 to n = {self.n}; got {self.widths}"
            )
        if self.k is not None and not 1 <= self.k <= self.n:
            raise ValueError(f"k must lie between 1 and n = {self.n}; got {self.k}")
        if bool((self.threshold < 0).any()):
            raise ValueError(
                "threshold must not be negative: a latent fires above it, and codes are positive; clamp it at 0"
            )
        if self.post_norm_gain is not None:
            object.__setattr__(self, "after_post_norm", True)

    def __repr__(self) -> str:
        levels = "" if len(self.widths) == 1 else f", widths={self.widths}"
        return f"Disentangler({self.site or 'no site'}, d={self.d}, n={self.n}{levels}, {self.model or 'no model'})"

    @property
    def d(self) -> int:
        """Width of the vectors."""
        return self.W_dec.shape[1]

    @property
    def n(self) -> int:
        """Number of latents."""
        return self.W_dec.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.W_dec.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the codes and reconstructions."""
        return self.W_dec.dtype

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name, without a post-norm gain that is not there."""
        names = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold", "post_norm_gain")
        held = {name: cast("Tensor | None", getattr(self, name)) for name in names}
        return {name: value for name, value in held.items() if value is not None}

    # --- the three equations -------------------------------------------------------------------------------------

    def pre(self, x: Tensor, latents: Tensor | None = None) -> Tensor:
        """Return the pre-activations ``h``: linear in x, neither thresholded nor clipped.

        Args:
            x: Shape ``(..., d)``; computed in the dictionary's dtype.
            latents: Indices ``(m,)`` of the latents wanted; default all. Costs m instead of n columns.

        Returns:
            Shape ``(..., n)`` or ``(..., m)``.

        Raises:
            ShapeError: If x has another width.
        """
        if x.shape[-1:] != (self.d,):
            raise ShapeError(
                f"x must have shape (..., {self.d}), the width of {self.site!r}; got {tuple(x.shape)}"
            )
        weight, bias = self.W_enc.to(x.device), self.b_enc.to(x.device)
        if latents is not None:
            weight, bias = weight[:, latents], bias[latents]
        x = x.to(self.dtype)
        if self.apply_b_dec_to_input:
            x = x - self.b_dec.to(x.device)
        return x @ weight + bias

    def encode(self, x: Tensor, latents: Tensor | None = None) -> Tensor:
        """Return the codes z; each vector's depend on nothing but itself.

        Args:
            x: Shape ``(..., d)``. Without a gradient to keep, it is encoded in chunks of rows, so that the result is
                the only tensor of its size. See `chunks` when even that is too large.
            latents: Indices ``(m,)`` of the latents wanted; default all.

        Returns:
            Shape ``(..., n)`` or ``(..., m)``, not negative.

        Raises:
            ShapeError: If x has another width.
        """
        wide = self.n if latents is None or self.k is not None else len(latents)
        step = max(1, CHUNK_VALUES // max(wide, 1))
        if x[..., 0].numel() <= step or (torch.is_grad_enabled() and x.requires_grad):
            return self._encode(x, latents)
        out_wide = self.n if latents is None else len(latents)
        codes = torch.empty(*x.shape[:-1], out_wide, dtype=self.dtype, device=x.device)
        rows, out = x.reshape(-1, x.shape[-1]), codes.view(-1, out_wide)
        for start in range(0, len(rows), step):
            out[start : start + step] = self._encode(rows[start : start + step], latents)
        return codes

    def _encode(self, x: Tensor, latents: Tensor | None) -> Tensor:
        if self.k is None:
            h, theta = self.pre(x, latents), self.threshold.to(x.device)
            return h * (h > (theta if latents is None else theta[latents]))
        h = self.pre(x)
        top = h.topk(self.k, dim=-1)
        z = torch.zeros_like(h).scatter(-1, top.indices, top.values)
        z = z * (z > self.threshold.to(x.device))
        return z if latents is None else z[..., latents]

    def decode(self, z: Tensor) -> Tensor:
        """Return the reconstruction of codes ``(..., n)``, shape ``(..., d)``.

        Raises:
            ShapeError: If z has another width.
        """
        if z.shape[-1:] != (self.n,):
            raise ShapeError(f"z must have shape (..., {self.n}); got {tuple(z.shape)}")
        return z.to(self.dtype) @ self.W_dec.to(z.device) + self.b_dec.to(z.device)

    def __call__(self, x: Tensor) -> Tensor:
        """Return the reconstruction of x ``(..., d)``."""
        return self.decode(self.encode(x))

    # --- levels --------------------------------------------------------------------------------------------------

    def level(self, g: int) -> Self:
        """Return the dictionary of the first ``widths[g]`` latents, sharing memory with this one.

        Args:
            g: Level, from 0; negative ones count from the end.

        Raises:
            IndexError: If there is no such level.
        """
        if not -len(self.widths) <= g < len(self.widths):
            raise IndexError(
                f"level {g} does not exist; the dictionary has {len(self.widths)} levels, of {self.widths} latents"
            )
        width = self.widths[g]
        return replace(
            self,
            W_enc=self.W_enc[:, :width],
            b_enc=self.b_enc[:width],
            W_dec=self.W_dec[:width],
            threshold=self.threshold[:width],
            widths=self.widths[: g % len(self.widths) + 1],
            k=None if self.k is None else min(self.k, width),
        )

    def level_of(self, latent: int) -> int:
        """Return the level that a latent first appears in.

        Raises:
            IndexError: If there is no such latent.
        """
        if not 0 <= latent < self.n:
            raise IndexError(f"latent {latent} does not exist; there are {self.n}")
        return next(g for g, width in enumerate(self.widths) if latent < width)

    def prefixes(self, z: Tensor) -> Iterator[Tensor]:
        """Yield the reconstructions ``x^_g`` of the levels from codes ``(..., n)``, each added to the one before.

        ``x^_0 = b_dec``; ``x^_g = x^_{g-1} + z[w_{g-1}:w_g] W_dec[w_{g-1}:w_g]``. The selection of latents is not
        made again for each level.
        """
        made, start = self.b_dec.to(z.device), 0
        for stop in self.widths:
            made = made + z[..., start:stop].to(self.dtype) @ self.W_dec[start:stop].to(z.device)
            start = stop
            yield made

    # --- many vectors --------------------------------------------------------------------------------------------

    def chunks(self, x: Tensor, rows: int | None = None) -> Iterator[tuple[slice, Tensor]]:
        """Yield slices of the rows of x ``(N, d)`` and their codes ``(rows, n)``, one chunk in memory at a time.

        Args:
            x: The vectors, on any device.
            rows: Rows of a chunk; default as many as make 2^24 codes.
        """
        step = max(1, CHUNK_VALUES // self.n) if rows is None else rows
        for start in range(0, len(x), step):
            where = slice(start, min(start + step, len(x)))
            yield where, self.encode(x[where])

    @torch.no_grad()
    def firing(self, x: Tensor, rows: int | None = None) -> Firing:
        """Return how often and how strongly each latent fires on vectors ``(N, d)``; memory is that of a chunk."""
        count = torch.zeros(self.n, dtype=torch.int64, device=x.device)
        total = torch.zeros(self.n, dtype=torch.float32, device=x.device)
        largest = torch.zeros_like(total)
        for _, z in self.chunks(x, rows):
            count += (z > 0).sum(0)
            total += z.sum(0, dtype=torch.float32)
            largest = torch.maximum(largest, z.amax(0).float())
        return Firing(count, total, largest, len(x))

    @torch.no_grad()
    def calibrate(self, x: Tensor, k: float) -> Self:
        """Return the same dictionary with one threshold for all latents at which k fire per vector on average.

        The threshold is the ``(1 - k/n)`` quantile of the positive parts of the pre-activations. That of training is
        a moving average that starts at 0 and is too low for its first few hundred steps.

        Args:
            x: Vectors ``(N, d)`` not used in training; a few thousand.
            k: Wanted mean number of active latents.

        Raises:
            ValueError: If k is out of range.
        """
        if not 0 < k < self.n:
            raise ValueError(f"k must lie between 0 and n = {self.n}; got {k}")
        keep = round(k * len(x))
        best = torch.zeros(0, dtype=self.dtype, device=x.device)
        step = max(1, CHUNK_VALUES // self.n)
        for part in x.split(step):
            h = self.pre(part).flatten()
            merged = torch.cat((best, h[h > 0]))
            best = merged.topk(min(keep + 1, len(merged)), sorted=False).values
        best = best.sort(descending=True).values
        reached = len(best) > keep  # else fewer are positive than k a vector: all of them fire
        theta = (best[keep - 1] + best[keep]) / 2 if reached and keep else best.new_zeros(())
        return replace(self, threshold=torch.full_like(self.threshold, float(theta)), k=None)

    # --- places --------------------------------------------------------------------------------------------------

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Self:
        """Return the dictionary on another device or in another dtype; itself where nothing changes."""
        moved = {name: value.to(device, dtype) for name, value in self.tensors().items()}
        if all(value is getattr(self, name) for name, value in moved.items()):
            return self
        return replace(self, **cast("Any", moved))

    def for_model(self, model: nn.Module) -> Self:
        """Return the dictionary with what only the model can tell: the gain of the norm it sits behind, if any.

        Args:
            model: The model it is to be used on. If the vectors lie behind the norm that follows the site, the model
                runs on two tokens to find that norm.

        Raises:
            SiteNotFoundError: If the model has no such site.
            ShapeError: If the site has another width.
        """
        place = one_site(model, self.site)
        width = width_at(model, place)
        if width is not None and width != self.d:
            raise ShapeError(
                f"{self!r} has width {self.d} but {place.name!r} of this model has {width}; "
                f"it was made for {self.model or 'another model'}"
            )
        if not self.after_post_norm:
            return self
        found = post_norm(model, self.site)
        if found is None:
            return replace(self, post_norm_gain=None, after_post_norm=False)
        return replace(self, post_norm_gain=found[1].to(self.device, self.dtype))

    def activation_site(self, model: nn.Module) -> str:
        """Return the name of the site whose activations it encodes, for `collect` and `hook`.

        That is `site`, or the module path of the norm behind it where the dictionary sits after one.

        Raises:
            SiteNotFoundError: If the model has no such site.
        """
        found = post_norm(model, self.site) if self.after_post_norm else None
        return one_site(model, self.site).name if found is None else found[0]

    # --- files ---------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write it as a folder that `from_pretrained` and sae-lens read, and return the folder."""
        from concept_erasure.sae.formats import write_folder  # noqa: PLC0415 it imports this module

        return write_folder(self, Path(folder))

    @classmethod
    def from_pretrained(
        cls,
        release_or_folder: str | Path,
        sae_id: str | None = None,
        *,
        site: str | None = None,
        model: nn.Module | str | None = None,
    ) -> Disentangler:
        """Read a dictionary from a folder or file, or from a release in sae-lens' registry.

        Args:
            release_or_folder: A folder of this library, sae-lens, dictionary_learning or sparsify, a safetensors
                file, or the name of a release such as ``"gemma-scope-2-270m-pt-mlp"`` (downloads; needs the extra
                ``sae``).
            sae_id: Which of the release, such as ``"layer_9_width_16k_l0_medium"``; of a folder, a folder inside.
            site: Name of its site, where the files do not say.
            model: The model it is for: then width and site are checked and a post-norm's gain filled in. A string
                is only kept as its name.

        Raises:
            FileNotFoundError: If a folder or file is not there.
            FormatError: If the files are not of a known kind.
            ImportError: If a release is asked for without sae-lens.
        """
        from concept_erasure.sae.formats import read  # noqa: PLC0415 it imports this module

        made = read(release_or_folder, sae_id)
        if site is not None:
            made = replace(made, site=site)
        if isinstance(model, str):
            return replace(made, model=model)
        return made if model is None else made.for_model(model)


def normalise(
    W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, threshold: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the same dictionary with decoder rows of norm 1; the norms go into encoder and threshold.

    ``z_f d_f`` and the set of latents that fire stay as they are. Rows of norm 0 stay 0.

    Args:
        W_enc: Shape ``(d, n)``.
        b_enc: Shape ``(n,)``.
        W_dec: Shape ``(n, d)``.
        threshold: Shape ``(n,)``.
    """
    norms = W_dec.norm(dim=1)
    safe = norms.where(norms > 0, torch.ones_like(norms))
    return W_enc * safe, b_enc * safe, W_dec / safe[:, None], threshold * safe


def _check_shapes(made: Disentangler) -> None:
    if made.W_dec.ndim != 2:
        raise ShapeError(f"W_dec must have shape (n, d); got {tuple(made.W_dec.shape)}")
    n, d = made.W_dec.shape
    wanted = {
        "W_enc": (d, n),
        "b_enc": (n,),
        "b_dec": (d,),
        "threshold": (n,),
        "post_norm_gain": (d,),
    }
    for name, value in made.tensors().items():
        if name in wanted and tuple(value.shape) != wanted[name]:
            raise ShapeError(
                f"{name} must have shape {wanted[name]} beside W_dec {(n, d)}; got {tuple(value.shape)}"
            )
        if value.dtype != made.W_dec.dtype or value.device != made.W_dec.device:
            raise ShapeError(
                f"all tensors must share dtype and device; {name} is {value.dtype} on {value.device}, W_dec "
                f"{made.W_dec.dtype} on {made.W_dec.device}"
            )
        if not value.is_floating_point():
            raise ShapeError(f"{name} must be of a floating dtype; got {value.dtype}")
    norms = made.W_dec.float().norm(dim=1)
    if bool(((norms - 1).abs().where(norms > 0, torch.zeros_like(norms)) > _TOLERANCE).any()):
        raise ValueError(
            f"the rows of W_dec must have norm 1; got norms of {float(norms.min()):.3g} to "
            f"{float(norms.max()):.3g}: fold them into the encoder with normalise()"
        )


def by_site(
    model: nn.Module,
    given: Disentangler
    | Mapping[str, Disentangler]
    | Mapping[int, Disentangler]
    | Mapping[int | str, Disentangler],
) -> dict[str, Disentangler]:
    """Return dictionaries by the name of their site, with post-norm gains filled in.

    Args:
        model: The model.
        given: One, or several by layer or site.

    Raises:
        ValueError: If there is none, two sit at one site, or one sits elsewhere than its key says.
        SiteNotFoundError: If the model has no such site.
        ShapeError: If a dictionary is for another model.
    """
    if isinstance(given, Disentangler):
        given = {given.site: given}
    if not given:
        raise ValueError("no dictionaries are given; train one, or see ce.sae.semi_nmf")
    made: dict[str, Disentangler] = {}
    for key, dis in given.items():
        site = named_site(model, key, dis.site).name
        if site in made:
            raise ValueError(f"two dictionaries sit at {site!r}; choose one")
        made[site] = replace(dis, site=site).for_model(model)
    return made
