"""What texts say about latents: where each fires, and what it adds to the probability of the concept's tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from concept_erasure.collect import Progress, Reached, _shown, accepted, evaluating
from concept_erasure.language.batches import Batch, Encoded, collate, encode, logits_at, pad_id
from concept_erasure.sae.activations import Window, cut, padded, special_ids
from concept_erasure.sae.disentangler import CHUNK_VALUES, Disentangler
from concept_erasure.sites import Site, hook, resolve

__all__ = [
    "Attributed",
    "Fired",
    "answering",
    "attributions",
    "batches_of",
    "fired",
    "places_of",
    "saying",
    "windows_of",
]


@dataclass(frozen=True, eq=False)
class Fired:
    """How a dictionary's latents fire on the tokens of some texts.

    Attributes:
        count: Tokens each fires on, shape ``(n,)``, int64.
        total: Sum of its codes, shape ``(n,)``, float32.
        largest: Largest code, shape ``(n,)``.
        where: Number of the token with the largest code in `places`, shape ``(n,)``, int64.
        places: Window and position of every token read, shape ``(N, 2)``.
    """

    count: Tensor
    total: Tensor
    largest: Tensor
    where: Tensor
    places: Tensor

    @property
    def rate(self) -> Tensor:
        """Share of the tokens it fires on, shape ``(n,)``."""
        return self.count.float() / max(1, len(self.places))

    @property
    def mean(self) -> Tensor:
        """Mean code over all tokens, shape ``(n,)``."""
        return self.total / max(1, len(self.places))


class _Tally:
    """Running sums of one dictionary."""

    def __init__(self, dis: Disentangler, device: torch.device) -> None:
        self.dis = dis
        self.count = torch.zeros(dis.n, dtype=torch.int64, device=device)
        self.total = torch.zeros(dis.n, dtype=torch.float32, device=device)
        self.largest = torch.zeros_like(self.total)
        self.where = torch.zeros_like(self.count)
        self.seen = 0

    def add(self, x: Tensor) -> None:
        for at, z in self.dis.chunks(x):
            self.count += (z > 0).sum(0)
            self.total += z.sum(0, dtype=torch.float32)
            most, row = z.max(0)
            more = most.float() > self.largest
            self.largest = torch.where(more, most.float(), self.largest)
            self.where = torch.where(more, row + at.start + self.seen, self.where)
        self.seen += len(x)

    def fired(self, places: Tensor) -> Fired:
        return Fired(
            self.count.cpu(), self.total.cpu(), self.largest.cpu(), self.where.cpu(), places
        )


def windows_of(
    tokenizer: Callable[..., Any], texts: Sequence[str], *, max_length: int, tokens: int, seed: int
) -> list[Window]:
    """Return windows of texts in random order, no more than hold so many tokens."""
    windows = cut(tokenizer, texts, max_length)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed)).tolist()
    made, total = list[Window](), 0
    for number in order:
        if total >= tokens:
            break
        made.append(windows[number])
        total += len(windows[number].ids) - 1
    return sorted(made, key=lambda one: len(one.ids))  # little padding


def fired(
    model: nn.Module,
    dictionaries: Mapping[str, Disentangler],
    places: Mapping[str, Site],
    windows: Sequence[Window],
    specials: set[int],
    *,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> dict[str, Fired]:
    """Return how the latents of every dictionary fire, from one pass that ends after the last site.

    The first token of a window, padding and special tokens are left out. Memory does not depend on the number of
    windows, except for 16 bytes a token.

    Args:
        model: The model, left as it is.
        dictionaries: By site.
        places: Where their activations are.
        windows: What to read.
        specials: Ids of tokens to leave out.
        batch_size: Windows of a forward pass.
        progress: Whether to show a bar.
    """
    device = next(model.parameters()).device
    tallies = {name: _Tally(dis, device) for name, dis in dictionaries.items()}
    left_out = torch.tensor(sorted(specials), dtype=torch.int64)
    read: list[Tensor] = []
    with _shown(progress, len(windows), "reading texts") as tell, evaluating(model):
        for start in range(0, len(windows), batch_size):
            ids, real = padded(windows[start : start + batch_size])
            kept = real & ~torch.isin(ids, left_out)
            kept[:, 0] = False
            at = kept.nonzero()
            at[:, 0] += start
            read.append(at)
            inputs = {"input_ids": ids.to(device), "attention_mask": real.long().to(device)}
            _tallied(model, tallies, places, inputs, kept.to(device))
            tell(start + len(ids))
    every = torch.cat(read) if read else torch.zeros(0, 2, dtype=torch.int64)
    return {name: tally.fired(every) for name, tally in tallies.items()}


def _tallied(
    model: nn.Module,
    tallies: Mapping[str, _Tally],
    places: Mapping[str, Site],
    inputs: dict[str, Tensor],
    kept: Tensor,
) -> None:
    met: set[str] = set()
    with ExitStack() as stack:
        for name, tally in tallies.items():

            def add(x: Tensor, name: str = name, tally: _Tally = tally) -> None:
                tally.add(x.reshape(*kept.shape, x.shape[-1])[kept])
                met.add(name)
                if len(met) == len(tallies):
                    raise Reached

            stack.callback(hook(model, places[name], add).remove)
        try:
            model(**accepted(model, inputs))
        except Reached:
            return


def saying(
    tokenizer: Callable[..., Any], texts: Sequence[str], tokens: Sequence[int], max_length: int
) -> list[Encoded]:
    """Return texts with only those tokens supervised that are among some ids; texts without them are left out."""
    wanted = torch.tensor(list(tokens), dtype=torch.int64)
    made = []
    for row in encode(tokenizer, texts, max_length=max_length):
        mask = row.supervised & torch.isin(row.ids, wanted)
        if bool(mask.any()):
            made.append(replace(row, supervised=mask))
    return made


def batches_of(
    rows: Sequence[Encoded], tokenizer: Callable[..., Any], batch_size: int, device: torch.device
) -> list[Batch]:
    """Return texts in batches on a device, those of like length together."""
    order = sorted(rows, key=len)
    fill = pad_id(tokenizer)
    parts = torch.arange(len(order)).split(batch_size)
    return [collate(order, part.tolist(), pad_id=fill).to(device) for part in parts if len(part)]


def answering(
    tokenizer: Callable[..., Any], pairs: Sequence[tuple[str, str]], max_length: int
) -> list[Encoded]:
    """Return prompts with their answers, of which only the answers are supervised.

    Raises:
        ValueError: If an answer adds no token to its prompt, or none that fits.
    """
    prompts = encode(tokenizer, [prompt for prompt, _ in pairs], max_length=max_length)
    wholes = encode(tokenizer, [prompt + answer for prompt, answer in pairs], max_length=max_length)
    made = []
    for (prompt, answer), short, whole in zip(pairs, prompts, wholes, strict=True):
        shared = min(len(short), len(whole))
        same = (short.ids[:shared] == whole.ids[:shared]).long().cumprod(0).sum()
        mask = whole.supervised.clone()
        mask[: int(same)] = False
        if not bool(mask.any()):
            raise ValueError(
                f"the answer {answer!r} to {prompt!r} has no token among the first {max_length}"
            )
        made.append(replace(whole, supervised=mask))
    return made


@dataclass(frozen=True, eq=False)
class Attributed:
    """What each latent adds to log-probabilities, to first order, on the CPU.

    Attributes:
        mean: Nats an answer by site, shape ``(n,)``; zeros if there are no answers.
        square: Squares of the sums over a text, for each answer, by site, ``(n,)``: twice the divergence a token that
            taking the latent away costs where the texts are the model's own (the empirical Fisher information).
        answers: Supervised tokens.
    """

    mean: dict[str, Tensor]
    square: dict[str, Tensor]
    answers: int


def attributions(
    model: nn.Module,
    tokenizer: Callable[..., Any],
    dictionaries: Mapping[str, Disentangler],
    places: Mapping[str, Site],
    rows: Sequence[Encoded],
    *,
    linear: bool = False,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> Attributed:
    """Return what each latent adds to the log-probability of supervised tokens, to first order.

    ``sum over places of z_f (d_f . grad log p(answer)) / answers``: the gradient at the site times what the latent
    writes there. Every place before an answer counts, not only the one that predicts it.

    Args:
        model: The model, left as it is; its gradients are not touched.
        tokenizer: Its tokenizer.
        dictionaries: By site.
        places: Where their activations are.
        rows: Texts whose supervised tokens are the answers, see `saying` and `answering`.
        linear: Attribute the linear coefficient ``d_f . x``, which a projection takes away, in place of the code z_f.
        batch_size: Texts of a pass.
        progress: Whether to show a bar.
    """
    device = next(model.parameters()).device
    sums, squares = (
        {
            name: torch.zeros(dis.n, dtype=torch.float32, device=device)
            for name, dis in dictionaries.items()
        }
        for _ in range(2)
    )
    left_out = torch.tensor(sorted(special_ids(tokenizer)), dtype=torch.int64, device=device)
    answers, done = 0, 0
    with _shown(progress, len(rows), "attribution") as tell:
        for batch in batches_of(rows, tokenizer, batch_size, device):
            found = _gradients(model, places, batch)
            kept = batch.attention_mask.bool() & ~torch.isin(batch.input_ids, left_out)
            kept[:, 0] = False
            text = kept.nonzero()[:, 0]
            for name, (x, g) in found.items():
                dis = dictionaries[name]
                rows_x, rows_g = (v.reshape(*kept.shape, v.shape[-1])[kept] for v in (x, g))
                back = dis.W_dec.to(device).T
                of_text = torch.zeros(len(kept), dis.n, dtype=torch.float32, device=device)
                for at, z in _coefficients(dis, rows_x, linear):
                    added = (z * (rows_g[at].to(dis.dtype) @ back)).float()
                    of_text.index_add_(0, text[at], added)
                sums[name] += of_text.sum(0)
                squares[name] += of_text.square().sum(0)
            answers += batch.count
            done += len(batch.rows)
            tell(done)
    mean, square = (
        {name: (value / max(1, answers)).cpu() for name, value in held.items()}
        for held in (sums, squares)
    )
    return Attributed(mean, square, answers)


def _coefficients(dis: Disentangler, x: Tensor, linear: bool) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of the rows of x and their codes, or their linear coefficients."""
    if not linear:
        yield from dis.chunks(x)
        return
    back, step = dis.W_dec.to(x.device).T, max(1, CHUNK_VALUES // dis.n)
    for start in range(0, len(x), step):
        where = slice(start, start + step)
        yield where, x[where].to(dis.dtype) @ back


def _gradients(
    model: nn.Module, places: Mapping[str, Site], batch: Batch
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return activations and the gradient of the summed log-probability at every site."""
    kept: dict[str, Tensor] = {}
    moved: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for name, place in places.items():

            def shift(x: Tensor, name: str = name) -> Tensor:
                kept[name] = x.detach()
                moved[name] = torch.zeros_like(x, requires_grad=True)
                return x + moved[name]

            stack.callback(hook(model, place, shift).remove)
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.enable_grad())
        logits = logits_at(model, batch).float()
        said = logits.log_softmax(-1).gather(1, batch.tokens[:, None]).sum()
        grads = torch.autograd.grad(said, [moved[name] for name in places])
    return {name: (kept[name], grad) for name, grad in zip(places, grads, strict=True)}


def places_of(model: nn.Module, dictionaries: Mapping[str, Disentangler]) -> dict[str, Site]:
    """Return where the activations of each dictionary are read."""
    return {
        name: resolve(model, dis.activation_site(model))[0] for name, dis in dictionaries.items()
    }
