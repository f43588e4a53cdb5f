"""The stored study has all methods, and its tables agree with its results."""

from pathlib import Path
from typing import Any, get_args

import pytest

from benchmarks import miniature, readme, study_tables
from benchmarks.study_tables import StoredStudy
from gift.config import StudyConfig, TrainOptions
from gift.config.train import Control
from gift.merge.methods import METHODS
from gift.storage.files import read_json


@pytest.mark.parametrize("kind", miniature.REFERENCES)
def test_the_studies_are_valid(kind: str, tmp_path: Path) -> None:
    file = miniature.study_file(tmp_path, kind)
    config = StudyConfig(**file, output=tmp_path / "study")
    assert len(config.pairs) >= 5 and len(config.seeds) >= 3
    assert config.compared == "GIFT"


def test_every_weighting_control_and_merge_method_takes_part(tmp_path: Path) -> None:
    file = miniature.study_file(tmp_path, "noisy")
    methods = StudyConfig(**file, output=tmp_path / "study").methods.values()
    weightings = get_args(TrainOptions.model_fields["weighting"].annotation)
    assert {method.weighting for method in methods} == {*weightings}
    assert {method.control for method in methods} == {None, *get_args(Control)}
    assert {method.method for method in methods} == {*METHODS}


def stored(*differences: tuple[str, str, str, float, bool]) -> StoredStudy:
    value: dict[str, Any] = {"mean": 0.5, "low": 0.4, "high": 0.6}
    methods = ("Instruct", "GIFT", "other")
    results = {
        "compared": "GIFT",
        "retention_evaluations": ["style"],
        "guides": [
            {
                "guide": "instruct",
                "expected_calibration_error": error,
                "correctness": {
                    "mean_confidence": {"auroc": area, "low": 0.45, "high": 0.6},
                    "lowest_confidence": {"auroc": area, "low": low, "high": 0.6},
                },
            }
            for error, area, low in ((0.141, 0.51, 0.48), (0.163, 0.56, 0.53))
        ],
        "accuracy": {name: dict.fromkeys(methods, value) for name in ("task", "style")},
        "differences": [
            {
                "evaluation": evaluation,
                "first": first,
                "second": second,
                "value": {"mean": mean, "low": mean - 0.1, "high": mean + 0.1},
                "p": 0.01 if significant else 0.5,
                "ahead": 2,
                "runs": 3,
                "significant": significant,
            }
            for evaluation, first, second, mean, significant in differences
        ],
    }
    return StoredStudy("noisy", results, {"methods": {"GIFT": {}, "other": {}}})


def test_what_is_significant_is_bold_and_said_in_words() -> None:
    study = stored(
        ("task", "GIFT", "Instruct", 0.2, True),
        ("task", "GIFT", "other", -0.05, False),
        ("task", "other", "Instruct", -0.25, True),
        ("style", "GIFT", "Instruct", -0.3, True),
        ("style", "other", "Instruct", -0.3, False),
    )
    text = study_tables.full([study])
    assert "| Instruct | 50.0 [40.0, 60.0] | **+20.0 [+10.0, +30.0]** | 0.010 | 2 of 3 |" in text
    assert "| other | 50.0 [40.0, 60.0] | -5.0 [-15.0, +5.0] | 0.500 | 2 of 3 |" in text
    assert "ahead of Instruct (+20.0); not surely different from other (-5.0)" in text
    assert "task: other (-25.0)." in text and "style: GIFT (-30.0)." in text
    guides = "| instruct | 14.1 to 16.3 | 0.51 to 0.56 (2 of 2) | 0.51 to 0.56 (1 of 2) |"
    assert guides in text


def test_what_docs_say_of_a_real_guide_is_so_in_its_calibration() -> None:
    stored = max(readme.RESULTS.glob("study-*")) / "smollm2-135m" / "calibration.json"
    found = read_json(stored)
    assert found["tokens"] == 18869
    assert round(100 * found["expected_calibration_error"], 1) == 0.9


def test_what_docs_and_readme_say_of_the_instruct_guide_is_so_in_the_stored_results() -> None:
    noisy, clean = study_tables.newest(readme.RESULTS)
    for study, errors in ((noisy, "14.5 to 16.1"), (clean, "1.1 to 1.6")):
        found = [100 * one["expected_calibration_error"] for one in study.of_guide("instruct")]
        assert f"{min(found):.1f} to {max(found):.1f}" == errors
    for name, said in (("mean", "0.49 to 0.55"), ("lowest", "0.52 to 0.55")):
        areas = [one["correctness"][f"{name}_confidence"] for one in noisy.of_guide("instruct")]
        values = [area["auroc"] for area in areas]
        assert len(areas) == 5 and f"{min(values):.2f} to {max(values):.2f}" == said
        assert all(area["low"] < 0.5 < area["high"] for area in areas)


def test_what_docs_and_readme_say_in_short_is_so_in_the_stored_results() -> None:
    noisy, clean = study_tables.newest(readme.RESULTS)

    def compare(study: StoredStudy, first: str, second: str) -> int:
        """1, -1 or 0: the first is significantly ahead, behind, or neither."""
        found = study.difference("task", first, second)
        assert found is not None
        return int(found["significant"]) * (1 if found["value"]["mean"] > 0 else -1)

    for copy in ("shuffle", "random", "constant"):
        assert compare(noisy, "GIFT", f"control {copy}") == 1
    assert compare(noisy, "guide wrong", "Instruct") == -1
    assert compare(noisy, "guide new to the domain", "Instruct") == 0
    for study in (noisy, clean):
        assert compare(study, "GIFT", "guide overconfident") == 0
    assert compare(noisy, "GIFT", "weighting excess") == 0
    for plain, behind in (("Instruct-SFT", -0.086), ("Shadow-FT (uniform)", -0.027)):
        difference = clean.difference("task", "GIFT", plain)
        assert difference is not None and round(difference["value"]["mean"], 3) == behind
        assert not any(
            one["significant"] and one["first"] == plain and one["value"]["mean"] < 0
            for name in clean.results["retention_evaluations"]
            for one in clean.differences(name)
        )
    uniform = clean.results["accuracy"]["task"]["Shadow-FT (uniform)"]["mean"]
    assert compare(clean, "GIFT", "Shadow-FT (uniform)") == -1
    for guided in ("GIFT-BaseT", "guide wrong", "guide overconfident", "guide new to the domain"):
        assert clean.results["accuracy"]["task"][guided]["mean"] < uniform
