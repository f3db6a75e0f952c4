"""Merging LoRAs: against float64 least squares, limits, file formats, live adapters, bad input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from concept_erasure.diffusion.fusion import fuse, live_loras, merge_loras
from concept_erasure.errors import FormatError, ShapeError
from concept_erasure.linalg import LowRankAffine

D, OUT, RANK = 12, 7, 2
PATHS = ("unet.down_blocks.0.attn2.to_k", "unet.down_blocks.0.attn2.to_v")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def lora(seed: int, paths: tuple[str, ...] = PATHS) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for i, path in enumerate(paths):
        state[f"{path}.lora_A.weight"] = randn(RANK, D, seed=seed + 10 * i)
        state[f"{path}.lora_B.weight"] = randn(OUT, RANK, seed=seed + 10 * i + 5)
    return state


def delta(state: dict[str, Tensor], path: str) -> Tensor:
    return state[f"{path}.lora_B.weight"].double() @ state[f"{path}.lora_A.weight"].double()


def reference(
    weight: Tensor, base: Tensor, deltas: list[Tensor], rows: list[Tensor], held: Tensor, lam: float
) -> Tensor:
    """Brute force in float64: rows stacked, min |X W*^T - Y|^2 by lstsq."""
    x = [*rows, held, lam**0.5 * torch.eye(D, dtype=torch.float64)]
    y = [
        *(r @ (base + d).T for r, d in zip(rows, deltas, strict=True)),
        held @ weight.T,
        lam**0.5 * base.T,
    ]
    return torch.linalg.lstsq(torch.cat(x), torch.cat(y), driver="gelsd").solution.T


@pytest.mark.parametrize("refine", [False, True])
def test_equals_least_squares(refine: bool) -> None:
    weight = randn(OUT, D, seed=1)
    edit = LowRankAffine(randn(D, 3, seed=2), 0.3 * randn(D, 3, seed=3)) if refine else None
    base = weight @ edit.matrix if edit else weight
    pairs = [(randn(OUT, RANK, seed=s), randn(RANK, D, seed=s + 50)) for s in (4, 5, 6)]
    rows = [randn(20, D, seed=s) for s in (7, 8, 9)]
    held = randn(30, D, seed=11)
    grams = [r.T @ r for r in rows]
    up, down = fuse(pairs, grams, preserve=held.T @ held, lam=0.5, weight=weight, refined=edit)
    expected = reference(weight, base, [u @ d for u, d in pairs], rows, held, 0.5)
    assert up.shape[1] == 3 * RANK + (3 if refine else 0)
    torch.testing.assert_close(weight + up @ down, expected, rtol=0, atol=1e-10)


def test_one_lora_alone_is_kept() -> None:
    weight, edit = randn(OUT, D, seed=1), LowRankAffine(randn(D, 2, seed=2), randn(D, 2, seed=3))
    up, down, rows = randn(OUT, RANK), randn(RANK, D, seed=1), randn(40, D, seed=4)
    got_up, got_down = fuse([(up, down)], [rows.T @ rows], weight=weight, refined=edit)
    expected = weight @ edit.matrix + up @ down
    torch.testing.assert_close(weight + got_up @ got_down, expected, rtol=0, atol=1e-10)


def test_identical_loras_are_one() -> None:
    state, rows = lora(0), randn(40, D, seed=4)
    one, many = merge_loras([state], [rows]), merge_loras([state] * 5, [rows] * 5)
    for path in PATHS:
        torch.testing.assert_close(delta(many, path), delta(one, path), rtol=0, atol=1e-5)
        torch.testing.assert_close(delta(one, path), delta(state, path), rtol=0, atol=1e-5)


def test_merged_loras_do_not_interfere() -> None:
    states, rows = [lora(0), lora(100)], [randn(3, D, seed=1), randn(3, D, seed=2)]
    kept = randn(3, D, seed=3)
    merged = merge_loras(states, rows, preserve=kept.T @ kept, preserve_weight=1.0, lam=1e-9)
    for path in PATHS:
        change = delta(merged, path)
        for state, own in zip(states, rows, strict=True):
            torch.testing.assert_close(
                own @ change.T, own @ delta(state, path).T, rtol=0, atol=1e-4
            )
        assert (kept @ change.T).abs().max() < 1e-4


def test_preserve_weight_wins_in_the_limit() -> None:
    kept = randn(4, D, seed=3)
    found = [
        merge_loras([lora(0)], [randn(40, D)], preserve=kept.T @ kept, preserve_weight=weight)
        for weight in (0.0, 1.0, 1e3, 1e8)
    ]
    sizes = [float((kept @ delta(merged, PATHS[0]).T).norm()) for merged in found]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < 1e-5 * sizes[0]


def renamed(state: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for key, value in state.items():
        path, half = key.removesuffix(".weight").rsplit(".", 1)
        if kind == "kohya":
            flat = "lora_" + path.replace(".", "_")
            out[f"{flat}.{'lora_down' if half == 'lora_A' else 'lora_up'}.weight"] = value
            out[f"{flat}.alpha"] = torch.tensor(2.0 * RANK)
        elif kind == "old":
            head, name = path.rsplit(".", 1)
            end = "down" if half == "lora_A" else "up"
            out[f"{head}.processor.{name}_lora.{end}.weight"] = value
        elif kind == "diffusers":
            out[f"{path}.lora.{'down' if half == 'lora_A' else 'up'}.weight"] = value
        else:
            out[f"{path}.{half}.default.weight"] = value
    return out


@pytest.mark.parametrize("kind", ["kohya", "old", "diffusers", "peft"])
def test_formats(kind: str) -> None:
    rows = randn(40, D, seed=4)
    expected, got = merge_loras([lora(0)], [rows]), merge_loras([renamed(lora(0), kind)], [rows])
    if kind == "kohya":
        path = "lora_" + PATHS[0].replace(".", "_")
        change = got[f"{path}.lora_up.weight"] @ got[f"{path}.lora_down.weight"]
        torch.testing.assert_close(
            change.double() / 2, delta(expected, PATHS[0]), rtol=0, atol=1e-5
        )
    else:
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[key], expected[key]) for key in got)


def test_other_layers() -> None:
    path = "unet.down_blocks.0.resnets.0.conv1"
    state = lora(0)
    state[f"{path}.lora_A.weight"] = randn(RANK, 3, 3, 3)
    state[f"{path}.lora_B.weight"] = randn(OUT, RANK, 1, 1)
    rows = randn(40, D)
    with pytest.raises(ValueError, match="1 of 3 layers do not read the text"):
        merge_loras([state], [rows])
    assert not any("conv1" in key for key in merge_loras([state], [rows], other="drop"))
    both = merge_loras([state, state], [rows, rows], other="sum", strengths=[1.0, 0.5])
    assert both[f"{path}.lora_A.weight"].shape == (2 * RANK, 3, 3, 3)
    change = torch.einsum(
        "orij,rchw->ochw", both[f"{path}.lora_B.weight"], both[f"{path}.lora_A.weight"]
    )
    once = torch.einsum(
        "orij,rchw->ochw", state[f"{path}.lora_B.weight"], state[f"{path}.lora_A.weight"]
    )
    torch.testing.assert_close(change, 1.5 * once.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_live_adapters() -> None:
    peft = pytest.importorskip("peft")
    model = nn.ModuleDict(
        {"attn2": nn.ModuleDict({"to_k": nn.Linear(D, OUT), "to_v": nn.Linear(D, OUT)})}
    )
    config = peft.LoraConfig(
        r=RANK, lora_alpha=6, target_modules=["to_k", "to_v"], init_lora_weights=False
    )
    peft.inject_adapter_in_model(config, model, "a")
    peft.inject_adapter_in_model(config, model, "b")
    states = live_loras(model)
    assert len(states) == 2
    layer = model["attn2"]["to_k"]
    change = delta(states[1], "transformer.attn2.to_k")
    torch.testing.assert_close(change.float(), layer.get_delta_weight("b"), rtol=1e-5, atol=1e-6)
    assert merge_loras(live_loras(model, ["b"]), [randn(30, D)])
    with pytest.raises(ValueError, match="asked for"):
        live_loras(model, ["c"])
    with pytest.raises(ValueError, match="holds the adapters"):
        live_loras(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"loras": []}, ValueError, "one tensor of inputs"),
        ({"inputs": [randn(40, D)] * 2}, ValueError, "one tensor of inputs"),
        ({"inputs": [randn(40, D + 1)]}, ValueError, "no layer"),
        ({"inputs": [randn(3, D)]}, ValueError, "lam > 0"),
        ({"inputs": [randn(40, D) * torch.nan]}, ValueError, "not finite"),
        ({"lam": -1.0}, ValueError, ">= 0"),
        ({"other": "add"}, ValueError, "refuse"),
        ({"strengths": [1.0, 1.0]}, ValueError, "one strength"),
        ({"preserve": randn(3, 3)}, ShapeError, "preserve Gram"),
        ({"loras": [{"unet.x.weight": randn(2)}]}, FormatError, "no LoRA weight"),
        ({"loras": [{f"{PATHS[0]}.lora_A.weight": randn(2, D)}]}, FormatError, "up and down"),
        ({"layers": ["*nothing"]}, ValueError, "no layer"),
    ],
)
def test_bad_input(change: dict[str, object], error: type[Exception], words: str) -> None:
    options: dict[str, object] = {"loras": [lora(0)], "inputs": [randn(40, D)], **change}
    with pytest.raises(error, match=words):
        merge_loras(**options)  # type: ignore[arg-type]


def test_mixed_names_are_refused() -> None:
    with pytest.raises(FormatError, match="convert"):
        merge_loras([lora(0), renamed(lora(1), "kohya")], [randn(40, D)] * 2)
