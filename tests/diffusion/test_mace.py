"""MACE: contexts, refinement against a per-layer reference, fusion on a pipeline, presets, bad input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")

from concept_erasure.diffusion import mace
from concept_erasure.diffusion.core import Preserve
from concept_erasure.diffusion.encode import TextEncoder
from concept_erasure.diffusion.fusion import lora_layers, merge_loras
from concept_erasure.diffusion.mace import MaceEraser
from concept_erasure.diffusion.maps import module_at, text_maps
from concept_erasure.diffusion.templates import check_templates
from concept_erasure.eraser import Eraser
from concept_erasure.errors import EditError, FormatError, ShapeError
from tests.diffusion import per_layer
from tests.diffusion.tiny import TINY, latents, tiny_sd, tiny_sdxl

FEW = ("{}", "a photo of {}", "{} at night", "a photo of {} by the sea")
NAMES = {"van gogh": "a happy person", "snoopy": "dog"}  # fewer and more tokens than their anchors


def weights(pipe: object) -> dict[str, Tensor]:
    return {
        m.name: module_at(pipe, m).weight.detach().clone()
        for m in text_maps(pipe)
        if m.exact and m.kind in ("key", "value", "context")
    }


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def contexts(pipe: object, name: str, anchor: str) -> tuple[Tensor, Tensor]:
    """Pairs of one concept from the pipeline's own tokenizer and encoder, position by position."""
    width = pipe.tokenizer.model_max_length
    source, target = [], []
    for text in FEW:
        ids, hidden = [], []
        for prompt in (text.format(name), text.format(anchor)):
            out = pipe.tokenizer(prompt, padding="max_length", return_tensors="pt")
            ids.append(pipe.tokenizer(prompt)["input_ids"])
            with torch.no_grad():
                hidden.append(pipe.text_encoder(out["input_ids"]).last_hidden_state[0].double())
        one, two = per_layer.context(ids[0], ids[1], width)
        source.append(hidden[0][one])
        target.append(hidden[1][two])
    return torch.cat(source), torch.cat(target)


@pytest.mark.parametrize("hold", [True, False])
def test_equals_least_squares_layer_by_layer(hold: bool) -> None:
    pipe = tiny_sd(dtype=torch.float64)
    before, state = weights(pipe), pipe.unet.state_dict()
    old = {key: value.clone() for key, value in state.items()}
    eraser = MaceEraser.fit(
        pipe,
        erase=list(NAMES),
        anchor=list(NAMES.values()),
        preserve=["red car", "sea"],
        domain=["picasso"],
        preserve_weight=3.0,
        domain_weight=0.25,
        lam=0.2,
        templates=FEW,
        hold_blank=hold,
    )
    assert all(torch.equal(value, old[key]) for key, value in pipe.unet.state_dict().items())
    encoder = TextEncoder(pipe)
    parts = [contexts(pipe, name, anchor) for name, anchor in NAMES.items()]
    source, target = (torch.cat(rows) for rows in zip(*parts, strict=True))
    general, domain = (
        encoder.encode(names).embeddings.flatten(0, 1)
        for names in (["red car", "sea"], ["picasso"])
    )
    keep = torch.cat(
        [torch.full((len(general),), 3 / len(general)), torch.full((len(domain),), 0.25)]
    )
    with eraser.apply(pipe):
        after = weights(pipe)
    for name, weight in before.items():
        expected = per_layer.least_squares(
            weight,
            source,
            target,
            torch.ones(len(source), dtype=torch.float64),
            torch.cat([general, domain]),
            keep.double(),
            0.2,
            encoder.blank() if hold else None,
        )
        assert relative(after[name], expected) < 1e-8
    assert eraser.report["pairs"] == len(source)


@pytest.mark.parametrize("kind", sorted(TINY))
def test_every_pipeline(kind: str) -> None:
    pipe = TINY[kind](dtype=torch.float64)
    eraser = MaceEraser.fit(
        pipe, erase="van gogh", anchor="art", templates=FEW[:2], max_sequence_length=16
    )
    encoder = TextEncoder(pipe, max_sequence_length=16)
    blank = encoder.blank()
    assert float((eraser(blank) - blank).norm() / blank.norm()) <= 1e-6
    assert (eraser.pooled_map is None) == (kind == "sd")
    before = weights(pipe)
    with eraser.apply(pipe):
        assert any(not torch.equal(value, before[name]) for name, value in weights(pipe).items())
    assert all(torch.equal(value, before[name]) for name, value in weights(pipe).items())


def test_blank_picture_stays() -> None:
    pipe = tiny_sd(dtype=torch.float64)
    eraser = MaceEraser.fit(pipe, erase="van gogh", anchor="art", templates=FEW)
    blank, other = latents(pipe, ""), latents(pipe, "van gogh at night")
    with eraser.apply(pipe):
        assert relative(latents(pipe, ""), blank) <= 1e-6
        assert relative(latents(pipe, "van gogh at night"), other) > 1e-4


def test_concepts_come_and_go_and_files(tmp_path) -> None:
    pipe = tiny_sd()
    options = {"templates": FEW, "lam": 0.5, "preserve": ["dog"]}
    both = MaceEraser.fit(pipe, erase=["van gogh", "monet"], anchor="art", **options)
    one = MaceEraser.fit(pipe, erase="van gogh", anchor="art", **options)
    joined = one.add(pipe, "monet", "art")
    assert relative(joined.map.matrix, both.map.matrix) < 1e-8
    assert relative(both.withdraw("monet").map.matrix, one.map.matrix) < 1e-8
    loaded = Eraser.from_pretrained(both.save_pretrained(tmp_path / "mace"))
    assert isinstance(loaded, MaceEraser) and loaded.digest == both.digest


def test_many_pairs_are_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_sd()
    kept = MaceEraser.fit(pipe, erase=list(NAMES), anchor="art", templates=FEW)
    monkeypatch.setattr(mace, "KEPT_ROWS", 2)
    summed = MaceEraser.fit(pipe, erase=list(NAMES), anchor="art", templates=FEW)
    assert summed.source is None
    assert relative(summed.map.matrix, kept.map.matrix) < 1e-8
    with pytest.raises(EditError, match="not kept"):
        summed.withdraw("snoopy")


# -- fusion -------------------------------------------------------------------------------------


def loras(pipe: object, count: int) -> list[dict[str, Tensor]]:
    """Return random LoRAs of rank one on all text maps."""
    generator = torch.Generator().manual_seed(0)
    states: list[dict[str, Tensor]] = []
    for _ in range(count):
        state: dict[str, Tensor] = {}
        for name, weight in weights(pipe).items():
            state[f"unet.{name}.lora_A.weight"] = torch.randn(
                1, weight.shape[1], generator=generator
            )
            state[f"unet.{name}.lora_B.weight"] = torch.randn(len(weight), 1, generator=generator)
        states.append(state)
    return states


@pytest.mark.parametrize("count", [1, 2])
def test_fusion_equals_least_squares_layer_by_layer(count: int) -> None:
    pipe = tiny_sd(dtype=torch.float64)
    names = list(NAMES)[:count]
    eraser = MaceEraser.fit(
        pipe, erase=names, anchor="art", preserve=["dog"], templates=FEW, hold_blank=False
    )
    states = loras(pipe, count)
    merged = lora_layers(eraser.fuse(pipe, states, lam=0.3))
    encoder = TextEncoder(pipe)
    rows = [encoder.encode([t.format(n) for t in FEW]).embeddings.flatten(0, 1) for n in names]
    held = encoder.encode(["dog"]).embeddings[0]
    factor = (mace.DEFAULTS["preserve_weight"] / len(held)) ** 0.5
    for name, weight in weights(pipe).items():
        refined = weight @ eraser.map.matrix
        wanted = [refined + _product(lora_layers(state)[f"unet.{name}"]) for state in states]
        x = [*rows, factor * held, 0.3**0.5 * torch.eye(32, dtype=torch.float64)]
        y = [r @ w.T for r, w in zip(rows, wanted, strict=True)]
        y += [factor * held @ weight.T, 0.3**0.5 * refined.T]
        expected = torch.linalg.lstsq(torch.cat(x), torch.cat(y), driver="gelsd").solution.T
        assert relative(weight + _product(merged[f"unet.{name}"]), expected) < 1e-5  # float32 file


def _product(factors: tuple[Tensor, Tensor]) -> Tensor:
    return factors[0].double() @ factors[1].double()


def test_fused_lora_alone_is_refinement_and_lora_on_its_inputs() -> None:
    pipe = tiny_sd(dtype=torch.float64)
    eraser = MaceEraser.fit(pipe, erase="van gogh", anchor="art", templates=FEW, hold_blank=False)
    states = loras(pipe, 1)
    inputs = [torch.randn(60, 32, generator=torch.Generator().manual_seed(1))]
    merged = lora_layers(eraser.fuse(pipe, states, inputs))
    for name, weight in weights(pipe).items():
        expected = weight @ eraser.map.matrix + _product(lora_layers(states[0])[f"unet.{name}"])
        assert relative(weight + _product(merged[f"unet.{name}"]), expected) < 1e-5


def test_merged_loras_load_in_the_pipeline() -> None:
    pytest.importorskip("peft")
    pipe = tiny_sd()
    encoder = TextEncoder(pipe)
    states = loras(pipe, 2)
    inputs = [encoder.encode([t.format(name) for t in FEW]).embeddings for name in NAMES]
    merged = merge_loras(states, inputs, lam=0.1)
    before = weights(pipe)
    pipe.load_lora_weights(dict(merged))
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    factors = lora_layers(merged)
    for name, weight in before.items():
        moved = pipe.unet.get_submodule(name).weight.detach() - weight
        assert relative(moved, _product(factors[f"unet.{name}"]).float()) < 1e-4


def test_fusion_refuses() -> None:
    pipe = tiny_sd()
    eraser = MaceEraser.fit(pipe, erase="van gogh", anchor="art", templates=FEW)
    state = loras(pipe, 1)[0]
    with pytest.raises(ValueError, match="1 inputs need as many"):
        eraser.fuse(pipe, [state, state])
    extra = {
        "unet.conv.lora_A.weight": torch.ones(1, 32),
        "unet.conv.lora_B.weight": torch.ones(4, 1),
    }
    with pytest.raises(ValueError, match="no text maps"):
        eraser.fuse(pipe, [{**state, **extra}], lam=1.0)
    with pytest.raises(FormatError, match="no LoRA weight"):
        eraser.fuse(pipe, [{"x": torch.ones(2)}], lam=1.0)
    with eraser.apply(pipe), pytest.raises(EditError, match="in force"):
        eraser.fuse(pipe, [state], lam=1.0)


# -- options ------------------------------------------------------------------------------------


def test_paper_presets() -> None:
    pipe = tiny_sd()
    encoder = TextEncoder(pipe)
    captions = Preserve(32).update(torch.randn(200, 32, generator=torch.Generator().manual_seed(0)))
    found = MaceEraser.fit(
        pipe,
        erase=["van gogh", "monet"],
        preserve=captions,
        domain=["picasso"],
        templates=FEW,
        preset="paper",
        task="celebrity",
    )
    options = found.options
    assert options.lam == 0.0 and set(options.anchors) == {"a person"}
    assert options.domain_weight == pytest.approx(5.0)  # 5 concepts: 1e-4 * 5e4
    assert options.preserve_weight == pytest.approx(1e-4 * 617_000 * 77)
    domain = encoder.encode(["picasso"]).embeddings[0]
    expected = options.preserve_weight * captions.gram / 200 + 5 * domain.T @ domain
    assert relative(found.gram, expected) < 1e-12
    assert found.invariants is None
    objects = MaceEraser.fit(
        pipe, erase="dog", anchor="street", templates=FEW, preset="paper", task="object"
    )
    assert objects.options.lam == 100.0 and objects.gram is None
    with pytest.raises(ValueError, match="lam = 0"):
        MaceEraser.fit(pipe, erase="van gogh", templates=FEW, preset="paper", task="style")


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"erase": []}, ValueError, "empty"),
        ({"erase": [" "]}, ValueError, "no token"),
        ({"anchor": "van gogh"}, ValueError, "anchor equal"),
        ({"anchor": ["art", "dog"]}, ShapeError, "as many"),
        ({"preserve": ["Van Gogh"]}, ValueError, "preserve contains"),
        ({"domain": ["van  gogh"]}, ValueError, "preserve contains"),
        ({"templates": []}, ValueError, "list of texts"),
        ({"templates": ["no place"]}, ValueError, "one {}"),
        ({"templates": ["{} " + "dog " * 40]}, ValueError, "Shorten"),
        ({"lam": 0.0}, ValueError, "lam = 0"),
        ({"lam": -1.0}, ValueError, "lam"),
        ({"preset": "papers"}, ValueError, "preset"),
        ({"preset": "paper"}, ValueError, "needs a task"),
        ({"maps": ["query"]}, ValueError, "maps"),
    ],
)
def test_bad_input_leaves_the_pipeline(
    change: dict[str, object], error: type[Exception], words: str
) -> None:
    pipe = tiny_sd()
    before = weights(pipe)
    options: dict[str, object] = {"erase": "van gogh", "anchor": "art", "templates": FEW, **change}
    with pytest.raises(error, match=words):
        MaceEraser.fit(pipe, **options)
    assert all(torch.equal(value, before[name]) for name, value in weights(pipe).items())


def test_nan_weights_are_refused() -> None:
    pipe = tiny_sdxl()
    with torch.no_grad():
        module_at(pipe, text_maps(pipe)[0]).weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        MaceEraser.fit(pipe, erase="van gogh", anchor="art", templates=FEW)


def test_templates() -> None:
    assert check_templates(["a {}"]) == ("a {}",)
    for bad in ("a {}", [], ["{} {}"], ["{name}"], ["{}}"]):
        with pytest.raises(ValueError, match="template"):
            check_templates(bad)
    assert len(mace.TEMPLATES) == len(set(mace.TEMPLATES)) == 30
