"""All stages in one folder: annotate → train → merge → evaluate.

A stage's folder appears only when it is complete, and its `gift_files.json` holds the stage's key,
a hash of its settings and of the content of its inputs (`gift.storage.publish`): a folder with the
right key is finished and skipped, and a killed run resumes where it stopped.
"""

import re
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel

from gift.annotate import annotate
from gift.confidence_store import CONFIDENCE_FILE
from gift.config import AnnotateConfig, EvaluateConfig, MergeConfig, RunOptions, TrainConfig
from gift.console import print_table
from gift.data.encoding import read_rows
from gift.distributed import ranks
from gift.errors import InputError
from gift.evaluate import check_evaluation, evaluate
from gift.merge.adapter import WEIGHTS_FILE
from gift.merge.command import merge
from gift.merge.methods import METHODS
from gift.models.loading import listed, model_hash, model_structure, quantisation, resolve_model
from gift.models.tokenizer import load_tokenizer
from gift.storage.files import hash_file, hash_folder, hash_json, read_json
from gift.storage.lock import lock_path, locked
from gift.storage.publish import (
    check_published,
    complete,
    partial_path,
    published_key,
    replaced_path,
)
from gift.train import SPLIT, train
from gift.training.lora_targets import find_targets
from gift.training.sharding import require_processes
from gift.weighting.weights import check_weighting

TOKENIZER_FILES = ("tokenizer*", "*.jinja", "special_tokens_map.json", "vocab*", "merges.txt")
# Not in a stage's key: what does not change its result, and paths, whose content the key has.
WITHOUT_EFFECT = {"shard", *SPLIT}
PATH_FIELDS = {"output", "overwrite", "model", "base", "data", "confidence", "tokenizer", "adapter"}

Config = TypeVar("Config", bound=BaseModel)


class Stage(NamedTuple):
    """One stage of a run: its name, its options, its function and its inputs' hashes."""

    name: str
    config: Any
    function: Callable[[Any, str], dict[str, Any]]
    inputs: Callable[[], list[str]]

    def key(self) -> str:
        """Hash of the settings and of the content of the inputs."""
        settings = self.config.model_dump(mode="json", exclude=PATH_FIELDS | WITHOUT_EFFECT)
        return hash_json([self.name, settings, self.inputs()])


def run(config: RunOptions) -> dict[str, str]:
    """Runs the stages that are not finished yet; returns "done" or "already there" for each.

    Each stage shares its work among the ranks; the main one owns the output and decides what is
    finished.

    InputError: a stage's folder was made with other settings or inputs, or is damaged, and
    `overwrite` is not given; another run owns the output; what a stage raises.
    """
    check_pair(config)
    stages = _stages(config)
    states, rows = {}, []
    with ExitStack() as owner:

        def own_output() -> None:
            owner.enter_context(locked(config.output))
            _refuse_other_folder(config.output, [stage.config.output for stage in stages])

        with ranks.process_group(on_host=True) as group:
            group.require_equal(config.model_dump(mode="json"))
            group.from_main(own_output)
        for stage in stages:
            started = time.perf_counter()

            def find_state(stage: Stage = stage) -> tuple[str, bool]:
                key = stage.key()
                return key, is_finished(stage.config.output, key, config.overwrite)

            with ranks.process_group(on_host=True) as group:
                key, finished = group.from_main(find_state)
            if not finished:
                options = stage.config.model_copy(update={"overwrite": config.overwrite})
                stage.function(options, key)
            states[stage.name] = "already there" if finished else "done"
            seconds = "" if finished else f"{time.perf_counter() - started:.1f}"
            rows.append((stage.name, states[stage.name], seconds, str(stage.config.output)))
    if group.is_main:
        print_table(f"Run: {config.output}", ("stage", "", "seconds", "output"), rows)
    return states


def _refuse_other_folder(output: Path, folders: Sequence[Path]) -> None:
    present = set(output.iterdir()) if output.exists() else set()
    beside = (partial_path, replaced_path, lock_path)
    ours = {*folders, *(path(folder) for path in beside for folder in folders)}
    if present and not present & ours:
        raise InputError(f"--output: {output} exists and is not a run; choose another folder")


def is_finished(output: Path, key: str, overwrite: bool) -> bool:
    """Whether a stage's folder is complete; InputError if it must be overwritten but may not."""
    with locked(output):
        complete(output)
    if not output.exists():
        return False
    problem = "was made with other settings or inputs"
    if published_key(output) == key:
        try:
            check_published(output, sizes_only=True)
            return True
        except InputError as error:
            problem = f"is damaged ({error})"
    if not overwrite:
        raise InputError(
            f"--output: {output} {problem}; pass --overwrite to make it again, or choose another "
            "folder"
        )
    return False


def check_pair(config: RunOptions) -> None:
    """InputError, before any stage, where the models or options do not fit each other."""
    config.refuse_unread_settings()
    check_weighting(config)
    if config.shard:
        require_processes()
    _refuse_other_shapes(
        config,
        _check_model(config, "--base", config.base),
        _check_model(config, "--instruct", config.instruct),
    )


def _refuse_other_shapes(config: RunOptions, base: Any, instruct: Any) -> None:
    """InputError where shapes differ in more than the vocabulary: the merge would fail."""

    def shapes(model: Any) -> set[tuple[str, tuple[int, ...]]]:
        ends = [model.get_input_embeddings(), model.get_output_embeddings()]
        vocabulary = {id(p) for layer in ends if layer for p in layer.parameters()}
        parameters = model.named_parameters()
        return {(name, tuple(p.shape)) for name, p in parameters if id(p) not in vocabulary}

    if differing := sorted({name for name, _ in shapes(base) ^ shapes(instruct)}):
        raise InputError(
            f"--base: {config.base} is not the model that {config.instruct} was made from: "
            f"{listed(differing)} are not in both, or of different shapes"
        )


def _check_model(config: RunOptions, option: str, name: str) -> Any:
    """The model's structure; InputError, before any stage, where a later one could not use it."""
    folder = resolve_model(name)
    method = quantisation(read_json(folder / "config.json"))
    if method is not None:
        raise InputError(
            f"{option}: {name} is quantised with {method}, and an adapter is merged into plain "
            "weights; give the bf16 or float16 model"
        )
    structure = model_structure(folder)
    if option == "--base":
        find_targets(config, structure)
    else:
        load_tokenizer(folder)
    return structure


def _stages(config: RunOptions) -> list[Stage]:
    """The stages in order; each gets the run's options of the same names."""
    confidence, adapter, merged = (
        config.output / name for name in ("confidence", "adapter", "merged")
    )
    instruct = resolve_model(config.instruct)
    base = resolve_model(config.base)
    data = hash_json(read_rows(config.data, config))
    tokenizer = hash_folder(instruct, TOKENIZER_FILES)
    stages = []
    if config.guided:
        options = pick(AnnotateConfig, config, model=str(instruct), output=confidence)
        stages.append(
            Stage("annotate", options, annotate, lambda: [model_hash(instruct), tokenizer, data])
        )
    train_options = pick(
        TrainConfig,
        config,
        model=str(base),
        confidence=confidence if config.guided else None,
        tokenizer=str(instruct),
        output=adapter,
    )
    merge_options = pick(
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
                _hash_of(confidence, CONFIDENCE_FILE) if config.guided else "",
            ],
        ),
        Stage(
            "merge",
            merge_options,
            merge,
            lambda: [
                model_hash(instruct),
                tokenizer,
                model_hash(base),
                _hash_of(adapter, WEIGHTS_FILE),
            ],
        ),
    ]
    options = _evaluation(config, merged)
    if options is not None:
        questions = hash_file(options.data) if options.data else ""
        stages.append(Stage("evaluate", options, evaluate, lambda: [questions, stages[-2].key()]))
    return stages


def _evaluation(config: RunOptions, merged: Path) -> EvaluateConfig | None:
    """The evaluation's options; None where the run has no questions."""
    options = pick(
        EvaluateConfig,
        config,
        prefix="eval_",
        model=str(merged),
        data=config.eval_data,
        output=config.output / "evaluation",
    )
    if options.data is None and options.benchmark is None:
        return None
    try:
        check_evaluation(options)
    except InputError as error:
        raise InputError(re.sub(r"^--(?=\w)", "--eval-", str(error))) from None
    return options


def _hash_of(folder: Path, name: str) -> str:
    """sha256 of a file that a stage of this run published."""
    check_published(folder)
    return hash_file(folder / name)


def pick(kind: type[Config], config: BaseModel, /, prefix: str = "", **given: Any) -> Config:
    """A stage's config from the run's options of the same names and the given values."""
    values = {**given, "overwrite": False}
    for name in kind.model_fields:
        source = f"{prefix}{name}" if f"{prefix}{name}" in type(config).model_fields else name
        if name not in values and source in type(config).model_fields:
            values[name] = getattr(config, source)
    return kind(**values)
