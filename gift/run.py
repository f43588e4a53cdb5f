"""All stages in one folder: annotate → train → merge → evaluate.

Each stage's key, a hash of its settings and of the content of its inputs, is written down before
the stage starts, and a stage's folder appears only when it is complete: a folder with the right key
is finished and skipped, and a killed run goes on where it was.
"""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel

from gift.annotate import annotate
from gift.confidence_store import CONFIDENCE_FILE
from gift.config import AnnotateConfig, EvaluateConfig, MergeConfig, RunOptions, TrainConfig
from gift.console import print_table
from gift.data import read_rows
from gift.errors import InputError
from gift.evaluate import evaluate
from gift.files import hash_file, hash_folder, hash_json, read_json, write_json
from gift.merge.command import merge
from gift.merge.methods import METHODS
from gift.models import model_hash, resolve_model
from gift.train import train

RUN_FILE = "run.json"
TOKENIZER_FILES = ("tokenizer*", "*.jinja", "special_tokens_map.json", "vocab*", "merges.txt")
PATH_FIELDS = {"output", "overwrite", "model", "base", "data", "confidence", "tokenizer", "adapter"}

Config = TypeVar("Config", bound=BaseModel)


class Stage(NamedTuple):
    """One stage of a run: what it is called, its options, its function and its inputs' hashes."""

    name: str
    config: Any
    function: Callable[[Any], dict[str, Any]]
    inputs: Callable[[], list[str]]

    def key(self) -> str:
        """Hash of the settings and of the inputs' content."""
        settings = self.config.model_dump(mode="json", exclude=PATH_FIELDS)
        return hash_json([self.name, settings, self.inputs()])


def run(config: RunOptions) -> dict[str, Any]:
    """Runs the stages that are not finished yet; returns the summary of each."""
    state_file = config.output / RUN_FILE
    if config.output.exists() and not state_file.exists():
        raise InputError(
            f"--output: {config.output} exists and is not a run; choose another folder"
        )
    config.output.mkdir(parents=True, exist_ok=True)
    state = read_json(state_file) if state_file.exists() else {}
    rows = []
    for stage in _stages(config):
        output = stage.config.output
        key = stage.key()
        finished = output.exists() and state.get(stage.name, {}).get("key") == key
        started = time.perf_counter()
        if not finished:
            if output.exists():
                if not config.overwrite:
                    raise InputError(
                        f"--output: {output} was made with other settings or inputs; pass "
                        "--overwrite to make it anew, or choose another folder"
                    )
                shutil.rmtree(output)
            state[stage.name] = {"key": key}
            write_json(state_file, state)
            state[stage.name]["summary"] = stage.function(stage.config)
            state[stage.name]["seconds"] = time.perf_counter() - started
            write_json(state_file, state)
        seconds = state[stage.name].get("seconds")
        rows.append(
            (
                stage.name,
                "already there" if finished else "done",
                "" if seconds is None else f"{seconds:.1f}",
                str(output),
            )
        )
    print_table(f"Run: {config.output}", ("stage", "", "seconds", "output"), rows)
    return {name: entry.get("summary", {}) for name, entry in state.items()}


def _stages(config: RunOptions) -> list[Stage]:
    """The stages in order; each takes the options that bear its fields' names."""
    confidence, adapter, merged = (
        config.output / name for name in ("confidence", "adapter", "merged")
    )
    instruct = resolve_model(config.instruct)
    base = resolve_model(config.base)
    data = hash_json(read_rows(config.data, config))
    tokenizer = hash_folder(instruct, TOKENIZER_FILES)
    guided = config.weighting == "guide"
    stages = []
    if guided:
        options = _pick(AnnotateConfig, config, model=str(instruct), output=confidence)
        stages.append(
            Stage("annotate", options, annotate, lambda: [model_hash(instruct), tokenizer, data])
        )
    train_options = _pick(
        TrainConfig,
        config,
        model=str(base),
        confidence=confidence if guided else None,
        tokenizer=str(instruct),
        output=adapter,
    )
    merge_options = _pick(
        MergeConfig,
        config,
        model=str(instruct),
        base=str(base) if METHODS[config.method].needs_base else None,
        adapter=[str(adapter)],
        dtype="keep",
        output=merged,
    )
    stages += [
        Stage(
            "train",
            train_options,
            train,
            lambda: [
                model_hash(base),
                tokenizer,
                data,
                hash_file(confidence / CONFIDENCE_FILE) if guided else "",
            ],
        ),
        Stage(
            "merge",
            merge_options,
            merge,
            lambda: [model_hash(instruct), tokenizer, model_hash(base), _adapter_hash(adapter)],
        ),
    ]
    if config.eval_data is not None:
        options = _pick(
            EvaluateConfig,
            config,
            prefix="eval_",
            model=str(merged),
            data=config.eval_data,
            output=config.output / "evaluation",
        )
        questions = hash_file(config.eval_data)
        stages.append(Stage("evaluate", options, evaluate, lambda: [questions, stages[-2].key()]))
    return stages


def _adapter_hash(adapter: Path) -> str:
    return hash_file(adapter / "adapter_model.safetensors")


def _pick(kind: type[Config], config: RunOptions, prefix: str = "", **given: Any) -> Config:
    """A stage's config from the run's options of the same names, and what is given."""
    values = {**given, "overwrite": False}
    for name in kind.model_fields:
        source = f"{prefix}{name}" if f"{prefix}{name}" in type(config).model_fields else name
        if name not in values and source in type(config).model_fields:
            values[name] = getattr(config, source)
    return kind(**values)
