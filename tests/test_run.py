"""`gift run`: all stages, skipped when finished, continued when killed."""

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import tiny
import torch
from processes import fork_ranks
from safetensors.torch import load

import gift.annotation.batches
import gift.train as train_module
from gift.config import RunConfig
from gift.errors import InputError
from gift.run import run

pytestmark = pytest.mark.xdist_group("whole runs")

STAGES = {
    "confidence": "confidence.safetensors",
    "adapter": "adapter_model.safetensors",
    "merged": "model.safetensors",
    "evaluation": "samples.jsonl",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    tiny.make_model(folder / "instruct", "qwen2", seed=1)
    tiny.make_model(folder / "base", "qwen2", seed=2)
    tiny.write_rows(folder / "rows.jsonl", 12)
    questions = [{"question": f"What is {n} plus 2?", "answer": str(n + 2)} for n in range(3)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    return folder


def config(folder: Path, output: Path, **options) -> RunConfig:
    settings = {
        "base": str(folder / "base"),
        "instruct": str(folder / "instruct"),
        "data": folder / "rows.jsonl",
        "eval_data": folder / "questions.jsonl",
        "eval_check": "exact",
        "eval_samples": 2,
        "eval_max_new_tokens": 5,
        "batch_tokens": 60,
        "part_batches": 1,
        "global_batch_size": 4,
        "checkpoint_steps": 1,
        "epochs": 2,
        "lora_rank": 4,
        "lora_dropout": 0.0,  # its masks differ by rank
        **options,
    }
    return RunConfig(output=output, **settings)


@pytest.fixture(scope="module")
def finished(folder) -> Path:
    run(config(folder, folder / "finished"))
    return folder / "finished"


def contents(output: Path) -> dict[str, bytes]:
    return {name: (output / stage / name).read_bytes() for stage, name in STAGES.items()}


def test_every_stage_leaves_its_output(folder, finished):
    assert all(contents(finished).values())
    assert (
        contents(finished)["model.safetensors"]
        != (folder / "instruct" / "model.safetensors").read_bytes()
    )


def test_finished_stages_are_skipped(folder, finished, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    run(config(folder, finished))
    after = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    assert before == after
    assert capsys.readouterr().out.count("already there") == 4


def test_processes_share_every_stage(folder, finished, tmp_path):
    """And skip what is finished, also with options that only split the work otherwise."""
    output, expected = tmp_path / "out", contents(finished)

    def run_twice(rank: int) -> None:
        first = run(config(folder, output, shard=True))
        again = run(config(folder, output, micro_batch_tokens=60))
        (tmp_path / f"states-{rank}").write_text(f"{[*first.values(), *again.values()]}")

    ended = fork_ranks(2, run_twice, tmp_path / "rank")
    assert [status for status, _ in ended] == [0, 0], ended
    states = f"{['done'] * 4 + ['already there'] * 4}"
    assert [(tmp_path / f"states-{rank}").read_text() for rank in range(2)] == [states] * 2
    assert not (tmp_path / "rank-1.out").read_text()
    found = contents(output)
    assert found["confidence.safetensors"] == expected["confidence.safetensors"]
    for name in ("adapter_model.safetensors", "model.safetensors"):
        ours, alone = load(found[name]), load(expected[name])
        assert ours.keys() == alone.keys()
        for key in alone:
            torch.testing.assert_close(ours[key], alone[key], rtol=1e-4, atol=1e-5)
    assert len(found["samples.jsonl"].splitlines()) == 6


def test_processes_with_other_options_are_refused_before_any_stage(folder, tmp_path):
    ended = fork_ranks(
        2, lambda rank: run(config(folder, tmp_path / "out", seed=rank)), tmp_path / "rank"
    )
    for status, error in ended:
        assert status == 1 and "process 1 of 2 differs from process 0 in seed" in error
    assert not (tmp_path / "out").exists()


def test_changed_settings_are_refused_then_redo_only_what_they_touch(folder, tmp_path):
    output = tmp_path / "out"
    run(config(folder, output))
    before = contents(output)
    with pytest.raises(InputError, match=r"adapter was made with other settings .* --overwrite"):
        run(config(folder, output, seed=7))
    assert contents(output) == before
    stamp = (output / "confidence" / "confidence.safetensors").stat().st_mtime_ns
    run(config(folder, output, seed=7, overwrite=True))
    after = contents(output)
    assert (output / "confidence" / "confidence.safetensors").stat().st_mtime_ns == stamp
    assert all(after[name] != before[name] for name in ("adapter_model.safetensors",))
    assert after["model.safetensors"] != before["model.safetensors"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eval_check": "choice", "eval_samples": 2}, "--eval-samples: the answer of a multiple"),
        ({"eval_answer_pattern": "(("}, "--eval-answer-pattern: '[(][(]' is not a regular"),
        (
            {"eval_check": "choice", "eval_samples": 4, "eval_max_new_tokens": 2048},
            "questions.jsonl, line 1: `choices` must be a list",
        ),
    ],
)
def test_an_evaluation_that_cannot_be_is_refused_before_the_first_stage(
    folder, tmp_path, options, message
):
    with pytest.raises(InputError, match=message):
        run(config(folder, tmp_path / "out", **options))
    assert not list(tmp_path.iterdir())


def test_changed_input_content_is_noticed(folder, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text((folder / "rows.jsonl").read_text())
    run(config(folder, tmp_path / "out", data=data, eval_data=None))
    lines = data.read_text().splitlines()
    data.write_text("\n".join([*lines[1:], lines[0]]) + "\n")
    with pytest.raises(InputError, match="confidence was made with other settings or inputs"):
        run(config(folder, tmp_path / "out", data=data, eval_data=None))


def _run_slowly(settings: RunConfig) -> None:
    torch.set_num_threads(1)
    for module, name in (
        (gift.annotation.batches, "annotate_batch"),
        (train_module, "accumulate_gradients"),
    ):
        _slow_down(module, name)
    run(settings)


def _slow_down(module, name: str) -> None:
    real = getattr(module, name)

    def slow(*args, **kwargs):
        time.sleep(0.1)
        return real(*args, **kwargs)

    setattr(module, name, slow)


def _kill_when(settings: RunConfig, pattern: str) -> None:
    """Starts the run in a process of its own and kills it as soon as a path matches `pattern`."""
    child = multiprocessing.get_context("fork").Process(target=_run_slowly, args=(settings,))
    child.start()
    assert child.pid is not None
    deadline = time.monotonic() + 60
    while not list(settings.output.glob(pattern)):
        assert time.monotonic() < deadline and child.is_alive(), f"{pattern} never appeared"
        time.sleep(0.001)
    os.kill(child.pid, signal.SIGKILL)
    child.join()


def test_killed_at_every_stage_and_run_again_gives_the_same_bytes(folder, finished, tmp_path):
    torch.set_num_threads(1)
    settings = config(folder, tmp_path / "out")
    for place in (
        "confidence.partial/work/part-*-000002.*",
        "confidence",
        "adapter.partial/work/checkpoint-*",
        "adapter",
        "merged.partial",
        "merged",
        "evaluation.partial",
    ):
        _kill_when(settings, place)
        stage = settings.output / place.split("/")[0].removesuffix(".partial")
        assert place == stage.name or not stage.exists(), "an unfinished stage looks finished"
    run(settings)
    assert contents(settings.output) == contents(finished)


def test_a_folder_that_is_no_run_is_refused(folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    with pytest.raises(InputError, match="exists and is not a run"):
        run(config(folder, tmp_path / "out"))


@pytest.mark.parametrize(
    ("architecture", "options", "name"),
    [
        ("llama", {}, "model.layers.0.self_attn.k_proj.bias"),
        ("qwen2", {"hidden_size": 64}, "model.layers.0.input_layernorm.weight"),
    ],
)
def test_a_base_of_another_shape_is_refused_first(folder, tmp_path, architecture, options, name):
    other = tiny.make_model(tmp_path / "other", architecture, **options)
    with pytest.raises(InputError, match=f"--base: .* is not the model that .*{name}"):
        run(config(folder, tmp_path / "out", base=str(other)))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trim_keep": 50}, "--trim-keep: --method lora does not read it"),
        ({"control": "random", "weighting": "self"}, "--control: --weighting self"),
        ({"shard": True}, "--shard: divides the model among processes"),
    ],
)
def test_settings_that_another_choice_reads_are_refused_first(folder, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        run(config(folder, tmp_path / "out", **options))
    assert not (tmp_path / "out").exists()


def test_uniform_weighting_needs_no_annotation(folder, tmp_path):
    run(config(folder, tmp_path / "out", weighting="uniform", eval_data=None))
    assert not (tmp_path / "out" / "confidence").exists()
    assert (tmp_path / "out" / "merged" / "model.safetensors").exists()
