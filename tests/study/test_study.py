"""`gift study`: shares equal stages, resumes, tunes every method alike, compares run by run."""

import json
import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import pytest
import studies
import tiny
import torch
from safetensors.torch import load_file

from gift.config import MergeConfig, StatisticsConfig, StudyConfig
from gift.distributed.ranks import ALONE, process_group
from gift.errors import InputError
from gift.merge.command import merge
from gift.merge.statistics import merge_statistics
from gift.study import run as run_module
from gift.study.plan import plan, plan_tuning
from gift.study.results import read_study
from gift.study.run import study, worker_places

# One process makes the study that these tests read.
pytestmark = pytest.mark.xdist_group("study")


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting a worker takes seconds."""
    monkeypatch.setattr(run_module, "worker_pool", lambda workers: ThreadPoolExecutor(workers))


def stage_names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "stages").iterdir() if path.is_dir())


def count(names: list[str], kind: str) -> int:
    return sum(name.startswith(f"{kind}-") for name in names)


def test_runs_share_what_is_equal(finished: Path) -> None:
    names = stage_names(finished)
    record = json.loads((finished / "study.json").read_text())
    assert [(run["method"], run["seed"]) for run in record["runs"]] == [
        ("Instruct", None),
        *((method, seed) for method in ("GIFT", "Shadow-FT") for seed in (0, 1)),
    ]
    # Two methods: one rate of two is taken to the second seed, the other was tried with the first.
    assert count(names, "annotate") == 1
    assert count(names, "train") == count(names, "merge") == 2 * (2 + 1)
    assert count(names, "diff") == 2 and count(names, "calibrate") == 1
    assert count(names, "evaluate") == 2 * 2 + 2 * (1 + 2 * 2)
    for name in names:
        assert (finished / "stages" / f"{name}.log").stat().st_size > 0


def test_every_method_gets_the_best_rate_of_the_same_grid(finished: Path) -> None:
    record = json.loads((finished / "study.json").read_text())
    tried = [(one["method"], one["learning_rate"]) for one in record["tuning"]]
    assert tried == [(method, rate) for method in ("GIFT", "Shadow-FT") for rate in (1e-3, 1e-1)]
    for method in ("GIFT", "Shadow-FT"):
        best = max(
            (one for one in record["tuning"] if one["method"] == method),
            key=lambda one: one["accuracy"],
        )
        taken = {run["learning_rate"] for run in record["runs"] if run["method"] == method}
        assert taken == {best["learning_rate"]}


def test_figures_are_those_of_the_replies(finished: Path) -> None:
    read = read_study(finished)
    results = json.loads((finished / "results.json").read_text())
    for name in ("task", "other"):
        for method in ("Instruct", "GIFT", "Shadow-FT"):
            accuracies = [
                json.loads((read.stage(run["evaluations"][name]) / "metrics.json").read_text())
                for run in read.runs(method)
            ]
            mean = np.mean([one["accuracy"] for one in accuracies])
            assert results["accuracy"][name][method]["mean"] == pytest.approx(mean)
            assert 0 < mean < 1
    ours, theirs = (results["accuracy"]["task"][name] for name in ("GIFT", "Shadow-FT"))
    found = next(
        one
        for one in results["differences"]
        if (one["evaluation"], one["first"], one["second"]) == ("task", "GIFT", "Shadow-FT")
    )
    assert found["value"]["mean"] == pytest.approx(ours["mean"] - theirs["mean"])
    assert found["ahead"] == sum(a > b for a, b in zip(ours["runs"], theirs["runs"], strict=True))
    assert found["p"] >= found["value"]["p"]


def test_a_finished_study_does_nothing_again(
    folder: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a worker was started")

    monkeypatch.setattr(run_module, "_begin_worker", refuse)
    before = {path: path.stat().st_mtime_ns for path in (finished / "stages").iterdir()}
    study(studies.config(folder, finished))
    assert before == {path: path.stat().st_mtime_ns for path in (finished / "stages").iterdir()}


def test_another_merge_makes_only_what_it_changes_and_keeps_no_models(
    folder: Path, finished: Path, tmp_path: Path, in_this_process: None
) -> None:
    """The adapters of GIFT are there, those of the method that is gone are left alone."""
    output = tmp_path / "study"
    shutil.copytree(finished, output)
    before = stage_names(output)
    scaled = {"method": "task-arithmetic", "task_weight": 0.5}
    changes = {"methods": {"GIFT": None, "half": scaled}, "keep_models": False}
    rate = json.loads((output / "study.json").read_text())["runs"][1]["learning_rate"]
    settings = {"data": str(folder / "rows.jsonl"), "learning_rate": rate, **studies.SETTINGS}
    changes |= {"settings": settings}
    study(studies.config(folder, output, tuning=None, seeds=[0], workers=1, **changes))
    made = {*stage_names(output)} - {*before}
    record = json.loads((output / "study.json").read_text())
    runs = {run["method"]: run["stages"] for run in record["runs"]}
    assert runs["GIFT"]["train"] == runs["half"]["train"]
    assert runs["GIFT"]["merge"] != runs["half"]["merge"]
    assert not {runs["GIFT"]["merge"], runs["half"]["merge"]} & {*stage_names(output)}
    assert {name.split("-")[0] for name in made} == {"evaluate", "diff"}, "GIFT was trained again"
    assert runs["half"]["diff"] in made


def test_models_of_a_finished_study_can_be_removed(
    folder: Path, finished: Path, tmp_path: Path, in_this_process: None
) -> None:
    output = tmp_path / "study"
    shutil.copytree(finished, output)
    assert count(stage_names(output), "merge") == 6
    study(studies.config(folder, output, keep_models=False))
    assert count(stage_names(output), "merge") == 0


def test_a_resumed_stage_keeps_the_warnings_of_its_first_part(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prints(text: str) -> None:
        monkeypatch.setitem(run_module.FUNCTIONS, "evaluate", lambda config, key: print(text))

    config = studies.config(folder, tmp_path / "out", tuning=None)
    stage = next(iter(plan(config, {})[0].evaluations.values()))
    log = stage.folder.with_suffix(".log")
    for text in ("killed", "resumed"):
        prints(text)
        run_module._run_stage(stage, overwrite=False)
    assert log.read_text() == "killed\nresumed\n"
    stage.folder.mkdir()
    prints("anew")
    run_module._run_stage(stage, overwrite=True)
    assert log.read_text() == "anew\n"


def test_a_stage_that_fails_is_named_and_what_is_finished_is_kept(
    folder: Path, tmp_path: Path, in_this_process: None
) -> None:
    methods = {"GIFT": {"max_length": 8}}
    config = studies.config(folder, tmp_path / "out", methods=methods, tuning=None, workers=1)
    with pytest.raises(InputError, match=r"^annotate rows.jsonl by .*: --data: every row"):
        study(config)
    names = stage_names(tmp_path / "out")
    assert [name.split("-")[0] for name in names] == ["evaluate", "evaluate"]
    assert not (tmp_path / "out" / "study.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": {"Instruct": {}}}, "methods: Instruct is the name of the model as it is"),
        ({"methods": {"GIFT": {"seed": 1}}}, r"methods\.GIFT: has a seed"),
        ({"methods": {"GIFT": {"learning_rate": 1}}}, r"methods\.GIFT: has a learning_rate"),
        ({"reference": "ours"}, "reference: no method 'ours'; there are GIFT, Shadow-FT"),
        ({"seeds": [1, 1]}, "seeds: .* expected different numbers"),
        ({"methods": {"GIFT": {"weightng": "self"}}}, r"methods.GIFT.weightng"),
        ({"tuning": {"learning_rates": [1e-3, 0.0]}}, r"tuning.learning_rates.1\n.*greater than 0"),
        (
            {"evaluations": {"task": {"data": "{seed}.jsonl"}}},
            r"task: data: {seed}.jsonl has {seed}",
        ),
    ],
    ids=["Instruct", "seed", "rate", "reference", "seeds", "typo", "zero", "seed-in-data"],
)
def test_a_file_that_contradicts_itself_is_refused(
    folder: Path, tmp_path: Path, changes: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        studies.config(folder, tmp_path / "out", **changes)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"task_weight": 2}, r"methods\.GIFT: --task-weight: --method lora does not read it"),
        ({"data": "none-{seed}.jsonl"}, r"data: none-0\.jsonl: no such file"),
        ({"lora_targets": "nope"}, r"methods\.GIFT: --lora-targets: "),
    ],
    ids=["unread", "data", "targets"],
)
def test_options_that_do_not_fit_are_refused_before_any_stage(
    folder: Path, tmp_path: Path, method: dict, message: str
) -> None:
    config = studies.config(folder, tmp_path / "out", methods={"GIFT": method}, tuning=None)
    with pytest.raises(InputError, match=message):
        plan(config, {})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"correct_field": "rihgt"}, "--correct-field: no row of .*rows.jsonl has rihgt"),
        ({"evaluations": {"task": {"data": None}}}, r"evaluations\.task: --data: is required"),
        (
            {"evaluations": {"task": {"benchmark": "mmlu", "samples": 2}}},
            r"evaluations\.task: --samples",
        ),
    ],
    ids=["field", "no-data", "unread"],
)
def test_what_a_late_stage_would_refuse_is_refused_before_any(
    folder: Path, tmp_path: Path, changes: dict, message: str
) -> None:
    config = studies.config(folder, tmp_path / "out", tuning=None, **changes)
    with pytest.raises(InputError, match=message):
        plan(config, {})


def test_tuning_on_the_questions_of_an_evaluation_is_refused(folder: Path, tmp_path: Path) -> None:
    """Whatever is added to them."""
    tuning = {
        "data": str(folder / "task.jsonl"),
        "learning_rates": [1e-3],
        "prompt_suffix": "Think.",
    }
    config = studies.config(folder, tmp_path / "out", tuning=tuning)
    with pytest.raises(InputError, match=r"6 questions of .* are asked by the evaluation task too"):
        plan_tuning(config)


def test_names_and_seeds_stand_in_paths(folder: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        (tmp_path / f"tiny-{seed}.jsonl").write_text(
            (folder / "rows.jsonl").read_text() * (1 + seed)
        )
    method = {"data": str(tmp_path / "{pair}-{seed}.jsonl")}
    config = studies.config(folder, tmp_path / "out", methods={"GIFT": method}, tuning=None)
    runs = plan(config, {})[1:]
    assert [run.stages["train"].config.data.name for run in runs] == [
        "tiny-0.jsonl",
        "tiny-1.jsonl",
    ]
    assert runs[0].stages["annotate"].key != runs[1].stages["annotate"].key


def test_the_guide_may_be_the_base_model(folder: Path, tmp_path: Path) -> None:
    methods = {"GIFT": {}, "BaseT": {"guide": "base"}, "SFT": {"trained": "instruct"}}
    config: StudyConfig = studies.config(folder, tmp_path / "out", methods=methods, tuning=None)
    runs = {run.method: run.stages for run in plan(config, {}) if run.seed == 0}
    models = {name: (str(folder / name)) for name in ("base", "instruct")}
    assert runs["BaseT"]["annotate"].config.model == models["base"]
    assert runs["BaseT"]["annotate"].config.tokenizer == models["instruct"]
    assert runs["SFT"]["train"].config.model == models["instruct"]
    assert runs["SFT"]["annotate"].key == runs["GIFT"]["annotate"].key


def test_workers_share_gpus_in_turn_or_else_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.get_num_threads", lambda: 8)
    assert worker_places(3, ["2", "5"]) == [("2", 2), ("5", 2), ("2", 2)]
    assert worker_places(2, []) == [(None, 4), (None, 4)]
    assert worker_places(16, []) == [(None, 1)] * 16


def test_a_folder_that_is_no_study_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("keep")
    with pytest.raises(InputError, match="exists and is not a study"):
        study(studies.config(folder, tmp_path))


def test_merges_that_need_statistics_get_those_of_both_models(
    folder: Path, tmp_path: Path, in_this_process: None
) -> None:
    """The instruct model's are made once; the merge is that of the commands by hand."""
    methods = {"GIFT": None, "Fisher": {"method": "fisher"}, "RegMean": {"method": "regmean"}}
    changes = {"methods": methods, "tuning": None, "seeds": [0], "workers": 1}
    output = tmp_path / "out"
    study(studies.config(folder, output, **changes))
    names = stage_names(output)
    assert count(names, "train") == 1
    assert count(names, "statistics") == 2 * 2
    assert count(names, "merge") == 3 + 1, "two methods share the task model"
    read = read_study(output)
    stages = {name: read.stage(one) for name, one in read.runs("Fisher")[0]["stages"].items()}
    by_hand = {name: tmp_path / name for name in ("task", "of-instruct", "of-task", "fisher")}
    base, instruct = (str(folder / name) for name in ("base", "instruct"))
    adapter = [str(stages["train"])]
    merge(MergeConfig(model=base, adapter=adapter, output=by_hand["task"]))
    for model, name in ((instruct, "of-instruct"), (str(by_hand["task"]), "of-task")):
        options = {"tokenizer": instruct, "data": folder / "rows.jsonl", "device": "cpu"}
        merge_statistics(
            StatisticsConfig(model=model, kind="fisher", output=by_hand[name], **options)
        )
    merge(
        MergeConfig(
            model=instruct,
            adapter=adapter,
            method="fisher",
            base=base,
            statistics=[str(by_hand["of-instruct"]), str(by_hand["of-task"])],
            output=by_hand["fisher"],
        )
    )
    ours, expected = (
        load_file(path / "model.safetensors") for path in (stages["merge"], by_hand["fisher"])
    )
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(ours[name], tensor), name


def test_a_guide_can_be_another_model_for_every_pair(folder: Path, tmp_path: Path) -> None:
    pairs = {
        name: {"base": str(folder / "base"), "instruct": str(folder / "instruct")} for name in "ab"
    }
    for seed, name in enumerate(pairs):
        tiny.make_model(tmp_path / f"guide-{name}", "qwen2", seed=seed, num_hidden_layers=1)
    methods = {"GIFT": {"guide": str(tmp_path / "guide-{pair}")}}
    config = studies.config(folder, tmp_path / "out", pairs=pairs, methods=methods, tuning=None)
    guides = {
        run.pair: run.stages["annotate"].config.model for run in plan(config, {}) if run.stages
    }
    assert guides == {name: str(tmp_path / f"guide-{name}") for name in pairs}


def test_a_worker_is_one_process_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the study was started, two workers do not meet at one port."""
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    places = SimpleQueue[tuple[str | None, int]]()
    places.put((None, torch.get_num_threads()))
    with warnings.catch_warnings():
        run_module._begin_worker(places)
    with process_group() as group:
        assert group is ALONE
