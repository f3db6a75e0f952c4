"""PISCES: rewrite the value vectors of MLPs that carry a concept's sparse features.

A value vector is what one MLP neuron writes into the residual stream. Read through a sparse dictionary of that MLP's
output, a few of them carry the latents of a concept; there the latent's coefficient is replaced by an opposing one and
the vector written back. No gradient, no hook: some columns of some down projections change, in closed form.

Paper: Gur-Arieh, Suslik, Hong, Barez and Geva 2025, arXiv:2505.22586, and its code. The equations are in
`concept_erasure.sae._pisces_edit`. Deviations, which ``preset="paper"`` takes back:

- A dictionary that sits behind the norm after an MLP (Gemma 2 and 3) sees ``g * v``, not v: scores and edits go
  through the norm's gain (``post_norm="auto"``). The published rule reads and writes v itself.
- ``coefficient="linear"``: the latent's linear coefficient c itself becomes the target. The paper takes the
  thresholded code in its place, which is 0 for most weight vectors: the result is ``c + target``, and mu = 0 often does
  nothing.
- ``exact=True``: latents of one layer that are not orthogonal disturb each other; one small system gives them their
  targets at once.
- ``signs="auto"``: an edit follows the usual sign of its neuron on the concept, as in the paper's signed variant.
- Early layers are edited more weakly in every model; the paper does so in Gemma only.

Other options: latents that must stay as they are (``protect``), and the concept's token embeddings in the same call
(``embeddings=True``, see `EmbeddingEditEraser`). Names stay readable at the input without it, and relearning is
faster.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, cast

import torch
from torch import Tensor, nn

from concept_erasure.concept import Concept
from concept_erasure.edit import ColumnPatch, Patch
from concept_erasure.eraser import EraserConfig
from concept_erasure.errors import EditError, ShapeError
from concept_erasure.language.eraser import LanguageConfig, LanguageEraser
from concept_erasure.sae._embedding_edit import EmbeddingOptions, embedding_patches, fit_rows
from concept_erasure.sae._pisces_edit import Coefficient, Scale, value_weight
from concept_erasure.sae._pisces_fit import (
    Selected,
    dictionaries,
    down_projection,
    grouped,
    protected,
)
from concept_erasure.sae._pisces_run import (
    DepthSchedule,
    Fit,
    PiscesConfig,
    PostNorm,
    Preset,
    Texts,
)
from concept_erasure.sae._pisces_tune import Limits, Point, Score
from concept_erasure.sae._sparse_eraser import SparseEraser, check_no_edits, settled
from concept_erasure.sae.disentangler import Disentangler

if TYPE_CHECKING:
    from concept_erasure.sae.search import FeatureTable

__all__ = ["PiscesConfig", "PiscesEraser"]

_PARTS = ("columns", "original", "coefficients", "writes", "before", "targets")

_PRESETS: dict[str, dict[str, Any]] = {
    "default": {
        "scale": "layer", "coefficient": "linear", "exact": True, "post_norm": "auto", "signs": "auto",
        "depth_schedule": "early",
    },
    "paper": {
        "scale": "layer", "coefficient": "code", "exact": False, "post_norm": "off", "signs": "off",
        "depth_schedule": None,
    },
}  # fmt: skip


@dataclass(frozen=True, repr=False, eq=False)
class PiscesEraser(SparseEraser):
    """Changed columns of down projections, and changed rows of the token embeddings if asked for; see `fit`.

    ``weights`` holds for every site, such as ``mlp.9``: ``.columns`` ``(c,)``; ``.original``, the columns as they were,
    ``(d, c)``; ``.coefficients`` ``(c, k)`` and ``.writes`` ``(k, d)``, whose product is what is added; and ``.before``
    and ``.targets`` ``(c, k)``, the linear coefficients before and what was written in their place (0 where a vector
    was not selected for a latent). These are frozen: applying to an edited model changes nothing.

    Example:
        >>> eraser = PiscesEraser.fit(model, tokenizer, concept, disentanglers=dis)  # doctest: +SKIP
        >>> with eraser.apply(model):  # doctest: +SKIP
        ...     ...
    """

    method: ClassVar[str] = "pisces"
    config_type: ClassVar[type[EraserConfig]] = PiscesConfig

    @classmethod
    def fit(  # noqa: PLR0913 options are spelled out
        cls,
        model: nn.Module,
        tokenizer: Any,  # noqa: ANN401 any tokenizer of transformers, or what is called like one
        concept: Concept,
        *,
        disentanglers: Disentangler | Mapping[str, Disentangler] | Mapping[int, Disentangler],
        features: FeatureTable | Sequence[Selected] | None = None,
        preset: Preset = "default",
        tau: float | None = None,
        mu: float | None = None,
        scale: Scale | None = None,
        exact: bool | None = None,
        coefficient: Coefficient | None = None,
        post_norm: PostNorm | None = None,
        ridge: float = 1e-3,
        depth_schedule: DepthSchedule | None = None,
        signs: Literal["auto", "off"] | Mapping[str, Tensor] | None = None,
        protect: FeatureTable
        | Mapping[str, Sequence[int]]
        | Mapping[int, Sequence[int]]
        | None = None,
        embeddings: bool | EmbeddingOptions = False,
        forget_texts: Sequence[str] | None = None,
        retain_texts: Sequence[str] | None = None,
        score: Score | None = None,
        max_kl: float = 0.05,
        limits: Limits | None = None,
        trials: int = 30,
        seed: int = 0,
        cache_dir: str | Path | None = None,
    ) -> Self:
        """Fit the edit; the model is left bit-identical.

        Args:
            model: A causal language model with one down projection in each block.
            tokenizer: Its tokenizer.
            concept: What to erase.
            disentanglers: A dictionary of MLP outputs, or several by layer or site.
            features: Latents to edit with their directions; default those that `find_features` finds.
            preset: See the module.
            tau: Share of the largest coefficient above which a vector is edited, in [0, 1): 0.95 takes a handful of
                vectors, 0.2 hundreds. None: tuned together with mu.
            mu: Size of the opposing coefficient in units of the largest; 0 only takes away, published choices are 3
                to 50 (with ``coefficient="code"``). None: tuned.
            scale: Units of mu: the layer's largest coefficient, or the latent's own. With the layer's, a strong latent
                strengthens the edits of the others.
            exact: See the module.
            coefficient: See the module.
            post_norm: ``"auto"`` uses the gain of a norm behind the MLP where the dictionary sits behind one.
            ridge: Gains near 0 make large edits; lambda is ``ridge * median(g^2)``. With 0.1 instead of 0.001 vectors
                grow less, so that the norm shrinks the rest less.
            depth_schedule: ``"early"`` weakens edits below 9/25 of the depth; ``"none"`` does not.
            signs: ``"auto"`` counts the signs of neurons on the concept; vectors without one are left alone. Signs by
                site, shape ``(m,)``, if they are at hand (`concept_erasure.sae._pisces_fit.value_signs`).
            protect: Latents whose linear coefficients must not change, by layer or site.
            embeddings: Whether to edit the concept's token embeddings too, or with which options.
            forget_texts: Texts of the concept; default its own, or the model's samples.
            retain_texts: Texts to keep, for tuning and searching; default likewise.
            score: What a trial is worth, instead of `TextScore`, which never asks the concept's questions.
            max_kl: Divergence on texts to keep, in nats, that `TextScore` just allows.
            limits: When a trial counts as too weak or too strong.
            trials: Pairs of tau and mu to try at most.
            seed: Of everything random.
            cache_dir: Where the model's samples are kept for the next time.

        Returns:
            The eraser. Its report has for each site the vectors edited, the size of the change, its reach (share of the
            wanted change that arrives in the dictionary's space) and, behind a norm, the mean ``rms_ratio`` on the
            concept's texts; all trials; how many places gave signs.

        Raises:
            ValueError: If options are refused, or no latent is given or found.
            EditError: If an edit is in force, a weight cannot be changed, or no pair of tau and mu will do.
            SiteNotFoundError: If a site does not exist.
        """
        check_no_edits(model)
        given_signs = signs if isinstance(signs, Mapping) else None
        options = _chosen(
            preset, scale=scale, exact=exact, coefficient=coefficient, post_norm=post_norm,
            signs=signs if given_signs is None else "given", depth_schedule=depth_schedule,
        )  # fmt: skip
        known = dictionaries(model, disentanglers)
        if options["depth_schedule"] is None:
            behind = any(dis.post_norm_gain is not None for dis in known.values())
            options["depth_schedule"] = "early" if behind else "none"
        given = PiscesConfig(
            concept=concept.name, preset=preset, tau=0.5 if tau is None else tau, mu=1.0 if mu is None else mu,
            ridge=ridge, embeddings=_embedding_options(embeddings), **options,
        )  # fmt: skip
        texts = Texts(
            model, tokenizer, concept, forget_texts, retain_texts, seed, None if cache_dir is None else Path(cache_dir)
        )  # fmt: skip
        if features is None:
            from concept_erasure.sae.search import find_features  # noqa: PLC0415 when it is needed

            features = find_features(
                model, tokenizer, cast("Any", known), concept, forget_texts=texts.forget,
                retain_texts=texts.retain, seed=seed,
            )  # fmt: skip
        rows = cast("Sequence[Selected]", getattr(features, "features", features))
        chosen = grouped(model, rows, known)
        guarded = {}
        if protect is not None:
            held = cast("Any", getattr(protect, "features", protect))
            guarded = protected(model, held, known)
        config = replace(
            given,
            features=[[s, i, d] for s, held in chosen.items() for i, d in held.items()],
            protected=[[site, i] for site, held in guarded.items() for i in held],
        )
        fit = Fit(model, tokenizer, texts, known, chosen, guarded, config, given_signs)
        parts = None
        if config.embeddings is not None:
            parts = fit_rows(
                model, tokenizer, concept, EmbeddingOptions(**config.embeddings), seed=seed
            )
        tried: list[Point] = []
        if tau is None or mu is None:
            fit, tried = fit.tuned(
                cls, parts, tau=tau, mu=mu, score=score, max_kl=max_kl, limits=limits, trials=trials, seed=seed
            )  # fmt: skip
        return fit.eraser(cls, parts, tried)

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites whose down projections change."""
        return tuple(n.removesuffix(".columns") for n in self.weights if n.endswith(".columns"))

    def change(self, site: str) -> Tensor:
        """Return what is added to the edited columns of a site, shape ``(d, c)``."""
        part = {name: self.weights[f"{site}.{name}"] for name in ("coefficients", "writes")}
        return (part["coefficients"] @ part["writes"]).T

    def _patches(self, model: nn.Module) -> list[Patch]:
        patches: list[Patch] = []
        for site in self.sites:
            path = down_projection(model, site)
            module = model.get_submodule(path)
            columns = self.weights[f"{site}.columns"]
            held = value_weight(module)[columns.to(module.weight.device)].T  # type: ignore[arg-type]
            value = settled(held, self.weights[f"{site}.original"], self.change(site), path)
            if isinstance(module, nn.Linear):
                patches.append(ColumnPatch(f"{path}.weight", columns, value))
            else:  # a Conv1D, whose value vectors are rows
                patches.append(ColumnPatch(f"{path}.weight", columns, value.T, axis=0))
        return patches + embedding_patches(model, self.weights)

    def to_peft(self, folder: str | Path) -> Path:
        """Write the edit as an adapter that ``PeftModel.from_pretrained(model, folder)`` loads.

        Its rank is the number of latents of a layer, or of edited vectors where those are fewer: A selects them, B
        holds what is added.

        Raises:
            EditError: If token embeddings are edited too, which are no adapter of linear modules.
        """
        if any(name.startswith("embedding.") for name in self.weights):
            raise EditError(
                "edited token embeddings are no adapter; apply() and save the model, or fit with embeddings=False"
            )
        paths = cast("Mapping[str, str]", self.report["down_projections"])
        widths = cast("Mapping[str, int]", self.report["vectors"])
        factors: dict[str, Tensor] = {}
        for site in self.sites:
            columns = self.weights[f"{site}.columns"]
            coefficients = self.weights[f"{site}.coefficients"]
            few = len(columns) < coefficients.shape[1]
            inner = torch.eye(len(columns)) if few else coefficients.float()
            right = inner.new_zeros(widths[site], inner.shape[1]).index_copy(0, columns, inner)
            left = self.change(site) if few else self.weights[f"{site}.writes"].T
            factors |= {f"{paths[site]}.lora_left": left, f"{paths[site]}.lora_right": right}
        held = LanguageEraser(factors, config=LanguageConfig(), space=self.space)
        return held.to_peft(folder)

    def _check(self) -> None:
        if not self.sites:
            raise ShapeError("there are no edited columns")
        for site in self.sites:
            missing = [part for part in _PARTS if f"{site}.{part}" not in self.weights]
            if missing:
                raise ShapeError(f"{site!r} lacks {missing[0]!r}")
            c, k = self.weights[f"{site}.coefficients"].shape
            d = self.weights[f"{site}.original"].shape[0]
            wanted = {
                "columns": (c,), "original": (d, c), "writes": (k, d), "before": (c, k), "targets": (c, k),
            }  # fmt: skip
            for part, shape in wanted.items():
                if tuple(self.weights[f"{site}.{part}"].shape) != shape:
                    got = tuple(self.weights[f"{site}.{part}"].shape)
                    raise ShapeError(f"'{site}.{part}' must have shape {shape}; got {got}")

    def __repr__(self) -> str:
        what = ", ".join(f"{len(self.weights[f'{s}.columns'])} at {s}" for s in self.sites)
        where = "bare tensors" if self.space is None else self.space.model
        return f"PiscesEraser(value vectors: {what}; fitted on {where})"


def _chosen(preset: str, **given: object) -> dict[str, Any]:
    if preset not in _PRESETS:
        raise ValueError(f"preset must be one of {', '.join(_PRESETS)}; got {preset!r}")
    return _PRESETS[preset] | {name: value for name, value in given.items() if value is not None}


def _embedding_options(given: bool | EmbeddingOptions) -> dict[str, Any] | None:
    if given is False:
        return None
    return asdict(EmbeddingOptions() if given is True else given)
