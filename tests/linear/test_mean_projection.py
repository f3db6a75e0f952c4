from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest
import torch
import transformers
from torch import Tensor, nn

from concept_erasure import registry
from concept_erasure.collect import collect
from concept_erasure.edit import active_edits
from concept_erasure.eraser import Eraser
from concept_erasure.errors import EditError, ErasureWarning, ShapeError, SpaceError
from concept_erasure.linear.mean_projection import MeanProjectionEraser, MeanProjectionFitter
from concept_erasure.sites import find_sites, hook
from tests.linear.samples import class_gap, one_hot, residual, sample
from tests.models import TinyTokenizer, tiny

TEXTS = ["a man ran", "the woman sat down", "he is here", "she left", "his hat", "her coat was red"]
UNTIED = ("llama", "mistral", "gpt_neox")
TIED = ("qwen2", "gpt2")
POST_NORM = ("gemma2", "gemma3", "bert")


def ids() -> Tensor:
    return torch.randint(4, 128, (2, 7), generator=torch.Generator().manual_seed(0))


def direction() -> MeanProjectionEraser:
    g = torch.Generator().manual_seed(5)
    return MeanProjectionEraser.from_directions(torch.randn(32, generator=g))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return cast("Tensor", model(input_ids=ids()).logits)


def residual_stream(model: nn.Module) -> list[Tensor]:
    found: list[Tensor] = []
    handles = [
        hook(model, site, lambda x: found.append(x.detach()))
        for name, site in find_sites(model).items()
        if name.startswith("residual")
    ]
    logits(model)
    for handle in handles:
        handle.remove()
    return found


def writers(model: nn.Module) -> list[str]:
    names = [
        n for n in find_sites(model) if n.partition(".")[0] in ("embedding", "attention", "mlp")
    ]
    return [*names, "transformer.wpe"] if hasattr(model, "transformer") else names


@pytest.mark.parametrize("classes", [2, 4])
def test_guards_and_is_an_orthogonal_projection(classes: int) -> None:
    x, z = sample(600, 10, classes)
    eraser = MeanProjectionEraser.fit(x, z)
    p = eraser.P
    assert class_gap(eraser(x), z) < 1e-10
    assert residual(p, x, one_hot(z, classes)) < 1e-12
    torch.testing.assert_close(p @ p, p)
    torch.testing.assert_close(p, p.T)
    assert float(p.trace()) == pytest.approx(10 - (classes - 1))
    torch.testing.assert_close(eraser(x).mean(0), x.mean(0))
    columns = MeanProjectionEraser.fit(x, one_hot(z, classes))
    torch.testing.assert_close(columns.P, p)


def test_direction_is_the_difference_of_class_means() -> None:
    x, z = sample(300, 8, 2)
    v = x[z == 1].mean(0) - x[z == 0].mean(0)
    v = v / v.norm()
    eraser = MeanProjectionEraser.fit(x, z, affine=False)
    assert float((eraser.proj_right[0] @ v).abs()) == pytest.approx(1)
    torch.testing.assert_close(eraser(x), x - (x @ v)[:, None] * v)
    assert eraser.bias is None


def test_linear_form_of_an_affine_fit() -> None:
    x, z = sample(300, 8, 2)
    affine, linear = (MeanProjectionEraser.fit(x, z, affine=a) for a in (True, False))
    assert affine.linear().digest == linear.digest
    assert linear.linear() is linear


def test_streaming_is_one_pass() -> None:
    x, z = sample(300, 8, 3)
    fitter = MeanProjectionFitter(8, 3)
    for rows in torch.arange(300).split(37):
        fitter.update(x[rows], z[rows])
    torch.testing.assert_close(fitter.eraser.P, MeanProjectionEraser.fit(x, z).P)


def test_given_directions() -> None:
    given = torch.tensor([[2.0, 0, 0], [4, 0, 0], [0, 1, 1]])
    eraser = MeanProjectionEraser.from_directions(given)
    assert eraser.report["rank"] == 2
    out = eraser(torch.tensor([[1.0, 2, 4]]))
    torch.testing.assert_close(out, torch.tensor([[0.0, -1, 1]]))
    with pytest.raises(ValueError, match="zero"):
        MeanProjectionEraser.from_directions(torch.zeros(3))
    with pytest.raises(ShapeError, match="directions"):
        MeanProjectionEraser.from_directions(torch.zeros(1, 2, 3))


@pytest.mark.parametrize("kind", [*UNTIED, *TIED])
def test_ablate_is_a_hook_on_every_writer(kind: str) -> None:
    model, eraser = tiny(kind, dtype=torch.float64), direction()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    plain = logits(model)
    with eraser.attach(model, sites=writers(model)):
        want = logits(model)
    v = eraser.proj_left[:, 0]
    assert max(float((x @ v).abs().max()) for x in residual_stream(model)) > 0.1
    edit = eraser.ablate(model, tied="untie" if kind in TIED else "refuse")
    torch.testing.assert_close(logits(model), want)
    assert float((want - plain).abs().max()) > 1e-3
    assert max(float((x @ v).abs().max()) for x in residual_stream(model)) < 1e-12
    with pytest.raises(EditError, match="in force"):
        eraser.attach(model, sites="mlp.0")
    edit.undo()
    assert torch.equal(logits(model), plain)
    assert all(torch.equal(model.state_dict()[n], v) for n, v in weights.items())
    assert active_edits(model) == []


@pytest.mark.parametrize("kind", TIED)
def test_tied_embeddings(kind: str, tmp_path: Path) -> None:
    model, eraser = tiny(kind), direction()
    with pytest.raises(EditError, match=r"tied to 'lm_head\.weight'.*untie"):
        eraser.ablate(model)
    with eraser.ablate(model, tied="untie"):
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        assert head.weight is not embedding.weight
        assert model.config.tie_word_embeddings is False
        want = logits(model)
        model.save_pretrained(tmp_path / "m")
    loaded = type(model).from_pretrained(tmp_path / "m").eval()
    torch.testing.assert_close(logits(loaded), want)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.config.tie_word_embeddings is True
    edit = eraser.ablate(model, tied="untie")
    edit.commit()
    torch.testing.assert_close(logits(model), want)


@pytest.mark.parametrize("kind", POST_NORM)
def test_ablate_refuses_norms_after_a_writer(kind: str) -> None:
    model = tiny(kind)
    before = logits(model)
    with pytest.raises(EditError, match=r"not be exact.*attach\(model, sites='residual"):
        direction().ablate(model, tied="untie")
    assert torch.equal(logits(model), before)


def test_ablate_refuses_what_is_not_exact() -> None:
    model, eraser = tiny("llama"), direction()
    with pytest.raises(EditError, match=r"training mode.*eval\(\)"):
        eraser.ablate(model.train())
    model.eval()
    model.model.layers[1].adapter = nn.Linear(32, 32)
    with pytest.raises(EditError, match=r"'model\.layers\.1\.adapter'"):
        eraser.ablate(model)
    del model.model.layers[1].adapter
    model.model.embedding_norm = nn.LayerNorm(32)
    with pytest.raises(EditError, match=r"'model\.embedding_norm'"):
        eraser.ablate(model)
    del model.model.embedding_norm
    with pytest.raises(ValueError, match="tied must be"):
        eraser.ablate(model, tied="both")  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="width 32"):
        MeanProjectionEraser.from_directions(torch.ones(16)).ablate(model)
    x, z = sample(100, 32, 2)
    affine = MeanProjectionEraser.fit(x, z)
    with pytest.raises(EditError, match=r"affine.*linear\(\)"):
        affine.ablate(model)
    affine.linear().ablate(model).undo()


def test_opt_positions_and_loose_mlp() -> None:
    config = transformers.OPTConfig(
        vocab_size=128,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.OPTForCausalLM(config).double().eval()
    eraser = direction()
    with eraser.attach(model, sites=[*writers(model), "model.decoder.embed_positions"]):
        want = logits(model)
    with eraser.ablate(model):
        torch.testing.assert_close(logits(model), want)


def test_one_direction_at_many_sites() -> None:
    model = tiny("llama")
    found = collect(model, TinyTokenizer(), TEXTS, [0, 1, 0, 1, 0, 1], sites="residual.1")
    linear = MeanProjectionEraser.fit(found, affine=False)
    v = linear.proj_left[:, 0].float()
    with linear.attach(model, sites="residual.*"):
        assert max(float((x @ v).abs().max()) for x in residual_stream(model)) < 1e-5
    with linear.ablate(model):
        assert max(float((x @ v).abs().max()) for x in residual_stream(model)) < 1e-5
    with pytest.raises(SpaceError, match=r"norm1\.0"):
        linear.attach(model, sites="norm1.0")
    with pytest.raises(SpaceError, match=r"residual\.0"):
        MeanProjectionEraser.fit(found).attach(model, sites="residual.*")
    with pytest.raises(SpaceError, match="weights"):
        linear.ablate(tiny("llama", seed=1))


def test_save_and_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = registry.Method(
        name="mean-projection",
        family="linear",
        target="concept_erasure.linear.mean_projection:MeanProjectionEraser",
        guarantees=frozenset(),
        summary="",
        paper="",
    )
    monkeypatch.setitem(registry.METHODS, "mean-projection", entry)
    x, z = sample(200, 6, 3)
    eraser = MeanProjectionEraser.fit(x, z, affine=False)
    loaded = Eraser.from_pretrained(eraser.save_pretrained(tmp_path / "e"))
    assert isinstance(loaded, MeanProjectionEraser)
    assert torch.equal(loaded(x), eraser(x))


def test_bad_input() -> None:
    x, z = sample(200, 6, 3)
    with pytest.raises(ValueError, match="needs classes"):
        MeanProjectionEraser.fit(x, x[:, 0])
    with pytest.raises(ShapeError, match="200"):
        MeanProjectionEraser.fit(x, z[:-1])
    with pytest.warns(ErasureWarning, match="identity"):
        MeanProjectionEraser.fit(x, torch.zeros_like(z))
