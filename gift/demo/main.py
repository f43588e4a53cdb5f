"""`gift demo`: tiny models and synthetic data, and a study of four methods on them."""

from collections.abc import Mapping
from concurrent.futures import as_completed
from pathlib import Path
from random import Random
from typing import Any

import yaml

from gift.config import DemoConfig, StudyConfig
from gift.console import console, error_console, progress, quiet
from gift.demo import world
from gift.demo.pair import make_pair
from gift.errors import InputError
from gift.storage.lock import locked
from gift.study.run import study, worker_pool

FIRST_PAIR_SEED = 10
TASK_ROWS = 400
WORLD_FOLDER, STUDY_FOLDER, STUDY_FILE = "world", "study", "study.yaml"
SETTINGS = {
    "lora_rank": 64,
    "lora_alpha": 128,
    "lora_dropout": 0.05,
    "learning_rate": 2e-4,
    "schedule": "cosine",
    "warmup_ratio": 0.1,
    "global_batch_size": 8,
    "micro_batch_size": 8,
    "max_length": 128,
    "checkpoint_steps": 1000,
}
METHODS: dict[str, dict[str, Any]] = {
    "GIFT": {"about": "The base model trained with the instruct model's weights, then merged."},
    "Shadow-FT": {"weighting": "uniform", "about": "GIFT without weights."},
    "Instruct-SFT": {
        "weighting": "uniform",
        "trained": "instruct",
        "about": "Plain fine-tuning of the instruct model.",
    },
    "GIFT-BaseT": {"guide": "base", "about": "GIFT with the base model's weights."},
}
GREEDY = {"samples": 1, "temperature": 0.0}
# Evaluations, each with its file and the name of its answer pattern in `world`.
EVALUATIONS: dict[str, dict[str, Any]] = {
    "task": {
        "about": "Programs over one digit, the task that all were adapted to; answers are sampled.",
        "data": "task",
        "answer_pattern": world.ANSWER,
        "samples": 4,
        "temperature": 0.7,
    },
    "task, greedy": {
        "about": "The same programs, each answered with the likeliest tokens.",
        "data": "task",
        "answer_pattern": world.ANSWER,
        **GREEDY,
    },
    "own worked style": {
        "about": "Whether a program is still answered in the instruct model's own worked steps.",
        "data": "style",
        "answer_pattern": world.WORKED,
        "samples": 1,
        "temperature": 0.7,
        "retention": True,
    },
    "format kept on task": {
        "about": "Whether a program is answered in a format that the question asks for.",
        "data": "format",
        "answer_pattern": world.MARK,
        "retention": True,
        **GREEDY,
    },
    "other tasks": {
        "about": "Other tasks that the instruct model could do before.",
        "data": "other",
        "retention": True,
        **GREEDY,
    },
}
INTRODUCTION = (
    "A tiny instruct model is taught a task from {references} examples, in four ways. Three train "
    "its base model and add what was learned to the instruct model: without weights (Shadow-FT), "
    "weighted by the instruct model's confidence (GIFT) or by the base model's (GIFT-BaseT). "
    "Instruct-SFT trains the instruct model itself. The task: programs over one digit, answered by "
    "sampling and greedily. The other columns are what the instruct model could do before: its own "
    "worked steps, formats, other tasks."
)


def demo(config: DemoConfig) -> dict[str, Any]:
    """Makes models and data, runs the study and returns its results; prints the report's path last.

    InputError: the output has unknown files, or pairs with other settings.
    """
    place = config.output / WORLD_FOLDER
    with locked(config.output):
        if config.output.exists() and not place.exists() and any(config.output.iterdir()):
            raise InputError(f"--output: {config.output} exists and is not a demo; choose another")
        references = "clean" if config.clean else "noisy"
        console.print(INTRODUCTION.format(references=references), highlight=False)
        error_console.print(
            f"Making {config.pairs} pairs of tiny models and adapting each {config.seeds} times in "
            f"{len(METHODS)} ways: a few minutes on two cores.",
            highlight=False,
        )
        _make_world(config, place)
        settings = _study(config, place, references)
        path = config.output / STUDY_FILE
        path.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
        options = {"output": config.output / STUDY_FOLDER, "overwrite": config.overwrite}
        return study(StudyConfig(**settings, workers=config.workers, **options))


def _pairs(config: DemoConfig) -> dict[str, int]:
    """The pairs' seeds by name."""
    seeds = range(FIRST_PAIR_SEED, FIRST_PAIR_SEED + config.pairs)
    return {f"pair-{seed}": seed for seed in seeds}


def _make_world(config: DemoConfig, place: Path) -> None:
    """Makes the pairs, and writes task sets and questions."""
    pairs = _pairs(config)
    with worker_pool(config.workers) as pool, progress("pairs", len(pairs)) as bar:
        jobs = [
            pool.submit(_make_pair, place / name, seed, config.scale, config.overwrite)
            for name, seed in pairs.items()
        ]
        for name, seed in pairs.items():
            write_data(
                place,
                name,
                seed,
                seeds=config.seeds,
                questions=config.questions,
                noise=world.CLEAN if config.clean else world.TASK_NOISE,
            )
        for job in as_completed(jobs):
            job.result()
            bar.advance()


def _make_pair(folder: Path, seed: int, scale: float, overwrite: bool) -> None:
    with quiet():
        make_pair(folder, seed, steps_scale=scale, overwrite=overwrite)


def write_data(
    folder: Path, pair: str, pair_seed: int, *, seeds: int, questions: int, noise: world.Noise
) -> None:
    """Writes a task set per seed, and questions that are in none of them.

    The noise of the references does not change the task sets' prompts or the questions.
    """
    folder.mkdir(parents=True, exist_ok=True)
    taken: set[str] = set()
    for seed in range(seeds):
        rows = world.task_rows(Random(f"task/{pair_seed}/{seed}"), TASK_ROWS, noise)
        world.write_rows(folder / f"{pair}-rows-{seed}.jsonl", rows)
        taken |= {row["instruction"] for row in rows}
    rng = Random(f"questions/{pair_seed}")
    programs = world.distinct_programs(rng, questions, taken)
    constrained = world.distinct_programs(rng, questions // 2, taken)
    for name, asked in (
        ("task", world.task_questions(programs)),
        ("style", world.style_questions(programs)),
        ("format", world.constraint_questions(rng, constrained)),
        ("other", world.puzzle_questions(rng, questions)),
    ):
        world.write_rows(folder / f"{pair}-{name}.jsonl", asked)


def ask(folder: Path, evaluations: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Evaluations, as a study's file has them, of the questions that `write_data` wrote."""
    asked = {"check": "exact", "max_new_tokens": 48, "batch_size": 512, "device": "cpu"}
    return {
        name: {**asked, **options, "data": str(folder / f"{{pair}}-{options['data']}.jsonl")}
        for name, options in evaluations.items()
    }


def _study(config: DemoConfig, place: Path, references: str) -> dict[str, Any]:
    """The study's file; `references` are noisy or clean."""
    return {
        "title": f"Tiny models adapted in four ways, with {references} references",
        "pairs": {
            name: {model: str(place / name / model) for model in ("base", "instruct")}
            for name in _pairs(config)
        },
        "settings": {"data": str(place / "{pair}-rows-{seed}.jsonl"), "device": "cpu", **SETTINGS},
        "methods": METHODS,
        "evaluations": ask(place, EVALUATIONS),
        "correct_field": "correct",
        "seeds": list(range(config.seeds)),
    }
