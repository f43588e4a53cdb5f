"""Fitting a step into memory: by a trial, the same on all ranks, kept for a resumed run."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.distributed as dist
import torch.multiprocessing
from safetensors.torch import load_file

import gift.train
import gift.training.gradients
import gift.training.memory
from gift.config import TrainConfig
from gift.data.encoding import encode_file
from gift.distributed.ranks import Group
from gift.errors import InputError
from gift.models.tokenizer import load_tokenizer
from gift.storage.publish import partial_path
from gift.train import train
from gift.training.memory import largest_micro_batch
from gift.training.micro_batches import Split
from gift.weighting.targets import GuidedRow
from gift.weighting.weights import guided_rows

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


def guided(folder: Path) -> list[GuidedRow]:
    """The rows as training has them."""
    settings = config(folder, folder / "adapter")
    data = encode_file(settings.data, load_tokenizer(folder / "base"), settings)
    return guided_rows(settings, data.kept, None)


class SmallMemory:
    """Stands in for a device: an attempt fails when what it keeps is more than `room`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: float) -> None:
        self.tried: list[tuple[int, int]] = []
        self.trained: list[tuple[int, int]] = []
        real = gift.training.gradients.accumulate_gradients

        def attempt(config: Any, model: Any, rows: Any, split: Any) -> Any:
            tokens = sum(len(row.example.input_ids) for row in rows)
            recomputed = sum(
                getattr(module, "gradient_checkpointing", False)
                for module in gift.training.memory.layers_of(model)
            )
            self.tried.append((tokens, recomputed))
            found = real(config, model, rows, split)  # the gradients are there when it fails
            if tokens * (1 + LAYERS - recomputed) > room:
                raise torch.OutOfMemoryError("injected")
            return found

        def step(config: Any, model: Any, rows: Any, split: Any, *idle: Any) -> Any:
            self.trained.append((split.tokens, split.recomputed))
            return real(config, model, rows, split, *idle)

        monkeypatch.setattr(gift.training.memory, "accumulate_gradients", attempt)
        monkeypatch.setattr(gift.train, "accumulate_gradients", step)


@pytest.mark.parametrize(
    ("room", "expected"),
    # A step's four rows have 164 tokens, the longest row 50.
    [(492, (400, 0)), (300, (400, 2)), (149, (100, 2)), (60, (50, 2))],
    ids=["all kept", "recomputed", "fewer tokens", "a row alone"],
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
    longest = max(len(row.example.input_ids) for row in guided(folder))
    options = {"lora_dropout": 0.3, "micro_batch_tokens": longest}
    train(config(folder, tmp_path / "asked", gradient_checkpointing="on", **options))
    memory = SmallMemory(monkeypatch, longest)
    train(config(folder, tmp_path / "found", **options))
    assert memory.trained[0] == (longest, LAYERS) and len(memory.tried) == 2
    asked, found = ((tmp_path / name / ADAPTER).read_bytes() for name in ("asked", "found"))
    assert asked == found


def test_a_row_that_fits_in_no_way_is_one_clear_error(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    SmallMemory(monkeypatch, 10)
    with pytest.raises(InputError, match="--max-length: the memory does not hold a row"):
        train(config(folder, tmp_path / "adapter"))
    assert not (tmp_path / "adapter").exists()


def test_a_model_without_layers_to_recompute_takes_fewer_tokens(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gift.training.memory, "layers_of", lambda _: [])
    memory = SmallMemory(monkeypatch, 300)
    train(config(folder, tmp_path / "adapter"))
    assert set(memory.trained) == {(100, 0)}
    SmallMemory(monkeypatch, 10)
    with pytest.raises(InputError, match=r"hold a row of \d+ tokens; lower it"):
        train(config(folder, tmp_path / "none"))


@pytest.mark.parametrize(
    ("tokens", "layers", "longest", "expected"),
    [
        (1024, 2, 300, [(1024, 0), (1024, 2), (512, 2), (256, 2)]),
        (2000, 2, 600, [(2000, 0), (2000, 2), (1000, 2), (500, 2)]),
        (5000, 2, 2000, [(5000, 0), (2500, 0), (1250, 0), (5000, 2), (2500, 2), (1250, 2)]),
        (4096, 2, 100, [(4096, 0), (2048, 0), (1024, 0), *((4096 >> n, 2) for n in range(7))]),
        (1024, 2, 2000, [(1024, 0), (1024, 2)]),
        (100, 0, 30, [(100, 0), (50, 0), (25, 0)]),
    ],
)
def test_activations_are_recomputed_before_the_device_idles(
    tokens: int, layers: int, longest: int, expected: list[tuple[int, int]]
) -> None:
    choices = gift.training.memory._choices(tokens, layers, longest)
    assert [(choice.tokens, choice.recomputed) for choice in choices] == expected


@pytest.mark.parametrize(
    "message",
    [
        "[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate memory",
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "Triton Error [CUDA]: out of memory",
    ],
)
def test_every_lack_of_memory_is_recognised(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, message: str
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError(message)

    monkeypatch.setattr(gift.training.memory, "accumulate_gradients", fail)
    with pytest.raises(InputError, match="the memory does not hold a row"):
        train(config(folder, tmp_path / "adapter"))


def test_other_errors_of_a_trial_are_not_taken_for_a_lack_of_memory(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(gift.training.memory, "accumulate_gradients", fail)
    with pytest.raises(RuntimeError, match="a defect"):
        train(config(folder, tmp_path / "adapter"))


def cut_after(
    steps: int, error: BaseException, memory: SmallMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lets the next training end with an error after so many steps."""
    step = gift.train.accumulate_gradients

    def cut(*given: Any) -> Any:
        if len(memory.trained) == steps:
            raise error
        return step(*given)

    monkeypatch.setattr(gift.train, "accumulate_gradients", cut)


def test_a_run_that_was_short_of_memory_tries_anew_and_keeps_its_steps(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = SmallMemory(monkeypatch, 10_000)
    cut_after(1, torch.OutOfMemoryError("injected"), memory, monkeypatch)
    with pytest.raises(torch.OutOfMemoryError):
        train(config(folder, tmp_path / "adapter"))
    assert memory.trained == [(400, 0)]
    memory = SmallMemory(monkeypatch, 300)
    assert train(config(folder, tmp_path / "adapter"))["steps"] == 2
    assert memory.trained == [(400, 2)]


def test_another_device_is_tried_anew(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = SmallMemory(monkeypatch, 10_000)
    cut_after(1, KeyboardInterrupt(), memory, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train(config(folder, tmp_path / "adapter"))
    record = partial_path(tmp_path / "adapter") / "work/memory.json"
    record.write_text(record.read_text().replace('"cpu"', '"a larger device"'))
    memory = SmallMemory(monkeypatch, 300)
    train(config(folder, tmp_path / "adapter"))
    assert memory.trained == [(400, 2)]


@pytest.mark.parametrize(
    ("options", "split"),
    [
        ({"gradient_checkpointing": "on"}, (400, 2)),
        ({"micro_batch_tokens": 60}, (60, 0)),
        ({"micro_batch_size": 1}, (400, 0)),
    ],
    ids=["recomputing", "fewer tokens", "fewer rows"],
)
def test_a_run_resumes_with_another_split_of_its_steps(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    split: tuple[int, int],
) -> None:
    exact = {"lora_dropout": 0.0}
    memory = SmallMemory(monkeypatch, 10_000)
    train(config(folder, tmp_path / "whole", **exact))
    memory.trained.clear()
    cut_after(1, KeyboardInterrupt(), memory, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train(config(folder, tmp_path / "cut", **exact))
    memory = SmallMemory(monkeypatch, 10_000)
    train(config(folder, tmp_path / "cut", **exact, **options))
    assert memory.trained == [split]
    whole, cut_short = (load_file(tmp_path / name / ADAPTER) for name in ("whole", "cut"))
    for name, value in whole.items():
        torch.testing.assert_close(cut_short[name], value, rtol=1e-4, atol=1e-6)


def test_a_resumed_run_takes_what_was_found_and_ends_with_the_same_bytes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"epochs": 2, "lora_dropout": 0.2}
    SmallMemory(monkeypatch, 149)
    train(config(folder, tmp_path / "whole", **options))
    memory = SmallMemory(monkeypatch, 149)
    cut_after(2, KeyboardInterrupt(), memory, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train(config(folder, tmp_path / "cut", **options))
    record = json.loads((partial_path(tmp_path / "cut") / "work/memory.json").read_text())
    assert (record["tokens"], record["recomputed"]) == (100, 2)
    assert record["tried_for"]["devices"] == [["cpu", 0]]
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


@pytest.mark.parametrize(
    "options",
    [
        {"micro_batch_tokens": 130},
        {"micro_batch_tokens": 80},
        {"global_batch_size": 2, "epochs": 2},
        {"micro_batch_size": 1},
    ],
    ids=["several rows", "hardly more than a row", "a small global batch", "one row"],
)
@pytest.mark.parametrize("packed", [True, False])
def test_what_is_tried_is_the_largest_micro_batch_of_the_run(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, int],
    packed: bool,
) -> None:
    if not packed:
        monkeypatch.setattr(gift.train, "enable_packing", lambda *_: False)
    memory = SmallMemory(monkeypatch, 10_000)
    sizes: list[int] = []
    real = gift.training.gradients.predicting_states

    def watched(model: Any, batch: Any) -> Any:
        sizes.append(batch.inputs["input_ids"].numel())
        return real(model, batch)

    monkeypatch.setattr(gift.training.gradients, "predicting_states", watched)
    train(config(folder, tmp_path / "adapter", **options))
    assert len(memory.tried) == 1 and sizes[0] == max(sizes[1:]) and len(sizes) > 2


def test_each_rank_tries_the_largest_of_its_own_share(folder: Path) -> None:
    settings, split = config(folder, folder / "adapter", global_batch_size=4), Split(1000, True)
    rows = guided(folder)
    shares = [len(largest_micro_batch(settings, rows, split, Group(r, 3, None))) for r in (0, 1, 2)]
    assert shares == [2, 1, 1]
    nothing = largest_micro_batch(settings, rows, split, Group(8, 9, None))
    assert nothing == []


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
        memory = SmallMemory(patch, 10_000 if rank == 0 else 149)
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
    assert found[0] == found[1] and set(map(tuple, found[0])) == {(400, 2)}
    assert (output / ADAPTER).exists()
