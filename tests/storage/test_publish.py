"""Locks of output folders, what counts as finished, and detected damage."""

import errno
import json
import os
import resource
import socket
from pathlib import Path
from typing import Any

import pytest
from stages import an_owner

from gift.errors import InputError
from gift.storage.files import hash_file, replacing, sealed_files
from gift.storage.lock import lock_path
from gift.storage.publish import LIST_FILE, check_published, output_folder, replaced_path


def publish(output: Path, text: str = "text", **options: Any) -> None:
    with output_folder(output, **options) as made:
        (made.begin() / "file").write_text(text)


def test_a_second_run_is_told_who_owns_the_folder_and_takes_over_when_that_one_is_dead(tmp_path):
    output = tmp_path / "out"
    with an_owner(output) as process:
        told = rf"out is being written by process {process} on {socket.gethostname()} since \d{{4}}"
        with pytest.raises(InputError, match=told):
            publish(output)
    assert lock_path(output).exists()
    publish(output)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("record", ["", "{", "{}"], ids=["empty", "cut", "no-host"])
def test_a_lock_that_was_never_written_to_its_end_is_taken_over(tmp_path, record):
    lock_path(tmp_path / "out").write_text(record)
    publish(tmp_path / "out")
    assert not lock_path(tmp_path / "out").exists()


def test_another_hosts_lock_is_refused_with_the_way_to_remove_it(tmp_path):
    lock = lock_path(tmp_path / "out")
    lock.write_text(json.dumps({"host": "elsewhere", "process": os.getpid(), "since": "noon"}))
    with pytest.raises(InputError, match=rf"on elsewhere since noon.* remove {lock}"):
        publish(tmp_path / "out")
    lock.unlink()
    publish(tmp_path / "out")


def test_a_first_failure_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), output_folder(tmp_path / "a" / "b" / "out") as made:
        made.begin({"model": "x"})
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_an_empty_folder_is_taken_over_and_a_full_one_refused(tmp_path):
    (tmp_path / "out").mkdir()
    publish(tmp_path / "out")
    with pytest.raises(InputError, match="already exists"):
        publish(tmp_path / "out", "other")
    assert (tmp_path / "out" / "file").read_text() == "text"


def test_work_is_kept_for_an_equal_run_only(tmp_path, capfd):
    output = tmp_path / "out"
    for seed, kept in ((1, set()), (1, {"part.txt"}), (2, set())):
        with pytest.raises(KeyboardInterrupt), output_folder(output) as made:
            made.begin({"seed": seed})
            assert set(sealed_files(made.work)) == kept
            with replacing(made.work / "part.txt", sealed=True) as path:
                path.write_text("content")
            raise KeyboardInterrupt
    assert "differs in seed" in capfd.readouterr().err


def test_a_damaged_result_does_not_count(tmp_path):
    for name in ("one.txt", "two.txt"):
        with replacing(tmp_path / name, sealed=True) as path:
            path.write_text(name)
    next(tmp_path.glob("one*")).write_text("tampered")
    assert {name: path.read_text() for name, path in sealed_files(tmp_path).items()} == {
        "two.txt": "two.txt"
    }


@pytest.mark.parametrize("size", [4, 1 << 21], ids=["small", "remembered"])
def test_a_published_file_that_changed_is_named(tmp_path, size):
    publish(tmp_path / "out", "x" * size)
    check_published(tmp_path / "out")
    file = tmp_path / "out" / "file"
    file.write_text("y" + "x" * (size - 1))
    check_published(tmp_path / "out", sizes_only=True)
    with pytest.raises(InputError, match="file: is not what was written"):
        check_published(tmp_path / "out")
    file.write_text("x")
    with pytest.raises(InputError, match=f"file: has 1 bytes, {size} were written"):
        check_published(tmp_path / "out", sizes_only=True)
    file.unlink()
    with pytest.raises(InputError, match="file: is missing"):
        check_published(tmp_path / "out", sizes_only=True)
    (tmp_path / "out" / LIST_FILE).unlink()
    check_published(tmp_path / "out")


def test_a_big_file_is_hashed_once_and_a_renamed_one_not_again(tmp_path, monkeypatch):
    path = tmp_path / "big"
    path.write_bytes(bytes(1 << 21))
    first = hash_file(path)
    renamed = path.rename(tmp_path / "renamed")
    monkeypatch.setattr(Path, "open", lambda *_: pytest.fail("read again"))
    assert hash_file(renamed) == first


def test_a_limit_on_file_sizes_names_file_and_space_and_keeps_results(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    told = r"limit on a file's size .* GB are free.* resumes"
    with pytest.raises(OSError, match=told) as caught, output_folder(tmp_path / "out") as made:
        made.begin({"seed": 1})
        with replacing(made.work / "small.txt", sealed=True) as path:
            path.write_text("small")
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
        try:
            with replacing(made.work / "large.txt", sealed=True) as path:
                path.write_bytes(bytes(10_000))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG
    assert str(caught.value.filename).endswith("out.partial/work/large.txt")
    assert set(sealed_files(tmp_path / "out.partial" / "work")) == {"small.txt"}


def test_a_folder_of_another_under_a_name_of_ours_is_left_alone(tmp_path):
    mine = tmp_path / "out.replaced" / "mine"
    mine.parent.mkdir()
    mine.write_text("keep")
    with pytest.raises(InputError, match="out.replaced: is not from a run"):
        publish(tmp_path / "out")
    assert mine.read_text() == "keep"


def test_all_that_is_published_is_synced_before_it_counts(tmp_path, monkeypatch):
    synced = set()
    fsync = os.fsync

    def note(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    mkdir = Path.mkdir

    def commit(path: Path, *values: Any, **options: Any) -> None:
        if path == replaced_path(tmp_path / "out"):
            made = tmp_path / "out.partial"
            published = [
                path for path in made.rglob("*") if made / "work" not in (path, *path.parents)
            ]
            assert {path.name for path in published} == {"file", "folder", "inner", LIST_FILE}
            assert {path.stat().st_ino for path in (made, *published)} <= synced
            synced.clear()
        mkdir(path, *values, **options)

    monkeypatch.setattr(Path, "mkdir", commit)
    with output_folder(tmp_path / "out") as output:
        folder = output.begin()
        (folder / "file").write_text("x")
        (folder / "folder").mkdir()
        (folder / "folder" / "inner").write_text("y")
    assert (tmp_path).stat().st_ino in synced
