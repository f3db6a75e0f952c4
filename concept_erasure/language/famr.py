"""FAMR, anchored forgetting: push what should be forgotten towards a target, tied to where the weights were.

``J(th) = F(th) + (rho / 2) ||th - th0||^2`` (F1) with ``F = mean KL(q || p_th)`` over what is to be forgotten; q is the
uniform distribution in the paper. The anchor makes the damage bounded whatever the model: bounds C1 to C5 are computed
after every fit and kept with the eraser, see `certificates`.

A reconstruction. The paper (arXiv:2506.14515) treats image classifiers; only its abstract and introduction could be
read for this, and no public code was found. The objective follows them; the certificates, the other targets, the
margin and retain terms, the Fisher anchor and the forms for language models are derived here. No number of the paper
is claimed.

Near uniform is not forgotten: F can be tiny while the order of the logits survives, because the anchor pulls towards
it. So every fit of a classifier reports argmax accuracy, the AUROC of the forgotten logit and that of a probe on the
penultimate features beside F. Nothing here says that information is gone.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from torch import Tensor, nn

from concept_erasure.concept import Concept
from concept_erasure.edit import active_edits, base_fingerprint
from concept_erasure.eraser import EraserConfig
from concept_erasure.errors import EditError, FormatError
from concept_erasure.language._famr_classifier import ClassifierOptimizer
from concept_erasure.language._famr_fit import AnchorMetric, ClassifierFit, ClassTarget, Rows
from concept_erasure.language._famr_language import Given, Positions, TokenTarget
from concept_erasure.language._famr_tokens import PRESETS, Preset, TokenFit
from concept_erasure.language.certificates import Certificate
from concept_erasure.language.contrast import ContrastSource
from concept_erasure.language.eraser import LanguageConfig, LanguageEraser
from concept_erasure.language.likelihood import chosen
from concept_erasure.language.loop import Training
from concept_erasure.language.parameters import Lora, Raw
from concept_erasure.sites import Space, model_id

__all__ = ["AnchorMetric", "ClassTarget", "FamrConfig", "FamrEraser", "TokenTarget"]


@dataclass(frozen=True, kw_only=True)
class FamrConfig(LanguageConfig):
    """Options of the fit, see `FamrEraser.fit_classifier` and `FamrEraser.fit`.

    Attributes:
        form: ``classifier`` or ``language``.
        rho: The anchor's strength that was used.
    """

    form: str = "language"
    target: str = "uniform"
    rho: float = 0.0
    anchor: str = "euclidean"
    inside: bool = False
    optimizer: str = "adamw"
    forget_classes: list[int] | None = None
    retain_weight: float = 0.0
    margin: float = 0.0
    margin_weight: float = 0.0
    positions: str = "all"
    contrast: str | None = None
    top_k: int = 0
    certify_texts: int = 0
    lanczos_steps: int = 0


@dataclass(frozen=True, repr=False, eq=False)
class FamrEraser(LanguageEraser):
    """A change of weights with certificates; see `LanguageEraser` for its tensors.

    Example:
        >>> eraser = FamrEraser.fit_classifier(net, x, y, forget_classes=3)  # doctest: +SKIP
        >>> print(eraser.certificate)  # doctest: +SKIP
        >>> with eraser.apply(net):  # doctest: +SKIP
        ...     net(x).argmax(1)
    """

    method: ClassVar[str] = "famr"
    config_type: ClassVar[type[EraserConfig]] = FamrConfig

    @property
    def certificate(self) -> Certificate:
        """Bounds C1 to C5 of this fit; print it to read them with their assumptions.

        Raises:
            FormatError: If the eraser carries none.
        """
        found = self.report.get("certificate")
        if not isinstance(found, dict):
            raise FormatError("this eraser carries no certificate; fit it again")
        return Certificate.from_dict(found)

    @classmethod
    def fit_classifier(  # noqa: PLR0913 options are spelled out
        cls,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        *,
        forget_classes: int | Sequence[int] | None = None,
        mask: Tensor | None = None,
        target: ClassTarget = "uniform",
        given: Tensor | None = None,
        rho: float | Literal["auto"] = "auto",
        anchor: AnchorMetric = "euclidean",
        retain_weight: float = 0.0,
        margin: float = 0.0,
        margin_weight: float = 0.0,
        parameters: Sequence[str] = ("*",),
        optimizer: ClassifierOptimizer = "lbfgs",
        steps: int = 100,
        learning_rate: float | None = None,
        inside: bool = False,
        tolerance: float = 1e-6,
        held_out: float | tuple[Tensor, Tensor] = 0.2,
        lanczos_steps: int = 20,
        batch_size: int = 1024,
        seed: int = 0,
    ) -> Self:
        """Fit on a classifier, full batch; the model is left bit-identical.

        Args:
            model: Any module that returns logits ``(n, K)``; it is used in evaluation mode.
            x: Inputs ``(n, ...)`` on the model's device.
            y: Labels ``(n,)``, int64.
            forget_classes: Classes whose rows are to be forgotten; this or ``mask``.
            mask: Rows to be forgotten, shape ``(n,)``, bool.
            target: ``uniform``, the paper's. ``renormalised``: ``p_0`` without the forgotten classes, close to what a
                model that never knew would say (uniform predictions are themselves a sign of membership).
                ``others``: uniform without them. ``given``: yours.
            given: Probabilities ``(K,)``, or a row for each forget row.
            rho: Strength of the anchor; raising it keeps more and forgets less. ``auto``: the first-order step
                ``|grad G| / rho`` is 1 % of ``||th0||``. That is cautious; see the certificate and lower it.
            anchor: ``fisher`` weighs the anchor by the Fisher information on retain rows, as in EWC.
            retain_weight: Of ``KL(p_0 || p)`` on retain rows.
            margin: m of ``max(0, z_y - mean_{k != y} z_k + m)``, for an argmax at chance.
            margin_weight: Its weight.
            parameters: Names or patterns of what may change.
            optimizer: ``lbfgs`` comes closest to a stationary point, where C2 is an equality.
            steps: Most steps.
            learning_rate: Default 1 (of the line search), 1e-3 (adam), 1e-2 (sgd).
            inside: With adam, leave the anchor in the loss. Outside, where it is by default, Adam cannot rescale it,
                but the point where the two balance is then not stationary for J.
            tolerance: Stop when ``|grad J|`` is below this share of its start.
            held_out: Share of the retain rows that the fit does not see, for C4 and the readouts; or inputs and
                labels of other rows, those of forgotten classes among them read out as such.
            lanczos_steps: For the validity of the influence link; 0 does not measure it.
            batch_size: Rows at once.
            seed: Of the split, the Fisher labels, Lanczos and the probe.

        Raises:
            ValueError: If an option is refused, there is nothing to forget, no retain row is left, or the forget rows
                are at the target already.
            ShapeError: If the shapes disagree.
            EditError: If an edit is in force, or a parameter cannot be changed.
            SiteNotFoundError: If a pattern of ``parameters`` matches nothing.
        """
        began = time.perf_counter()
        if edits := active_edits(model):
            raise EditError(
                f"{edits[-1].label} is in force on this model: undo() or commit() it first"
            )
        options = ClassifierFit(
            target=target,
            rho=rho,
            anchor=anchor,
            retain_weight=retain_weight,
            margin=margin,
            margin_weight=margin_weight,
            parameters=tuple(parameters),
            optimizer=optimizer,
            steps=steps,
            learning_rate=learning_rate,
            inside=inside,
            tolerance=tolerance,
            lanczos_steps=lanczos_steps,
            batch_size=batch_size,
            seed=seed,
        )
        rows = Rows.split(x, y, forget_classes, mask, held_out, seed)
        fitted = options.run(model, rows, given)
        config = FamrConfig(
            concept=rows.concept,
            form="classifier",
            target=target,
            rho=fitted.rho,
            anchor=anchor,
            inside=inside,
            optimizer=optimizer,
            forget_classes=None if rows.classes is None else rows.classes.tolist(),
            retain_weight=retain_weight,
            margin=margin,
            margin_weight=margin_weight,
            parameters={"kind": "raw", "patterns": list(parameters)},
            training={"steps": steps, "learning_rate": learning_rate, "seed": seed},
        )
        space = Space(model_id(model), base_fingerprint(model), "weights", "all", fitted.classes)
        report = {**fitted.report, "seconds": round(time.perf_counter() - began, 3)}
        return cls(fitted.weights, config=config, space=space, report=report)

    @classmethod
    def default_training(cls, preset: Preset = "default") -> Training:
        """Return the options of the loop that `fit` uses by itself."""
        if preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}; got {preset!r}")
        return Training(steps=200, learning_rate=1e-3, batch_size=8)

    @classmethod
    def fit(  # noqa: PLR0913 options are spelled out
        cls,
        model: nn.Module,
        tokenizer: Any,  # noqa: ANN401 any tokenizer of transformers, or what is called like one
        concept: Concept,
        *,
        forget_texts: Sequence[str] | None = None,
        retain_texts: Sequence[str] | None = None,
        preset: Preset = "default",
        target: TokenTarget | None = None,
        given: Given | None = None,
        rho: float | Literal["auto"] = "auto",
        retain_weight: float | None = None,
        positions: Positions | None = None,
        contrast: ContrastSource | Literal["auto"] = "auto",
        top_k: int | None = None,
        inside: bool = True,
        lora: Lora | None = None,
        raw: Raw | None = None,
        training: Training | None = None,
        certify_texts: int = 64,
        lanczos_steps: int = 0,
        cache_dir: str | Path | None = None,
    ) -> Self:
        """Fit on a language model, token by token; the model is left bit-identical.

        Args:
            model: A causal language model.
            tokenizer: Its tokenizer.
            concept: What to erase.
            forget_texts: Default those of the concept, else the model's own samples.
            retain_texts: Likewise. A fifth of them is held out for C4.
            preset: ``paper``: uniform targets at every position and no retain term, the paper's objective carried
                over to tokens. It destroys fluency on the concept's texts.
            target: ``elm``, anchored ELM; ``uniform`` over the likeliest `top_k` tokens; ``renormalised``, without the
                token of the text; ``given``. Default ``elm``.
            given: For ``given``, from ``log p_0`` ``(N, V)`` and the tokens ``(N,)`` to ``log q`` ``(N, V)``.
            rho: Strength of the anchor; ``auto``: the first-order step ``|grad G| / rho`` is 30 % of the norm of the
                weights that may change. The run ends at about a tenth of that, since the gradient falls on the way.
            retain_weight: Of ``KL(p_0 || p)`` on retain texts; default 1.
            positions: ``contrast``: those where expert and novice differ. ``all``. Default ``contrast`` where there
                is a source of contrast.
            contrast: ``anonymise`` or ``persona``; ``auto``: the first where the concept has entities, else the
                second. It has to carry a signal of 0.5 nats wherever it is used.
            top_k: Tokens kept of a target; default 20.
            inside: Leave the anchor in the loss. Outside, where Adam cannot rescale it, Adam's steps do not shrink with
                the gradient, so that the same F was reached at twice the distance and more, and J rose with large rho.
            lora: What to train; default a `Lora` of rank 16 on all blocks.
            raw: Parameters to train instead.
            training: Options of the loop; default `default_training`.
            certify_texts: Forget texts, and as many retain texts, on which G is certified.
            lanczos_steps: For the validity of the influence link; costs that many copies of the weights that may
                change. 0 does not measure it.
            cache_dir: Where own samples and targets are kept for the next time.

        Raises:
            ValueError: If texts or options are refused, or there is nothing to forget.
            NoSignalError: If the contrast does not tell an expert from a novice.
            SiteNotFoundError: If there is nothing to train, or the model has no head.
            EditError: If a weight cannot be trained, or an edit is in force.
        """
        given_options = {
            "target": target,
            "retain_weight": retain_weight,
            "positions": positions,
            "top_k": top_k,
        }
        options = chosen(given_options, PRESETS, preset)
        job = TokenFit(
            model=model,
            tokenizer=tokenizer,
            concept=concept,
            given=given,
            rho=rho,
            contrast=contrast,
            inside=inside,
            lora=lora,
            raw=raw,
            training=training or cls.default_training(preset),
            certify_texts=certify_texts,
            lanczos_steps=lanczos_steps,
            cache_dir=None if cache_dir is None else Path(cache_dir),
            **options,
        )
        return job.run(
            cls, forget_texts, retain_texts, FamrConfig(concept=concept.name, preset=preset)
        )
