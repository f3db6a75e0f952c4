"""Probe the representations of many layers, each with a fresh probe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from concept_erasure.probes._fitted import Probe
from concept_erasure.probes.evaluate import ProbeResult, cross_validate

if TYPE_CHECKING:
    from concept_erasure.collect import Representations

__all__ = ["probe_layers"]


def probe_layers(
    representations: Mapping[str, Representations],
    *,
    probe: str | Probe = "linear",
    concept: str | None = None,
    folds: int = 5,
    seed: int = 0,
) -> dict[str, ProbeResult]:
    """Cross-validate one probe at every site; `concept_erasure.evals.plots.plot_layers` draws the result.

    Where several vectors come from one text (``tokens="all"``), they stay on one side of every split and the
    intervals are those of independent texts.

    Args:
        representations: Site to labelled vectors, as `concept_erasure.collect.collect` returns them.
        probe: A name in `PROBES`, or a configured probe.
        concept: Which concept to probe, when the labels are a mapping of several.
        folds: Parts of the cross-validation; the same ones at all sites.
        seed: Determines the parts, and a probe given by name.

    Returns:
        Site to result, in the order given.

    Raises:
        ShapeError: If vectors and labels disagree.
        TypeError: If labels are of the wrong kind.
        ValueError: If there are no sites, a site has no labels, the concept is not named or unknown, or as
            `cross_validate`.

    Example:
        >>> import torch
        >>> from concept_erasure.collect import Representations
        >>> x = torch.linspace(-1, 1, 40)[:, None]
        >>> found = {"residual.0": Representations(x, x[:, 0] > 0)}
        >>> probe_layers(found)["residual.0"].beats_majority
        True
    """
    if not representations:
        raise ValueError("there are no representations to probe; collect at least one site")
    results = {}
    for site, found in representations.items():
        z = _labels(found.z, site, concept)
        results[site] = cross_validate(
            found.x, z, probe=probe, folds=folds, seed=seed, groups=found.rows
        )
    return results


def _labels(z: object, site: str, concept: str | None) -> object:
    """Return the labels of one concept."""
    if z is None:
        raise ValueError(
            f"the representations at {site!r} have no labels; collect them with labels"
        )
    if not isinstance(z, Mapping):
        if concept is not None:
            raise ValueError(
                f"got concept={concept!r}, but the labels at {site!r} are of one concept without a name; "
                "leave concept out"
            )
        return z
    if concept is None and len(z) == 1:
        return next(iter(z.values()))
    if concept not in z:
        raise ValueError(
            f"got concept={concept!r}, the concepts at {site!r} are {sorted(map(str, z))}; name one"
        )
    return z[concept]
