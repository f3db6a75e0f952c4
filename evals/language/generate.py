"""What a model writes by itself: whether the answer slips out, and whether the text is still fluent.

Reverse perplexity is the perplexity of the edited model's texts under an *independent* model. Loops get a low one, so
it goes with the share of distinct word pairs, and empty outputs are counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from concept_erasure.collect import evaluating
from concept_erasure.concept_items import Item, plain
from concept_erasure.edit import base_fingerprint, same_lineage
from concept_erasure.evals.language._continuations import Query, Run, score
from concept_erasure.evals.language.items import instruction_ids, opening_ids, token_ids
from concept_erasure.evals.language.likelihood import TokenizerLike
from concept_erasure.evals.language.statistics import share
from concept_erasure.report import Interval

__all__ = [
    "Fluency",
    "LeakRate",
    "distinct",
    "fluency",
    "leak_rate",
    "reverse_perplexity",
    "sample",
]

_LOOK = 8  # tokens between two looks at whether every text has ended


def _ends(model: nn.Module, tokenizer: TokenizerLike) -> list[int]:
    """Return the tokens that end a text."""
    own = getattr(tokenizer, "eos_token_id", None)
    config = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = [own, *(config if isinstance(config, list) else [config])]
    return sorted({int(one) for one in found if one is not None})


def _draw(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """Return one token a row: the most probable, or the one in whose interval the uniform number falls."""
    if temperature == 0:
        return logits.argmax(1)
    heights = (logits.double() / temperature).softmax(1).cumsum(1)
    drawn = torch.searchsorted(heights, uniform[:, None] * heights[:, -1:], right=True)[:, 0]
    return drawn.clamp_max(logits.shape[1] - 1)


def _grow(
    run: Run,
    prompts: Sequence[tuple[int, ...]],
    uniform: Tensor,
    temperature: float,
    ends: list[int],
) -> Tensor:
    """Continue prompts of which the run has read equally many tokens; return the new ones, ``[b, new]``.

    Longer prompts are read on while shorter ones are already continued, so that nothing is padded.
    """
    new = uniform.shape[1]
    lengths = torch.tensor([len(p) for p in prompts], device=run.device)
    width = int(lengths.max()) + new
    ids = torch.zeros(len(prompts), width, dtype=torch.long, device=run.device)
    for i, prompt in enumerate(prompts):
        ids[i, : len(prompt)] = torch.tensor(prompt, device=run.device)
    uniform = uniform.to(run.device)
    stop = torch.tensor(ends, device=run.device, dtype=torch.long)
    over = torch.zeros(len(prompts), dtype=torch.bool, device=run.device)
    at = run.length
    for place in range(min(len(p) for p in prompts), width):
        logits = run.step(ids[:, at:place], ids[:, :place])
        at = place
        number = place - lengths  # of the new token, negative while the prompt is read
        inside = (number >= 0) & (number < new)
        drawn = uniform.gather(1, number.clamp(0, new - 1)[:, None])[:, 0]
        token = _draw(logits, drawn, temperature)
        ids[:, place] = torch.where(inside & ~over, token, ids[:, place])
        over |= inside & torch.isin(token, stop)
        if place % _LOOK == 0 and bool((over | (number >= new - 1)).all()):
            break
    columns = lengths[:, None] + torch.arange(new, device=run.device)
    return ids.gather(1, columns)


def sample(
    model: nn.Module,
    tokenizer: TokenizerLike,
    prompts: Sequence[str],
    *,
    n: int = 1,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    instruction: str | None = None,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool | None = False,
) -> list[list[str]]:
    """Return n continuations of every prompt, without the prompt.

    The random numbers belong to the prompt's place and the sample's number, so results do not depend on the batch
    size (but for rounding); the global generator is not used.

    Args:
        model: A causal language model; left in the mode it was in.
        tokenizer: Its tokenizer.
        prompts: Beginnings of texts.
        n: Continuations of each.
        max_new_tokens: Length of a continuation at most.
        temperature: 1 is the model's own distribution, 0 the most probable token.
        instruction: Put before every prompt, in the chat template where there is one.
        seed: Of the sampling.
        batch_size: Texts a forward pass.
        progress: Show a bar; ``None`` shows it on a terminal.

    Returns:
        A list of n texts a prompt; what follows the end of a text is left out.

    Raises:
        ValueError: If there are no prompts or an option is out of range.
    """
    if isinstance(prompts, str) or len(prompts) == 0:
        raise ValueError(f"prompts must be a non-empty list of texts, got {prompts!r}")
    if n < 1 or max_new_tokens < 1 or batch_size < 1 or temperature < 0:
        raise ValueError(
            "n, max_new_tokens and batch_size must be at least 1 and temperature at least 0, got "
            f"{n}, {max_new_tokens}, {batch_size} and {temperature}"
        )
    head = instruction_ids(tokenizer, instruction, model)
    ids = [(*head, *row) for row in token_ids(tokenizer, prompts)]
    if empty := [i for i, row in enumerate(ids) if not row]:
        raise ValueError(f"prompt {empty[0]} has no tokens: {prompts[empty[0]]!r}")
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(
        len(ids), n, max_new_tokens, generator=generator, dtype=torch.float64
    ).flatten(0, 1)
    order = sorted(range(len(ids) * n), key=lambda k: len(ids[k // n]))
    ends = _ends(model, tokenizer)
    found: list[str] = [""] * len(order)
    starts = range(0, len(order), batch_size)
    with evaluating(model):
        for start in tqdm(starts, disable=None if progress is None else not progress, leave=False):
            part = order[start : start + batch_size]
            rows = [ids[k // n] for k in part]
            run = _read_shared(model, rows)
            new = _grow(run, rows, uniform[part], temperature, ends).tolist()
            for k, text in zip(part, _decode(tokenizer, new, ends), strict=True):
                found[k] = text
    return [found[i * n : (i + 1) * n] for i in range(len(ids))]


def _read_shared(model: nn.Module, rows: Sequence[tuple[int, ...]]) -> Run:
    """Read what the rows have in equal length, each different beginning once."""
    run = Run.start(model)
    cut = min(len(row) for row in rows) - 1
    unique = list(dict.fromkeys(row[:cut] for row in rows))
    if not run.read(torch.tensor(unique)):
        return run
    return run.spread([unique.index(row[:cut]) for row in rows])


def _decode(tokenizer: TokenizerLike, rows: list[list[int]], ends: list[int]) -> list[str]:
    cut = [row[: next((i for i, t in enumerate(row) if t in ends), len(row))] for row in rows]
    return [str(x) for x in cast("Any", tokenizer).batch_decode(cut, skip_special_tokens=True)]


def _says(text: str, answer: str) -> bool:
    return f" {plain(answer)} " in f" {plain(text)} "


@dataclass(frozen=True)
class LeakRate:
    """How often the answer slips out.

    Attributes:
        samples: Continuations of each prompt.
        leaked: Share of prompts with at least one sample that holds the answer.
        wrong: The same for one wrong choice of each item: what saying any such word by accident comes to.
        per_sample: Share of all samples that hold the answer.
        greedy: Share of prompts whose most probable continuation begins with the answer.
    """

    samples: int
    leaked: Interval
    wrong: Interval
    per_sample: float
    greedy: Interval


def leak_rate(
    model: nn.Module,
    tokenizer: TokenizerLike,
    items: Sequence[Item],
    *,
    samples: int = 20,
    max_new_tokens: int = 12,
    temperature: float = 1.0,
    instruction: str | None = None,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool | None = False,
) -> LeakRate:
    """Sample continuations of items and look for the answer in them.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        items: Statements or questions, not reversed ones: their prompt comes before the answer.
        samples: Continuations of each.
        max_new_tokens: Of each; enough for an answer.
        temperature: Of the sampling.
        instruction: Put before every prompt.
        seed: Of the sampling.
        batch_size: Texts a forward pass.
        progress: Show a bar.

    Raises:
        ValueError: If there are no items, one is reversed, or an option is out of range.
    """
    if len(items) == 0 or any(item.format == "reversed" for item in items):
        raise ValueError(
            "items must be statements or questions, at least one; a reversed item has no prompt before its answer"
        )
    prompts = [item.prompt for item in items]
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens, "instruction": instruction, "seed": seed,
        "batch_size": batch_size, "progress": progress,
    }  # fmt: skip
    drawn = sample(model, tokenizer, prompts, n=samples, temperature=temperature, **options)
    likely = sample(model, tokenizer, prompts, temperature=0.0, **options)
    hits = [
        [_says(text, item.right) for text in texts]
        for item, texts in zip(items, drawn, strict=True)
    ]
    misses = [
        any(_says(text, item.choices[(item.answer + 1) % len(item.choices)]) for text in texts)
        for item, texts in zip(items, drawn, strict=True)
    ]
    greedy = [
        f"{plain(texts[0])} ".startswith(f"{plain(item.right)} ")
        for item, texts in zip(items, likely, strict=True)
    ]
    return LeakRate(
        samples,
        share([any(row) for row in hits]),
        share(misses),
        sum(map(sum, hits)) / (samples * len(items)),
        share(greedy),
    )


def distinct(texts: Sequence[str], n: int = 2) -> float:
    """Return the mean share of different word n-grams in a text (distinct-n); 1 repeats nothing.

    Texts shorter than n words are left out; if all are, the result is not a number.

    Args:
        texts: Generated texts.
        n: Words of a gram, at least 1.

    Raises:
        ValueError: If n is below 1.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    shares = []
    for text in texts:
        words = text.split()
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        if grams:
            shares.append(len(set(grams)) / len(grams))
    return sum(shares) / len(shares) if shares else math.nan


def reverse_perplexity(
    texts: Sequence[str],
    reference: nn.Module,
    tokenizer: TokenizerLike,
    *,
    model: nn.Module,
    prompts: Sequence[str] | None = None,
    batch_size: int = 16,
) -> float:
    """Return the perplexity of generated texts under an independent model (R-PPL).

    Args:
        texts: What the tested model wrote; empty ones are left out (count them by themselves).
        reference: The model that judges.
        tokenizer: That model's tokenizer.
        model: The tested model: it, an edit of it and a copy of it are refused as judges.
        prompts: What each text continues; it is read and not scored.
        batch_size: Texts a forward pass.

    Returns:
        ``exp`` of the mean negative log-probability of a token; not a number if nothing was written.

    Raises:
        ValueError: If the reference is not independent, or there is not one prompt a text.
    """
    if reference is model or same_lineage(base_fingerprint(reference), base_fingerprint(model)):
        raise ValueError(
            "the reference is the tested model itself, which finds its own texts likely however it was edited; "
            "pass another model"
        )
    if prompts is not None and len(prompts) != len(texts):
        raise ValueError(f"need one prompt a text, got {len(prompts)} for {len(texts)}")
    opening = opening_ids(tokenizer, reference)
    starts = token_ids(tokenizer, prompts) if prompts is not None else [[] for _ in texts]
    queries = []
    for start, row in zip(starts, token_ids(tokenizer, texts), strict=True):
        context, rest = (*opening, *start), tuple(row)
        if not context:  # no BOS and no prompt: the first token is given
            context, rest = rest[:1], rest[1:]
        if rest:
            queries.append(Query(context, (rest,)))
    if not queries:
        return math.nan
    total = sum(one.log_probs[0] for one in score(reference, queries, batch_size=batch_size))
    return math.exp(-total / sum(len(query.continuations[0]) for query in queries))


@dataclass(frozen=True)
class Fluency:
    """What generated text is like.

    Attributes:
        prompts: How many.
        reverse_perplexity: Under the reference; None without one.
        distinct_2: Share of distinct word pairs.
        empty: Share of outputs without a word.
        words: Mean length.
        examples: The first few texts.
    """

    prompts: int
    reverse_perplexity: float | None
    distinct_2: float
    empty: Interval
    words: float
    examples: tuple[str, ...]


def fluency(
    model: nn.Module,
    tokenizer: TokenizerLike,
    prompts: Sequence[str],
    *,
    reference: tuple[nn.Module, TokenizerLike] | None = None,
    max_new_tokens: int = 200,
    instruction: str | None = None,
    seed: int = 0,
    batch_size: int = 32,
    progress: bool | None = False,
) -> Fluency:
    """Let the model write on from prompts and describe the texts.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        prompts: Beginnings; a hundred or more for a number to compare.
        reference: Independent model and its tokenizer, for the reverse perplexity.
        max_new_tokens: Of each text.
        instruction: Put before every prompt.
        seed: Of the sampling, at temperature 1.
        batch_size: Texts a forward pass.
        progress: Show a bar.

    Raises:
        ValueError: If there are no prompts or the reference is not independent.
    """
    drawn = sample(
        model, tokenizer, prompts, max_new_tokens=max_new_tokens, instruction=instruction, seed=seed,
        batch_size=batch_size, progress=progress,
    )  # fmt: skip
    texts = [one[0] for one in drawn]
    judged = None
    if reference is not None:
        judged = reverse_perplexity(texts, *reference, model=model, prompts=prompts)
    return Fluency(
        len(texts),
        judged,
        distinct(texts),
        share([not plain(text) for text in texts]),
        sum(len(text.split()) for text in texts) / len(texts),
        tuple(f"{p}{t}" for p, t in zip(prompts[:5], texts[:5], strict=True)),
    )
