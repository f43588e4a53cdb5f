"""One run at a time writes an output folder: a lock file next to it records the owner.

The lock is an `flock`, which the operating system releases however the process ends. So the lock of
a dead process on this host is free, even if its process id was reused. A lock recorded by another
host is never removed: file systems that do not share locks between hosts report it as free while
that run is alive.
"""

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from gift.errors import InputError


def lock_path(output: Path) -> Path:
    """The lock file of an output folder."""
    return output.with_name(f".{output.name}.lock")


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Owns `output` while the block runs.

    Parent folders are created, and removed again if they stay empty.

    InputError: another run owns it; or it, or a folder above it, is a file.
    """
    if output.name in ("", ".."):
        raise InputError(f"--output: {output} is no name for a new folder; add one")
    for place in (output, *output.parents):
        if place.is_file():
            raise InputError(f"--output: {place} is a file; choose the name of a folder")
    made = [folder for folder in output.parents if not folder.exists()]
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock = _acquire(output)
        try:
            yield
        finally:
            lock_path(output).unlink(missing_ok=True)
            os.close(lock)
    finally:
        with contextlib.suppress(OSError):
            for folder in made:
                folder.rmdir()


def _acquire(output: Path) -> int:
    """The locked file's descriptor, with this process's record written."""
    path = lock_path(output)
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        owner = _flock(lock)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock), path.stat()):
                break
        os.close(lock)  # its owner removed the file between our opening and locking it
    if owner is not None:
        os.close(lock)
        host, process, since = (owner.get(key, "unknown") for key in ("host", "process", "since"))
        raise InputError(
            f"--output: {output} is being written by process {process} on {host} since {since}; "
            f"wait for it or choose another folder (if that run is dead, remove {path})"
        )
    since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    record = {"host": socket.gethostname(), "process": os.getpid(), "since": since}
    os.ftruncate(lock, 0)
    os.pwrite(lock, json.dumps(record).encode(), 0)
    return lock


def _flock(lock: int) -> dict[str, str] | None:
    """Locks the file; returns the record of the owner where there is another one."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        free_on_this_host = True
    except OSError:  # held, or a file system without locks, where the record alone counts
        free_on_this_host = False
    try:
        owner = json.loads(os.pread(lock, 4096, 0))
    except ValueError:  # no record, or an incomplete one
        owner = {}
    if free_on_this_host and owner.get("host", socket.gethostname()) == socket.gethostname():
        return None
    return owner
