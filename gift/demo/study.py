"""The demo's experiment: five ways to adapt a pair to a noisy task set, seed by seed.

Every way uses the same stages as a user: annotate, train, merge. Replies are then generated and
scored by `world.judge`. All adaptations share one set of LoRA and optimizer settings.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any, Literal

import torch

from gift.annotate import annotate
from gift.config import AnnotateConfig, MergeConfig, TrainConfig
from gift.console import quiet
from gift.data import prompt_ids
from gift.demo.pair import Pair, make_pair
from gift.demo.world import CLEAN, TASK_NOISE, judge, puzzle_questions, task_questions, task_rows
from gift.files import write_json
from gift.generation import Reply, generate_replies
from gift.merge.command import merge
from gift.models import load_causal_lm, load_tokenizer
from gift.train import train

TASK_FILE = "task.jsonl"
MAX_NEW_TOKENS = 48
ADAPTATION: dict[str, Any] = {
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


@dataclass(frozen=True)
class Method:
    """One way to adapt: which model is trained, how its loss is weighted, and by which guide."""

    name: str
    trained: str | None
    weighting: Literal["uniform", "guide"] = "uniform"
    guide: str | None = None

    @property
    def folder(self) -> str:
        return self.name.lower()


METHODS = (
    Method("Instruct", trained=None),
    Method("Instruct-SFT", trained="instruct"),
    Method("Shadow-FT", trained="base"),
    Method("GIFT-BaseT", trained="base", weighting="guide", guide="base"),
    Method("GIFT", trained="base", weighting="guide", guide="instruct"),
)


@dataclass(frozen=True)
class Sizes:
    """How much is drawn and asked; the pair's training steps are scaled by `steps`."""

    task_rows: int = 400
    questions: int = 200
    samples: int = 4
    temperature: float = 0.7
    steps: float = 1.0


def study_pair(
    folder: Path, pair_seed: int, seeds: Sequence[int], sizes: Sizes, clean: bool
) -> list[dict[str, Any]]:
    """Makes one pair and adapts it in every way with every seed; one result a method and seed."""
    started = time.perf_counter()
    with quiet():
        pair = make_pair(folder, pair_seed, steps_scale=sizes.steps)
    made = time.perf_counter() - started
    results = []
    for seed in seeds:
        place = folder / f"seed-{seed}"
        place.mkdir()
        rng = Random(f"task/{pair_seed}/{seed}")
        rows = task_rows(rng, sizes.task_rows, CLEAN if clean else TASK_NOISE)
        _write_rows(place / TASK_FILE, rows)
        with quiet():
            for guide in ("base", "instruct"):
                _annotate(pair, guide, place)
            for method in METHODS:
                started = time.perf_counter()
                work = place / method.folder
                work.mkdir()
                loss_by_band = _adapt(pair, method, work, seed) if method.trained else {}
                model = work / "merged" if method.trained else pair.instruct
                taken = {row["instruction"] for row in rows}
                measures = _evaluate(model, work / "replies.json", sizes, pair_seed, taken)
                results.append(
                    {
                        "pair": pair_seed,
                        "seed": seed,
                        "method": method.name,
                        "seconds": time.perf_counter() - started,
                        "pair_seconds": made,
                        **measures,
                        "loss_by_band": loss_by_band,
                    }
                )
    return results


def _annotate(pair: Pair, guide: str, place: Path) -> None:
    annotate(
        AnnotateConfig(
            model=str(getattr(pair, guide)),
            tokenizer=str(pair.instruct),
            data=place / TASK_FILE,
            output=place / f"confidence-{guide}",
            max_length=ADAPTATION["max_length"],
        )
    )


def _adapt(pair: Pair, method: Method, work: Path, seed: int) -> dict[str, float]:
    """Trains and merges; returns the shares of the weighted loss by confidence band."""
    store = work.parent / f"confidence-{method.guide or 'instruct'}"
    summary = train(
        TrainConfig(
            model=str(getattr(pair, method.trained or "")),
            data=work.parent / TASK_FILE,
            confidence=store,
            weighting=method.weighting,
            seed=seed,
            output=work / "adapter",
            **ADAPTATION,
        )
    )
    merge(
        MergeConfig(
            model=str(pair.instruct),
            adapter=[str(work / "adapter")],
            output=work / "merged",
        )
    )
    if method.guide == "base":
        return {}
    prefix = "loss share at "
    return {
        key.removeprefix(prefix): value for key, value in summary.items() if key.startswith(prefix)
    }


def _evaluate(
    model_folder: Path, replies_file: Path, sizes: Sizes, pair_seed: int, taken: set[str]
) -> dict[str, float]:
    """Task accuracy greedy and sampled, the task under a constraint, and the other tasks, in %."""
    tokenizer = load_tokenizer(model_folder)
    model = load_causal_lm(model_folder, torch.float32, torch.device("cpu"))
    rng = Random(f"questions/{pair_seed}")
    task, constrained, other = (
        [asdict(question) for question in questions]
        for questions in (
            task_questions(rng, sizes.questions, taken),
            task_questions(rng, sizes.questions // 2, taken, constrained=True),
            puzzle_questions(rng, sizes.questions),
        )
    )

    def ask(questions: Sequence[Mapping[str, Any]], samples: int) -> list[list[Reply]]:
        prompts = [
            prompt_ids([{"role": "user", "content": question["instruction"]}], tokenizer)
            for question in questions
        ]
        return generate_replies(
            model,
            tokenizer,
            prompts,
            samples=samples,
            temperature=sizes.temperature if samples > 1 else 0.0,
            top_p=1.0,
            max_new_tokens=MAX_NEW_TOKENS,
            seed=pair_seed,
            batch_size=512,
        )

    asked = {
        "greedy": (task, ask(task, 1)),
        "sampled": (task, ask(task, sizes.samples)),
        "constrained": (constrained, ask(constrained, 1)),
        "other": (other, ask(other, 1)),
    }
    write_json(
        replies_file,
        {
            name: [
                {**question, "replies": [reply.text for reply in replies]}
                for question, replies in zip(questions, answers, strict=True)
            ]
            for name, (questions, answers) in asked.items()
        },
    )
    verdicts = {
        name: [
            judge(question, reply.text, ended=reply.finished)
            for question, replies in zip(questions, answers, strict=True)
            for reply in replies
        ]
        for name, (questions, answers) in asked.items()
    }

    def percent(name: str, field: str) -> float:
        return 100 * fmean(getattr(verdict, field) for verdict in verdicts[name])

    return {
        "task_greedy": percent("greedy", "correct"),
        "task_sampled": percent("sampled", "correct"),
        "worked_style": percent("sampled", "worked"),
        "task_constraint_kept": percent("constrained", "format_kept"),
        "other_exact": percent("other", "correct"),
        "other_format": percent("other", "format_kept"),
    }


def _write_rows(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
