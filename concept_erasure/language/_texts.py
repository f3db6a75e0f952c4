"""Texts to train on: those given, those of the concept, or what the model itself writes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from concept_erasure._storage import write
from concept_erasure.collect import evaluating
from concept_erasure.concept import Concept
from concept_erasure.errors import FormatError
from concept_erasure.language.batches import pad_id
from concept_erasure.sites import fingerprint

__all__ = ["ends", "forget_and_retain", "own_samples", "sample_token", "starts"]

CHECK_EVERY = 16  # tokens between two looks at whether all texts have ended


def starts(tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:  # noqa: ANN401 any tokenizer
    """Return ``[bos] + tokens`` of prompts, with EOS in place of a missing BOS, nothing if there is neither."""
    first = getattr(tokenizer, "bos_token_id", None)
    first = getattr(tokenizer, "eos_token_id", None) if first is None else first
    head = [] if first is None else [int(first)]
    rows = tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
    made = [[*head, *row] for row in rows]
    if empty := [i for i, row in enumerate(made) if not row]:
        raise ValueError(f"prompt {empty[0]} has no tokens: {prompts[empty[0]]!r}")
    return made


def ends(model: nn.Module, tokenizer: Any) -> tuple[int, ...]:  # noqa: ANN401 any tokenizer
    """Return the ids that end a text, by tokenizer and generation config."""
    config = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = [
        getattr(tokenizer, "eos_token_id", None),
        *(config if isinstance(config, list) else [config]),
    ]
    return tuple(dict.fromkeys(int(one) for one in found if one is not None))


def sample_token(
    logits: Tensor, *, temperature: float, top_p: float, generator: torch.Generator
) -> Tensor:
    """Draw a token from each row of logits.

    Args:
        logits: Shape ``(B, V)``.
        temperature: Divides the logits; 0 takes the most probable.
        top_p: Only the most probable tokens that together reach this probability are drawn.
        generator: On the device of the logits.

    Returns:
        Shape ``(B,)``.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probs = (logits.float() / temperature).softmax(-1)
    if top_p < 1:
        ordered, order = probs.sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered  # the first is always kept
        probs = torch.zeros_like(probs).scatter(-1, order, ordered * (before < top_p))
    return torch.multinomial(probs, 1, generator=generator)[:, 0]


def own_samples(
    model: nn.Module,
    tokenizer: Any,  # noqa: ANN401 any tokenizer
    prompts: Sequence[str],
    *,
    n: int,
    max_new_tokens: int,
    seed: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    batch_size: int = 16,
    progress: bool = False,
) -> list[str]:
    """Let a model go on from prompts.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        prompts: Beginnings, taken in turn until there are enough.
        n: Texts in all.
        max_new_tokens: Length of a continuation; it may end before.
        seed: Of the sampling; the same seed and batch size give the same texts.
        temperature: Divides the logits; 0 takes the most probable.
        top_p: See `sample_token`.
        batch_size: Texts at a time.
        progress: Whether to show a bar.

    Returns:
        Prompts with their continuations; text k begins with prompt ``k mod len(prompts)``.

    Raises:
        ValueError: If there are no prompts, or an option is out of range.
    """
    if isinstance(prompts, str) or len(prompts) == 0:
        raise ValueError(f"prompts must be a non-empty list of texts; got {prompts!r}")
    for name, value in (("n", n), ("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}")
    if temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"temperature must be at least 0 and top_p in (0, 1]; got {temperature} and {top_p}"
        )
    heads = starts(tokenizer, prompts)
    # alike lengths together, so that little is padded
    order = sorted(range(n), key=lambda k: (len(heads[k % len(prompts)]), k))
    made = [""] * n
    device = next(model.parameters()).device
    pieces = range(0, n, batch_size)
    with evaluating(model), torch.inference_mode():
        for i, start in enumerate(tqdm(pieces, disable=not progress, desc="sampling", leave=False)):
            rows = order[start : start + batch_size]
            generator = torch.Generator(device).manual_seed((seed * 1_000_003 + i) % 2**63)
            chosen = [heads[k % len(prompts)] for k in rows]
            new = _continue(model, tokenizer, chosen, max_new_tokens, temperature, top_p, generator)
            for k, ids in zip(rows, new, strict=True):
                prompt = prompts[k % len(prompts)]
                made[k] = _joined(tokenizer, prompt, heads[k % len(prompts)], ids)
    return made


def _joined(tokenizer: Any, prompt: str, head: list[int], new: list[int]) -> str:  # noqa: ANN401
    """Return the prompt with what follows; decoded together, so that spaces between the two are right."""
    known = tokenizer.decode(head, skip_special_tokens=True)
    whole = str(tokenizer.decode([*head, *new], skip_special_tokens=True))
    return prompt + whole[len(known) :] if whole.startswith(known) else whole


def _continue(
    model: nn.Module,
    tokenizer: Any,  # noqa: ANN401 any tokenizer
    heads: Sequence[list[int]],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    generator: torch.Generator,
) -> list[list[int]]:
    """Return the new tokens of each text, up to the one that ends it."""
    device = generator.device
    longest = max(map(len, heads))
    fill = pad_id(tokenizer)
    ids = torch.tensor([[fill] * (longest - len(h)) + h for h in heads], device=device)
    mask = torch.tensor([[0] * (longest - len(h)) + [1] * len(h) for h in heads], device=device)
    last = torch.tensor(ends(model, tokenizer), device=device)
    over = torch.zeros(len(heads), dtype=torch.bool, device=device)
    tokens, cache, new = ids, None, list[Tensor]()
    for k in range(max_new_tokens):
        places = (mask.cumsum(1) - 1).clamp_min(0)[:, -tokens.shape[1] :]
        out = cast("Any", model)(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=places,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = out.past_key_values
        drawn = sample_token(
            out.logits[:, -1], temperature=temperature, top_p=top_p, generator=generator
        )
        over = over | torch.isin(drawn, last)
        new.append(torch.where(over, -1, drawn))
        if k % CHECK_EVERY == CHECK_EVERY - 1 and bool(over.all()):
            break
        tokens = drawn[:, None]
        mask = torch.cat([mask, mask.new_ones(len(heads), 1)], 1)
    return [[t for t in row if t >= 0] for row in torch.stack(new, 1).tolist()]


def forget_and_retain(
    model: nn.Module,
    tokenizer: Any,  # noqa: ANN401 any tokenizer
    concept: Concept,
    forget_texts: Sequence[str] | None = None,
    retain_texts: Sequence[str] | None = None,
    *,
    seed: int = 0,
    batch_size: int = 16,
    cache_dir: str | Path | None = None,
    progress: bool = False,
) -> tuple[list[str], list[str]]:
    """Return the texts to forget and those to retain.

    Each comes from the argument, else from the concept, else from the model itself by the concept's recipe. Of
    its own samples those that speak of the concept are the ones to forget, and never among those to retain.

    Args:
        model: The model, without edits.
        tokenizer: Its tokenizer.
        concept: The concept.
        forget_texts: Texts to forget.
        retain_texts: Texts to retain; an empty list is kept.
        seed: Of the sampling.
        batch_size: Texts sampled at a time.
        cache_dir: Folder in which the samples are kept for the next time.
        progress: Whether to show bars.

    Returns:
        Both lists. The second is empty if nothing says what to retain.

    Raises:
        ValueError: If there is nothing to forget.
    """
    made: list[list[str]] = []
    for which, given, own, recipe in (
        ("forget", forget_texts, concept.forget_texts, concept.forget_recipe),
        ("retain", retain_texts, concept.retain_texts, concept.retain_recipe),
    ):
        if isinstance(given, str):
            raise ValueError(f"{which}_texts must be a list of texts; got one text")
        if given is not None or own:
            made.append(list(own if given is None else given))
        elif recipe is None and (which == "retain" or not concept.prompts):
            made.append([])
        else:
            made.append(
                _sampled(
                    model,
                    tokenizer,
                    concept,
                    cast("_Which", which),
                    seed,
                    batch_size,
                    cache_dir,
                    progress,
                )
            )
    if not made[0]:
        raise ValueError(
            f"there are no texts about {concept.name!r} to forget: give forget_texts, or a concept with "
            "forget_texts, prompts or a forget_recipe"
        )
    return made[0], made[1]


_Which = Literal["forget", "retain"]


def _sampled(
    model: nn.Module,
    tokenizer: Any,  # noqa: ANN401 any tokenizer
    concept: Concept,
    which: _Which,
    seed: int,
    batch_size: int,
    cache_dir: str | Path | None,
    progress: bool,
) -> list[str]:
    """Return the model's own texts by the recipe of a concept, from the cache if they are there."""
    from concept_erasure.concept_items import Recipe  # noqa: PLC0415 the default of a missing one

    recipe = (concept.forget_recipe if which == "forget" else concept.retain_recipe) or Recipe()
    prompts = concept.sample_prompts(which)
    options = {
        "n": recipe.samples * len(prompts),
        "max_new_tokens": recipe.max_new_tokens,
        "seed": seed,
        "temperature": recipe.temperature,
        "top_p": recipe.top_p,
        "batch_size": batch_size,
    }
    names = [*concept.names, *(entity for entity, _ in concept.entities)]
    key = [fingerprint(model), len(tokenizer), which, prompts, options, names]
    path = None
    if cache_dir is not None:
        digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
        path = Path(cache_dir) / f"samples_{which}_{digest}.json"
        if path.is_file():
            return _read(path)
    drawn = own_samples(model, tokenizer, prompts, progress=progress, **options)  # type: ignore[arg-type]
    about = which == "forget"
    texts = list(dict.fromkeys(t for t in drawn if (concept.mentions(t) > 0) == about))
    if not texts:
        what = "speaks" if about else "is free"
        raise ValueError(
            f"none of the {len(drawn)} samples {what} of {concept.name!r}; give {which}_texts"
        )
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(texts, ensure_ascii=False, indent=1)
        write(path, lambda p: p.write_text(text, encoding="utf-8"))
    return texts


def _read(path: Path) -> list[str]:
    try:
        texts = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise FormatError(f"{path} is damaged ({error}); delete it to sample again") from None
    if not isinstance(texts, list) or not all(isinstance(one, str) for one in texts):
        raise FormatError(f"{path} is not a list of texts; delete it to sample again")
    return texts
