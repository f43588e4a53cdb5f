"""Stages in several processes: the same files as one process, errors on all, resuming.

Ranks are forked, and exchange over gloo as those that torchrun starts.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import stages
import torch
from processes import fork_ranks
from transformers import AutoModelForCausalLM

from gift import cli
from gift.annotation import batches as annotation_batches
from gift.config import EvaluateConfig
from gift.distributed import ranks
from gift.distributed.ranks import LostProcess
from gift.errors import InputError
from gift.speed import SPEED_FILE
from gift.storage.publish import LIST_FILE, partial_path

NO_REPLY = {
    name: EvaluateConfig.model_fields[name].default for name in ("samples", "max_new_tokens")
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = stages.make_inputs(tmp_path_factory.mktemp("ranks"))
    model = AutoModelForCausalLM.from_pretrained(folder / "instruct")
    model.save_pretrained(folder / "sharded", max_shard_size="30KB")
    assert len(list((folder / "sharded").glob("*.safetensors"))) > 2
    choices = [{"question": f"Which is {n}?", "choices": ["one", "2"], "answer": 0} for n in "123"]
    (folder / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in choices))
    return folder


@pytest.fixture(autouse=True)
def in_inputs(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(inputs)
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture(autouse=True)
def same_signals() -> Iterator[None]:
    """The command installs a handler for torchrun's signal."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def content(folder: Path) -> dict[str, bytes]:
    """A published folder's files, without the stage's times and the list of hashes."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in (SPEED_FILE, LIST_FILE)
    }


@pytest.mark.parametrize(
    ("stage", "options"),
    [
        ("annotate", {}),
        ("merge", {"model": "sharded"}),
        ("evaluate", {"samples": 3, "max_new_tokens": 12}),
        ("evaluate", {"temperature": 0.0, "max_new_tokens": 12}),
        ("evaluate", {"data": "choices.jsonl", "check": "choice", **NO_REPLY}),
    ],
    ids=["annotate", "merge", "sampled", "greedy", "choice"],
)
@pytest.mark.parametrize("size", [2, 5], ids=["two", "more-ranks-than-work"])
def test_ranks_give_the_files_of_one_process(
    inputs: Path, tmp_path: Path, stage: str, options: dict[str, Any], size: int
) -> None:
    stages.call(stage, tmp_path / "out", **options)
    alone = content(tmp_path / "out")
    ended = fork_ranks(
        size,
        lambda _: stages.call(stage, tmp_path / "out", overwrite=True, **options),
        tmp_path / "rank",
    )
    assert [status for status, _ in ended] == [0] * size, ended
    assert "value" in (tmp_path / "rank-0.out").read_text()
    printed = [(tmp_path / f"rank-{rank}.out").read_text() for rank in range(1, size)]
    assert not any(printed) and not any(errors for _, errors in ended[1:])
    shared = content(tmp_path / "out")
    assert shared.keys() == alone.keys()
    for name, expected in alone.items():
        found = shared[name]
        if name == "metrics.json":
            found, expected = (json.loads(text) for text in (found, expected))
            del found["settings"]["overwrite"], expected["settings"]["overwrite"]
        assert found == expected, name
    assert not partial_path(tmp_path / "out").exists()


def test_a_killed_rank_ends_the_others_and_any_number_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 is killed before its third batch; three ranks then compute what is left."""
    annotate_batch, batches = annotation_batches.annotate_batch, tmp_path / "batches"
    options = {"batch_tokens": 60, "part_batches": 1}
    dies = True

    def counted(*arguments: Any) -> Any:
        rank = os.environ.get("RANK", "alone")
        with batches.open("a") as file:
            file.write(f"{rank}\n")
        if dies and rank == "1" and batches.read_text().split().count("1") == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return annotate_batch(*arguments)

    monkeypatch.setattr(annotation_batches, "annotate_batch", counted)
    started = time.monotonic()
    (status, error), (killed, _) = annotate_by(2, tmp_path, **options)
    assert time.monotonic() - started < 60
    assert killed == -signal.SIGKILL and status == 1
    assert "LostProcess: another process of this run ended without a message, killed" in error
    assert not (tmp_path / "out").exists()
    kept = len(list((partial_path(tmp_path / "out") / "work").glob("part-*")))
    batches.write_text("")
    dies = False
    assert [status for status, _ in annotate_by(3, tmp_path, **options)] == [0] * 3
    resumed = batches.read_text().split()
    stages.call("annotate", tmp_path / "alone", **options)
    total = len(batches.read_text().split()) - len(resumed)
    assert kept > 2 and len(resumed) == total - kept and set(resumed) == {"0", "1", "2"}
    assert content(tmp_path / "out") == content(tmp_path / "alone")


def annotate_by(size: int, folder: Path, **options: Any) -> list[tuple[int, str]]:
    return fork_ranks(
        size, lambda _: stages.call("annotate", folder / "out", **options), folder / "rank"
    )


def test_the_error_of_one_rank_is_told_by_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(model: Any, batch: Any, temperature: float) -> Any:
        if os.environ["RANK"] == "1":
            raise RuntimeError("CUDA error: unspecified launch failure")
        return annotate_batch(model, batch, temperature)

    annotate_batch = annotation_batches.annotate_batch
    monkeypatch.setattr(annotation_batches, "annotate_batch", full)
    (_, told), (_, own) = annotate_by(2, tmp_path)
    assert told.strip() == (
        "LostProcess: process 1 of 2: RuntimeError: CUDA error: unspecified launch failure"
    )
    assert own.strip() == "RuntimeError: CUDA error: unspecified launch failure"


def test_a_restarted_attempt_reads_nothing_of_the_failed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun --max-restarts starts all ranks again, and keeps the store."""
    annotate_batch = annotation_batches.annotate_batch

    def full(*_: Any) -> Any:
        if os.environ["RANK"] == "1":
            raise RuntimeError("CUDA error: unspecified launch failure")
        return annotate_batch(*_)

    def restarted(_: int) -> None:
        monkeypatch.setattr(annotation_batches, "annotate_batch", full)
        with pytest.raises((LostProcess, RuntimeError)):
            stages.call("annotate", tmp_path / "out")
        monkeypatch.setattr(annotation_batches, "annotate_batch", annotate_batch)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        monkeypatch.setattr(ranks, "GROUP_NUMBERS", count())  # in new processes
        stages.call("annotate", tmp_path / "out")

    ended = fork_ranks(2, restarted, tmp_path / "rank")
    assert [status for status, _ in ended] == [0, 0], ended
    assert (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("stage", "first", "second", "message"),
    [
        ("annotate", {}, {"batch_tokens": 60}, "differs from process 0 in batch_tokens"),
        ("evaluate", {}, {"seed": 5}, "differs from process 0 in seed"),
        ("merge", {}, {"scale": [0.5]}, "differs from process 0 in scale"),
        ("train", {}, {"micro_batch_tokens": 60}, "differs from process 0 in micro_batch_tokens"),
        ("annotate", {"model": "none"}, {}, "none: no such folder"),
    ],
)
def test_ranks_with_other_options_are_refused_by_all(
    tmp_path: Path,
    stage: str,
    first: dict[str, Any],
    second: dict[str, Any],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    ended = fork_ranks(
        2,
        lambda rank: stages.call(stage, tmp_path / "out", **(second if rank else first)),
        tmp_path / "rank",
    )
    assert all(status == 1 and message in error for status, error in ended), ended
    assert not (tmp_path / "out").exists() and not partial_path(tmp_path / "out").exists()


def test_torchrun_ends_the_others_where_one_is_killed(tmp_path: Path) -> None:
    """While rank 0 computes and exchanges nothing."""
    (tmp_path / "stage.py").write_text(
        "import os, signal, time\n"
        "from gift import cli\n"
        "from gift.annotation import batches\n"
        "def stage(*_):\n"
        "    if os.environ['RANK'] == '1':\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    time.sleep(90)\n"
        "batches.annotate_batch = stage\n"
        "cli.main()\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    options = "annotate --model instruct --data rows.jsonl --batch-tokens 60 --device cpu"
    command = [*torchrun, tmp_path / "stage.py", *options.split(), "--output", tmp_path / "out"]
    ended = subprocess.run(command, timeout=80, capture_output=True, text=True)
    assert ended.returncode == 1
    assert "gift: ended by a signal, as torchrun does where another process" in ended.stderr
    assert "Signal 9 (SIGKILL)" in ended.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": ""}, "WORLD_SIZE: is '' in the environment, not a whole number from 1"),
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE: is 'abc'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE: is '0'"),
        ({"RANK": "x"}, "RANK: is 'x'"),
        ({"RANK": "2"}, "RANK: is 2, and WORLD_SIZE is 2"),
        ({"MASTER_PORT": "any"}, "MASTER_PORT: is 'any'"),
        ({}, "MASTER_PORT: the processes cannot meet at port"),
    ],
)
def test_an_environment_that_cannot_be_is_one_clear_error(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    variables: dict[str, str],
    message: str,
) -> None:
    with socket.create_server(("", 0)) as taken:
        described = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        described["MASTER_PORT"] = str(taken.getsockname()[1])
        for name, value in {**described, **variables}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(cli, "app", lambda: stages.call("annotate", Path("out")))
        with pytest.raises(SystemExit, match="2"):
            cli.main()
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and not Path("out").exists()


@pytest.mark.parametrize("missing", ["RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_a_missing_variable_is_named(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1") if name != missing else monkeypatch.delenv(name, False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=f"{missing}.* not set; start several processes with"):
        stages.call("annotate", Path("out"))


def test_a_stage_of_one_process_refuses_several(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "argv", ["gift", "diff", "instruct", "merged"])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    assert "gift diff: runs in one process, 2 were started" in capsys.readouterr().err
