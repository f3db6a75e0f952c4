"""FAMR on language models: targets, the anchor on the weights in effect, and certificates of what is applied."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from concept_erasure.concept import Concept
from concept_erasure.errors import EditError, ErasureWarning
from concept_erasure.language._famr_certify import changes, point_logits
from concept_erasure.language._famr_language import (
    LanguageObjective,
    divergence_sum,
    forget_targets,
    retain_targets,
    token_target,
)
from concept_erasure.language.batches import Batches, collate, encode, logits_at
from concept_erasure.language.cache import TargetCache
from concept_erasure.language.contrast import NoSignalError, Reading
from concept_erasure.language.famr import FamrEraser
from concept_erasure.language.loop import Training
from concept_erasure.language.parameters import LEFT, RIGHT, Lora, Raw
from tests.models import TinyTokenizer, tiny

TOKENIZER = TinyTokenizer()
CONCEPT = Concept(name="Zed", entities={"Zed": "Bob", "Quux": "Rome"})
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
FORGET = [f"the man called Zed went to Quux and {word} saw the sea at dawn" for word in WORDS]
RETAIN = [
    f"the {a} house stands near a {b} river in the valley"
    for a, b in zip(
        ["red", "blue", "old", "new", "big", "small", "wide", "thin", "dark", "pale"],
        ["slow", "fast", "cold", "warm", "deep", "long", "loud", "clear", "calm", "wild"],
        strict=True,
    )
]
TRAINING = Training(steps=12, learning_rate=5e-3, batch_size=4, progress=False)
OPTIONS = {
    "forget_texts": FORGET,
    "retain_texts": RETAIN,
    "lora": Lora(rank=4),
    "training": TRAINING,
}


def teach(model: nn.Module, texts: list[str], steps: int) -> nn.Module:
    batches = Batches(encode(TOKENIZER, texts, max_length=40), 9, seed=0, pad_id=0)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(steps):
        batch = batches.at(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits_at(model, batch), batch.tokens).backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """A tiny model that knows where Zed went, and that Bob went to Rome."""
    stand_ins = [CONCEPT.anonymise(text) for text in FORGET]
    return teach(tiny("llama"), FORGET + RETAIN + stand_ins, 80)


@pytest.fixture(scope="module")
def fitted(model: nn.Module) -> FamrEraser:
    return FamrEraser.fit(model, TOKENIZER, CONCEPT, rho=1.0, lanczos_steps=2, **OPTIONS)  # type: ignore[arg-type]


def fit(model: nn.Module, **changes: object) -> FamrEraser:
    options = {"rho": 1.0, **OPTIONS, **changes}
    return FamrEraser.fit(model, TOKENIZER, CONCEPT, **options)  # type: ignore[arg-type]


def reading(seed: int = 0, n: int = 6, v: int = 30) -> Reading:
    draw = torch.Generator().manual_seed(seed)
    lp = [(2 * torch.randn(n, v, generator=draw)).log_softmax(1) for _ in range(3)]
    tokens = torch.randint(v, (n,), generator=draw)
    return Reading(*lp, tokens, torch.zeros(n).long(), torch.arange(1, n + 1))


def dense(top: object, v: int = 30) -> Tensor:
    assert hasattr(top, "indices")
    rows: Tensor = torch.zeros(len(top.indices), v).scatter(  # type: ignore[attr-defined]
        1,
        top.indices.long(),  # type: ignore[attr-defined]
        top.log_probs.exp(),  # type: ignore[attr-defined]
    )
    return rows


def test_token_targets_are_distributions_of_their_kind() -> None:
    one = reading()
    uniform = dense(token_target("uniform", one, top_k=5, given=None))
    assert bool(((uniform > 0).sum(1) == 5).all())
    torch.testing.assert_close(uniform.sum(1), torch.ones(6))
    torch.testing.assert_close(uniform.max(1).values, torch.full((6,), 0.2))
    rest = token_target("renormalised", one, top_k=30, given=None)
    expected = one.lp0.exp().scatter(1, one.tokens[:, None], 0.0)
    torch.testing.assert_close(dense(rest), expected / expected.sum(1, keepdim=True))
    few = token_target("renormalised", one, top_k=4, given=None)
    torch.testing.assert_close(dense(few).sum(1) + few.tail.exp(), torch.ones(6))
    flat = torch.full((6, 30), -math.log(30))
    own = token_target(
        "given", one, top_k=30, given=lambda lp0, tokens: torch.full_like(lp0, -math.log(30))
    )
    torch.testing.assert_close(dense(own), flat.exp())
    elm = token_target("elm", one, top_k=20, given=None)
    torch.testing.assert_close(dense(elm).sum(1), torch.ones(6))
    with pytest.raises(ValueError, match="sum 1"):
        token_target("given", one, top_k=3, given=lambda lp0, tokens: lp0 + 1)


def cache(model: nn.Module, **options: object) -> TargetCache:
    values = {
        "target": "uniform",
        "positions": "all",
        "source": None,
        "given": None,
        "top_k": 5,
        "max_length": 40,
        "batch_size": 4,
        "seed": 0,
        "folder": None,
        "progress": False,
    }
    concept = options.pop("concept", CONCEPT)
    return forget_targets(model, TOKENIZER, concept, FORGET, **{**values, **options})  # type: ignore[arg-type]


def test_only_positions_with_contrast_are_forgotten(model: nn.Module) -> None:
    every, some = cache(model), cache(model, positions="contrast", source="anonymise")
    assert every.positions == sum(text.count for text in encode(TOKENIZER, FORGET, max_length=40))
    assert 0 < some.positions < every.positions / 2
    quux = TOKENIZER.convert_tokens_to_ids("Quux")
    said = torch.cat([text.ids[text.supervised] for text in some.texts])
    assert float((said == quux).double().mean()) > 0.5  # where Zed went is what is known
    assert bool((some.column("weights") >= 0.5).all())
    nobody = Concept(name="Nobody", entities={"Nobody": "Someone"})
    with pytest.raises(ValueError, match="there is nothing to forget"):
        cache(model, concept=nobody, positions="contrast", source="anonymise")


def objective(model: nn.Module, size: int = 3) -> LanguageObjective:
    kept = retain_targets(
        model,
        encode(TOKENIZER, RETAIN, max_length=40),
        batch_size=4,
        pad=0,
        folder=None,
        progress=False,
    )
    forget = cache(model)
    return LanguageObjective(
        model, forget, kept, 2.0, range(len(forget)), range(len(kept)), size, 0
    )


def test_the_objective_is_what_its_docstring_says(model: nn.Module) -> None:
    goal = objective(model)
    g, f = goal.values()
    batch = collate(goal.forget.texts, list(range(len(goal.forget))), pad_id=0)
    with torch.no_grad():
        log_q = logits_at(model, batch).log_softmax(1)
        top, _ = goal.forget.at(batch)
        by_hand = (-math.log(5) - log_q.gather(1, top.indices.long())).mean(1).mean()
    assert f == pytest.approx(float(by_hand), rel=1e-5)
    assert g == pytest.approx(f, abs=1e-4)  # the retain term is zero at the start
    assert objective(model, size=8).values() == pytest.approx((g, f), rel=1e-5)


def test_gradient_and_hessian_are_those_of_finite_differences(model: nn.Module) -> None:
    goal = objective(model)
    name = "model.layers.1.mlp.down_proj.weight"
    flags = [p.requires_grad for p in model.parameters()]
    gradient = goal.gradient([name])[name]
    product = goal.hessian_product([name])
    assert [p.requires_grad for p in model.parameters()] == flags
    weight = model.get_parameter(name)
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    direction = direction / direction.norm()
    step, found = 1e-2, {}
    for sign in (-1, 1):
        with torch.no_grad():
            weight.add_(sign * step * direction)
        found[sign] = (goal.values()[0], goal.gradient([name])[name])
        with torch.no_grad():
            weight.sub_(sign * step * direction)
    slope = (found[1][0] - found[-1][0]) / (2 * step)
    assert float((gradient * direction).sum()) == pytest.approx(slope, rel=0.02)
    curve = (found[1][1] - found[-1][1]) / (2 * step)
    measured = product(direction.reshape(-1)).view_as(weight)
    assert float((measured - curve).norm() / curve.norm()) < 0.05


def test_the_fit_lowers_j_and_is_certified(model: nn.Module, fitted: FamrEraser) -> None:
    found, report = fitted.certificate, fitted.report
    assert found.violations() == ()
    assert found.lowered
    assert found.forget_end < 0.5 * found.forget_start
    assert found.influence is not None
    assert found.outputs is not None
    assert found.outputs.n == 2  # a fifth of ten texts, one position each
    assert found.outputs.independent
    assert report["token_log_prob_after"] < report["token_log_prob_before"]  # type: ignore[operator]
    assert {"token_accuracy_before", "token_accuracy_after", "signal"} <= set(report)
    assert fitted.config.contrast == "anonymise"  # type: ignore[attr-defined]


def test_what_is_certified_is_what_is_applied(model: nn.Module, fitted: FamrEraser) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with fitted.apply(model):
        moved = torch.cat(
            [(v - before[n]).flatten().double() for n, v in model.state_dict().items()]
        ).norm()
    assert float(moved) == pytest.approx(fitted.certificate.distance, rel=1e-4)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    path = fitted.modules[0]
    update = fitted.weights[path + LEFT] @ fitted.weights[path + RIGHT].T
    norm = float(torch.linalg.matrix_norm(update, ord=2))
    assert fitted.certificate.spectral[f"{path}.weight"] == pytest.approx(norm, rel=1e-4)


def test_the_anchor_holds_the_update_and_not_its_factors(model: nn.Module) -> None:
    """Anchoring A would pull its random start to zero; here only the product counts."""
    free, tied = (fit(model, rho=rho, target="uniform", inside=True) for rho in (1e-3, 1e3))
    assert tied.certificate.distance < 0.2 * free.certificate.distance
    path = tied.modules[0]
    assert float(tied.weights[path + RIGHT].norm()) > 0.5 * float(free.weights[path + RIGHT].norm())


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("rho", [0.1, 1e3])
def test_a_fit_is_halved_until_j_is_not_above_its_start(
    model: nn.Module, rho: float, inside: bool
) -> None:
    made = fit(
        model, rho=rho, inside=inside, target="renormalised", training=replace(TRAINING, steps=4)
    )
    found = made.certificate
    assert found.violations() == ()
    assert 0 < made.report["scaled_by"] <= 1  # type: ignore[operator]
    assert found.lowered


def test_when_j_rises_it_is_said(model: nn.Module) -> None:
    wild = replace(TRAINING, steps=3, learning_rate=0.05)
    options = {"training": wild, "lora": None, "raw": Raw(patterns=("*down_proj*",))}
    with pytest.warns(ErasureWarning, match="C1 and C3 do not apply"):
        made = fit(model, rho=1e4, inside=True, **options)
    assert made.certificate.level_set is None
    assert made.certificate.violations() == ()


def test_raw_parameters_are_certified_too(model: nn.Module) -> None:
    made = fit(model, lora=None, raw=Raw(patterns=("*.1.mlp.*",)), retain_weight=0.5)
    assert made.modules == ()
    found = made.certificate
    assert found.violations() == ()
    original = {n: p.detach() for n, p in model.named_parameters()}
    assert changes(made, original)[0] == pytest.approx(found.distance)


@pytest.mark.parametrize("kind", ["gpt2", "gemma3", "qwen2"])
def test_other_architectures(kind: str) -> None:
    other = tiny(kind)
    made = FamrEraser.fit(
        other,
        TOKENIZER,
        CONCEPT,
        target="uniform",
        positions="all",
        rho=0.1,
        **{**OPTIONS, "training": replace(TRAINING, steps=4)},  # type: ignore[arg-type]
    )
    assert made.certificate.violations() == ()
    assert made.certificate.distance > 0
    assert "signal" not in made.report  # no contrast was used, so none was asked for


def test_auto_rho_is_its_rule(model: nn.Module) -> None:
    made = fit(
        model, rho="auto", target="uniform", positions="all", training=replace(TRAINING, steps=1)
    )
    names = [f"{path}.weight" for path in made.modules]
    every = [model.get_parameter(name) for name in names]
    batch = collate(encode(TOKENIZER, FORGET, max_length=40), list(range(len(FORGET))), pad_id=0)
    log_q = logits_at(model, batch).log_softmax(1)
    best = log_q.detach().topk(20).indices
    parts = torch.autograd.grad(-log_q.gather(1, best).mean(), every)
    size = math.sqrt(sum(float(g.square().sum()) for g in parts))
    scale = math.sqrt(sum(float(p.detach().square().sum()) for p in every))
    assert made.certificate.rho == pytest.approx(size / (0.3 * scale), rel=1e-3)


def test_the_same_seed_gives_the_same_bits(model: nn.Module, tmp_path: Path) -> None:
    short = replace(TRAINING, steps=3)
    one = fit(model, training=short)
    two = fit(model, training=short, cache_dir=tmp_path)
    three = fit(model, training=short, cache_dir=tmp_path)  # from the cache
    assert one.digest == two.digest == three.digest
    assert {path.name for path in tmp_path.iterdir()} == {"famr_forget", "famr_retain"}


def test_one_point_of_each_text_is_drawn(model: nn.Module) -> None:
    texts = encode(TOKENIZER, RETAIN, max_length=40)
    found = point_logits(model, texts, batch_size=3, pad=0, seed=1)
    assert found.shape == (len(RETAIN), 128)
    assert torch.equal(found, point_logits(model, texts, batch_size=3, pad=0, seed=1))
    assert not torch.equal(found, point_logits(model, texts, batch_size=3, pad=0, seed=2))


def test_divergence_counts_weights(model: nn.Module) -> None:
    some = cache(model, positions="contrast", source="anonymise")
    batch = collate(some.texts, [0, 1], pad_id=0)
    top, weights = some.at(batch)
    with torch.no_grad():
        each = top.kl(logits_at(model, batch).log_softmax(1))
        total = divergence_sum(model, batch, some)
    assert float(total) == pytest.approx(float((weights * each).sum()), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "others"}, "target must be one of"),
        ({"positions": "some"}, "positions must be"),
        ({"contrast": "weak"}, "contrast must be one of auto, persona, anonymise"),
        ({"target": "given"}, "go together"),
        ({"given": lambda lp0, tokens: lp0}, "go together"),
        ({"rho": -1.0}, "rho must be positive"),
        ({"retain_weight": -1.0}, "retain_weight"),
        ({"top_k": 1}, "top_k must be at least 2"),
        ({"preset": "authors"}, "preset must be one of"),
        ({"retain_texts": RETAIN[:1]}, "held out"),
        ({"training": replace(TRAINING, weight_decay=0.1)}, "not towards the start"),
        ({"raw": Raw(patterns=("*",))}, "not both"),
    ],
)
def test_bad_options_are_refused(
    model: nn.Module, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        fit(model, **options)


def test_a_model_that_does_not_know_is_refused_with_the_number() -> None:
    with pytest.raises(NoSignalError, match="at least 0.5"):
        fit(tiny("llama", seed=3))


def test_an_edit_in_force_is_refused(model: nn.Module, fitted: FamrEraser) -> None:
    with fitted.apply(model), pytest.raises(EditError, match="in force"):
        fit(model)


def test_the_paper_preset_is_its_objective_over_tokens(model: nn.Module) -> None:
    made = fit(model, preset="paper", training=replace(TRAINING, steps=3))
    config = made.config
    assert (config.target, config.positions, config.retain_weight) == ("uniform", "all", 0.0)  # type: ignore[attr-defined]
    found = made.certificate
    assert found.start == pytest.approx(found.forget_start)  # G is F alone
    assert found.outputs is not None
    assert found.outputs.n == len(RETAIN)  # none was seen by the fit
    with pytest.raises(ValueError, match="preset"):
        FamrEraser.default_training("authors")  # type: ignore[arg-type]
