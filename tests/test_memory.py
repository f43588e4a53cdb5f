"""What a step keeps in memory: found by a trial, agreed on, kept for a resumed run."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.distributed as dist
import torch.multiprocessing
from safetensors.torch import load_file

import gift.gradients
import gift.memory
import gift.train
from gift.config import TrainConfig
from gift.errors import InputError
from gift.publish import partial_path
from gift.train import train

ADAPTER = "adapter_model.safetensors"
LAYERS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("memory")
    tiny.make_model(folder / "base", "qwen2", seed=2)
    tiny.write_rows(folder / "rows.jsonl", 8)
    return folder


def config(folder: Path, output: Path, **options: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "model": str(folder / "base"),
        "tokenizer": str(folder / "base"),
        "data": folder / "rows.jsonl",
        "weighting": "uniform",
        "global_batch_size": 4,
        "checkpoint_steps": 1,
        "micro_batch_tokens": 400,
        "lora_rank": 2,
        "device": "cpu",
        **options,
    }
    return TrainConfig(output=output, **settings)


class SmallMemory:
    """Stands in for a device: an attempt fails when what it keeps is more than `room`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: float) -> None:
        self.tried: list[tuple[int, int]] = []
        self.trained: list[tuple[int, int]] = []
        real = gift.gradients.accumulate_gradients

        def attempt(config: Any, model: Any, rows: Any, split: Any) -> Any:
            tokens = sum(len(row.example.input_ids) for row in rows)
            recomputed = sum(
                getattr(module, "gradient_checkpointing", False)
                for module in gift.memory.layers_of(model)
            )
            self.tried.append((tokens, recomputed))
            found = real(config, model, rows, split)  # the gradients are there when it fails
            if tokens * (1 + LAYERS - recomputed) > room:
                raise torch.OutOfMemoryError("injected")
            return found

        def step(config: Any, model: Any, rows: Any, split: Any) -> Any:
            self.trained.append((split.tokens, split.recomputed))
            return real(config, model, rows, split)

        monkeypatch.setattr(gift.memory, "accumulate_gradients", attempt)
        monkeypatch.setattr(gift.train, "accumulate_gradients", step)


@pytest.mark.parametrize(
    ("room", "expected"),
    [(10_000, (400, 0)), (600, (400, 2)), (300, (200, 2)), (150, (100, 2))],
    ids=["all kept", "recomputed", "half the tokens", "a quarter"],
)
def test_the_first_that_fits_is_taken_and_said(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    room: float,
    expected: tuple[int, int],
) -> None:
    memory = SmallMemory(monkeypatch, room)
    summary = train(config(folder, tmp_path / "adapter"))
    assert set(memory.trained) == {expected}
    tokens, recomputed = expected
    said = f"micro-batches of at most {tokens} tokens; activations of {recomputed} of 2 layers"
    assert said in capsys.readouterr().err
    assert summary["micro_batch_tokens"] == tokens and summary["recomputed_layers"] == recomputed


def test_a_trial_changes_nothing_but_the_memory(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients of trials are gone, failed or not, and random numbers are where they were."""
    options = {"lora_dropout": 0.3, "micro_batch_tokens": 200}
    train(config(folder, tmp_path / "asked", gradient_checkpointing="on", **options))
    memory = SmallMemory(monkeypatch, 400)
    train(config(folder, tmp_path / "found", **options))
    assert memory.trained[0] == (200, LAYERS) and len(memory.tried) == 2
    asked, found = ((tmp_path / name / ADAPTER).read_bytes() for name in ("asked", "found"))
    assert asked == found


def test_a_row_that_fits_in_no_way_is_one_clear_error(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    SmallMemory(monkeypatch, 10)
    with pytest.raises(InputError, match="--max-length: the memory does not hold a row"):
        train(config(folder, tmp_path / "adapter"))
    assert not (tmp_path / "adapter").exists()


def test_other_errors_of_a_trial_are_not_taken_for_a_lack_of_memory(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(gift.memory, "accumulate_gradients", fail)
    with pytest.raises(RuntimeError, match="a defect"):
        train(config(folder, tmp_path / "adapter"))


def test_a_resumed_run_takes_what_was_found_and_ends_with_the_same_bytes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"epochs": 2, "lora_dropout": 0.2}
    SmallMemory(monkeypatch, 150)
    train(config(folder, tmp_path / "whole", **options))
    memory = SmallMemory(monkeypatch, 150)
    step = gift.train.accumulate_gradients

    def cut(*given: Any) -> Any:
        if len(memory.trained) == 2:
            raise KeyboardInterrupt
        return step(*given)

    monkeypatch.setattr(gift.train, "accumulate_gradients", cut)
    with pytest.raises(KeyboardInterrupt):
        train(config(folder, tmp_path / "cut", **options))
    record = json.loads((partial_path(tmp_path / "cut") / "work/memory.json").read_text())
    assert record == {"tokens": 100, "recomputed": 2}
    memory = SmallMemory(monkeypatch, 10_000)
    train(config(folder, tmp_path / "cut", **options))
    assert not memory.tried and set(memory.trained) == {(100, 2)}
    whole, cut_short = ((tmp_path / name / ADAPTER).read_bytes() for name in ("whole", "cut"))
    assert whole == cut_short


@pytest.mark.parametrize(("asked", "recomputed"), [("on", 2), ("off", 0), ("1", 1), ("9", 2)])
def test_what_is_asked_for_is_not_tried(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str, recomputed: int
) -> None:
    memory = SmallMemory(monkeypatch, 0)
    train(config(folder, tmp_path / "adapter", gradient_checkpointing=asked))
    assert not memory.tried and set(memory.trained) == {(400, recomputed)}
    plain = tmp_path / "plain"
    train(config(folder, plain, gradient_checkpointing="off"))
    ours, theirs = (load_file(path / ADAPTER) for path in (tmp_path / "adapter", plain))
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-6)


def test_no_micro_batch_is_larger_than_the_one_that_is_tried(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = SmallMemory(monkeypatch, 10_000)
    sizes: list[int] = []
    real = gift.gradients.predicting_states

    def watched(model: Any, batch: Any) -> Any:
        sizes.append(batch.inputs["input_ids"].numel())
        return real(model, batch)

    monkeypatch.setattr(gift.gradients, "predicting_states", watched)
    train(config(folder, tmp_path / "adapter", micro_batch_tokens=130))
    assert sizes[0] == memory.tried[0][0] >= max(sizes) and len(sizes) > 3


@pytest.mark.parametrize(("given", "text"), [(True, "on"), (False, "off"), (3, "3")])
def test_recipes_may_write_on_off_and_numbers(folder: Path, given: Any, text: str) -> None:
    made = config(folder, folder / "adapter", gradient_checkpointing=given)
    assert made.gradient_checkpointing == text
    with pytest.raises(ValueError, match="gradient_checkpointing"):
        config(folder, folder / "adapter", gradient_checkpointing="0")


def _rank(rank: int, folder: Path, output: Path, port: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "RANK": rank,
            "WORLD_SIZE": 2,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }.items():
            patch.setenv(name, str(value))
        torch.set_num_threads(1)
        # Only the second process's memory is small.
        memory = SmallMemory(patch, 10_000 if rank == 0 else 300)
        train(config(folder, output))
        (folder / f"found-{output.name}-{rank}.json").write_text(json.dumps(memory.trained))


def test_ranks_agree_on_what_fits_on_all_of_them(folder: Path, tmp_path: Path) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True)
    port, output = store.port, tmp_path / "agreed"
    del store
    torch.multiprocessing.start_processes(
        _rank, (folder, output, port), nprocs=2, start_method="fork"
    )
    found = [json.loads((folder / f"found-agreed-{rank}.json").read_text()) for rank in (0, 1)]
    assert found[0] == found[1] and set(map(tuple, found[0])) == {(200, 2)}
    assert (output / ADAPTER).exists()
