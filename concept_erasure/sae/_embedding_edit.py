"""Take a concept's sparse factors out of the token embeddings: mathematics and patches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from concept_erasure.concept import Concept
from concept_erasure.edit import ColumnPatch, Patch
from concept_erasure.errors import EditError, SiteNotFoundError
from concept_erasure.sae._concept_tokens import concept_tokens
from concept_erasure.sae._sparse_eraser import settled
from concept_erasure.sae.activations import special_ids
from concept_erasure.sae.seminmf import factorise

__all__ = ["EmbeddingOptions", "UntiePatch", "embedding_patches", "fit_rows"]

Tied = Literal["untie", "both", "refuse"]
_PARTS = ("embedding.rows", "embedding.original", "embedding.change", "embedding.tied")
_LEAST = 64  # tokens about nothing in particular, at least


@dataclass(frozen=True, kw_only=True)
class EmbeddingOptions:
    """Options of the embedding edit.

    Attributes:
        rank: Factors, at most; a fourth of the tokens looked at if that is fewer.
        k: Factors of a token, at most: the winners.
        ratio: How much larger a factor's mean code on the concept's tokens must be than on others.
        delta: Share of the concept's factors that is taken away; above 1 overshoots.
        near: Nearest other tokens looked at for each token of the concept, so that factors tell them apart.
        iterations: Of the factorisation.
        tied: What to do where input and output embeddings are one tensor: give the head its own copy (``"untie"``, its
            logits stay as they are), change both (``"both"``), or ``"refuse"``.
        tokens: Ids to edit; default the concept's, see `concept_tokens`.
    """

    rank: int = 64
    k: int = 4
    ratio: float = 2.0
    delta: float = 1.0
    near: int = 10
    iterations: int = 50
    tied: str = "untie"
    tokens: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.tied not in get_args(Tied):
            raise ValueError(f"tied must be one of {', '.join(get_args(Tied))}; got {self.tied!r}")
        for name in ("rank", "k", "near", "iterations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if not self.ratio > 1 or not self.delta > 0:
            raise ValueError(
                f"ratio must be above 1 and delta positive; got {self.ratio} and {self.delta}"
            )
        if self.tokens is not None:
            object.__setattr__(self, "tokens", tuple(int(i) for i in self.tokens))


def concept_factors(codes: Tensor, about: Tensor, ratio: float) -> Tensor:
    """Return which factors are the concept's, shape ``(r,)`` bool.

    Their mean code on the concept's tokens is `ratio` times that on the others, and two of its tokens use them (one,
    if there is only one).

    Args:
        codes: Shape ``(N, r)``, not negative.
        about: Which tokens are the concept's, shape ``(N,)``.
        ratio: See above.
    """
    inside, outside = codes[about].mean(0), codes[~about].mean(0)
    used = (codes[about] > 0).sum(0)
    return (inside > 0) & (inside >= ratio * outside) & (used >= min(2, int(about.sum())))


@torch.no_grad()
def fit_rows(
    model: nn.Module,
    tokenizer: Callable[..., Any],
    concept: Concept,
    options: EmbeddingOptions,
    *,
    seed: int = 0,
) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Return the rows to edit, what they were and what is added, and a report.

    Embeddings are seen as the model sees them, with the factor (such as ``sqrt(d)``) some models put on them.

    Args:
        model: The model, not changed.
        tokenizer: Its tokenizer.
        concept: Its names and entities say which tokens, those of its neighbours are among the others.
        options: See `EmbeddingOptions`.
        seed: Of the other tokens and the factorisation.

    Raises:
        ValueError: If no factor tells the concept's tokens from others.
        SiteNotFoundError: If the model has no input embeddings.
        EditError: If they are tied and that is to be refused.
    """
    module = _embedding(model)
    if options.tied == "refuse" and _head_of(model, module) is not None:
        raise EditError("input and output embeddings are one tensor; choose tied='untie' or 'both'")
    weight = cast("Tensor", module.weight).detach()
    about = list(concept_tokens(tokenizer, concept) if options.tokens is None else options.tokens)
    ids = _looked_at(weight, about, _others(tokenizer, concept, about), options.near, seed)
    seen = module(ids.to(weight.device)).float()
    raw = weight[ids.to(weight.device)].float()
    scale = float((seen * raw).sum() / raw.square().sum())
    rank = max(1, min(options.rank, len(ids) // 4))
    x = seen - seen.mean(0)
    codes, factors, errors = factorise(
        x,
        rank=rank,
        k=min(options.k, rank),
        iterations=options.iterations,
        seed=seed,
        progress=False,
    )
    mine = torch.arange(len(ids), device=x.device) < len(about)
    chosen = concept_factors(codes, mine, options.ratio)
    taken = codes[:, chosen] @ factors[chosen]
    edited = mine & (taken.abs().amax(1) > 0) if bool(chosen.any()) else mine & False
    if not bool(edited.any()):
        raise ValueError(
            f"none of {rank} factors is {options.ratio} times as large on the {len(about)} tokens of "
            f"{concept.name!r} as on {len(ids) - len(about)} others; give more tokens, or lower the ratio"
        )
    rows = ids.to(x.device)[edited]
    weights = {
        "embedding.rows": rows,
        "embedding.original": weight[rows].clone(),
        "embedding.change": -options.delta / scale * taken[edited],
        "embedding.tied": torch.tensor(get_args(Tied).index(options.tied)),
    }
    decode: Callable[..., str] = tokenizer.decode  # type: ignore[attr-defined]
    report: dict[str, object] = {
        "tokens": [str(decode([i])) for i in rows.tolist()],
        "left_alone": [str(decode([i])) for i in ids.to(x.device)[mine & ~edited].tolist()],
        "factors": int(chosen.sum()),
        "of_factors": rank,
        "factorisation_error": errors[-1],
        "share_removed": options.delta * float(taken[edited].norm() / seen[edited].norm()),
        "scale": scale,
    }
    return weights, report


def _others(tokenizer: Callable[..., Any], concept: Concept, about: list[int]) -> list[int]:
    """Return the ids of the neighbours' tokens that are not the concept's."""
    if not concept.neighbours:
        return []
    rows = tokenizer([f" {name}" for name in concept.neighbours], add_special_tokens=False)
    known = {*about, *special_ids(tokenizer)}
    return list(dict.fromkeys(int(i) for row in rows["input_ids"] for i in row if i not in known))


def _looked_at(weight: Tensor, about: list[int], others: list[int], near: int, seed: int) -> Tensor:
    """Return ids: the concept's, its neighbours', those nearest to the concept's, and as many drawn at random."""
    size = weight.norm(dim=1).float().clamp_min(torch.finfo(torch.float32).tiny)
    mine = torch.tensor(about, device=weight.device)
    close = (weight @ weight[mine].T).float() / size[:, None]
    close[mine] = float("-inf")
    found = close.topk(min(near, len(weight) - len(about)), dim=0).indices.flatten()
    held = dict.fromkeys([*about, *others, *found.tolist()])
    generator = torch.Generator().manual_seed(seed)
    for one in torch.randperm(len(weight), generator=generator).tolist():
        if len(held) >= max(_LEAST, 2 * (len(about) + len(found))):
            break
        held.setdefault(one)
    return torch.tensor(list(held))


def embedding_patches(model: nn.Module, weights: Mapping[str, Tensor]) -> list[Patch]:
    """Return the patches for edited rows; none if there are no such rows.

    Raises:
        EditError: If the rows hold something else than at the fit.
    """
    if "embedding.rows" not in weights:
        return []
    rows, original, more, tied = (weights[name] for name in _PARTS)
    module = _embedding(model)
    name = _name_of(model, module)
    held = cast("Tensor", module.weight).detach()[rows.to(module.weight.device)]  # type: ignore[arg-type]
    value = settled(held, original, more, name)
    how = get_args(Tied)[int(tied)]
    shared = _head_of(model, module) is not None
    if shared and how == "refuse":
        raise EditError(
            "input and output embeddings are one tensor; fit with tied='untie' or 'both'"
        )
    edit = ColumnPatch(name, rows, value, axis=0, tied=how == "both")
    return [UntiePatch(), edit] if shared and how == "untie" else [edit]


@dataclass
class UntiePatch:
    """Give the head its own copy of the input embeddings; undoing makes them one tensor again."""

    _settings: list[tuple[object, bool]] = field(default_factory=list, repr=False)
    _bytes: int = 0

    @property
    def target(self) -> str:
        """Name of what is changed."""
        return "output embeddings (untied)"

    @property
    def targets(self) -> tuple[str, ...]:
        """No value is overwritten."""
        return ()

    @property
    def bytes_held(self) -> int:
        """Bytes of the copy, while it is in force."""
        return self._bytes

    def apply(self, model: nn.Module) -> float:
        """Untie and return 0: no value changes."""
        module = _embedding(model)
        head = _head_of(model, module)
        if head is None:
            raise EditError("input and output embeddings are not one tensor")
        weight = cast("nn.Parameter", module.weight)
        head.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
        self._bytes = weight.numel() * weight.element_size()
        config = getattr(model, "config", None)
        for one in (config, getattr(config, "text_config", None)):
            if getattr(one, "tie_word_embeddings", False):
                self._settings.append((one, True))
                cast("Any", one).tie_word_embeddings = False
        return 0.0

    def before(self, value: Tensor | None) -> Tensor | None:
        """Return the value: none is overwritten."""
        return value

    def undo(self, model: nn.Module) -> None:
        """Tie again."""
        head: Any = model.get_output_embeddings()  # type: ignore[operator]
        head.weight = _embedding(model).weight
        for one, setting in self._settings:
            cast("Any", one).tie_word_embeddings = setting
        self._settings, self._bytes = [], 0

    def commit(self) -> None:
        """Keep both."""
        self._bytes = 0


def _embedding(model: nn.Module) -> nn.Module:
    getter = getattr(model, "get_input_embeddings", None)
    module = getter() if getter is not None else None
    if not isinstance(getattr(module, "weight", None), Tensor):
        raise SiteNotFoundError(f"{type(model).__name__} has no input embeddings")
    return cast("nn.Module", module)


def _head_of(model: nn.Module, module: nn.Module) -> nn.Module | None:
    """Return the head if its weight is that of the input embeddings."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if getter is not None else None
    return head if head is not None and head.weight is module.weight else None


def _name_of(model: nn.Module, module: nn.Module) -> str:
    path = next((name for name, one in model.named_modules() if one is module), None)
    if path is None:
        raise SiteNotFoundError("the input embeddings are no module of the model")
    return f"{path}.weight" if path else "weight"
