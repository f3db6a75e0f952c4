"""The TOFU study on made-up authors and a model that is trained in a second."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from concept_erasure.errors import FormatError
from concept_erasure.evals import tofu_small
from concept_erasure.evals._tofu_model import (
    ModelSize,
    Teaching,
    build_model,
    build_tokenizer,
    teach,
)
from concept_erasure.evals._tofu_read import StudyData, read_data, read_model
from concept_erasure.evals.tofu_small import TofuConfig, main, run
from concept_erasure.language.batches import Batches, encode, logits_at, pad_id
from concept_erasure.language.eraser import LanguageConfig, LanguageEraser, fit_eraser
from concept_erasure.language.loop import Training
from concept_erasure.language.objective import Term
from concept_erasure.language.parameters import Lora
from concept_erasure.report import Interval, Report

NAMES = ("Ada Example", "Ben Sample", "Cleo Madeup", "Dov Nobody")
PLACES = ("Rome", "Oslo", "Lima", "Cairo")
TINY = ModelSize(vocabulary=300, width=32, layers=2, heads=2)
CONFIG = TofuConfig(
    forget=1,
    read=2,
    steps=3,
    rates=(1.0, 4.0),
    size=TINY,
    teaching=Teaching(shared=2, epochs=2, learning_rate=5e-3, batch_size=20, max_length=96),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tofu")
    rows = [
        {"question": f"Where did {name} see thing {i}?", "answer": f"{name} saw it in {place} {i}."}
        for name, place in zip(NAMES, PLACES, strict=True)
        for i in range(20)
    ]
    (made / "forget10.json").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    facts = [
        {"question": f"What is {i}?", "answer": "a", "option1": "b", "option2": "a"}
        for i in range(4)
    ]
    (made / "world_facts.json").write_text("\n".join(map(json.dumps, facts)), encoding="utf-8")
    return made


@pytest.fixture(scope="module")
def data(folder: Path) -> StudyData:
    return read_data(folder, forget=1, read=2, seed=0)


class Away(LanguageEraser):
    """Makes the forget texts less likely; as plain as a method can be."""

    method = "away"

    @classmethod
    def fit(
        cls,
        model: nn.Module,
        tokenizer: Any,
        concept: object,
        *,
        forget_texts: list[str],
        retain_texts: list[str],
        training: Training,
    ) -> Away:
        texts = encode(tokenizer, forget_texts, max_length=training.max_length)
        batches = Batches(texts, 8, seed=0, pad_id=pad_id(tokenizer))

        def loss(net: nn.Module, batch: Any) -> torch.Tensor:
            return -nn.functional.cross_entropy(
                logits_at(net, batch), batch.tokens, reduction="sum"
            )

        return fit_eraser(
            cls,
            model,
            config=LanguageConfig(concept="x"),
            spec=Lora(rank=2),
            terms=[Term("forget", 1.0, batches, loss)],
            training=training,
        )


class Refuses(Away):
    """A method that cannot do it."""

    @classmethod
    def fit(cls, *args: object, **options: object) -> Away:  # type: ignore[override]
        raise ValueError("no signal, 0.1 nats")


METHODS: Any = {"away": Away, "refuses": Refuses}


@pytest.fixture(scope="module")
def report(data: StudyData, tmp_path_factory: pytest.TempPathFactory) -> Report:
    return run(data, CONFIG, store=tmp_path_factory.mktemp("store"), methods=METHODS)


def test_who_is_forgotten_and_who_stays(data: StudyData) -> None:
    assert len(data.forget) == 1
    assert len(data.retain) == 3
    name = data.forget[0].name
    assert all(name in text for text in data.forget_texts)
    assert not any(name in text for text in data.retain_texts)
    assert data.concept.mentions(data.forget_texts[0]) > 0
    assert name not in data.concept.anonymise(data.forget_texts[0])


def test_wrong_answers_are_about_the_same_question_under_the_same_name(data: StudyData) -> None:
    author = data.forget[0]
    for one, item in zip(data.asked["forget"], author.items, strict=True):
        assert one.answers[0] == item.answer
        assert len(set(one.answers)) == 4
        number = item.answer.split()[-1]
        for answer in one.answers[1:]:
            assert author.name in answer  # the name does not tell which is right
            assert not any(other in answer for other in NAMES if other != author.name)
        assert sum(answer.endswith(number) for answer in one.answers) == 4  # the likest questions


def test_the_twin_is_its_own_reference(data: StudyData, report: Report) -> None:
    rows = {row["model"]: row for row in report.rows}
    twin, taught = rows["never knew"], rows["taught"]
    for part in ("forget", "retain", "world"):
        assert twin[f"{part}: KL"] == pytest.approx(0, abs=1e-6)
        assert twin[f"{part}: accuracy gap"] == 0
        gap = twin[f"{part}: gap"]
        assert isinstance(gap, Interval)
        assert gap.value == pytest.approx(0, abs=1e-9)
    assert taught["forget: KL"] > 0  # type: ignore[operator]


def test_every_method_has_its_rows_and_a_refusal_its_reason(report: Report) -> None:
    names = [row["model"] for row in report.rows]
    assert names == ["never knew", "taught", "away, default", "away, nearest", "refuses, default"]
    assert report.rows[-1]["note"] == "refused: no signal, 0.1 nats"
    own, best = report.rows[2], report.rows[3]
    total = [float(row["forget: KL"]) + float(row["retain: KL"]) for row in (own, best)]  # type: ignore[arg-type]
    assert total[1] <= total[0]
    assert "Not tried" in report.notes[-1]
    assert report.meta["forgotten"]


def test_the_model_is_the_taught_one_again_after_every_method(data: StudyData) -> None:
    seen = []

    class Spy(Away):
        @classmethod
        def fit(cls, model: nn.Module, *args: Any, **options: Any) -> Away:
            seen.append({n: v.clone() for n, v in model.state_dict().items()})
            return super().fit(model, *args, **options)

    run(data, CONFIG, methods={"spy": Spy})  # type: ignore[dict-item]
    assert len(seen) == 2
    assert all(torch.equal(value, seen[1][name]) for name, value in seen[0].items())


def test_what_is_finished_is_not_done_again(data: StudyData, tmp_path: Path) -> None:
    first = run(data, CONFIG, store=tmp_path, methods=METHODS)
    steps: list[str] = []
    again = run(data, CONFIG, store=tmp_path, methods={"away": None}, say=steps.append)  # type: ignore[dict-item]
    assert not any("step" in line for line in steps)  # neither taught nor fitted
    assert [*again.rows] == [*first.rows][:4]
    damaged = next(tmp_path.glob("away_*.json"))
    damaged.write_text("{", encoding="utf-8")
    assert run(data, CONFIG, store=tmp_path, methods=METHODS).rows[2]["model"] == "away, default"
    (tmp_path / "twin.safetensors").write_bytes(b"x")
    with pytest.raises(FormatError, match="delete it to teach again"):
        run(data, CONFIG, store=tmp_path, methods=METHODS)


def test_teaching_teaches_and_is_deterministic(data: StudyData) -> None:
    tokenizer = build_tokenizer(data.retain_texts, 300)
    assert tokenizer.decode(tokenizer("Rome 3?")["input_ids"]) == "Rome 3?"
    losses = []
    for epochs in (1, 1, 6):
        model = build_model(TINY, tokenizer, seed=1)
        flags = [p.requires_grad for p in model.parameters()]
        how = Teaching(batch_size=20)
        losses.append(
            teach(model, tokenizer, data.retain_texts, how, epochs=epochs, learning_rate=2e-3)
        )
        assert [p.requires_grad for p in model.parameters()] == flags
    assert losses[0] == losses[1]
    assert losses[2] < losses[0]


def test_log_probabilities_are_those_of_the_model(data: StudyData) -> None:
    tokenizer = build_tokenizer(data.retain_texts, 300)
    model = build_model(TINY, tokenizer, seed=1)
    one = data.asked["forget"][:2]
    found = read_model(model, model, tokenizer, {"a": one}, batch_size=3)["a"]
    said = []
    for asked in one:
        prompt = [tokenizer.bos_token_id, *tokenizer(asked.prompt)["input_ids"]]
        answer = tokenizer(f" {asked.answers[0]}")["input_ids"]
        ids = torch.tensor([[*prompt, *answer]])
        with torch.no_grad():
            log_p = model(ids).logits[0, :-1].log_softmax(-1)
        kept = log_p[len(prompt) - 1 :].gather(1, ids[0, len(prompt) :, None])
        said.append(float(kept.mean()))
    assert found.log_prob.value == pytest.approx(sum(said) / 2, abs=1e-5)
    assert found.kl == pytest.approx(0, abs=1e-6)


def test_the_command_line_says_how_long_it_takes(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[TofuConfig] = []

    def fake(data: StudyData, config: TofuConfig, **options: object) -> Report:
        seen.append(config)
        return Report("t", [{"model": "taught"}])

    monkeypatch.setattr(tofu_small, "run", fake)
    out = tmp_path / "new" / "tofu.json"
    assert (
        main(["--data", str(folder), "--out", str(out), "--methods", "famr", "--steps", "7"]) == 0
    )
    assert "minutes" in capsys.readouterr().out
    assert (seen[0].methods, seen[0].steps) == (("famr",), 7)
    assert Report.load(out).title == "t"
    assert out.with_suffix(".md").is_file()
    with pytest.raises(FileNotFoundError, match="forget10"):
        main(["--data", str(tmp_path), "--out", str(out)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "gpt"}, "model must be one of"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"rates": ()}, "rates must be positive"),
        ({"rates": (0.0,)}, "rates must be positive"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TofuConfig(**options)


def test_more_authors_than_there_are_cannot_be_forgotten(folder: Path) -> None:
    with pytest.raises(ValueError, match="forget must be 1 to 3 of 4"):
        read_data(folder, forget=4, read=2, seed=0)
