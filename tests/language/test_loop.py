from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from concept_erasure.errors import EditError, FormatError
from concept_erasure.language import _state, loop
from concept_erasure.language._state import STATE_FILE
from concept_erasure.language.batches import Batches, Encoded, activations_at, encode, logits_at
from concept_erasure.language.loop import Training, learning_rate_at, train
from concept_erasure.language.objective import Anchor, Term, nll
from concept_erasure.language.parameters import Lora, Raw, trainable
from concept_erasure.sites import fingerprint
from tests.models import TinyTokenizer, tiny

TEXTS = [" ".join(f"w{(i * j + i) % 23}" for j in range(2 + 3 * (i % 4))) for i in range(8)]
LORA = Lora(rank=2, layers=(1,))
QUICK = Training(steps=6, learning_rate=1e-2, log_every=1, progress=False)


def loss(model, batch):
    return nll(logits_at(model, batch).float().log_softmax(-1), batch.tokens).sum()


def of_sequences(model, batch):
    return (
        batch.per_sequence(nll(logits_at(model, batch).log_softmax(-1), batch.tokens))
        .square()
        .sum()
    )


def batches(size=2, seed=0, texts=TEXTS):
    return Batches(encode(TinyTokenizer(), texts, max_length=40), size, seed=seed, pad_id=0)


def terms(size=2):
    return [
        Term("retain", 1.0, batches(size), loss),
        Term("forget", -0.1, batches(size, seed=1, texts=TEXTS[:5]), of_sequences, "sequences"),
    ]


def run(training=QUICK, *, spec=LORA, model=None, terms=None, **options):
    model = tiny("llama") if model is None else model
    made = globals()["terms"]() if terms is None else terms
    with trainable(model, spec, seed=0) as parameterisation:
        history = train(model, parameterisation, made, training, **options)
        return history, parameterisation.state()


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def close(one, other, atol=2e-6):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=atol)


def test_the_loss_falls_and_the_same_seed_gives_the_same_bits():
    training = replace(QUICK, steps=12, batch_size=8)
    history, state = run(training, terms=[Term("retain", 1.0, batches(8), loss)])
    again, same = run(training, terms=[Term("retain", 1.0, batches(8), loss)])
    assert history[-1]["retain"] < 0.8 * history[0]["retain"]
    assert history == again and equal(state, same)


class Fixed(Batches):
    """Texts in their own order, so that micro-batches cut a batch into pieces."""

    def _plan(self, epoch):
        rows = range(len(self.texts))
        return [list(rows[k : k + self.batch_size]) for k in rows[:: self.batch_size]]


def fixed(size):
    return [
        Term("retain", 1.0, Fixed(batches().texts, size, seed=0, pad_id=0), loss),
        Term(
            "forget",
            -0.1,
            Fixed(batches().texts, size, seed=0, pad_id=0),
            of_sequences,
            "sequences",
        ),
    ]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_accumulating_micro_batches_of_unequal_length_is_one_large_batch(optimizer):
    whole, one = run(terms=fixed(8), optimizer=optimizer)
    parts, other = run(replace(QUICK, accumulate=4), terms=fixed(2), optimizer=optimizer)
    close(one, other)
    for row, part in zip(whole, parts, strict=True):
        assert part["retain"] == pytest.approx(row["retain"], rel=1e-4)
        assert part["forget"] == pytest.approx(row["forget"], rel=1e-4)


def test_the_last_incomplete_group_is_divided_by_what_is_in_it():
    terms = [Term("retain", 1.0, Fixed(batches().texts[:3], 2, seed=0, pad_id=0), loss)]
    whole = [Term("retain", 1.0, Fixed(batches().texts[:3], 3, seed=0, pad_id=0), loss)]
    _, one = run(replace(QUICK, steps=1), terms=whole)
    _, other = run(replace(QUICK, steps=1, accumulate=2), terms=terms)
    close(one, other)


def test_every_step_counts():
    with trainable(model := tiny("llama"), LORA, seed=0) as p:
        states = []
        for steps in (0, 1, 2, 3):
            p.load_state(trainable(model, LORA, seed=0).state())
            train(model, p, terms(), replace(QUICK, steps=steps))
            states.append(p.state())
    assert equal(states[0], trainable(model, LORA, seed=0).state())
    assert not any(equal(a, b) for a, b in itertools.pairwise(states))


class Killed(BaseException):
    pass


def interrupted(training, at, spec=LORA, **options):
    """Run until a step's loss is asked for the n-th time, then stop as a kill would."""
    seen = []

    def dies(model, batch):
        seen.append(0)
        if len(seen) > at:
            raise Killed
        return loss(model, batch)

    made = [Term("retain", 1.0, batches(), dies), terms()[1]]
    with pytest.raises(Killed):
        run(training, spec=spec, terms=made, **options)


@pytest.mark.parametrize("at", [0, 3, 4, 7])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_an_interrupted_run_resumes_to_the_same_bits(tmp_path, at, optimizer):
    spec = replace(LORA, dropout=0.3)
    training = replace(QUICK, steps=8, save_every=2, schedule="cosine", warmup=2, log_every=3)
    options = {"spec": spec, "optimizer": optimizer, "anchor": Anchor(weight=0.5)}
    want, state = run(training, **options)
    kept = replace(training, checkpoint=str(tmp_path / "run"))
    interrupted(kept, at, **options)
    got, resumed = run(kept, **options)
    assert equal(state, resumed) and got == want
    # finished: nothing more is trained
    got, resumed = run(kept, **options, terms=[Term("retain", 1.0, batches(), dead), terms()[1]])
    assert equal(state, resumed) and got == want


def dead(model, batch):
    raise AssertionError("a finished run must not train")


def _killed_while_saving(_: int, folder: str) -> None:
    torch.set_num_threads(1)
    saves = []

    def half(tensors, path, metadata=None):
        save_file(tensors, path, metadata=metadata)
        saves.append(path)
        if len(saves) == 3:
            whole = Path(path).read_bytes()
            Path(path).write_bytes(whole[: len(whole) // 2])
            os.kill(os.getpid(), signal.SIGKILL)

    _state.save_file = half
    run(replace(QUICK, steps=8, save_every=2, checkpoint=folder))


def test_a_kill_in_the_middle_of_saving_loses_nothing_before_it(tmp_path):
    training = replace(QUICK, steps=8, save_every=2)
    want, state = run(training)
    with pytest.raises(mp.ProcessExitedException, match="SIGKILL"):
        mp.start_processes(_killed_while_saving, (str(tmp_path),), nprocs=1, start_method="fork")
    assert len(list(tmp_path.iterdir())) == 2  # the last whole state, and half of the next
    got, resumed = run(replace(training, checkpoint=str(tmp_path)))
    assert equal(state, resumed) and got == want
    assert [path.name for path in tmp_path.iterdir()] == [STATE_FILE]


def test_a_full_disk_is_an_error_that_leaves_the_last_state(tmp_path, monkeypatch):
    kept = replace(QUICK, steps=8, save_every=2, checkpoint=str(tmp_path))
    interrupted(kept, 5)
    before = (tmp_path / STATE_FILE).read_bytes()

    def full(tensors, path, metadata=None):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_state, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        run(kept)
    assert (tmp_path / STATE_FILE).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [STATE_FILE]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"training": replace(QUICK, learning_rate=2e-2)}, "its learning_rate is 0.01"),
        ({"spec": replace(LORA, alpha=3.0)}, "its parameters is"),
        ({"terms": [Term("retain", 1.0, batches(texts=TEXTS[1:]), loss)]}, "its terms is"),
        ({"model": tiny("llama", seed=1)}, "its weights is"),
        ({"options": {"eta": 2}}, "its options is"),
        ({"optimizer": "sgd"}, "its optimizer is 'AdamW'"),
        ({"anchor": Anchor(weight=1.0)}, "its anchor is None"),
    ],
)
def test_the_state_of_another_run_is_refused(tmp_path, change, message):
    run(replace(QUICK, checkpoint=str(tmp_path)))
    change = {"training": QUICK, **change}
    change["training"] = replace(change["training"], checkpoint=str(tmp_path))
    with pytest.raises(FormatError, match=message):
        run(**change)


def test_how_a_run_is_watched_may_differ_when_it_resumes(tmp_path):
    training = replace(QUICK, checkpoint=str(tmp_path), save_every=2)
    interrupted(training, 3)
    _, state = run(replace(training, save_every=3, log_every=4))
    assert equal(state, run()[1])


@pytest.mark.parametrize("content", [b"", b"nonsense" * 9, None])
def test_a_damaged_state_is_an_error_that_says_what_to_do(tmp_path, content):
    training = replace(QUICK, checkpoint=str(tmp_path))
    if content is None:
        save_file({"master.x": torch.zeros(1)}, tmp_path / STATE_FILE)
    else:
        (tmp_path / STATE_FILE).write_bytes(content)
    with pytest.raises(FormatError, match="delete it to start again"):
        run(training)


def test_a_run_without_a_gradient_moves_nothing():
    with trainable(model := tiny("llama"), Raw(patterns=("*.1.mlp.*",)), seed=0) as p:
        start = p.state()
        zero = [Term("forget", 1.0, batches(), lambda m, b: 0 * loss(m, b))]
        train(model, p, zero, QUICK)
        assert equal(p.state(), start)
        train(model, p, zero, replace(QUICK, weight_decay=0.1))
        assert not equal(p.state(), start)  # decay pulls to zero, not to the start


@pytest.mark.parametrize("spec", [LORA, Raw(patterns=("*.1.mlp.*",))])
def test_the_outside_anchor_is_exactly_a_pull_after_the_step(spec):
    rho = 3.0
    with trainable(model := tiny("llama"), spec, seed=0) as p:
        train(model, p, terms(), replace(QUICK, steps=3))
        after = p.state()
        distance = float(p.squared_distance().detach())
    with trainable(model, spec, seed=0) as p:
        train(model, p, terms(), replace(QUICK, steps=3), anchor=Anchor(weight=0.0))
        assert equal(p.state(), after)
    with trainable(model, spec, seed=0) as p:
        train(model, p, terms(), replace(QUICK, steps=3), anchor=Anchor(weight=rho))
        assert float(p.squared_distance().detach()) < distance
    with trainable(model, spec, seed=0) as p:
        train(model, p, terms(), replace(QUICK, steps=1))
        p.pull(QUICK.learning_rate * rho)
        want = p.state()
    with trainable(model, spec, seed=0) as p:
        train(model, p, terms(), replace(QUICK, steps=1), anchor=Anchor(weight=rho))
        assert equal(p.state(), want)


def test_the_inside_anchor_adds_the_gradient_of_the_distance():
    spec, rho = Raw(patterns=("*.1.mlp.down_proj.weight",)), 5.0
    training = replace(QUICK, steps=2, clip=None, learning_rate=0.1)
    with trainable(model := tiny("llama"), spec, seed=0) as p:
        start = p.state()
        one_step = replace(training, steps=1)
        train(model, p, terms(), one_step, optimizer="sgd")
        first = p.state()
        name = next(iter(first))
    with trainable(model, spec, seed=0) as p:
        train(model, p, terms(), training, optimizer="sgd")
        free = p.state()[name]
    with trainable(model, spec, seed=0) as p:
        train(model, p, terms(), training, optimizer="sgd", anchor=Anchor(weight=rho, inside=True))
        held = p.state()[name]
    # at the start the anchor has no gradient; in the second step it is rho (theta_1 - theta_0)
    pull = 0.1 * rho * (first[name] - start[name])
    torch.testing.assert_close(held, free - pull, rtol=0, atol=1e-6)


def test_clipping_bounds_the_step_and_the_norm_logged_is_before_it():
    training = replace(QUICK, steps=1, clip=1e-3, learning_rate=1.0)
    history, state = run(training, optimizer="sgd", spec=Raw(patterns=("*.1.mlp.*",)))
    start = trainable(tiny("llama"), Raw(patterns=("*.1.mlp.*",)), seed=0).state()
    moved = sum(float((state[n] - start[n]).square().sum()) for n in state) ** 0.5
    assert moved == pytest.approx(1e-3, rel=1e-3)
    assert history[0]["grad_norm"] > 0.1


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_learning_rates(schedule):
    training = Training(steps=100, learning_rate=2.0, warmup=10, schedule=schedule)
    rates = [learning_rate_at(training, step) for step in range(100)]
    assert max(rates) == pytest.approx(2.0)
    assert all(a < b for a, b in itertools.pairwise(rates[:11]))
    assert rates[10] == pytest.approx(2.0)
    falling = rates[10:]
    if schedule == "constant":
        assert set(falling) == {2.0}
    else:
        assert all(a > b for a, b in itertools.pairwise(falling))
        assert 0 < rates[-1] < 0.05
    assert learning_rate_at(replace(training, warmup=0), 0) == 2.0


def test_bfloat16_is_autocast_over_float32_masters():
    seen = []

    def watched(model, batch):
        logits = logits_at(model, batch)
        seen.append(logits.dtype)
        return nll(logits.float().log_softmax(-1), batch.tokens).sum()

    training = replace(QUICK, dtype="bfloat16", steps=8, batch_size=8)
    history, state = run(training, terms=[Term("retain", 1.0, batches(8), watched)])
    assert set(seen) == {torch.bfloat16}
    assert {value.dtype for value in state.values()} == {torch.float32}
    full, _ = run(replace(training, dtype="auto"), terms=[Term("retain", 1.0, batches(8), loss)])
    assert history[-1]["retain"] < history[0]["retain"]
    assert history[-1]["retain"] == pytest.approx(full[-1]["retain"], rel=0.03)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
def test_what_is_computed_again_has_the_same_result_without_dropout_and_costs_as_much_as_it_says(
    kind, monkeypatch
):
    monkeypatch.setattr(loop, "DEAR", 16)  # as narrow as these models are
    model, cost, want = tiny(kind), {}, {}
    if kind == "gpt2":
        assert model.config.resid_pdrop > 0  # would be on in training mode
    flags = [dict(m.__dict__) for m in model.modules()]
    for what in (False, "cheap", True):
        with FlopCounterMode(display=False) as counter:
            _, state = run(replace(QUICK, steps=2, checkpointing=what), model=model)
        want = want or state
        close(want, state)
        cost[what] = counter.get_total_flops()
        assert flags == [m.__dict__ for m in model.modules()]
        assert not any(m._forward_hooks for m in model.modules())
    # narrow keys and values, a LoRA's way up, and where it is not one operation (gemma2) attention
    assert cost[False] <= cost["cheap"] < 1.15 * cost[False]
    assert cost[True] > cost["cheap"] + 0.1 * cost[False]


def test_another_word_for_checkpointing_is_refused():
    with pytest.raises(ValueError, match="checkpointing must be"):
        Training(checkpointing="all")


def test_dear_products_and_attention_are_kept_and_nothing_else():
    aten, ones = torch.ops.aten, torch.ones
    kept = loop._kept
    assert kept(None, aten.mm.default, ones(5, 64), ones(64, 64))
    assert kept(None, aten.addmm.default, ones(128), ones(5, 64), ones(64, 128))
    assert not kept(None, aten.mm.default, ones(5, 64), ones(64, 32))  # narrows
    assert not kept(None, aten.mm.default, ones(5, 16), ones(16, 64))  # up from a LoRA's rank
    assert kept(None, aten._scaled_dot_product_flash_attention_for_cpu.default)
    assert kept(None, aten._scaled_dot_product_efficient_attention.default)
    assert not kept(None, aten.silu.default, ones(5))


@pytest.mark.parametrize("what", ["cheap", True])
def test_checkpointing_draws_the_same_dropout_when_it_computes_again(what):
    spec = replace(LORA, dropout=0.5)
    _, want = run(replace(QUICK, steps=3), spec=spec)
    _, state = run(replace(QUICK, steps=3, checkpointing=what), spec=spec)
    close(want, state)


def test_a_module_that_cannot_checkpoint_says_so():
    model = nn.Sequential(nn.Linear(2, 2))
    term = Term("retain", 1.0, batches(), lambda m, b: m(torch.ones(1, 2)).sum())
    with trainable(model, Raw(patterns=("*",)), seed=0) as p:
        train(model, p, [term], QUICK)
        with pytest.raises(EditError, match="no blocks that can"):
            train(model, p, [term], replace(QUICK, checkpointing=True))


def test_dropout_does_not_touch_the_global_generator():
    state = torch.get_rng_state()
    run(spec=replace(LORA, dropout=0.5))
    assert torch.equal(torch.get_rng_state(), state)


def test_stop_ends_it_and_a_stopped_run_stays_stopped(tmp_path):
    training = replace(QUICK, checkpoint=str(tmp_path))
    rows = []
    history, _ = run(training, stop=lambda step, row: rows.append(row) or step == 2)
    assert [row["step"] for row in history] == [0, 1, 2] == [row["step"] for row in rows]
    again, _ = run(training, terms=[Term("retain", 1.0, batches(), dead), terms()[1]])
    assert again == history


def test_rows_come_every_log_every_steps_and_at_the_end():
    history, _ = run(replace(QUICK, steps=8, log_every=3))
    assert [row["step"] for row in history] == [0, 3, 6, 7]
    assert set(history[0]) == {"step", "learning_rate", "grad_norm", "retain", "forget"}


def test_a_loss_that_is_not_finite_is_an_error():
    bad = [Term("forget", 1.0, batches(), lambda m, b: loss(m, b) * float("nan"))]
    with pytest.raises(FloatingPointError, match=r"is nan at step 0: lower the learning rate"):
        run(terms=bad)


def test_bad_calls_are_refused():
    model = tiny("llama")
    p = trainable(model, LORA, seed=0)
    with pytest.raises(EditError, match="enter the parameterisation"):
        train(model, p, terms(), QUICK)
    with p:
        with pytest.raises(EditError, match="enter the parameterisation"):
            train(tiny("llama"), p, terms(), QUICK)
        with p.reference(), pytest.raises(EditError, match="enter the parameterisation"):
            train(model, p, terms(), QUICK)
        with pytest.raises(ValueError, match="nothing to minimise"):
            train(model, p, [Term("retain", 0.0, batches(), loss)], QUICK)
        with pytest.raises(ValueError, match="different names"):
            train(model, p, [terms()[0], terms()[0]], QUICK)
        with pytest.raises(ValueError, match="'adamw' or 'sgd'"):
            train(model, p, terms(), QUICK, optimizer="lion")


@pytest.mark.parametrize(
    "options",
    [
        {"steps": -1},
        {"steps": 1.5},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"batch_size": 0},
        {"accumulate": 0},
        {"max_length": 2},
        {"clip": 0.0},
        {"weight_decay": -0.1},
        {"warmup": -1},
        {"schedule": "step"},
        {"dtype": "float16"},
        {"save_every": 0},
        {"log_every": True},
    ],
)
def test_training_validates_itself(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Training(**options)


def test_a_state_that_is_not_finite_is_not_saved(tmp_path):
    training = replace(QUICK, steps=9, log_every=9, save_every=2, checkpoint=str(tmp_path))
    seen = []

    def late(model, batch):
        seen.append(0)
        return loss(model, batch) * (1.0 if len(seen) < 4 else float("inf"))

    with pytest.raises(FloatingPointError, match="no longer finite"):
        run(training, terms=[Term("retain", 1.0, batches(), late)])
    tensors = load_file(tmp_path / STATE_FILE)
    assert all(bool(value.isfinite().all()) for value in tensors.values())


def test_texts_that_do_not_fit_the_model_are_refused():
    foreign = Batches(
        [Encoded(torch.tensor([1, 128]), torch.tensor([False, True]))], 1, seed=0, pad_id=0
    )
    with pytest.raises(
        ValueError, match="token 128 is not among the model's 128: give the model's own"
    ):
        run(terms=[Term("retain", 1.0, foreign, loss)])
    ids = torch.ones(65, dtype=torch.int64)
    long = Batches([Encoded(ids, torch.arange(65) > 0)], 1, seed=0, pad_id=0)
    with pytest.raises(ValueError, match="65 tokens; the model has 64 places"):
        run(terms=[Term("retain", 1.0, long, loss)])


WORLD = 2
needs_gloo = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo")


def _in_group(rank: int, folder: str, work: str) -> None:
    torch.set_num_threads(1)
    signal.alarm(60)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD
    )
    try:
        globals()[work](rank, folder)
    finally:
        dist.destroy_process_group()


def in_group(folder, work):
    """Run a function of this file in two processes.

    They are forked: importing everything anew would take longer than all other tests of this file.
    """
    mp.start_processes(_in_group, (str(folder), work.__name__), nprocs=WORLD, start_method="fork")


def _replicas(rank: int, folder: str) -> None:
    history, state = run(replace(QUICK, checkpoint=f"{folder}/run", save_every=2))
    rows = torch.tensor([list(row.values()) for row in history], dtype=torch.float64)
    save_file({**state, "history": rows}, f"{folder}/{rank}.safetensors")


@needs_gloo
def test_two_processes_are_one(tmp_path):
    in_group(tmp_path, _replicas)
    history, state = run(replace(QUICK, accumulate=WORLD))
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(WORLD))
    assert equal(first, second)
    rows = torch.tensor([list(row.values()) for row in history], dtype=torch.float64)
    torch.testing.assert_close(first.pop("history"), rows, rtol=1e-5, atol=1e-7)
    close(first, state)
    assert (tmp_path / "run" / STATE_FILE).is_file()


def _sharded(rank: int, folder: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415
    from torch.distributed.fsdp import fully_shard  # noqa: PLC0415

    model = tiny("llama")
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert fingerprint(model) == fingerprint(tiny("llama"))
    with pytest.raises(EditError, match="is sharded"):
        trainable(model, Raw(patterns=("*.1.mlp.*",)), seed=0)
    _, state = run(model=model)
    with torch.no_grad():
        states = activations_at(model, batches().at(0), "residual.1")
    save_file({**state, "states": states}, f"{folder}/{rank}.safetensors")


@needs_gloo
def test_a_lora_beside_a_sharded_model_is_that_beside_a_whole_one(tmp_path):
    in_group(tmp_path, _sharded)
    model = tiny("llama")
    _, state = run(replace(QUICK, accumulate=WORLD), model=model)
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(WORLD))
    assert equal(first, second)
    with torch.no_grad():
        close({**state, "states": activations_at(model, batches().at(0), "residual.1")}, first)


def _apart(rank: int, folder: str) -> None:
    steps = replace(QUICK, save_every=2, checkpoint=f"{folder}/{rank}")
    if rank == 0:
        steps = replace(steps, checkpoint=f"{folder}/of-zero")
    with pytest.raises(EditError, match=r"different steps \(\[0, 6\]\)"):
        run(steps)


@needs_gloo
def test_processes_that_do_not_share_the_folder_stop(tmp_path):
    in_group(tmp_path, _replicas)
    (tmp_path / "rendezvous").unlink(missing_ok=True)
    (tmp_path / "run").rename(tmp_path / "of-zero")
    in_group(tmp_path, _apart)


def test_wrapped_models_are_refused():
    model = nn.DataParallel(tiny("llama"))
    with pytest.raises(EditError, match=r"wrapped \(DataParallel\); give the model itself"):
        trainable(model, LORA, seed=0)


LAUNCHED = """
import sys
import torch
from safetensors.torch import save_file
from tests.language.test_loop import QUICK, run
_, state = run(QUICK)
rank = torch.distributed.get_rank()
save_file(state, f"{sys.argv[1]}/{rank}.safetensors")
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@needs_gloo
def test_accelerate_joins_launched_processes_that_are_one(tmp_path, root):
    pytest.importorskip("accelerate")
    script = tmp_path / "script.py"
    script.write_text(LAUNCHED)
    launch = "torch.distributed.run --standalone --nproc_per_node 2"
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *launch.split()]
    done = subprocess.run(
        [*command, str(script), str(tmp_path)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    _, state = run(replace(QUICK, accumulate=WORLD))
    for rank in range(WORLD):
        close(load_file(tmp_path / f"{rank}.safetensors"), state)
