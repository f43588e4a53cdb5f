"""Safetensors checkpoints: read by rows, written as a stream, a few megabytes in memory at a time.

A safetensors file is an 8-byte little-endian header length, a JSON header and the tensors' bytes.
Rows are read with plain file reads, not through a memory map: mapped pages count as resident
memory, so a mapped 5 GB shard can look like 5 GB in use. Source of the format:
https://github.com/huggingface/safetensors#format
"""

import hashlib
import json
import math
import os
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gift.errors import InputError
from gift.storage.files import hash_bytes, hash_json, read_json, remember_hash

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
READ_BYTES = 1 << 24
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library

TORCH_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
FLOAT_NAMES = frozenset({"F64", "F32", "F16", "BF16"})


@dataclass(frozen=True)
class TensorEntry:
    """A tensor in a file: bytes [begin, end), its safetensors dtype name and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    begin: int
    end: int

    @property
    def size(self) -> int:
        """Bytes."""
        return self.end - self.begin

    @property
    def is_float(self) -> bool:
        """Whether it is a plain floating-point tensor, which can be merged or converted."""
        return self.dtype in FLOAT_NAMES

    @property
    def torch_dtype(self) -> torch.dtype:
        """InputError for a dtype that PyTorch does not have."""
        if self.dtype not in TORCH_DTYPES:
            raise InputError(f"{self.path}: {self.name} has dtype {self.dtype}, which is unknown")
        return TORCH_DTYPES[self.dtype]

    @property
    def matrices(self) -> tuple[int, int, int]:
        """The shape seen as a stack of matrices [E, M, K]; a vector is one row."""
        padded = (1, 1, 1, *self.shape)[-3:] if len(self.shape) < 3 else self.shape
        return math.prod(padded[:-2]), padded[-2], padded[-1]


@dataclass(frozen=True)
class Span:
    """Rows [begin, end) of matrix `matrix` of a tensor seen as a stack of matrices."""

    matrix: int
    begin: int
    end: int


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its tensors in the header's order, and its free-form metadata."""

    path: Path
    entries: tuple[TensorEntry, ...]
    metadata: dict[str, str] | None
    header_hash: str

    @property
    def data_order(self) -> list[TensorEntry]:
        """The tensors in the order of their bytes."""
        return sorted(self.entries, key=lambda entry: (entry.begin, entry.end))


@dataclass(frozen=True)
class Checkpoint:
    """A model folder's weights: one file, or shards with an index."""

    folder: Path
    shards: tuple[Shard, ...]
    index: dict[str, Any] | None
    tensors: dict[str, TensorEntry]

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.size for entry in self.tensors.values())

    def fingerprint(self) -> str:
        """Hash of the shards' names, sizes, modification times and headers, without the tensors."""
        return hash_json(
            [
                (shard.path.name, stat.st_size, stat.st_mtime_ns, shard.header_hash)
                for shard in self.shards
                for stat in [shard.path.stat()]
            ]
        )


def open_shard(path: Path) -> Shard:
    """Reads and checks a file's header; InputError if it is not a complete safetensors file."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; download or save the model again")
    file_size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else MAX_HEADER_BYTES + 1
        if length > min(MAX_HEADER_BYTES, file_size - 8):
            raise InputError(f"{path}: not a safetensors file (or it is cut short); fetch it again")
        raw = file.read(length)
    try:
        header = json.loads(raw)
        metadata = header.pop("__metadata__", None)
        start = 8 + length
        entries = tuple(
            TensorEntry(
                name,
                info["dtype"],
                tuple(info["shape"]),
                path,
                start + info["data_offsets"][0],
                start + info["data_offsets"][1],
            )
            for name, info in header.items()
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: broken safetensors header ({error}); fetch it again") from None
    ends = max((entry.end for entry in entries), default=start)
    if ends != file_size:
        raise InputError(
            f"{path}: the header describes {ends} bytes, the file has {file_size}; fetch it again"
        )
    return Shard(path, entries, metadata, hash_bytes(raw))


def open_checkpoint(folder: Path) -> Checkpoint:
    """Opens a model folder's safetensors weights without reading a tensor.

    InputError: no weights, only a pickled pytorch_model.bin, an adapter folder, a missing or cut
    shard, an index that names tensors which its shards lack.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    single, index_path = folder / SINGLE_FILE, folder / INDEX_FILE
    if single.exists():
        shard = open_shard(single)
        return Checkpoint(folder, (shard,), None, {entry.name: entry for entry in shard.entries})
    if not index_path.exists():
        raise InputError(f"{folder}: {_why_no_weights(folder)}")
    index = read_json(index_path)
    if not isinstance(index, dict) or not isinstance(index.get("weight_map"), dict):
        raise InputError(f"{index_path}: has no weight_map; save the model again")
    weight_map: dict[str, str] = index["weight_map"]
    if not all(isinstance(name, str) for name in weight_map.values()):
        raise InputError(
            f"{index_path}: weight_map holds a value that is no file name; save the model again"
        )
    shards = tuple(open_shard(folder / name) for name in sorted(set(weight_map.values())))
    entries = {(shard.path.name, entry.name): entry for shard in shards for entry in shard.entries}
    missing = sorted(name for name, file in weight_map.items() if (file, name) not in entries)
    if missing:
        raise InputError(f"{index_path}: not in their shards: {', '.join(missing)}")
    tensors = {name: entries[file, name] for name, file in weight_map.items()}
    return Checkpoint(folder, shards, index, tensors)


def _why_no_weights(folder: Path) -> str:
    if (folder / "adapter_config.json").exists():
        return "is an adapter, not a model; pass it as --adapter"
    if list(folder.glob("pytorch_model*.bin")):
        return (
            "has only pickled weights (pytorch_model.bin); load the model with Transformers and "
            "save_pretrained it once to get model.safetensors"
        )
    return f"has neither {SINGLE_FILE} nor {INDEX_FILE}"


def spans(entry: TensorEntry, block_bytes: int) -> Iterator[Span]:
    """Cuts a tensor into blocks of whole rows of about `block_bytes`, never across matrices."""
    matrices, rows, width = entry.matrices
    row_bytes = max(1, entry.size // max(1, matrices * rows)) if width else 1
    step = max(1, block_bytes // row_bytes)
    for matrix in range(matrices):
        for begin in range(0, rows, step):
            yield Span(matrix, begin, min(begin + step, rows))


def read_span(entry: TensorEntry, span: Span) -> Tensor:
    """Reads rows of a tensor into fresh memory, [rows, K] in the tensor's own dtype."""
    _, rows, width = entry.matrices
    row_bytes = width * entry.torch_dtype.itemsize
    offset = entry.begin + (span.matrix * rows + span.begin) * row_bytes
    raw = torch.empty((span.end - span.begin) * row_bytes, dtype=torch.uint8)
    _read_into(entry.path, offset, raw)
    return raw.view(entry.torch_dtype).view(span.end - span.begin, width)


def read_tensor(entry: TensorEntry) -> Tensor:
    """Reads a whole tensor in its own shape and dtype."""
    raw = torch.empty(entry.size, dtype=torch.uint8)
    _read_into(entry.path, entry.begin, raw)
    return raw.view(entry.torch_dtype).view(entry.shape)


def read_raw(entry: TensorEntry, block_bytes: int) -> Iterator[Tensor]:
    """Reads a tensor of any dtype as uint8 blocks."""
    for begin in range(0, entry.size, block_bytes):
        raw = torch.empty(min(block_bytes, entry.size - begin), dtype=torch.uint8)
        _read_into(entry.path, entry.begin + begin, raw)
        yield raw


def _read_into(path: Path, offset: int, raw: Tensor) -> None:
    view = raw.numpy().data
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        while len(view):
            count = file.readinto(view)
            if not count:
                raise InputError(f"{path}: ends early; fetch it again")
            view = view[count:]


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written: its name, safetensors dtype name and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int


def spec_of(entry: TensorEntry, dtype: str | None = None, name: str | None = None) -> TensorSpec:
    """The spec of `entry`, in another dtype or under another name where one is given."""
    size = entry.size
    if dtype is not None and dtype != entry.dtype:
        size = math.prod(entry.shape) * TORCH_DTYPES[dtype].itemsize
    return TensorSpec(name or entry.name, dtype or entry.dtype, entry.shape, size)


class ShardWriter:
    """Writes a safetensors file front to back, hashing each tensor on the way.

    `order` is the order of the bytes, `header_order` that of the header's keys.
    """

    def __init__(
        self,
        path: Path,
        order: Iterable[TensorSpec],
        header_order: Iterable[str],
        metadata: Mapping[str, str] | None,
    ) -> None:
        self.path = path
        self._pending = list(order)
        self._hashes: dict[str, str] = {}
        self._digest = hashlib.sha256()
        self._left = 0
        offset, described = 0, {}
        for spec in self._pending:
            described[spec.name] = {
                "dtype": spec.dtype,
                "shape": list(spec.shape),
                "data_offsets": [offset, offset + spec.size],
            }
            offset += spec.size
        header = {"__metadata__": dict(metadata)} if metadata is not None else {}
        header |= {name: described[name] for name in header_order}
        assert len(header) - (metadata is not None) == len(self._pending), "header and data differ"
        raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        raw += b" " * (-len(raw) % 8)
        self._file = path.open("wb", buffering=0)
        self._write_raw(struct.pack("<Q", len(raw)) + raw)
        self._current: TensorSpec | None = None

    def begin(self, name: str) -> None:
        """Starts the next tensor, which must be `name`."""
        self.finish_tensor()
        self._current = self._pending.pop(0)
        assert self._current.name == name, f"expected {self._current.name}, got {name}"
        self._digest = hashlib.sha256()
        self._left = self._current.size

    def write(self, block: Tensor) -> None:
        """Appends a contiguous CPU tensor's bytes to the tensor begun last."""
        data = block.contiguous().view(-1).view(torch.uint8).numpy().data
        self._left -= len(data)
        self._digest.update(data)
        self._write_raw(data)

    def finish_tensor(self) -> None:
        """Ends the tensor begun last, if there is one."""
        if self._current is not None:
            assert self._left == 0, f"{self._current.name}: {self._left} bytes are missing"
            self._hashes[self._current.name] = self._digest.hexdigest()
            self._current = None

    def finish(self) -> dict[str, str]:
        """Flushes to the disk and returns each tensor's sha256."""
        self.finish_tensor()
        assert not self._pending, f"never written: {[spec.name for spec in self._pending]}"
        os.fsync(self._file.fileno())
        self._file.close()
        return self._hashes

    def close(self) -> None:
        """Closes the file, complete or not."""
        self._file.close()

    def _write_raw(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while len(view):
            view = view[self._file.write(view) :]


def hash_tensors(path: Path) -> dict[str, str]:
    """sha256 of every tensor, re-read from the file; caches the sha256 of the file too."""
    hashes = {}
    buffer = memoryview(bytearray(READ_BYTES))
    shard = open_shard(path)
    whole, contiguous = hashlib.sha256(), True
    with path.open("rb", buffering=0) as file:
        whole.update(file.read(min((e.begin for e in shard.entries), default=0)))
        for entry in shard.data_order:
            digest, left = hashlib.sha256(), entry.size
            contiguous &= file.tell() == entry.begin
            file.seek(entry.begin)
            while left:
                count = file.readinto(buffer[: min(left, READ_BYTES)])
                digest.update(buffer[:count])
                whole.update(buffer[:count])
                left -= count
            hashes[entry.name] = digest.hexdigest()
    if contiguous:
        remember_hash(path, whole.hexdigest())
    return hashes


def link_or_copy(source: Path, target: Path) -> str:
    """Hard-links a file, or copies it where the file system refuses; says which it did."""
    try:
        os.link(source.resolve(), target)
        return "linked"
    except OSError:
        shutil.copyfile(source, target)
        return "copied"
