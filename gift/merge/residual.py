"""The residual of a merge: it restores the original bits of every changed tensor.

For each block the file holds zlib of the zigzag-coded integer differences original − merged of the
numbers' bit patterns, low bytes first, then high bytes. The merged bits and the residual give the
original bits on any machine and for any method, without floating-point arithmetic.
"""

import hashlib
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gift.errors import InputError
from gift.merge.transforms import BLOCK_BYTES, Transform
from gift.storage.files import hash_file, read_json, remember_hash, write_json
from gift.storage.shards import Span, TensorEntry, spans

RESIDUAL_FOLDER = "gift_residual"
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def encode_block(original: Tensor, merged: Tensor) -> bytes:
    """The residual of one block; both tensors have one shape and floating-point dtype."""
    integer = _INTEGERS[original.dtype.itemsize]
    difference = original.contiguous().view(integer) - merged.contiguous().view(integer)
    bits = 8 * original.dtype.itemsize
    zigzag = ((difference << 1) ^ (difference >> (bits - 1))).numpy().reshape(-1)
    planes = zigzag.view(np.uint8).reshape(-1, original.dtype.itemsize).T
    return zlib.compress(planes.tobytes(), level=1)


def decode_block(merged: Tensor, content: bytes) -> Tensor:
    """The original block from the merged one and its residual."""
    integer = _INTEGERS[merged.dtype.itemsize]
    planes = np.frombuffer(zlib.decompress(content), np.uint8).reshape(merged.dtype.itemsize, -1)
    zigzag = torch.from_numpy(np.ascontiguousarray(planes.T)).view(integer).view(merged.shape)
    ones = (1 << (8 * merged.dtype.itemsize - 1)) - 1
    difference = ((zigzag >> 1) & ones) ^ -(zigzag & 1)
    return (merged.contiguous().view(integer) + difference).view(merged.dtype)


class ResidualWriter:
    """Writes one shard's residual: a file of blocks, and an index when it is complete."""

    def __init__(self, folder: Path, shard: str) -> None:
        folder.mkdir(exist_ok=True)
        self._index_path, self._path = folder / f"{shard}.json", folder / f"{shard}.bin"
        self._file = self._path.open("wb")
        self._file_digest = hashlib.sha256()
        self._tensors: dict[str, dict[str, Any]] = {}
        self._blocks: list[list[int]] = []
        self._digest = hashlib.sha256()

    def begin(self, name: str, source: TensorEntry) -> None:
        """Starts the next tensor."""
        self._end_tensor()
        self._blocks, self._digest = [], hashlib.sha256()
        self._tensors[name] = {"blocks": self._blocks, "dtype": source.dtype}

    def write(self, original: Tensor, merged: Tensor) -> None:
        """Appends one block's residual."""
        content = encode_block(original, merged)
        self._digest.update(original.contiguous().view(torch.uint8).numpy().data)
        self._blocks.append([self._file.tell(), len(content)])
        self._file_digest.update(content)
        self._file.write(content)

    def finish(self) -> dict[str, str]:
        """Flushes to the disk and writes the index; returns the sha256 of both files by path."""
        self._end_tensor()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        sha256 = self._file_digest.hexdigest()
        remember_hash(self._path, sha256)
        write_json(self._index_path, {"block_bytes": BLOCK_BYTES, "tensors": self._tensors})
        index_sha256 = hash_file(self._index_path)
        return {
            f"{RESIDUAL_FOLDER}/{self._path.name}": sha256,
            f"{RESIDUAL_FOLDER}/{self._index_path.name}": index_sha256,
        }

    def _end_tensor(self) -> None:
        if self._tensors:
            self._tensors[next(reversed(self._tensors))]["sha256"] = self._digest.hexdigest()


class ResidualReader:
    """Reads one shard's residual; InputError where it is missing, cut or of another layout."""

    def __init__(self, folder: Path, shard: str) -> None:
        self._path = folder / f"{shard}.bin"
        index_path = folder / f"{shard}.json"
        index = read_json(index_path)
        if index.get("block_bytes") != BLOCK_BYTES:
            raise InputError(f"{index_path}: written with another block size than this version's")
        self._tensors: dict[str, dict[str, Any]] = index["tensors"]

    @property
    def hashes(self) -> dict[str, str]:
        """sha256 of the original tensors by name."""
        return {name: tensor["sha256"] for name, tensor in self._tensors.items()}

    def restore(self, name: str, block: int, merged: Tensor) -> Tensor:
        """The original rows of a tensor's block, from the merged rows."""
        offset, length = self._tensors[name]["blocks"][block]
        with self._path.open("rb") as file:
            file.seek(offset)
            content = file.read(length)
        if len(content) < length:
            raise InputError(f"{self._path}: ends early; the exact unmerge needs all of it")
        return decode_block(merged, content)


class RestoreTransform(Transform):
    """The original tensor from the merged one and its residual."""

    def __init__(self, source: TensorEntry, reader: ResidualReader) -> None:
        super().__init__([source], source.torch_dtype)
        self._reader = reader
        self._blocks: dict[Span, int] = {}

    def prepare(self) -> None:
        blocks = spans(self.sources[0], BLOCK_BYTES)
        self._blocks = {span: number for number, span in enumerate(blocks)}

    def block(self, span: Span, tensors: list[Tensor]) -> Tensor:
        return self._reader.restore(self.sources[0].name, self._blocks[span], tensors[0])
