"""Training: what is learned, how the traps of short runs are met, and that a run can be interrupted."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from torch import Tensor

from concept_erasure.errors import FormatError
from concept_erasure.sae import train
from concept_erasure.sae.disentangler import Disentangler
from concept_erasure.sae.formats import from_sae_lens
from concept_erasure.sae.measure import quality
from concept_erasure.sae.train import TrainConfig, train_matryoshka, train_vectors
from tests.benchmarks import absorption
from tests.models import TinyTokenizer, tiny

sae_lens = pytest.importorskip("sae_lens")

D = 12
QUICK = TrainConfig(widths=(4, 12), k=2, tokens=40 * 32, batch_size=32)


def family(count: int, seed: int) -> Tensor:
    """Return sparse positive sums of eight orthonormal directions, shape ``(N, 12)``."""
    fixed = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(D, D, generator=fixed))[0][:8]
    random = torch.Generator().manual_seed(seed)
    fires = torch.rand(count, 8, generator=random) < 0.2
    return (fires * (0.8 + 0.4 * torch.rand(count, 8, generator=random))) @ directions


def equal(a: Disentangler, b: Disentangler) -> bool:
    return all(
        torch.equal(x, y) for x, y in zip(a.tensors().values(), b.tensors().values(), strict=True)
    )


def test_batch_topk_counts() -> None:
    from sae_lens.saes.batchtopk_sae import BatchTopK

    x = torch.randn(7, 20, generator=torch.Generator().manual_seed(0))
    for k in (0.5, 3, 9.9):
        z = BatchTopK(k)(x)
        assert int((z > 0).sum()) == min(int(k * 7), int((x > 0).sum()))
    order = torch.randperm(7, generator=torch.Generator().manual_seed(1))
    assert torch.equal(BatchTopK(3)(x[order]), BatchTopK(3)(x)[order])
    assert not torch.equal(
        BatchTopK(3)(x[:1]), BatchTopK(3)(x)[:1]
    )  # why it is never used after training


def test_a_short_run_reconstructs() -> None:
    random = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(80, 64, generator=random), dim=1)
    fires = torch.rand(8000, 80, generator=random) < 0.04
    x = (fires * torch.rand(8000, 80, generator=random)) @ rows
    config = TrainConfig(
        widths=(64, 512), k=4, tokens=300 * 64, batch_size=64, learning_rate=3e-3, level_aux=False
    )
    dis = train_vectors(x, config, progress=False)
    measured = dis.report["quality"]
    assert measured["fvu"] < 0.3  # type: ignore[index]
    assert measured["per_level_fvu"][0] > measured["fvu"]  # type: ignore[index]


def test_the_first_level_finds_parents_and_a_flat_dictionary_absorbs_them() -> None:
    options = {"vectors": 20_000, "steps": 300, "batch": 256, "rate": 3e-3}
    levels = absorption.run(1, kind=absorption.MATRYOSHKA, **options)  # type: ignore[arg-type]
    flat = absorption.run(1, kind=absorption.FLAT, **options)  # type: ignore[arg-type]
    assert min(levels["cosine"]) > 0.9
    assert mean(levels["fires_with_child"]) > 0.95
    assert mean(flat["fires_with_child"]) < 0.75
    assert max(levels["fires_without_parent"]) < 0.01


def test_thresholds_rows_and_report() -> None:
    x = family(2000, 1)
    for k in (1.5, 3):
        dis = train_vectors(x, replace(QUICK, k=k), progress=False)
        measured = dis.report["quality"]
        assert abs(measured["l0"] - k) < 0.02  # type: ignore[index]
        torch.testing.assert_close(dis.W_dec.norm(dim=1), torch.ones(12))
        assert dis.widths == (4, 12) and dis.report["steps"] == 40


def test_the_scale_of_the_vectors_is_folded_once() -> None:
    x = family(2000, 1)
    small, large = (train_vectors(s * x + s, QUICK, progress=False) for s in (1.0, 256.0))
    torch.testing.assert_close(
        large.encode(256 * x + 256), 256 * small.encode(x + 1), rtol=1e-3, atol=1e-2
    )
    assert quality(large, 256 * x + 256).fvu == pytest.approx(quality(small, x + 1).fvu, rel=1e-3)


def test_the_same_seed_is_the_same_run() -> None:
    x = family(1000, 1)
    before = torch.random.get_rng_state()
    first = train_vectors(x, QUICK, progress=False)
    assert equal(first, train_vectors(x, QUICK, progress=False))
    assert not equal(first, train_vectors(x, replace(QUICK, seed=1), progress=False))
    assert torch.equal(before, torch.random.get_rng_state())


def test_an_interrupted_run_ends_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = family(1000, 1)
    config = replace(QUICK, dead_window=3)
    whole = train_vectors(x, config, progress=False)
    step = sae_lens.SAETrainer.step
    count = 0

    def stopping(self: Any, batch: Tensor) -> Any:
        nonlocal count
        count += 1
        if count == 18:
            raise KeyboardInterrupt
        return step(self, batch)

    monkeypatch.setattr(sae_lens.SAETrainer, "step", stopping)
    with pytest.raises(KeyboardInterrupt):
        train_vectors(x, config, folder=tmp_path, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == [train.CHECKPOINT]
    with pytest.raises(FormatError, match="other options"):
        train_vectors(x, replace(config, k=3), folder=tmp_path, progress=False)
    resumed = train_vectors(x, config, folder=tmp_path, progress=False)
    assert count == 18 + 40 - 16  # checkpoints after every fourth step
    assert equal(resumed, whole)
    assert equal(train_vectors(x, config, folder=tmp_path, progress=False), whole)
    assert count == 18 + 40 - 16  # read, not trained again
    (tmp_path / train.CHECKPOINT).write_bytes(b"x")
    (tmp_path / "cfg.json").unlink()
    with pytest.raises(FormatError, match="damaged"):
        train_vectors(x, config, folder=tmp_path, progress=False)


def test_saved_for_and_read_from_sae_lens(tmp_path: Path) -> None:
    x = family(1000, 1)
    dis = train_vectors(x, QUICK, progress=False)
    theirs = sae_lens.SAE.load_from_disk(str(dis.save_pretrained(tmp_path)))
    with torch.no_grad():
        torch.testing.assert_close(theirs.encode(x), dis.encode(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(theirs(x), dis(x), rtol=1e-5, atol=1e-5)
    back = from_sae_lens(theirs)
    torch.testing.assert_close(back(x), dis(x), rtol=1e-5, atol=1e-5)
    assert back.widths == dis.widths
    topk = replace(dis, k=2, threshold=torch.zeros(12))
    theirs = sae_lens.SAE.load_from_disk(str(topk.save_pretrained(tmp_path / "topk")))
    with torch.no_grad():
        torch.testing.assert_close(theirs(x), topk(x), rtol=1e-5, atol=1e-5)
    assert from_sae_lens(theirs).k == 2


def test_what_their_trainer_saves_is_read_as_they_read_it(tmp_path: Path) -> None:
    x = family(200, 1)
    options = {"d_in": D, "d_sae": 12, "k": 2, "matryoshka_widths": [4, 12]}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        cfg = sae_lens.MatryoshkaBatchTopKTrainingSAEConfig(**options)
        sae = sae_lens.MatryoshkaBatchTopKTrainingSAE(cfg)
    with torch.no_grad():
        sae.W_dec.mul_(torch.linspace(0.5, 2, 12)[:, None])
        sae.topk_threshold.fill_(0.2)
    sae.save_inference_model(str(tmp_path / "inference"))
    sae.save_model(str(tmp_path / "training"))
    theirs = sae_lens.SAE.load_from_disk(str(tmp_path / "inference"))
    for made in (
        Disentangler.from_pretrained(tmp_path / "inference"),
        Disentangler.from_pretrained(tmp_path / "training"),
        from_sae_lens(sae),
    ):
        with torch.no_grad():
            torch.testing.assert_close(made.encode(x), theirs.encode(x), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(made(x), theirs(x), rtol=1e-5, atol=1e-5)
        assert made.widths == (4, 12)


def test_several_sites_of_a_model(tmp_path: Path) -> None:
    texts = [" ".join(f"w{i * j % 50}" for j in range(1, 20)) for i in range(40)]
    options = {"widths": [8, 64], "k": 4, "tokens": 30 * 64, "batch_size": 64, "progress": False}
    model, tokenizer = tiny("llama"), TinyTokenizer()
    made = train_matryoshka(
        model,
        tokenizer,
        texts,
        sites=["mlp.0", "residual.1"],
        cache_dir=tmp_path,
        **options,  # type: ignore[arg-type]
    )
    assert isinstance(made, dict) and set(made) == {"mlp.0", "residual.1"}
    assert made["mlp.0"].for_model(model).site == "mlp.0"
    one = train_matryoshka(model, tokenizer, texts, sites=["mlp.0"], **options)  # type: ignore[arg-type]
    assert isinstance(one, Disentangler)
    assert equal(one, made["mlp.0"])
    back = Disentangler.from_pretrained(tmp_path / "mlp.0")
    assert equal(back, made["mlp.0"]) and back.report == made["mlp.0"].report


def test_open_options_follow_from_the_vectors() -> None:
    config = TrainConfig(widths=(8, 64))
    for vectors, size, steps in (
        (10_000, 256, 1000),
        (300_000, 512, 1000),
        (10_000_000, 4096, 2441),
    ):
        made = config.resolved(vectors)
        assert (made.batch_size, made.steps) == (size, steps)
        assert 20 <= (made.dead_window or 0) <= made.steps / 5
    assert config.resolved(100).batch_size == 100
    for options in (
        {"widths": ()}, {"widths": (4, 4)}, {"widths": (8,), "k": 8}, {"widths": (8,), "k": 2, "tokens": 0},
        {"widths": (8,), "k": 2, "learning_rate": 0.0},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="must"):
            TrainConfig(**options)  # type: ignore[arg-type]


def test_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="zero"):
        train_vectors(torch.zeros(100, 4), QUICK, progress=False)
    monkeypatch.setitem(sys.modules, "sae_lens", None)
    with pytest.raises(ImportError, match=r"deconcept\[sae\]"):
        train_matryoshka(tiny("llama"), TinyTokenizer(), ["a b c"], sites=["mlp.0"])


@pytest.mark.slow
def test_the_toy_experiment_at_full_length() -> None:
    for seed in (1, 3):
        levels = absorption.run(seed, kind=absorption.MATRYOSHKA)
        flat = absorption.run(seed, kind=absorption.FLAT)
        assert min(levels["cosine"]) > 0.9
        assert min(levels["fires_with_child"]) > 0.95
        assert mean(flat["fires_with_child"]) < 0.75
