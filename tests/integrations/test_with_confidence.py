"""A store joined to a Hugging Face data set: every weight is at its label."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from datasets import Dataset, DatasetDict, concatenate_datasets, load_dataset

from gift.annotate import annotate
from gift.confidence_store import load_store
from gift.config import AnnotateConfig, DataOptions
from gift.data.encoding import encode_file
from gift.datasets import with_confidence
from gift.errors import InputError

LENGTH = 45


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("joined")
    model = tiny.make_model(folder / "guide", num_hidden_layers=1, hidden_size=16)
    data = tiny.write_rows(folder / "task.jsonl")
    config = {"max_length": LENGTH, "max_dropped": 1.0, "output": folder / "store"}
    annotate(AnnotateConfig(model=str(model), data=data, **config))
    return folder


@pytest.fixture(scope="module")
def rows(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "task.jsonl").read_text().splitlines()
    kept = load_store(folder / "store").manifest["data"]["row_digests"]
    assert "" in kept, "some row is too long"
    return [json.loads(line) for line, digest in zip(lines, kept, strict=True) if digest]


def test_tokens_labels_and_weights_are_those_of_the_stages(
    folder: Path, rows: list[dict[str, Any]]
) -> None:
    store = load_store(folder / "store")
    options = DataOptions(max_length=LENGTH, max_dropped=1.0)
    examples = encode_file(folder / "task.jsonl", store.tokenizer(), options).kept
    joined = with_confidence(Dataset.from_list(rows), str(folder / "store"))
    assert joined.column_names == ["input_ids", "labels", "token_weight"]
    for row, example in zip(joined, examples, strict=True):
        assert row["input_ids"] == example.input_ids.tolist()
        is_target = np.array(row["labels"]) != -100
        assert (is_target == example.is_target).all()
        assert (np.array(row["labels"])[is_target] == example.input_ids[is_target]).all()
        weight = np.array(row["token_weight"], np.float32)
        assert (weight[is_target] == store.row(example.row)).all()
        assert not weight[~is_target].any()


def test_rows_are_found_in_any_order_and_form(
    folder: Path, rows: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    messages = [
        {
            "messages": [
                {"role": "user", "content": row["instruction"]},
                {"role": "assistant", "content": row["response"]},
            ],
            "id": number,
        }
        for number, row in enumerate(rows[:3])
    ]
    both = [Dataset.from_list(some) for some in (messages, rows[3:])]
    mixed = concatenate_datasets(both).select([4, 2, 0])
    found = with_confidence(mixed, load_store(folder / "store"))
    assert capsys.readouterr().err == "note: columns that nothing reads: id\n"
    whole = with_confidence(Dataset.from_list(rows), folder / "store")
    assert list(found) == [whole[place] for place in (4, 2, 0)]


def test_rows_without_confidence_are_named(
    folder: Path, rows: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    other = {"instruction": "What is 90 plus 9?", "response": "99"}
    long = {"instruction": "Count.", "response": "one two three " * LENGTH}
    data = Dataset.from_list([rows[0], other, rows[1], long])
    message = (
        "2 of 4 rows have no confidence in .*store: row 1 \\(not annotated\\), row 3 "
        f"\\([0-9]+ tokens, --max-length is {LENGTH}\\)"
    )
    with pytest.raises(InputError, match=f"^dataset: {message}; annotate this data"):
        with_confidence(data, folder / "store")
    left = with_confidence(data, folder / "store", missing="drop")
    assert list(left) == list(with_confidence(Dataset.from_list(rows[:2]), folder / "store"))
    assert "note: left out: 2 of 4 rows" in capsys.readouterr().err
    with pytest.raises(InputError, match="^dataset: 1 of 1 rows have no confidence"):
        with_confidence(Dataset.from_list([other]), folder / "store", missing="drop")


def test_a_file_that_was_annotated_is_joined_as_it_is_loaded(folder: Path, tmp_path: Path) -> None:
    path = str(folder / "task.jsonl")
    data = load_dataset("json", data_files=path, split="train", cache_dir=str(tmp_path))
    assert len(with_confidence(data, folder / "store", missing="drop")) == sum(
        map(bool, load_store(folder / "store").manifest["data"]["row_digests"])
    )


def test_what_is_no_data_set_or_no_store(folder: Path, rows: list[dict[str, Any]]) -> None:
    data = Dataset.from_list(rows)
    with pytest.raises(InputError, match="^dataset: expected a datasets.Dataset, got DatasetDict"):
        with_confidence(DatasetDict(train=data), folder / "store")  # pyright: ignore
    with pytest.raises(InputError, match="^store: .* is no confidence store"):
        with_confidence(data, folder / "guide")
    with pytest.raises(InputError, match="^missing: expected 'error' or 'drop', got 'keep'"):
        with_confidence(data, folder / "store", missing="keep")  # pyright: ignore
    with pytest.raises(InputError, match="^dataset, row 0: expected the keys instruction"):
        with_confidence(Dataset.from_list([{"text": "2"}]), folder / "store")
