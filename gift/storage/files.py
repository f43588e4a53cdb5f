"""Single files: written to a temporary name, synced and renamed; hashes of content."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gift.errors import InputError

REMEMBERED_BYTES = 1 << 20
_hashes: dict[tuple[int, ...], str] = {}
_SEALED = re.compile(r"(?P<stem>.+)\.(?P<sha256>[0-9a-f]{64})(?P<suffix>\.\w+)")


@contextmanager
def replacing(path: Path, *, sealed: bool = False) -> Iterator[Path]:
    """Yields a temporary path that replaces `path` when the block ends without an error.

    A sealed file has its sha256 in its name, before the suffix: see `sealed_files`.
    """
    temporary = temporary_path(path)
    try:
        with naming_file(path):
            yield temporary
            sync(temporary)
            name = f"{path.stem}.{hash_file(temporary)}{path.suffix}" if sealed else path.name
            os.replace(temporary, path.with_name(name))
            sync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sealed_files(folder: Path) -> dict[str, Path]:
    """A folder's sealed files whose content matches their sha256, by name without the sha256."""
    files = {}
    for path in sorted(folder.iterdir()):
        match = _SEALED.fullmatch(path.name)
        if match is not None and hash_file(path) == match["sha256"]:
            files[match["stem"] + match["suffix"]] = path
    return files


def temporary_path(path: Path) -> Path:
    """The temporary file that is renamed to `path`."""
    return path.with_name(f".{path.name}.tmp")


@contextmanager
def naming_file(path: Path) -> Iterator[None]:
    """Turns operating-system errors in the block into OSErrors that name a file, else `path`."""
    try:
        yield
    except Exception as error:
        failure = system_failure(error, path)
        if failure is None or failure is error:
            raise
        raise failure from error


def system_failure(error: BaseException, path: Path) -> OSError | None:
    """The OSError that caused an exception, None if there is none.

    Its filename is `path` if it had none. Libraries written in Rust (safetensors, tokenizers) raise
    types of their own, with the error number in the text.
    """
    if isinstance(error, OSError):
        if error.errno is not None:
            error.filename = error.filename or str(path)
        return error
    found = re.search(r"os error (\d+)", str(error))
    return OSError(int(found[1]), os.strerror(int(found[1])), str(path)) if found else None


def sync(path: Path) -> None:
    """Flushes a file's content, or a folder's entries, to the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: Any) -> None:
    """Writes JSON with sorted keys, atomically."""
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


def read_json_lines(paths: Iterable[Path]) -> Iterator[dict[str, Any]]:
    """The rows of JSONL files that this program wrote, file by file."""
    for path in paths:
        for line in path.read_text(encoding="utf-8").splitlines():
            yield json.loads(line)


def write_json_lines(path: Path, rows: Iterable[dict[str, Any]], *, sealed: bool = False) -> None:
    """Writes one row per line, atomically; `sealed`: see `replacing`."""
    with replacing(path, sealed=sealed) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_record(path: Path, keys: Iterable[str]) -> dict[str, Any]:
    """Reads a JSON object; InputError names missing `keys` ("a.b" is b in a)."""
    record = read_json(path)
    lacking = []
    for key in keys:
        value = record
        for part in key.split("."):
            if not isinstance(value, dict) or part not in value:
                lacking.append(key)
                break
            value = value[part]
    if lacking:
        raise InputError(
            f"{path}: lacks {', '.join(lacking)}; another version or another program wrote it, "
            f"make {path.parent} again"
        )
    return record


def hash_bytes(content: bytes) -> str:
    """sha256 as a hex string."""
    return hashlib.sha256(content).hexdigest()


def hash_json(content: Any) -> str:
    """sha256 of the canonical JSON form."""
    return hash_bytes(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())


def hash_file(path: Path) -> str:
    """sha256 of a file's content; a large file is read once per process unless it changes."""
    known = _hashes.get(_identity(path))
    if known is not None:
        return known
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    remember_hash(path, digest.hexdigest())
    return digest.hexdigest()


def remember_hash(path: Path, sha256: str) -> None:
    """Caches a large file's hash, so that `hash_file` need not read the file again."""
    if path.stat().st_size >= REMEMBERED_BYTES:
        _hashes[_identity(path)] = sha256


def _identity(path: Path) -> tuple[int, ...]:
    """A key that changes when a file's content changes, but not when it is renamed."""
    stat = path.stat()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


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
