from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from concept_erasure.collect import collect
from concept_erasure.errors import (
    EditError,
    FormatError,
    ShapeError,
    SiteNotFoundError,
    SpaceError,
)
from concept_erasure.linear.leace import LeaceEraser, LeaceFitter
from concept_erasure.linear.scrubbing import ConceptScrubber, random_scrub
from concept_erasure.sites import Space, find_sites, fingerprint, hook
from concept_erasure.utils import assert_type, is_norm_layer, mangle_module_path
from tests.models import TinyTokenizer, tiny

CAUSAL = ["llama", "gemma2", "gemma3", "qwen2", "mistral", "gpt2", "gpt_neox"]
WORDS = [
    "sun",
    "moon",
    "sea",
    "tree",
    "bird",
    "stone",
    "river",
    "cloud",
    "fire",
    "snow",
    "leaf",
    "wind",
]


def corpus(n: int = 24) -> tuple[list[str], list[int]]:
    g = torch.Generator().manual_seed(0)
    texts, labels = [], []
    for i in range(n):
        picks = torch.randint(0, len(WORDS), (int(torch.randint(3, 9, (1,), generator=g)),))
        texts.append(" ".join([WORDS[int(p)] for p in picks] + ["he" if i % 2 else "she"]))
        labels.append(i % 2)
    return texts, labels


def logits(model: nn.Module) -> Tensor:
    ids = torch.arange(4, 16).view(2, 6)
    with torch.no_grad():
        out: Tensor = model(input_ids=ids).logits
    return out


def class_gap(model: nn.Module, site: str, texts: list[str], labels: list[int]) -> float:
    """Return the distance of the class means of all real tokens at a site, relative to the mean norm."""
    seen: list[Tensor] = []
    inputs = TinyTokenizer("left")(texts, padding=True, return_tensors="pt")
    handle = hook(model, find_sites(model)[site], lambda x: seen.append(x))
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    mask = inputs["attention_mask"].bool()
    z = torch.tensor(labels)[:, None].expand(mask.shape)[mask]
    x = seen[0][mask].double()
    return float((x[z == 0].mean(0) - x[z == 1].mean(0)).norm() / x.norm(dim=1).mean())


@pytest.mark.parametrize("kind", CAUSAL)
def test_cached_and_uncached_give_the_same_erasers(kind: str) -> None:
    texts, labels = corpus()
    model = tiny(kind)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    expected = logits(model)
    tokenizer = TinyTokenizer("left")
    fast = ConceptScrubber.fit(model, tokenizer, texts, labels)
    slow = ConceptScrubber.fit(model, tokenizer, texts, labels, cached=False)
    assert len(fast.erasers) == sum(s.startswith(("norm1", "norm2")) for s in find_sites(model))
    assert list(fast.erasers) == list(slow.erasers)
    for key, eraser in fast.erasers.items():
        assert isinstance(eraser, LeaceEraser)
        other = assert_type(LeaceEraser, slow.erasers[key])
        torch.testing.assert_close(eraser.P, other.P, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(eraser.bias, other.bias, rtol=1e-4, atol=1e-5)
    assert torch.equal(logits(model), expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
def test_every_site_is_guarded_when_all_erasers_work(kind: str) -> None:
    texts, labels = corpus()
    model = tiny(kind)
    scrubber = ConceptScrubber.fit(model, TinyTokenizer("left"), texts, labels)
    sites = [name for name in find_sites(model) if name.startswith(("norm1", "norm2"))]
    assert max(class_gap(model, site, texts, labels) for site in sites) > 1e-2
    with scrubber.scrub(model) as same:
        assert same is scrubber
        gaps = [class_gap(model, site, texts, labels) for site in sites]
    assert max(gaps) < 1e-4
    with scrubber.attach(model):
        again = [class_gap(model, site, texts, labels) for site in sites]
    assert max(again) < 1e-4


def test_later_erasers_see_scrubbed_activations() -> None:
    texts, labels = corpus()
    model = tiny("llama")
    both = ConceptScrubber.fit(model, TinyTokenizer(), texts, labels, sites=["norm1.0", "norm1.2"])
    alone = ConceptScrubber.fit(model, TinyTokenizer(), texts, labels, sites="norm1.2")
    key = "layers-2-input_layernorm"
    assert list(both.erasers) == ["layers-0-input_layernorm", key]
    difference = both.erasers[key].map.matrix - alone.erasers[key].map.matrix
    assert difference.abs().max() > 1e-4


@pytest.mark.parametrize(
    "sites", ["residual.*", ["embedding", "attention.1", "value.1", "norm.final"]]
)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_any_sites_in_any_order(kind: str, sites: str | list[str]) -> None:
    texts, labels = corpus()
    model = tiny(kind)
    given = sites if isinstance(sites, str) else sites[::-1]
    fast = ConceptScrubber.fit(model, TinyTokenizer(), texts, labels, sites=given)
    slow = ConceptScrubber.fit(model, TinyTokenizer(), texts, labels, sites=sites, cached=False)
    assert list(fast.erasers) == list(slow.erasers)
    for key, eraser in fast.erasers.items():
        other = slow.erasers[key].map.matrix
        torch.testing.assert_close(eraser.map.matrix, other, rtol=1e-3, atol=1e-4)
    with fast.scrub(model):
        assert not torch.equal(logits(model), logits(tiny(kind)))


def test_encoder_and_batch_size() -> None:
    texts, labels = corpus(12)
    model = tiny("bert")
    one = ConceptScrubber.fit(model, TinyTokenizer(), texts, labels, batch_size=3)
    two = ConceptScrubber.fit(model, TinyTokenizer(), texts, labels, batch_size=12, cached=False)
    for key, eraser in one.erasers.items():
        torch.testing.assert_close(
            eraser.map.matrix, two.erasers[key].map.matrix, rtol=1e-3, atol=1e-4
        )


def test_token_labels() -> None:
    texts, _ = corpus(12)
    tags = [["pron" if w in ("he", "she") else "noun" for w in t.split()] for t in texts]
    model = tiny("llama")
    scrubber = ConceptScrubber.fit(model, TinyTokenizer("left"), texts, tags, sites="norm1.0")
    (eraser,) = scrubber.erasers.values()
    assert eraser.map.rank == 1
    with pytest.raises(ShapeError, match="text 0 has"):
        ConceptScrubber.fit(model, TinyTokenizer(), texts, [tags[0][:-1], *tags[1:]])
    with pytest.raises(ShapeError, match="12 texts and token labels for 11"):
        ConceptScrubber.fit(model, TinyTokenizer(), texts, tags[1:])


def test_training_modes_are_restored_also_after_an_error() -> None:
    texts, labels = corpus(8)
    model = tiny("llama").train()
    model.get_submodule("model.layers.1").eval()
    modes = [m.training for m in model.modules()]
    ConceptScrubber.fit(model, TinyTokenizer(), texts, labels, sites="norm1.1")
    assert [m.training for m in model.modules()] == modes
    with pytest.raises(SiteNotFoundError, match="0 times"):
        ConceptScrubber.fit(model, TinyTokenizer(), texts, labels, sites="lm_head")
    assert [m.training for m in model.modules()] == modes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_pre_hook_erases_the_input() -> None:
    model = tiny("llama")
    scrubber = ConceptScrubber(pre_hook=True)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(100, 32, generator=g)
    scrubber.erasers["layers-1-input_layernorm"] = LeaceEraser.fit(x, x[:, 0] > 0)
    scrubber.erasers["norm2.1"] = LeaceEraser.fit(x, x[:, 1] > 0)
    seen: list[str] = []
    with scrubber.apply_hook(model, lambda key, _: seen.append(key)):
        logits(model)
    assert seen == list(scrubber.erasers)
    with scrubber.scrub(model):
        changed = logits(model)
    assert not torch.equal(changed, logits(model))


def test_hooks_go_also_after_an_error() -> None:
    texts, labels = corpus(8)
    model = tiny("gpt2")
    scrubber = ConceptScrubber.fit(model, TinyTokenizer(), texts, labels, sites="norm1.*")
    with pytest.raises(RuntimeError, match="stop"), scrubber.scrub(model):
        raise RuntimeError("stop")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with scrubber.scrub(model.get_submodule("transformer")):  # without the head
        pass
    scrubber.erasers["layers-9-norm"] = next(iter(scrubber.erasers.values()))
    with pytest.raises(SiteNotFoundError), scrubber.scrub(model):
        pass


def test_save_and_load(tmp_path: Path) -> None:
    texts, labels = corpus(8)
    model = tiny("llama")
    scrubber = ConceptScrubber.fit(model, TinyTokenizer(), texts, labels, sites="norm1.*")
    loaded = ConceptScrubber.from_pretrained(scrubber.save_pretrained(tmp_path / "s"))
    with scrubber.scrub(model):
        expected = logits(model)
    with loaded.scrub(model):
        assert torch.equal(logits(model), expected)
    (tmp_path / "s" / "scrubber.json").write_text("[]")
    with pytest.raises(FormatError, match="index"):
        ConceptScrubber.from_pretrained(tmp_path / "s")
    with pytest.raises(FileNotFoundError, match=r"scrubber\.json"):
        ConceptScrubber.from_pretrained(tmp_path)


class _Twisted(nn.Module):
    """A block whose output the model changes before the next one reads it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    @property
    def base_model(self) -> nn.Module:
        return self

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x: Tensor = self.inner.get_submodule("model.embed_tokens")(input_ids)
        for layer in self.inner.get_submodule("model.layers").children():
            x = layer.get_submodule("input_layernorm")(x) + 1
        return x


def test_models_that_are_no_chain_are_refused() -> None:
    texts, labels = corpus(8)
    model = _Twisted(tiny("llama"))
    with pytest.raises(EditError, match="use cached=False"):
        ConceptScrubber.fit(model, TinyTokenizer(), texts, labels, sites="norm1.*")
    slow = ConceptScrubber.fit(model, TinyTokenizer(), texts, labels, sites="norm1.*", cached=False)
    assert len(slow.erasers) == 3


def test_random_control() -> None:
    model = tiny("llama")
    clean = logits(model)
    state = torch.get_rng_state()
    with random_scrub(model, 2, seed=1):
        first, second = logits(model), logits(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first, clean)
    assert not torch.equal(first, second)
    with random_scrub(model, 2, sites="norm1.*", seed=1):
        logits(model)
    assert torch.equal(logits(model), clean)
    with pytest.raises(ValueError, match="subspace_dim"), random_scrub(model, 33):
        logits(model)


def test_bad_texts_and_labels() -> None:
    texts, labels = corpus(8)
    model = tiny("llama")
    with pytest.raises(ValueError, match="texts"):
        ConceptScrubber.fit(model, TinyTokenizer(), [], [])
    with pytest.raises(ShapeError, match="8 rows"):
        ConceptScrubber.fit(model, TinyTokenizer(), texts, labels[:-1])
    with pytest.raises(ValueError, match="batch_size"):
        ConceptScrubber.fit(model, TinyTokenizer(), texts, labels, batch_size=0)


def test_utils() -> None:
    assert assert_type(int, 3) == 3
    with pytest.raises(TypeError, match="Expected str, got int"):
        assert_type(str, 3)
    assert is_norm_layer(nn.LayerNorm(2))
    assert not is_norm_layer(nn.Linear(2, 2))
    assert mangle_module_path("a.0.b") == "a-0-b"
    with pytest.raises(ValueError, match="reserve"):
        mangle_module_path("a-b")


def test_no_erasers_is_an_error() -> None:
    model, scrubber = tiny("llama"), ConceptScrubber()
    with pytest.raises(EditError, match="holds no erasers"), scrubber.scrub(model):
        pass
    with pytest.raises(EditError, match="holds no erasers"):
        scrubber.attach(model)
    with (
        pytest.raises(EditError, match="holds no erasers"),
        scrubber.apply_hook(model, lambda k, x: None),
    ):
        pass


@pytest.mark.parametrize("cached", [True, False])
def test_erasers_carry_their_space(cached: bool, tmp_path: Path) -> None:
    texts, labels = corpus(12)
    model, sites = tiny("llama"), ["norm1.0", "model.layers.1.mlp"]
    scrubber = ConceptScrubber.fit(
        model, TinyTokenizer(), texts, labels, sites=sites, cached=cached
    )
    mark = fingerprint(model)
    assert [e.space for e in scrubber.erasers.values()] == [
        Space("LlamaForCausalLM", mark, name, "all", 32) for name in sites
    ]
    loaded = ConceptScrubber.from_pretrained(scrubber.save_pretrained(tmp_path / "s"))
    clean = logits(model)
    with scrubber.attach(model):
        for copy in (scrubber, loaded):
            with pytest.raises(EditError, match="in force on this model already"):
                copy.attach(model)
    with (
        loaded.attach(model),
        pytest.raises(EditError, match="in force on this model already"),
        scrubber.scrub(model),
    ):
        pass
    with scrubber.apply_hook(model, lambda *_: None), loaded.scrub(model):
        pass
    with loaded.scrub(model.get_submodule("model")):  # without the head
        pass
    other = tiny("llama", seed=1)
    with pytest.raises(SpaceError, match="Fit it again"), loaded.scrub(other):
        pass
    with pytest.raises(SpaceError, match="Fit it again"):
        loaded.attach(other)
    first = "layers-0-input_layernorm"
    loaded.erasers["layers-2-input_layernorm"] = loaded.erasers[first]
    with pytest.raises(SpaceError, match=r"fitted at 'norm1\.0'"):
        loaded.attach(model)
    loaded.erasers["layers-2-input_layernorm"] = loaded.erasers[first].with_space(None)
    with loaded.attach(model):
        assert not torch.equal(logits(model), clean)
    assert torch.equal(logits(model), clean)
    assert not any(m._forward_hooks for m in (*model.modules(), *other.modules()))


def test_an_eraser_of_another_width_is_refused() -> None:
    model, scrubber = tiny("llama"), ConceptScrubber()
    x = torch.randn(100, 16, generator=torch.Generator().manual_seed(0))
    scrubber.erasers["norm1.0"] = LeaceEraser.fit(x, x[:, 0] > 0)
    for use in (scrubber.attach, lambda m: scrubber.scrub(m).__enter__()):
        with pytest.raises(SpaceError, match="width 32; the eraser 'norm1.0' has width 16"):
            use(model)
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_the_padding_side_does_not_matter(kind: str, cached: bool) -> None:
    """With learned positions, padding on the left would move every token."""
    texts, labels = corpus(12)
    model, left = tiny(kind), TinyTokenizer("left")
    one = ConceptScrubber.fit(model, left, texts, labels, cached=cached)
    two = ConceptScrubber.fit(model, TinyTokenizer(), texts, labels, cached=cached)
    assert left.padding_side == "left"
    for key, eraser in one.erasers.items():
        assert torch.equal(eraser.map.matrix, two.erasers[key].map.matrix)


def test_texts_are_read_as_by_collect() -> None:
    model, tokenizer = tiny("gpt2"), TinyTokenizer()
    labels = [0, 1, 0]

    def fit(texts: object, **options: int) -> ConceptScrubber:
        return ConceptScrubber.fit(
            model,
            tokenizer,
            texts,  # type: ignore[arg-type]
            labels,
            sites="norm1.0",
            batch_size=2,
            **options,  # type: ignore[arg-type]
        )

    with pytest.raises(ValueError, match="text 2 has no tokens"):
        fit(["a", "b c", ""])
    with pytest.raises(ShapeError, match="text 2 has 65 tokens.*max_length=64"):
        fit(["a", "b c", "d " * 65])
    assert fit(["a", "b c", "d " * 65], max_length=64).erasers
    with pytest.raises(TypeError, match="text 1 is NoneType"):
        fit(["a", None, "b"])
    with pytest.raises(TypeError, match="one string"):
        fit("abc")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_scrubber_and_one_of_its_own_erasers(tmp_path: Path) -> None:
    texts, labels = corpus(12)
    model, sites = tiny("llama"), ["norm1.0", "model.layers.1.mlp"]
    scrubber = ConceptScrubber.fit(model, TinyTokenizer(), texts, labels, sites=sites, strength=0.5)
    loaded = ConceptScrubber.from_pretrained(scrubber.save_pretrained(tmp_path / "s"))
    base = model.get_submodule("model")
    for eraser in (*scrubber.erasers.values(), *loaded.erasers.values()):
        place = "mlp.1" if "mlp" in eraser.space.site else "norm1.0"  # type: ignore[union-attr]
        for one, other in ((model, base), (base, model)):
            with eraser.with_space(None).attach(one, sites=place):
                for attach in (scrubber.attach, loaded.attach):
                    with pytest.raises(EditError, match="in force"):
                        attach(other)
            with scrubber.attach(other), pytest.raises(EditError, match="in force"):
                eraser.with_space(None).to(dtype=torch.float32).attach(one, sites=place)
    twice = ConceptScrubber()
    one = next(iter(scrubber.erasers.values())).with_space(None)
    twice.erasers = {"norm1.0": one, "layers-0-input_layernorm": one}
    with pytest.raises(EditError, match="given twice for one place"):
        twice.attach(model)


def test_erasers_outlive_a_commit() -> None:
    texts, labels = corpus(12)
    model = tiny("gpt2")
    scrubber = ConceptScrubber.fit(model, TinyTokenizer(), texts, labels, sites="norm1.*")
    before = fingerprint(model)
    erasers = list(scrubber.erasers.values())
    erasers[0].apply(model).commit()
    assert fingerprint(model) != before
    with scrubber.attach(model), scrubber.apply_hook(model, lambda *_: None):
        pass


def test_saving_over_a_larger_scrubber(tmp_path: Path) -> None:
    texts, labels = corpus(8)
    model, folder = tiny("llama"), tmp_path / "s"
    large = ConceptScrubber.fit(model, TinyTokenizer(), texts, labels, sites="norm1.*")
    large.save_pretrained(folder)
    (folder / "2" / "notes.txt").write_text("mine")
    (folder / "9").mkdir()
    (folder / "notes").mkdir()
    small = ConceptScrubber.fit(model, TinyTokenizer(), texts, labels, sites="norm2.0")
    small.save_pretrained(folder)
    found = sorted(
        str(p.relative_to(folder)) for p in folder.rglob("*") if p.parent != folder / "0"
    )
    assert found == ["0", "2", "2/notes.txt", "9", "notes", "scrubber.json"]
    assert list(ConceptScrubber.from_pretrained(folder).erasers) == list(small.erasers)


def test_an_interrupted_save_does_not_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts, labels = corpus(8)
    model, folder = tiny("llama"), tmp_path / "s"
    old = ConceptScrubber.fit(model, TinyTokenizer(), texts, labels, sites="norm1.*")
    old.save_pretrained(folder)
    index = (folder / "scrubber.json").read_bytes()
    new = ConceptScrubber.fit(model, TinyTokenizer(), texts, labels, sites="norm2.*")

    def full_disk(path: Path, fill: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("concept_erasure.linear.scrubbing.write", full_disk)  # the index alone
    with pytest.raises(OSError, match="no space"):
        new.save_pretrained(folder)
    assert (folder / "scrubber.json").read_bytes() == index
    with pytest.raises(FormatError, match="saving was interrupted"):
        ConceptScrubber.from_pretrained(folder)


@pytest.mark.parametrize("cached", [True, False])
def test_options_reach_every_fit(cached: bool) -> None:
    texts, labels = corpus(24)
    model = tiny("llama")
    three = [i % 3 for i in range(24)]
    options = {"sites": ["norm1.0", "mlp.1"], "cached": cached}
    whole = ConceptScrubber.fit(model, TinyTokenizer(), texts, three, **options)  # type: ignore[arg-type]
    one = ConceptScrubber.fit(
        model,
        TinyTokenizer(),
        texts,
        three,
        rank=1,
        strength=0.5,
        svd_tol=1e-6,
        background=["sun sea", "tree", "river cloud fire"],
        **options,  # type: ignore[arg-type]
    )
    assert [e.map.rank for e in whole.erasers.values()] == [2, 2]
    for eraser in one.erasers.values():
        assert eraser.map.rank == 1
        config = assert_type(LeaceEraser, eraser).config
        assert vars(config) == {
            "method": "leace",
            "affine": True,
            "shrinkage": "auto",
            "rank": 1,
            "svd_tol": 1e-6,
            "strength": 0.5,
        }
        assert eraser.report["background_rows"] == 6
    with pytest.raises(ValueError, match="strength"):
        ConceptScrubber.fit(model, TinyTokenizer(), texts, labels, strength=float("nan"))
    with pytest.raises(ValueError, match="text 1 has no tokens"):
        ConceptScrubber.fit(model, TinyTokenizer(), texts, labels, background=["a", ""])


@pytest.mark.parametrize("cached", [True, False])
def test_tokens_of_a_text_are_one_group(cached: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    texts, labels = corpus()
    model, given = tiny("llama"), list[Tensor]()
    update = LeaceFitter.update

    def recorded(fitter: LeaceFitter, x: object, z: object, *, groups: Tensor) -> LeaceFitter:
        given.append(groups)
        return update(fitter, x, z, groups=groups)

    monkeypatch.setattr(LeaceFitter, "update", recorded)
    ConceptScrubber.fit(model, TinyTokenizer(), texts, labels, sites="norm1.1", cached=cached)
    data = collect(model, TinyTokenizer(), texts, labels, sites="norm1.1", tokens="all")
    assert data.rows is not None
    assert torch.equal(torch.cat(given), data.rows)
