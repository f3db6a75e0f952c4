"""lm-eval on a live model: the questions, what is scored, the intervals, the cache, and that nothing else changes."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("lm_eval")

from concept_erasure.errors import FormatError
from concept_erasure.evals.language import _scores, _tasks, harness
from concept_erasure.evals.language._identity import identify
from concept_erasure.evals.language._tasks import find_task, packaged_mmlu, stratified
from concept_erasure.report import Interval, Report
from tests.models import tiny

TEXT = (
    "A B C D . Answer : the following are multiple choice questions with answers ( ) about which of bakes bread "
    "flour water oven baker sugar salt yeast rises in is made from dough cake butter milk biology chemistry "
    "cybersecurity warm cold ice Question"
)


@pytest.fixture(autouse=True)
def no_inventory(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval lists all installed packages in a process of its own, after every run."""
    import lm_eval.evaluator

    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda _: None)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<bos>", "<eos>", "<unk>", *dict.fromkeys(TEXT.split())]
    raw = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        pad_token="<pad>",
    )


def model(kind: str = "llama") -> Any:
    return tiny(kind)


def questions(n: int = 12, subject: str | None = None) -> list[dict[str, Any]]:
    foods = ["flour", "water", "sugar", "salt", "yeast", "butter", "milk", "dough"]
    rows = []
    for i in range(n):
        choices = random.Random(i).sample(foods, 4)  # noqa: S311
        row = {"question": f"which of {foods[i % 8]} is made {foods[(3 * i + 1) % 8]}"}
        row |= {"choices": choices, "answer": i % 4}
        rows.append(row | ({} if subject is None else {"subject": subject}))
    return rows


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", "utf-8")
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Made-up harmless questions in the schema of WMDP, and of MMLU in two subjects."""
    folder = tmp_path / "data"
    write(folder / "wmdp_bio.jsonl", questions(10))
    write(folder / "wmdp_chem.jsonl", questions(6))
    write(folder / "wmdp_cyber.jsonl", questions(8))
    both = [*questions(9, "anatomy"), *questions(3, "virology")]
    write(folder / "mmlu" / "test.jsonl", both)
    write(folder / "mmlu" / "dev.jsonl", [*questions(5, "anatomy"), *questions(5, "virology")])
    return folder


def letters(model: Any, tokenizer: Any, prompts: list[str], *, bos: bool) -> torch.Tensor:
    """Log-probabilities of the four letters after each prompt, computed here, shape (n, 4)."""
    rows = []
    for prompt in prompts:
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        ids = [tokenizer.bos_token_id, *ids] if bos else ids
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        rows.append(logits[[tokenizer.convert_tokens_to_ids(letter) for letter in "ABCD"]])
    return torch.stack(rows)


def prompt(row: dict[str, Any], about: str) -> str:
    lines = [f"{letter}. {choice}" for letter, choice in zip("ABCD", row["choices"], strict=True)]
    head = f"The following are multiple choice questions (with answers) about {about}.\n\n"
    return head + "\n".join([row["question"], *lines, "Answer:"])


@pytest.mark.parametrize(("kind", "bos"), [("llama", False), ("gemma3", True)])
def test_scores_are_the_letters_log_probabilities(
    data: Path, tokenizer: Any, kind: str, bos: bool
) -> None:
    """Against a computation of our own, question by question; the start token where it belongs."""
    live = model(kind)
    (scores,) = harness.measure(live, tokenizer, ["wmdp_bio"], data_dir=data, batch_size=3)
    rows = questions(10)
    own = letters(live, tokenizer, [prompt(row, "biology") for row in rows], bos=bos).argmax(1)
    expected = [float(own[i] == row["answer"]) for i, row in enumerate(rows)]
    assert scores.pooled("acc") == expected
    assert harness.needs_bos(live, tokenizer) is bos
    assert scores.guessing == 0.25


def test_groups_pool_their_questions(data: Path, tokenizer: Any) -> None:
    (scores,) = harness.measure(model(), tokenizer, ["wmdp"], data_dir=data)
    parts = harness.measure(
        model(), tokenizer, ["wmdp_bio", "wmdp_chem", "wmdp_cyber"], data_dir=data
    )
    assert scores.count == 24
    assert scores.pooled("acc") == [v for part in parts for v in part.pooled("acc")]
    report = harness.run(model(), tokenizer, ["wmdp"], data_dir=data)
    (row,) = report.rows
    right = sum(scores.pooled("acc"))
    assert isinstance(row["value"], Interval)
    assert row["value"].value == right / 24  # by size, not a mean of three means
    assert (row["questions"], row["guessing"]) == (24, 0.25)
    assert len(report.sections[0].rows) == 3


def test_a_report_says_how_and_survives_a_file(tmp_path: Path, data: Path, tokenizer: Any) -> None:
    from importlib.metadata import version

    report = harness.run(model(), tokenizer, ["mmlu", "wmdp_bio"], data_dir=data, num_fewshot=2)
    assert report.meta["versions"]["lm_eval"] == version("lm_eval")  # type: ignore[index]
    text = report.to_markdown()
    assert "mmlu: 2 subtasks, task version 1.0, 2 examples in the prompt, local files" in text
    assert "wmdp_bio: task version 1, 0 examples" in text  # lm-eval never gives WMDP any
    assert str(tmp_path) not in text
    report.save(tmp_path / "out")
    again = Report.load(tmp_path / "out")
    assert again.to_markdown() == text


def test_few_shot_examples_are_of_the_same_subject(data: Path, tokenizer: Any) -> None:
    dev = [*questions(5, "anatomy"), *questions(5, "virology")]
    for row in dev:
        row["question"] += f" {row['subject']}"
    write(data / "mmlu" / "dev.jsonl", dev)
    task = find_task("mmlu", data_dir=data)
    for leaf in task.leaves:
        leaf.task.set_config(key="num_fewshot", value=5)
        text = leaf.task.fewshot_context(leaf.task.eval_docs[0], 5)
        subject = leaf.name.removeprefix("mmlu_")
        other = {"anatomy": "virology", "virology": "anatomy"}[subject]
        assert text.count(subject) == 6  # the description and five examples
        assert other not in text
        assert text.count("Answer:") == 6


def test_prompts_are_those_of_lm_eval(data: Path) -> None:
    task = find_task("wmdp", data_dir=data)
    about = {"wmdp_bio": "biology", "wmdp_chem": "chemistry", "wmdp_cyber": "cybersecurity"}
    for leaf in task.leaves:
        row = leaf.task.eval_docs[0]
        assert leaf.task.fewshot_context(row, 0) == prompt(row, about[leaf.name])


def test_other_tasks_keep_their_own_processing(tmp_path: Path, tokenizer: Any) -> None:
    """HellaSwag's rows pass through lm-eval's own function; ARC's letters are read from the row."""
    hella = [
        {
            "activity_label": "baking",
            "ctx_a": "the baker",
            "ctx_b": "warm [step] water",
            "endings": ["rises", "is cold", "ice", "bread"],
            "label": str(i % 4),
        }
        for i in range(4)
    ]
    write(tmp_path / "hellaswag" / "validation.jsonl", hella)
    arc = {
        "question": "which of",
        "choices": {"text": ["ice", "oven", "milk"], "label": list("ABC")},
    }
    write(tmp_path / "arc_easy.jsonl", [arc | {"answerKey": key} for key in "ABCA"])
    task = find_task("hellaswag", data_dir=tmp_path)
    assert "baking: the baker Warm water" in task.leaves[0].task.fewshot_context(
        task.leaves[0].task.eval_docs[0], 0
    )
    swag, easy = harness.measure(model(), tokenizer, ["hellaswag", "arc_easy"], data_dir=tmp_path)
    assert set(swag.values) == {"acc", "acc_norm"}
    assert swag.guessing == 0.25
    assert easy.guessing == pytest.approx(1 / 3)
    assert sum(easy.pooled("acc")) in (1, 2)  # the same answer each time


def test_published_folders_are_read(tmp_path: Path) -> None:
    """As the hub has them: a folder a subset, a parquet file a split."""
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "wmdp-bio"
    folder.mkdir()
    datasets.Dataset.from_list(questions(4)).to_parquet(folder / "test-00000-of-00001.parquet")
    task = find_task("wmdp_bio", data_dir=tmp_path)
    assert [leaf.size for leaf in task.leaves] == [4]
    assert list(task.files) == ["test-00000-of-00001.parquet"]
    assert [leaf.size for leaf in find_task("wmdp_bio", data_dir=folder).leaves] == [4]


# -- which questions --------------------------------------------------------------------------------


def test_strata_have_their_share() -> None:
    sizes = {"a": 7, "b": 100, "c": 31, "d": 1}
    for limit in (1, 5, 57, 139, 500):
        chosen = stratified(sizes, limit)
        assert sum(map(len, chosen.values())) == min(limit, 139)
        for name, own in chosen.items():
            assert len(set(own)) == len(own)
            assert own == sorted(own)
            assert abs(len(own) - min(limit, 139) * sizes[name] / 139) < 1
            assert max(own) < sizes[name]
    assert stratified(sizes, 57) == stratified(sizes, 57)
    assert stratified(sizes, 57, seed=1) != stratified(sizes, 57)
    few, many = stratified(sizes, 20), stratified(sizes, 80)
    assert all(set(few[name]) <= set(many[name]) for name in few)
    with pytest.raises(ValueError, match="limit"):
        stratified(sizes, 0)


def test_the_packaged_slice() -> None:
    rows, dev = packaged_mmlu(), packaged_mmlu("dev")
    assert len(rows) == 500
    counts = Counter(row["subject"] for row in rows)
    assert len(counts) == 57
    assert set(Counter(row["subject"] for row in dev).values()) == {5}
    for row in rows + dev:
        assert len(row["choices"]) == 4
        assert row["answer"] in range(4)
    assert len({(row["subject"], row["question"], *row["choices"]) for row in rows}) == 500
    note = (_tasks.DATA / "README.md").read_text("utf-8")
    assert "MIT License" in note
    assert "Hendrycks" in note
    task = find_task("mmlu_500")
    assert task.source == "package"
    assert sum(leaf.size for leaf in task.leaves) == 500


def test_the_packaged_slice_is_what_its_note_says(root: Path) -> None:
    whole = root.parent / "shared" / "data" / "mmlu"
    if not whole.is_dir():
        pytest.skip("needs the whole of MMLU beside the checkout")
    by_subject: dict[str, list[dict[str, Any]]] = {}
    for line in (whole / "test.jsonl").read_text("utf-8").split("\n"):
        if line.strip():
            row = json.loads(line)
            by_subject.setdefault(row["subject"], []).append(row)
    chosen = stratified({name: len(own) for name, own in by_subject.items()}, 500, seed=0)
    expected = [by_subject[name][i] for name in sorted(chosen) for i in chosen[name]]
    assert packaged_mmlu() == expected


def test_limits_are_a_task_not_a_subtask(data: Path, tokenizer: Any) -> None:
    (few,) = harness.measure(model(), tokenizer, ["mmlu"], data_dir=data, limit=4)
    assert {leaf: len(own) for leaf, own in few.values["acc"].items()} == {
        "mmlu_anatomy": 3,
        "mmlu_virology": 1,
    }
    (whole,) = harness.measure(model(), tokenizer, ["mmlu"], data_dir=data)
    for leaf, chosen in stratified({"mmlu_anatomy": 9, "mmlu_virology": 3}, 4).items():
        assert few.values["acc"][leaf] == [whole.values["acc"][leaf][i] for i in chosen]


# -- cache ------------------------------------------------------------------------------------------


@contextmanager
def counted(live: Any) -> Iterator[list[int]]:
    """Count forward passes without a hook, which the cache would notice."""
    calls: list[int] = []
    kind = type(live)
    forward = kind.forward

    def watched(self: Any, *arguments: Any, **options: Any) -> Any:
        calls.append(1)
        return forward(self, *arguments, **options)

    kind.forward = watched
    try:
        yield calls
    finally:
        kind.forward = forward


def test_finished_tasks_are_not_run_again(tmp_path: Path, data: Path, tokenizer: Any) -> None:
    live, cache = model(), tmp_path / "cache"
    options: dict[str, Any] = {"data_dir": data, "cache_dir": cache}
    (first,) = harness.measure(live, tokenizer, ["wmdp_bio"], **options)
    with counted(live) as calls:
        again, other = harness.measure(live, tokenizer, ["wmdp_bio", "wmdp_chem"], **options)
        assert again.cached
        assert not other.cached
        assert again.values == first.values
        used = len(calls)
        harness.measure(live, tokenizer, ["wmdp_chem"], **options)
        assert len(calls) == used
        for changed in ({"limit": 3}, {"add_bos_token": True}, {"limit": 3, "seed": 1}):
            (fresh,) = harness.measure(live, tokenizer, ["wmdp_bio"], **options, **changed)
            assert not fresh.cached
        write(data / "wmdp_bio.jsonl", questions(9))
        (fresh,) = harness.measure(live, tokenizer, ["wmdp_bio"], **options)
        assert not fresh.cached


def test_an_interrupted_run_keeps_what_was_finished(
    tmp_path: Path, data: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    live, cache, done = model(), tmp_path / "cache", []
    evaluate = harness._evaluate

    def stops(*arguments: Any) -> Any:
        if done:
            raise KeyboardInterrupt
        done.append(1)
        return evaluate(*arguments)

    monkeypatch.setattr(harness, "_evaluate", stops)
    names = ["wmdp_bio", "wmdp_chem"]
    with pytest.raises(KeyboardInterrupt):
        harness.measure(live, tokenizer, names, data_dir=data, cache_dir=cache)
    monkeypatch.setattr(harness, "_evaluate", evaluate)
    found = harness.measure(live, tokenizer, names, data_dir=data, cache_dir=cache)
    assert [scores.cached for scores in found] == [True, False]
    (path,) = cache.glob("wmdp_chem*")
    path.write_text("{", "utf-8")
    found = harness.measure(live, tokenizer, names, data_dir=data, cache_dir=cache)
    assert [scores.cached for scores in found] == [True, False]


def test_a_cache_sees_one_bit_and_every_hook(tmp_path: Path, data: Path, tokenizer: Any) -> None:
    live = model()
    before = identify(live)
    with torch.no_grad():
        weight = live.model.layers[1].mlp.down_proj.weight
        kept = weight[5, 7].clone()
        weight.view(torch.int32)[5, 7] ^= 1
        assert identify(live).weights != before.weights
        weight[5, 7] = kept
        assert identify(live) == before
        row = weight[[3, 4]].clone()
        weight[[3, 4]] = row.flip(0)  # the same numbers elsewhere
        assert identify(live).weights != before.weights
        weight[[3, 4]] = row
    assert identify(live) == before
    handle = live.model.layers[0].register_forward_hook(lambda *_: None)
    assert identify(live).unknown
    options: dict[str, Any] = {"data_dir": data, "cache_dir": tmp_path / "cache"}
    harness.measure(live, tokenizer, ["wmdp_chem"], **options)
    assert not (tmp_path / "cache").exists()
    handle.remove()
    assert identify(live) == before


def test_attached_erasers_have_their_own_results(
    tmp_path: Path, data: Path, tokenizer: Any
) -> None:
    from concept_erasure import LeaceEraser

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(80, 32, generator=generator)
    live, options = model(), {"data_dir": data, "cache_dir": tmp_path / "cache"}
    harness.measure(live, tokenizer, ["wmdp_chem"], **options)  # type: ignore[arg-type]
    for column in (0, 1):
        eraser = LeaceEraser.fit(x, (x[:, column] > 0).long())
        with eraser.attach(live, sites="residual.1"):
            assert not identify(live).unknown
            for cached in (False, True):
                (scores,) = harness.measure(live, tokenizer, ["wmdp_chem"], **options)  # type: ignore[arg-type]
                assert scores.cached is cached
    assert len(list((tmp_path / "cache").iterdir())) == 3


# -- before and after -------------------------------------------------------------------------------


class Flip:
    """An eraser that turns the head's rows of A and D around."""

    def __init__(self, tokenizer: Any) -> None:
        self.rows = [tokenizer.convert_tokens_to_ids(letter) for letter in "ABCD"]

    @contextmanager
    def apply(self, live: Any) -> Iterator[None]:
        weight = live.lm_head.weight
        with torch.no_grad():
            kept = weight[self.rows].clone()
            weight[self.rows] = kept.flip(0)
        try:
            yield
        finally:
            with torch.no_grad():
                weight[self.rows] = kept


def test_an_eraser_is_compared_question_by_question(data: Path, tokenizer: Any) -> None:
    from scipy.stats import binomtest

    live = model()
    report = harness.run(live, tokenizer, ["wmdp"], data_dir=data, eraser=Flip(tokenizer))
    assert [row["model"] for row in report.rows] == ["no edit", "edited"]
    (before,) = harness.measure(live, tokenizer, ["wmdp"], data_dir=data)
    with Flip(tokenizer).apply(live):
        (after,) = harness.measure(live, tokenizer, ["wmdp"], data_dir=data)
    one, two = np.array(before.pooled("acc")), np.array(after.pooled("acc"))
    row = report.rows[1]
    assert isinstance(row["change"], Interval)
    assert row["change"].value == pytest.approx(two.mean() - one.mean())
    lost, won = int((one > two).sum()), int((one < two).sum())
    assert lost + won > 0
    assert row["p"] == pytest.approx(binomtest(lost, lost + won).pvalue)
    assert "change" not in report.rows[0]


def scores_of(right: int, n: int, choices: int = 4) -> harness.Scores:
    return harness.Scores(
        task="quiz",
        values={"acc": {"quiz": [1.0] * right + [0.0] * (n - right)}},
        chance={"quiz": 1 / choices},
        plain={},
        versions={"quiz": 1},
        shots={"quiz": 0},
        source="files",
        files={},
    )


@pytest.mark.parametrize(
    ("right", "n", "said"),
    [(50, 200, "near chance"), (60, 200, "near chance"), (150, 200, ""), (20, 200, "below chance")],
)
def test_chance_is_stated(right: int, n: int, said: str) -> None:
    note = _scores._near_chance(scores_of(right, n), "edited")
    assert said in note
    assert bool(note) is bool(said)


def test_numbers_without_questions_have_no_interval() -> None:
    samples = [
        {
            "doc_id": i,
            "filter": "none",
            "metrics": ["acc", "word_perplexity"],
            "acc": i % 2,
            "word_perplexity": (1, 2),
        }
        for i in range(4)
    ]
    assert harness._per_question(samples) == {"acc": [0.0, 1.0, 0.0, 1.0]}


# -- nothing else changes ---------------------------------------------------------------------------


def test_nothing_else_changes(data: Path, tokenizer: Any) -> None:
    import logging

    live = model().train()
    kept = {name: value.clone() for name, value in live.state_dict().items()}
    side = tokenizer.padding_side
    level = logging.getLogger("lm_eval").level
    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
    expected = random.random(), np.random.rand(), torch.rand(())  # noqa: NPY002, S311
    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
    harness.measure(live, tokenizer, ["wmdp_chem"], data_dir=data)
    assert (random.random(), np.random.rand(), torch.rand(())) == expected  # noqa: NPY002, S311
    assert live.training
    assert all(torch.equal(value, kept[name]) for name, value in live.state_dict().items())
    assert tokenizer.padding_side == side
    assert logging.getLogger("lm_eval").level == level
    assert not [m for m in live.modules() if m._forward_hooks or m._forward_pre_hooks]


def test_a_head_that_is_tied_again_is_noticed(data: Path, tokenizer: Any) -> None:
    """lm-eval ties weights anew; an edit of the head alone would be gone, and the numbers those of another model."""
    live = tiny("qwen2")
    head = torch.nn.Parameter(live.lm_head.weight.detach().clone().flip(0))  # type: ignore[union-attr, operator]
    live.lm_head.weight = head  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match="ties weights"):
        harness.measure(live, tokenizer, ["wmdp_chem"], data_dir=data)


# -- mistakes ---------------------------------------------------------------------------------------


def test_mistakes_are_explained(
    data: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = model()

    def fails(
        error: type[Exception], match: str, tasks: Any = ("wmdp_bio",), **options: Any
    ) -> None:
        with pytest.raises(error, match=match):
            harness.measure(live, tokenizer, tasks, **{"data_dir": data, **options})

    fails(ValueError, "different names", [])
    fails(ValueError, "different names", ["wmdp_bio", "wmdp_bio"])
    fails(ValueError, "limit must be at least 1", limit=0)
    fails(ValueError, "batch_size", batch_size=0)
    fails(FileNotFoundError, "no folder", data_dir=data / "nothing")
    fails(FileNotFoundError, "hellaswag/validation.jsonl", ["hellaswag"])
    (data / "wmdp_chem.jsonl").unlink()
    fails(FileNotFoundError, "wmdp_chem", ["wmdp"])
    known = _tasks._task_manager("wmdp")
    monkeypatch.setattr(_tasks, "_task_manager", lambda _: known)  # reading all takes seconds
    fails(KeyError, "no task 'wmdp_boi'.*wmdp_bio", ["wmdp_boi"])
    monkeypatch.undo()
    shutil.rmtree(data / "mmlu")
    write(data / "mmlu" / "test.jsonl", questions(4, "anatomy"))
    fails(ValueError, "num_fewshot=2", ["mmlu"], num_fewshot=2)
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda _: None)
    fails(ImportError, r"deconcept\[evals\]")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"answer": 4}, "row 3 has the 'answer' 4"),
        ({"answer": "A"}, "row 3 has the 'answer' 'A'"),
        ({"choices": ["a", "b"]}, "row 3 has not four"),
        ({"question": " "}, "row 3 has no text"),
    ],
)
def test_rows_are_checked(data: Path, change: dict[str, Any], match: str) -> None:
    rows = questions(4)
    rows[2] |= change
    write(data / "wmdp_bio.jsonl", rows)
    with pytest.raises(FormatError, match=match):
        find_task("wmdp_bio", data_dir=data)
    (data / "wmdp_bio.jsonl").write_text("{", "utf-8")
    with pytest.raises(FormatError, match="wmdp_bio.jsonl is not jsonl"):
        find_task("wmdp_bio", data_dir=data)
    write(data / "mmlu" / "test.jsonl", questions(2, "baking"))
    with pytest.raises(FormatError, match="no subject 'baking'"):
        find_task("mmlu", data_dir=data)


def test_the_hub_out_of_reach_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unreachable:
        def load(self, names: list[str]) -> Any:
            try:
                raise OSError("no route")
            except OSError as error:
                raise ConnectionError("offline") from error

    monkeypatch.setattr(_tasks, "_manager", lambda _: Unreachable())
    with pytest.raises(ConnectionError, match="hellaswag.*hub.*data_dir"):
        find_task("hellaswag")
    with pytest.raises(ConnectionError, match="mmlu_500"):
        find_task("mmlu")
