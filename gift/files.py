"""Files that are either whole or absent: write aside, then rename; and the hashes of inputs."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gift.errors import InputError

PARTIAL_SUFFIX = ".partial"


def partial_path(output: Path) -> Path:
    """The folder or file in which `output` is prepared; it survives a kill so work can go on."""
    return output.with_name(output.name + PARTIAL_SUFFIX)


def refuse_existing(output: Path, overwrite: bool) -> None:
    """Raises InputError where `output` is a file, or exists and `overwrite` is not given."""
    if output.is_file():
        raise InputError(f"--output: {output} is a file; choose the name of a folder")
    if output.exists() and not overwrite:
        raise InputError(
            f"--output: {output} already exists; choose another folder or pass --overwrite"
        )


@contextmanager
def output_folder(output: Path, *, overwrite: bool = False, resume: bool = False) -> Iterator[Path]:
    """Yields a partial folder that becomes `output` only when the block ends without an error.

    With `resume` the partial folder keeps what an interrupted call left there, and keeps it again
    if this call fails; the caller decides what of it is still valid. Without it the partial folder
    starts empty and is removed on failure.
    """
    refuse_existing(output, overwrite)
    partial = partial_path(output)
    if partial.exists() and not resume:
        shutil.rmtree(partial)
    partial.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
    except BaseException:
        if not resume:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    publish(partial, output)


def publish(partial: Path, output: Path) -> None:
    """Renames a finished partial folder to `output`, replacing what stood there."""
    if output.exists():
        replaced = output.with_name(output.name + ".replaced")
        if replaced.exists():
            shutil.rmtree(replaced)
        os.rename(output, replaced)
        os.rename(partial, output)
        shutil.rmtree(replaced)
    else:
        os.rename(partial, output)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path that replaces `path` when the block ends without an error."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Any) -> None:
    """Writes JSON with sorted keys, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Reads a JSON file; InputError names the file when it is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid JSON ({error})") from None


def hash_bytes(content: bytes) -> str:
    """sha256 as a hex string."""
    return hashlib.sha256(content).hexdigest()


def hash_json(content: Any) -> str:
    """sha256 of the canonical JSON form."""
    return hash_bytes(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())


def hash_file(path: Path) -> str:
    """sha256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def hash_folder(folder: Path, patterns: tuple[str, ...] = ("*",)) -> str:
    """sha256 over the names and contents of a folder's files that match `patterns`, not recursive.

    Hidden files are left out.
    """
    names = sorted(
        {
            path.name
            for pattern in patterns
            for path in folder.glob(pattern)
            if path.is_file() and not path.name.startswith(".")
        }
    )
    return hash_json({name: hash_file(folder / name) for name in names})
