"""Concepts with known items and the texts to train dictionaries on, for the study of sparse features.

Concepts that ship bring statements with a blank; half of the facts are for tuning. The other concepts' files are those
of the EMBER benchmark (Suslik et al. 2026, arXiv:2606.03695; sentences partly from Wikipedia, CC BY-SA): they are read
from a folder that the user names and are no part of the package.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from concept_erasure.concept import Concept
from concept_erasure.concept_items import Item, Question
from concept_erasure.errors import FormatError
from concept_erasure.evals.language._halves import HALVES, half_of
from concept_erasure.evals.language.likelihood import TokenizerLike
from concept_erasure.language._texts import own_samples

__all__ = [
    "StudyConcept",
    "load_neutral",
    "load_study_concept",
    "read_texts",
    "study_concept",
    "training_texts",
    "with_texts",
]

SPLITS = ("QA_train", "QA_test", "SimdomQA_train", "SimdomQA_test")
OPENINGS = ("{subject} is known for", "The history of {subject} begins")


@dataclass(frozen=True)
class StudyConcept:
    """A concept with items to tune on and items to report.

    Attributes:
        concept: Name, sentences to forget and, as questions, the items to tune on.
        train: Items about it to tune on.
        test: Items about it to report.
        near_train: Items about neighbours to tune on.
        near_test: Items about neighbours to report.
    """

    concept: Concept
    train: tuple[Item, ...]
    test: tuple[Item, ...]
    near_train: tuple[Item, ...]
    near_test: tuple[Item, ...]


def load_study_concept(
    path: str | Path,
    *,
    synonyms: Sequence[str] = (),
    entities: Mapping[str, str] | None = None,
    limit: int | None = None,
) -> StudyConcept:
    """Read a concept of the benchmark.

    Args:
        path: Its json file.
        synonyms: More words for it.
        entities: Names with a neutral stand-in for each, for ELM's contrast.
        limit: Items of each split at most.

    Raises:
        FileNotFoundError: If it is not there.
        FormatError: If it is not such a file.
    """
    file = Path(path)
    try:
        held: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        choices = held["multiple_choice"]
        splits = {name: [_question(row) for row in choices[name][:limit]] for name in SPLITS}
        sentences, name = tuple(held.get("sentences", ())), str(held["concept"])
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{file.name} is not a concept of the benchmark: {error!r}") from None
    items = {key: tuple(q.item(name, seed=0) for q in rows) for key, rows in splits.items()}
    concept = Concept(
        name=name,
        synonyms=tuple(synonyms),
        entities=tuple((entities or {}).items()),
        forget_texts=sentences,
        questions=tuple(splits["QA_train"]),
    )
    return StudyConcept(concept, *(items[key] for key in SPLITS))


def study_concept(concept: Concept, *, limit: int | None = None) -> StudyConcept:
    """Return a concept that has facts of its own, with those of its development half to tune on.

    Args:
        concept: With facts, and with near ones.
        limit: Items of each split at most.

    Raises:
        ValueError: If a half of the facts or of the near ones is empty.
    """
    splits = []
    for kind in ("concept", "near"):
        items = concept.items(kind, "cloze")
        for half in HALVES:
            part = tuple(item for item in items if half_of(item) == half)[:limit]
            if not part:
                raise ValueError(f"{concept.name!r} has no facts to ask for: {kind}, {half}")
            splits.append(part)
    return StudyConcept(concept, *splits)


def _question(row: Mapping[str, Any]) -> Question:
    options = tuple(str(one) for one in row["options"])
    return Question(
        question=str(row["q"]), choices=options, answer=options.index(str(row["correct_answer"]))
    )


def load_neutral(path: str | Path) -> tuple[str, ...]:
    """Read the benchmark's list of sentences about none of the concepts."""
    return tuple(str(one) for one in json.loads(Path(path).read_text(encoding="utf-8")))


def read_texts(paths: Sequence[str | Path]) -> list[str]:
    """Return the lines of text files, each once; of a folder, those of its ``.txt`` files.

    Raises:
        FileNotFoundError: If there is no such file or folder, or nothing in it.
    """
    files: list[Path] = []
    for given in map(Path, paths):
        found = sorted(given.glob("*.txt")) if given.is_dir() else [given]
        if not found or not found[0].is_file():
            raise FileNotFoundError(f"no text files at {given}")
        files += found
    lines = [line.strip() for file in files for line in file.read_text("utf-8").split("\n")]
    return list(dict.fromkeys(line for line in lines if len(line) > 40))


def with_texts(
    model: nn.Module,
    tokenizer: TokenizerLike,
    one: StudyConcept,
    *,
    samples: int,
    cache: Path,
    max_new_tokens: int = 80,
    seed: int = 0,
) -> StudyConcept:
    """Return the concept with the model's own samples as texts to forget, beside its sentences.

    They begin with its name and with right answers of the items to tune on; those of the items to report are not
    used. A concept with few sentences gets more of them, so that there are three times as many texts.

    Args:
        model: The model, without edits.
        tokenizer: Its tokenizer.
        one: The concept.
        samples: How many.
        cache: Folder in which they are kept.
        max_new_tokens: Of each.
        seed: Of the sampling.
    """
    held = one.concept.forget_texts
    count = max(samples, 3 * samples - len(held))
    path = cache / f"samples-{one.concept.name.replace(' ', '_')}-{count}-{seed}.json"
    if path.is_file():
        drawn = list(json.loads(path.read_text(encoding="utf-8")))
    else:
        subjects = dict.fromkeys([one.concept.name, *(item.right for item in one.train)])
        prompts = [opening.format(subject=name) for name in subjects for opening in OPENINGS]
        drawn = own_samples(
            model, tokenizer, prompts, n=count, max_new_tokens=max_new_tokens, seed=seed
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(drawn), encoding="utf-8")
    texts = tuple(dict.fromkeys((*held, *drawn)))
    return replace(one, concept=replace(one.concept, forget_texts=texts))


def training_texts(
    tokenizer: TokenizerLike,
    concepts: Sequence[StudyConcept],
    neutral: Sequence[str],
    general: Sequence[str],
    *,
    tokens: int,
    seed: int = 0,
) -> list[str]:
    """Return the concepts' texts, neutral sentences, and general prose up to a size.

    Args:
        tokenizer: The model's.
        concepts: Their texts come first.
        neutral: Sentences about none of them.
        general: Paragraphs; shuffled, as many as are needed.
        tokens: Size of it all.
        seed: Of the order.
    """
    made = [*(text for one in concepts for text in one.concept.forget_texts), *neutral]
    order = list(general)
    random.Random(seed).shuffle(order)  # noqa: S311 - not for secrets
    count = sum(_length(tokenizer, text) for text in made)
    for text in order:
        if count >= tokens:
            break
        made.append(text)
        count += _length(tokenizer, text)
    return made


def _length(tokenizer: TokenizerLike, text: str) -> int:
    found: Any = tokenizer([text], add_special_tokens=False)
    return len(found["input_ids"][0])
