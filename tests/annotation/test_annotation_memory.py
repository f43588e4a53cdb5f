"""Annotation where the memory is short: smaller batches, said, kept, agreed on; the same values."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from processes import fork_ranks

import gift.annotation.batches
from gift.annotate import Annotator, annotate
from gift.confidence_store import CONFIDENCE_FILE
from gift.config import AnnotateConfig
from gift.errors import InputError
from gift.storage.publish import partial_path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("memory")
    tiny.make_model(folder / "guide", "qwen2", num_hidden_layers=1)
    tiny.write_rows(folder / "rows.jsonl", 12)
    return folder


def annotated(folder: Path, output: Path, **options: Any) -> bytes:
    """The confidences as they are written."""
    settings = {"model": str(folder / "guide"), "data": folder / "rows.jsonl", "part_batches": 1}
    annotate(AnnotateConfig(output=output, **{**settings, "batch_tokens": 400, **options}))
    return (output / CONFIDENCE_FILE).read_bytes()


def limit_memory(
    patch: pytest.MonkeyPatch, room: int, cut_after: int | None = None, free_at_first: int = 0
) -> list[int]:
    """Batches of more than `room` tokens fail; returns the tokens of all that are tried.

    With `cut_after` the command is interrupted after so many; the first `free_at_first` fit.
    """
    real, tried = gift.annotation.batches.annotate_batch, []

    def limited(model: Any, batch: Any, *rest: Any) -> Any:
        if cut_after is not None and len(tried) == cut_after:
            raise KeyboardInterrupt
        tried.append(batch.inputs["input_ids"].numel())
        found = real(model, batch, *rest)
        if tried[-1] > room and len(tried) > free_at_first:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return found

    patch.setattr(gift.annotation.batches, "annotate_batch", limited)
    return tried


@pytest.mark.parametrize("packed", [True, False])
def test_smaller_batches_give_the_bytes_that_they_give_when_asked_for(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    packed: bool,
) -> None:
    if not packed:
        monkeypatch.setattr("gift.annotate.enable_packing", lambda *_: False)
    asked = annotated(folder, tmp_path / "asked", batch_tokens=100)
    assert "does not hold" not in capsys.readouterr().err
    tried = limit_memory(monkeypatch, 100)
    found = annotated(folder, tmp_path / "found")
    assert found == asked
    # The largest batches of 400 and of 200 tokens fail; nothing that fits is computed twice.
    assert len([tokens for tokens in tried if tokens > 100]) == 2
    assert "note: batches of at most 100 tokens" in capsys.readouterr().err
    speed = json.loads((tmp_path / "found" / "speed.json").read_text())
    assert speed["batch_tokens"] == 100


def test_what_fits_is_computed_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = limit_memory(monkeypatch, 10_000)
    annotated(folder, tmp_path / "store", batch_tokens=100)
    tokens = json.loads((tmp_path / "store" / "manifest.json").read_text())["data"]["tokens"]
    assert sum(tried) == tokens and tried[0] == max(tried)


@pytest.mark.parametrize("finished_larger", [0, 1])
def test_an_interrupted_run_keeps_the_smaller_batches(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished_larger: int
) -> None:
    asked = annotated(folder, tmp_path / "asked", batch_tokens=100)
    with monkeypatch.context() as patch:
        limit_memory(patch, 100, cut_after=4, free_at_first=finished_larger)
        with pytest.raises(KeyboardInterrupt):
            annotated(folder, tmp_path / "store")
    tried = limit_memory(monkeypatch, 10_000)
    assert annotated(folder, tmp_path / "store") == asked
    assert max(tried) <= 100


@pytest.mark.parametrize("cut_after", [1, 2])
def test_smaller_batches_after_a_resume_give_the_bytes_that_they_give_when_asked_for(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    cut_after: int,
) -> None:
    """Batch N of 200 tokens, finished before the interruption, is not batch N of 100 tokens."""
    asked = annotated(folder, tmp_path / "asked", batch_tokens=100)
    with monkeypatch.context() as patch:
        limit_memory(patch, 10_000, cut_after=cut_after)
        with pytest.raises(KeyboardInterrupt):
            annotated(folder, tmp_path / "store", batch_tokens=200)
    limit_memory(monkeypatch, 100)
    assert annotated(folder, tmp_path / "store", batch_tokens=200) == asked
    assert f"finished ones that are computed again: {cut_after}" in capsys.readouterr().err


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("part_batches", [1, 16])
def test_a_later_batch_that_does_not_fit_gives_the_bytes_of_smaller_ones(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    packed: bool,
    part_batches: int,
) -> None:
    if not packed:
        monkeypatch.setattr("gift.annotate.enable_packing", lambda *_: False)
    asked = annotated(folder, tmp_path / "asked", batch_tokens=100)
    tried = limit_memory(monkeypatch, 100, free_at_first=1)
    options = {"batch_tokens": 200, "part_batches": part_batches}
    assert annotated(folder, tmp_path / "store", **options) == asked
    assert min(tried[:2]) > 100 >= max(tried[2:]), "the second batch of 200 tokens fails"
    (note,) = [line for line in capsys.readouterr().err.splitlines() if "does not hold" in line]
    assert note == (
        "note: batches of at most 100 tokens; the memory does not hold larger ones; "
        "finished ones that are computed again: 1"
    )


def test_a_row_that_does_not_fit_is_one_clear_error(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_memory(monkeypatch, 20)
    with pytest.raises(
        InputError, match=r"--max-length: the memory does not hold a row of \d+ tok"
    ):
        annotated(folder, tmp_path / "store")
    assert not (tmp_path / "store").exists() and not partial_path(tmp_path / "store").exists()


def test_other_errors_are_not_taken_for_a_lack_of_memory(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(gift.annotation.batches, "annotate_batch", fail)
    with pytest.raises(RuntimeError, match="a defect"):
        annotated(folder, tmp_path / "store")


def test_all_ranks_take_what_fits_on_each(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = annotated(folder, tmp_path / "asked", batch_tokens=100)

    def annotate_as(rank: int) -> None:
        limit_memory(monkeypatch, 100 if os.environ["RANK"] == "1" else 10_000)
        annotated(folder, tmp_path / "store")

    ended = fork_ranks(2, annotate_as, tmp_path / "rank")
    assert [status for status, _ in ended] == [0, 0], ended
    assert (tmp_path / "store" / CONFIDENCE_FILE).read_bytes() == asked


def test_a_later_batch_that_does_not_fit_on_one_rank_is_agreed_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = annotated(folder, tmp_path / "asked", batch_tokens=50)

    def annotate_as(rank: int) -> None:
        tried = limit_memory(monkeypatch, 55 if rank == 1 else 10_000, free_at_first=1)
        annotated(folder, tmp_path / "store", batch_tokens=100)
        assert min(tried[:2]) > 55 >= max(tried[2:]), "a rank goes on in vain"

    ended = fork_ranks(2, annotate_as, tmp_path / "rank")
    assert [status for status, _ in ended] == [0, 0], ended
    assert (tmp_path / "store" / CONFIDENCE_FILE).read_bytes() == asked


def test_an_actor_goes_on_with_smaller_batches(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    batch = {name: [row[name] for row in rows] for name in rows[0]}
    guide = Annotator(str(folder / "guide"), batch_tokens=400)
    whole = guide(batch)["token_weight"]
    tried = limit_memory(monkeypatch, 100)
    for _ in range(2):
        for found, expected in zip(guide(batch)["token_weight"], whole, strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)
    assert len([tokens for tokens in tried if tokens > 100]) == 2, "the second call starts small"
    assert capsys.readouterr().err.count("note: batches of at most") == 2
    limit_memory(monkeypatch, 20)
    with pytest.raises(InputError, match="--max-length: the memory does not hold a row"):
        guide(batch)
