from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from concept_erasure.errors import EditError, SiteNotFoundError
from concept_erasure.language.batches import collate, encode, logits_at
from concept_erasure.language.objective import nll
from concept_erasure.language.parameters import Lora, Raw, trainable
from tests.models import KINDS, TinyTokenizer, tiny

CAUSAL = tuple(kind for kind in KINDS if kind != "bert")
DOWN = Raw(patterns=("*.[12].mlp.down_proj.weight",))
SPECS = (Lora(rank=3, alpha=6.0), DOWN)


def a_batch():
    texts = encode(TinyTokenizer(), ["a b c d", "e f g h i j", "k l"], max_length=20)
    return collate(texts, [0, 1, 2], pad_id=0)


def loss(model, batch):
    return nll(logits_at(model, batch).float().log_softmax(-1), batch.tokens).sum()


def push(parameterisation, model, steps=2):
    """Train a little, far enough to matter."""
    optimizer = torch.optim.SGD(parameterisation.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model, a_batch()).backward()
        optimizer.step()


def snapshot(model):
    return (
        {name: value.clone() for name, value in model.state_dict().items()},
        [(name, id(p), p.requires_grad, p.grad) for name, p in model.named_parameters()],
        [(name, id(m), type(m), m.training) for name, m in model.named_modules()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
    )


def same(one, other):
    assert one[1:] == other[1:]
    assert one[0].keys() == other[0].keys()
    assert all(torch.equal(one[0][name], other[0][name]) for name in one[0])


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("kind", CAUSAL)
def test_the_start_is_exactly_the_model_and_so_is_the_reference(kind, spec):
    if isinstance(spec, Raw):
        spec = Raw(patterns=("*.1.*",))
    model, batch = tiny(kind), a_batch()
    want = logits_at(model, batch)
    with trainable(model, spec, seed=0) as parameterisation:
        assert torch.equal(logits_at(model, batch), want)
        push(parameterisation, model)
        assert not torch.equal(logits_at(model, batch), want)
        with parameterisation.reference():
            assert torch.equal(logits_at(model, batch), want)
            assert not parameterisation.active
        assert not torch.equal(logits_at(model, batch), want)
    assert torch.equal(logits_at(model, batch), want)


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("spec", SPECS)
def test_the_model_is_left_as_it_was(spec, error):
    model = tiny("llama")
    model.train()
    model.model.layers[1].eval()
    model.model.norm.weight.requires_grad_(False)
    before = snapshot(model)
    try:
        with trainable(model, spec, seed=0) as parameterisation:
            assert not any(p.requires_grad for p in model.parameters() if p.is_leaf) or spec is DOWN
            assert not any(m.training for m in model.modules())
            push(parameterisation, model)
            if error is not None:
                with parameterisation.reference():
                    raise error
    except BaseException as raised:
        assert error is not None and isinstance(raised, error)
    same(before, snapshot(model))


def test_entering_that_fails_leaves_the_model_as_it_was(monkeypatch):
    model = tiny("llama").train()
    before = snapshot(model)
    parameterisation = trainable(model, Lora(), seed=0)
    real, calls = nn.Linear.register_forward_hook, []

    def fails(self, hook):
        calls.append(0)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, hook)

    monkeypatch.setattr(nn.Linear, "register_forward_hook", fails)
    with pytest.raises(KeyboardInterrupt), parameterisation:
        pass
    same(before, snapshot(model))
    with pytest.raises(EditError, match="entered once"), parameterisation:
        pass


def test_a_lora_leaves_modules_and_state_dict_alone_while_it_trains():
    model = tiny("llama")
    names, kinds = list(model.state_dict()), [type(m) for m in model.modules()]
    with trainable(model, Lora(), seed=0):
        assert list(model.state_dict()) == names
        assert [type(m) for m in model.modules()] == kinds


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox"])
def test_gradients_are_those_of_pefts_lora(kind):
    peft = pytest.importorskip("peft")
    model, spec = tiny(kind), Lora(rank=3, alpha=12.0, layers=(0, 2))
    other = copy.deepcopy(model)
    ours = trainable(model, spec, seed=1)
    with torch.no_grad():
        for k, value in enumerate(ours.named.values()):
            value.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(k)) / 9)
    config = peft.LoraConfig(
        r=3, lora_alpha=12, target_modules=list(ours.paths), fan_in_fan_out=kind == "gpt2"
    )
    theirs = dict(peft.get_peft_model(other, config).named_parameters())
    pairs = [
        (value, theirs[f"base_model.model.{name.replace('.weight', '.default.weight')}"])
        for name, value in ours.named.items()
    ]
    with torch.no_grad():
        for value, their in pairs:
            their.copy_(value)
    with ours:
        one = loss(model, a_batch())
        one.backward()
    two = loss(other, a_batch())
    two.backward()
    torch.testing.assert_close(one, two)
    for value, their in pairs:
        torch.testing.assert_close(value.grad, their.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_distance_norms_and_weights_are_those_of_the_dense_update(kind):
    model = tiny(kind)
    with trainable(model, Lora(rank=3, alpha=12.0), seed=0) as parameterisation:
        assert parameterisation.squared_distance().item() == 0
        push(parameterisation, model)
        weights = parameterisation.weights()
        dense = {
            name.removesuffix(".lora_left"): value @ weights[name.replace("_left", "_right")].T
            for name, value in weights.items()
            if name.endswith("_left")
        }
        total = sum(float(one.double().square().sum()) for one in dense.values())
        assert parameterisation.squared_distance().item() == pytest.approx(total, rel=1e-5)
        for path, one in dense.items():
            module = model.get_submodule(path)
            assert sorted(one.shape) == sorted(module.weight.shape)
            norm = parameterisation.spectral_norms()[f"{path}.weight"]
            assert norm == pytest.approx(float(torch.linalg.matrix_norm(one, 2)), rel=1e-4)


def test_distance_and_norms_of_raw_parameters():
    model = tiny("llama")
    start = model.model.layers[1].mlp.down_proj.weight.detach().clone()
    with trainable(model, Raw(patterns=("*.1.mlp.down_proj.weight", "*.norm.weight")), seed=0) as p:
        push(p, model)
        changes = p.weights()
        change = changes["model.layers.1.mlp.down_proj.weight"] - start
        other = changes["model.norm.weight"] - model.state_dict()["model.norm.weight"]
        # the norm's own master is shown inside
        assert float(other.abs().max()) == 0
        with p.reference():
            other = changes["model.norm.weight"] - model.model.norm.weight
        total = float(change.square().sum() + other.square().sum())
        assert p.squared_distance().item() == pytest.approx(total, rel=1e-5)
        assert list(p.spectral_norms()) == ["model.layers.1.mlp.down_proj.weight"]
        want = float(torch.linalg.matrix_norm(change, 2))
        assert p.spectral_norms()["model.layers.1.mlp.down_proj.weight"] == pytest.approx(want)


@pytest.mark.parametrize("spec", SPECS)
def test_pull_moves_by_its_share_of_the_way_back(spec):
    model = tiny("llama")
    with trainable(model, spec, seed=0) as parameterisation:
        push(parameterisation, model)
        before = parameterisation.squared_distance().item()
        parameterisation.pull(0.25)
        assert parameterisation.squared_distance().item() == pytest.approx(0.75**2 * before, 1e-4)
        parameterisation.pull(1.0)
        assert parameterisation.squared_distance().item() == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize("spec", SPECS)
def test_the_gradient_of_the_distance_pulls_back(spec):
    model = tiny("llama")
    with trainable(model, spec, seed=0) as parameterisation:
        push(parameterisation, model)
        before = parameterisation.squared_distance()
        for parameter in parameterisation.parameters():
            parameter.grad = None
        before.backward()
        torch.optim.SGD(parameterisation.parameters(), lr=0.05).step()
        assert parameterisation.squared_distance().item() < before.item()


@pytest.mark.parametrize("spec", SPECS)
def test_masters_are_float32_whatever_the_model_is_and_the_model_keeps_its_type(spec):
    model = tiny("llama", dtype=torch.bfloat16)
    want = logits_at(model, a_batch())
    with trainable(model, spec, seed=0) as parameterisation:
        assert torch.equal(logits_at(model, a_batch()), want)
        push(parameterisation, model)
        assert {p.dtype for p in parameterisation.parameters()} == {torch.float32}
        assert all(p.grad is not None for p in parameterisation.parameters())
        assert logits_at(model, a_batch()).dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_updates_below_the_models_precision_add_up_in_the_masters():
    model = tiny("llama", dtype=torch.bfloat16)
    with trainable(model, DOWN, seed=0) as parameterisation:
        (master, *_) = parameterisation.parameters()
        with torch.no_grad():
            start = master.clone()
            for _ in range(64):
                master.mul_(1 + 2**-12)  # a sixteenth of what bfloat16 can tell apart
        assert bool((parameterisation.weights()[next(iter(parameterisation.named))] != start).any())


def test_state_round_trip_and_foreign_state():
    model = tiny("llama")
    with trainable(model, Lora(rank=2), seed=0) as one:
        push(one, model)
        state = one.state()
    with trainable(model, Lora(rank=2), seed=9) as other:
        other.load_state(state)
        for name, value in other.state().items():
            assert torch.equal(value, state[name])
    with pytest.raises(ValueError, match="other parameters"):
        trainable(model, Lora(rank=3), seed=0).load_state(state)


def test_the_seed_decides_the_start_and_no_global_generator_is_used():
    model, state = tiny("llama"), torch.get_rng_state()
    one, two, three = (trainable(model, Lora(rank=2), seed=s).state() for s in (0, 0, 1))
    assert all(torch.equal(one[n], two[n]) for n in one)
    assert any(not torch.equal(one[n], three[n]) for n in one)
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_is_on_only_when_it_is_turned_on():
    model, batch = tiny("llama"), a_batch()
    with trainable(model, Lora(dropout=0.5), seed=0) as parameterisation:
        push(parameterisation, model)
        assert torch.equal(logits_at(model, batch), logits_at(model, batch))
        parameterisation.dropping = True
        with torch.random.fork_rng():
            torch.manual_seed(0)
            assert not torch.equal(logits_at(model, batch), logits_at(model, batch))


@pytest.mark.parametrize(
    ("kind", "leaves"),
    [
        ("llama", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("gpt2", {"c_attn", "c_proj", "c_fc"}),
        ("gpt_neox", {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}),
    ],
)
def test_the_default_is_every_linear_module_of_the_chosen_blocks(kind, leaves):
    paths = trainable(tiny(kind), Lora(layers=(1,)), seed=0).paths
    assert {path.rpartition(".")[2] for path in paths} == leaves
    assert all(".1." in path for path in paths)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (Lora(modules=("q_proj", "query")), r"called query; lora.modules can name q_proj, k_proj"),
        (Lora(layers=(1, 3)), r"layers 0\.\.2; lora.layers has \[3\]"),
        (Raw(patterns=("*.mlp.*", "nothing.*")), r"called 'nothing\.\*'; there are model.embed"),
    ],
)
def test_what_matches_nothing_is_refused_with_what_there_is(spec, message):
    with pytest.raises(SiteNotFoundError, match=message):
        trainable(tiny("llama"), spec, seed=0)


class Quantised(nn.Linear):
    def __init__(self, like):
        super().__init__(like.in_features, like.out_features, bias=False)
        self.weight = nn.Parameter(like.weight.detach().to(torch.int8), requires_grad=False)


@pytest.mark.parametrize("spec", [Lora(), Raw(patterns=("*.down_proj.weight",))])
def test_a_quantised_model_is_refused(spec):
    model = tiny("llama")
    model.model.layers[2].mlp.down_proj = Quantised(model.model.layers[2].mlp.down_proj)
    with pytest.raises(EditError, match=r"down_proj.*is quantised"):
        trainable(model, spec, seed=0)


@pytest.mark.parametrize("spec", [Lora(), DOWN])
def test_eight_bit_floats_and_off_loaded_weights_are_refused(spec):
    model = tiny("llama")
    layer = model.model.layers[2].mlp.down_proj
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(EditError, match="quantised"):
        trainable(model, spec, seed=0)
    layer.to("meta")
    layer.weight = nn.Parameter(torch.empty(32, 48, device="meta"))
    with pytest.raises(EditError, match="off-loaded"):
        trainable(model, spec, seed=0)


def test_tied_weights_are_refused_by_name():
    with pytest.raises(EditError, match=r"embed_tokens.weight' is tied to 'lm_head.weight'"):
        trainable(tiny("qwen2"), Raw(patterns=("*embed_tokens.weight",)), seed=0)


def test_a_model_with_adapters_is_refused():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(EditError, match="adapters in it"):
        trainable(model, Lora(), seed=0)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (Lora, {"rank": 0}, "rank"),
        (Lora, {"alpha": 0.0}, "alpha"),
        (Lora, {"alpha": float("inf")}, "alpha"),
        (Lora, {"dropout": 1.0}, "dropout"),
        (Lora, {"layers": ()}, "layers"),
        (Lora, {"modules": "q_proj"}, "modules"),
        (Raw, {"patterns": ()}, "patterns"),
        (Raw, {"patterns": "*"}, "patterns"),
    ],
)
def test_options_out_of_range_are_refused(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(**options)


def test_any_module_can_have_raw_parameters_trained():
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with trainable(model, Raw(patterns=("*",)), seed=0) as parameterisation:
        model(torch.ones(5, 4)).square().sum().backward()
        torch.optim.SGD(parameterisation.parameters(), lr=0.1).step()
        assert not torch.equal(model[0].weight, before["0.weight"])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(TypeError, match="Lora or a Raw"):
        trainable(model, "lora", seed=0)
