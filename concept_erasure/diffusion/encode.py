"""Text to the vectors that the denoiser reads, as the pipelines of diffusers make them.

| pipeline | vectors (n, T, d) | pooled |
|---|---|---|
| SD 1, 2 | CLIP after its last norm | none |
| SDXL | last but one layer of both CLIPs, side by side | projected, second CLIP |
| SD 3, 3.5 | the same, padded with zeros to T5's width; then T5's tokens behind them | projected, both CLIPs |
| Flux | T5 | CLIP, not projected |

CLIP is causal: a position depends on those before it only, so a window that ends after the longest prompt gives the
same vectors. T5 sees everything, pads included (the pipelines give it no mask), so its window is always whole.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from concept_erasure.collect import Representations, evaluating
from concept_erasure.diffusion.core import Pairs
from concept_erasure.diffusion.maps import encoder_fingerprint, text_encoders
from concept_erasure.diffusion.tokens import BLANK_ANCHORS, TokenRule, align, lengths, select
from concept_erasure.edit import active_edits
from concept_erasure.errors import ShapeError, SiteNotFoundError
from concept_erasure.linalg import statistics_dtype
from concept_erasure.sites import Space, model_id

__all__ = [
    "TEXT_SITES",
    "BlankAnchor",
    "Encoded",
    "TextEncoder",
    "TextSite",
    "text_representations",
]

BlankAnchor = Literal["sot", "first_eot", "aligned"]
TextSite = Literal[
    "text_encoder", "pooled", "token_embedding", "token_embedding_2", "token_embedding_3"
]
TEXT_SITES = ("text_encoder", "pooled", "token_embedding", "token_embedding_2", "token_embedding_3")
CACHE_BYTES = 2**28
_T5_WINDOW = {"sd3": 256, "flux": 512}  # the pipelines' own max_sequence_length


@dataclass(frozen=True, eq=False)
class Encoded:
    """Encoded prompts.

    Attributes:
        embeddings: What the denoiser reads, shape ``(n, T, d)``, float64.
        mask: Shape ``(n, T)``, true at real tokens, start and end included.
        ids: Token ids, shape ``(n, T)``.
        pooled: Shape ``(n, p)``; None if the denoiser reads none.
        segments: The parts of T that one tokenizer made, and whether that one puts a start token first.
    """

    embeddings: Tensor
    mask: Tensor
    ids: Tensor
    pooled: Tensor | None
    segments: tuple[tuple[slice, bool], ...]

    def __len__(self) -> int:
        return len(self.embeddings)

    def positions(self, rule: TokenRule | str) -> list[Tensor]:
        """Return the positions of each prompt that a rule stands for, segment after segment."""
        parts = [
            [index + part.start for index in select(self.mask[:, part], rule, start=start)]
            for part, start in self.segments
        ]
        return [torch.cat(own) for own in zip(*parts, strict=True)]


@dataclass(frozen=True)
class _Batch:
    """What one encoder gives: hidden states (n, t, d), real tokens, ids, pooled vectors or None."""

    hidden: Tensor
    mask: Tensor
    ids: Tensor
    pooled: Tensor | None


class TextEncoder:
    """The text side of a pipeline. The pipeline is left bit-identical.

    Args:
        pipe: The pipeline, or an object with the same attributes.
        batch_size: Prompts encoded at once.
        max_sequence_length: Window of T5; default what the pipeline uses itself (SD 3: 256, Flux: 512).
        cache: Whether to remember encoded prompts, up to 256 MB; they are encoded anew once the weights change.

    Raises:
        TypeError: If the pipeline lacks a text encoder or a tokenizer.
        SiteNotFoundError: If its way of encoding is not among those of this module.
        ValueError: If a number is below 1.
    """

    def __init__(
        self,
        pipe: object,
        *,
        batch_size: int = 32,
        max_sequence_length: int | None = None,
        cache: bool = True,
    ) -> None:
        for name, value in (
            ("batch_size", batch_size),
            ("max_sequence_length", max_sequence_length),
        ):
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{name} must be a whole number from 1; got {value!r}")
        self._pipe: Any = pipe
        self._encoders = text_encoders(pipe)
        self.layout = _layout(pipe, self._encoders)
        self._tokenizers = {name: _tokenizer(pipe, name) for name in self._encoders}
        self._batch_size = batch_size
        self._t5_window = max_sequence_length or _T5_WINDOW.get(self.layout, 0)
        self._cache: OrderedDict[tuple[object, ...], Encoded] | None = (
            OrderedDict() if cache else None
        )
        self._held = 0

    @property
    def causal(self) -> bool:
        """Whether the vectors depend on earlier positions only, so that a short window is exact."""
        return not any(_is_t5(encoder) for encoder in self._encoders.values())

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the text encoders, see `encoder_fingerprint`."""
        return encoder_fingerprint(self._pipe)

    def fits(self, prompt: str) -> bool:
        """Return whether a prompt is no longer than the window of every encoder."""
        return all(
            self._counts(name, [prompt])[0] <= self._window(name) for name in self._tokenizers
        )

    def _window(self, name: str) -> int:
        """Return how many tokens an encoder reads, start and end included."""
        encoder: Any = self._encoders[name]
        if _is_t5(encoder):
            return self._t5_window
        width = int(encoder.config.max_position_embeddings)
        return min(width, int(getattr(self._tokenizers[name], "model_max_length", width)))

    def _counts(self, name: str, texts: list[str]) -> list[int]:
        tokenizer = self._tokenizers[name]
        converted = self._converted(texts, tokenizer)
        rows = tokenizer(converted, padding=False, truncation=False, verbose=False)["input_ids"]
        return [len(row) for row in rows]

    @torch.no_grad()
    def encode(self, prompts: Sequence[str] | str, *, short: bool = False) -> Encoded:
        """Encode prompts.

        Args:
            prompts: At least one text; ``""`` is the blank prompt.
            short: End the window after the longest prompt, where that is exact (see `causal`).

        Raises:
            ValueError: If there is no prompt or one is longer than the window.
            TypeError: If a prompt is not a string.
        """
        batches = list(self.stream(prompts, short=short))
        if len(batches) == 1:
            return batches[0]
        width = max(batch.mask.shape[1] for batch in batches)
        if any(
            batch.mask.shape[1] != width for batch in batches
        ):  # short windows of several lengths
            batches = list(self._stream(_texts(prompts), width))
        pooled = [batch.pooled for batch in batches if batch.pooled is not None]
        return Encoded(
            torch.cat([batch.embeddings for batch in batches]),
            torch.cat([batch.mask for batch in batches]),
            torch.cat([batch.ids for batch in batches]),
            torch.cat(pooled) if pooled else None,
            batches[0].segments,
        )

    def stream(self, prompts: Sequence[str] | str, *, short: bool = False) -> Iterator[Encoded]:
        """Encode prompts batch by batch; see `encode`."""
        texts = _texts(prompts)
        yield from self._stream(texts, 0 if short and self.causal else None)

    def _stream(self, texts: list[str], window: int | None) -> Iterator[Encoded]:
        """Yield batches. A window of None is the whole one, 0 the shortest, other numbers themselves."""
        mark = self._mark()
        for i in range(0, len(texts), self._batch_size):
            yield self._batch(texts[i : i + self._batch_size], window, mark)

    def _batch(self, texts: list[str], window: int | None, mark: str | None) -> Encoded:
        if window == 0:
            window = max(self._longest(text) for text in texts)
        keys = [(mark, window, text) for text in texts]
        cache = self._cache if mark is not None else None
        missing = [
            t for t, key in zip(texts, keys, strict=True) if cache is None or key not in cache
        ]
        missing = list(dict.fromkeys(missing))
        fresh: dict[str, Encoded] = {}
        if missing:
            encoded = self._encode(missing, window)
            fresh = {text: _row(encoded, i) for i, text in enumerate(missing)}
        rows = [
            fresh[t] if t in fresh else cast("Any", cache)[k]
            for t, k in zip(texts, keys, strict=True)
        ]
        if cache is not None:
            for text, key in zip(texts, keys, strict=True):
                if text in fresh and key not in cache:
                    self._remember(key, fresh[text])
        dtype = statistics_dtype(rows[0].embeddings.device)
        pooled = [row.pooled for row in rows if row.pooled is not None]
        return Encoded(
            torch.cat([row.embeddings for row in rows]).to(dtype),
            torch.cat([row.mask for row in rows]),
            torch.cat([row.ids for row in rows]),
            torch.cat(pooled).to(dtype) if pooled else None,
            rows[0].segments,
        )

    def _mark(self) -> str | None:
        """Return what the cache goes by; None while an edit is in force on an encoder."""
        if any(active_edits(encoder) for encoder in self._encoders.values()):
            return None
        return self.fingerprint

    def _remember(self, key: tuple[object, ...], row: Encoded) -> None:
        cache = cast("OrderedDict[tuple[object, ...], Encoded]", self._cache)
        cache[key] = row
        self._held += _bytes(row)
        while self._held > CACHE_BYTES and len(cache) > 1:
            self._held -= _bytes(cache.popitem(last=False)[1])

    @torch.no_grad()
    def _encode(self, texts: list[str], window: int | None) -> Encoded:
        with ExitStack() as stack:
            for encoder in self._encoders.values():
                stack.enter_context(evaluating(encoder))
            made: dict[str, Callable[[list[str], int | None], Encoded]] = {
                "sd": self._sd,
                "sdxl": self._sdxl,
                "sd3": self._sd3,
                "flux": self._flux,
            }
            return made[self.layout](texts, window)

    def _sd(self, texts: list[str], window: int | None) -> Encoded:
        out = self._clip("text_encoder", texts, window, layer=-1)
        return Encoded(out.hidden, out.mask, out.ids, None, self._segments(out))

    def _sdxl(self, texts: list[str], window: int | None) -> Encoded:
        parts = [self._clip(name, texts, window, layer=-2) for name in self._encoders]
        _same_tokens(parts)
        hidden = torch.cat([part.hidden for part in parts], -1)
        return Encoded(
            hidden, parts[0].mask, parts[0].ids, parts[-1].pooled, self._segments(parts[0])
        )

    def _sd3(self, texts: list[str], window: int | None) -> Encoded:
        clips = [name for name, encoder in self._encoders.items() if not _is_t5(encoder)]
        parts = [self._clip(name, texts, window, layer=-2) for name in clips]
        _same_tokens(parts)
        hidden = torch.cat([part.hidden for part in parts], -1)
        pooled = torch.cat([cast("Tensor", part.pooled) for part in parts], -1)
        t5 = self._t5("text_encoder_3", texts)
        padded = nn.functional.pad(hidden, (0, t5.hidden.shape[-1] - hidden.shape[-1]))
        return Encoded(
            torch.cat([padded, t5.hidden.to(padded)], 1),
            torch.cat([parts[0].mask, t5.mask.to(parts[0].mask.device)], 1),
            torch.cat([parts[0].ids, t5.ids.to(parts[0].ids.device)], 1),
            pooled,
            self._segments(parts[0], t5),
        )

    def _flux(self, texts: list[str], window: int | None) -> Encoded:
        pooled = self._clip("text_encoder", texts, window, layer=-1).pooled
        out = self._t5("text_encoder_2", texts)
        return Encoded(out.hidden, out.mask, out.ids, pooled, self._segments(out))

    def _clip(self, name: str, texts: list[str], window: int | None, *, layer: int) -> _Batch:
        encoder: Any = self._encoders[name]
        ids, mask = self._tokens(name, texts)
        if window is not None:
            ids, mask = ids[:, :window], mask[:, :window]
        masked = getattr(encoder.config, "use_attention_mask", False)
        out = encoder(
            ids, attention_mask=mask if masked else None, output_hidden_states=layer != -1
        )
        hidden = out.last_hidden_state if layer == -1 else out.hidden_states[layer]
        projected = getattr(out, "text_embeds", None)
        return _Batch(hidden, mask, ids, out.pooler_output if projected is None else projected)

    def _t5(self, name: str, texts: list[str]) -> _Batch:
        ids, mask = self._tokens(name, texts)
        return _Batch(self._encoders[name](ids).last_hidden_state, mask, ids, None)

    def _tokens(self, name: str, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Return ids and mask (n, width), refusing what would be cut off."""
        tokenizer, width = self._tokenizers[name], self._window(name)
        counts = self._counts(name, texts)
        texts = self._converted(texts, tokenizer)
        long = next((i for i, count in enumerate(counts) if count > width), None)
        if long is not None:
            raise ValueError(
                f"the prompt {texts[long]!r} has {counts[long]} tokens, start and end included; {name} reads "
                f"{width}. Shorten it"
            )
        out = tokenizer(texts, padding="max_length", max_length=width, return_tensors="pt")
        device = self._device(name)
        mask = torch.arange(width) < torch.tensor(counts)[:, None]
        return out["input_ids"].to(device), mask.to(device)

    def _converted(self, texts: list[str], tokenizer: Any) -> list[str]:  # noqa: ANN401 no common class
        """Return the texts with the tokens of textual inversions spelled out, as the pipeline does it."""
        convert = getattr(self._pipe, "maybe_convert_prompt", None)
        return list(convert(texts, tokenizer)) if callable(convert) else texts

    def _device(self, name: str) -> torch.device:
        device = next(self._encoders[name].parameters()).device
        if device.type != "meta":
            return device
        return torch.device(getattr(self._pipe, "_execution_device", "cpu"))  # off-loaded

    def _longest(self, text: str) -> int:
        """Return the number of tokens of a text in the CLIP tokenizers, start and end included."""
        names = [name for name, encoder in self._encoders.items() if not _is_t5(encoder)]
        return max(
            len(self._tokenizers[n](self._converted([text], self._tokenizers[n])[0])["input_ids"])
            for n in names
        )

    def _segments(self, *parts: _Batch) -> tuple[tuple[slice, bool], ...]:
        """Return where the tokens of each part lie, and whether they begin with a start token."""
        segments, begin = [], 0
        names = list(self._encoders)
        own = {"sd": names[:1], "sdxl": names[:1], "sd3": [names[0], names[-1]], "flux": names[1:]}
        for part, name in zip(parts, own[self.layout], strict=True):
            end = begin + part.ids.shape[1]
            segments.append((slice(begin, end), not _is_t5(self._encoders[name])))
            begin = end
        return tuple(segments)

    def blank(self) -> Tensor:
        """Return the vectors of the blank prompt, shape ``(T, d)``."""
        return self.encode([""]).embeddings[0]

    def rows(self, prompts: Sequence[str] | str, rule: TokenRule | str) -> list[Tensor]:
        """Return the vectors of each prompt at the positions of a rule, each ``(k, d)``.

        Raises:
            ValueError: If the rule is unknown or ``context``, or a prompt cannot be encoded.
        """
        rule = TokenRule.of(rule)
        found: list[Tensor] = []
        for batch in self.stream(prompts, short=not rule.needs_pads):
            found += [
                batch.embeddings[i, index.to(batch.embeddings.device)]
                for i, index in enumerate(batch.positions(rule))
            ]
        return found

    def pairs(
        self,
        concepts: Sequence[str] | str,
        anchors: Sequence[str] | str,
        rule: TokenRule | str = TokenRule.LAST_SUBJECT,
        weight: float | Sequence[float] | Tensor = 1.0,
        *,
        blank: BlankAnchor = "sot",
    ) -> Pairs:
        """Return pairs of what to move and where to, position by position.

        Args:
            concepts: Texts whose vectors are moved.
            anchors: One text for each, or one for all; ``""`` is the blank prompt.
            rule: Which positions. Tails (``from_last_subject``, ``eot_and_pads``) begin at each text's own and are
                cut to the shorter; ``all`` and ``all_but_sot`` go by position; for ``context`` see `align`.
            weight: One number for all, or one for each concept.
            blank: Where the blank prompt, which has no subject, is read for ``last_subject`` and
                ``from_last_subject``: at its start token, its end token, or the concept's own position.

        Raises:
            ValueError: If a concept has no token of its own or is its own anchor, or an option is unknown.
            ShapeError: If the numbers of concepts, anchors and weights differ.
        """
        rule = TokenRule.of(rule)
        if blank not in BLANK_ANCHORS:
            raise ValueError(f"blank must be one of {', '.join(BLANK_ANCHORS)}; got {blank!r}")
        sources, targets = _texts(concepts), _texts(anchors)
        targets = targets * len(sources) if len(targets) == 1 else targets
        weights = torch.as_tensor(weight, dtype=torch.float64).reshape(-1)
        weights = weights.expand(len(sources)) if len(weights) == 1 else weights
        if not len(sources) == len(targets) == len(weights):
            raise ShapeError(
                f"{len(sources)} concepts need as many anchors and weights, or one; got {len(targets)} and "
                f"{len(weights)}"
            )
        self._check_concepts(sources)
        parts: list[tuple[Tensor, Tensor]] = []
        step = max(1, self._batch_size // 2)
        for i in range(0, len(sources), step):
            some, others = sources[i : i + step], targets[i : i + step]
            both = self.encode([*some, *others], short=not rule.needs_pads)
            parts += [
                _pair(both, k, k + len(some), rule, blank, (concept, anchor))
                for k, (concept, anchor) in enumerate(zip(some, others, strict=True))
            ]
        counts = torch.tensor([len(source) for source, _ in parts])
        device = parts[0][0].device
        return Pairs(
            torch.cat([source for source, _ in parts]),
            torch.cat([target for _, target in parts]),
            torch.repeat_interleave(weights.cpu(), counts).to(device),
            torch.repeat_interleave(counts).to(device),
        )

    def pooled_pairs(
        self,
        concepts: Sequence[str] | str,
        anchors: Sequence[str] | str,
        weight: float | Sequence[float] | Tensor = 1.0,
    ) -> Pairs:
        """Return the pairs of pooled vectors; arguments as in `pairs`.

        Raises:
            SiteNotFoundError: If the pipeline reads no pooled vector.
        """
        sources, targets = _texts(concepts), _texts(anchors)
        targets = targets * len(sources) if len(targets) == 1 else targets
        self._check_concepts(sources)
        weights = torch.as_tensor(weight, dtype=torch.float64).reshape(-1)
        weights = weights.expand(len(sources)) if len(weights) == 1 else weights
        source, target = (self.pooled(texts) for texts in (sources, targets))
        return Pairs(source, target, weights.to(source).clone())

    def pooled(self, prompts: Sequence[str] | str) -> Tensor:
        """Return the pooled vectors, shape ``(n, p)``.

        Raises:
            SiteNotFoundError: If the pipeline reads no pooled vector.
        """
        parts = [batch.pooled for batch in self.stream(prompts, short=True)]
        if any(part is None for part in parts):
            raise SiteNotFoundError(
                f"the denoiser of this pipeline ({self.layout}) reads no pooled vector"
            )
        return torch.cat([part for part in parts if part is not None])

    def _check_concepts(self, texts: Sequence[str]) -> None:
        for text in texts:
            for name, tokenizer in self._tokenizers.items():
                converted = self._converted([text], tokenizer)[0]
                if not tokenizer(converted, add_special_tokens=False)["input_ids"]:
                    raise ValueError(
                        f"the concept {text!r} is no token at all for {name}'s tokenizer"
                    )

    def table(self, name: str) -> nn.Embedding:
        """Return the token table of an encoder, by the encoder's attribute or the name of the site.

        Raises:
            SiteNotFoundError: If the pipeline has no such encoder.
        """
        name = name.replace("token_embedding", "text_encoder")
        if name not in self._encoders:
            raise SiteNotFoundError(
                f"this pipeline has no {name}; it has {', '.join(self._encoders)}"
            )
        module: nn.Embedding = cast("Any", self._encoders[name]).get_input_embeddings()
        return module

    @torch.no_grad()
    def token_rows(
        self, prompts: Sequence[str] | str, rule: TokenRule | str, site: str
    ) -> list[Tensor]:
        """Return the rows of a token table that each prompt looks up, at the positions of a rule."""
        table, texts = self.table(site), _texts(prompts)
        name = site.replace("token_embedding", "text_encoder")
        t5 = _is_t5(self._encoders[name])
        ids, mask = self._tokens(name, texts)
        return [
            nn.functional.embedding(ids[i, index.to(ids.device)], table.weight).to(
                statistics_dtype(table.weight.device)
            )
            for i, index in enumerate(select(mask, rule, start=not t5))
        ]


def _pair(
    encoded: Encoded,
    i: int,
    j: int,
    rule: TokenRule,
    blank: BlankAnchor,
    texts: tuple[str, str],
) -> tuple[Tensor, Tensor]:
    """Return the vectors of prompt i, a concept, and of prompt j, its anchor; as many of both."""
    ids, mask, x = encoded.ids, encoded.mask, encoded.embeddings
    if torch.equal(ids[i], ids[j]):
        raise ValueError(
            f"anchor equal to the concept: {texts[1]!r} is the same tokens as {texts[0]!r}, so there is nothing to "
            "change; give another anchor"
        )
    source, target = [], []
    for part, start in encoded.segments:
        both = torch.stack([ids[i, part], ids[j, part]])
        one, two = _aligned(
            both, torch.stack([mask[i, part], mask[j, part]]), rule, blank, start=start
        )
        source.append(x[i, part][one.to(x.device)])
        target.append(x[j, part][two.to(x.device)])
    return torch.cat(source), torch.cat(target)


def _aligned(
    ids: Tensor, mask: Tensor, rule: TokenRule, blank: BlankAnchor, *, start: bool
) -> tuple[Tensor, Tensor]:
    """Return positions in the concept and in the anchor (the two rows), within one segment."""
    own, other = (int(n) for n in lengths(mask))
    if rule is TokenRule.CONTEXT:
        return align(ids[0], ids[1], source_length=own, anchor_length=other)
    one, two = select(mask, rule, start=start)
    empty = other == 1 + int(start)
    if empty and rule in (TokenRule.LAST_SUBJECT, TokenRule.FROM_LAST_SUBJECT):
        first = {"sot": 0, "first_eot": other - 1, "aligned": int(one[0])}[blank]
        two = torch.arange(first, first + 1 if rule is TokenRule.LAST_SUBJECT else mask.shape[1])
    common = min(len(one), len(two))
    return one[:common], two[:common]


def text_representations(
    pipe: object,
    positive: Sequence[str],
    negative: Sequence[str],
    *,
    rule: TokenRule | str = TokenRule.ALL,
    site: TextSite = "text_encoder",
    batch_size: int = 32,
    max_sequence_length: int | None = None,
) -> Representations:
    """Return text vectors with and without a concept, to fit any eraser of vectors on.

    Args:
        pipe: The pipeline; left bit-identical.
        positive: Prompts with the concept.
        negative: The same prompts without it.
        rule: Which positions; the denoiser reads ``all``. For ``pooled`` it does not matter.
        site: ``text_encoder`` for what cross-attention reads, ``pooled`` for what the time embedding reads, or
            ``token_embedding`` (``_2``, ``_3``: of the other encoders) for rows of a token table.
        batch_size: Prompts encoded at once.
        max_sequence_length: Window of T5, as in the call of the pipeline.

    Returns:
        ``x`` of shape ``(rows, d)``, labels 1 (positive) and 0 in ``z``, the prompt of each row in ``rows``.

    Raises:
        ValueError: If a list is empty, or a prompt or option is refused.
        SiteNotFoundError: If the pipeline has no such site.
    """
    if site not in TEXT_SITES:
        raise SiteNotFoundError(f"site must be one of {', '.join(TEXT_SITES)}; got {site!r}")
    rule = TokenRule.FIRST_EOT if site == "pooled" else TokenRule.of(rule)
    encoder = TextEncoder(
        pipe, batch_size=batch_size, max_sequence_length=max_sequence_length, cache=False
    )
    prompts = [*_texts(positive), *_texts(negative)]
    if site == "pooled":
        rows = list(encoder.pooled(prompts)[:, None])
    elif site == "text_encoder":
        rows = encoder.rows(prompts, rule)
    else:
        rows = encoder.token_rows(prompts, rule, site)
    x = torch.cat(rows)
    owner = torch.repeat_interleave(torch.tensor([len(row) for row in rows]))
    z = (owner < len(_texts(positive))).long()
    name = model_id(next(iter(text_encoders(pipe).values())))
    space = Space(name, encoder.fingerprint, site, str(rule), x.shape[1])
    return Representations(x, z.to(x.device), space, owner)


def _texts(prompts: Sequence[str] | str) -> list[str]:
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not texts:
        raise ValueError("there is no prompt; give at least one text")
    strange = next((text for text in texts if not isinstance(text, str)), None)
    if strange is not None:
        raise TypeError(f"prompts must be strings; got {strange!r}")
    return texts


def _is_t5(encoder: nn.Module) -> bool:
    kind = str(getattr(getattr(encoder, "config", None), "model_type", ""))
    return "t5" in kind


def _layout(pipe: object, encoders: dict[str, nn.Module]) -> str:
    """Return which row of the module's table a pipeline is, by its parts."""
    t5 = [name for name, encoder in encoders.items() if _is_t5(encoder)]
    unet = isinstance(getattr(pipe, "unet", None), nn.Module)
    if unet and not t5:
        return "sdxl" if hasattr(pipe, "tokenizer_2") else "sd"
    if not unet and t5 == ["text_encoder_3"] and len(encoders) == 3:
        return "sd3"
    if not unet and t5 == ["text_encoder_2"] and len(encoders) == 2:
        return "flux"
    hint = ""
    if hasattr(pipe, "tokenizer_3") and "text_encoder_3" not in encoders:
        hint = "; load it with its T5 (text_encoder_3)"
    raise SiteNotFoundError(
        f"{type(pipe).__name__} with {', '.join(encoders)} encodes text in a way that is not known here "
        f"(known: SD 1 and 2, SDXL, SD 3, Flux){hint}"
    )


def _tokenizer(pipe: object, encoder: str) -> Any:  # noqa: ANN401 no common class
    name = encoder.replace("text_encoder", "tokenizer")
    tokenizer = getattr(pipe, name, None)
    if tokenizer is None:
        raise TypeError(f"{type(pipe).__name__} has a {encoder} but no {name}")
    return tokenizer


def _same_tokens(parts: Sequence[_Batch]) -> None:
    if any(not torch.equal(part.mask.cpu(), parts[0].mask.cpu()) for part in parts[1:]):
        raise ShapeError("the tokenizers of this pipeline cut the prompts into different tokens")


def _row(encoded: Encoded, i: int) -> Encoded:
    pooled = None if encoded.pooled is None else encoded.pooled[i : i + 1].clone()
    return Encoded(
        encoded.embeddings[i : i + 1].clone(),
        encoded.mask[i : i + 1].clone(),
        encoded.ids[i : i + 1].clone(),
        pooled,
        encoded.segments,
    )


def _bytes(row: Encoded) -> int:
    tensors = (row.embeddings, row.mask, row.ids, row.pooled)
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)
