"""The gate: which latents, which prompts, and that all others keep every bit."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from concept_erasure.collect import collect
from concept_erasure.concept import Concept
from concept_erasure.errors import EditError
from concept_erasure.sae import disentangler
from concept_erasure.sae._gate_patch import Gate, GatePatch, counted, moved, reduced
from concept_erasure.sae.disentangler import Disentangler
from concept_erasure.sae.gate import SaeGateEraser, latents_of
from concept_erasure.sites import Site
from tests.models import TinyTokenizer, tiny
from tests.sae.value_vectors import noise, orthonormal

TARGETS = ("harry likes the castle", "the owl of harry sleeps", "harry rides on brooms today")
KEPT = ("bread is made of flour", "rain falls in the valley", "trains leave at noon again")
CONCEPT = Concept(name="harry")
WIDTH = 32


@cache
def dictionary(kind: str = "llama") -> Disentangler:
    """Latent 0 reads one direction of the word `harry`'s embedding, latent 1 that of `bread`; the rest is random."""
    model = tiny(kind)
    table = model.get_input_embeddings().weight.detach()
    ids = [TinyTokenizer().encode(word, add_special_tokens=False)[0] for word in ("harry", "bread")]
    rows = torch.linalg.qr(torch.cat((table[ids].T, noise(WIDTH, 4).float()), 1)).Q.T
    rows[:2] *= (rows[:2] @ table[ids].T).diagonal().sign()[:, None]
    theta = torch.full((6,), 1e3)
    everything = table @ rows.T
    for latent, word in enumerate(ids):
        others = torch.arange(len(table)) != word
        theta[latent] = (
            everything[word, latent] + everything[others, latent].amax().clamp_min(0)
        ) / 2
    zero = torch.zeros(6)
    return Disentangler(
        rows.T.contiguous(), zero, rows.contiguous(), torch.zeros(WIDTH), theta, site="embedding"
    )


def fitted(**options: object) -> SaeGateEraser:
    given = {"prompts": TARGETS, "retain_prompts": KEPT, "top": 3, **options}
    return SaeGateEraser.fit(
        tiny("llama"), TinyTokenizer(), CONCEPT, disentangler=dictionary(), **given
    )  # type: ignore[arg-type]


def run(model: torch.nn.Module, prompts: tuple[str, ...], side: str = "right") -> list[Tensor]:
    """Return each prompt's logits, without padding."""
    batch = TinyTokenizer(side)(list(prompts), padding=True, return_tensors="pt")
    with torch.no_grad():
        found = model(**batch).logits
    return [row[mask.bool()] for row, mask in zip(found, batch["attention_mask"], strict=True)]


def test_all_targets_and_no_kept_prompt_are_flagged_and_the_latents_are_disjoint() -> None:
    eraser = fitted()
    assert eraser.latents.tolist() == [0]
    assert eraser.report["flagged"] == [1.0, 0.0] and eraser.report["largest_error_retain"] == 0
    assert eraser.config.theta > 0  # type: ignore[attr-defined]


@pytest.mark.parametrize("reduction", ["mean", "max"])
def test_prompts_below_the_threshold_keep_every_bit_and_targets_change(reduction: str) -> None:
    model, eraser = tiny("llama"), fitted(reduction=reduction)
    prompts = (TARGETS[0], *KEPT, TARGETS[1])
    before = run(model, prompts)
    with eraser.apply(model):
        after = run(model, prompts)
    same = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert same == [False, True, True, True, False]


@pytest.mark.parametrize("reduction", ["mean", "max"])
def test_the_error_when_running_is_that_of_the_fit_whatever_the_padding(reduction: str) -> None:
    """Every target reaches theta alone, in a batch, and padded on either side."""
    model, eraser = tiny("llama"), fitted(reduction=reduction)
    with eraser.apply(model) as edit:
        patch = edit.patches[0]
        assert isinstance(patch, GatePatch)
        for side in ("left", "right"):
            run(model, ("a", *TARGETS, "one two three four five six seven"), side)
            assert patch.flagged is not None and patch.flagged.tolist() == [
                False,
                True,
                True,
                True,
                False,
            ]
        for prompt in TARGETS:
            run(model, (prompt,))
            assert patch.flagged.tolist() == [True]


def test_special_tokens_do_not_count_and_do_not_change() -> None:
    model = tiny("llama")
    tokenizer = TinyTokenizer(add_bos=True)
    eraser = SaeGateEraser.fit(
        model,
        tokenizer,
        CONCEPT,
        disentangler=dictionary(),
        prompts=TARGETS,
        retain_prompts=KEPT,
        top=3,
    )
    assert eraser.config.theta == pytest.approx(fitted().config.theta)  # type: ignore[attr-defined]
    x, ids = noise(1, 4, WIDTH).float(), torch.tensor([[1, 7, 8, 0]])
    assert counted(ids, None, torch.tensor([0, 1, 2, 3]), x).tolist() == [
        [False, True, True, False]
    ]
    held: list[Tensor] = []
    handle = model.model.layers[0].register_forward_pre_hook(lambda _, args: held.append(args[0]))
    batch = tokenizer([TARGETS[0]], return_tensors="pt")
    model(**batch)
    with eraser.apply(model):
        model(**batch)
    handle.remove()
    assert torch.equal(held[0][:, 0], held[1][:, 0]) and not torch.equal(held[0], held[1])


def test_strength_one_is_refused_and_is_no_operation() -> None:
    with pytest.raises(ValueError, match="strength must be below 1"):
        fitted(strength=1)
    gate = replace(fitted().gate, strength=1.0)
    x = noise(2, 3, WIDTH).float()
    assert torch.equal(moved(x, gate), torch.zeros_like(x))


def test_deactivating_scales_the_codes_and_keeps_what_the_dictionary_leaves_over() -> None:
    dis = orthonormal()
    latents = torch.tensor([1, 4])
    parts = dis.W_enc[:, latents], dis.b_enc[latents], dis.threshold[latents], dis.W_dec[latents]
    gate = Gate(*parts, dis.b_dec, -3.0, 0.1, "mean")
    x = noise(2, 5, 64)
    z = dis.encode(x)
    turned = z.clone()
    turned[..., latents] *= -3
    torch.testing.assert_close(x + moved(x, gate), x + dis.decode(turned) - dis.decode(z))


def test_a_prompt_that_uses_none_of_the_latents_cannot_be_a_target() -> None:
    with pytest.raises(ValueError, match="prompt 3 uses none"):
        fitted(prompts=(*TARGETS, "nothing of the sort"))
    with pytest.raises(ValueError, match="among the"):
        fitted(prompts=("bread and butter",))
    with pytest.raises(ValueError, match="both are needed"):
        fitted(prompts=())


def test_codes_of_zero_are_nobodys_largest() -> None:
    largest = torch.tensor([[0.0, 3.0, 0.0, 1.0], [0.0, 0.0, 2.0, 0.0]])
    assert latents_of(largest, 3).tolist() == [False, True, True, True]
    assert latents_of(largest, 1).tolist() == [False, True, True, False]


def test_prompts_to_keep_are_drawn_with_a_seed() -> None:
    many = tuple(f"{word} is here" for word in ("bread", "rain", "tea", "sun", "wind"))
    one, two = (fitted(retain_prompts=many, retain_limit=2, seed=5) for _ in range(2))
    assert one.digest == two.digest and one.report["prompts"] == [3, 2]


def test_while_generating_all_places_so_far_count() -> None:
    """A text that is flagged stays flagged in the steps after it, though each sees one token."""
    model, eraser = tiny("llama"), fitted()
    with eraser.apply(model) as edit:
        patch = edit.patches[0]
        assert isinstance(patch, GatePatch)
        ids = TinyTokenizer()([TARGETS[0]], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            out = model(input_ids=ids, use_cache=True)
            harry = TinyTokenizer().encode("harry", add_special_tokens=False)
            out = model(
                input_ids=torch.tensor([harry]), past_key_values=out.past_key_values, use_cache=True
            )
            assert patch.flagged is not None and patch.flagged.tolist() == [True]
            model(input_ids=torch.tensor([[50]]))
            assert patch.flagged.tolist() == [False]


def test_a_text_that_is_generated_is_judged_alone() -> None:
    """Behind the first layer the cache of a new text is filled already; texts before it must not count."""
    model = tiny("llama")
    read, theta = separating(model, "residual.1")
    dis = replace(
        orthonormal(width=WIDTH).to(dtype=torch.float32), site="residual.1", W_enc=read[:, None], b_enc=torch.zeros(1),
        W_dec=read[None], threshold=theta[None], widths=(1,),
    )  # fmt: skip
    eraser = SaeGateEraser.fit(
        model, TinyTokenizer(), CONCEPT, disentangler=dis, prompts=TARGETS[:1], retain_prompts=KEPT[:1]
    )  # fmt: skip
    with eraser.apply(model) as edit:
        patch = edit.patches[0]
        assert isinstance(patch, GatePatch)
        for prompt, flagged in ((KEPT[0], False), (TARGETS[0], True), (KEPT[0], False)):
            batch = TinyTokenizer()([prompt], return_tensors="pt")
            model.generate(**batch, max_new_tokens=1, do_sample=False)  # type: ignore[operator]
            assert patch.flagged is not None and patch.flagged.tolist() == [flagged]


def test_each_text_has_its_own_cache() -> None:
    """Two that are generated in turn do not count for each other, though both are one prompt of one model."""
    model, eraser, tokenizer = tiny("llama"), fitted(), TinyTokenizer()
    with eraser.apply(model) as edit:
        patch = edit.patches[0]
        assert isinstance(patch, GatePatch)
        texts = [
            tokenizer([text], return_tensors="pt")["input_ids"] for text in (TARGETS[0], KEPT[0])
        ]
        with torch.no_grad():
            caches = [model(input_ids=ids, use_cache=True).past_key_values for ids in texts]
            length = texts[0].shape[1]
            step = torch.tensor([tokenizer.encode("harry", add_special_tokens=False)])
            for cache in (caches[0], caches[1], caches[0]):
                model(input_ids=step, past_key_values=cache, use_cache=True)
        held = [patch._seen[cache] for cache in caches]
    counts = [int(count) for _, count in held]
    assert counts == [length + 2, texts[1].shape[1] + 1]
    said = float(held[1][0])  # of one place, as nothing else in the second text is the concept's
    assert float(held[0][0]) == pytest.approx(3 * said, rel=1e-4)


def test_codes_are_made_a_chunk_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    before, seen = fitted(), []
    encode = Disentangler.encode

    def watched(self: Disentangler, x: Tensor, latents: Tensor | None = None) -> Tensor:
        z = encode(self, x, latents)
        seen.append(z.numel())
        return z

    monkeypatch.setattr(Disentangler, "encode", watched)
    monkeypatch.setattr(disentangler, "CHUNK_VALUES", 2 * dictionary().n)
    assert fitted().digest == before.digest and max(seen) == 2 * dictionary().n


def test_reductions() -> None:
    errors, mask = torch.tensor([[1.0, 2.0, 9.0]]), torch.tensor([[True, True, False]])
    total, count = reduced(errors, mask, "mean")
    assert (total / count).tolist() == [1.5] and reduced(errors, mask, "max")[0].tolist() == [2.0]


def separating(model: torch.nn.Module, site: str) -> tuple[Tensor, Tensor]:
    """Return a unit direction that is 0 on all tokens of a prompt to keep, and half its value on the target's last."""
    kept = collect(model, TinyTokenizer(), KEPT[:1], sites=site, tokens="all").x.double()
    last = collect(model, TinyTokenizer(), TARGETS[:1], sites=site, tokens="last").x.double()
    want = torch.zeros(len(kept) + 1, dtype=torch.float64)
    want[-1] = 1
    read = torch.linalg.lstsq(torch.cat((kept, last)), want[:, None], driver="gelsd").solution[:, 0]
    return (read / read.norm()).float(), (0.5 / read.norm()).float()


@pytest.mark.parametrize(("kind", "site"), [("bert", "residual.1"), ("gemma3", "mlp.1")])
def test_an_encoder_and_a_post_norm_site(kind: str, site: str) -> None:
    """A BERT, and a Gemma 3 whose dictionary sits behind the norm after an MLP."""
    model = tiny(kind)
    dis = replace(
        orthonormal(width=WIDTH).to(dtype=torch.float32),
        site=site,
        after_post_norm=kind == "gemma3",
    )
    place = dis.activation_site(model)
    read, theta = separating(model, place)
    dis = replace(
        dis,
        W_enc=read[:, None],
        b_enc=torch.zeros(1),
        W_dec=read[None],
        threshold=theta[None],
        widths=(1,),
    )
    eraser = SaeGateEraser.fit(
        model,
        TinyTokenizer(),
        CONCEPT,
        disentangler=dis,
        prompts=TARGETS[:1],
        retain_prompts=KEPT[:1],
    )
    assert eraser.space is not None and ("norm" in eraser.space.site) == (kind == "gemma3")
    before = run(model, (TARGETS[0], KEPT[0]))
    with eraser.apply(model):
        after = run(model, (TARGETS[0], KEPT[0]))
    assert not torch.equal(after[0], before[0]) and torch.equal(after[1], before[1])


def test_activations_of_other_shapes_and_topk_dictionaries_are_refused() -> None:
    patch = GatePatch(Site("residual.0", "x", "residual"), fitted().gate, ())
    with pytest.raises(EditError, match="shape"):
        patch._change(torch.zeros(3, WIDTH))
    with pytest.raises(ValueError, match="calibrate"):
        SaeGateEraser.fit(
            tiny("llama"), TinyTokenizer(), CONCEPT, disentangler=replace(dictionary(), k=2)
        )
