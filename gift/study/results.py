"""Results of a finished study: accuracies, differences with intervals and tests, curves."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ValidationError

from gift.config.study import INSTRUCT
from gift.console import console, print_table
from gift.data.rows import json_lines
from gift.errors import InputError
from gift.storage.files import read_json, read_record, write_json
from gift.storage.publish import check_published
from gift.study.plan import STAGES_FOLDER
from gift.study.significance import Estimate, estimate, holm, permute_runs
from gift.training.micro_batches import BAND_NAMES

STUDY_FILE = "study.json"
RESULTS_FILE = "results.json"
# Stages that results and report read; merged models may have been removed.
READ_STAGES = ("calibrate", "train", "diff")
GUIDE_FIGURES = (
    *("guide", "pair", "tokens", "mean_largest", "first_choice_is_target"),
    *("expected_calibration_error", "correctness"),
)
LEVEL = 0.05


@dataclass(frozen=True)
class Difference:
    """A method's accuracy minus another's, paired by question and seed.

    `p` is adjusted (Holm) for all differences of its evaluation; `p_runs` is the permutation test
    over runs, unadjusted; in `ahead` of `runs` runs the first method is better.
    """

    evaluation: str
    first: str
    second: str
    value: Estimate
    p: float | None
    p_runs: float | None
    ahead: int
    runs: int

    @property
    def significant(self) -> bool:
        """Whether p is below 0.05."""
        return self.p is not None and self.p < LEVEL


class _Run(BaseModel):
    pair: str
    method: str
    seed: int | None
    learning_rate: float | None
    stages: dict[str, str]
    evaluations: dict[str, str]


class _Settings(BaseModel):
    title: str | None
    pairs: dict[str, Any]
    methods: dict[str, dict[str, Any]]
    evaluations: dict[str, dict[str, Any]]


class _Record(BaseModel):
    """The content of study.json."""

    settings: _Settings
    methods: list[str]
    evaluations: list[str]
    compared: str
    tuning: list[dict[str, Any]]
    runs: list[_Run]
    versions: dict[str, Any]


class Study:
    """The folder of a study whose stages are finished."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.record = read_json(folder / STUDY_FILE)
        try:
            _Record.model_validate(self.record)
        except ValidationError as error:
            places = {".".join(map(str, problem["loc"])) for problem in error.errors()}
            raise InputError(
                f"{folder / STUDY_FILE}: {', '.join(sorted(places))} missing or not as written; "
                "another version or another program wrote it, run gift study again"
            ) from None
        self._answers: dict[str, list[list[dict[str, Any]]]] = {}

    @property
    def settings(self) -> dict[str, Any]:
        """The study's file, defaults included."""
        return self.record["settings"]

    @property
    def methods(self) -> list[str]:
        """The unadapted instruct model, then the methods in the order of the file."""
        return self.record["methods"]

    @property
    def evaluations(self) -> list[str]:
        """The task's evaluations, then those of retention."""
        return self.record["evaluations"]

    def is_retention(self, evaluation: str) -> bool:
        """Whether it measures retention of the instruct model's abilities."""
        return self.settings["evaluations"][evaluation]["retention"]

    def runs(self, method: str, pair: str | None = None) -> list[dict[str, Any]]:
        """A method's runs, of one pair if given."""
        return [
            run
            for run in self.record["runs"]
            if run["method"] == method and pair in (None, run["pair"])
        ]

    def stage(self, name: str) -> Path:
        """The folder of a stage."""
        return self.folder / STAGES_FOLDER / name

    def read_stages(self) -> list[Path]:
        """The folders that results and report read, each once."""
        names = [
            name
            for run in self.record["runs"]
            for name in (
                *(name for kind, name in run["stages"].items() if kind in READ_STAGES),
                *run["evaluations"].values(),
            )
        ]
        return [self.stage(name) for name in dict.fromkeys(names)]

    def answers(self, run: dict[str, Any], evaluation: str) -> list[list[dict[str, Any]]]:
        """A run's rows of samples.jsonl: [question][sample]."""
        name = run["evaluations"][evaluation]
        if name not in self._answers:
            questions: dict[int, list[dict[str, Any]]] = {}
            for _, _, sample in json_lines(self.stage(name) / "samples.jsonl"):
                questions.setdefault(sample["row"], []).append(sample)
            self._answers[name] = [questions[row] for row in sorted(questions)]
        return self._answers[name]

    def shares(self, method: str, evaluation: str) -> list[np.ndarray]:
        """The share of right answers, an array [seeds, questions] per pair."""

        def of_run(run: dict[str, Any]) -> list[float]:
            answers = self.answers(run, evaluation)
            return [float(np.mean([s["correct"] for s in samples])) for samples in answers]

        return [
            np.array([of_run(run) for run in self.runs(method, pair)])
            for pair in self.settings["pairs"]
        ]

    def accuracy(self, method: str, evaluation: str) -> dict[str, Any]:
        """The estimate, and in `runs` the accuracy of each run."""
        shares = self.shares(method, evaluation)
        runs = [float(run.mean()) for pair in shares for run in pair]
        return {**asdict(estimate(shares, least=0)), "runs": runs}

    def differences(self, evaluation: str) -> list[Difference]:
        """The reference method minus every other, then every other minus the instruct model."""
        shares = {method: self.shares(method, evaluation) for method in self.methods}
        names = list(_compared_pairs(self.methods, self.record["compared"]))
        found = []
        for first, second in names:
            pairs = [one - other for one, other in zip(shares[first], shares[second], strict=True)]
            # Rounded, so that runs with equally many right answers are equal in any order of
            # summation.
            runs = [round(float(run.mean()), 9) for values in pairs for run in values]
            ahead = sum(run > 0 for run in runs)
            value = estimate(pairs)
            found.append(
                Difference(
                    evaluation, first, second, value, None, permute_runs(runs), ahead, len(runs)
                )
            )
        tested = [number for number, one in enumerate(found) if one.value.p is not None]
        adjusted = holm([float(found[number].value.p or 0) for number in tested])
        for number, p in zip(tested, adjusted, strict=True):
            found[number] = Difference(**{**vars(found[number]), "p": p})
        return found

    def loss_by_band(self, method: str) -> dict[str, float]:
        """The mean share of the weighted loss by the instruct model's confidence.

        Empty where another model is the guide.
        """
        if method == INSTRUCT or self.settings["methods"][method]["guide"] != "instruct":
            return {}
        summaries = [self._manifest(run)["summary"] for run in self.runs(method)]
        return {
            band: float(np.mean([summary[f"loss share at {band}"] for summary in summaries]))
            for band in BAND_NAMES
        }

    def _manifest(self, run: dict[str, Any]) -> dict[str, Any]:
        return read_record(self.stage(run["stages"]["train"]) / "gift_train.json", ("summary",))

    def calibrations(self) -> list[dict[str, Any]]:
        """The calibration of each guide's first store, with the guide's name and pair.

        `correctness` is None without the study's `correct_field`.
        """
        found: dict[str, dict[str, Any]] = {}
        for run in self.record["runs"]:
            name = run["stages"].get("calibrate")
            if name is None or name in found:
                continue
            report = read_json(self.stage(name) / "calibration.json")
            options = self.settings["methods"][run["method"]]
            guide = options["guide"]
            if options["guide_temperature"] != 1:
                guide += f" at temperature {options['guide_temperature']}"
            everything = next(kind for kind in report["kinds"] if kind["kind"] == "all")
            found[name] = {
                **report,
                "first_choice_is_target": everything["first_choice_is_target"],
                "correctness": report.get("correctness"),
                "pair": run["pair"],
                "guide": guide,
            }
        return list(found.values())

    def pass_curve(self, method: str, evaluation: str) -> list[float]:
        """pass@N for N = 1 … samples, the mean over runs; empty for a multiple choice."""
        curves = []
        for run in self.runs(method):
            found = self.metrics(run, evaluation).get("pass", {})
            curves.append([found[str(n)]["estimate"] for n in range(1, len(found) + 1)])
        return np.mean(curves, axis=0).tolist()

    def metrics(self, run: dict[str, Any], evaluation: str) -> dict[str, Any]:
        """The metrics.json of a run's evaluation."""
        return read_json(self.stage(run["evaluations"][evaluation]) / "metrics.json")

    def results(self) -> dict[str, Any]:
        """All results, also written to results.json."""
        differences = [one for name in self.evaluations for one in self.differences(name)]
        results = {
            "compared": self.record["compared"],
            "task_evaluations": [name for name in self.evaluations if not self.is_retention(name)],
            "retention_evaluations": [name for name in self.evaluations if self.is_retention(name)],
            "accuracy": {
                name: {method: self.accuracy(method, name) for method in self.methods}
                for name in self.evaluations
            },
            "differences": [{**asdict(one), "significant": one.significant} for one in differences],
            "pass": {
                name: {method: self.pass_curve(method, name) for method in self.methods}
                for name in self.evaluations
            },
            "loss_by_band": {method: self.loss_by_band(method) for method in self.methods},
            "guides": [{name: one[name] for name in GUIDE_FIGURES} for one in self.calibrations()],
            "tuning": self.record["tuning"],
        }
        write_json(self.folder / RESULTS_FILE, results)
        return results


def read_study(folder: Path) -> Study:
    """A finished study; InputError if the folder is not one, or is damaged."""
    if not (folder / STUDY_FILE).is_file():
        raise InputError(f"{folder}: no {STUDY_FILE}, so this is not a finished study")
    study = Study(folder)
    for path in study.read_stages():
        if not path.is_dir():
            raise InputError(f"{path}: no such folder; the study's command makes it again")
        check_published(path)
    return study


def _compared_pairs(methods: Sequence[str], compared: str) -> Iterator[tuple[str, str]]:
    yield from ((compared, other) for other in methods if other != compared)
    yield from ((other, INSTRUCT) for other in methods if other not in (compared, INSTRUCT))


def in_percent(value: dict[str, Any], sign: str = "") -> str:
    """An estimate in percent with its interval."""
    mean, low, high = (
        None if value[name] is None else 100 * value[name] for name in ("mean", "low", "high")
    )
    interval = "" if low is None else f" [{low:{sign}.1f}, {high:{sign}.1f}]"
    return f"{mean:{sign}.1f}{interval}"


def shown_p(p: float | None) -> str:
    """A p-value in three digits."""
    return "" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def print_results(results: dict[str, Any]) -> None:
    """Prints accuracies, and for every evaluation the lead of the reference method."""
    accuracy = results["accuracy"]
    console.print(
        "Accuracy is the share of right answers in %. In brackets is the 95 % interval: where it "
        "would lie with other questions and other seeds. A difference is significant where p, "
        "adjusted for the number of differences (Holm), is below 0.05.",
        highlight=False,
    )
    methods = list(next(iter(accuracy.values())))
    print_table(
        "Accuracy in %, mean of all pairs and seeds [95 % interval]",
        ("", *accuracy),
        [(method, *(in_percent(each[method]) for each in accuracy.values())) for method in methods],
    )
    for name in results["task_evaluations"] or accuracy:
        rows = [
            (
                one["second"],
                in_percent(one["value"], "+"),
                shown_p(one["p"]),
                f"{one['ahead']} of {one['runs']}",
            )
            for one in results["differences"]
            if one["evaluation"] == name and one["first"] == results["compared"]
        ]
        print_table(
            f"{name}: {results['compared']} minus the other, in points",
            ("", "difference", "p (Holm)", "runs ahead"),
            rows,
        )
