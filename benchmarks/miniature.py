"""The paper's table in miniature: `python -m benchmarks.miniature --output miniature`.

Makes pairs of tiny models in the demo's world, guides that are wrong or new to the domain, and
noisy and clean references; then runs a study of all methods with noisy references, and one without
merge methods with clean ones. Finished parts are skipped. Takes about half an hour on one core.
"""

import argparse
import shutil
from pathlib import Path
from random import Random
from typing import Any

import yaml

from gift.config import MergeConfig, StudyConfig, TrainConfig
from gift.console import error_console, quiet
from gift.demo import world
from gift.demo.main import EVALUATIONS, SETTINGS, ask, write_data
from gift.demo.main import METHODS as DEMO_METHODS
from gift.demo.pair import Recipe, make_pair
from gift.merge.command import merge
from gift.merge.methods import METHODS as MERGE_METHODS
from gift.study.report import REPORT_FILE
from gift.study.results import RESULTS_FILE
from gift.study.run import study
from gift.train import train
from gift.weighting.formulas import WEIGHTINGS

SEEDS, QUESTIONS = 3, 100
# Seed and recipe of each pair.
PAIRS: dict[str, tuple[int, dict[str, Any]]] = {
    "standard-10": (10, {}),
    "standard-11": (11, {}),
    "standard-12": (12, {}),
    "wide": (20, {"hidden_size": 96, "mlp_size": 288, "heads": 3}),
    "deep": (30, {"layers": 3}),
}
REFERENCES = {"noisy": world.TASK_NOISE, "clean": world.CLEAN}
# References of the wrong guide: clean steps that stop at 0 and 9, where the task wraps around.
CORRUPTED = world.Noise(wrong_convention=1.0, slip=0.1)
NO_PROGRAMS = world.Mixture(document_programs=0.0, conversation_programs=0.0)
NEW_RECIPE = {"primer_steps": 0, "mixture": NO_PROGRAMS}
EVALUATED = ("task", "own worked style", "other tasks")


def methods(guides: Path) -> dict[str, dict[str, Any]]:
    """All methods by name; `guides` has the folders of the failing guides."""
    return {
        "GIFT": DEMO_METHODS["GIFT"],
        # Other weightings, and other models trained or asked.
        "Shadow-FT (uniform)": DEMO_METHODS["Shadow-FT"],
        "Instruct-SFT": DEMO_METHODS["Instruct-SFT"],
        "GIFT-BaseT": DEMO_METHODS["GIFT-BaseT"],
        **{
            f"weighting {name}": {"weighting": name}
            for name in WEIGHTINGS
            if name not in ("guide", "uniform")
        },
        **{
            f"control {name}": {"control": name}
            for name in ("shuffle", "random", "invert", "constant")
        },
        # With one adapter and factors of 1, these two would be the merge of GIFT.
        "merge task-arithmetic 0.5": {"method": "task-arithmetic", "task_weight": 0.5},
        "merge re-adapt 0.5": {"method": "re-adapt", "instruct_weight": 0.5},
        **{
            f"merge {name}": {"method": name}
            for name in MERGE_METHODS
            if name not in ("lora", "task-arithmetic", "re-adapt")
        },
        "guide wrong": {
            "guide": str(guides / "wrong-{pair}"),
            "about": "The guide is the instruct model after training on wrong references.",
        },
        "guide overconfident": {
            "guide_temperature": 0.25,
            "about": "The guide's logits are divided by 0.25, so that it is surer than it should.",
        },
        "guide new to the domain": {
            "guide": str(guides / "new-{pair}" / "instruct"),
            "about": "The guide was trained without any program.",
        },
    }


def make_world(folder: Path) -> None:
    """Pairs, guides, references and questions; `write_data` has the files of each pair."""
    for name, (seed, changes) in PAIRS.items():
        error_console.print(f"Pair {name}", highlight=False)
        with quiet():
            pair = make_pair(folder / "pairs" / name, seed, recipe=Recipe(**changes))
            make_pair(
                folder / "guides" / f"new-{name}",
                seed,
                steps_scale=0.5,
                recipe=Recipe(**NEW_RECIPE, **changes),
            )
            _teach_wrongly(folder, name, seed, pair.instruct)
        for kind, noise in REFERENCES.items():
            write_data(folder / kind, name, seed, seeds=SEEDS, questions=QUESTIONS, noise=noise)


def _teach_wrongly(folder: Path, name: str, seed: int, instruct: Path) -> None:
    """The instruct model, fine-tuned on references that are wrong."""
    guide, adapter = (folder / "guides" / f"{kind}-{name}" for kind in ("wrong", "adapter"))
    if guide.exists():
        return
    data = folder / "guides" / f"{name}-corrupted.jsonl"
    data.parent.mkdir(parents=True, exist_ok=True)
    world.write_rows(data, world.task_rows(Random(f"corrupted/{seed}"), 800, CORRUPTED))
    train(
        TrainConfig(
            **SETTINGS | {"learning_rate": 1e-3},
            model=str(instruct),
            data=data,
            tokenizer=str(instruct),
            weighting="uniform",
            device="cpu",
            overwrite=True,
            output=adapter,
        )
    )
    merge(MergeConfig(model=str(instruct), adapter=[str(adapter)], device="cpu", output=guide))


def study_file(folder: Path, kind: str) -> dict[str, Any]:
    """The study with one kind of references, as `gift study` reads it."""
    evaluations = {name: EVALUATIONS[name] for name in EVALUATED}
    evaluations["task"] = {**evaluations["task"], "samples": 2}
    chosen = methods(folder / "guides")
    if kind == "clean":
        chosen = {name: own for name, own in chosen.items() if "method" not in own}
    return {
        "title": f"The paper's table in miniature, with {kind} references",
        "pairs": {
            name: {model: str(folder / "pairs" / name / model) for model in ("base", "instruct")}
            for name in PAIRS
        },
        "settings": {
            "data": str(folder / kind / "{pair}-rows-{seed}.jsonl"),
            "device": "cpu",
            **SETTINGS,
        },
        "methods": chosen,
        "evaluations": ask(folder / kind, evaluations),
        "correct_field": "correct",
        "seeds": list(range(SEEDS)),
        "keep_models": False,
    }


def main() -> None:
    """Makes missing parts, and runs the studies."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.miniature", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="for models and studies")
    parser.add_argument("--results", type=Path, help="also copy results, files and reports there")
    parser.add_argument("--workers", type=int, default=1, help="stages at a time")
    arguments = parser.parse_args()
    make_world(arguments.output)
    for kind in REFERENCES:
        settings = study_file(arguments.output, kind)
        path = arguments.output / f"{kind}.yaml"
        path.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
        output = arguments.output / f"study-{kind}"
        study(StudyConfig(**settings, workers=arguments.workers, output=output))
        if arguments.results:
            copy_results(path, output, arguments.results / kind)


def copy_results(file: Path, output: Path, folder: Path) -> None:
    """Copies a study's file, figures and report."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, folder / "study.yaml")
    for name in (RESULTS_FILE, REPORT_FILE):
        shutil.copyfile(output / name, folder / name)


if __name__ == "__main__":
    main()
