"""Every stage, killed before each of its file operations and run again, ends as if never killed.

A forked child runs the stage and ends itself before its n-th change of a file (opening for writing,
rename, mkdir, removal, link). Then the stage runs again, and every byte is compared with an
unbroken run's, times and memory apart. The suite takes the first and the last operation of each
kind and place; GIFT_ALL_KILLS=1 takes all operations.

A killed process loses nothing that the kernel has taken, so these tests go without fsync, which is
most of their time; `test_publish.py` sees to it that files are synced before they count.
"""

import gc
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from stages import STAGES, call, make_inputs

from gift import figures
from gift.errors import InputError

CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "shutil.copyfile"}
MEASURED = {"tokens_per_second", "useful_tflops", "seconds", "peak_memory_gb"}
KILLED = 77


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("kills"))


@pytest.fixture(autouse=True)
def cheap(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without what costs time and is not tested here: fsync, and figures as without matplotlib."""
    torch.set_num_threads(1)
    gc.freeze()  # or each child copies the pages of all objects
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(figures, "can_draw", lambda: False)
    yield
    gc.unfreeze()


def in_child(
    folder: Path, action: Callable[[], Any], kill_before: int = 0
) -> tuple[int, list[str]]:
    """Runs `action` in a forked child in `folder`; its exit status and its changes of files."""
    events = folder.with_name(f"{folder.name}.events")
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.chdir(folder)
            record = os.open(events, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            silent = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silent, 1)
            count = 0

            def before(event: str, arguments: tuple[Any, ...]) -> None:
                nonlocal count
                writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
                if not writes and event not in CHANGES:
                    return
                path = Path(arguments[0]) if isinstance(arguments[0], str | Path) else Path("..")
                if event in ("os.remove", "os.rmdir") and arguments[1] >= 0:
                    path = Path(os.readlink(f"/proc/self/fd/{arguments[1]}")) / path
                place = os.path.relpath(path, folder)
                if place.startswith(".."):
                    return
                count += 1
                os.write(record, f"{event} {place}\n".encode())
                if count == kill_before:
                    os._exit(KILLED)

            sys.addaudithook(before)
            action()
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), events.read_text().splitlines()


def published(output: Path, stage: str) -> dict[str, dict[str, Any]]:
    """The finished folders: the output, or those of a run's stages."""
    names = ("confidence", "adapter", "merged", "evaluation") if stage == "run" else (".",)
    return {name: content(output / name) for name in names if (output / name).exists()}


def beside(folder: Path) -> set[str]:
    """Names in the folder and in its output, where nothing but what was published may be left."""
    return {
        path.relative_to(folder).as_posix() for path in (*folder.glob("*"), *folder.glob("out/*"))
    }


def content(folder: Path) -> dict[str, Any]:
    """All files by path, without what is measured and the hashes of files that hold it."""
    files = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir():
            continue
        text = path.read_bytes()
        if path.suffix == ".jsonl":
            files[name] = [unmeasured(json.loads(line)) for line in text.splitlines()]
        else:
            files[name] = unmeasured(json.loads(text)) if path.suffix == ".json" else text
    return files


def unmeasured(value: Any) -> Any:
    if isinstance(value, list):
        return [unmeasured(item) for item in value]
    if not isinstance(value, dict):
        return value
    files = {"metrics.jsonl", "gift_train.json", "speed.json"}
    hashed = files if "speed.json" in value else set()
    return {name: unmeasured(x) for name, x in value.items() if name not in MEASURED | hashed}


def chosen(operations: list[str]) -> list[int]:
    """Numbers of the operations to be killed before: the first and last of each kind and place."""
    if os.environ.get("GIFT_ALL_KILLS") == "1":
        return list(range(1, len(operations) + 1))
    kinds: dict[str, list[int]] = {}
    for number, operation in enumerate(operations, 1):
        event, place = operation.split(" ", 1)
        if re.match(r"out/\w+\.partial/", place):
            continue  # in a run; the stages' own tests kill here
        where = re.sub(r"[0-9a-f]{64}|\d+", "N", str(Path(place).parent))
        kinds.setdefault(f"{event} {where}", []).append(number)
    return sorted({number for numbers in kinds.values() for number in (numbers[0], numbers[-1])})


@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_killed_before_any_file_operation_ends_the_same(
    inputs: Path, tmp_path: Path, stage: str, overwrite: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = STAGES[stage][-1]
    before = tmp_path / "before"
    shutil.copytree(inputs, before, copy_function=os.link)

    def work(**changed: Any) -> None:
        call(stage, Path("out"), overwrite=overwrite, **changed)

    if overwrite:
        status, _ = in_child(before, lambda: work(**others))
        assert status == 0
    whole = tmp_path / "whole"
    shutil.copytree(before, whole, copy_function=os.link)
    status, operations = in_child(whole, work)
    assert status == 0
    expected = published(whole / "out", stage)
    replaced = published(before / "out", stage)
    names = beside(whole)
    assert not others or replaced != expected
    for number in chosen(operations):
        place = tmp_path / f"killed-{number}"
        shutil.copytree(before, place, copy_function=os.link)
        label = f"{stage}, killed before operation {number}: {operations[number - 1]}"
        status, _ = in_child(place, work, kill_before=number)
        assert status == KILLED, label
        for name, files in published(place / "out", stage).items():
            assert files in (expected[name], replaced.get(name)), f"{label}: {name}"
        monkeypatch.chdir(place)
        try:
            work()
        except InputError as error:  # killed when all but the cleaning up was done
            assert "already exists" in str(error) and not overwrite, label
        assert published(place / "out", stage) == expected, label
        assert beside(place) == names, label
        shutil.rmtree(place)
