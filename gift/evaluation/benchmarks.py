"""Benchmarks by name: data set, split, conversion of rows to questions, and check.

A benchmark's rows are downloaded with `datasets`, or come from a JSONL file with the data set's own
fields. Field names and splits are those of lm-evaluation-harness 0.4.13 where it has the benchmark.
"""

import importlib.util
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from gift.data.rows import json_lines
from gift.errors import InputError

Row = dict[str, Any]
# With its place for messages, and its number from 1.
PlacedRow = tuple[str, int, Row]

MATH_PROMPT = "Please reason step by step, and put your final answer within \\boxed{}."
# The six subjects that Med-PaLM evaluates on (Singhal et al. 2023, arXiv 2212.13138).
MEDICAL_SUBJECTS = (
    "anatomy",
    "clinical_knowledge",
    "college_biology",
    "college_medicine",
    "medical_genetics",
    "professional_medicine",
)


class Benchmark(NamedTuple):
    """One benchmark; `question` converts a row of the data set to a question, or to None."""

    dataset: str
    split: str
    question: Callable[[Row], Row | None]
    check: Literal["math", "choice"]
    source: str
    config: str | None = None
    group: str | None = None


def _math(question: str, answer: str = "answer") -> Callable[[Row], Row]:
    return lambda row: {**row, "question": row[question], "answer": row[answer]}


def _gsm8k(row: Row) -> Row:
    _, mark, number = row["answer"].rpartition("#### ")
    if not mark:
        raise ValueError("`answer` does not end with #### and a number")
    return {"question": row["question"], "answer": number.strip().replace(",", "")}


def _olympiad(row: Row) -> Row:
    parts = [row.get("context"), row["question"]]
    answers = row["final_answer"]
    return {
        "question": "\n".join(part for part in parts if part),
        "answer": answers if isinstance(answers, str) else ", ".join(answers),
        "subfield": row.get("subfield") or "unknown",
    }


def _medqa(row: Row) -> Row:
    choices = [row[f"ending{number}"] for number in range(4)]
    return {"question": row["sent1"], "choices": choices, "answer": row["label"]}


def _medmcqa(row: Row) -> Row:
    return {
        "question": row["question"],
        "choices": [row[f"op{letter}"] for letter in "abcd"],
        "answer": row["cop"],
        "subject_name": row.get("subject_name") or "unknown",
    }


def _mmlu(row: Row) -> Row:
    return {name: row[name] for name in ("question", "choices", "answer", "subject")}


def _medical_mmlu(row: Row) -> Row | None:
    return _mmlu(row) if row["subject"] in MEDICAL_SUBJECTS else None


BENCHMARKS: dict[str, Benchmark] = {
    "math500": Benchmark(
        "HuggingFaceH4/MATH-500",
        "test",
        _math("problem"),
        "math",
        "Lightman et al. 2023, arXiv 2305.20050; from MATH, Hendrycks et al. 2021",
        group="subject",
    ),
    "minerva-math": Benchmark(
        "math-ai/minervamath",
        "test",
        _math("question"),
        "math",
        "Lewkowycz et al. 2022, arXiv 2206.14858",
    ),
    "olympiadbench": Benchmark(
        "Hothan/OlympiadBench",
        "train",
        _olympiad,
        "math",
        "He et al. 2024, arXiv 2402.14008; English competition mathematics without images",
        config="OE_TO_maths_en_COMP",
        group="subfield",
    ),
    "aime24": Benchmark(
        "HuggingFaceH4/aime_2024", "train", _math("problem"), "math", "AIME I and II of 2024"
    ),
    "amc23": Benchmark("math-ai/amc23", "test", _math("question"), "math", "AMC 12 of 2023"),
    "gsm8k": Benchmark(
        "openai/gsm8k", "test", _gsm8k, "math", "Cobbe et al. 2021, arXiv 2110.14168", config="main"
    ),
    "medqa": Benchmark(
        "GBaker/MedQA-USMLE-4-options-hf",
        "test",
        _medqa,
        "choice",
        "Jin et al. 2020, arXiv 2009.13081",
    ),
    "medmcqa": Benchmark(
        "openlifescienceai/medmcqa",
        "validation",
        _medmcqa,
        "choice",
        "Pal et al. 2022, arXiv 2203.14371; its test split has no answers",
        group="subject_name",
    ),
    "mmlu": Benchmark(
        "cais/mmlu",
        "test",
        _mmlu,
        "choice",
        "Hendrycks et al. 2020, arXiv 2009.03300",
        config="all",
        group="subject",
    ),
    "mmlu-medical": Benchmark(
        "cais/mmlu",
        "test",
        _medical_mmlu,
        "choice",
        "the subjects of MMLU in Singhal et al. 2023, arXiv 2212.13138",
        config="all",
        group="subject",
    ),
}
# Benchmarks that lm-eval evaluates, and its tasks.
HARNESS_TASKS = {"ifeval": "ifeval"}


def benchmark_rows(name: str, data: Path | None) -> tuple[Iterator[PlacedRow], Row]:
    """The benchmark's rows as questions, and a record of their source.

    From `data`, JSONL with the data set's own fields, or downloaded where it is None.

    Raises:
        InputError: no download is possible, or (while iterating) a row lacks a field.
    """
    benchmark = BENCHMARKS[name]
    record: Row = {
        "benchmark": name,
        "dataset": benchmark.dataset,
        "config": benchmark.config,
        "split": benchmark.split,
        "source": benchmark.source,
    }
    if data is not None:
        return _questions(name, json_lines(data)), {**record, "file": str(data)}
    rows = _download(name, benchmark)
    # `datasets` keeps each version in a folder named by it: of the hub, the commit.
    (version,) = {Path(file["filename"]).parent.name for file in rows.cache_files}
    places = ((f"{benchmark.dataset}, row {n}", n, dict(row)) for n, row in enumerate(rows, 1))
    return _questions(name, places), {**record, "version": version}


def _questions(name: str, rows: Iterable[PlacedRow]) -> Iterator[PlacedRow]:
    benchmark = BENCHMARKS[name]
    for place, number, row in rows:
        try:
            question = benchmark.question(row)
        except KeyError as missing:
            raise InputError(
                f"{place}: has no field {missing}, which --benchmark {name} reads; bring the "
                f"{benchmark.split} split of {benchmark.dataset} with its own field names"
            ) from None
        except (TypeError, ValueError, AttributeError) as error:
            raise InputError(
                f"{place}: is no row of {benchmark.dataset}, which --benchmark {name} reads "
                f"({error})"
            ) from None
        if question is not None:
            yield place, number, question


def _download(name: str, benchmark: Benchmark) -> Any:
    config = f", config {benchmark.config}," if benchmark.config else ""
    bring = (
        f"or bring the {benchmark.split} split of {benchmark.dataset}{config} as JSONL with its "
        "own field names and pass it as --data"
    )
    if importlib.util.find_spec("datasets") is None:
        raise InputError(
            f"--benchmark {name}: the package datasets is not installed; install "
            f"gift-tuning[hub], {bring}"
        )
    from datasets import load_dataset

    try:
        return load_dataset(benchmark.dataset, benchmark.config, split=benchmark.split)
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"--benchmark {name}: cannot download {benchmark.dataset} ({reason}); connect to the "
            f"network, {bring}"
        ) from error
