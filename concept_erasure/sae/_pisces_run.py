"""The course of a PISCES fit: texts, layers, trials, and the eraser at the end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args

from torch import Tensor, nn

from concept_erasure.concept import Concept
from concept_erasure.edit import Edit, base_fingerprint
from concept_erasure.eraser import EraserConfig
from concept_erasure.errors import EditError
from concept_erasure.language._texts import forget_and_retain
from concept_erasure.sae._concept_tokens import concept_tokens
from concept_erasure.sae._pisces_edit import (
    Change,
    Coefficient,
    Layer,
    Scale,
    change,
    depth_factor,
    value_weight,
)
from concept_erasure.sae._pisces_fit import added, layers_of, mean_rms_ratio, value_signs
from concept_erasure.sae._pisces_tune import (
    MUS,
    TAUS,
    Limits,
    Point,
    Score,
    TextScore,
    TooLargeError,
    search,
)
from concept_erasure.sae._sparse_eraser import SparseEraser
from concept_erasure.sae.disentangler import Disentangler
from concept_erasure.sites import Space, model_id

__all__ = ["DepthSchedule", "Fit", "PiscesConfig", "PostNorm", "Preset", "Signs", "Texts"]

Preset = Literal["default", "paper"]
Signs = Literal["auto", "off", "given"]
PostNorm = Literal["auto", "off"]
DepthSchedule = Literal["early", "none"]
SITE = "weights"
MEASURED_TEXTS = 32
P = TypeVar("P", bound=SparseEraser)
Rows = tuple[Mapping[str, Tensor], Mapping[str, object]]


@dataclass(frozen=True, kw_only=True)
class PiscesConfig(EraserConfig):
    """Options of the fit, see `PiscesEraser.fit`.

    Attributes:
        concept: Name of what was erased.
        preset: Whose defaults were used.
        tau: Share of the largest coefficient above which a vector is edited.
        mu: Size of the opposing coefficient.
        scale: In units of the layer's largest coefficient, or the latent's.
        coefficient: What was replaced.
        exact: Whether latents of a layer were set together.
        post_norm: Whether the gain of a norm behind the MLP was used.
        ridge: lambda of that, in units of the median squared gain.
        depth_schedule: Whether early layers were edited more weakly.
        signs: Whether edits follow the sign of their neurons.
        features: Site, latent and direction of each.
        protected: Site and latent of each.
        embeddings: Options of the embedding edit, if there was one.
    """

    concept: str = ""
    preset: str = "default"
    tau: float = 0.5
    mu: float = 10.0
    scale: str = "layer"
    coefficient: str = "linear"
    exact: bool = True
    post_norm: str = "auto"
    ridge: float = 1e-3
    depth_schedule: str = "early"
    signs: str = "auto"
    features: list[Any] = field(default_factory=list)
    protected: list[Any] = field(default_factory=list)
    embeddings: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.tau < 1:
            raise ValueError(f"tau must be at least 0 and below 1; got {self.tau}")
        if not self.mu >= 0:
            raise ValueError(f"mu must be at least 0; got {self.mu}")
        if not self.ridge >= 0:
            raise ValueError(f"ridge must be at least 0; got {self.ridge}")
        for name, kind in (
            ("scale", Scale), ("coefficient", Coefficient), ("post_norm", PostNorm),
            ("depth_schedule", DepthSchedule), ("signs", Signs), ("preset", Preset),
        ):  # fmt: skip
            if getattr(self, name) not in get_args(kind):
                allowed = ", ".join(map(repr, get_args(kind)))
                raise ValueError(f"{name} must be one of {allowed}; got {getattr(self, name)!r}")


@dataclass(frozen=True, eq=False)
class Texts:
    """Texts to forget and to keep, made when first asked for."""

    model: nn.Module
    tokenizer: Any
    concept: Concept
    given_forget: Sequence[str] | None
    given_retain: Sequence[str] | None
    seed: int
    cache: Path | None
    made: list[tuple[list[str], list[str]]] = field(default_factory=list)

    def _both(self) -> tuple[list[str], list[str]]:
        if not self.made:
            found = forget_and_retain(
                self.model, self.tokenizer, self.concept, self.given_forget, self.given_retain, seed=self.seed,
                cache_dir=self.cache,
            )  # fmt: skip
            self.made.append(found)
        return self.made[0]

    @property
    def forget(self) -> list[str]:
        """Texts of the concept."""
        return self._both()[0]

    @property
    def retain(self) -> list[str]:
        """Texts to keep."""
        return self._both()[1]

    @property
    def tokens(self) -> tuple[int, ...]:
        """Ids that say the concept."""
        return concept_tokens(self.tokenizer, self.concept)


@dataclass(frozen=True, eq=False)
class Fit:
    """What does not depend on tau and mu, and the eraser for a pair of them."""

    model: nn.Module
    tokenizer: Any
    texts: Texts
    known: Mapping[str, Disentangler]
    chosen: Mapping[str, Mapping[int, int]]
    guarded: Mapping[str, Sequence[int]]
    config: PiscesConfig
    signs: Mapping[str, Tensor] | None = None
    held: list[tuple[list[Layer], int]] = field(default_factory=list)

    def layers(self) -> tuple[list[Layer], int]:
        """Return the layers and how many places gave signs; made once."""
        if not self.held:
            config, neurons, seen = self.config, self.signs, 0
            if config.signs == "auto":
                neurons, seen = value_signs(
                    self.model, self.tokenizer, self.texts.forget, list(self.chosen), self.texts.tokens
                )  # fmt: skip
            made = layers_of(
                self.model, self.known, self.chosen, neurons=neurons, protect=self.guarded,
                post_norm=config.post_norm == "auto", ridge=config.ridge,
                depth=depth_factor if config.depth_schedule == "early" else None,
            )  # fmt: skip
            self.held.append((made, seen))
        return self.held[0]

    def changes(self, tau: float, mu: float) -> list[tuple[Layer, Change]]:
        """Return the edits of all layers."""
        options = {
            "scale": self.config.scale, "coefficient": self.config.coefficient, "exact": self.config.exact,
        }  # fmt: skip
        pairs = [
            (one, change(one, tau=tau, mu=mu, **cast("Any", options))) for one in self.layers()[0]
        ]
        if not any(len(made.columns) for _, made in pairs):
            raise EditError("no value vector is selected: on the concept none has a sign")
        return [(one, made) for one, made in pairs if len(made.columns)]

    @contextmanager
    def applied(
        self, cls: type[SparseEraser], tau: float, mu: float, parts: Rows | None
    ) -> Iterator[nn.Module]:
        """Edit the model while the block runs.

        Raises:
            TooLargeError: If an edited vector is not finite in the dtype of its weight.
        """
        pairs = self.changes(tau, mu)
        for layer, made in pairs:
            held = value_weight(self.model.get_submodule(layer.down))[made.columns]
            more = added(layer, made)
            if not bool((held.to(more) + more).to(held.dtype).isfinite().all()):
                raise TooLargeError(f"the edit of {layer.site!r} is not finite in {held.dtype}")
        trial = cls(self._weights(pairs, parts), config=self.config)
        with Edit(self.model, trial._patches(self.model), label="trial"):
            yield self.model

    def _weights(
        self, pairs: Sequence[tuple[Layer, Change]], parts: Rows | None
    ) -> dict[str, Tensor]:
        weights: dict[str, Tensor] = {} if parts is None else dict(parts[0])
        for layer, made in pairs:
            held = value_weight(self.model.get_submodule(layer.down))[made.columns]
            now = layer.linear[made.columns] * made.selected
            weights |= {
                f"{layer.site}.columns": made.columns,
                f"{layer.site}.original": held.T.clone(),
                f"{layer.site}.coefficients": made.coefficients.float(),
                f"{layer.site}.writes": layer.writes.float(),
                f"{layer.site}.before": now.float(),
                f"{layer.site}.targets": made.targets.float(),
            }
        return weights

    def tuned(
        self,
        cls: type[P],
        parts: Rows | None,
        *,
        tau: float | None,
        mu: float | None,
        score: Score | None,
        max_kl: float,
        limits: Limits | None,
        trials: int,
        seed: int,
    ) -> tuple[Fit, list[Point]]:
        """Return the same with the best of the tau and mu that are not given, and what was tried."""
        scored = score or TextScore(
            self.model, self.tokenizer, self.texts.forget, self.texts.retain, self.texts.tokens,
            max_kl=max_kl,
        )  # fmt: skip
        best, tried = search(
            lambda t, m: self.applied(cls, t, m, parts), scored, taus=TAUS if tau is None else (tau,),
            mus=MUS if mu is None else (mu,), trials=trials, limits=limits, seed=seed,
        )  # fmt: skip
        return replace(self, config=replace(self.config, tau=best.tau, mu=best.mu)), tried

    def eraser(self, cls: type[P], parts: Rows | None, tried: Sequence[Point]) -> P:
        """Return the eraser for the tau and mu of the configuration."""
        pairs = self.changes(self.config.tau, self.config.mu)
        width = pairs[0][0].writes.shape[1]
        space = Space(model_id(self.model), base_fingerprint(self.model), SITE, "all", width)
        report = self._report(pairs) | ({} if parts is None else {"embeddings": parts[1]})
        if tried:
            report["trials"] = [one.to_dict() for one in tried]
        return cls(self._weights(pairs, parts), config=self.config, space=space, report=report)

    def _report(self, pairs: Sequence[tuple[Layer, Change]]) -> dict[str, object]:
        seen = self.layers()[1]
        sites: dict[str, object] = {}
        behind: dict[str, tuple[Tensor, Tensor]] = {}
        for layer, made in pairs:
            more = added(layer, made)
            old = value_weight(self.model.get_submodule(layer.down))[made.columns].to(more)
            sites[layer.site] = {
                "latents": layer.latents.tolist(),
                "vectors": len(made.columns),
                "norm_before": float(old.norm()),
                "norm_of_change": float(more.norm()),
                "reach": [round(value, 4) for value in layer.reach.tolist()],
            }
            if self.known[layer.site].post_norm_gain is not None:
                behind[layer.site] = made.columns, more
        report: dict[str, object] = {
            "sites": sites,
            "vectors": {one.site: len(one.linear) for one, _ in pairs},
            "down_projections": {one.site: one.down for one, _ in pairs},
            "not_edited": self._left(pairs),
        }
        if self.config.signs == "auto":
            report["sign_places"] = seen
        if behind:
            report["rms_ratio"] = mean_rms_ratio(
                self.model, self.tokenizer, self.texts.forget[:MEASURED_TEXTS], behind
            )
        return report

    def _left(self, pairs: Sequence[tuple[Layer, Change]]) -> list[list[str | int]]:
        """Return site and latent of those for which no vector is selected: none that carries them has a sign."""
        edited = {
            (layer.site, latent)
            for layer, made in pairs
            for latent in layer.latents[made.selected.any(0).to(layer.latents.device)].tolist()
        }
        every = ((site, latent) for site, held in self.chosen.items() for latent in held)
        return [list(one) for one in every if one not in edited]
