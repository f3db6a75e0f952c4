"""Draw pictures so that two pipelines can be compared picture by picture.

A row is a prompt, a seed and the settings of the sampler. Every row has a generator of its own on the CPU, so that
neither the batch nor the device changes its noise; two pipelines that draw the same rows start from the same latents.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Row", "draw_rows", "pipeline_hash", "pipeline_record"]

_FORMAT = 1  # part of the key of a cached picture


@dataclass(frozen=True, kw_only=True)
class Row:
    """One picture to draw.

    Attributes:
        prompt: The text.
        seed: Of its noise.
        concept: What a judge should see in it, if that is known.
        kind: Which part of a suite it belongs to.
        guidance: Classifier-free guidance scale.
        steps: Of the sampler.
        height: Pixels.
        width: Pixels.
        negative: Negative prompt; empty is none.
        case: Number or name of the row in the set it comes from.
    """

    prompt: str
    seed: int
    concept: str | None = None
    kind: str | None = None
    guidance: float = 7.5
    steps: int = 50
    height: int = 512
    width: int = 512
    negative: str = ""
    case: str = ""

    def settings(self) -> tuple[float, int, int, int, str]:
        """Return what rows of one batch must share."""
        return self.guidance, self.steps, self.height, self.width, self.negative

    def key(self) -> str:
        """Return what decides the picture, hashed; concept, kind and case do not."""
        deciding = replace(self, concept=None, kind=None, case="")
        return hashlib.sha256(json.dumps(asdict(deciding), sort_keys=True).encode()).hexdigest()[
            :24
        ]


def _modules(pipe: object) -> dict[str, nn.Module]:
    components: dict[str, Any] = getattr(pipe, "components", {})
    return {k: m for k, m in sorted(components.items()) if isinstance(m, nn.Module)}


def pipeline_hash(pipe: object) -> str | None:
    """Return a hash of all weights and of the sampler, or None where hooks may change what they do.

    Args:
        pipe: A pipeline of diffusers.
    """
    digest = hashlib.sha256()
    for part, module in _modules(pipe).items():
        if any(m._forward_hooks or m._forward_pre_hooks for m in module.modules()):
            return None
        for name, tensor in module.state_dict().items():
            digest.update(f"{part}.{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(
                tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
            )
    sampler = getattr(pipe, "scheduler", None)
    digest.update(
        f"{type(sampler).__name__} {sorted(dict(sampler.config).items(), key=str)}".encode()
        if sampler
        else b""
    )
    return digest.hexdigest()[:24]


def pipeline_record(pipe: object) -> dict[str, object]:
    """Return what a result must say about the pipeline: class, sampler, precision, versions, hash.

    Args:
        pipe: A pipeline of diffusers.
    """
    import diffusers
    import transformers

    weights = next(iter(next(iter(_modules(pipe).values())).parameters()))
    return {
        "pipeline": type(pipe).__name__,
        "sampler": type(getattr(pipe, "scheduler", None)).__name__,
        "dtype": str(weights.dtype).removeprefix("torch."),
        "safety checker": "off",
        "hash": pipeline_hash(pipe),
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }


@contextmanager
def _without_checker(pipe: Any) -> Iterator[None]:  # noqa: ANN401 - pipelines have no common class
    """Switch the safety checker off: it would replace what is to be measured by black pictures."""
    held = getattr(pipe, "safety_checker", None)
    if held is not None:
        pipe.safety_checker = None
    try:
        yield
    finally:
        if held is not None:
            pipe.safety_checker = held


@torch.no_grad()
def draw_rows(
    pipe: object,
    rows: Sequence[Row],
    *,
    batch_size: int = 32,
    cache_dir: str | Path | None = None,
    progress: bool | None = False,
) -> Tensor:
    """Draw a picture for each row.

    Args:
        pipe: A text-to-image pipeline of diffusers; left as it is.
        rows: What to draw.
        batch_size: Pictures at once; does not change them beyond rounding.
        cache_dir: Folder for pictures that were drawn; they are found again by the hash of pipeline and row. A
            pipeline with hooks is never cached.
        progress: Show a bar; ``None`` shows it on a terminal.

    Returns:
        Shape ``(n, 3, height, width)``, uint8, on the CPU, in the order of the rows.

    Raises:
        ValueError: If there are no rows, or they differ in size.
    """
    if not rows or len({(row.height, row.width) for row in rows}) > 1:
        raise ValueError("at least one row is needed, all of one size; draw other sizes apart")
    file = _cache_file(pipe, cache_dir)
    known = load_file(file) if file is not None and file.is_file() else {}
    groups: dict[tuple[object, ...], dict[str, Row]] = {}
    for row in rows:
        if (key := row.key()) not in known:
            groups.setdefault(row.settings(), {})[key] = row
    total = sum(map(len, groups.values()))
    with tqdm(total=total, disable=None if progress is None else not progress, leave=False) as bar:
        for group in groups.values():
            keys = list(group)
            for start in range(0, len(keys), batch_size):
                part = keys[start : start + batch_size]
                drawn = _draw(pipe, [group[key] for key in part])
                known.update(zip(part, drawn, strict=True))
                bar.update(len(part))
    if file is not None and total:
        file.parent.mkdir(parents=True, exist_ok=True)
        part_file = file.with_suffix(".part")
        save_file({k: v.contiguous() for k, v in known.items()}, part_file)
        part_file.replace(file)
    return torch.stack([known[row.key()] for row in rows])


def _cache_file(pipe: object, cache_dir: str | Path | None) -> Path | None:
    if cache_dir is None or (found := pipeline_hash(pipe)) is None:
        return None
    return Path(cache_dir) / f"pictures-{_FORMAT}-{found}.safetensors"


def _draw(pipe: Any, rows: Sequence[Row]) -> Tensor:  # noqa: ANN401 - pipelines have no common class
    guidance, steps, height, width, negative = rows[0].settings()
    options: dict[str, object] = {"negative_prompt": [negative] * len(rows)} if negative else {}
    with _without_checker(pipe):
        images: Tensor = pipe(
            [row.prompt for row in rows], num_inference_steps=steps, guidance_scale=guidance, height=height,
            width=width, generator=[torch.Generator().manual_seed(row.seed) for row in rows], output_type="pt",
            **options,
        ).images  # fmt: skip
    return (images.float().clamp(0, 1) * 255).round().to("cpu", torch.uint8)
