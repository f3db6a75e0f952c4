"""Linear methods off their default path: what the tests of devices run besides every registered default."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from concept_erasure.linear.alternating import GameSettings
from concept_erasure.linear.inlp import InlpEraser
from concept_erasure.linear.leace import LeaceEraser, LeaceFitter
from concept_erasure.linear.mean_projection import MeanProjectionEraser
from concept_erasure.linear.quantile import QuantileNormalizer
from concept_erasure.linear.rlace import RlaceEraser
from concept_erasure.linear.sal import SalEraser

Erase = Callable[[Tensor, Tensor], Tensor]


def _streamed(x: Tensor, z: Tensor) -> Tensor:
    fitter = LeaceFitter(x.shape[1], int(z.max()) + 1, device=x.device)
    half = len(x) // 2
    return fitter.update(x[:half], z[:half]).update(x[half:], z[half:]).eraser(x)


def _layers(x: Tensor, z: Tensor) -> Tensor:
    erasers = RlaceEraser.fit_layers({"0": x, "1": x.flip(1)}, z)
    return erasers["0"](x) + erasers["1"](x.flip(1))


def _balanced(x: Tensor, z: Tensor) -> Tensor:
    return SalEraser.fit(x, z, k=1, balance=True)(x)


def _tasks(x: Tensor, z: Tensor) -> Tensor:
    tasks = torch.arange(len(x), device=z.device) % 2
    return InlpEraser.fit(x, z, n_classifiers=1, by_class=tasks)(x)


VARIANTS: dict[str, Erase] = {
    "leace, streamed": _streamed,
    "leace, low rank": lambda x, z: LeaceEraser.fit(x, z, rank=1, strength=0.5, affine=False)(x),
    "leace, no shrinkage": lambda x, z: LeaceEraser.fit(x, z, shrinkage=False)(x),
    "sal, balanced": _balanced,
    "mean projection, linear": lambda x, z: MeanProjectionEraser.fit(x, z, affine=False)(x),
    "inlp, dropout": lambda x, z: InlpEraser.fit(x, z, n_classifiers=1, dropout=0.1)(x),
    "inlp, by task": _tasks,
    "rlace, layers": _layers,
    "rlace, filled": lambda x, z: RlaceEraser.fit(x, z, k=4, fill="variance")(x),
    "rlace, pca": lambda x, z: RlaceEraser.fit(x, z, loss="pca", k=2)(x),
    "rlace, pls": lambda x, z: RlaceEraser.fit(x, z, loss="pls", k=1)(x),
    "rlace, cca": lambda x, z: RlaceEraser.fit(x, z, loss="cca")(x),
    "rlace, fantope": lambda x, z: RlaceEraser.fit(
        x, z, k=1, solver="fantope", preset=GameSettings(steps=4)
    )(x),
    "quantile": lambda x, z: QuantileNormalizer(x, z, num_bins=16).transport(x, z, 0),
}
GAMES: dict[str, Erase] = {  # R-LACE below full rank: slow where every operation is watched
    "cross_entropy": lambda x, z: RlaceEraser.fit(x, z, k=1, starts=1)(x),
    "multilabel": lambda x, z: RlaceEraser.fit(x, one_hot(z, 3), k=1, starts=1, loss="multilabel")(
        x
    ),
    "squared": lambda x, z: RlaceEraser.fit(x, z, k=1, starts=1, loss="squared")(x),
    "scouts": lambda x, z: RlaceEraser.fit(x, z, k=1, starts=3)(x),
}
