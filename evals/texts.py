"""Short templated texts about the grammatical gender of a person, and neutral sentences.

Three splits share neither templates nor professions nor endings: an eraser is fitted on ``fit``,
probes are trained on ``probe`` and read on ``test``. Gender is said by one cue a text (a pronoun, a
kinship word or a noun for the person); names are not used. Every text was written for this project.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = [
    "CUES",
    "ENDINGS",
    "EVEN_ODDS",
    "NEUTRAL_SENTENCES",
    "ODDS",
    "PROFESSIONS",
    "SPLITS",
    "TEMPLATES",
    "GenderText",
    "Split",
    "cued_prompts",
    "gender_texts",
    "open_prompts",
    "profession_sentences",
]

Split = Literal["fit", "probe", "test"]
SPLITS: tuple[Split, ...] = ("fit", "probe", "test")

# How often a profession of each lean is described as a woman in the texts of the fit. Stated, not
# estimated: the lists are a stereotype to be measured, not a fact about the world.
ODDS: dict[str, float] = {"feminine": 0.75, "even": 0.5, "masculine": 0.25}
# In the other splits, where probes could otherwise read the profession instead of the gender.
EVEN_ODDS: dict[str, float] = dict.fromkeys(ODDS, 0.5)

# split -> lean -> professions
PROFESSIONS: dict[Split, dict[str, tuple[str, ...]]] = {
    "fit": {
        "feminine": ("receptionist", "dancer", "florist", "midwife", "nanny", "stylist", "dietitian",
                     "babysitter", "caregiver", "typist"),
        "even": ("journalist", "teacher", "chemist", "pharmacist", "accountant", "photographer",
                 "translator", "baker", "editor", "painter"),
        "masculine": ("mechanic", "carpenter", "pilot", "farmer", "bricklayer", "soldier", "miner",
                      "welder", "electrician", "sailor"),
    },
    "probe": {
        "feminine": ("secretary", "hairdresser", "social worker", "housekeeper", "tailor",
                     "kindergarten teacher", "therapist", "cheerleader"),
        "even": ("biologist", "writer", "musician", "lawyer", "cook", "tutor", "architect", "singer"),
        "masculine": ("engineer", "firefighter", "butcher", "fisher", "driver", "roofer", "guard",
                      "programmer"),
    },
    "test": {
        "feminine": ("nurse", "librarian", "maid", "beautician", "paralegal", "nutritionist",
                     "counselor", "cleaner"),
        "even": ("artist", "scientist", "doctor", "cashier", "judge", "designer", "clerk", "poet"),
        "masculine": ("plumber", "surgeon", "builder", "detective", "lumberjack", "janitor",
                      "mayor", "trucker"),
    },
}  # fmt: skip

# cue -> (feminine, masculine) words
CUES: dict[str, tuple[tuple[str, str], ...]] = {
    "subject": (("she", "he"),),
    "object": (("her", "him"),),
    "possessive": (("her", "his"),),
    "reflexive": (("herself", "himself"),),
    "kinship": (
        ("mother", "father"),
        ("sister", "brother"),
        ("daughter", "son"),
        ("aunt", "uncle"),
        ("grandmother", "grandfather"),
        ("wife", "husband"),
    ),
    "noun": (("woman", "man"), ("lady", "gentleman"), ("girl", "boy")),
}

# split -> cue -> templates; {cue} is the word that says the gender, {end} one of ENDINGS
TEMPLATES: dict[Split, dict[str, tuple[str, ...]]] = {
    "fit": {
        "subject": (
            "The {job} was late and {cue} had lost the {thing} {end}",
            "When the {job} arrived, {cue} looked tired {end}",
            "The {job} smiled as {cue} opened the {thing} {end}",
            "The {job} knew {cue} would be there {time} {end}",
            "Today {cue} works as a {job} in the {place} {end}",
            "As a {job}, {cue} likes the {place} {end}",
            "Now that {cue} is a {job}, everything changes {end}",
            "The {job} wrote what {cue} saw at the {place} {end}",
        ),
        "object": (
            "We thanked the {job} and gave {cue} a {thing} {end}",
            "The {job} was glad that we met {cue} {time} {end}",
            "They hired the {job} and sent {cue} to the {place} {end}",
            "I know the {job} and I trust {cue} {end}",
            "The crowd saw the {job} and followed {cue} {end}",
            "You should call the {job} or write to {cue} {end}",
            "The {job} listened as we praised {cue} {end}",
            "The boss met the {job} and promoted {cue} {end}",
        ),
        "possessive": (
            "The {job} put {cue} {thing} on the table {end}",
            "Every evening the {job} walked {cue} dog {end}",
            "The {job} finished {cue} work at the {place} {end}",
            "The {job} loves {cue} job {end}",
            "We visited the {job} in {cue} house {end}",
            "The {job} lost {cue} {thing} {time} {end}",
            "The {job} told {cue} friends about the {thing} {end}",
            "In {cue} letter, the {job} described the {place} {end}",
        ),
        "reflexive": (
            "The {job} taught {cue} to repair the {thing} {end}",
            "The {job} blamed {cue} for the {thing} {end}",
            "After work, the {job} bought {cue} a {thing} {end}",
            "The {job} did it {cue} {time} {end}",
            "The {job} was proud of {cue} {end}",
            "The {job} drove to the {place} by {cue} {end}",
        ),
        "kinship": (
            "The {job} is the {cue} of my friend {end}",
            "My {cue} is a {job} at the {place} {end}",
            "Our {cue}, the {job}, forgot the {thing} {end}",
            "The {job} is a {cue} of two teenagers {end}",
            "The {job} was a good {cue} {end}",
            "I met the {job}, the {cue} of our guest, {end}",
            "Your {cue} worked as a {job} {time} {end}",
            "As a {job} and {cue}, nobody rests {end}",
        ),
        "noun": (
            "The {job} is a {cue} from the {place} {end}",
            "A young {cue} works as a {job} {end}",
            "This {cue} is the best {job} in town {end}",
            "The {cue} who works as a {job} bought a {thing} {end}",
            "The {job} was an old {cue} with a {thing} {end}",
            "That {job} is the {cue} I saw {time} {end}",
            "Everyone knows the {cue} is a {job} {end}",
            "The {cue} became a {job} {time} {end}",
        ),
    },
    "probe": {
        "subject": (
            "The {job} rested after {cue} cleaned the {thing} {end}",
            "Once {cue} became a {job}, life was calm {end}",
            "The {job} admitted {cue} needed a {thing} {end}",
            "They say the {job} left the {place} as {cue} wished {end}",
        ),
        "object": (
            "My neighbours invited the {job} and showed {cue} the {place} {end}",
            "The letter reached the {job} and made {cue} laugh {end}",
            "The {job} waited until somebody paid {cue} {end}",
            "People who meet the {job} admire {cue} {end}",
        ),
        "possessive": (
            "The {job} forgot {cue} {thing} at the {place} {end}",
            "With {cue} own hands the {job} built a {thing} {end}",
            "The {job} asked {cue} team for help {end}",
            "The {job} keeps {cue} promise {end}",
        ),
        "reflexive": (
            "The {job} asked {cue} why the {thing} broke {end}",
            "The {job} introduced {cue} to the group {end}",
            "Alone in the {place}, the {job} sang to {cue} {end}",
        ),
        "kinship": (
            "The {job} next door is my {cue} {end}",
            "Their {cue} was once a {job} in the {place} {end}",
            "The {job} is also somebody's {cue} {end}",
            "The child's {cue} hopes to be a {job} {end}",
        ),
        "noun": (
            "The new {job} is a tall {cue} with a {thing} {end}",
            "We hired a {cue} as our {job} {time} {end}",
            "The kind {cue}, a {job} by training, waved {end}",
            "It was a {cue} working as a {job} {end}",
        ),
    },
    "test": {
        "subject": (
            "Since {cue} started as a {job}, the {place} is busy {end}",
            "The {job} laughed and then {cue} left {end}",
            "No one saw the {job} when {cue} took the {thing} {end}",
        ),
        "object": (
            "The town honours the {job} and remembers {cue} {end}",
            "If you find the {job}, please greet {cue} {end}",
            "Rain kept the {job} inside and bored {cue} {end}",
        ),
        "possessive": (
            "The {job} carried {cue} {thing} across the {place} {end}",
            "The {job} spent {cue} holiday reading {end}",
            "At {cue} desk the {job} wrote about the {thing} {end}",
        ),
        "reflexive": (
            "The {job} made {cue} some tea {end}",
            "Quietly the {job} told {cue} that the {thing} was safe {end}",
        ),
        "kinship": (
            "My {cue} trained as a {job} {time} {end}",
            "This {job} has been a {cue} for years {end}",
            "We asked the {job}, a proud {cue}, about the {thing} {end}",
        ),
        "noun": (
            "A friendly {cue} is the {job} here {end}",
            "The {job} we met {time} is a {cue} {end}",
            "I know that {cue}, the {job} from the {place}, {end}",
        ),
    },
}

# What the texts of a split end in: words after which the person is often named again.
ENDINGS: dict[Split, tuple[str, ...]] = {
    "fit": (
        "because",
        "when",
        "and then",
        "and said that",
        "so",
        "before",
        "and I think that",
        "as if",
    ),
    "probe": ("until", "while", "and everyone says that", "and"),
    "test": ("after", "although", "and it is clear that", "but"),
}

_FILLERS: dict[str, tuple[str, ...]] = {
    "place": ("market", "station", "village", "harbour", "hospital", "school", "park", "office"),
    "thing": ("letter", "ladder", "train", "clock", "window", "basket", "camera", "lamp"),
    "time": ("yesterday", "this morning", "last week", "in spring", "on Monday", "at noon"),
}

# Prompt patterns whose next word is often a pronoun. The second says the gender with {cue}.
_OPEN: tuple[str, ...] = (
    "The {job} said that",
    "The {job} was tired because",
    "The {job} went home when",
    "I spoke to the {job} and",
)
_CUED: tuple[str, ...] = (
    "The {job} is a {cue}. The {job} said that",
    "The {cue} who works as a {job} was tired because",
    "My {kin} is a {job}, and everybody knows that",
    "This {job} is a proud {kin} who smiled when",
)


@dataclass(frozen=True)
class GenderText:
    """One text and what is known about it.

    Args:
        text: The words, without a full stop, so that the last token expects a continuation.
        gender: 0 for feminine, 1 for masculine.
        cue: The kind of word that says the gender, a key of :data:`CUES`.
        profession: The profession named in it.
        lean: Lean of the profession, a key of :data:`ODDS`.
        template: The pattern the text was made from.
    """

    text: str
    gender: int
    cue: str
    profession: str
    lean: str
    template: str


def _article(text: str) -> str:
    """Return ``text`` with "a" before a vowel turned into "an"."""
    words = text.split(" ")
    for index in range(len(words) - 1):
        if words[index] in ("a", "A") and words[index + 1][:1].lower() in "aeiou":
            words[index] += "n"
        elif words[index] in ("an", "An") and words[index + 1][:1].lower() not in "aeiou":
            words[index] = words[index][:1]
    return " ".join(words)


def _render(template: str, job: str, word: str, end: str, rng: random.Random) -> str:
    """Return a template with every slot filled."""
    fillers = {name: rng.choice(options) for name, options in _FILLERS.items()}
    text = _article(template.format(job=job, cue=word, end=end, **fillers))
    return text[0].upper() + text[1:]


def _jobs(split: Split) -> list[tuple[str, str]]:
    """Return ``(profession, lean)`` of a split."""
    return [(job, lean) for lean, jobs in PROFESSIONS[split].items() for job in jobs]


def _check(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")


def gender_texts(split: Split, n: int, *, seed: int = 0) -> list[GenderText]:
    """Return ``n`` different texts of a split.

    In ``fit`` gender follows the profession at :data:`ODDS`, elsewhere at :data:`EVEN_ODDS`.
    Cues have about equal shares, and exactly half of the texts (rounded up) are feminine.

    Args:
        split: ``"fit"`` for the eraser, ``"probe"`` to train probes, ``"test"`` to read them.
        n: Number of texts, at least 2.
        seed: Seed of the draw.

    Returns:
        The texts, in random order.

    Raises:
        ValueError: If the split is unknown or ``n`` is below 2 or above what the templates yield.
    """
    _check(split)
    if n < 2:
        raise ValueError(f"n must be at least 2, got {n}")
    odds = ODDS if split == "fit" else EVEN_ODDS
    rng = random.Random(f"{seed}-{split}")  # noqa: S311 texts, not secrets
    jobs, found, seen = _jobs(split), [], set[str]()
    wanted = [(n + 1) // 2, n // 2]
    cues = itertools.cycle(CUES)
    for _ in range(200 * n):
        if not any(wanted):
            break
        cue = next(cues)
        job, lean = rng.choice(jobs)
        gender = 0 if rng.random() < odds[lean] else 1
        template = rng.choice(TEMPLATES[split][cue])
        word, end = rng.choice(CUES[cue])[gender], rng.choice(ENDINGS[split])
        text = _render(template, job, word, end, rng)
        if wanted[gender] and text not in seen:
            seen.add(text)
            wanted[gender] -= 1
            found.append(GenderText(text, gender, cue, job, lean, template))
    if any(wanted):
        raise ValueError(
            f"split {split!r} yields about {len(found)} different texts, {n} were asked for; ask for fewer"
        )
    rng.shuffle(found)
    return found


def open_prompts(split: Split = "test") -> list[str]:
    """Return prompts that name a profession and leave the gender open, e.g. "The nurse said that".

    Raises:
        ValueError: If the split is unknown.
    """
    _check(split)
    return [_article(p.format(job=job)) for p in _OPEN for job, _ in _jobs(split)]


def cued_prompts(split: Split = "test") -> list[tuple[str, str]]:
    """Return pairs ``(feminine, masculine)`` of prompts that differ in the stated gender alone.

    Raises:
        ValueError: If the split is unknown.
    """
    _check(split)
    return list(_cued(split))


def _cued(split: Split) -> Iterator[tuple[str, str]]:
    nouns, kin = CUES["noun"], CUES["kinship"]
    for index, (pattern, (job, _)) in enumerate(itertools.product(_CUED, _jobs(split))):
        noun, relative = nouns[index % len(nouns)], kin[index % len(kin)]
        feminine, masculine = (
            _article(pattern.format(job=job, cue=noun[g], kin=relative[g])) for g in (0, 1)
        )
        yield feminine, masculine


def profession_sentences(splits: Sequence[Split] = ("probe", "test")) -> list[str]:
    """Return one sentence without gender for each profession of the splits, for measuring topics.

    Raises:
        ValueError: If a split is unknown.
    """
    for split in splits:
        _check(split)
    return [_article(f"A {job} talked about the daily work of a {job}.")
            for split in splits for job, _ in _jobs(split)]  # fmt: skip


NEUTRAL_SENTENCES: tuple[str, ...] = (
    "The river froze early that winter and the ferry stayed in the harbour for weeks.",
    "Copper conducts heat well, which is why many good pans have a copper base.",
    "A small clock on the shelf ticked louder than the rain against the window.",
    "The recipe asks for two cups of flour, a pinch of salt and cold butter.",
    "Most of the old maps show the island much closer to the coast than it is.",
    "The train to the north leaves at nine and stops at every village on the way.",
    "Light from the nearest star takes more than four years to reach the Earth.",
    "After the storm, the beach was covered with broken shells and driftwood.",
    "The library closes early on Fridays, but the reading room stays open.",
    "Wheat and barley were among the first plants that people learned to farm.",
    "The new bridge carries trains on the upper level and cars on the lower one.",
    "A glacier moves slowly, but over centuries it can carve a deep valley.",
    "The printer in the hallway is out of paper again, so the forms are late.",
    "Bees find their way home by the position of the sun and by landmarks.",
    "The committee will publish the results of the survey at the end of the month.",
    "Sea water is about three and a half percent salt, most of it common salt.",
    "The orchard behind the mill produces apples, pears and a few bitter plums.",
    "In autumn the leaves of the maple turn red before they fall to the ground.",
    "The museum keeps its oldest coins in a dark room behind thick glass.",
    "A good knife should be sharpened often and never left wet in the sink.",
    "The road to the summit is closed from November until the snow melts in May.",
    "Paper was made from rags long before anyone thought of using wood.",
    "The battery lasts about ten hours when the screen is not too bright.",
    "Heavy rain washed the seeds away, so the field had to be planted twice.",
    "The village has one shop, one school and more sheep than houses.",
    "Sound travels faster through water than through air, and faster still through steel.",
    "The old piano needs tuning, but the lower notes are still warm and clear.",
    "Every spring the storks return to the same chimney at the edge of town.",
    "The instructions were printed in six languages and were unclear in all of them.",
    "A layer of clay under the sand keeps the water from draining away.",
    "The moon was bright enough to read the signs along the mountain path.",
    "Coffee grows best on high slopes where the nights are cool and dry.",
    "The factory recycles nearly all the water that it uses to cool the machines.",
    "Two lines that never meet, however far they run, are called parallel.",
    "The bakery on the corner sells out of rye bread before eight in the morning.",
    "Volcanic soil is rich in minerals and often gives very good harvests.",
    "The bus was full, so a dozen passengers waited for the next one.",
    "Iron rusts when it is exposed to oxygen and moisture for a long time.",
    "The lighthouse has been run by a computer for more than twenty years.",
    "A thick fog covered the valley, and only the church tower could be seen.",
    "The contract must be signed by both parties before the end of the year.",
    "Whales sleep with half of the brain awake so that they can keep breathing.",
    "The garden needs water twice a day when the weather is hot and windy.",
    "The first telescopes were made with lenses that were ground by hand.",
    "The price of sugar rose sharply after the harvest failed in the south.",
    "A wooden fence runs along the stream and ends at a rusty gate.",
    "The software checks every file for errors before it makes a copy.",
    "Deserts can be cold, and some of the driest places on Earth are icy.",
    "The soup tastes better on the second day, when the spices have settled.",
    "Traffic was slow near the stadium because of the match in the evening.",
    "The mountain hut offers simple meals, hot tea and a dry place to sleep.",
    "Glass is made from sand that has been melted at a very high temperature.",
    "The shop repairs bicycles, sells used tyres and rents out small trailers.",
    "Many birds fly south when the days grow shorter and food becomes scarce.",
    "The report lists the causes of the delay and suggests three remedies.",
    "A compass needle points north because the Earth is itself a magnet.",
    "The cellar is cool and dark, which is ideal for storing potatoes.",
    "Each box holds twelve jars, and each jar holds half a litre of honey.",
    "The tide comes in quickly here, so the path across the sand is marked.",
    "The concert began with a short piece for strings and ended with a march.",
)
