"""Every stage with tiny inputs and options, for tests that treat all of them alike."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny

from gift.annotate import annotate
from gift.calibration.command import calibration
from gift.config import (
    AnnotateConfig,
    CalibrationConfig,
    DiffConfig,
    EvaluateConfig,
    MergeConfig,
    RunConfig,
    StatisticsConfig,
    TrainConfig,
    UnmergeConfig,
)
from gift.evaluate import evaluate
from gift.merge.command import merge
from gift.merge.diff import diff
from gift.merge.statistics import merge_statistics
from gift.merge.unmerge import unmerge
from gift.run import run
from gift.storage.lock import locked
from gift.train import train

CPU = {"device": "cpu"}
DATA = {"data": "rows.jsonl"}
TRAINING = {"global_batch_size": 6, "checkpoint_steps": 1, "lora_rank": 2}
MERGED = {"model": "instruct", "adapter": ["adapter"], "save_residual": True, **CPU}
ASKED = {"samples": 1, "max_new_tokens": 3, "batch_size": 2, "check": "exact"}
ANNOTATED = {"batch_tokens": 120, "part_batches": 2}
EVALUATION = {f"eval_{name}": value for name, value in {**ASKED, "data": "asked.jsonl"}.items()}
RUN = {"base": "base", "instruct": "instruct", **DATA, **ANNOTATED, **TRAINING, **EVALUATION, **CPU}
# Stage: its function, its options, and other options that a folder under its name was made with.
STAGES: dict[str, tuple[Callable[[Any], Any], Any, dict[str, Any], dict[str, Any]]] = {
    "annotate": (
        annotate,
        AnnotateConfig,
        {"model": "instruct", **DATA, **ANNOTATED, **CPU},
        {"guide_temperature": 2.0},
    ),
    "calibration": (
        calibration,
        CalibrationConfig,
        {"store": "confidence", **DATA},
        {"bands": 3},
    ),
    "train": (
        train,
        TrainConfig,
        {"model": "base", "confidence": "confidence", **DATA, **TRAINING, **CPU},
        {"seed": 3},
    ),
    "merge": (merge, MergeConfig, MERGED, {"scale": [0.5]}),
    "evaluate": (
        evaluate,
        EvaluateConfig,
        {"model": "instruct", "data": "asked.jsonl", **ASKED, **CPU},
        {"seed": 3},
    ),
    "unmerge": (unmerge, UnmergeConfig, {"model": "merged", **CPU}, {}),
    "merge-statistics": (
        merge_statistics,
        StatisticsConfig,
        {"model": "instruct", "kind": "regmean", **DATA, **CPU},
        {"kind": "fisher"},
    ),
    "diff": (
        diff,
        DiffConfig,
        {"model_a": "instruct", "model_b": "merged", **CPU},
        {"model_a": "merged"},
    ),
    "run": (run, RunConfig, RUN, {"guide_temperature": 2.0}),
}


def call(stage: str, output: Path, **options: Any) -> Any:
    """Runs a stage on the inputs in the current folder, with some options changed."""
    function, kind, usual, _ = STAGES[stage]
    return function(kind(output=output, **{**usual, **options}))


def make_inputs(folder: Path) -> Path:
    """Makes what the stages read: a pair of models, data, and a store, an adapter and a merge."""
    tiny.make_model(folder / "instruct", "qwen2", seed=1, num_hidden_layers=1)
    tiny.make_model(folder / "base", "qwen2", seed=2, num_hidden_layers=1)
    tiny.write_rows(folder / "rows.jsonl", 12)
    asked = [{"question": f"What is {n} plus 2?", "answer": str(n + 2)} for n in range(3)]
    (folder / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for stage, output in (
            ("annotate", "confidence"),
            ("train", "adapter"),
            ("merge", "merged"),
        ):
            call(stage, Path(output))
    return folder


@contextmanager
def an_owner(output: Path) -> Iterator[int]:
    """A process that owns `output` and is killed when the block ends; yields its id."""
    receiving, sending = os.pipe()
    process = os.fork()
    if process == 0:
        with locked(output):
            os.write(sending, b".")
            signal.pause()
        os._exit(1)
    try:
        assert os.read(receiving, 1)
        yield process
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        os.close(receiving)
        os.close(sending)
