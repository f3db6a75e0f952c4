"""Sites: the table of every kind, and exactness of folding against hooking."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPTJConfig,
    GPTJForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from concept_erasure.errors import FormatError, SiteNotFoundError
from concept_erasure.sites import (
    Site,
    Space,
    as_out_in,
    base_of,
    find_sites,
    fingerprint,
    hook,
    resolve,
    width_at,
)
from concept_erasure.sites import _fetch as fetch
from tests.models import KINDS, tiny

FOLDS = {  # kind of site: whether it has readers, whether it has a writer
    "norm1": (True, False),
    "norm2": (True, False),
    "attention": (False, True),
    "mlp": (False, True),
    "value": (True, False),
}


def batch() -> dict[str, Tensor]:
    ids = torch.arange(14).reshape(2, 7) * 5 % 124 + 4
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(**batch()).logits
    return out


def oblique(width: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    left, right, center = torch.randn(3, width, generator=generator, dtype=torch.float64)
    return left / (left @ right), right, center


def set_linear(module: nn.Module, weight: Tensor, bias: Tensor) -> None:
    """Write weight (out, in) and bias (out,); Conv1D keeps the transpose."""
    transposed = type(module).__name__ == "Conv1D"
    module.weight = nn.Parameter(weight.T.contiguous() if transposed else weight)
    module.bias = nn.Parameter(bias)


def get_linear(module: nn.Module) -> tuple[Tensor, Tensor]:
    weight = module.weight.detach().clone()
    weight = weight.T if type(module).__name__ == "Conv1D" else weight
    bias = module.bias
    return weight, torch.zeros_like(weight[:, 0]) if bias is None else bias.detach().clone()


def measured_width(model: nn.Module, site: Site) -> int:
    seen: list[int] = []
    handle = hook(model, site, lambda x: seen.append(x.shape[-1]))
    logits(model)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("kind", KINDS)
def test_folding_equals_hooking(kind: str) -> None:
    reference = tiny(kind, dtype=torch.float64)
    clean = logits(reference)
    for site in find_sites(reference).values():
        if not site.readers and site.writer is None:
            continue
        if site.name.rpartition(".")[2] not in {"1", "final"}:
            continue
        left, right, center = oblique(measured_width(reference, site))
        handle = hook(
            reference,
            site,
            lambda x: x - ((x - center) @ right)[..., None] * left,  # noqa: B023
        )
        hooked = logits(reference)
        handle.remove()
        assert (hooked - clean).abs().max() > 1e-4, site.name
        if site.readers:
            model = tiny(kind, dtype=torch.float64)
            for path in site.readers:
                module = model.get_submodule(path)
                weight, bias = get_linear(module)
                offset = weight @ left * (right @ center)
                set_linear(module, weight - torch.outer(weight @ left, right), bias + offset)
            assert torch.allclose(logits(model), hooked, rtol=0, atol=1e-5), site.name
        if site.writer is not None:
            model = tiny(kind, dtype=torch.float64)
            module = model.get_submodule(site.writer)
            weight, bias = get_linear(module)
            bias = bias - left * (right @ (bias - center))
            set_linear(module, weight - torch.outer(left, right @ weight), bias)
            assert torch.allclose(logits(model), hooked, rtol=0, atol=1e-5), site.name
    assert torch.equal(logits(reference), clean)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_every_site(kind: str) -> None:
    model = tiny(kind)
    sites = find_sites(model)
    names = {f"{k}.{i}" for k in (*FOLDS, "residual") for i in range(3)}
    assert set(sites) == names | {"embedding", "norm.final"}
    modules = dict(model.named_modules())
    for name, site in sites.items():
        assert site.name == name and site.module in modules
        assert set(site.readers) <= set(modules)
        reads, writes = FOLDS.get(site.kind, (False, False))
        if kind == "bert" and site.kind in {"norm1", "norm2"}:
            reads = False
        if name == "norm.final":
            reads = kind in {"llama", "mistral", "gpt_neox"}  # the others tie their head
        assert bool(site.readers) == reads, name
        assert (site.writer is not None) == writes, name


def test_the_sites_of_a_few_models_by_hand() -> None:
    neox, block = find_sites(tiny("gpt_neox")), "gpt_neox.layers.1"
    assert neox["norm1.1"].readers == (f"{block}.attention.query_key_value",)
    assert neox["norm2.1"].readers == (f"{block}.mlp.dense_h_to_4h",)
    assert neox["norm.final"].readers[0] in {"embed_out", "lm_head"}
    gemma, block = find_sites(tiny("gemma3")), "model.layers.1"
    assert gemma["norm2.1"].module == f"{block}.pre_feedforward_layernorm"
    assert gemma["mlp.1"] == Site("mlp.1", f"{block}.mlp", "mlp", writer=f"{block}.mlp.down_proj")
    gpt2 = find_sites(tiny("gpt2"))
    assert gpt2["attention.0"].writer == "transformer.h.0.attn.c_proj"
    assert gpt2["value.0"].when == "input"
    bert = find_sites(tiny("bert"))
    assert bert["norm1.0"].module == "bert.embeddings.LayerNorm"
    assert bert["norm1.2"].module == "bert.encoder.layer.1.output.LayerNorm"


@pytest.mark.parametrize("kind", KINDS)
def test_norms_are_what_attention_and_mlp_read(kind: str) -> None:
    """The activation at norm1 / norm2 is the very tensor the readers (BERT: queries) receive."""
    model, sites = tiny(kind), find_sites(tiny(kind))
    bert = "bert.encoder.layer.1"
    by_hand = {
        "norm1.1": (f"{bert}.attention.self.query",),
        "norm2.1": (f"{bert}.intermediate.dense",),
    }
    for name in ("norm1.1", "norm2.1"):
        out: list[Tensor] = []
        handles = [hook(model, sites[name], out.append)]
        for path in sites[name].readers or by_hand[name]:
            handles.append(hook(model, Site(path, path, "module", "input"), out.append))
        logits(model)
        for handle in handles:
            handle.remove()
        assert len(out) > 1 and all(torch.equal(out[0], x) for x in out)


def test_unknown_structure_gets_no_folds() -> None:
    model = tiny("llama")
    model.get_submodule("model.layers.1.mlp").gate = nn.Linear(32, 2)
    model.get_submodule("model.layers.2").mixer = nn.Linear(32, 32)
    shared = model.get_submodule("model.layers.0.self_attn.q_proj")
    shared.weight = model.get_submodule("model.layers.0.self_attn.o_proj").weight
    sites = find_sites(model)
    assert sites["norm2.1"].readers == () and sites["mlp.1"].writer is None
    assert sites["norm1.2"].readers == () and sites["norm2.2"].readers == ()
    assert sites["norm1.0"].readers == () and sites["attention.0"].writer is None


def test_a_residual_added_inside_the_module_is_left_out() -> None:
    config = BloomConfig(vocab_size=128, hidden_size=32, n_layer=1, n_head=4)
    sites = find_sites(BloomForCausalLM(config))
    assert sites["mlp.0"].module == sites["mlp.0"].writer
    assert sites["attention.0"].module == sites["attention.0"].writer


def test_one_norm_read_by_attention_and_mlp() -> None:
    config = GPTJConfig(
        vocab_size=128,
        n_embd=32,
        n_layer=1,
        n_head=4,
        rotary_dim=4,
        bos_token_id=1,
        eos_token_id=2,
    )
    sites = find_sites(GPTJForCausalLM(config))
    names = [path.rpartition(".")[2] for path in sites["norm1.0"].readers]
    assert sorted(names) == ["fc_in", "k_proj", "q_proj", "v_proj"]
    assert "norm2.0" not in sites


def test_experts_get_no_folds() -> None:
    config = MixtralConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=2,
    )
    sites = find_sites(MixtralForCausalLM(config))
    assert sites["norm2.0"].readers == ()
    assert sites["mlp.0"].writer is None
    assert "value.0" not in sites
    assert len(sites["norm1.0"].readers) == 3


def test_resolve() -> None:
    model = tiny("llama")
    assert [s.name for s in resolve(model, "residual.2")] == ["residual.2"]
    names = [s.name for s in resolve(model, ["norm?.*", "norm1.0"])]
    assert names == [f"norm{k}.{i}" for i in range(3) for k in (1, 2)]
    (raw,) = resolve(model, "model.layers.0.mlp.act_fn")
    assert raw.kind == "module" and raw.when == "output"
    assert len(resolve(model, "model.layers.?.mlp")) == 3
    plain = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    assert resolve(plain, "1")[0].module == "1"
    with pytest.raises(SiteNotFoundError, match=r"residual\.9.*nearest: residual\."):
        resolve(model, "residual.9")
    with pytest.raises(SiteNotFoundError, match="no site"):
        resolve(model, [])
    with pytest.raises(SiteNotFoundError, match="no list of transformer blocks"):
        find_sites(plain)


def test_hook_leaves_alone_replaces_and_refuses() -> None:
    model = tiny("gemma2")
    before = logits(model)
    site = find_sites(model)["attention.0"]
    handle = hook(model, site, lambda x: None)
    assert torch.equal(logits(model), before)
    handle.remove()
    with hook(model, site, torch.zeros_like):
        assert not torch.equal(logits(model), before)
    assert torch.equal(logits(model), before)
    with pytest.raises(SiteNotFoundError, match="no module"):
        hook(model, Site("x", "nowhere", "module"), lambda x: None)
    with (
        hook(model, Site("m", "model", "module"), lambda x: None),
        pytest.raises(SiteNotFoundError, match="not a tensor"),
    ):
        logits(model)


def test_fingerprint() -> None:
    model = tiny("qwen2")
    mark = fingerprint(model)
    assert mark == fingerprint(tiny("qwen2"))
    assert mark == fingerprint(model.to(torch.bfloat16))
    assert mark != fingerprint(tiny("qwen2", seed=1))
    assert mark != fingerprint(tiny("llama"))


@pytest.mark.parametrize("kind", KINDS)
def test_width_is_told_without_running(kind: str) -> None:
    model = tiny(kind)
    for site in find_sites(model).values():
        assert width_at(model, site) == measured_width(model, site), site.name
    assert width_at(nn.Sequential(nn.ReLU()), Site("0", "0", "module")) is None
    with pytest.raises(SiteNotFoundError, match="no module"):
        width_at(model, Site("x", "nowhere", "module"))


def test_space_round_trip() -> None:
    space = Space("m", "f", "residual.0", "last", 32)
    assert Space.from_dict(space.to_dict()) == space
    with pytest.raises(FormatError, match="fields"):
        Space.from_dict({"model": "m"})
    with pytest.raises(FormatError, match="width"):
        Space.from_dict({**space.to_dict(), "width": "32"})


@pytest.mark.parametrize(
    ("path", "named"),
    [
        ("model.layers", "residual.0, residual.1, residual.2"),
        ("model.rotary_emb", "nearest:"),
    ],
)
def test_modules_without_an_activation_are_refused(path: str, named: str) -> None:
    model = tiny("llama")
    with pytest.raises(SiteNotFoundError, match=f"nothing can be done at '{path}'.*{named}"):
        resolve(model, path)
    with pytest.raises(SiteNotFoundError, match="nothing can be done"):
        hook(model, Site(path, path, "module"), lambda x: None)
    names = [site.name for site in resolve(model, "model.*")]
    assert path not in names and "model.layers.0.mlp" in names
    assert not any(m._forward_hooks for m in model.modules())


def test_every_kind_of_container_is_refused() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 2)

    model = nn.Module()
    model.a = nn.ModuleDict({"x": nn.Linear(2, 2)})
    model.b = nn.ParameterList([nn.Parameter(torch.ones(2))])
    model.c = nn.ParameterDict({"x": nn.Parameter(torch.ones(2))})
    model.d = Holder()
    for name in "abcd":
        with pytest.raises(SiteNotFoundError, match=r"never run.*nearest: [ad]\."):
            resolve(model, name)
    assert resolve(model, "d.inner")[0].module == "d.inner"


@pytest.mark.parametrize("sites", [5, [1], ["residual.0", None], None, b"residual.0"])
def test_sites_that_are_no_strings(sites: object) -> None:
    with pytest.raises(TypeError, match="sites must be a name, pattern or module path"):
        resolve(tiny("llama"), sites)  # type: ignore[arg-type]


def test_an_activation_of_whole_numbers_is_refused() -> None:
    class Ids(nn.Module):
        def forward(self, ids: Tensor) -> Tensor:
            return ids + 1

    model = nn.Sequential(Ids())
    with (
        hook(model, Site("0", "0", "module"), lambda x: None),
        pytest.raises(SiteNotFoundError, match=r"torch\.int64 values, not hidden states"),
    ):
        model(torch.arange(3))


def test_no_writer_while_dropout_is_active() -> None:
    """GPT-2 has dropout after both writers, inside the modules whose outputs are the sites."""
    model = tiny("gpt2")
    quiet = find_sites(model)
    loud = find_sites(model.train())
    for name in ("attention.1", "mlp.1"):
        assert quiet[name].writer is not None and loud[name].writer is None
        assert width_at(model, loud[name]) == 32
    assert {n: s.readers for n, s in quiet.items()} == {n: s.readers for n, s in loud.items()}
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    assert find_sites(model) == quiet
    assert find_sites(tiny("llama").train()) == find_sites(tiny("llama"))  # no dropout modules


def test_the_fingerprint_depends_on_names_not_on_places() -> None:
    one, two = nn.Linear(3, 3), nn.Linear(3, 3)
    a, b = nn.Module(), nn.Module()
    a.one, a.two = one, two
    b.two, b.one = two, one  # registered in the other order
    assert fingerprint(a) == fingerprint(b)
    b.one, b.two = two, one
    assert fingerprint(a) != fingerprint(b)
    model = tiny("gpt2")
    assert fingerprint(model) == fingerprint(model.get_submodule("transformer"))  # no head


def test_values_come_back_in_order_from_several_devices() -> None:
    """Devices are told apart by the attribute alone, so pretend that every other vector is away."""

    class Away(Tensor):
        @property
        def device(self) -> torch.device:  # type: ignore[override]
            return torch.device("cuda", 0)

    pieces = [torch.full((i + 1,), float(i)) for i in range(5)]
    mixed = [p.as_subclass(Away) if i % 2 else p for i, p in enumerate(pieces)]
    assert all(torch.equal(got, p) for got, p in zip(fetch(mixed), pieces, strict=True))


def test_linear_modules_write_their_own_output() -> None:
    model = tiny("llama")
    name = "model.layers.1.mlp.down_proj"
    assert resolve(model, name) == [Site(name, name, "module", writer=name)]
    assert all(s.writer == s.module for s in resolve(model, "model.layers.0.*_proj"))
    gpt2 = tiny("gpt2")
    (conv,) = resolve(gpt2, "transformer.h.0.attn.c_attn")
    assert conv.writer == conv.module and width_at(gpt2, conv) == 96
    assert resolve(model, "model.layers.1.mlp")[0].writer is None
    assert resolve(model, "model.layers.1.mlp.act_fn")[0].writer is None
    shared = model.get_submodule("model.layers.0.self_attn.q_proj")
    shared.weight = model.get_submodule("model.layers.0.self_attn.o_proj").weight
    model.get_submodule("model.layers")[2] = model.get_submodule("model.layers.1")
    for path in ("layers.0.self_attn.q_proj", "layers.0.self_attn.o_proj", "layers.1.mlp.up_proj"):
        assert resolve(model, f"model.{path}")[0].writer is None

    class Scaled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    assert resolve(nn.Sequential(Scaled(2, 2)), "0")[0].writer is None


def test_weights_as_out_in() -> None:
    conv = tiny("gpt2").get_submodule("transformer.h.0.attn.c_attn")
    weight = as_out_in(conv, conv.weight)  # type: ignore[arg-type]
    assert weight.shape == (96, 32)
    assert torch.equal(as_out_in(conv, weight), conv.weight)  # type: ignore[arg-type]
    plain = nn.Linear(2, 3)
    assert as_out_in(plain, plain.weight) is plain.weight


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_of_every_view(kind: str) -> None:
    class Wrapper(nn.Module):  # as adapters wrap a model: the inner one answers for it
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.inner = model

        @property
        def base_model(self) -> nn.Module:
            return self.inner

    model = tiny(kind)
    path, base = base_of(model)
    assert base is model.base_model and model.get_submodule(path) is base
    assert base_of(base) == ("", base)
    assert base_of(Wrapper(Wrapper(model))) == (f"inner.inner.{path}", base)
    assert fingerprint(Wrapper(model)) == fingerprint(model) == fingerprint(base)
    plain = nn.Linear(2, 2)
    assert base_of(plain) == ("", plain)
