"""Benchmarks by name, and multiple choice: rows in the data sets' formats, scores by hand."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import gift.evaluation.benchmarks
from gift.config import EvaluateConfig
from gift.errors import InputError
from gift.evaluate import evaluate
from gift.evaluation.benchmarks import BENCHMARKS, MEDICAL_SUBJECTS, benchmark_rows

# A row as each data set has it, and the question, answer and choices it becomes.
ROWS: dict[str, tuple[dict[str, Any], tuple[Any, ...]]] = {
    "math500": ({"problem": "1+1", "answer": "2", "subject": "Algebra"}, ("1+1", "2", None)),
    "minerva-math": ({"question": "1+1", "answer": "2"}, ("1+1", "2", None)),
    "olympiadbench": (
        {"context": "Let a=1.", "question": "a+1?", "final_answer": ["2", "3"], "subfield": "A"},
        ("Let a=1.\na+1?", "2, 3", None),
    ),
    "aime24": ({"id": 1, "problem": "1+1", "answer": "002"}, ("1+1", "002", None)),
    "amc23": ({"id": 1, "question": "1+1", "answer": 27.0}, ("1+1", 27.0, None)),
    "gsm8k": ({"question": "1+1", "answer": "One\n#### 1,200"}, ("1+1", "1200", None)),
    "medqa": (
        {"sent1": "q", "ending0": "a", "ending1": "b", "ending2": "c", "ending3": "d", "label": 2},
        ("q", 2, ["a", "b", "c", "d"]),
    ),
    "medmcqa": (
        {"question": "q", "opa": "a", "opb": "b", "opc": "c", "opd": "d", "cop": 1},
        ("q", 1, ["a", "b", "c", "d"]),
    ),
    "mmlu": (
        {"question": "q", "subject": "law", "choices": ["a", "b", "c", "d"], "answer": 3},
        ("q", 3, ["a", "b", "c", "d"]),
    ),
    "mmlu-medical": (
        {"question": "q", "subject": "anatomy", "choices": ["a", "b", "c", "d"], "answer": 3},
        ("q", 3, ["a", "b", "c", "d"]),
    ),
}


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", BENCHMARKS)
def test_rows_become_questions(name: str, tmp_path: Path) -> None:
    row, expected = ROWS[name]
    rows, record = benchmark_rows(name, write_rows(tmp_path / "data.jsonl", [row]))
    ((place, number, question),) = rows
    assert (question["question"], question["answer"], question.get("choices")) == expected
    assert place.endswith("data.jsonl, line 1") and number == 1
    assert record["dataset"] == BENCHMARKS[name].dataset and record["file"]
    (tmp_path / "data.jsonl").write_text('{"other": 1}')
    with pytest.raises(InputError, match=f"line 1: has no field .*--benchmark {name} reads"):
        list(benchmark_rows(name, tmp_path / "data.jsonl")[0])


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("gsm8k", {"question": "x", "answer": 5}, "is no row of openai/gsm8k"),
        ("gsm8k", {"question": "x", "answer": "5 apples"}, "does not end with ####"),
        ("olympiadbench", {"question": "x", "final_answer": None}, "is no row of Hothan"),
        ("olympiadbench", {"question": 3, "final_answer": ["5"]}, "is no row of Hothan"),
    ],
)
def test_rows_of_other_kinds_are_named(
    name: str, row: dict[str, Any], message: str, tmp_path: Path
) -> None:
    rows, _ = benchmark_rows(name, write_rows(tmp_path / "data.jsonl", [row]))
    with pytest.raises(InputError, match=f"line 1: .*{message}"):
        list(rows)


@pytest.mark.parametrize(
    ("name", "check"), [("mmlu", "exact"), ("medqa", "math"), ("gsm8k", "choice")]
)
def test_a_benchmark_keeps_its_kind_of_question(name: str, check: str, tmp_path: Path) -> None:
    config = EvaluateConfig(model="m", output=tmp_path / "o", benchmark=name, check=check)  # pyright: ignore
    with pytest.raises(InputError, match=f"--check: {check} is no check for --benchmark {name}"):
        config.check_by()


def test_medical_mmlu_keeps_its_subjects(tmp_path: Path) -> None:
    row = ROWS["mmlu"][0]
    subjects = [*MEDICAL_SUBJECTS, "law", "college_physics"]
    path = write_rows(tmp_path / "data.jsonl", [{**row, "subject": each} for each in subjects])
    found = [question["subject"] for _, _, question in benchmark_rows("mmlu-medical", path)[0]]
    assert found == list(MEDICAL_SUBJECTS)


def test_a_download_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hub").mkdir()
    write_rows(tmp_path / "hub" / "test.jsonl", [ROWS["math500"][0]] * 2)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    local = BENCHMARKS["math500"]._replace(dataset=str(tmp_path / "hub"))
    monkeypatch.setitem(gift.evaluation.benchmarks.BENCHMARKS, "math500", local)
    rows, record = benchmark_rows("math500", None)
    assert [question["question"] for _, _, question in rows] == ["1+1"] * 2
    write_rows(tmp_path / "hub" / "test.jsonl", [ROWS["math500"][0]] * 3)
    assert record["version"] != benchmark_rows("math500", None)[1]["version"]


def test_without_a_network_the_file_to_bring_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(
        InputError, match=r"cannot download openai/gsm8k \(no route.*test split.*config main.*JSONL"
    ):
        benchmark_rows("gsm8k", None)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_model(tmp_path_factory.mktemp("model"))


def choose(model: Path, folder: Path, rows: list[Any], **options: Any) -> EvaluateConfig:
    data = write_rows(folder / "data.jsonl", rows)
    settings: dict[str, Any] = {"model": str(model), "data": data, "output": folder / "out"}
    return EvaluateConfig(**{**settings, "device": "cpu", "check": "choice", **options})


QUESTIONS = [
    {"question": f"which is {n}", "choices": ["one", "two", "three"][: 2 + n % 2], "answer": n % 2}
    for n in range(7)
]


def test_the_likeliest_letter_is_chosen(model: Path, tmp_path: Path) -> None:
    """Against the model's own logits of each whole text, one at a time."""
    config = choose(model, tmp_path, QUESTIONS, batch_size=3)
    metrics = evaluate(config)
    samples = [json.loads(line) for line in (config.output / "samples.jsonl").open()]
    loaded = AutoModelForCausalLM.from_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    for question, sample in zip(QUESTIONS, samples, strict=True):
        scores = []
        for letter, option in zip("ABC", question["choices"], strict=False):
            assert f"{letter}. {option}" in sample["prompt"]
            prompt = tokenizer(sample["prompt"], add_special_tokens=False)["input_ids"]
            ids = tokenizer(sample["prompt"] + letter, add_special_tokens=False)["input_ids"]
            logprobs = loaded(torch.tensor([ids])).logits[0].detach().double().log_softmax(-1)
            scores.append(sum(float(logprobs[t - 1, ids[t]]) for t in range(len(prompt), len(ids))))
        expected = torch.tensor(scores).softmax(0).tolist()
        assert list(sample["probabilities"].values()) == pytest.approx(expected, rel=1e-4)
        assert sample["chosen"] == "ABC"[scores.index(max(scores))]
        assert sample["answer"] == "AB"[question["answer"]]
        assert sample["correct"] == (sample["chosen"] == sample["answer"])
    assert metrics["accuracy"] == sum(sample["correct"] for sample in samples) / 7
    assert len({sample["chosen"] for sample in samples}) >= 1 and metrics["questions"] == 7


def test_an_interrupted_choice_goes_on_and_ends_the_same(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "whole").mkdir()
    whole = choose(model, tmp_path / "whole", QUESTIONS, batch_size=2)
    evaluate(whole)
    passes, forward = [], gift.evaluation.choices.last_hidden_state

    def stop_at_third(*arguments: Any, **options: Any) -> Any:
        passes.append(1)
        if len(passes) == 3:
            raise RuntimeError("stopped")
        return forward(*arguments, **options)

    monkeypatch.setattr(gift.evaluation.choices, "last_hidden_state", stop_at_third)
    config = choose(model, tmp_path, QUESTIONS, batch_size=2)
    with pytest.raises(RuntimeError, match="stopped"):
        evaluate(config)
    assert not config.output.exists()
    evaluate(config)
    assert len(passes) == 3 + 2  # two batches of four were kept
    first, second = (c.output / "samples.jsonl" for c in (whole, config))
    assert first.read_text() == second.read_text()


def test_a_benchmark_is_evaluated_by_its_rules(model: Path, tmp_path: Path) -> None:
    rows = [ROWS["mmlu"][0] | {"subject": subject} for subject in ("law", "anatomy", "law")]
    config = choose(model, tmp_path, rows, benchmark="mmlu", check=None)
    metrics = evaluate(config)
    assert metrics["data"]["source"].startswith("Hendrycks")
    assert metrics["groups"]["law"]["questions"] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 8}, "--samples: the answer of a multiple choice is its likeliest letter"),
        ({"data": None}, "--data: is required, or name a --benchmark"),
    ],
)
def test_options_that_have_no_part_in_a_choice(
    model: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        evaluate(choose(model, tmp_path, QUESTIONS, **options))


def test_a_file_without_rows_is_named(model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.jsonl has no rows"):
        evaluate(choose(model, tmp_path, []))
