"""The table of methods: what each is called, where it lives and what it guarantees."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from concept_erasure.eraser import Eraser

__all__ = [
    "ENTRY_POINT_GROUP",
    "GUARANTEES",
    "METHODS",
    "Method",
    "for_pipelines",
    "get",
    "load",
    "names",
]

ENTRY_POINT_GROUP = "concept_erasure.methods"

GUARANTEES = {
    "guarded": "no affine predictor of the concept beats the constant one on the fit data",
    "idempotent": "applying twice equals applying once",
    "orthogonal": "the projection is symmetric",
    "mean_preserving": "the mean of the fit data does not move",
    "least_damage": "no guarding affine map makes a smaller edit on the fit data",
    "needs_labels": "labels are needed when erasing, so it cannot be put into a model",
    "quadratic": "class covariances become equal too, so quadratic probes learn nothing",
    "blank_prompt": "by default the embeddings of the blank prompt do not move",
    "bounded": "how far the weights moved is bounded, and the bound is kept with the eraser",
    "task_preserving": "the covariance with the task labels is kept",
}


@dataclass(frozen=True, kw_only=True)
class Method:
    """A registry entry.

    Attributes:
        name: Lower-case name, used in files and on the command line.
        family: ``linear``, ``sae``, ``language`` or ``diffusion``.
        target: ``"module:Class"``, imported only when asked for.
        guarantees: Keys of `GUARANTEES`; the battery checks each.
        summary: One sentence.
        paper: Authors, year, arXiv number.
        options: Keyword arguments of ``fit`` that select this entry's variant.
    """

    name: str
    family: str
    target: str
    guarantees: frozenset[str]
    summary: str
    paper: str
    options: dict[str, str] = field(default_factory=dict)

    def load(self) -> type[Eraser]:
        """Import and return the eraser class."""
        module, _, attribute = self.target.partition(":")
        return cast("type[Eraser]", getattr(importlib.import_module(module), attribute))


_LEACE = "concept_erasure.linear.leace:LeaceEraser"

METHODS: dict[str, Method] = {
    entry.name: entry
    for entry in (
        Method(
            name="leace",
            family="linear",
            target=_LEACE,
            guarantees=frozenset({"guarded", "idempotent", "mean_preserving", "least_damage"}),
            summary="Remove all linear information about the concept with the smallest edit.",
            paper="Belrose et al. 2023, arXiv:2306.03819",
        ),
        Method(
            name="orth",
            family="linear",
            target=_LEACE,
            guarantees=frozenset({"guarded", "idempotent", "orthogonal", "mean_preserving"}),
            summary="Project orthogonally off the column space of the cross-covariance.",
            paper="Shao, Ziser and Cohen 2023, arXiv:2203.07893 (full rank, with a bias)",
            options={"method": "orth"},
        ),
        Method(
            name="oracle",
            family="linear",
            target="concept_erasure.linear.oracle:OracleEraser",
            guarantees=frozenset({"guarded", "mean_preserving", "needs_labels"}),
            summary="Subtract what the labels explain linearly; needs the labels at use.",
            paper="Belrose et al. 2023, arXiv:2306.03819",
        ),
        Method(
            name="quadratic",
            family="linear",
            target="concept_erasure.linear.quadratic:QuadraticEraser",
            guarantees=frozenset({"guarded", "quadratic", "mean_preserving", "needs_labels"}),
            summary="Transport every class to their common barycentre; needs the labels at use.",
            paper="Belrose et al. 2023 (reference library); Gaussian optimal transport",
        ),
        Method(
            name="splince",
            family="linear",
            target="concept_erasure.linear.splince:SplinceEraser",
            guarantees=frozenset({"guarded", "idempotent", "mean_preserving", "task_preserving"}),
            summary="Guard the concept and keep the covariance with a task.",
            paper="Holstege, Ravfogel and Wouters 2025",
        ),
        Method(
            name="sal",
            family="linear",
            target="concept_erasure.linear.sal:SalEraser",
            guarantees=frozenset({"guarded", "idempotent", "orthogonal", "mean_preserving"}),
            summary="Remove the strongest left singular vectors of the cross-covariance, all by default.",
            paper="Shao, Ziser and Cohen 2023, arXiv:2203.07893",
        ),
        Method(
            name="mean-projection",
            family="linear",
            target="concept_erasure.linear.mean_projection:MeanProjectionEraser",
            guarantees=frozenset({"guarded", "idempotent", "orthogonal", "mean_preserving"}),
            summary="Project off the differences of class means; as directional ablation also in the weights.",
            paper="Arditi et al. 2024, arXiv:2406.11717",
        ),
        Method(
            name="rlace",
            family="linear",
            target="concept_erasure.linear.rlace:RlaceEraser",
            guarantees=frozenset({"idempotent", "orthogonal", "mean_preserving"}),
            summary="Remove the k directions that leave a linear predictor worst off; for two classes in closed form.",
            paper="Ravfogel et al. 2022, arXiv:2201.12091",
        ),
        Method(
            name="inlp",
            family="linear",
            target="concept_erasure.linear.inlp:InlpEraser",
            guarantees=frozenset({"idempotent", "orthogonal", "mean_preserving"}),
            summary="Remove the weights of one linear classifier after another; a baseline that removes too much.",
            paper="Ravfogel et al. 2020, arXiv:2004.07667",
        ),
        Method(
            name="uce",
            family="diffusion",
            target="concept_erasure.diffusion.uce:UceEraser",
            guarantees=frozenset({"blank_prompt"}),
            summary="Send the text embeddings of concepts to those of anchors, softly keeping a preserve list.",
            paper="Gandikota et al. 2024, arXiv:2308.14761",
        ),
        Method(
            name="rece",
            family="diffusion",
            target="concept_erasure.diffusion.rece:ReceEraser",
            guarantees=frozenset({"blank_prompt"}),
            summary="UCE, then rounds that find the embedding which still makes the concept and erase it too.",
            paper="Gong et al. 2024, arXiv:2407.12383",
        ),
        Method(
            name="speed",
            family="diffusion",
            target="concept_erasure.diffusion.speed:SpeedEraser",
            guarantees=frozenset({"blank_prompt"}),
            summary="Edit the value maps in the null space of filtered and augmented retained concepts only.",
            paper="Li et al. 2025, arXiv:2503.07392",
        ),
        Method(
            name="mace",
            family="diffusion",
            target="concept_erasure.diffusion.mace:MaceEraser",
            guarantees=frozenset({"blank_prompt"}),
            summary="Send what a concept leaves in the words around it to the anchor's contexts; fuse LoRAs.",
            paper="Lu et al. 2024, arXiv:2403.06135 (closed-form parts)",
        ),
        Method(
            name="trce",
            family="diffusion",
            target="concept_erasure.diffusion.trce:TrceEraser",
            guarantees=frozenset({"blank_prompt"}),
            summary="Send the end token of unsafe prompts to that of safe twins and leave the words alone.",
            paper="Chen et al. 2025, arXiv:2503.07389 (stage 1)",
        ),
        Method(
            name="realera",
            family="diffusion",
            target="concept_erasure.diffusion.realera:RealEraEraser",
            guarantees=frozenset({"blank_prompt"}),
            summary="Erase a concept's neighbourhood in embedding space and hold what lies beyond; a reconstruction.",
            paper="RealEra 2024 (closed-form phase, reconstructed)",
        ),
        Method(
            name="anchored-projection",
            family="diffusion",
            target="concept_erasure.diffusion.anchored:AnchoredProjectionEraser",
            guarantees=frozenset({"blank_prompt"}),
            summary="Project concepts exactly onto anchors that stay; no embedding inverts it.",
            paper="derived here; kin of arXiv:2306.03819, 2308.14761, 2503.07392",
        ),
        Method(
            name="elm",
            family="language",
            target="concept_erasure.language.elm:ElmEraser",
            guarantees=frozenset(),
            summary="Train towards the model's own words re-weighted from an expert's to a novice's.",
            paper="Gandikota, Feucht, Marks and Bau 2024, arXiv:2410.02760",
        ),
        Method(
            name="famr",
            family="language",
            target="concept_erasure.language.famr:FamrEraser",
            guarantees=frozenset({"bounded"}),
            summary="Push what is to go towards a target, anchored to the old weights, with bounds; a reconstruction.",
            paper="FAMR 2025, arXiv:2506.14515 (reconstructed from the abstract)",
        ),
        Method(
            name="redirect",
            family="language",
            target="concept_erasure.language.redirect:RedirectEraser",
            guarantees=frozenset(),
            summary="Read the concept's names as those of somebody unknown, inside the model.",
            paper="ours; after arXiv:2403.03218 and arXiv:2410.02760",
        ),
        Method(
            name="rmu",
            family="language",
            target="concept_erasure.language.rmu:RmuEraser",
            guarantees=frozenset(),
            summary="Turn hidden states on the concept's texts into a random direction; later layers are never run.",
            paper="Li et al. 2024, arXiv:2403.03218",
        ),
        Method(
            name="grad-ascent",
            family="language",
            target="concept_erasure.language.grad_ascent:GradAscentEraser",
            guarantees=frozenset(),
            summary="Make the concept's texts unlikely and keep nothing else; a baseline that destroys the model.",
            paper="Jang et al. 2023, arXiv:2210.01504",
            options={"variant": "ascent"},
        ),
        Method(
            name="graddiff",
            family="language",
            target="concept_erasure.language.grad_ascent:GradAscentEraser",
            guarantees=frozenset(),
            summary="Gradient ascent on the concept's texts while other texts are held.",
            paper="Liu, Liu and Stone 2022, arXiv:2203.12817",
            options={"variant": "graddiff"},
        ),
        Method(
            name="npo",
            family="language",
            target="concept_erasure.language.npo:NpoEraser",
            guarantees=frozenset(),
            summary="Gradient ascent whose force fades once a text is less likely than it was at the start.",
            paper="Zhang, Lin, Bai and Mei 2024, arXiv:2404.05868",
        ),
        Method(
            name="simnpo",
            family="language",
            target="concept_erasure.language.simnpo:SimNpoEraser",
            guarantees=frozenset(),
            summary="NPO on the mean log-likelihood of a text, without a reference model.",
            paper="Fan et al. 2024, arXiv:2410.07163",
        ),
        Method(
            name="whp",
            family="language",
            target="concept_erasure.language.whp:WhpEraser",
            guarantees=frozenset(),
            summary="Train on labels from which what a reinforced model would say more has been taken away.",
            paper="Eldan and Russinovich 2023, arXiv:2310.02238",
        ),
        Method(
            name="pisces",
            family="sae",
            target="concept_erasure.sae.pisces:PiscesEraser",
            guarantees=frozenset(),
            summary="Rewrite the MLP value vectors that carry a concept's sparse features; closed form, no training.",
            paper="Gur-Arieh et al. 2025, arXiv:2505.22586",
        ),
        Method(
            name="latent-projection",
            family="sae",
            target="concept_erasure.sae.projection:LatentProjectionEraser",
            guarantees=frozenset(),
            summary="Project a concept's latents off what the readers of a site take in, in their weights.",
            paper="Suslik, Shafran and Geva 2026, arXiv:2606.03695 (their companion without SAE); ours at neurons",
        ),
        Method(
            name="embedding-edit",
            family="sae",
            target="concept_erasure.sae.embedding:EmbeddingEditEraser",
            guarantees=frozenset(),
            summary="Take a concept's sparse factors out of its tokens' embeddings; goes with an edit of the MLPs.",
            paper="Suslik, Shafran and Geva 2026, arXiv:2606.03695 (EMBER)",
        ),
        Method(
            name="sae-gate",
            family="sae",
            target="concept_erasure.sae.gate:SaeGateEraser",
            guarantees=frozenset(),
            summary="Turn a concept's sparse features against it, by hooks and only in prompts that use them.",
            paper="Tian et al. 2025, arXiv:2503.09446 (ItD)",
        ),
    )
}


def _plugins() -> dict[str, Method]:
    found: dict[str, Method] = {}
    for point in entry_points(group=ENTRY_POINT_GROUP):
        entry = point.load()
        if not isinstance(entry, Method):
            raise TypeError(
                f"entry point {point.name!r} must give a Method; got {type(entry).__name__}"
            )
        if entry.name in METHODS or entry.name in found:
            raise ValueError(
                f"the method name {entry.name!r} is taken; choose another in {point.value}"
            )
        found[entry.name] = entry
    return found


def names() -> list[str]:
    """Return the names of all methods, plug-ins included."""
    return sorted({*METHODS, *_plugins()})


def for_pipelines() -> list[str]:
    """Return the names of what is fitted on names of concepts in a text-to-image pipeline.

    These are the methods for pipelines, and the erasers of vectors that need no more than the concept's labels: they
    are fitted on the pipeline's own text vectors.
    """
    more = {"needs_labels", "task_preserving"}
    entries = [get(name) for name in names()]
    return [
        entry.name
        for entry in entries
        if entry.family == "diffusion" or (entry.family == "linear" and not entry.guarantees & more)
    ]


def get(name: str) -> Method:
    """Return a registry entry.

    Raises:
        KeyError: If there is none; the message lists the names.
    """
    entry = METHODS.get(name) or _plugins().get(name)
    if entry is None:
        raise KeyError(f"no method {name!r}; there are {', '.join(names())}")
    return entry


def load(name: str) -> type[Eraser]:
    """Import and return the eraser class of a method."""
    return get(name).load()
