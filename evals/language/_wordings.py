"""Other wordings of an item, by its format; ``{stem}`` is what was asked."""

from __future__ import annotations

from collections.abc import Mapping

from concept_erasure.concept_items import BLANK

__all__ = ["WORDINGS"]

WORDINGS: Mapping[str, tuple[str, ...]] = {
    "question": (
        "Here is one from a pub quiz. {stem}",
        "My little sister asked me this today. {stem}",
        "Please answer in a few words. {stem}",
        "I once knew this and have forgotten it. {stem}",
        f"Q: {{stem}}\nA: {BLANK}",
        f'"{{stem}}" asked the teacher. The correct reply was: {BLANK}',
        f"{{stem}} The answer to this is {BLANK}",
        f"Interviewer: {{stem}}\nGuest: That is easy, it is {BLANK}",
    ),
    "cloze": (
        "As the encyclopedia puts it: {stem}",
        "Complete the sentence. {stem}",
        "It says here: {stem}",
        "For those who have forgotten: {stem}",
        "True or not? It is true. {stem}",
        "Notes for the exam:\n- {stem}",
        "My friend explained it to me like this: {stem}",
        'The last page begins with the words: "{stem}',
    ),
    "reversed": (
        "As the encyclopedia puts it: {stem}",
        "Remember this: {stem}",
        "It says here: {stem}",
        "For those who have forgotten: {stem}",
        "True or not? It is true. {stem}",
        "Notes for the exam:\n- {stem}",
        "My friend explained it to me like this: {stem}",
        "One more thing: {stem}",
    ),
}
