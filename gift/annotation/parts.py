"""Files of an unfinished annotation, each with the values of some rows, for a resumed run.

The parts of different `--batch-tokens` are kept apart: their batches are other rows, and values
depend on the batch, by rounding.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from gift.data.encoding import EncodedData, Example
from gift.errors import InputError
from gift.storage.files import replacing, sealed_files

_PART = re.compile(r"part-(?P<tokens>\d+)-\d+\.safetensors")


def write_part(
    work: Path, tokens: int, number: int, rows: Sequence[Example], values: np.ndarray
) -> None:
    """Writes results of `annotate_batch` for some rows; `number` must be unique for `tokens`."""
    path = work / f"part-{tokens}-{number:06d}.safetensors"
    with replacing(path, sealed=True) as temporary:
        save_file(split_by_row(rows, values), temporary)


def split_by_row(rows: Sequence[Example], values: np.ndarray) -> dict[str, np.ndarray]:
    """Splits results of `annotate_batch` by row; InputError where a value is not finite."""
    ends = np.cumsum([example.targets for example in rows])
    by_row = {
        str(example.row): np.ascontiguousarray(row)
        for example, row in zip(rows, np.split(values, ends[:-1], axis=1), strict=True)
    }
    if bad := [int(row) for row, of_row in by_row.items() if not np.isfinite(of_row).all()]:
        raise InputError(f"--model: the guide's confidence is not finite in rows {sorted(bad)}")
    return by_row


def begun_tokens(work: Path) -> int | None:
    """The `--batch-tokens` with which an interrupted run would go on, the smallest of any part."""
    return min(_parts(work), default=None)


def unfinished(batches: Sequence[Sequence[Example]], work: Path, tokens: int) -> list[int]:
    """Numbers of the batches with a row that is in no part."""
    finished: set[str] = set()
    for path in _parts(work).get(tokens, ()):
        with safe_open(path, "numpy") as part:
            finished |= set(part.keys())
    return [
        number
        for number, rows in enumerate(batches)
        if not all(str(example.row) in finished for example in rows)
    ]


def collect_parts(data: EncodedData, work: Path, tokens: int) -> list[np.ndarray]:
    """Results of `annotate_batch` in row order, from the parts of all ranks."""
    values: dict[str, np.ndarray] = {}
    for path in _parts(work).get(tokens, ()):
        values |= load_file(path)
    if len(values) != len(data.kept):
        raise OSError(
            f"{work}: parts are missing or differ from what was written; the disk is failing or "
            "another program changed them"
        )
    return [
        values[str(example.row)] if example else np.zeros((4, 0), np.float32)
        for example in data.examples
    ]


def _parts(work: Path) -> dict[int, list[Path]]:
    """The intact parts in the work folder, by `--batch-tokens`."""
    parts: dict[int, list[Path]] = {}
    for name, path in sealed_files(work).items():
        if match := _PART.fullmatch(name):
            parts.setdefault(int(match["tokens"]), []).append(path)
    return parts
