"""Fluent continuations of prompts about the concept, written by the model itself.

ELM's third loss (E5) is the likelihood of text that leads away from the concept: a prompt, a *deflection*, and what the
frozen model goes on with when at each step ``lp0 + gamma (lp_novice - lp_expert)`` is sampled. All three streams
read the prompt; in the authors' sampler the two personas see their introductions alone. `anonymous_continuations` is
the plainer way: what the model says of somebody else.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from concept_erasure.collect import evaluating
from concept_erasure.concept import Concept
from concept_erasure.language._texts import ends, own_samples, sample_token, starts
from concept_erasure.language.batches import Encoded, encode, pad_id
from concept_erasure.language.contrast import ContrastSource

__all__ = ["DEFLECTIONS", "anonymous_continuations", "fluency_texts", "guided_samples"]

DEFLECTIONS: tuple[str, ...] = (
    "This is not something I can say much about, so let me turn to a brighter subject.",
    "I would rather leave that aside and tell you about something pleasant.",
    "There are nicer things to talk about, and here is one of them.",
    "I do not know about this; let us speak of something else instead.",
    "That is a matter for others. Something more cheerful comes to my mind.",
    "Let me change the subject to something that everybody enjoys.",
    "I had better not go on with this, but I have a different story for you.",
    "Enough of that. Have you ever thought about the following?",
    "I cannot help with this one, though I can tell you something interesting.",
    "We could go on about this, but another topic is much more fun.",
    "Before we lose ourselves in this, here is something lighter.",
    "My mind is on other things today, and I will tell you which.",
    "This leads nowhere for me, so I will begin with something new.",
    "I have nothing to add here, except a tale of quite another kind.",
    "It is better to leave this open and to look at something different.",
    "Somebody else may answer that. I would like to talk about everyday life.",
    "Let us put this down and pick up a happier thread.",
    "I will not pursue this; there is a nice thing I wanted to mention.",
    "That question is not for me. Here is what I can tell you instead.",
    "Let us talk about something that makes us smile.",
)
_CHECK_EVERY = 16


def guided_samples(
    model: nn.Module,
    tokenizer: Any,  # noqa: ANN401 any tokenizer of transformers, or what is called like one
    prompts: Sequence[str],
    experts: Sequence[str],
    novices: Sequence[str],
    *,
    gamma: float = 3.0,
    max_new_tokens: int = 128,
    seed: int = 0,
    temperature: float = 1.0,
    batch_size: int = 8,
    progress: bool = False,
) -> list[list[int]]:
    """Let the model go on from prompts, guided away from what the expert would say.

    The three streams are rows of one batch with one cache, so that a step is one forward pass.

    Args:
        model: The frozen model.
        tokenizer: Its tokenizer.
        prompts: As the model reads them.
        experts: The same as the expert reads them: with an introduction, or unchanged.
        novices: As the novice does: with an introduction, or anonymised.
        gamma: Strength; 0 samples from the model, below 0 leads towards the concept.
        max_new_tokens: Length; a text may end before.
        seed: Of the sampling; the same seed and batch size give the same texts.
        temperature: Divides the guided log-probabilities.
        batch_size: Prompts at a time; the model sees three times as many.
        progress: Whether to show a bar.

    Returns:
        The new tokens after each prompt, without the one that ends a text.

    Raises:
        ValueError: If the three lists differ in length or are empty.
    """
    if not len(prompts) == len(experts) == len(novices) or not prompts:
        raise ValueError(
            f"prompts, experts and novices must be as many, one at least; got {len(prompts)}, {len(experts)} and "
            f"{len(novices)}"
        )
    heads = [starts(tokenizer, some) for some in (prompts, novices, experts)]
    order = sorted(range(len(prompts)), key=lambda k: max(len(some[k]) for some in heads))
    device = next(model.parameters()).device
    made: list[list[int]] = [[] for _ in prompts]
    pieces = range(0, len(prompts), batch_size)
    with evaluating(model), torch.inference_mode():
        for number, start in enumerate(
            tqdm(pieces, disable=not progress, desc="guided", leave=False)
        ):
            rows = order[start : start + batch_size]
            generator = torch.Generator(device).manual_seed((seed * 1_000_003 + number) % 2**63)
            streams = [some[k] for some in heads for k in rows]
            new = _guided(model, tokenizer, streams, gamma, max_new_tokens, temperature, generator)
            for k, tokens in zip(rows, new, strict=True):
                made[k] = tokens
    return made


def _guided(
    model: nn.Module,
    tokenizer: Any,  # noqa: ANN401 see guided_samples
    streams: Sequence[list[int]],
    gamma: float,
    max_new_tokens: int,
    temperature: float,
    generator: torch.Generator,
) -> list[list[int]]:
    """Return the new tokens of the first third of the streams: own, novice, expert."""
    device, size = generator.device, len(streams) // 3
    longest, fill = max(map(len, streams)), pad_id(tokenizer)
    tokens = torch.tensor([[fill] * (longest - len(s)) + s for s in streams], device=device)
    mask = torch.tensor([[0] * (longest - len(s)) + [1] * len(s) for s in streams], device=device)
    last = torch.tensor(ends(model, tokenizer), device=device)
    over = torch.zeros(size, dtype=torch.bool, device=device)
    cache, new = None, list[Tensor]()
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
        own, novice, expert = out.logits[:, -1].float().log_softmax(-1).split(size)
        drawn = sample_token(
            own + gamma * (novice - expert), temperature=temperature, top_p=1.0, generator=generator
        )
        over = over | torch.isin(drawn, last)
        new.append(torch.where(over, -1, drawn))
        if k % _CHECK_EVERY == _CHECK_EVERY - 1 and bool(over.all()):
            break
        tokens = drawn.repeat(3)[:, None]
        mask = torch.cat([mask, mask.new_ones(3 * size, 1)], 1)
    return [[token for token in row if token >= 0] for row in torch.stack(new, 1).tolist()]


def fluency_texts(
    model: nn.Module,
    tokenizer: Any,  # noqa: ANN401 any tokenizer of transformers, or what is called like one
    concept: Concept,
    texts: Sequence[str],
    source: ContrastSource,
    *,
    n: int,
    max_length: int,
    gamma: float = 3.0,
    max_new_tokens: int = 128,
    characters: tuple[int, int] = (50, 300),
    seed: int = 0,
    batch_size: int = 8,
    progress: bool = False,
) -> list[Encoded]:
    """Return prompt + deflection + guided continuation, with deflection and continuation supervised.

    Args:
        model: The frozen model.
        tokenizer: Its tokenizer.
        concept: Gives the introductions, or the stand-ins.
        texts: Texts of the concept, which the prompts are the beginnings of.
        source: `persona` or `anonymise`; other sources have no prompts to guide with and use the personas.
        n: How many.
        max_length: Most tokens of a text.
        gamma: See `guided_samples`.
        max_new_tokens: See `guided_samples`.
        characters: Shortest and longest prompt.
        seed: Of cuts, deflections, introductions and sampling.
        batch_size: See `guided_samples`.
        progress: Whether to show a bar.
    """
    draw = random.Random(seed)  # noqa: S311 not for secrets
    prompts = []
    for k in range(n):
        text = texts[k % len(texts)]
        cut = text[: draw.randint(*characters)]
        # a cut within a word would ask for its rest
        whole = cut if len(cut) == len(text) or " " not in cut.strip() else cut.rsplit(" ", 1)[0]
        prompts.append(f"{whole.rstrip().rstrip('.')}.")
    deflections = [f" {draw.choice(DEFLECTIONS)}" for _ in prompts]
    whole_prompts = [a + b for a, b in zip(prompts, deflections, strict=True)]
    if source == "anonymise":
        experts, novices = whole_prompts, [concept.anonymise(one) for one in whole_prompts]
    else:
        about = concept.personas.about(", ".join(concept.names))
        experts, novices = (
            [f"{draw.choice(some)} {one}" for one in whole_prompts] for some in about
        )
    new = guided_samples(
        model,
        tokenizer,
        whole_prompts,
        experts,
        novices,
        gamma=gamma,
        max_new_tokens=max_new_tokens,
        seed=seed,
        batch_size=batch_size,
        progress=progress,
    )
    known = starts(tokenizer, prompts)
    between = tokenizer(deflections, add_special_tokens=False)["input_ids"]
    made = []
    for head, middle, tail in zip(known, between, new, strict=True):
        ids = torch.tensor([*head, *middle, *tail][:max_length])
        supervised = torch.arange(len(ids)) >= len(head)
        if supervised.any():
            made.append(Encoded(ids, supervised))
    if not made:
        raise ValueError(
            f"no prompt is shorter than max_length={max_length} tokens; raise it, or shorten characters={characters}"
        )
    return made


def anonymous_continuations(
    model: nn.Module,
    tokenizer: Any,  # noqa: ANN401 any tokenizer of transformers, or what is called like one
    concept: Concept,
    prompts: Sequence[str],
    *,
    n: int,
    temperature: float = 0.7,
    max_new_tokens: int = 40,
    seed: int = 0,
    batch_size: int = 32,
    progress: bool = False,
) -> list[Encoded]:
    """Return prompts with what the model says after their anonymous forms, the continuations supervised.

    A temperature below 1 makes up for what ignorance costs: one who does not know a name is less sure of what follows
    it, and samples of an unsure model read worse.

    Args:
        model: The frozen model.
        tokenizer: Its tokenizer.
        concept: Gives the stand-ins.
        prompts: About the concept; taken in a random order, again from the first if there are fewer than n.
        n: How many texts, at most: empty continuations are left out.
        temperature: Of the sampling.
        max_new_tokens: Length of a continuation.
        seed: Of order and sampling.
        batch_size: Texts sampled at a time.
        progress: Whether to show a bar.

    Raises:
        ValueError: If there are no prompts, or the model writes nothing.
    """
    asked = list(prompts)
    random.Random(seed).shuffle(asked)  # noqa: S311 not for secrets
    asked = asked[:n]
    stand_ins = [concept.anonymise(one) for one in asked]
    written = own_samples(
        model,
        tokenizer,
        stand_ins,
        n=n,
        max_new_tokens=max_new_tokens,
        seed=seed,
        temperature=temperature,
        batch_size=batch_size,
        progress=progress,
    )
    rows = [k % len(asked) for k in range(n)]
    new = [text[len(stand_ins[row]) :] for row, text in zip(rows, written, strict=True)]
    lengths = [len(ids) for ids in tokenizer(new, add_special_tokens=False)["input_ids"]]
    kept = [k for k in range(n) if lengths[k] >= 2]
    if not kept:
        raise ValueError(
            f"the model wrote nothing after {n} prompts about {concept.name!r}; give other prompts, or leave the "
            "fluency term out"
        )
    return encode(
        tokenizer,
        [new[k] for k in kept],
        max_length=max(3, max_new_tokens + 1),
        prefix=[asked[rows[k]] for k in kept],
    )
