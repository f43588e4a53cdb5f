"""What README.md and docs/study.md say of the stored study; see `benchmarks.miniature`."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.report import Row, plain_table
from gift.config.study import INSTRUCT
from gift.storage.files import read_json
from gift.study.results import in_percent, shown_p

TASK, ACCURACY = "task", "accuracy in %"
# README's rows; docs/study.md has all.
SHOWN = (
    *("Instruct", "GIFT", "Shadow-FT (uniform)", "Instruct-SFT"),
    *("weighting excess", "control shuffle", "guide wrong", "guide new to the domain"),
)


@dataclass(frozen=True)
class StoredStudy:
    """A stored study, with noisy or with clean references."""

    references: str
    results: dict[str, Any]
    settings: dict[str, Any]

    @property
    def methods(self) -> list[str]:
        """In the order of the study's file."""
        return [INSTRUCT, *self.settings["methods"]]

    @property
    def compared(self) -> str:
        """The method that the others are compared with."""
        return self.results["compared"]

    def differences(self, evaluation: str) -> list[dict[str, Any]]:
        """The differences between methods in an evaluation."""
        return [one for one in self.results["differences"] if one["evaluation"] == evaluation]

    def of_guide(self, guide: str) -> list[dict[str, Any]]:
        """A guide's calibration with every pair."""
        return [one for one in self.results["guides"] if one["guide"] == guide]

    def difference(self, evaluation: str, first: str, second: str) -> dict[str, Any] | None:
        """The first method minus the second; None where they are the same."""
        return next(
            (
                one
                for one in self.differences(evaluation)
                if (one["first"], one["second"]) == (first, second)
            ),
            None,
        )


def newest(folder: Path) -> list[StoredStudy]:
    """The studies of the latest `study-*` folder."""
    stored = max(folder.glob("study-*"), key=lambda path: path.name[-10:])
    return [
        StoredStudy(
            kind,
            read_json(stored / kind / "results.json"),
            yaml.safe_load((stored / kind / "study.yaml").read_text(encoding="utf-8")),
        )
        for kind in ("noisy", "clean")
    ]


def short(studies: Sequence[StoredStudy]) -> str:
    """README's table."""
    return "\n".join(plain_table([row for row in _both(studies) if row[ACCURACY] in SHOWN]))


def _both(studies: Sequence[StoredStudy]) -> list[Row]:
    """Task accuracy with each kind of references; a dash where a study lacks the method."""
    rows = []
    for method in studies[0].methods:
        row: Row = {ACCURACY: method}
        for study in studies:
            task = study.results["accuracy"][TASK].get(method)
            ahead = study.difference(TASK, study.compared, method)
            row[f"task, {study.references} references"] = in_percent(task) if task else "-"
            row[f"{study.compared} minus it, {study.references}"] = _marked(ahead)
        rows.append(row)
    return rows


def _marked(difference: dict[str, Any] | None) -> str:
    """A difference in points, bold where it is significant."""
    if difference is None:
        return ""
    mark = "**" if difference["significant"] else ""
    return f"{mark}{in_percent(difference['value'], '+')}{mark}"


def _words(study: StoredStudy) -> str:
    """Which differences of a study are significant."""
    ours = [one for one in study.differences(TASK) if one["first"] == study.compared]
    return f"At the task {study.compared} is {_sides(ours)}.\n\n{_worse(study)}"


def _worse(study: StoredStudy) -> str:
    """Methods significantly worse than the unadapted instruct model, by evaluation."""
    lines = [f"Significantly worse than {INSTRUCT}, which was not adapted:", ""]
    for evaluation in (TASK, *study.results["retention_evaluations"]):
        worse = [
            _named(one, "first")
            for one in study.differences(evaluation)
            if one["second"] == INSTRUCT and one["significant"] and one["value"]["mean"] < 0
        ]
        lines.append(f"- {evaluation}: {', '.join(worse) or 'none'}.")
    return "\n".join(lines)


def _sides(differences: Iterable[dict[str, Any]]) -> str:
    """The methods that the first one is ahead of, behind, and not surely different from."""
    ahead, behind, same = [], [], []
    for one in differences:
        side = same if not one["significant"] else ahead if one["value"]["mean"] > 0 else behind
        side.append(_named(one, "second"))
    parts = [
        f"{words} {', '.join(side)}"
        for words, side in (
            ("significantly ahead of", ahead),
            ("significantly behind", behind),
            ("not surely different from", same),
        )
        if side
    ]
    return "; ".join(parts)


def _named(difference: dict[str, Any], side: str) -> str:
    return f"{difference[side]} ({100 * difference['value']['mean']:+.1f})"


def full(studies: Sequence[StoredStudy]) -> str:
    """The tables of docs/study.md."""
    parts = []
    for study in studies:
        parts += [
            f"### With {study.references} references",
            "\n".join(plain_table([_row(study, method) for method in study.methods])),
            _words(study),
        ]
    parts += ["### The guides", "\n".join(plain_table(_guides(studies)))]
    return "\n\n".join(parts)


def _guides(studies: Sequence[StoredStudy]) -> list[Row]:
    """Each guide's calibration as the range over pairs; AUROC where there are right and wrong rows.

    In brackets the number of pairs whose interval of the AUROC contains 0.5.
    """
    rows = []
    for guide in dict.fromkeys(one["guide"] for one in studies[0].results["guides"]):
        row: Row = {"guide": guide}
        for study in studies:
            errors = [100 * one["expected_calibration_error"] for one in study.of_guide(guide)]
            row[f"calibration error, {study.references}, %"] = _range(errors, 1)
        for name in ("mean", "lowest"):
            found = studies[0].of_guide(guide)
            areas = [one["correctness"][f"{name}_confidence"] for one in found]
            unsure = sum(area["low"] <= 0.5 <= area["high"] for area in areas)
            shown = f"{_range([area['auroc'] for area in areas], 2)} ({unsure} of {len(areas)})"
            row[f"AUROC of a row's {name}, {studies[0].references}"] = shown
        rows.append(row)
    return rows


def _range(values: Sequence[float], digits: int) -> str:
    return f"{min(values):.{digits}f} to {max(values):.{digits}f}"


def _row(study: StoredStudy, method: str) -> Row:
    accuracy = study.results["accuracy"]
    ahead = study.difference(TASK, study.compared, method)
    row: Row = {ACCURACY: method, TASK: in_percent(accuracy[TASK][method])}
    row[f"{study.compared} minus it"] = _marked(ahead)
    row["p (Holm)"] = shown_p(ahead["p"]) if ahead else ""
    row["runs ahead"] = f"{ahead['ahead']} of {ahead['runs']}" if ahead else ""
    for name in study.results["retention_evaluations"]:
        row[name] = in_percent(accuracy[name][method])
    return row
