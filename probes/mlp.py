"""A network with one hidden layer: what linear erasure does not promise to hide.

Which units inputs need depends on the data: one large direction hides the others from a network that sees
plain vectors, and the network that sees every direction alike drowns in the small ones of real activations. One
network is therefore trained for each of a few units, and the one with the lowest log-loss on a held-out
part of the training data is kept. Inputs are rotated at random while training, because Adam steps alike along
every axis and so misses a concept that lies along a single one. Training stops when the held-out loss
no longer falls, and the best weights are kept.
The global random state is neither read nor set.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, gelu

from concept_erasure.probes._data import Vectors, read_groups
from concept_erasure.probes._fitted import FittedProbe, training_data
from concept_erasure.probes._ridge import InputUnits, Scaling, check_scaling, input_units

__all__ = ["FittedMlp", "MlpProbe", "split_classes"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedMlp(FittedProbe):
    """A fitted network.

    Attributes:
        mean: Subtracted from the vectors, shape ``[d]``.
        basis: Then multiplies them, shape ``[d, r]``: directions over their units.
        standardize: Units of the inputs, as given or chosen.
        weights: ``(hidden weight [h, d], bias [h], output weight [k, h], bias [k])``.
        epochs: Passes over the data after which the held-out loss was lowest.
    """

    mean: Tensor
    basis: Tensor
    standardize: Scaling
    weights: tuple[Tensor, ...]
    epochs: int

    def _scores(self, x: Tensor) -> Tensor:
        inputs = ((x - self.mean.to(x)) @ self.basis.to(x)).to(self.weights[0])
        with torch.no_grad():
            return _forward(inputs, self.weights).to(x.dtype)


@dataclass(frozen=True, slots=True)
class _Run:
    """The best weights of a training, and the epoch and held-out loss they had."""

    weights: tuple[Tensor, ...]
    epochs: int
    loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MlpProbe:
    """One hidden layer, GELU, AdamW, early stopping.

    O(d^3 + n d^2) time once, then O(n d hidden) per epoch, two or three times that while choosing units;
    O(d^2 + n d) memory.

    Attributes:
        hidden: Width of the hidden layer. Higher reads finer structure and overfits sooner.
        learning_rate: Step size of AdamW.
        weight_decay: Decoupled weight decay.
        batch_size: Vectors per step.
        max_epochs: Most passes over the data.
        patience: Passes without a lower held-out loss before stopping.
        held_out: Share of each class kept out of training to decide when to stop, in (0, 1).
        standardize: Units of the inputs. ``"cap"``: one number, but principal directions above twenty times the
            median deviation are that large. ``"feature"``: the deviation of each feature. ``"whiten"``: the
            deviation of each principal direction. The others are as in `LinearProbe`. ``"auto"``: the one of
            these three with the lowest held-out loss (of the first two with fewer rows than twice the width).
        seed: Determines the split, the first weights and the order of the data.

    Example:
        >>> import torch
        >>> from concept_erasure.probes import MlpProbe
        >>> x = torch.linspace(-1, 1, 60)[:, None]
        >>> MlpProbe(seed=0, max_epochs=50).fit(x, x[:, 0] > 0).predict(torch.tensor([[2.0]]))
        [True]
    """

    hidden: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 1e-3
    batch_size: int = 128
    max_epochs: int = 200
    patience: int = 15
    held_out: float = 0.15
    standardize: Scaling = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the values."""
        for name in ("hidden", "batch_size", "max_epochs", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay must not be negative, got {self.weight_decay}")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out must lie between 0 and 1, got {self.held_out}")
        check_scaling(self.standardize)

    def fit(self, x: Vectors, z: object, *, groups: object = None) -> FittedMlp:
        """Fit the probe.

        Args:
            x: Vectors, shape ``[n, d]``, any real dtype.
            z: Class labels, length ``n``: strings, bools or integers; two or more of each class
                are needed for the class to be represented in the held-out part.
            groups: Group of each vector (such as its text), length ``n``: one group is never on both sides of
                the split that decides when to stop.

        Returns:
            The fitted probe, on the device of ``x``.

        Raises:
            ShapeError: If the shapes are wrong or disagree.
            TypeError: If vectors or labels are of the wrong kind.
            ValueError: If a vector is not finite, there is only one class, or every class has a
                single example.
        """
        with torch.inference_mode(False), torch.enable_grad():
            matrix, index, classes = training_data(x, z)
            generator = torch.Generator().manual_seed(self.seed)
            parts = None if groups is None else read_groups(groups, n=len(matrix))
            train, held_out = split_classes(index, self.held_out, generator, parts)
            tried = [
                self._fit_units(unit, matrix, index, (train, held_out), generator)
                for unit in input_units(matrix[train], self.standardize)
            ]
        unit, run = min(tried, key=lambda pair: pair[1].loss)
        return FittedMlp(
            classes=classes,
            width=matrix.shape[1],
            mean=unit.mean,
            basis=unit.basis,
            standardize=unit.scaling,
            weights=run.weights,
            epochs=run.epochs,
        )

    def _fit_units(
        self,
        unit: InputUnits,
        matrix: Tensor,
        index: Tensor,
        parts: tuple[Tensor, Tensor],
        generator: torch.Generator,
    ) -> tuple[InputUnits, _Run]:
        """Train one network on inputs in the given units."""
        inputs = unit.apply(matrix).float()
        width, classes = inputs.shape[1], int(index.max()) + 1
        weights = _first_weights(width, self.hidden, classes, generator)
        weights = [weight.to(matrix.device).requires_grad_() for weight in weights]
        rotation = _rotation(width, generator).to(inputs.device)
        run = self._train(weights, inputs @ rotation, index, parts, generator)
        return unit, replace(run, weights=(run.weights[0] @ rotation.T, *run.weights[1:]))

    def _train(
        self,
        weights: list[Tensor],
        inputs: Tensor,
        index: Tensor,
        parts: tuple[Tensor, Tensor],
        generator: torch.Generator,
    ) -> _Run:
        """Train until the held-out loss stops falling."""
        train, held_out = parts
        optimizer = torch.optim.AdamW(
            weights, lr=self.learning_rate, weight_decay=self.weight_decay
        )
        best, best_epoch = tuple(weight.detach().clone() for weight in weights), 0
        lowest = _loss(inputs[held_out], index[held_out], weights)
        for epoch in range(1, self.max_epochs + 1):
            order = torch.randperm(len(train), generator=generator).to(train.device)
            for rows in torch.split(train[order], self.batch_size):
                optimizer.zero_grad(set_to_none=True)
                loss = cross_entropy(_forward(inputs[rows], weights), index[rows])
                torch.autograd.backward(loss)
                optimizer.step()
            current = _loss(inputs[held_out], index[held_out], weights)
            if current < lowest:
                lowest, best_epoch = current, epoch
                best = tuple(weight.detach().clone() for weight in weights)
            elif epoch - best_epoch >= self.patience:
                break
        return _Run(best, best_epoch, lowest)


def _forward(inputs: Tensor, weights: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    hidden_weight, hidden_bias, out_weight, out_bias = weights
    return gelu(inputs @ hidden_weight.T + hidden_bias) @ out_weight.T + out_bias


def _loss(inputs: Tensor, index: Tensor, weights: list[Tensor]) -> float:
    with torch.no_grad():
        return float(cross_entropy(_forward(inputs, weights), index))


def _first_weights(
    width: int, hidden: int, classes: int, generator: torch.Generator
) -> list[Tensor]:
    """Draw the weights on the CPU, so that every device starts from the same ones."""
    return [
        torch.randn(hidden, width, generator=generator) / max(width, 1) ** 0.5,
        torch.zeros(hidden),
        torch.randn(classes, hidden, generator=generator) * 0.1 / hidden**0.5,
        torch.zeros(classes),
    ]


def _rotation(width: int, generator: torch.Generator) -> Tensor:
    """Draw an orthogonal matrix, shape ``[width, width]``, on the CPU; O(width^3) time."""
    rotation: Tensor = torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
    return rotation


def split_classes(
    index: Tensor, share: float, generator: torch.Generator, groups: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Split rows class by class; every class stays in training, and in both parts if it can."""
    if groups is not None:
        return _split_groups(index, share, generator, groups.to(index.device))
    train, held_out = [], []
    for label in range(int(index.max()) + 1):
        rows = (index == label).nonzero().flatten()
        rows = rows[torch.randperm(len(rows), generator=generator).to(rows.device)]
        count = min(max(round(share * len(rows)), 1), len(rows) - 1)
        held_out.append(rows[:count])
        train.append(rows[count:])
    if not sum(map(len, held_out)):
        raise ValueError(
            f"early stopping needs a class with at least two examples, got {len(index)} examples "
            "of as many classes; add data"
        )
    return torch.cat(train), torch.cat(held_out)


def _split_groups(
    index: Tensor, share: float, generator: torch.Generator, groups: Tensor
) -> tuple[Tensor, Tensor]:
    """Hold out whole groups until the share is reached; every class keeps rows to train on."""
    counts = torch.zeros(int(groups.max()) + 1, int(index.max()) + 1, dtype=torch.int64)
    counts.index_put_((groups.cpu(), index.cpu()), torch.ones(len(index)).long(), accumulate=True)
    left, taken = counts.sum(dim=0), torch.zeros(len(counts), dtype=torch.bool)
    for group in torch.randperm(len(counts), generator=generator).tolist():
        full = int(counts[taken].sum()) >= share * len(index)
        if not full and bool((left > counts[group]).all()):
            left = left - counts[group]
            taken[group] = True
    if not bool(taken.any()):
        raise ValueError(
            f"early stopping needs a group to hold out, got {len(counts)} groups, each of which holds all of "
            "some class; add groups"
        )
    out = taken.to(groups.device)[groups]
    return (~out).nonzero().flatten(), out.nonzero().flatten()
