import json
import math
import warnings

import pytest
import torch

from concept_erasure import registry
from concept_erasure.diffusion.core import Pairs, PairSums, Preserve, metric, solve
from concept_erasure.diffusion.encode import TextEncoder
from concept_erasure.diffusion.eraser import DiffusionConfig, DiffusionEraser, fit_eraser
from concept_erasure.diffusion.maps import denoiser, module_at, text_maps
from concept_erasure.edit import DensePatch, Edit, JointEdit
from concept_erasure.eraser import Eraser
from concept_erasure.errors import EditError, FormatError, ShapeError, SpaceError
from concept_erasure.linalg import LowRankAffine
from tests.diffusion.tiny import TINY, latents, tiny_sd

KINDS = tuple(TINY)
CONCEPTS, ANCHOR = ("van gogh", "monet", "picasso"), "art"
PROMPT = "a picture by van gogh"


class TextEdit(DiffusionEraser):
    method = "test-text-edit"


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    entry = registry.Method(
        name=TextEdit.method,
        family="diffusion",
        target=f"{__name__}:TextEdit",
        guarantees=frozenset(),
        summary="For tests.",
        paper="",
    )
    monkeypatch.setitem(registry.METHODS, entry.name, entry)
    monkeypatch.setattr(registry.Method, "load", lambda _: TextEdit)


def pairs_of(encoder, concepts, anchor=ANCHOR, weight=1.0):
    return Pairs.cat(
        [encoder.pairs([c], [anchor], weight=weight).numbered(k) for k, c in enumerate(concepts)]
    )


def make(pipe, concepts=CONCEPTS, *, weight=1.0, pooled=None, anchored=False, keep=("dog", "cat")):
    encoder = TextEncoder(pipe, max_sequence_length=16)
    blank = torch.cat(encoder.rows([""], "all"))
    pairs = pairs_of(encoder, concepts, weight=weight)
    held = torch.cat([blank[:4], pairs.target]) if anchored else blank[:4]
    kept = torch.cat(encoder.rows(list(keep), "last_subject"))
    options = {}
    if pooled is None:
        pooled = encoder.layout != "sd"
    if pooled:
        options["pooled_pairs"] = Pairs.cat(
            [encoder.pooled_pairs([c], [ANCHOR]).numbered(k) for k, c in enumerate(concepts)]
        )
        options["pooled_metric"] = metric(
            None,
            width=options["pooled_pairs"].width,
            lam=0.2,
            invariants=encoder.pooled([""]),
        )
    return fit_eraser(
        TextEdit,
        pipe,
        pairs,
        metric(Preserve(pairs.width).update(kept), width=pairs.width, lam=0.5, invariants=held),
        config=DiffusionConfig(concepts=tuple(concepts), anchors=(ANCHOR,) * len(concepts)),
        preserved=kept,
        blank=blank[:4],
        **options,
    )


@pytest.fixture(scope="module")
def fitted():
    pipe = tiny_sd()
    return pipe, make(pipe)


def state(pipe):
    found = {}
    for name in ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3"):
        module = getattr(pipe, name, None)
        if module is not None:
            found |= {f"{name}.{k}": v.clone() for k, v in module.state_dict().items()}
    return found


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_hook_lora_and_file_are_one_edit(kind, tmp_path):
    pipe = TINY[kind]()
    before = state(pipe)
    eraser = make(pipe)
    assert same(before, state(pipe))  # fit changes nothing
    plain = latents(pipe, PROMPT)
    made = {}
    for form in ("weights", "hook", "lora"):
        with eraser.apply(pipe, form=form) as edit:
            made[form] = latents(pipe, PROMPT)
            assert eraser.method in edit.summary()
        assert same(before, state(pipe))  # undo is bit-exact
    path = eraser.to_lora(pipe, tmp_path / "edit.safetensors")
    pipe.load_lora_weights(str(path))
    made["file"] = latents(pipe, PROMPT)
    pipe.unload_lora_weights()
    assert torch.equal(latents(pipe, PROMPT), plain)
    assert (made["weights"] - plain).abs().max() > 1e-3
    for form in ("hook", "lora", "file"):
        torch.testing.assert_close(made[form], made["weights"], atol=1e-5, rtol=1e-5)


def test_prompt_embeddings_can_be_edited_instead():
    pipe = tiny_sd(dtype=torch.float64)
    eraser = make(pipe)
    embeds = TextEncoder(pipe).encode([PROMPT, ""]).embeddings
    noisy = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        outside = pipe.unet(noisy, 10, encoder_hidden_states=eraser(embeds)).sample
        plain = pipe.unet(noisy, 10, encoder_hidden_states=embeds).sample
        with eraser.apply(pipe):
            folded = pipe.unet(noisy, 10, encoder_hidden_states=embeds).sample
    torch.testing.assert_close(folded, outside, atol=1e-12, rtol=1e-12)
    assert (folded - plain)[0].abs().max() > 1e-3


def test_the_blank_prompt_stays_if_all_its_positions_are_invariant():
    pipe = TINY["sdxl"]()  # wide enough for all 24 positions
    encoder = TextEncoder(pipe)
    blank = encoder.blank()
    pairs = pairs_of(encoder, CONCEPTS)
    held = metric(None, width=pairs.width, lam=0.5, invariants=blank)
    eraser = fit_eraser(
        TextEdit, pipe, pairs, held, config=DiffusionConfig(concepts=CONCEPTS), blank=blank
    )
    assert eraser.report["blank_drift"] < 1e-10
    plain = latents(pipe, "")
    with eraser.apply(pipe):
        assert (latents(pipe, "") - plain).abs().max() <= 1e-6 * plain.abs().max()
        assert (latents(pipe, PROMPT) - latents(pipe, "")).abs().max() > 1e-3


def test_each_weight_is_the_shared_edit():
    pipe = TINY["sdxl"](dtype=torch.float64)
    eraser = make(pipe)
    maps = [m for m in text_maps(pipe) if m.exact]
    before = {m.name: module_at(pipe, m).weight.detach().clone() for m in maps}
    with eraser.apply(pipe):
        for m in maps:
            now, old = module_at(pipe, m).weight.detach(), before[m.name]
            edit = eraser.pooled_map if m.kind == "pooled" else eraser.map
            expected = old.clone()
            expected[:, m.text_columns] = old[:, m.text_columns] @ edit.matrix
            torch.testing.assert_close(now, expected, atol=1e-10, rtol=1e-10)


def test_values_alone():
    pipe = tiny_sd()
    eraser = make(pipe)
    values = TextEdit(
        **eraser.tensors(),
        config=DiffusionConfig(concepts=CONCEPTS, maps=("value",)),
        space=eraser.space,
    )
    with values.apply(pipe) as edit:
        assert {name.rpartition(".")[0][-4:] for name in edit.targets} == {"to_v"}
        assert len(edit.targets) == 4
    with pytest.raises(ValueError, match="'key', 'value' or both"):
        DiffusionConfig(maps=("query",))


def test_an_edit_wider_than_a_third_is_the_same_edit():
    pipe = tiny_sd(dtype=torch.float64)
    words = ["dog", "cat", "horse", "bird", "fish", "car", "truck", "river", "city", "tree", "sea"]
    encoder = TextEncoder(pipe)
    pairs = pairs_of(encoder, words)
    held = metric(None, width=32, lam=0.5)
    forms = []
    for form in ("dual", "primal"):
        eraser = fit_eraser(
            TextEdit,
            pipe,
            pairs,
            held,
            edit=solve(pairs, held, form),
            config=DiffusionConfig(concepts=tuple(words)),
        )
        for way in ("weights", "hook", "lora"):
            with eraser.apply(pipe, form=way):
                forms.append(latents(pipe, PROMPT))
    for other in forms[1:]:
        torch.testing.assert_close(other, forms[0], atol=1e-9, rtol=1e-9)


def test_duplicates_are_refused_in_any_form(fitted, tmp_path):
    pipe, eraser = fitted
    eraser.save_pretrained(tmp_path / "small", apply_only=True)
    small = Eraser.from_pretrained(tmp_path / "small")
    with eraser.apply(pipe):
        for form in ("weights", "hook", "lora"):
            with pytest.raises(EditError, match="in force"):
                eraser.apply(pipe, form=form)
        with pytest.raises(EditError, match="in force"):
            small.apply(pipe)
        other = eraser.withdraw("monet")
        with other.apply(pipe):
            pass
    with pytest.raises(ValueError, match="'weights', 'hook' or 'lora'"):
        eraser.apply(pipe, form="dense")
    for form in ("hook", "lora"):
        with eraser.apply(pipe, form=form) as edit, pytest.raises(EditError, match="commit"):
            edit.commit()


def test_another_text_encoder_is_refused(fitted, tmp_path):
    _, eraser = fitted
    other, wide = tiny_sd(seed=1), TINY["sdxl"]()
    before = state(other)
    for pipe in (other, wide):
        with pytest.raises(SpaceError, match="Fit it again"):
            eraser.apply(pipe)
        with pytest.raises(SpaceError, match="Fit it again"):
            eraser.to_lora(pipe, tmp_path / "x.safetensors")
        with pytest.raises(SpaceError, match="Fit it again"):
            eraser.add(pipe, "dog", "cat")
    assert same(before, state(other))
    with pytest.raises(ShapeError, match="width"):
        eraser.with_space(None).apply(wide)
    with eraser.with_space(None).apply(other):
        pass
    other.text_encoder = None
    with pytest.raises(SpaceError, match="cannot be compared"):
        eraser.apply(other)
    # one encoder, another denoiser: the edit carries over
    first = tiny_sd()
    first.unet = other.unet
    with eraser.apply(first):
        pass


def test_save_and_load(fitted, tmp_path):
    pipe, eraser = fitted
    eraser.save_pretrained(tmp_path / "whole")
    loaded = Eraser.from_pretrained(tmp_path / "whole")
    assert isinstance(loaded, TextEdit)
    assert loaded.digest == eraser.digest
    assert loaded.config == eraser.config
    assert repr(loaded.certificate) == repr(eraser.certificate)
    with eraser.apply(pipe):
        expected = latents(pipe, PROMPT)
    with loaded.apply(pipe):
        assert torch.equal(latents(pipe, PROMPT), expected)
    torch.testing.assert_close(
        loaded.withdraw("monet").map.matrix, eraser.withdraw("monet").map.matrix
    )
    eraser.save_pretrained(tmp_path / "small", apply_only=True)
    small = Eraser.from_pretrained(tmp_path / "small")
    assert set(small.tensors()) == {"left", "right"}
    with small.apply(pipe):
        torch.testing.assert_close(latents(pipe, PROMPT), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(EditError, match="not kept"):
        small.withdraw("monet")


def test_an_apply_only_file_of_one_concept_is_small(tmp_path):
    width = 768
    generator = torch.Generator().manual_seed(0)
    source, target = torch.randn(2, 1, width, generator=generator, dtype=torch.float64)
    held = metric(torch.eye(width, dtype=torch.float64), width=width, lam=0.5)
    edit = solve(Pairs(source, target), held)
    eraser = TextEdit(
        edit.left,
        edit.right,
        source,
        target,
        gram=held.gram,
        config=DiffusionConfig(concepts=("van gogh",), anchors=("art",)),
    )
    folder = eraser.save_pretrained(tmp_path, apply_only=True)
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 10_000


def test_a_damaged_file_is_refused(fitted, tmp_path):
    _, eraser = fitted
    folder = eraser.save_pretrained(tmp_path)
    path = folder / "eraser_config.json"
    record = json.loads(path.read_text())
    for change in ({"maps": ["query"]}, {"layers": ["x"], "layer_rows": [3]}, {"lam": "high"}):
        path.write_text(json.dumps({**record, "config": {**record["config"], **change}}))
        with pytest.raises(FormatError):
            Eraser.from_pretrained(folder)


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
@pytest.mark.parametrize("weight", [1.0, math.inf])
def test_add_and_withdraw_are_joint_solves(kind, weight):
    pipe = TINY[kind](dtype=torch.float64)
    three, two = make(pipe, weight=weight), make(pipe, CONCEPTS[:2], weight=weight)
    fewer = three.withdraw("picasso", pipe=pipe)
    torch.testing.assert_close(fewer.map.matrix, two.map.matrix, atol=1e-9, rtol=1e-9)
    more = two.add(pipe, "picasso", ANCHOR)
    torch.testing.assert_close(more.map.matrix, three.map.matrix, atol=1e-9, rtol=1e-9)
    assert more.concepts == three.concepts
    assert more.config == three.config
    if kind == "sdxl":
        pooled = more.pooled_map.matrix
        torch.testing.assert_close(pooled, three.pooled_map.matrix, atol=1e-9, rtol=1e-9)
    first = three.withdraw("van gogh")
    again = first.add(pipe, "van gogh", ANCHOR)
    assert again.concepts == ("monet", "picasso", "van gogh")
    torch.testing.assert_close(again.map.matrix, three.map.matrix, atol=1e-9, rtol=1e-9)
    for key in ("residual", "rank", "free_dimensions", "edit_size"):
        assert fewer.report[key] == pytest.approx(two.report[key], rel=1e-6, abs=1e-9)
    assert fewer.certificate.names == CONCEPTS[:2]


def test_add_and_withdraw_refuse_what_they_cannot_do(fitted):
    pipe, eraser = fitted
    with pytest.raises(KeyError, match="no concept 'dog'"):
        eraser.withdraw("dog")
    with pytest.raises(ValueError, match="already"):
        eraser.add(pipe, "monet", "art")
    with pytest.raises(ValueError, match="no concept would be left"):
        eraser.withdraw("monet").withdraw("picasso").withdraw("van gogh")
    with pytest.raises(ValueError, match="given twice"):
        DiffusionConfig(concepts=("a", "a"))
    with pytest.raises(ValueError, match="as many anchors"):
        DiffusionConfig(concepts=("a", "b"), anchors=("c",))


def test_concepts_that_share_an_exact_anchor_become_one():
    pipe = tiny_sd(dtype=torch.float64)
    eraser = make(pipe, CONCEPTS[:2], weight=math.inf)
    one, two = eraser.source
    # their difference goes to zero, so the edit is singular and the certificate above zero
    assert eraser(one - two).norm() < 1e-10 * one.norm()
    assert eraser.certificate.rho.min() > 0


def test_pairs_that_are_summed_are_not_kept(fitted):
    pipe, eraser = fitted
    pairs = eraser._pairs("")
    held = metric(eraser.gram, width=32, lam=0.5, invariants=eraser.invariants)
    summed = fit_eraser(TextEdit, pipe, PairSums(32).update(pairs), held, config=eraser.config)
    torch.testing.assert_close(summed.map.matrix, eraser.map.matrix, atol=1e-10, rtol=1e-10)
    with pytest.raises(EditError, match="not kept"):
        summed.withdraw("monet")
    with pytest.raises(EditError, match="no certificate"):
        _ = summed.certificate


def test_layers_with_edits_of_their_own(tmp_path):
    pipe = tiny_sd()
    eraser = make(pipe)
    maps = text_maps(pipe)
    generator = torch.Generator().manual_seed(3)
    layers = {}
    for k, m in enumerate(maps[:3]):
        out = module_at(pipe, m).out_features
        layers[m.name] = (
            torch.randn(out, k + 1, generator=generator).double() / 10,
            torch.randn(32, k + 1, generator=generator).double(),
        )
    held = metric(eraser.gram, width=32, lam=0.5, invariants=eraser.invariants)
    own = fit_eraser(TextEdit, pipe, eraser._pairs(""), held, config=eraser.config, layers=layers)
    before = {m.name: module_at(pipe, m).weight.detach().clone() for m in maps}
    made = {}
    for form in ("weights", "hook", "lora"):
        with own.apply(pipe, form=form):
            made[form] = latents(pipe, PROMPT)
            if form == "weights":
                for m in maps:
                    expected = before[m.name] @ own.map.matrix.float()
                    if m.name in layers:
                        up, down = layers[m.name]
                        expected = expected + (up @ down.T).float()
                    torch.testing.assert_close(module_at(pipe, m).weight.detach(), expected)
    pipe.load_lora_weights(str(own.to_lora(pipe, tmp_path / "own.safetensors")))
    made["file"] = latents(pipe, PROMPT)
    pipe.unload_lora_weights()
    for form in ("hook", "lora", "file"):
        torch.testing.assert_close(made[form], made["weights"], atol=1e-5, rtol=1e-5)
    own.save_pretrained(tmp_path / "own", apply_only=True)
    with Eraser.from_pretrained(tmp_path / "own").apply(pipe):
        torch.testing.assert_close(latents(pipe, PROMPT), made["weights"], atol=1e-5, rtol=1e-5)
    with pytest.raises(EditError, match="differs by layer"):
        own(torch.zeros(1, 32))
    with pytest.raises(EditError, match="differs by layer"):
        own.withdraw("monet")
    found = own.certificate
    assert found.names == eraser.concepts and bool((found.rho >= 0).all())


def test_the_report(fitted):
    _, eraser = fitted
    report = eraser.report
    assert report["concepts"] == 3
    assert report["rank"] == 3
    assert report["free_dimensions"] == 32 - 4
    assert report["blank_drift"] < 1e-12
    assert 0 < report["preserved_drift_rms"] <= report["preserved_drift_max"] < 1
    assert report["changed_entries"] > 0.9
    assert report["weight_dtype"] == "float32"
    change = eraser.map.matrix - torch.eye(32)
    assert report["edit_size"] == pytest.approx(float(change.norm()))
    assert eraser.certificate.rho.tolist() == [0, 0, 0]
    assert "certificate" in eraser.card()


def test_an_anchored_projection_has_a_certificate():
    pipe = tiny_sd()
    eraser = make(pipe, weight=math.inf, anchored=True)
    assert eraser.map.is_projection(1e-10)
    assert eraser.report["residual"] < 1e-10
    assert 0 < eraser.certificate.rho.min() <= eraser.certificate.rho.max() <= 1
    assert "certificate" not in eraser.withdraw("monet").report  # H needs the pipeline
    again = eraser.withdraw("monet", pipe=pipe)
    assert again.certificate.rho.min() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype):
    full, half = tiny_sd(), tiny_sd()
    eraser = make(full)
    half.unet.to(dtype)
    small = TextEdit(eraser.left * 1e-3, eraser.right, config=DiffusionConfig(concepts=CONCEPTS))
    names = [f"{m.name}.weight" for m in text_maps(half)]
    before = {name: half.unet.get_parameter(name).detach().clone() for name in names}
    with small.apply(half) as edit:
        for name in names:
            wide = before[name].float()
            expected = (wide @ small.map.matrix.float()).to(dtype)
            now = half.unet.get_parameter(name).detach()
            assert (now != expected).float().mean() < 0.01  # ties may fall to either side
        shares = [patch.share_changed for patch in edit.patches]
        assert max(shares) < 0.9  # the rest is below the rounding of the weight
        assert "of the entries changed" in edit.summary()
    module = half.unet.get_submodule(names[0].removesuffix(".weight"))
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(2)).to(dtype)
    expected = x.double() @ (before[names[0]].double() @ small.map.matrix).T
    error = {}
    for form in ("weights", "lora"):
        with small.apply(half, form=form), torch.no_grad():
            error[form] = float((module(x).double() - expected).norm())
    assert error["lora"] <= error["weights"] * 1.5
    for name in names:
        assert torch.equal(half.unet.get_parameter(name), before[name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_denoisers_dtype_does_not_change_the_edit(dtype, fitted):
    pipe = tiny_sd()
    pipe.unet.to(dtype)
    other = make(pipe)
    assert other.left.dtype == torch.float64
    assert torch.equal(other.left, fitted[1].left)
    assert torch.equal(other.right, fitted[1].right)


def test_refusals_leave_the_pipeline_untouched(fitted):
    pipe = tiny_sd()
    eraser = fitted[1]
    name = f"{text_maps(pipe)[-1].name}.weight"
    with torch.no_grad():
        pipe.unet.get_parameter(name)[0, 0] = math.nan
    before = {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    with pytest.raises(EditError, match="not finite"):
        eraser.apply(pipe)
    for key, value in pipe.unet.state_dict().items():
        assert torch.equal(value, before[key]) or key == name
    with pytest.raises(ValueError, match="is not finite; load the pipeline again"):
        make(pipe)
    held = metric(None, width=31, lam=0.5)
    with pytest.raises(ShapeError, match="the metric has 31"):
        fit_eraser(
            TextEdit,
            tiny_sd(),
            Pairs(torch.ones(1, 31), torch.zeros(1, 31)),
            held,
            config=DiffusionConfig(concepts=("a",)),
        )


class Packed(torch.nn.Parameter):
    """Stands for a quantised weight: a parameter of another type."""


def test_quantised_weights_need_another_form(fitted, tmp_path):
    pipe, eraser = tiny_sd(), fitted[1]
    with eraser.apply(pipe):
        expected = latents(pipe, PROMPT)
    maps = text_maps(pipe)
    for m in maps:
        module = module_at(pipe, m)
        module.weight = Packed(module.weight.detach().clone(), requires_grad=False)
    with pytest.raises(EditError, match="quantised"):
        eraser.apply(pipe)
    for form in ("hook", "lora"):
        with eraser.apply(pipe, form=form):
            torch.testing.assert_close(latents(pipe, PROMPT), expected, atol=1e-5, rtol=1e-5)
    path = eraser.to_lora(pipe, tmp_path / "edit.safetensors")
    plain = tiny_sd()
    plain.load_lora_weights(str(path))
    torch.testing.assert_close(latents(plain, PROMPT), expected, atol=1e-5, rtol=1e-5)
    assert "changed_entries" not in make(pipe).report


def test_an_active_adapter_needs_another_form(fitted, tmp_path):
    pipe, eraser = tiny_sd(), fitted[1]
    path = eraser.withdraw("monet").to_lora(pipe, tmp_path / "other.safetensors")
    pipe.load_lora_weights(str(path))
    with pytest.raises(EditError, match="adapter is active"):
        eraser.apply(pipe)
    plain = latents(pipe, PROMPT)
    made = {}
    for form in ("hook", "lora"):
        with eraser.apply(pipe, form=form):
            made[form] = latents(pipe, PROMPT)
    assert (made["hook"] - plain).abs().max() > 1e-4
    assert torch.equal(latents(pipe, PROMPT), plain)
    pipe.unload_lora_weights()


def test_lora_files_refuse_bad_names(fitted, tmp_path):
    pipe, eraser = fitted
    with pytest.raises(ValueError, match="ends in .safetensors"):
        eraser.to_lora(pipe, tmp_path / "edit.bin")
    with pytest.raises(ValueError, match="floating"):
        eraser.to_lora(pipe, tmp_path / "edit.safetensors", dtype=torch.int8)
    with eraser.apply(pipe), pytest.raises(EditError, match="undo"):
        eraser.to_lora(pipe, tmp_path / "edit.safetensors")
    half = eraser.to_lora(pipe, tmp_path / "half.safetensors", dtype=torch.float16)
    whole = eraser.to_lora(pipe, tmp_path / "whole.safetensors")
    assert half.stat().st_size < whole.stat().st_size


def test_a_pooled_edit_needs_a_pooled_path(fitted):
    _, eraser = fitted
    made = TextEdit(
        eraser.left,
        eraser.right,
        pooled_left=torch.ones(4, 1),
        pooled_right=torch.ones(4, 1),
        config=DiffusionConfig(concepts=CONCEPTS),
    )
    with pytest.raises(EditError, match="pooled vectors, which"):
        made.apply(tiny_sd())


def test_an_edit_of_two_models_is_one_transaction(fitted):
    pipe, eraser = tiny_sd(), fitted[1]
    before = state(pipe)
    table = "embeddings.token_embedding.weight"

    def parts(value):
        unet = [t.patches("weights")[0] for t in eraser._targets(pipe)]
        return [(pipe.unet, unet), (pipe.text_encoder, [DensePatch(table, value)])]

    value = pipe.text_encoder.get_parameter(table).detach() * 2
    with JointEdit(parts(value), label="both", key="k") as edit:
        assert isinstance(edit, Edit)
        assert edit.active
        assert len(edit.patches) == 9
        assert edit.summary().count("both (applied)") == 2
        assert not same(before, state(pipe))
        with pytest.raises(EditError, match="in force"):
            JointEdit(parts(value), label="again", key="k")
        with eraser.apply(pipe), pytest.raises(EditError, match="last in, first out"):
            edit.undo()
        assert edit.active
    assert same(before, state(pipe))
    with pytest.raises(EditError, match="not finite"):
        JointEdit(parts(value * math.nan), label="bad")
    assert same(before, state(pipe))
    with pytest.raises(EditError, match="nothing to change"):
        JointEdit([(pipe.unet, [])])
    edit = JointEdit(parts(value), label="kept")
    edit.commit()
    with pytest.raises(EditError, match="committed"):
        edit.undo()
    assert "JointEdit('kept', models=2" in repr(edit)


def test_erased_embeddings_keep_dtype_and_shape(fitted):
    _, eraser = fitted
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        x = torch.ones(2, 3, 32, dtype=dtype)
        assert eraser(x).dtype == dtype
        assert eraser(x).shape == x.shape
    with pytest.raises(ShapeError):
        eraser(torch.ones(2, 31))
    assert isinstance(eraser.map, LowRankAffine)
    assert "cross_attention" in repr(eraser)
    assert eraser.to(dtype=torch.float32).left.dtype == torch.float32
    assert denoiser(fitted[0]) is fitted[0].unet
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        eraser.to(dtype=torch.float32)(torch.ones(1, 32))
