"""Suites of the emoji world: what to draw when objects or a style were erased, its judge and its CLIP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn import functional

from concept_erasure.evals.diffusion.generate import Row
from concept_erasure.evals.diffusion.suite import Suite
from concept_erasure.evals.worlds.emoji.classifier import ConceptClassifier
from concept_erasure.evals.worlds.emoji.clip import EmojiClip
from concept_erasure.evals.worlds.emoji.grammar import FULL, WITH_STYLE, caption
from concept_erasure.evals.worlds.emoji.render import COLOURS, PIXELS, STYLES, render
from concept_erasure.evals.worlds.emoji.sprites import EmojiObject, load_objects
from concept_erasure.evals.worlds.emoji.world import EmojiWorld

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

__all__ = ["NEIGHBOURS", "EmojiJudge", "EmojiMatcher", "object_suite", "paraphrases", "style_suite"]

Aspect = Literal["object", "style", "colour"]
_LABELS = {
    "object": tuple(one.name for one in load_objects()),
    "style": STYLES,
    "colour": tuple(COLOURS),
}

NEIGHBOURS = {
    "corn": ("carrot", "broccoli", "pineapple", "banana"),
    "bee": ("butterfly", "snail", "sunflower", "owl"),
    "sailboat": ("rocket", "airplane", "helicopter"),
    "cake": ("doughnut", "hamburger", "strawberry", "watermelon"),
    "whale": ("fish", "octopus", "turtle", "penguin"),
    "pizza": ("hamburger", "doughnut", "watermelon", "tomato"),
    "apple": ("tomato", "cherries", "strawberry", "lemon"),
    "basketball": ("soccer", "tomato", "doughnut"),
    "dog": ("fox", "bear", "cow", "rabbit"),
    "cat": ("tiger", "lion", "fox", "panda"),
}
"""Near things of ten objects: of the same kind, or drawn alike."""


def paraphrases(one: EmojiObject) -> tuple[str, ...]:
    """Return other names and wordings of an object: its other names first.

    The text encoder was trained with the names and with "a kind of"; it was never told "called".
    """
    kinds = [f"{name}, a kind of {one.kind}" for name in one.names]
    return (*one.names[1:], *kinds, *(f"{one.kind} called {name}" for name in one.names))


@dataclass(frozen=True, eq=False)
class EmojiJudge:
    """The classifier as a judge of one aspect.

    Attributes:
        classifier: The classifier.
        aspect: ``"object"``, ``"style"`` or ``"colour"``.
    """

    classifier: ConceptClassifier
    aspect: Aspect = "object"

    @property
    def name(self) -> str:
        """For the report."""
        return f"the emoji classifier ({self.aspect})"

    @property
    def labels(self) -> tuple[str, ...]:
        """What it can say."""
        return _LABELS[self.aspect]

    def probabilities(self, images: Tensor) -> Tensor:
        """Return shape ``(n, labels)`` for pictures of shape ``(n, 3, 32, 32)``, uint8."""
        said: Tensor = getattr(self.classifier.judge(images / 255), self.aspect)
        return said.exp()

    def features(self, images: Tensor) -> Tensor:
        """Return shape ``(n, 128)``."""
        return self.classifier.judge(images / 255).features


@dataclass(frozen=True, eq=False)
class EmojiMatcher:
    """The small CLIP for pictures in bytes.

    Attributes:
        clip: The CLIP.
        name: For the report.
    """

    clip: EmojiClip
    name: str = "the emoji CLIP"

    @torch.no_grad()
    def embed_images(self, images: Tensor) -> Tensor:
        """Return unit vectors, shape ``(n, 64)``, of pictures of shape ``(n, 3, 32, 32)``, uint8."""
        return torch.cat([self.clip.embed_images(part / 127.5 - 1) for part in images.split(256)])

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Return unit vectors, shape ``(n, 64)``."""
        return self.clip.embed_texts(texts)


def _captions(classifier: ConceptClassifier, aspects: Sequence[Aspect], images: Tensor) -> Tensor:
    """Return what the classifier sees of some aspects, one-hot, side by side."""
    said = classifier.judge(images / 255)
    found = [getattr(said, aspect) for aspect in aspects]
    return torch.cat([functional.one_hot(one.argmax(1), one.shape[1]) for one in found], 1).float()


def _real(world: EmojiWorld, rows: Sequence[Row]) -> Tensor:
    """Render what the prompts of rows ask for; ``case`` says it."""
    wanted = [row.case.split("/") for row in rows]
    numbers = [
        [
            _LABELS[aspect].index(one[place])
            for aspect, place in (("object", 0), ("style", 1), ("colour", 2))
        ]
        for one in wanted
    ]
    obj, style, colour = torch.tensor(numbers).unbind(1)
    pictures = render(
        world.sprites, obj, style, colour, generator=torch.Generator().manual_seed(len(rows))
    )
    return ((pictures + 1) * 127.5).round().to(torch.uint8)


@dataclass(eq=False)
class _Rows:
    """Rows in the making; every picture has a seed of its own."""

    seed: int
    guidance: float
    steps: int
    rows: list[Row]

    def add(self, kind: str, prompt: str, concept: str, case: str) -> None:
        self.rows.append(
            Row(
                prompt=prompt, seed=100_000 * self.seed + len(self.rows), concept=concept, kind=kind,
                guidance=self.guidance, steps=self.steps, height=PIXELS, width=PIXELS, case=case,
            )
        )  # fmt: skip


def _fits(tokenizer: CLIPTokenizer, text: str) -> bool:
    """Return whether a text fits the window; cut at one token more, so that no warning is written."""
    window: int = tokenizer.model_max_length
    return len(tokenizer(text, truncation=True, max_length=window + 1).input_ids) <= window


def _sentences(world: EmojiWorld, name: str, style: str, colour: str) -> list[tuple[str, str]]:
    """Return sentences that fit the text encoder's window, with the ground each asks for.

    Full ones if any fits; long names leave room for the style alone.
    """
    for templates, ground in ((FULL, colour), (WITH_STYLE, "white")):
        texts = [caption(template, name, style=style, colour=colour) for template in templates]
        if fitting := [text for text in texts if _fits(world.pipe.tokenizer, text)]:
            return [(text, ground) for text in fitting]
    raise ValueError(f"no sentence with {name!r} fits the window of the text encoder")


def object_suite(
    world: EmojiWorld,
    targets: Sequence[str],
    *,
    pictures: int = 64,
    each: int = 2,
    guidance: float = 5.0,
    steps: int = 20,
    seed: int = 0,
) -> Suite:
    """Return what to draw when objects were erased: all styles, grounds and full sentences take turns.

    Args:
        world: Gives judge, CLIP and sprites.
        targets: Names of objects; a target's near things are drawn if `NEIGHBOURS` has them.
        pictures: Pictures a kind, at most; rounded down to ``each`` times the targets for the first two kinds.
        each: Pictures a prompt of the first two kinds.
        guidance: Guidance scale.
        steps: Of the sampler.
        seed: Of sentences and noise.

    Raises:
        ValueError: If a target is unknown or there are too few pictures for all of them.
    """
    objects = {one.name: one for one in world.objects}
    targets = tuple(targets)
    if not targets or set(targets) - set(objects) or pictures < each * len(targets):
        raise ValueError(
            f"targets must be objects, with at least {each} pictures each; got {targets} and {pictures} pictures"
        )
    rng = Random(seed)  # noqa: S311 - not for secrets
    made = _Rows(seed, guidance, steps, [])
    near = list(
        dict.fromkeys(n for t in targets for n in NEIGHBOURS.get(t, ()) if n not in targets)
    )
    rest = [name for name in objects if name not in (*targets, *near)]
    count = pictures // (each * len(targets)) * len(targets)

    def add(kind: str, turn: int, name: str, concept: str, repeat: int) -> None:
        style, colour = STYLES[turn % len(STYLES)], rng.choice(list(COLOURS))
        sentences = _sentences(world, name, style, colour)
        prompt, shown = rng.choice(sentences)
        for _ in range(repeat):
            made.add(kind, prompt, concept, f"{concept}/{style}/{shown}")

    for turn in range(count):
        target = targets[turn % len(targets)]
        add("erased", turn // len(targets), target, target, each)
    for turn in range(count):
        target = targets[turn % len(targets)]
        words = paraphrases(objects[target])
        add("synonym", turn // len(targets), words[turn // len(targets) % len(words)], target, each)
    for kind, names in (("neighbour", near), ("kept", rest)):
        # Whole rounds, so that every object counts alike; a part of one if there are fewer pictures than objects.
        rounds = max(1, pictures // max(1, len(names)))
        for turn in range(min(pictures, rounds * len(names))):
            name = names[turn % len(names)]
            add(kind, rng.randrange(len(STYLES)), name, name, 1)
    return _suite(world, "object", targets, made.rows)


def style_suite(
    world: EmojiWorld,
    target: str,
    *,
    pictures: int = 64,
    each: int = 2,
    guidance: float = 5.0,
    steps: int = 20,
    seed: int = 0,
) -> Suite:
    """Return what to draw when a style was erased; "synonyms" are other sentences, a style has no second name here.

    Args:
        world: Gives judge, CLIP and sprites.
        target: One of the styles.
        pictures: Pictures a kind, at most.
        each: Pictures a prompt of the first two kinds.
        guidance: Guidance scale.
        steps: Of the sampler.
        seed: Of objects, sentences and noise.

    Raises:
        ValueError: If the style is unknown.
    """
    if target not in STYLES:
        raise ValueError(f"target must be one of {', '.join(STYLES)}; got {target!r}")
    rng = Random(seed)  # noqa: S311 - not for secrets
    made = _Rows(seed, guidance, steps, [])
    names = [one.name for one in world.objects]
    rng.shuffle(names)
    others = [style for style in STYLES if style != target]
    plans = (
        ("erased", FULL[:1], [target], pictures // each, each),
        ("synonym", (*FULL[1:], *WITH_STYLE[1:]), [target], pictures // each, each),
        ("kept", FULL, others, pictures, 1),
    )
    for kind, templates, styles, count, repeat in plans:
        for turn in range(count):
            style, name = styles[turn % len(styles)], names[turn % len(names)]
            template = templates[turn % len(templates)]
            colour = rng.choice(list(COLOURS)) if "{c}" in template else "white"
            prompt = caption(template, name, style=style, colour=colour)
            for _ in range(repeat):
                made.add(kind, prompt, style, f"{name}/{style}/{colour}")
    return _suite(world, "style", (target,), made.rows)


def _suite(
    world: EmojiWorld, aspect: Aspect, targets: tuple[str, ...], rows: Sequence[Row]
) -> Suite:
    others: tuple[Aspect, ...] = ("style", "colour") if aspect == "object" else ("object", "colour")
    return Suite(
        name=f"Erasing {', '.join(targets)} from the emoji world",
        targets=targets,
        rows=tuple(rows),
        judge=EmojiJudge(world.classifier, aspect),
        matcher=EmojiMatcher(world.clip),
        caption=partial(_captions, world.classifier, others),
        real=partial(_real, world),
    )
