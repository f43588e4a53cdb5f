"""`Annotator`: batches of rows, with and without Ray, get what `gift annotate` finds."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pytest
import tiny
from transformers import AutoConfig, AutoTokenizer

from gift.annotate import Annotator, annotate
from gift.config import AnnotateConfig
from gift.datasets import with_confidence
from gift.errors import InputError

pytestmark = pytest.mark.xdist_group("annotator")

EXAMPLE = Path(__file__).parent.parent / "examples" / "annotate_ray.py"
COLUMNS = ("input_ids", "labels", "token_weight")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("annotator")
    tiny.make_model(folder / "guide", "qwen2", num_hidden_layers=1)
    tiny.write_rows(folder / "rows.jsonl", 9)
    annotate(
        AnnotateConfig(
            model=str(folder / "guide"), data=folder / "rows.jsonl", output=folder / "store"
        )
    )
    return folder


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[dict[str, Any]]:
    """The columns that the store gives the same rows."""
    rows = datasets.Dataset.from_list(read(folder))
    return list(with_confidence(rows, folder / "store"))  # pyright: ignore


@pytest.fixture(scope="module")
def guide(folder: Path) -> Annotator:
    return Annotator(str(folder / "guide"), device="cpu", max_length=200, batch_tokens=120)


def read(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def batch_of(rows: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Columns as Ray gives them: objects, None where a row lacks a key."""
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: np.empty(len(rows), object) for name in names}
    for name, column in columns.items():
        column[:] = [row.get(name) for row in rows]
    return columns


def by_row(found: dict[str, Any]) -> list[dict[str, Any]]:
    return [{name: found[name][n] for name in COLUMNS} for n in range(len(found["labels"]))]


def assert_same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert len(found) == len(expected)
    for row, other in zip(found, expected, strict=True):
        assert row["input_ids"] == other["input_ids"] and row["labels"] == other["labels"]
        np.testing.assert_allclose(row["token_weight"], other["token_weight"], rtol=1e-4)


def test_a_batch_gets_what_the_store_has(
    folder: Path, guide: Annotator, expected: list[dict[str, Any]]
) -> None:
    batch = batch_of([{**row, "id": n} for n, row in enumerate(read(folder))])
    found = guide(batch)
    assert list(found) == [*batch, *COLUMNS] and found["id"] is batch["id"]
    assert_same(by_row(found), expected)
    assert max(max(row["token_weight"]) for row in by_row(found)) > 0


def test_messages_in_arrays_and_rows_that_are_lost(folder: Path, guide: Annotator) -> None:
    turns = [{"role": "user", "content": "two?"}, {"role": "assistant", "content": "three"}]
    long = {"instruction": "a", "response": "word " * 200}
    mixed = batch_of([{"messages": np.array(turns, object)}, long, read(folder)[0]])
    found = guide(mixed)
    (plain,) = guide(batch_of([{"messages": turns}]))["input_ids"]
    assert found["input_ids"][0] == plain and found["input_ids"][1] == []
    assert guide(batch_of([long]))["token_weight"].tolist() == [[]]
    assert found["labels"][2] and len(guide(batch_of([long, long]))["labels"]) == 2


def test_rows_that_cannot_be_used_are_named(guide: Annotator) -> None:
    with pytest.raises(InputError, match="row 1 of the batch: expected the keys instruction"):
        guide(batch_of([{"instruction": "a", "response": "b"}, {"text": "c"}]))
    with pytest.raises(ValueError, match="guide_temperature"):
        Annotator("guide", guide_temperature=0)


@pytest.mark.parametrize(
    "options",
    [
        {"tokenizer": "other"},
        {"ignore_keys": "image"},
        {"overlong": "truncate", "max_length": 30},
        {"guide_temperature": 2.0},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_mean_what_they_mean_to_annotate(
    folder: Path, tmp_path: Path, expected: list[dict[str, Any]], options: dict[str, Any]
) -> None:
    rows = read(folder)[:4]
    if "ignore_keys" in options:
        rows = [{**row, "image": "plot.png"} for row in rows]
    if "tokenizer" in options:  # the guide's, with another template
        tokenizer = AutoTokenizer.from_pretrained(folder / "guide")
        tokenizer.chat_template = tiny.CHATML.replace("role'] }}", "role'] }}:").replace(
            "assistant\n", "assistant:\n"
        )
        AutoConfig.from_pretrained(folder / "guide").save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        options = {"tokenizer": str(tmp_path)}
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    annotate(
        AnnotateConfig(
            model=f"{folder}/guide", data=data, output=tmp_path / "store", max_dropped=1, **options
        )
    )
    found = Annotator(f"{folder}/guide", device="cpu", **options)(batch_of(rows))
    stored = list(with_confidence(datasets.Dataset.from_list(rows), tmp_path / "store"))
    assert_same(by_row(found), stored)  # pyright: ignore
    if "ignore_keys" not in options:
        with pytest.raises(AssertionError):
            assert_same(by_row(found), expected[:4])


def test_what_arrow_adds_to_objects_is_no_word(tmp_path: Path) -> None:
    """Arrow gives every tool call the arguments of all, in alphabetical order."""
    folder = tiny.make_model(tmp_path / "guide", num_hidden_layers=1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = tiny.CHATML.replace(
        "{{ message['content'] }}",
        "{{ message['content'] }}{% for call in message.tool_calls or [] %}"
        "{{ call.function.name }} {{ call.function.arguments | tojson }}{% endfor %}",
    )
    tokenizer.save_pretrained(folder)
    calls = [
        ("add", {"a": 1, "of": {"b": 2}}),
        ("sin", {"of": {"c": 2}, "x": 3}),
    ]  # in Arrow's order
    rows = [
        {
            "messages": [
                {"role": "user", "content": "?"},
                {
                    "role": "assistant",
                    "content": "!",
                    "tool_calls": [{"function": {"name": name, "arguments": arguments}}],
                },
            ]
        }
        for name, arguments in calls
    ]
    merged = pyarrow.Table.from_pylist(rows).to_pylist()
    assert '"x": null' in json.dumps(merged[0])
    guide = Annotator(str(folder), device="cpu")
    plain, found = guide(batch_of(rows)), guide(batch_of(merged))
    assert_same(by_row(found), by_row(plain))
    assert '"x"' not in tokenizer.decode(found["input_ids"][0])
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    annotate(AnnotateConfig(model=str(folder), data=data, output=tmp_path / "store"))
    table = datasets.Dataset(pyarrow.Table.from_pylist(rows))
    assert_same(list(with_confidence(table, tmp_path / "store")), by_row(plain))  # pyright: ignore


def test_columns_that_do_not_fit_are_named(
    guide: Annotator, capfd: pytest.CaptureFixture[str]
) -> None:
    row = {"instruction": "a", "response": "b"}
    for name in COLUMNS:
        with pytest.raises(InputError, match=f"batch: has {name} already"):
            guide(batch_of([{**row, name: [1]}]))
    with pytest.raises(InputError, match="batch: expected columns of one length, got .*: 2, .*: 1"):
        guide({"instruction": ["a", "b"], "response": ["c"]})
    capfd.readouterr()
    for _ in range(2):
        guide(batch_of([{**row, "reasoning": "because"}, {**row, "context": "here"}]))
    noted = capfd.readouterr().err.splitlines()
    assert noted == [f"note: column that nothing reads: {key}" for key in ("reasoning", "context")]


def test_the_example_runs_on_a_local_ray(
    folder: Path,
    tmp_path: Path,
    expected: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")  # no network
    import ray

    monkeypatch.setattr(
        sys,
        "argv",
        [str(EXAMPLE), str(folder / "guide"), str(folder / "rows.jsonl"), str(tmp_path / "out")],
    )
    ray.init(num_cpus=2, include_dashboard=False)
    try:
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    finally:
        ray.shutdown()
    annotated = datasets.load_dataset("parquet", data_dir=str(tmp_path / "out"), split="train")
    assert_same(list(annotated), expected)  # pyright: ignore
