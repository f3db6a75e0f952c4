"""The rows R-LACE is fitted on, the loss that suits their labels, and the coordinates its games are played in."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from concept_erasure.errors import ShapeError
from concept_erasure.labels import Labels
from concept_erasure.leakage import Folds, _scatter
from concept_erasure.linalg import statistics_dtype
from concept_erasure.linear.games import (
    Game,
    GameLoss,
    best_response,
    row_losses,
    top_directions,
)

__all__ = ["QUOTIENTS", "Frame", "Rows", "constant_loss", "suited_penalty"]

QUOTIENTS = ("pls", "pca", "cca")  # losses with a closed form at any rank
PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4)  # what ``penalty="auto"`` chooses among
JUDGED = (0, 1)  # of the five folds: those on which it chooses
ROUGH = (
    1e-5  # best responses while choosing are exact to this share of the constant predictor's loss
)


@dataclass(frozen=True, eq=False)
class Rows:
    """Checked rows.

    Attributes:
        x: Shape ``(n, d)``.
        encoded: Class indices ``(n,)`` or columns ``(n, c)``.
        width: Number of classes or columns.
        loss: The loss that was asked for, or that suits the labels.
        groups: Text of each row, shape ``(n,)``.
    """

    x: Tensor
    encoded: Tensor
    width: int
    loss: str
    groups: Tensor | None

    @classmethod
    def of(
        cls, data: Tensor, labels: Labels, loss: str, mask: Tensor | None, groups: Tensor | None
    ) -> Rows:
        """Flatten, apply the mask, and choose the loss.

        Raises:
            ShapeError: If the mask has another shape than the rows.
            ValueError: If there are fewer than two rows, or the labels do not suit the loss.
        """
        x, encoded = data.detach().reshape(-1, data.shape[-1]), labels.values
        groups = None if groups is None else groups.reshape(-1).to(x.device)
        if mask is not None:
            if mask.shape != data.shape[:-1]:
                shapes = tuple(data.shape[:-1]), tuple(mask.shape)
                raise ShapeError(f"mask must have shape {shapes[0]}; got {shapes[1]}")
            keep = mask.reshape(-1).to(x.device, torch.bool)
            x, encoded = x[keep], encoded[keep]
            groups = None if groups is None else groups[keep]
        if len(x) < 2:
            raise ValueError(f"at least 2 rows are needed to fit; got {len(x)}")
        return cls(x, encoded, labels.width, _suited(loss, encoded, labels.width), groups)

    def take(self, keep: Tensor | slice) -> Rows:
        """Return some of the rows."""
        groups = None if self.groups is None else self.groups[keep]
        return replace(self, x=self.x[keep], encoded=self.encoded[keep], groups=groups)

    def targets(self) -> Tensor:
        """Return what the loss wants of the labels, ``(n, c)``."""
        z = self.encoded
        if z.ndim == 1:
            z = one_hot(z, self.width)
            z = z[:, 1:] if self.loss == "logistic" and self.width == 2 else z
        return z.to(statistics_dtype(self.x.device))

    def folds(self) -> Folds:
        """Deal the rows out to five folds.

        Raises:
            ValueError: If values are not finite; the message counts all rows, not those of one fold.
        """
        bad = (~torch.isfinite(self.x.sum(1))).nonzero()[:, 0]  # a thin check; then a thorough one
        bad = bad[~torch.isfinite(self.x[bad]).all(1)]
        if len(bad):
            raise ValueError(
                f"x has {len(bad)} rows that are not finite; the first is row {int(bad[0])}"
            )
        return Folds(self.x.shape[1], self.width, device=self.x.device).update(
            self.x, self.encoded, groups=self.groups
        )

    def fold_numbers(self) -> Tensor:
        """Return which of the five folds each row is in, as `Folds` deals them."""
        turn = torch.arange(len(self.x), device=self.x.device)
        return _scatter(turn if self.groups is None else self.groups)


@dataclass(frozen=True, eq=False)
class Frame:
    """The coordinates a game is played in: centred, at unit mean variance, of the row space when n < d.

    Attributes:
        mean: Shape ``(d,)``.
        scale: Root of the mean variance.
        basis: Orthonormal columns ``(d, n - 1)``, or None.
        size: Root of the mean variance of the targets of a squared loss, else 1.
        shift: Mean of the targets of a squared loss, else 0.
    """

    mean: Tensor
    scale: Tensor
    basis: Tensor | None
    size: Tensor
    shift: Tensor

    @classmethod
    def of(cls, rows: Rows) -> Frame:
        """Return the frame of rows."""
        wide = rows.x.to(statistics_dtype(rows.x.device))
        mean = wide.mean(0)
        centred = wide - mean
        scale = centred.square().mean().sqrt()
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        thin = centred.shape[0] < centred.shape[1]
        # centred rows sum to zero: the last one adds nothing
        basis = torch.linalg.qr(centred[:-1].T)[0] if thin else None
        z = rows.targets()
        size, shift = scale.new_ones(()), torch.zeros_like(z[0])
        if rows.loss == "squared":
            shift = z.mean(0)
            size = (z - shift).square().mean().sqrt()
            size = torch.where(size > 0, size, torch.ones_like(size))
        return cls(mean, scale, basis, size, shift)

    @property
    def unit(self) -> float:
        """What a value of the game is in the units of z."""
        return float(self.size) ** 2

    def game(self, rows: Rows, penalty: float) -> Game:
        """Return the game of rows."""
        x = (rows.x.to(self.mean) - self.mean) / self.scale
        z = (rows.targets() - self.shift) / self.size
        x = x if self.basis is None else x @ self.basis
        return Game.of(x, z, cast("GameLoss", rows.loss), penalty)

    def lift(self, v: Tensor) -> Tensor:
        """Return directions of the game as directions of x."""
        return v if self.basis is None else self.basis @ v


def constant_loss(loss: str, mean: Tensor, sigma_zz: Tensor) -> float:
    """Return the loss of the best constant predictor, from the mean and covariance of z."""
    if loss == "squared":
        return float(sigma_zz.diagonal().sum())
    if loss == "logistic":
        mean = mean[-1:]
    entropy = torch.special.entr(mean).sum()
    if loss != "cross_entropy":
        entropy = entropy + torch.special.entr(1 - mean).sum()
    return float(entropy)


def _suited(loss: str, encoded: Tensor, width: int) -> str:
    """Return the loss that suits the labels, or the one asked for if they allow it."""
    if encoded.ndim == 1:
        if loss == "auto":
            return "logistic" if width == 2 else "cross_entropy"
        if loss == "logistic" and width != 2:
            raise ValueError(f"loss='logistic' needs two classes; got {width}: use 'cross_entropy'")
        return loss
    within = bool(((encoded >= 0) & (encoded <= 1)).all())
    shares = within and width > 1 and bool(((encoded.sum(1) - 1).abs() < 1e-9).all())
    if loss == "auto":
        if shares:
            return "cross_entropy"
        whole = within and bool(((encoded == 0) | (encoded == 1)).all())
        return ("logistic" if width == 1 else "multilabel") if whole else "squared"
    if loss == "cross_entropy" and not shares:
        raise ValueError("loss='cross_entropy' needs classes, or columns whose rows sum to one")
    if loss in ("logistic", "multilabel") and not within:
        raise ValueError(f"loss={loss!r} needs labels between 0 and 1; use 'squared'")
    if loss == "logistic" and width != 1:
        raise ValueError(f"loss='logistic' needs one column; got {width}: use 'multilabel'")
    return loss


def suited_penalty(rows: Rows, k: int) -> float:
    """Return the penalty with which a predictor does best on held-out rows once the k strongest directions are gone.

    The game is won against the predictor it is played with. One that is free to fit the noise of the rows has the
    directions of that noise removed, and a probe of other rows then reads the concept in what was left.
    """
    fold = rows.fold_numbers()
    totals = [torch.zeros((), device=rows.x.device)] * len(PENALTIES)
    for turn in JUDGED:
        train, test = rows.take(fold != turn), rows.take(fold == turn)
        frame = Frame.of(train)
        game, judge = (frame.game(part, PENALTIES[0]) for part in (train, test))
        v, answer = top_directions(game.pull(game.z)[:-1], k), None
        for i, penalty in enumerate(PENALTIES):
            answer = best_response(game.with_penalty(penalty), v, answer, decrement=ROUGH)
            losses = row_losses(judge.loss, judge.scores(answer.weights), judge.z)
            totals[i] = totals[i] + losses.sum()
    return PENALTIES[int(torch.stack(totals).argmin())]
