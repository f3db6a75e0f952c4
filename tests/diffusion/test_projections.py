"""Erasers of vectors in pipelines: hook, fold and encoder agree; what cannot be exact is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from concept_erasure import (
    InlpEraser,
    LeaceEraser,
    MeanProjectionEraser,
    RepresentationEraser,
    RlaceEraser,
)
from concept_erasure.diffusion.encode import TextEncoder, text_representations
from concept_erasure.diffusion.maps import denoiser, text_encoders, text_maps
from concept_erasure.diffusion.projections import without_offset
from concept_erasure.eraser import Eraser
from concept_erasure.errors import EditError, FormatError, ShapeError, SiteNotFoundError, SpaceError
from concept_erasure.linalg import LowRankAffine
from tests.diffusion.tiny import TINY, latents, tiny_flux, tiny_sd, tiny_sd3, tiny_sdxl

PLACES = ("dog", "person", "sky", "red car")
POSITIVE = [f"a {place} by van gogh" for place in PLACES]
NEGATIVE = [f"a {place} by artist" for place in PLACES]
PROMPT = "a starry night by van gogh"
T5 = 16  # what `latents` runs with


def _fit(pipe: Any, *, affine: bool = True, **options: Any) -> LeaceEraser:
    reps = text_representations(pipe, POSITIVE, NEGATIVE, max_sequence_length=T5, **options)
    return LeaceEraser.fit(reps, affine=affine)


def _bits(pipe: Any) -> dict[str, Tensor]:
    parts = {**text_encoders(pipe), "denoiser": denoiser(pipe)}
    return {f"{n}.{k}": v.clone() for n, m in parts.items() for k, v in m.state_dict().items()}


def _check_undone(pipe: Any, before: dict[str, Tensor], picture: Tensor) -> None:
    after = _bits(pipe)
    assert list(after) == list(before)
    assert all(torch.equal(after[k], before[k]) for k in before)
    assert torch.equal(latents(pipe, PROMPT), picture)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_encoder_hook_and_fold_make_one_picture(
    kind: str, affine: bool, dtype: torch.dtype
) -> None:
    pipe = TINY[kind](dtype=dtype)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-10
    eraser = _fit(pipe, affine=affine)
    before, picture = _bits(pipe), latents(pipe, PROMPT)
    with eraser.apply(pipe, sites="text_encoder"):
        want = latents(pipe, PROMPT)
    assert float((want - picture).abs().max()) > 2e-3
    with eraser.attach(pipe, sites="cross_attention"):
        torch.testing.assert_close(latents(pipe, PROMPT), want, rtol=0, atol=tolerance)
    if kind == "sdxl" and affine:
        with pytest.raises(
            EditError, match=r"zeros for the missing negative.*attach\(\).*affine=False"
        ):
            eraser.apply(pipe, sites="cross_attention")
    else:
        with eraser.apply(pipe, sites="cross_attention") as edit:
            torch.testing.assert_close(latents(pipe, PROMPT), want, rtol=0, atol=tolerance)
            assert "leace at cross_attention" in edit.summary()
    _check_undone(pipe, before, picture)


@pytest.mark.parametrize("kind", ["sdxl", "sd3", "flux"])
def test_pooled(kind: str) -> None:
    pipe = TINY[kind](dtype=torch.float64)
    eraser = _fit(pipe, site="pooled", affine=kind != "sdxl")
    before, picture = _bits(pipe), latents(pipe, PROMPT)
    with eraser.attach(pipe):
        want = latents(pipe, PROMPT)
    assert not torch.allclose(want, picture, atol=1e-4)
    with eraser.apply(pipe):
        torch.testing.assert_close(latents(pipe, PROMPT), want, rtol=0, atol=1e-10)
    _check_undone(pipe, before, picture)
    with pytest.raises(SpaceError, match=r"fitted at 'pooled'.*not those at 'text_encoder'"):
        eraser.apply(pipe, sites="text_encoder")
    if kind == "sdxl":
        with pytest.raises(EditError, match=r"zeros.*attach\(\)"):
            _fit(pipe, site="pooled").apply(pipe)


def test_zeros_of_guidance_stay_under_a_hook() -> None:
    """SDXL's missing negative prompt is zeros in both spaces; an affine eraser leaves them alone."""
    pipe = tiny_sdxl()
    eraser, pooled = _fit(pipe), _fit(pipe, site="pooled")
    seen: list[Tensor] = []
    module = pipe.unet.get_submodule(text_maps(pipe)[0].name)
    for model in (module, pipe.unet.add_embedding.linear_1):
        model.register_forward_hook(lambda _, args, __: seen.append(args[0]) or None)
    with eraser.attach(pipe), pooled.attach(pipe):
        latents(pipe, PROMPT, steps=1)
    for x, width in zip(sorted(seen, key=lambda t: -t.ndim), (80, 40), strict=True):
        assert bool((x[0, ..., :width] == 0).all())
        assert bool((x[1, ..., :width] != 0).any())
    pipe.register_to_config(force_zeros_for_empty_prompt=False)
    with pytest.raises(EditError, match="not made by a layer norm"):
        eraser.apply(pipe, sites="cross_attention")
    with eraser.attach(pipe, sites="cross_attention"):
        want = latents(pipe, PROMPT)
    with eraser.apply(pipe, sites="cross_attention", bias="add"):
        torch.testing.assert_close(latents(pipe, PROMPT), want, rtol=0, atol=1e-4)
    assert all(module.bias is None for module in [pipe.unet.get_submodule(text_maps(pipe)[0].name)])


@pytest.mark.parametrize("make", [tiny_sd, tiny_sdxl])
def test_token_embedding(make: Any) -> None:
    pipe = make(dtype=torch.float64)
    eraser = _fit(pipe, site="token_embedding")
    before, picture = _bits(pipe), latents(pipe, PROMPT)
    with eraser.attach(pipe):
        want = latents(pipe, PROMPT)
    assert not torch.allclose(want, picture, atol=1e-6)
    with eraser.apply(pipe):
        torch.testing.assert_close(latents(pipe, PROMPT), want, rtol=0, atol=1e-10)
    _check_undone(pipe, before, picture)


def test_tied_tables_are_attached_only() -> None:
    pipe = tiny_flux()
    eraser = _fit(pipe, site="token_embedding_2")
    with eraser.attach(pipe):
        pass
    with pytest.raises(EditError, match=r"tied"):
        eraser.apply(pipe)


@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize("rule", ["all", "all_but_sot", "last_subject", "eot_and_pads"])
def test_a_fitted_projection_guards_what_it_was_fitted_on(kind: str, rule: str) -> None:
    pipe = TINY[kind](dtype=torch.float64)
    reps = text_representations(pipe, POSITIVE, NEGATIVE, rule=rule, max_sequence_length=T5)
    assert reps.z is not None
    for fitted in (LeaceEraser.fit(reps), MeanProjectionEraser.fit(reps)):
        x, z = fitted(reps).x, torch.as_tensor(reps.z) == 1
        gap = (x[z].mean(0) - x[~z].mean(0)).norm()
        assert float(gap) < 1e-9 * float((reps.x[z].mean(0) - reps.x[~z].mean(0)).norm())


@pytest.mark.parametrize("kind", [MeanProjectionEraser, RlaceEraser, InlpEraser])
def test_the_other_projections_too(kind: type[RepresentationEraser]) -> None:
    pipe = tiny_sd()
    eraser = kind.fit(text_representations(pipe, POSITIVE, NEGATIVE))  # type: ignore[attr-defined]
    with eraser.apply(pipe):
        want = latents(pipe, PROMPT)
    with eraser.apply(pipe, sites="cross_attention"):
        torch.testing.assert_close(latents(pipe, PROMPT), want, rtol=0, atol=1e-4)


def test_the_encoder_shows_the_hook() -> None:
    pipe = tiny_sd()
    eraser = _fit(pipe)
    plain = TextEncoder(pipe).encode([PROMPT]).embeddings
    with eraser.apply(pipe):
        torch.testing.assert_close(
            TextEncoder(pipe).encode([PROMPT]).embeddings, eraser(plain), rtol=1e-5, atol=1e-5
        )


def test_offsets_through_a_layer_norm() -> None:
    """Section 4 (iii): exact for outputs of the norm, idempotent for LEACE fitted on them."""
    pipe = tiny_sd(dtype=torch.float64)
    eraser, norm = _fit(pipe), pipe.text_encoder.final_layer_norm
    linear = without_offset(eraser.map, norm)
    x = TextEncoder(pipe).encode([PROMPT, "", "a happy old cat"]).embeddings
    torch.testing.assert_close(linear(x), eraser(x), rtol=0, atol=1e-11)
    assert linear.center is None
    assert linear.is_projection(1e-6)
    # an arbitrary direction is carried as well, but the map is no projection then
    left = torch.ones(32, 1, dtype=torch.float64) / 32
    other = LowRankAffine(left, torch.ones(32, 1, dtype=torch.float64), torch.ones(32).double())
    torch.testing.assert_close(without_offset(other, norm)(x), other(x), rtol=0, atol=1e-11)
    assert not without_offset(other, norm).is_projection()


def test_offsets_are_refused_where_the_norm_cannot_carry_them() -> None:
    pipe = tiny_sd()
    eraser, norm = _fit(pipe), pipe.text_encoder.final_layer_norm
    plain = nn.LayerNorm(32)
    with pytest.raises(EditError, match=r"sum\(shift / gain\) is 0"):
        without_offset(eraser.map, plain)
    with pytest.raises(EditError, match="without zeros"):
        without_offset(eraser.map, nn.LayerNorm(32, elementwise_affine=False))
    gain = nn.LayerNorm(32)
    with torch.no_grad():
        gain.weight[3] = 0
    with pytest.raises(EditError, match="without zeros"):
        without_offset(eraser.map, gain)
    with torch.no_grad():
        norm.bias.sub_((norm.bias / norm.weight).sum() * norm.weight / 32)
    balanced = eraser.with_space(None)
    before = _bits(pipe)
    with pytest.raises(EditError, match=r"attach\(\).*affine=False.*bias='add'"):
        balanced.apply(pipe, sites="cross_attention")
    with balanced.attach(pipe, sites="cross_attention"):
        want = latents(pipe, PROMPT)
    with balanced.apply(pipe, sites="cross_attention", bias="add") as edit:
        torch.testing.assert_close(latents(pipe, PROMPT), want, rtol=0, atol=1e-4)
        assert "in memory only" in edit.summary()
    assert list(_bits(pipe)) == list(before)


def test_half_precision_wants_a_larger_sum() -> None:
    pipe = tiny_sd()
    function, norm = _fit(pipe).map, nn.LayerNorm(32)
    with torch.no_grad():
        norm.bias.fill_(1e-3)
    without_offset(function, norm, torch.float32)
    with pytest.raises(EditError, match="bfloat16"):
        without_offset(function, norm, torch.bfloat16)


def test_traps_of_the_fold() -> None:
    peft = pytest.importorskip("peft")
    pipe = tiny_sd()
    eraser = _fit(pipe)
    pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_k", "to_v"]))
    with pytest.raises(EditError, match="adapter is active"):
        eraser.apply(pipe, sites="cross_attention")
    with eraser.attach(pipe, sites="cross_attention"):
        want = latents(pipe, PROMPT)
    pipe.unet.disable_adapters()  # fresh adapters add nothing
    with eraser.apply(pipe, sites="cross_attention"):
        torch.testing.assert_close(latents(pipe, PROMPT), want, rtol=0, atol=1e-4)
    pipe = tiny_sd()
    module = pipe.unet.get_submodule(text_maps(pipe)[0].name)
    module.weight = nn.Parameter(module.weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(EditError, match="quantised"):
        eraser.apply(pipe, sites="cross_attention")
    with eraser.attach(pipe, sites="cross_attention"):
        pass
    pipe = tiny_sd()
    with torch.no_grad():
        pipe.unet.fuse_qkv_projections()
    with pytest.raises(EditError, match="fused"):
        eraser.apply(pipe, sites="cross_attention")
    with eraser.apply(pipe, sites="text_encoder"):  # needs no text map
        torch.testing.assert_close(latents(pipe, PROMPT), want, rtol=0, atol=1e-4)


def test_spaces_are_enforced() -> None:
    pipe = tiny_sd()
    eraser = _fit(pipe)
    with pytest.raises(SpaceError, match=r"fitted on the text encoders of CLIPTextModel"):
        eraser.apply(tiny_sd(seed=1))
    with pytest.raises(SpaceError):
        eraser.attach(tiny_sdxl(), sites="cross_attention")
    with pytest.raises(ShapeError, match="width 80; the eraser has width 32"):
        eraser.with_space(None).attach(tiny_sdxl(), sites="cross_attention")
    with pytest.raises(SpaceError, match="not those at 'token_embedding'"):
        eraser.apply(pipe, sites="token_embedding")
    with pytest.raises(SiteNotFoundError, match="reads no pooled"):
        eraser.with_space(None).apply(pipe, sites="pooled")
    with pytest.raises(SiteNotFoundError, match=r"has the sites text_encoder.*pipe\.text_encoder"):
        eraser.apply(pipe, sites="norm.final")
    with pytest.raises(SiteNotFoundError, match="one site at a time"):
        eraser.apply(pipe, sites=["text_encoder", "cross_attention"])
    with pytest.raises(SpaceError, match="bare tensors"):
        eraser.with_space(None).apply(pipe)
    with pytest.raises(ValueError, match="'auto', 'add' or 'refuse'"):
        eraser.apply(pipe, bias="maybe")  # type: ignore[arg-type]
    with pytest.raises(SiteNotFoundError, match="no text_encoder_2"):
        eraser.with_space(None).apply(pipe, sites="token_embedding_2")


def test_once_at_a_place() -> None:
    pipe = tiny_sd()
    eraser = _fit(pipe)
    with eraser.attach(pipe):
        with pytest.raises(EditError, match="in force"):
            eraser.apply(pipe)
        with eraser.apply(pipe, sites="cross_attention"):  # it has no effect, and does no harm
            pass
    with eraser.apply(pipe, sites="cross_attention"), pytest.raises(EditError, match="in force"):
        eraser.to(dtype=torch.float32).apply(pipe, sites="cross_attention")


def test_saved_with_the_space(tmp_path: Path) -> None:
    pipe = tiny_sd()
    for rule in ("all", "last_subject", "eot_and_pads"):
        eraser = _fit(pipe, rule=rule)
        again = Eraser.from_pretrained(eraser.save_pretrained(tmp_path / rule))
        assert again.space == eraser.space
    assert eraser.space is not None
    strange = eraser.with_space(replace(eraser.space, tokens="mean"))
    with pytest.raises(FormatError, match="must be one of last_subject"):
        Eraser.from_pretrained(strange.save_pretrained(tmp_path / "strange"))
    language = eraser.with_space(replace(eraser.space, site="residual.1"))
    with pytest.raises(FormatError, match="must be one of last, first"):
        Eraser.from_pretrained(language.save_pretrained(tmp_path / "language"))


def test_an_argument_given_by_position() -> None:
    pipe = tiny_sd()
    eraser = _fit(pipe)
    sample, time = torch.zeros(1, 4, 8, 8), torch.tensor(3)
    text = TextEncoder(pipe).encode([PROMPT]).embeddings.float()
    with torch.no_grad(), eraser.attach(pipe, sites="cross_attention"):
        one = pipe.unet(sample, time, text).sample
        two = pipe.unet(sample, time, encoder_hidden_states=text).sample
    assert torch.equal(one, two)
    with torch.no_grad():
        torch.testing.assert_close(one, pipe.unet(sample, time, eraser(text)).sample)


def test_sd3_without_t5_is_given_zeros() -> None:
    pipe = tiny_sd3()
    eraser = _fit(pipe).with_space(None)
    pipe.text_encoder_3 = None
    with pytest.raises(EditError, match="missing text_encoder_3"):
        eraser.apply(pipe, sites="cross_attention")


@pytest.mark.slow
def test_a_real_small_pipeline(emoji: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(emoji, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    words = ("flat picture of a {}", "glossy picture of a {} on a red background", "{}")
    positive, negative = ([w.format(x) for w in words] for x in ("dog", "car"))
    eraser = LeaceEraser.fit(text_representations(pipe, positive, negative))

    def run() -> Tensor:
        out: Tensor = pipe(
            "a picture of a dog",
            num_inference_steps=4,
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
        ).images
        return out

    plain = run()
    with eraser.apply(pipe):
        want = run()
    assert float((want - plain).norm() / plain.norm()) > 1e-2
    with eraser.apply(pipe, sites="cross_attention"):
        got = run()
    assert float((got - want).norm() / want.norm()) < 1e-3
    assert torch.equal(run(), plain)
