"""Pictures side by side: a row a prompt, a column a pipeline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from concept_erasure.errors import missing_extra

__all__ = ["picture_grid"]


def picture_grid(
    columns: Mapping[str, Tensor],
    labels: Sequence[str],
    path: str | Path,
    *,
    title: str = "",
    inch: float = 0.9,
) -> Path:
    """Draw pictures of several pipelines for the same rows.

    Args:
        columns: Name to pictures, shape ``(n, 3, h, w)``, uint8.
        labels: What each of the n rows was asked for.
        path: Where the picture goes; the ending says the format.
        title: Heading.
        inch: Side of a picture.

    Returns:
        The path.

    Raises:
        ImportError: If matplotlib is absent.
        ValueError: If there is nothing to draw or a column has another length.
    """
    if not columns or not labels or any(len(images) != len(labels) for images in columns.values()):
        lengths = {name: len(images) for name, images in columns.items()}
        raise ValueError(f"every column needs {len(labels)} pictures, got {lengths}")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise missing_extra("matplotlib", "plots") from None
    size = (2.6 + inch * len(columns), 0.5 + inch * len(labels))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(labels), len(columns), squeeze=False)
    for x, (name, images) in enumerate(columns.items()):
        for y, image in enumerate(images):
            axis = axes[y][x]
            axis.imshow(image.permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            if y == 0:
                axis.set_title(name, fontsize=7)
            if x == 0:
                axis.set_ylabel(labels[y], rotation=0, ha="right", va="center", fontsize=7)
    figure.suptitle(title, fontsize=9)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Software": None} if path.suffix == ".png" else None)
    return path
