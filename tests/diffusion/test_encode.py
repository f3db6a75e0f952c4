"""Encoded prompts: what the pipelines themselves make of them; pairs; representations; refusals."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from concept_erasure.diffusion.encode import Encoded, TextEncoder, text_representations
from concept_erasure.diffusion.labelled import named_representations
from concept_erasure.diffusion.maps import denoiser, encoder_fingerprint, text_encoders
from concept_erasure.diffusion.templates import TEMPLATES, templates_for
from concept_erasure.diffusion.tokens import TokenRule
from concept_erasure.edit import Edit, HookPatch
from concept_erasure.errors import ShapeError, SiteNotFoundError
from concept_erasure.sites import Site
from tests.diffusion.tiny import TINY, WINDOW, tiny_flux, tiny_sd, tiny_sd3, tiny_sdxl

T5 = 32
PROMPTS = ["a dog", "", "starry night by van gogh"]


def _encoder(pipe: Any, **options: Any) -> TextEncoder:
    return TextEncoder(pipe, max_sequence_length=T5, **options)


def _own(kind: str, pipe: Any, prompts: list[str]) -> tuple[Tensor, Tensor | None]:
    """Return what the pipeline of diffusers makes of the prompts."""
    options: dict[str, Any] = {"device": "cpu", "num_images_per_prompt": 1}
    if kind in ("sd", "sdxl"):
        options["do_classifier_free_guidance"] = False
    if kind in ("sd3", "flux"):
        options["max_sequence_length"] = T5
    if kind in ("sdxl", "flux"):
        options["prompt_2"] = None
    if kind == "sd3":
        options |= {"prompt_2": None, "prompt_3": None, "do_classifier_free_guidance": False}
    with torch.no_grad():
        out = pipe.encode_prompt(prompts, **options)
    pooled = {"sd": None, "sdxl": 2, "sd3": 2, "flux": 1}[kind]
    return out[0], None if pooled is None else out[pooled]


def _bits(pipe: Any) -> dict[str, Tensor]:
    parts = {**text_encoders(pipe), "denoiser": denoiser(pipe)}
    return {f"{n}.{k}": v.clone() for n, m in parts.items() for k, v in m.state_dict().items()}


@pytest.mark.parametrize("kind", TINY)
def test_it_is_what_the_pipeline_reads(kind: str) -> None:
    pipe = TINY[kind]()
    before = _bits(pipe)
    pipe.text_encoder.train()
    encoder = _encoder(pipe, batch_size=2)
    got = encoder.encode(PROMPTS)
    assert pipe.text_encoder.training
    pipe.text_encoder.eval()
    want, pooled = _own(kind, pipe, PROMPTS)
    torch.testing.assert_close(got.embeddings, want.double(), rtol=1e-5, atol=1e-5)
    assert got.embeddings.dtype == torch.float64
    if pooled is None:
        assert got.pooled is None
        with pytest.raises(SiteNotFoundError, match="no pooled"):
            encoder.pooled("a dog")
    else:
        torch.testing.assert_close(got.pooled, pooled.double(), rtol=1e-5, atol=1e-5)
    assert torch.equal(encoder.blank(), got.embeddings[1])
    after = _bits(pipe)
    assert all(torch.equal(after[k], before[k]) for k in before)


@pytest.mark.parametrize("make", [tiny_sd, tiny_sdxl])
def test_short_windows_are_exact_where_attention_is_causal(make: Any) -> None:
    encoder = TextEncoder(make(dtype=torch.float64))
    whole, short = encoder.encode(PROMPTS), encoder.encode(PROMPTS, short=True)
    width = short.mask.shape[1]
    assert width == int(whole.mask.sum(1).max()) < WINDOW
    torch.testing.assert_close(short.embeddings, whole.embeddings[:, :width], rtol=0, atol=1e-13)
    if whole.pooled is not None:
        torch.testing.assert_close(short.pooled, whole.pooled, rtol=0, atol=1e-13)
    small = TextEncoder(make(dtype=torch.float64), batch_size=1).encode(PROMPTS, short=True)
    torch.testing.assert_close(small.embeddings, short.embeddings, rtol=0, atol=1e-13)


def test_short_windows_are_not_used_for_t5() -> None:
    for make in (tiny_sd3, tiny_flux):
        encoder = _encoder(make())
        assert not encoder.causal
        assert encoder.encode(["a dog"], short=True).mask.shape[1] >= T5


def test_the_start_is_the_same_in_every_prompt() -> None:
    found = TextEncoder(tiny_sd(dtype=torch.float64)).encode(PROMPTS).embeddings
    torch.testing.assert_close(found[0, 0], found[2, 0], rtol=0, atol=1e-13)
    assert float((found[0, -1] - found[2, -1]).norm()) > 1e-2  # pads see the prompt


def test_segments_of_sd3() -> None:
    encoder = _encoder(tiny_sd3())
    got = encoder.encode(["a dog", "van gogh picasso"])
    assert got.segments == ((slice(0, WINDOW), True), (slice(WINDOW, WINDOW + T5), False))
    assert bool((got.embeddings[:, :WINDOW, 80:] == 0).all())
    first = got.positions("first_eot")[0].tolist()
    assert first == [3, WINDOW + 2]
    assert encoder.rows("a dog", "first_eot")[0].shape == (2, 96)


def test_the_cache_knows_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_sd()
    encoder, calls = TextEncoder(pipe), []
    real = TextEncoder._encode

    def counted(self: TextEncoder, texts: list[str], window: int | None) -> Encoded:
        calls.append(list(texts))
        return real(self, texts, window)

    monkeypatch.setattr(TextEncoder, "_encode", counted)
    first = encoder.encode(["a dog", "a cat"])
    again = encoder.encode(["a cat", "a dog", "a cat"])
    assert calls == [["a dog", "a cat"]]
    assert torch.equal(again.embeddings[1], first.embeddings[0])
    site = Site("out", "final_layer_norm", "norm")
    with Edit(pipe.text_encoder, [HookPatch(site, lambda x: 2 * x)]):
        edited = encoder.encode(["a dog"]).embeddings
        torch.testing.assert_close(edited[0], 2 * first.embeddings[0])
    assert torch.equal(encoder.encode(["a dog"]).embeddings[0], first.embeddings[0])
    with torch.no_grad():
        pipe.text_encoder.get_input_embeddings().weight.mul_(1.5)
    assert not torch.equal(encoder.encode(["a dog"]).embeddings[0], first.embeddings[0])
    monkeypatch.setattr("concept_erasure.diffusion.encode.CACHE_BYTES", 1)
    small = TextEncoder(pipe)
    small.encode(["a dog", "a cat", "a tree"])
    assert len(small._cache or {}) == 1


def test_pairs_by_rule() -> None:
    pipe = tiny_sd(dtype=torch.float64)
    encoder = TextEncoder(pipe)
    one, two = encoder.encode(["van gogh", "art"]).embeddings
    pairs = encoder.pairs("van gogh", "art", "last_subject")
    torch.testing.assert_close(pairs.source, one[[2]], rtol=0, atol=1e-13)
    torch.testing.assert_close(pairs.target, two[[1]], rtol=0, atol=1e-13)
    tail = encoder.pairs("van gogh", "art", "from_last_subject")
    assert torch.equal(tail.source, one[2:])
    assert torch.equal(tail.target, two[1:-1])
    assert torch.equal(encoder.pairs("van gogh", "art", "all").target, two)
    eot = encoder.pairs("van gogh", "art", "eot_and_pads")
    assert torch.equal(eot.source, one[3:])
    assert torch.equal(eot.target, two[2:-1])
    context = encoder.pairs("a van gogh car", "a art car", "context", 3.0)
    assert len(context) == WINDOW - 2
    assert bool((context.weights == 3).all())


def test_pairs_of_many_concepts() -> None:
    encoder = TextEncoder(tiny_sdxl(), batch_size=4)
    names = ["van gogh", "monet", "picasso", "snoopy", "pikachu"]
    pairs = encoder.pairs(names, "art", weight=[1.0, 2, 3, 4, 5])
    assert pairs.weights.tolist() == [1, 2, 3, 4, 5]
    assert pairs.concept is not None
    assert pairs.concept.tolist() == [0, 1, 2, 3, 4]
    rows = torch.cat(encoder.rows(names, "last_subject"))
    torch.testing.assert_close(pairs.source, rows, rtol=1e-5, atol=1e-5)
    tails = encoder.pairs(names, "", "all_but_sot")
    assert len(tails) == 5 * (WINDOW - 1)
    pooled = encoder.pooled_pairs(names, "art")
    assert pooled.source.shape == (5, 40)


def test_blank_anchors_say_where() -> None:
    encoder = TextEncoder(tiny_sd(dtype=torch.float64))
    blank = encoder.blank()
    for choice, place in (("sot", 0), ("first_eot", 1), ("aligned", 2)):
        pairs = encoder.pairs("van gogh", "", blank=choice)  # type: ignore[arg-type]
        torch.testing.assert_close(pairs.target[0], blank[place], rtol=0, atol=1e-13)
        tail = encoder.pairs("van gogh", " ", "from_last_subject", blank=choice)  # type: ignore[arg-type]
        assert torch.equal(tail.target[0], blank[place])
        assert len(tail) == WINDOW - 2


@pytest.mark.parametrize("rule", [r for r in TokenRule if r is not TokenRule.CONTEXT])
@pytest.mark.parametrize("kind", TINY)
def test_representations_carry_their_space(kind: str, rule: TokenRule) -> None:
    pipe = TINY[kind]()
    reps = text_representations(
        pipe, ["a dog"], ["a cat", "art"], rule=rule, max_sequence_length=T5
    )
    assert reps.space is not None
    assert reps.space.fingerprint == encoder_fingerprint(pipe)
    assert (reps.space.site, reps.space.tokens) == ("text_encoder", str(rule))
    assert reps.rows is not None
    assert isinstance(reps.z, Tensor)
    assert reps.z.tolist() == (reps.rows == 0).long().tolist()
    assert set(reps.rows.tolist()) == {0, 1, 2}


def test_representations_at_other_sites() -> None:
    pipe = tiny_sdxl()
    pooled = text_representations(pipe, ["a dog"], ["a cat"], site="pooled")
    assert pooled.x.shape == (2, 40)
    table = text_representations(
        pipe, ["a dog"], ["a cat"], site="token_embedding_2", rule="last_subject"
    )
    ids = pipe.tokenizer_2(["dog", "cat"], add_special_tokens=False)["input_ids"]
    rows = pipe.text_encoder_2.get_input_embeddings().weight.detach()[torch.tensor(ids)[:, 0]]
    assert torch.equal(table.x, rows.double())
    with pytest.raises(SiteNotFoundError, match="no text_encoder_3"):
        text_representations(pipe, ["a"], ["b"], site="token_embedding_3")
    with pytest.raises(SiteNotFoundError, match="must be one of text_encoder"):
        text_representations(pipe, ["a"], ["b"], site="residual.1")  # type: ignore[arg-type]
    with pytest.raises(SiteNotFoundError, match="no pooled"):
        text_representations(tiny_sd(), ["a"], ["b"], site="pooled")


def test_bad_input() -> None:
    encoder = TextEncoder(tiny_sd())
    with pytest.raises(ValueError, match="no token at all"):
        encoder.pairs(" ", "art")
    with pytest.raises(ValueError, match="anchor equal to the concept"):
        encoder.pairs("Dog", "dog ")
    with pytest.raises(ValueError, match=rf"has 32 tokens.*reads {WINDOW}"):
        encoder.encode(["a dog", "dog " * 30])
    with pytest.raises(ValueError, match="at least one"):
        encoder.encode([])
    with pytest.raises(TypeError, match="must be strings; got 3"):
        encoder.encode(["a", 3])  # type: ignore[list-item]
    with pytest.raises(ShapeError, match="2 concepts need as many"):
        encoder.pairs(["dog", "cat"], ["art", "car", "sky"])
    with pytest.raises(ValueError, match="blank must be"):
        encoder.pairs("dog", "", blank="eos")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch_size"):
        TextEncoder(tiny_sd(), batch_size=0)


def test_other_pipelines_are_refused() -> None:
    pipe = tiny_sd()
    with pytest.raises(TypeError, match="no tokenizer"):
        TextEncoder(SimpleNamespace(unet=pipe.unet, text_encoder=pipe.text_encoder))
    three = tiny_sd3()
    three.text_encoder_3 = None
    with pytest.raises(SiteNotFoundError, match=r"load it with its T5"):
        TextEncoder(three)


def test_a_plain_object_will_do() -> None:
    pipe = tiny_sd()
    bare = SimpleNamespace(unet=pipe.unet, text_encoder=pipe.text_encoder, tokenizer=pipe.tokenizer)
    assert torch.equal(
        TextEncoder(bare).encode(PROMPTS).embeddings, TextEncoder(pipe).encode(PROMPTS).embeddings
    )


@pytest.mark.slow
def test_a_real_small_pipeline(emoji: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(emoji, torch_dtype=torch.float32)
    got = TextEncoder(pipe).encode(PROMPTS[:1])
    want, _ = _own("sd", pipe, PROMPTS[:1])
    torch.testing.assert_close(got.embeddings, want.double(), rtol=1e-5, atol=1e-5)


def test_names_in_sentences_carry_the_number_of_their_concept() -> None:
    pipe = tiny_sd()
    made = named_representations(
        pipe, ["monet", "van gogh"], anchor=["", "art"], preserve=["dog"], templates=("{}", "a {}")
    )
    assert made.rows is not None and made.space is not None
    prompts = ("monet", "a monet", "van gogh", "a van gogh", "art", "a art", "dog", "a dog")
    expected = torch.cat(TextEncoder(pipe).rows(list(prompts), "all_but_sot"))
    torch.testing.assert_close(made.x, expected)
    numbers = torch.tensor([1, 1, 2, 2, 0, 0, 0, 0])
    assert torch.equal(made.z, numbers[made.rows.cpu()])
    assert len(made.z.unique()) == 3


def test_templates_that_are_too_long_are_left_out_unless_asked_for() -> None:
    pipe = tiny_sd()
    name = "dog " * (pipe.tokenizer.model_max_length - 6)
    encoder = TextEncoder(pipe)
    kept = templates_for(encoder, [name.strip()], None)
    assert 0 < len(kept) < len(TEMPLATES)
    assert all(encoder.fits(t.format(name.strip())) for t in kept)
    with pytest.raises(ValueError, match="Shorten it"):
        named_representations(pipe, name.strip(), anchor="art", templates=TEMPLATES)
    with pytest.raises(ValueError, match="a name is too long"):
        named_representations(pipe, name * 2, anchor="art")


def test_names_that_cannot_be_told_apart_are_refused() -> None:
    pipe = tiny_sd()
    for given, word in (
        ({"anchor": ""}, "not blank"),
        ({"anchor": " ", "preserve": []}, "not blank"),
        ({"preserve": ["Monet"]}, "preserve contains the concept"),
        ({"anchor": "art", "templates": ("art",)}, "one {}"),
    ):
        with pytest.raises(ValueError, match=word):
            named_representations(pipe, "monet", **given)  # type: ignore[arg-type]
