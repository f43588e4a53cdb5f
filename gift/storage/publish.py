"""Output folders appear complete or not at all, even if a run is killed; only this file commits.

A run owns its output folder from the first byte to the last (`gift.storage.lock`). Next to an
output OUT:

    OUT            the published folder; its `gift_files.json` lists every file's size and sha256
    OUT.partial    what is being prepared
        work/      results that a resumed run reuses (parts, checkpoints); never published
    OUT.replaced   what will be removed: the finished work and the previous folder OUT
    .OUT.lock      who owns OUT

A single file is written to a temporary name, synced and renamed (`files.replacing`). Results in
`work` are sealed: each has its sha256 in its name, and a damaged one is ignored
(`files.sealed_files`). `work/made_from.json` records the inputs and settings of these results; if a
new run has others, the record is removed first, then the results, and the run starts over.

A folder is committed in these steps:

    1. its files are synced, then `gift_files.json` is written
    2. mkdir OUT.replaced                            the commit: from here on the new folder counts
    3. OUT.partial/work  ->  OUT.replaced/work       by rename, as the next two
    4. OUT               ->  OUT.replaced/output
    5. OUT.partial       ->  OUT
    6. OUT.replaced is removed

A run killed before 2 leaves OUT as it was, and its work for the next run. After 2 the next run that
owns OUT first completes the remaining steps. Nothing is ever removed under the name OUT: a folder
there is complete.

A later stage compares a folder that it reads with its `gift_files.json` (`check_published`).
"""

import errno
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gift.console import error_console
from gift.errors import InputError
from gift.storage.files import (
    hash_file,
    read_json,
    read_record,
    sync,
    system_failure,
    temporary_path,
    write_json,
)
from gift.storage.lock import locked

LIST_FILE = "gift_files.json"
WORK_FOLDER = "work"
MADE_FROM_FILE = "made_from.json"
_NO_SPACE = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the limit on a file's size is reached",
}


def partial_path(output: Path) -> Path:
    """The folder in which `output` is prepared."""
    return output.with_name(f"{output.name}.partial")


def replaced_path(output: Path) -> Path:
    """The folder for what will be removed."""
    return output.with_name(f"{output.name}.replaced")


class Output:
    """An output folder that this process owns."""

    def __init__(self, path: Path, key: str) -> None:
        self.path = path
        self.partial = partial_path(path)
        self.work = self.partial / WORK_FOLDER
        self._key = key
        self._keep: set[str] = set()

    def begin(self, made_from: Mapping[str, Any] | None = None, keep: Collection[str] = ()) -> Path:
        """Makes the partial folder; keeps results of an interrupted run with equal `made_from`.

        Args:
            made_from: everything that determines the results in `work`, as JSON; without it none
                are kept.
            keep: further names in the folder to keep; the caller checks their content.
        """
        record = self.work / MADE_FROM_FILE
        made_from = json.loads(json.dumps(made_from))
        self._keep = {*keep, WORK_FOLDER}
        if made_from is None or not self._continues(made_from):
            record.unlink(missing_ok=True)
            if self.partial.exists():
                shutil.rmtree(self.partial)
            self.work.mkdir(parents=True)
            if made_from is not None:
                write_json(record, made_from)
        for path in list(self.partial.iterdir()):
            if path.name not in self._keep:
                _remove(path)
        for path in list(self.partial.rglob(temporary_path(Path("*")).name)):
            path.unlink()
        return self.partial

    def _continues(self, made_from: Mapping[str, Any]) -> bool:
        try:
            before = read_json(self.work / MADE_FROM_FILE)
        except InputError:  # not there, or damaged
            return False
        differing = [name for name in made_from if before.get(name) != made_from[name]]
        if differing and self._has_results():
            warn(
                f"starting over: the unfinished work in {self.partial} differs in "
                f"{', '.join(differing)}"
            )
        return not differing

    def _has_results(self) -> bool:
        beside = any((self.partial / name).exists() for name in self._keep - {WORK_FOLDER})
        return beside or any(path.name != MADE_FROM_FILE for path in self.work.glob("*"))

    def publish(self) -> None:
        """Commits the partial folder under the output's name."""
        files = {}
        for path in sorted(self.partial.rglob("*")):
            if self.work not in (path, *path.parents):
                sync(path)
                if path.is_file():
                    name = path.relative_to(self.partial).as_posix()
                    files[name] = {"bytes": path.stat().st_size, "sha256": hash_file(path)}
        write_json(self.partial / LIST_FILE, {"key": self._key, "files": files})
        replaced_path(self.path).mkdir()
        complete(self.path)

    def abandon(self) -> None:
        """Keeps the partial folder for the next run if it holds results, else removes it."""
        if self.partial.exists() and not self._has_results():
            shutil.rmtree(self.partial, ignore_errors=True)


@contextmanager
def output_folder(path: Path, *, overwrite: bool = False, key: str = "") -> Iterator[Output]:
    """Owns `path` while the block runs, and publishes its folder when the block ends.

    The block calls `begin` once and fills the folder that it returns.

    Args:
        key: stored in `gift_files.json`; `gift run` recognises a folder's inputs by it.

    Raises:
        InputError: see `lock.locked`; or `path` exists and `overwrite` is not given.
        OSError: the disk is full; names the file, the space and how to resume.
    """
    with locked(path):
        complete(path)
        if not overwrite and path.exists() and any(path.iterdir()):
            raise InputError(
                f"--output: {path} already exists; choose another folder or pass --overwrite"
            )
        output = Output(path, key)
        try:
            yield output
            output.publish()
        except BaseException as error:
            output.abandon()
            failure = system_failure(error, output.partial)
            if failure is None or failure.errno not in _NO_SPACE:
                raise
            free = shutil.disk_usage(path.parent).free / 1e9
            message = (
                f"{_NO_SPACE[failure.errno]} ({free:.3f} GB are free); what is finished stays in "
                f"{output.partial}, and the same command resumes there"
            )
            raise OSError(failure.errno, message, failure.filename) from error


def complete(path: Path) -> None:
    """Does steps 3 to 6 if a killed run had passed step 2; the caller owns `path`."""
    partial, replaced = partial_path(path), replaced_path(path)
    if not replaced.exists():
        return
    if any(entry.name not in (WORK_FOLDER, "output") for entry in replaced.iterdir()):
        raise InputError(f"{replaced}: is not from a run and blocks the output; move it elsewhere")
    if partial.exists():
        if (partial / WORK_FOLDER).exists():
            os.rename(partial / WORK_FOLDER, replaced / WORK_FOLDER)
        if path.exists():
            os.rename(path, replaced / "output")
        os.rename(partial, path)
        sync(path.parent)
    shutil.rmtree(replaced)


def remove_published(path: Path) -> None:
    """Removes a published folder; if killed, it leaves the folder complete or absent."""
    with locked(path):
        complete(path)
        if path.exists():
            replaced_path(path).mkdir()
            os.rename(path, replaced_path(path) / "output")
            complete(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def published_key(folder: Path) -> str | None:
    """The key that a folder was published with; None if no run published it."""
    path = folder / LIST_FILE
    return read_record(path, ("key",))["key"] if path.exists() else None


def check_published(folder: Path, *, nested: bool = True, sizes_only: bool = False) -> None:
    """InputError if files of a published folder have changed; folders without a list pass.

    Args:
        nested: whether files in subfolders count too.
        sizes_only: leave out the sha256; no file is read.
    """
    if not (folder / LIST_FILE).exists():
        return
    for name, written in read_record(folder / LIST_FILE, ("files",))["files"].items():
        path = folder / name
        if "/" in name and not nested:
            continue
        if not path.is_file():
            problem = "is missing"
        elif path.stat().st_size != written["bytes"]:
            problem = f"has {path.stat().st_size} bytes, {written['bytes']} were written"
        elif not sizes_only and hash_file(path) != written["sha256"]:
            problem = "is not what was written"
        else:
            continue
        raise InputError(
            f"{path}: {problem}; make {folder} again, or remove {folder / LIST_FILE} if the change "
            "was meant"
        )


def warn(message: str) -> None:
    """Prints a warning."""
    error_console.print(f"warning: {message}", markup=False, highlight=False, soft_wrap=True)
