"""What every fitted probe can do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from concept_erasure.probes._data import Label, Vectors, index_labels, read_labels, read_vectors

__all__ = ["FittedProbe", "Probe", "index_like", "training_data"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedProbe(ABC):
    """A classifier from vectors to concept classes.

    Attributes:
        classes: The labels, sorted; column ``i`` of every output belongs to ``classes[i]``.
        width: Width ``d`` of the vectors it reads.
    """

    classes: tuple[Label, ...]
    width: int

    @abstractmethod
    def _scores(self, x: Tensor) -> Tensor:
        """Return one score per class, shape ``[n, k]``, for checked vectors ``[n, d]``."""

    @property
    def has_probabilities(self) -> bool:
        """Whether the scores are logarithms of probabilities."""
        return True

    def decision(self, x: Vectors) -> Tensor:
        """Return one score per class, shape ``[n, k]``; the largest one is predicted.

        Args:
            x: Vectors, shape ``[n, d]``.

        Raises:
            ShapeError: If ``x`` is no matrix of width ``d``.
            ValueError: If ``x`` is not finite.
        """
        return self._scores(read_vectors(x, width=self.width))

    def predict_index(self, x: Vectors) -> Tensor:
        """Return the position in ``classes`` of each prediction, shape ``[n]`` int64."""
        return self.decision(x).argmax(dim=1)

    def predict(self, x: Vectors) -> list[Label]:
        """Return the predicted label of each of the ``n`` vectors."""
        return [self.classes[i] for i in self.predict_index(x).tolist()]

    def predict_log_proba(self, x: Vectors) -> Tensor:
        """Return log-probabilities (natural logarithm), shape ``[n, k]``.

        Raises:
            TypeError: If the probe gives no probabilities.
        """
        if not self.has_probabilities:
            raise TypeError(
                f"{type(self).__name__} gives scores, not probabilities; use decision(x), or a "
                "LinearProbe for a log-loss"
            )
        return torch.log_softmax(self.decision(x), dim=1)

    def predict_proba(self, x: Vectors) -> Tensor:
        """Return probabilities, shape ``[n, k]``; rows sum to one.

        Raises:
            TypeError: If the probe gives no probabilities.
        """
        return self.predict_log_proba(x).exp()

    def log_loss(self, x: Vectors, z: object) -> float:
        """Return the mean negative log-likelihood of the labels in nats.

        Args:
            x: Vectors, shape ``[n, d]``.
            z: Labels, length ``n``, all among ``classes``.

        Raises:
            TypeError: If the probe gives no probabilities.
            ValueError: If a label is unknown.
        """
        log_proba = self.predict_log_proba(x)
        index = index_like(z, self.classes, log_proba)
        return float(-log_proba.gather(1, index[:, None]).mean())

    def accuracy(self, x: Vectors, z: object) -> float:
        """Return the share of labels that are predicted correctly, in [0, 1].

        Args:
            x: Vectors, shape ``[n, d]``.
            z: Labels, length ``n``, all among ``classes``.

        Raises:
            ValueError: If a label is unknown.
        """
        predicted = self.predict_index(x)
        index = index_like(z, self.classes, predicted)
        return float((predicted == index).double().mean().item())


class Probe(Protocol):
    """A configuration that can be fitted."""

    def fit(self, x: Vectors, z: object) -> FittedProbe:
        """Fit the probe to vectors ``[n, d]`` and ``n`` labels."""


def index_like(z: object, classes: tuple[Label, ...], rows: Tensor) -> Tensor:
    """Return the class index of each label, one per row of ``rows`` and on its device."""
    return index_labels(read_labels(z, n=len(rows)), classes, device=rows.device)[0]


def training_data(x: Vectors, z: object) -> tuple[Tensor, Tensor, tuple[Label, ...]]:
    """Check vectors and labels for a fit.

    Returns:
        Vectors ``[n, d]``, class indices ``[n]`` and the classes.

    Raises:
        ShapeError: If the shapes are wrong or disagree.
        TypeError: If vectors or labels are of the wrong kind.
        ValueError: If a vector is not finite or there is only one class.
    """
    matrix = read_vectors(x)
    index, classes = index_labels(read_labels(z, n=len(matrix)), None, device=matrix.device)
    return matrix, index, classes
