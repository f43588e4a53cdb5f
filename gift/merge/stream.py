"""Writes merged shards: reading, computing and writing run concurrently, a few blocks in memory."""

import json
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from gift.console import progress
from gift.distributed.ranks import ALONE, Group
from gift.merge.residual import RESIDUAL_FOLDER, ResidualWriter
from gift.merge.transforms import BLOCK_BYTES, Transform
from gift.speed import Clock
from gift.storage.files import hash_file, naming_file, read_json, replacing, sealed_files
from gift.storage.publish import Output
from gift.storage.shards import (
    ShardWriter,
    Span,
    TensorEntry,
    TensorSpec,
    hash_tensors,
    link_or_copy,
    read_raw,
    read_span,
    spans,
)

MANIFEST_FILE = "gift_merge.json"
QUEUE_DEPTH = 2
Item = TypeVar("Item")


@dataclass(frozen=True)
class Job:
    """One tensor of an output shard; without a transform its bytes are copied."""

    spec: TensorSpec
    source: TensorEntry
    transform: Transform | None = None


@dataclass(frozen=True)
class ShardPlan:
    """One output file: its jobs in the order of the bytes, the header's order and metadata.

    `is_whole` is false where a tensor of the source is left out.
    """

    name: str
    source: Path
    jobs: tuple[Job, ...]
    header_order: tuple[str, ...]
    metadata: dict[str, str] | None
    is_whole: bool = True

    @property
    def is_unchanged(self) -> bool:
        """Whether the output file equals the source file."""
        copied = all(
            job.transform is None and job.spec.name == job.source.name for job in self.jobs
        )
        return copied and self.is_whole

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(job.spec.size for job in self.jobs)


def write_shards(
    output: Output,
    shards: Sequence[ShardPlan],
    clock: Clock,
    save_residual: bool = False,
    group: Group = ALONE,
) -> dict[str, Any]:
    """Writes or links every unfinished shard; returns the hashes of all.

    A record in the work folder names each shard that was re-read and found correct. One shard is
    verified while the next is written. The ranks of a group share the shards; each returns all.
    The clock gets the seconds to merge and write, to wait for the verification, and for others.
    """
    finished = group.from_main(lambda: _finished_shards(output, shards))
    share = group.share([shard for shard in shards if shard.name not in finished])
    done: dict[str, Any] = {}
    count = sum(len(shard.jobs) for shard in shards if shard.name in finished) // group.size
    jobs = count + sum(len(shard.jobs) for shard in share)
    waiting: list[tuple[str, dict[str, str], dict[str, str], Future[None]]] = []

    def settle() -> None:
        for name, hashes, residual_files, verified in waiting:
            with clock("verify"):
                verified.result()
            files = {name: hash_file(output.partial / name), **residual_files}
            done[name] = {"made": "written", "sha256": hashes}
            record = {"shard": name, "files": files, **done[name]}
            with replacing(output.work / f"{name}.json", sealed=True) as temporary:
                temporary.write_text(json.dumps(record), encoding="utf-8")
        waiting.clear()

    with (
        progress("merge", jobs, count) as bar,
        torch.no_grad(),
        ThreadPoolExecutor(1) as verifier,
    ):
        for shard in share:
            path = output.partial / shard.name
            bar.note(shard.name)
            if shard.is_unchanged:
                done[shard.name] = {"made": _take_over(shard.source, path)}
                bar.advance(len(shard.jobs))
                continue
            residual = None
            if save_residual:
                residual = ResidualWriter(output.partial / RESIDUAL_FOLDER, shard.name)
            with clock("merge"), naming_file(path):
                hashes = write_shard(shard, path, residual, bar.advance)
                residual_files = residual.finish() if residual is not None else {}
            settle()
            verified = verifier.submit(verify_shard, path, hashes)
            waiting.append((shard.name, hashes, residual_files, verified))
        settle()
    with clock("others"):
        return finished | dict(group.gather(list(done.items())))


def _take_over(source: Path, target: Path) -> str:
    made = link_or_copy(source, target)
    if made == "copied":
        verify_shard(target, hash_tensors(source))
    return made


def _finished_shards(output: Output, shards: Sequence[ShardPlan]) -> dict[str, Any]:
    """The shards of an interrupted merge that are still intact; removes all other files."""
    done, right = {}, set()
    names = {shard.name for shard in shards}
    for path in sealed_files(output.work).values():
        record = read_json(path)
        files = {output.partial / name: sha256 for name, sha256 in record["files"].items()}
        if record["shard"] in names and all(
            file.is_file() and hash_file(file) == sha256 for file, sha256 in files.items()
        ):
            done[record["shard"]] = {"made": record["made"], "sha256": record["sha256"]}
            right |= set(files)
    for path in list(output.partial.rglob("*")):
        if path.is_file() and output.work not in path.parents and path not in right:
            path.unlink()
    return done


def write_shard(
    plan: ShardPlan,
    path: Path,
    residual: ResidualWriter | None,
    advance: Callable[[], None],
) -> dict[str, str]:
    """Writes one shard and returns each tensor's sha256 as written; `advance` is called per tensor.

    Reading and writing have a thread each and computing uses the caller's, with short queues
    between them.
    """
    specs = [job.spec for job in plan.jobs]
    writer = ShardWriter(path, specs, plan.header_order, plan.metadata)
    current: Job | None = None

    def write(item: tuple[Job, Tensor, Tensor | None]) -> None:
        nonlocal current
        job, block, original = item
        if job is not current:
            writer.begin(job.spec.name)
            if residual is not None and job.transform is not None:
                residual.begin(job.spec.name, job.source)
            current = job
        writer.write(block)
        if residual is not None and original is not None:
            residual.write(original, block)

    try:
        with Background(write) as output:
            active: Job | None = None
            for job, span, tensors in prefetch(_read_blocks(plan.jobs)):
                if job is not active:
                    _leave(active, advance)
                    if job.transform is not None:
                        job.transform.prepare()
                    active = job
                if job.transform is None:
                    output.put((job, tensors[0], None))
                else:
                    merged = job.transform.block(span, tensors).cpu()
                    output.put((job, merged, tensors[0] if residual is not None else None))
            _leave(active, advance)
        return writer.finish()
    finally:
        writer.close()


def _leave(job: Job | None, advance: Callable[[], None]) -> None:
    if job is not None:
        if job.transform is not None:
            job.transform.release()
        advance()


def _read_blocks(jobs: Iterable[Job]) -> Iterator[tuple[Job, Span, list[Tensor]]]:
    nothing = Span(0, 0, 0)
    for job in jobs:
        if job.source.size == 0:
            yield job, nothing, [torch.empty(0, dtype=job.source.torch_dtype)]
        elif job.transform is None:
            for raw in read_raw(job.source, BLOCK_BYTES):
                yield job, nothing, [raw]
        else:
            for span in spans(job.source, BLOCK_BYTES):
                yield job, span, [read_span(entry, span) for entry in job.transform.sources]


def verify_shard(path: Path, hashes: dict[str, str]) -> None:
    """Re-reads every tensor of a written shard; OSError where one is not what was written."""
    found = hash_tensors(path)
    wrong = sorted(name for name in hashes.keys() | found if hashes.get(name) != found.get(name))
    if wrong:
        raise OSError(
            f"{path}: differs from what was written: {', '.join(wrong)}; the disk is failing or "
            "another program changed the file"
        )


def prefetch(items: Iterator[Item], depth: int = QUEUE_DEPTH) -> Iterator[Item]:
    """Iterates over `items` in a thread, `depth` items ahead; its errors are raised here."""
    ready: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def offer(entry: tuple[str, Any]) -> None:
        while not stopped.is_set():
            try:
                return ready.put(entry, timeout=0.1)
            except queue.Full:
                continue

    def run() -> None:
        try:
            for item in items:
                offer(("item", item))
                if stopped.is_set():
                    return
            offer(("end", None))
        except BaseException as error:
            offer(("error", error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while True:
            kind, content = ready.get()
            if kind == "error":
                raise content
            if kind == "end":
                return
            yield content
    finally:
        stopped.set()
        thread.join()


class Background(Generic[Item]):
    """Calls a function on items in a thread, in order; `put` and `__exit__` raise its error."""

    def __init__(self, work: Callable[[Item], None]) -> None:
        self._work = work
        self._items: queue.Queue[tuple[Item] | None] = queue.Queue(maxsize=QUEUE_DEPTH)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Background[Item]":
        self._thread.start()
        return self

    def put(self, item: Item) -> None:
        """Queues an item; waits while the queue is full."""
        if self._error is not None:
            raise self._error
        self._items.put((item,))

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._items.put(None)
        self._thread.join()
        if kind is None and self._error is not None:
            raise self._error

    def _run(self) -> None:
        # After an error the queue is still emptied, so that `put` does not block.
        while (entry := self._items.get()) is not None:
            if self._error is None:
                try:
                    self._work(entry[0])
                except BaseException as error:
                    self._error = error


def shard_jobs(order: Sequence[Job], converted: bool) -> tuple[Job, ...]:
    """The jobs in the order of the bytes.

    Converted dtypes are sorted by item size, largest first, as the format's library does, so that
    every tensor stays aligned; otherwise the source's order is kept.
    """
    if not converted:
        return tuple(order)
    return tuple(sorted(order, key=lambda job: -_item_size(job.spec)))


def _item_size(spec: TensorSpec) -> int:
    elements = 1
    for size in spec.shape:
        elements *= size
    return spec.size // elements if elements else 0
