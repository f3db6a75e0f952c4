"""How many bits vectors save in telling labels: online code length, and V-information.

Online code (Voita and Titov 2020, arXiv:2003.12298): the labels are sent block by block, each coded
with a probe trained on the blocks before it, the first one uniformly. A probe that needs many
examples pays for them, so the length is small only where the concept is easy to read. V-information
(Xu et al. 2020, arXiv:2002.10689): the bits by which a probe's held-out loss falls below that of the
class frequencies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise

import torch
from torch import Tensor

from concept_erasure.errors import ShapeError
from concept_erasure.probes._data import (
    Label,
    Vectors,
    index_labels,
    read_groups,
    read_labels,
    read_vectors,
)
from concept_erasure.probes._fitted import FittedProbe, Probe, training_data
from concept_erasure.probes.evaluate import fit_probe, make_probe, mean_interval, two_groups

__all__ = [
    "FRACTIONS",
    "Block",
    "CodeLength",
    "VInformation",
    "online_code_length",
    "v_information",
]

FRACTIONS = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.0625, 0.125, 0.25, 0.5, 1.0)
"""Where the blocks of the paper end, as shares of the data."""


@dataclass(frozen=True, slots=True)
class Block:
    """One block of an online code.

    Attributes:
        start: Labels sent before it, which its probe was trained on.
        stop: Labels sent after it.
        bits: Its length.
    """

    start: int
    stop: int
    bits: float

    @property
    def bits_per_label(self) -> float:
        """The mean length of a label of the block."""
        return self.bits / (self.stop - self.start)


@dataclass(frozen=True, slots=True)
class CodeLength:
    """The length of the online code of labels given vectors.

    Attributes:
        blocks: The blocks in the order they were sent.
        n: Labels.
        classes: Number of classes.
        entropy: Bits of a label coded by the class frequencies of the data, which takes no vectors.
    """

    blocks: tuple[Block, ...]
    n: int
    classes: int
    entropy: float

    @property
    def bits(self) -> float:
        """The code length in bits, the sum over the blocks."""
        return sum(block.bits for block in self.blocks)

    @property
    def uniform_bits(self) -> float:
        """The length of the uniform code, ``n log2(classes)``."""
        return self.n * math.log2(self.classes)

    @property
    def compression(self) -> float:
        """Uniform code length over code length; 1 or less when the vectors tell nothing."""
        return self.uniform_bits / self.bits

    @property
    def beats_frequencies(self) -> bool:
        """Whether the code is shorter than that of the class frequencies, the bar for skewed classes."""
        return self.bits < self.n * self.entropy

    def to_dict(self) -> dict[str, object]:
        """Return everything as JSON-ready values."""
        return {
            "bits": self.bits,
            "uniform_bits": self.uniform_bits,
            "compression": self.compression,
            "entropy": self.entropy,
            "n": self.n,
            "classes": self.classes,
            "blocks": [asdict(block) for block in self.blocks],
        }

    def __str__(self) -> str:
        """Return one line for people."""
        return (
            f"{self.bits:.1f} bits for {self.n} labels, compression {self.compression:.2f} "
            f"against {self.uniform_bits:.1f} bits uniformly"
        )


def online_code_length(
    x: Vectors,
    z: object,
    *,
    probe: str | Probe = "linear",
    fractions: Sequence[float] = FRACTIONS,
    seed: int = 0,
    groups: object = None,
) -> CodeLength:
    """Return the length of the online code of labels given vectors.

    Deviation: until two classes with two examples each have been sent, a block is coded by the frequencies so
    far, one added to each; and a class not sent yet keeps probability ``1 / (sent + classes)``. The paper
    leaves open what a probe says of a class it has not seen.

    Args:
        x: Vectors, shape ``[n, d]``.
        z: Class labels, length ``n``.
        probe: A name in `PROBES`, or a configured probe; it must give probabilities.
        fractions: Where blocks end, increasing shares of the data up to 1; blocks without labels are dropped.
        seed: Determines the order in which labels are sent, and a probe given by name.
        groups: Group of each vector, length ``n``; a group is sent in one block.

    Returns:
        The code length and its blocks.

    Raises:
        ShapeError: If the shapes are wrong or disagree.
        TypeError: If vectors or labels are of the wrong kind, or the probe gives no probabilities.
        ValueError: If the data are not finite, there is only one class, or ``fractions`` do not increase to 1.

    Reference:
        Voita and Titov 2020, "Information-Theoretic Probing with Minimum Description Length".

    Example:
        >>> import torch
        >>> x = torch.linspace(-1, 1, 1000)[:, None]
        >>> code = online_code_length(x, x[:, 0] > 0)
        >>> code.uniform_bits, code.compression > 3
        (1000.0, True)
    """
    ends = [float(fraction) for fraction in fractions]
    if not ends or ends != sorted(set(ends)) or ends[0] <= 0 or ends[-1] != 1:
        raise ValueError(f"fractions must increase from above 0 to 1, got {list(fractions)}")
    matrix, index, classes = training_data(x, z)
    n, k = len(matrix), len(classes)
    group = None if groups is None else read_groups(groups, n=n).to(index.device)
    order, stops = _order(n, ends, group, torch.Generator().manual_seed(seed))
    matrix, index = matrix[order], index[order]
    group = None if group is None else group[order]
    model = make_probe(probe, seed)
    blocks = [Block(0, stops[0], stops[0] * math.log2(k))]
    for start, stop in pairwise(stops):
        sent = None if group is None else group[:start]
        loss = _block_loss(model, matrix[:stop], index[:stop], start, classes, sent)
        blocks.append(Block(start, stop, float(loss.sum()) / math.log(2)))
    rates = torch.bincount(index, minlength=k).double() / n
    return CodeLength(tuple(blocks), n, k, -float(torch.xlogy(rates, rates).sum()) / math.log(2))


def _order(
    n: int, ends: list[float], group: Tensor | None, generator: torch.Generator
) -> tuple[Tensor, list[int]]:
    """Return the order of the rows, ``[n]``, and where blocks stop."""
    order = torch.randperm(n, generator=generator)
    stops = [min(n, math.ceil(end * n)) for end in ends]
    if group is None:
        return order, sorted(set(stops))
    shuffled = torch.randperm(int(group.max()) + 1, generator=generator).to(group.device)
    order = shuffled[group].argsort(stable=True)
    last = torch.bincount(shuffled[group]).cumsum(0)
    wanted = torch.tensor(stops, device=last.device)
    whole = last[
        torch.searchsorted(last, wanted)
    ]  # a group that is cut goes with the earlier block
    return order, sorted(set(whole.tolist()))


def _block_loss(
    model: Probe,
    x: Tensor,
    index: Tensor,
    start: int,
    classes: tuple[Label, ...],
    groups: Tensor | None,
) -> Tensor:
    """Return the loss in nats of each label from ``start`` on, coded by what the ones before tell."""
    k = len(classes)
    counts = torch.bincount(index[:start], minlength=k)
    unseen = counts == 0
    target = index[start:]
    if int((counts > 1).sum()) < 2:
        rates = (counts.double() + 1) / (start + k)
        return -rates.log()[target]
    fitted = fit_probe(model, x[:start], [classes[i] for i in index[:start].tolist()], groups)
    log_proba = _log_proba(fitted, x[start:])
    full = log_proba.new_full((len(target), k), -math.log(start + k))
    rest = math.log1p(-int(unseen.sum()) / (start + k))
    full[:, ~unseen] = log_proba + rest
    return -full.gather(1, target[:, None])[:, 0].double()


def _log_proba(fitted: FittedProbe, x: Tensor) -> Tensor:
    if not fitted.has_probabilities:
        raise TypeError(
            f"a code needs probabilities and {type(fitted).__name__} gives scores; use 'linear', 'mlp', "
            "'kernel' or 'centroid'"
        )
    return fitted.predict_log_proba(x)


@dataclass(frozen=True, slots=True, kw_only=True)
class VInformation:
    """Usable information about a concept, in bits a label.

    Attributes:
        bits: ``entropy - conditional``, on test data; below zero when the probe overfits.
        low: Lower end of its 95 % normal interval; None for a single vector or group.
        high: Upper end.
        entropy: Loss of the class frequencies of the training data.
        conditional: Loss of the probe.
        n: Vectors tested.
    """

    bits: float
    low: float | None
    high: float | None
    entropy: float
    conditional: float
    n: int

    def to_dict(self) -> dict[str, float | int | None]:
        """Return the fields as JSON-ready values."""
        return asdict(self)

    def __str__(self) -> str:
        """Return one line for people."""
        ends = "" if self.low is None else f" [{self.low:.4f}, {self.high:.4f}]"
        return f"{self.bits:.4f}{ends} of {self.entropy:.4f} bits a label (n = {self.n})"


def v_information(
    x_train: Vectors,
    z_train: object,
    x_test: Vectors,
    z_test: object,
    *,
    probe: str | Probe = "linear",
    seed: int = 0,
    groups: tuple[object, object] | None = None,
) -> VInformation:
    """Return what the family of a probe can use of the vectors, in bits a label.

    Args:
        x_train: Vectors to fit on, shape ``[n, d]``.
        z_train: Their class labels, length ``n``.
        x_test: Vectors to test on, shape ``[m, d]``.
        z_test: Their labels, length ``m``; each must occur in ``z_train``.
        probe: A name in `PROBES`, or a configured probe; it must give probabilities.
        seed: For probes given by name.
        groups: As in `evaluate`.

    Returns:
        The information with its interval, from the spread of the gain over test vectors or groups.

    Raises:
        ShapeError: If the shapes are wrong or disagree.
        TypeError: If vectors or labels are of the wrong kind, or the probe gives no probabilities.
        ValueError: As `evaluate`.

    Reference:
        Xu, Zhao, Song, Stewart and Ermon 2020, "A Theory of Usable Information under Computational
        Constraints", arXiv:2002.10689.
    """
    matrix, index, classes = training_data(x_train, z_train)
    test = read_vectors(x_test, name="x_test")
    if test.shape[1] != matrix.shape[1]:
        raise ShapeError(
            f"x_train and x_test must have one width, got {list(matrix.shape)} and "
            f"{list(test.shape)}"
        )
    labels = read_labels(z_test, n=len(test), name="z_test")
    target, _ = index_labels(labels, classes, device=test.device)
    train_groups, test_groups = two_groups(groups, len(matrix), len(test))
    fitted = fit_probe(
        make_probe(probe, seed), matrix, [classes[i] for i in index.tolist()], train_groups
    )
    loss = -_log_proba(fitted, test).gather(1, target[:, None])[:, 0].double().cpu()
    rates = torch.bincount(index, minlength=len(classes)).double() / len(index)
    constant = -rates.log()[target].cpu()
    gain = (constant - loss) / math.log(2)
    low, high = mean_interval(gain, test_groups)
    return VInformation(
        bits=float(gain.mean()),
        low=low,
        high=high,
        entropy=float(constant.mean()) / math.log(2),
        conditional=float(loss.mean()) / math.log(2),
        n=len(test),
    )
