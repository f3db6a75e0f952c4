"""Project a concept's latents off what linear modules read, in their weights.

    W <- W (I - s Q Q^T)        Q an orthonormal basis of the latents' decoder rows

for every linear module that reads the site. At ``value.9``, the activations of the neurons of layer 9's MLP, a decoder
row is a combination of neurons, and what these would write together is no longer written; what is orthogonal to the
rows is read as before.
``s = 1`` takes it away, more writes the opposite, as mu does in PISCES.

The factorisation of neurons is that of Shafran, Geiger and Geva 2025 (arXiv:2506.10920), the projection that of EMBER's
companion without a sparse autoencoder (Suslik et al. 2026, arXiv:2606.03695: ``W -= delta f f^T W``), which takes f
off what an MLP writes. Taking it off what is read, at the neurons, is ours, and so is finding latents by their
efficiency on questions (`find_features`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from concept_erasure.concept import Concept
from concept_erasure.edit import LowRankPatch, Patch, base_fingerprint
from concept_erasure.eraser import EraserConfig
from concept_erasure.errors import EditError, ShapeError
from concept_erasure.language.eraser import LanguageConfig, LanguageEraser
from concept_erasure.linalg import statistics_dtype
from concept_erasure.patches import check_writable
from concept_erasure.sae._pisces_fit import Selected, grouped
from concept_erasure.sae._sparse_eraser import SparseEraser, check_no_edits
from concept_erasure.sae.disentangler import Disentangler, by_site
from concept_erasure.sae.search import Search, find_features
from concept_erasure.sites import Site, Space, as_out_in, model_id, resolve

if TYPE_CHECKING:
    from concept_erasure.sae.search import FeatureTable

__all__ = ["LatentProjectionConfig", "LatentProjectionEraser"]

BASIS, READ = ".basis", ".read"
_ROUGH = 16  # roundings of a weight's dtype that its product with the basis may be off


@dataclass(frozen=True, kw_only=True)
class LatentProjectionConfig(EraserConfig):
    """Options of the fit.

    Attributes:
        concept: Name of what was erased.
        features: Site and number of each latent.
        strength: s.
    """

    concept: str = ""
    features: tuple[tuple[str, int], ...] = ()
    strength: float = 1.0

    def __post_init__(self) -> None:
        rows = tuple((str(site), int(index)) for site, index in self.features)
        object.__setattr__(self, "features", rows)
        if not 0 < self.strength < float("inf"):
            raise ValueError(f"strength must be a positive number; got {self.strength}")


@dataclass(frozen=True, repr=False, eq=False)
class LatentProjectionEraser(SparseEraser):
    """A projection of latents off what some modules read; see `fit`.

    ``weights`` holds for every site ``<site>.basis`` (m, k), orthonormal columns, and for every module that reads it
    ``<module>.read`` (out, k), what the module made of the basis at the fit. These are frozen: applying to a model
    that was edited and committed changes nothing.

    Example:
        >>> dis = semi_nmf(model, tokenizer, texts, others, site="value.9")  # doctest: +SKIP
        >>> eraser = LatentProjectionEraser.fit(model, tokenizer, concept, disentanglers=dis)  # doctest: +SKIP
        >>> with eraser.apply(model):  # doctest: +SKIP
        ...     ...
    """

    method: ClassVar[str] = "latent-projection"
    config_type: ClassVar[type[EraserConfig]] = LatentProjectionConfig

    @classmethod
    def fit(
        cls,
        model: nn.Module,
        tokenizer: Any,  # noqa: ANN401 any tokenizer of transformers, or what is called like one
        concept: Concept,
        *,
        disentanglers: Disentangler | Mapping[str, Disentangler] | Mapping[int, Disentangler],
        features: FeatureTable | Sequence[Selected] | None = None,
        strength: float = 1.0,
        top: int = 8,
        answers: Sequence[tuple[str, str]] | None = None,
        near_answers: Sequence[tuple[str, str]] = (),
        forget_texts: Sequence[str] | None = None,
        retain_texts: Sequence[str] | None = None,
        seed: int = 0,
        cache_dir: str | Path | None = None,
    ) -> Self:
        """Fit the projection; the model is left bit-identical.

        Args:
            model: A causal language model.
            tokenizer: Its tokenizer.
            concept: What to erase.
            disentanglers: A dictionary, or several by site, where only linear modules read: ``value.N`` (see
                `semi_nmf`), or ``norm1.N`` and ``norm2.N``.
            features: Latents to take away, whatever their direction; default those for the concept that
                `find_features` finds: what speaks against it has to stay.
            strength: s; 1 is a projection, more overshoots.
            top: Latents of a site at most, if they are looked for.
            answers: Prompts and right answers about the concept, to find latents by efficiency on them alone. Keep
                others to measure on.
            near_answers: Likewise about its neighbours, which must stay; with ``answers`` only.
            forget_texts: Texts of the concept; default its own, or the model's samples.
            retain_texts: Texts to keep; default likewise.
            seed: Of everything random.
            cache_dir: Where the model's samples are kept for the next time.

        Returns:
            The eraser. Its report has for each site the latents and the share of the readers' weights that was taken.

        Raises:
            ValueError: If an option is refused, or no latent is given or found.
            ShapeError: If a dictionary has another width than its site.
            EditError: If an edit is in force, or something else than linear modules reads a site.
            SiteNotFoundError: If a site does not exist.
        """
        check_no_edits(model)
        if (features is not None and answers) or (near_answers and not answers):
            raise ValueError(
                "answers= are what latents are looked for with: leave features= out to look; near_answers= go with them"
            )
        known = _dictionaries(model, disentanglers)
        if features is None:
            features = _found(
                model, tokenizer, concept, known, top, answers, near_answers, forget_texts=forget_texts,
                retain_texts=retain_texts, seed=seed, cache_dir=cache_dir,
            )  # fmt: skip
        rows = cast("Sequence[Selected]", getattr(features, "features", features))
        chosen = grouped(model, rows, known)
        config = LatentProjectionConfig(
            concept=concept.name,
            features=tuple((site, index) for site, held in chosen.items() for index in held),
            strength=strength,
        )
        readers = {site: _readers(model, site) for site in chosen}
        weights: dict[str, Tensor] = {}
        shares: dict[str, float] = {}
        for site, held in chosen.items():
            basis = _basis(known[site].W_dec[list(held)])
            weights[site + BASIS] = basis
            for path in readers[site]:
                weight = _weight(model, path)
                made = weight @ basis.to(weight)
                weights[path + READ] = made.float()
                shares[path] = float(made.square().sum() / weight.square().sum())
        width = next(iter(weights.values())).shape[0]
        space = Space(model_id(model), base_fingerprint(model), ", ".join(chosen), "all", width)
        report = {
            "readers": {site: list(paths) for site, paths in readers.items()},
            "latents": {site: list(held) for site, held in chosen.items()},
            "share of the weights read": shares,
        }
        return cls(weights, config=config, space=space, report=report)

    @property
    def strength(self) -> float:
        """The s of the edit."""
        return cast("LatentProjectionConfig", self.config).strength

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites that are projected."""
        return tuple(n.removesuffix(BASIS) for n in self.weights if n.endswith(BASIS))

    def scaled(self, strength: float) -> Self:
        """Return a copy with s multiplied.

        Raises:
            ValueError: If it is not positive.
        """
        config = cast("LatentProjectionConfig", self.config)
        return replace(self, config=replace(config, strength=config.strength * strength))

    def _stored(self, site: str) -> tuple[str, ...]:
        """Return the paths, at the fit, of the modules that read a site."""
        return tuple(cast("Mapping[str, Sequence[str]]", self.report["readers"])[site])

    def _patches(self, model: nn.Module) -> list[Patch]:
        patches: list[Patch] = []
        for site in self.sites:
            basis = self.weights[site + BASIS]
            for stored, path in zip(self._stored(site), _readers(model, site), strict=True):
                read = self.weights[stored + READ]
                left = -self.strength * self._missing(model, path, basis, read)
                module = model.get_submodule(path)
                if isinstance(module, nn.Linear):
                    patches.append(LowRankPatch(f"{path}.weight", left, basis))
                else:  # a Conv1D, which stores its weight as (in, out)
                    patches.append(LowRankPatch(f"{path}.weight", basis, left))
        return patches

    def _missing(self, model: nn.Module, path: str, basis: Tensor, read: Tensor) -> Tensor:
        """Return what is still to be taken along the basis: all that was read at the fit, or zeros if it was taken.

        Raises:
            EditError: If the weight is neither what it was at the fit nor that with the edit made.
        """
        weight = _weight(model, path)
        now, then = weight @ basis.to(weight), read.to(weight)
        held = cast("Tensor", model.get_submodule(path).weight)
        eps = max(torch.finfo(one.dtype).eps for one in (held, read))
        # roundings of m entries have this much of their norm along k directions
        share = (basis.shape[1] / basis.shape[0]) ** 0.5
        slack = float(_ROUGH * eps * share * torch.linalg.vector_norm(weight))
        before, after = (
            float(torch.linalg.vector_norm(now - part * then)) for part in (1, 1 - self.strength)
        )
        if min(before, after) <= slack:
            return then if before < after else torch.zeros_like(then)
        raise EditError(
            f"{path!r} holds neither what it held at the fit nor the edit: something else changed it. Undo that, or "
            "fit again"
        )

    def to_peft(self, folder: str | Path) -> Path:
        """Write the edit as an adapter that ``PeftModel.from_pretrained(model, folder)`` loads; its rank is k."""
        factors: dict[str, Tensor] = {}
        for site in self.sites:
            for path in self._stored(site):
                factors[f"{path}.lora_left"] = -self.strength * self.weights[path + READ]
                factors[f"{path}.lora_right"] = self.weights[site + BASIS].clone()
        held = LanguageEraser(factors, config=LanguageConfig(), space=self.space)
        return held.to_peft(folder)

    def _check(self) -> None:
        if not self.sites:
            raise ShapeError("there is no basis")
        if absent := [
            s for s in self.sites if s not in cast("Any", self.report.get("readers", ()))
        ]:
            raise ShapeError(f"the report does not say what reads {absent[0]!r}")
        for name, value in self.weights.items():
            if not name.endswith((BASIS, READ)) or value.ndim != 2:
                raise ShapeError(
                    f"tensors are (m, k) with the names <site>{BASIS} and <module>{READ}; got {name!r} of shape "
                    f"{tuple(value.shape)}"
                )

    def __repr__(self) -> str:
        what = ", ".join(f"{self.weights[s + BASIS].shape[1]} at {s}" for s in self.sites)
        where = "bare tensors" if self.space is None else self.space.model
        return f"LatentProjectionEraser(latents: {what}; strength {self.strength:g}; fitted on {where})"


def _dictionaries(
    model: nn.Module,
    given: Disentangler | Mapping[str, Disentangler] | Mapping[int, Disentangler],
) -> dict[str, Disentangler]:
    """Return dictionaries by the name of their site.

    Raises:
        EditError: If something else than linear modules reads a site.
        ShapeError: If a site has another width.
        ValueError: If there is none, or there are two at one site.
        SiteNotFoundError: If the model has no such site.
    """
    made = by_site(model, given)
    for site, dis in made.items():
        width = _weight(model, _readers(model, site)[0]).shape[1]
        if width != dis.d:
            raise ShapeError(f"{site!r} has width {width}; its dictionary has width {dis.d}")
    return made


def _readers(model: nn.Module, site: str) -> tuple[str, ...]:
    """Return the paths of the modules that alone read a site.

    Raises:
        EditError: If something else reads it, or their weights cannot be changed.
    """
    place: Site = resolve(model, site)[0]
    if not place.readers:
        raise EditError(
            f"what is at {place.name!r} is not read by linear modules alone, so it cannot be projected in weights; "
            "take a dictionary at a site such as 'value.9', 'norm1.9' or 'norm2.9', or PiscesEraser for one at an MLP"
        )
    for path in place.readers:
        check_writable(model, f"{path}.weight")
    return place.readers


def _found(
    model: nn.Module,
    tokenizer: Any,  # noqa: ANN401
    concept: Concept,
    known: Mapping[str, Disentangler],
    top: int,
    answers: Sequence[tuple[str, str]] | None,
    near_answers: Sequence[tuple[str, str]],
    **options: Any,  # noqa: ANN401
) -> list[Selected]:
    """Return the best latents of each site that `find_features` finds, without those that speak against the concept."""
    if answers:
        options |= {
            "scorers": ("efficiency",), "vote": 1, "filters": None, "answers": answers, "near_answers": near_answers,
        }  # fmt: skip
    given: dict[int | str, Disentangler] = dict(known.items())
    linear = Search(linear=True)
    table = find_features(model, tokenizer, given, concept, top=top, options=linear, **options)
    found = [one for one in table if one.direction > 0]
    if answers:  # over all levels: the table's own order has the general ones first
        found.sort(key=lambda one: -one.scores["efficiency"])
    return [one for site in known for one in [f for f in found if f.site == site][:top]]


def _basis(rows: Tensor) -> Tensor:
    """Return an orthonormal basis of rows (k, m) as columns (m, r), r the rank.

    Raises:
        ValueError: If all are zero.
    """
    wide = rows.to(statistics_dtype(rows.device))
    _, sizes, vectors = torch.linalg.svd(wide, full_matrices=False)
    kept = sizes > sizes.max() * max(wide.shape) * torch.finfo(rows.dtype).eps
    if not bool(kept.any()):
        raise ValueError("the decoder rows of the latents are zero: there is nothing to project")
    return cast("Tensor", vectors[kept].T.float().contiguous())


def _weight(model: nn.Module, path: str) -> Tensor:
    """Return a module's weight (out, in) in the widest dtype of its device."""
    module = model.get_submodule(path)
    weight = cast("Tensor", module.weight).detach()
    return as_out_in(module, weight.to(statistics_dtype(weight.device)))
