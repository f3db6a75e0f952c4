from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from concept_erasure import registry
from concept_erasure.diffusion.core import Pairs, Preserve, metric, solve, solve_layer
from concept_erasure.diffusion.debias import balance
from concept_erasure.diffusion.encode import TextEncoder
from concept_erasure.diffusion.maps import module_at, text_maps
from concept_erasure.diffusion.uce import UceEraser, tensor_residual
from concept_erasure.eraser import Eraser
from concept_erasure.errors import EditError, ShapeError, SpaceError
from tests.diffusion.reference import layers as reference
from tests.diffusion.reference.numbers import layers, read
from tests.diffusion.tiny import latents, tiny_flux, tiny_sd, tiny_sd3, tiny_sdxl

KEEP = ["dog", "cat", "red", "sea"]


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def weights(pipe: object) -> dict[str, Tensor]:
    return {m.name: module_at(pipe, m).weight.detach().clone() for m in text_maps(pipe)}


def state(pipe: object) -> list[Tensor]:
    parts = (getattr(pipe, name, None) for name in ("unet", "transformer", "text_encoder"))
    return [v.clone() for part in parts if part is not None for v in part.state_dict().values()]


def problem(n: int, m: int, seed: int = 0) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    kw = {"generator": g, "dtype": torch.float64}
    mean = 2 * torch.randn(24, **kw)
    maps = [torch.randn(out, 24, **kw) / 5 for out in (8, 24, 40)]
    return maps, *(mean + torch.randn(k, 24, **kw) for k in (n, n, m))


# -- the mathematics ----------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m"), [(1, 0), (3, 7), (30, 60)])
def test_equals_the_paper_layer_by_layer(n: int, m: int) -> None:
    maps, source, target, kept = problem(n, m)
    weight = torch.linspace(0.5, 2, n, dtype=torch.float64)
    keep = torch.linspace(0.1, 1, m, dtype=torch.float64)
    preserve = Preserve(24).update(kept, keep) if m else None
    edit = solve(Pairs(source, target, weight), metric(preserve, width=24, lam=0.5))
    for w in maps:
        expected = reference.uce(w, source, target, weight, kept, keep, 0.5)
        assert relative(w @ edit.matrix, expected) < 1e-8


def test_equals_the_authors_code() -> None:
    numbers, options = read("uce")
    before, after = layers(numbers, "before"), layers(numbers, "after")
    preserve = Preserve(16).update(numbers["preserve"], options["preserve_scale"])
    soft = metric(preserve, width=16, lam=options["lamb"])
    edit = solve(Pairs(numbers["source"], numbers["target"]), soft)
    assert len(before) == 8
    for name, w in before.items():
        assert relative(w @ edit.matrix, after[name]) < 1e-6


def test_tensor_technique_equals_the_authors_code() -> None:
    numbers, options = read("uce_tensor")
    before, after = layers(numbers, "before"), layers(numbers, "after")
    concepts = numbers["source"]
    pairs = Pairs(
        concepts.flatten(0, 1),
        numbers["target"].repeat(len(concepts), 1),
        1.0,
        torch.arange(len(concepts)).repeat_interleave(concepts.shape[1]),
    )
    preserve = Preserve(16).update(numbers["blank"], options["preserve_scale"])
    soft = metric(preserve, width=16, lam=options["lamb"])
    for name, w in before.items():
        up, down = solve_layer(pairs.source, tensor_residual(w, pairs), 1.0, soft)
        assert relative(w + up @ down.T, after[name]) < 1e-6


def test_tensor_residual_is_the_paper_s() -> None:
    maps, source, target, _ = problem(6, 0)
    number = torch.tensor([0, 0, 1, 1, 1, 2])
    for w in maps:
        ours = tensor_residual(w, Pairs(source, target, 1.0, number)) + source @ w.T
        for k in range(3):
            own = number == k
            theirs = reference.tensor_outputs(w, source[own], target[own])
            assert relative(ours[own], theirs) < 1e-12


# -- on pipelines -------------------------------------------------------------------------------


def test_fit_on_a_pipeline_equals_the_reference_and_leaves_it_alone() -> None:
    pipe = tiny_sd(dtype=torch.float64)
    before, old = state(pipe), weights(pipe)
    eraser = UceEraser.fit(pipe, erase=["van gogh", "monet"], anchor="art", preserve=KEEP)
    assert all(torch.equal(a, b) for a, b in zip(before, state(pipe), strict=True))
    encoder = TextEncoder(pipe)
    source = torch.cat(encoder.rows(["van gogh", "monet"], "last_subject"))
    target = torch.cat(encoder.rows(["art", "art"], "last_subject"))
    kept = torch.cat(encoder.rows(KEEP, "last_subject"))
    with eraser.apply(pipe):
        new = weights(pipe)
    for name, w in old.items():
        expected = reference.constrained(w, source, target, kept.T @ kept, 0.5, encoder.blank())
        assert relative(new[name], expected) < 1e-8
    assert all(torch.equal(a, b) for a, b in zip(before, state(pipe), strict=True))


def test_the_first_release_on_a_pipeline() -> None:
    pipe = tiny_sd(dtype=torch.float64)
    old = weights(pipe)
    eraser = UceEraser.fit(
        pipe, erase=["van gogh", "monet"], preserve=KEEP, preset="paper", task="style"
    )
    assert eraser.options.anchors == ("art", "art")
    assert eraser.config.preserve_weight == max(0.1, 1 / 5)  # with the blank prompt
    pairs = TextEncoder(pipe).pairs(["van gogh", "monet"], "art", "from_last_subject")
    kept = TextEncoder(pipe).encode([*KEEP, ""]).embeddings.flatten(0, 1)
    ones = torch.ones(len(pairs), dtype=torch.float64)
    keep = torch.full((len(kept),), 0.2, dtype=torch.float64)
    with eraser.apply(pipe):
        new = weights(pipe)
    for name, w in old.items():
        expected = reference.uce(w, pairs.source, pairs.target, ones, kept, keep, 0.5)
        assert relative(new[name], expected) < 1e-8


def test_what_is_said_wins_over_the_preset() -> None:
    eraser = UceEraser.fit(
        tiny_sd(), erase="van gogh", anchor="person", lam=2.0, preset="paper", task="style"
    )
    assert eraser.options.anchors == ("person",)
    assert eraser.options.lam == 2.0


def test_the_blank_prompt_does_not_move() -> None:
    pipe = tiny_sd()
    plain = latents(pipe, "")
    eraser = UceEraser.fit(pipe, erase="van gogh", preserve=KEEP)
    with eraser.apply(pipe):
        assert relative(latents(pipe, ""), plain) < 1e-6
        assert relative(latents(pipe, "van gogh"), plain) > 1e-3


def test_exact_weights_reach_the_anchor_and_the_certificate_is_there() -> None:
    pipe = tiny_sd()
    eraser = UceEraser.fit(pipe, erase=["van gogh"], anchor="art", erase_weight=float("inf"))
    rows = TextEncoder(pipe).rows(["van gogh", "art"], "last_subject")
    assert relative(eraser.map(rows[0]), rows[1]) < 1e-9
    assert eraser.certificate.names == ("van gogh",)
    assert float(eraser.certificate.rho[0]) < 1e-6  # the anchor is not an invariant: invertible


def test_the_pooled_vector_is_edited_too() -> None:
    pipe = tiny_sdxl(dtype=torch.float64)
    eraser = UceEraser.fit(pipe, erase="monet", anchor="art", preserve=KEEP)
    moved = eraser.pooled_map
    assert moved is not None
    encoder = TextEncoder(pipe)
    old, anchor, blank = encoder.pooled(["monet", "art", ""])
    assert float((moved(old) - anchor).norm()) < float((old - anchor).norm())
    assert relative(moved(blank), blank) < 1e-9
    assert UceEraser.fit(pipe, erase="monet", pooled=False).pooled_map is None


@pytest.mark.parametrize("make", [tiny_sd3, tiny_flux])
def test_joint_attention(make) -> None:  # type: ignore[no-untyped-def]
    pipe = make()
    eraser = UceEraser.fit(pipe, erase="monet", preserve=["dog"], max_sequence_length=16)
    with eraser.apply(pipe) as edit:
        assert len(edit.patches) == 2  # context_embedder and the pooled map


def test_add_and_withdraw_are_fits() -> None:
    pipe = tiny_sd(dtype=torch.float64)
    two = UceEraser.fit(pipe, erase=["van gogh", "monet"], anchor="art", preserve=KEEP)
    one = UceEraser.fit(pipe, erase=["van gogh"], anchor="art", preserve=KEEP)
    assert relative(one.add(pipe, "monet", "art").map.matrix, two.map.matrix) < 1e-9
    assert relative(two.withdraw("monet").map.matrix, one.map.matrix) < 1e-9


def test_expanded_prompts_belong_to_their_concept() -> None:
    pipe = tiny_sd(dtype=torch.float64)
    eraser = UceEraser.fit(pipe, erase=["van gogh", "monet"], expand=True, task="style")
    assert eraser.concept is not None
    assert eraser.concept.bincount().tolist() == [6, 6]
    one = UceEraser.fit(pipe, erase=["van gogh"], expand=True, task="style")
    assert relative(eraser.withdraw("monet").map.matrix, one.map.matrix) < 1e-9
    assert relative(one.add(pipe, "monet", "").map.matrix, eraser.map.matrix) < 1e-9


def test_tensor_technique_on_a_pipeline() -> None:
    pipe = tiny_sd(dtype=torch.float64)
    old = weights(pipe)
    eraser = UceEraser.fit(
        pipe, erase="van gogh", anchor="art", technique="tensor", hold_blank=False, lam=0.5
    )
    encoder = TextEncoder(pipe)
    source, target = (encoder.rows(t, "last_subject")[0] for t in ("van gogh", "art"))
    kept = encoder.rows("", "last_subject")[0]
    one = torch.ones(1, dtype=torch.float64)
    with eraser.apply(pipe):
        new = weights(pipe)
    for name, w in old.items():
        wanted = reference.tensor_outputs(w, source, target)
        expected = reference.uce_outputs(w, source, wanted, one, kept, one, 0.5)
        assert relative(new[name], expected) < 1e-8


def test_saved_and_read(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    target = "concept_erasure.diffusion.uce:UceEraser"
    entry = registry.Method(
        name="uce", family="diffusion", target=target, guarantees=frozenset(), summary="", paper=""
    )
    monkeypatch.setitem(registry.METHODS, "uce", registry.METHODS.get("uce", entry))
    eraser = UceEraser.fit(tiny_sd(), erase="van gogh", anchor="art")
    read_back = UceEraser.from_pretrained(eraser.save_pretrained(tmp_path))
    assert read_back.config == eraser.config
    assert isinstance(read_back, Eraser) and torch.equal(read_back.left, eraser.left)


# -- debiasing ----------------------------------------------------------------------------------


def test_balance_reaches_linear_shares_and_frozen_rows_stand_still() -> None:
    wanted = torch.tensor([[0.5, 0.5], [0.3, 0.7], [0.5, 0.5]], dtype=torch.float64)
    bias = torch.tensor([[0.9, 0.1], [0.1, 0.9], [0.52, 0.48]], dtype=torch.float64)
    seen: list[Tensor] = []

    def measure(alpha: Tensor) -> Tensor:
        seen.append(alpha)
        return bias + 0.6 * alpha

    alpha, error, rounds = balance(measure, wanted, tolerance=0.01 + 0.02)
    assert float(error.abs().max()) < 0.03 and rounds < 30
    assert torch.equal(alpha[2], torch.zeros(2, dtype=torch.float64))
    expected = (wanted - bias) / 0.6
    assert float((alpha[:2] - expected[:2]).abs().max()) < 0.06
    assert torch.equal(seen[0], torch.zeros_like(wanted))


def test_balance_stops_and_says_so() -> None:
    wanted = torch.full((1, 2), 0.5, dtype=torch.float64)
    never = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    alpha, error, rounds = balance(lambda _: never, wanted, rounds=3)
    assert rounds == 3 and float(error.abs().max()) == 0.5
    assert alpha.tolist() == [[-1.0, 1.0]]
    with pytest.raises(ShapeError, match="shares of shape"):
        balance(lambda _: never[0], wanted)
    with pytest.raises(ValueError, match="not a finite number"):
        balance(lambda _: never * float("nan"), wanted)


def test_debias_on_a_pipeline() -> None:
    pipe = tiny_sd(dtype=torch.float64)
    before = state(pipe)
    encoder = TextEncoder(pipe)
    jobs, words = ["artist", "dog"], ["happy", "old"]
    weight = module_at(pipe, text_maps(pipe)[0]).weight
    rows = torch.cat(encoder.rows(jobs, "last_subject"))
    asked: list[list[str]] = []
    first = rows @ weight.detach().T

    probe = torch.stack([(r @ weight.detach().T) for r in encoder.rows(words, "last_subject")])
    probe = torch.linalg.pinv(probe.squeeze(1))

    def measure(edited: object, prompts: list[str]) -> Tensor:
        asked.append(prompts)
        now = module_at(edited, text_maps(edited)[0]).weight.detach()
        share = torch.tensor([[0.8, 0.2], [0.5, 0.5]], dtype=torch.float64)
        return share + 0.5 * ((rows @ now.T - first) @ probe)

    eraser = UceEraser.debias(
        pipe, concepts=jobs, attributes=words, measure=measure, edit_weight=50.0, lam=0.01
    )
    assert all(torch.equal(a, b) for a, b in zip(before, state(pipe), strict=True))
    assert eraser.report["largest_error"] < 0.05
    assert asked[0] == jobs and len(asked) == eraser.report["rounds"]
    amounts = torch.tensor(eraser.report["amounts"])
    assert float(amounts[0, 0]) < 0 < float(amounts[0, 1])
    assert amounts[1].tolist() == [0, 0]
    after = torch.cat(TextEncoder(pipe).rows(jobs, "last_subject"))
    assert torch.equal(after, rows)


def test_nothing_to_debias() -> None:
    with pytest.raises(ValueError, match="nothing to change"):
        UceEraser.debias(
            tiny_sd(),
            concepts=["artist"],
            attributes=["happy", "old"],
            measure=lambda _, names: [[0.5, 0.5]] * len(names),
        )


def test_a_failing_measure_leaves_the_pipeline_alone() -> None:
    pipe = tiny_sd()
    before, calls = state(pipe), []

    def measure(_: object, names: list[str]) -> list[list[float]]:
        calls.append(names)
        if len(calls) == 2:
            raise RuntimeError("no pictures")
        return [[1.0, 0.0]] * len(names)

    with pytest.raises(RuntimeError, match="no pictures"):
        UceEraser.debias(pipe, concepts=["artist"], attributes=["happy", "old"], measure=measure)
    assert all(torch.equal(a, b) for a, b in zip(before, state(pipe), strict=True))


# -- bad input ----------------------------------------------------------------------------------

BAD = [
    ({"erase": []}, ValueError, "erase is empty"),
    ({"erase": ["monet", "Monet "]}, ValueError, "twice"),
    ({"erase": [3]}, TypeError, "must be texts"),
    ({"erase": "  ", "anchor": "art"}, ValueError, "no token at all"),
    ({"erase": ""}, ValueError, "no token at all"),
    ({"erase": "art", "anchor": "Art"}, ValueError, "anchor equal to the concept"),
    ({"erase": "monet", "preserve": ["dog", "MONET"]}, ValueError, "preserve contains"),
    ({"erase": ["monet", "dog"], "anchor": ["a", "b", "c"]}, ShapeError, "as many of anchor"),
    ({"erase": "monet " * 30}, ValueError, "reads 24"),
    ({"erase": "monet", "lam": 0.0, "preserve": ["dog"]}, ValueError, "full rank 32.*rank 1"),
    ({"erase": "monet", "lam": -1.0}, ValueError, "lam must be"),
    ({"erase": "monet", "erase_weight": 0.0}, ValueError, "weights must be positive"),
    (
        {"erase": "monet", "preserve": "dog", "preserve_weight": float("nan")},
        ValueError,
        "finite and not negative",
    ),
    ({"erase": "monet", "rule": "subject"}, ValueError, "token rule"),
    ({"erase": "monet", "technique": "both"}, ValueError, "'replace' or 'tensor'"),
    ({"erase": "monet", "maps": ("query",)}, ValueError, "'key', 'value'"),
    ({"erase": "monet", "preset": "best"}, ValueError, "preset must be"),
    ({"erase": "monet", "preset": "paper"}, ValueError, "object, style, unsafe"),
    ({"erase": "monet", "preset": "paper", "task": "celebrity"}, ValueError, "object, style"),
    ({"erase": "monet", "task": "art"}, ValueError, "task must be one of"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD)
def test_bad_input_is_refused_and_nothing_changes(options, error, message) -> None:  # type: ignore[no-untyped-def]
    pipe = tiny_sd()
    before = state(pipe)
    with pytest.raises(error, match=message):
        UceEraser.fit(pipe, **options)
    assert all(torch.equal(a, b) for a, b in zip(before, state(pipe), strict=True))


def test_bad_pipelines() -> None:
    pipe = tiny_sd()
    eraser = UceEraser.fit(pipe, erase="monet")
    with pytest.raises(SpaceError, match="fitted with the text encoder"):
        eraser.apply(tiny_sd(seed=1))
    broken = tiny_sd()
    with torch.no_grad():
        module_at(broken, text_maps(broken)[2]).weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        UceEraser.fit(broken, erase="monet")
    fused = copy.deepcopy(pipe.unet)
    pipe.unet.fuse_qkv_projections()
    with pytest.raises(EditError, match="fused"):
        UceEraser.fit(pipe, erase="monet")
    pipe.unet = fused
    pipe.unet._compiled_call_impl = pipe.unet._call_impl  # as compile() does
    with pytest.raises(EditError, match="compiled"):
        UceEraser.fit(pipe, erase="monet")
    with pytest.raises(TypeError, match="unet"):
        UceEraser.fit(object(), erase="monet")


def test_preserve_sets_of_another_encoder_are_refused() -> None:
    other = Preserve(32, encoder="another")
    with pytest.raises(SpaceError, match="two text encoders"):
        UceEraser.fit(tiny_sd(), erase="monet", preserve=other)
    with pytest.raises(ShapeError, match="widths differ"):
        UceEraser.fit(tiny_sd(), erase="monet", preserve=Preserve(16))
