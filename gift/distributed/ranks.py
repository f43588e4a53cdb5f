"""Several processes under torchrun: the group, shares of work, one output folder, who prints.

Each process takes a share; only the main one (rank 0) prints, owns the output folder and publishes
it. A process that fails tells the others why, and they end with the same message. If one is killed,
torchrun ends the others; without torchrun they notice at their next collective.
"""

import functools
import itertools
import os
import resource
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from gift.console import quiet
from gift.distributed.environment import processes, whole_number
from gift.errors import InputError
from gift.storage.publish import MADE_FROM_FILE, Output, output_folder

Item = TypeVar("Item")
FAILED = "gift/failed"
# Messages of gloo when another process has ended; NCCL's errors have a type of their own.
GONE = "by peer"
# How long a process waits for the others to start, and for their shares.
START_WAIT = timedelta(minutes=30)
LONGEST_WAIT = timedelta(days=30)
# A command may open one group after the other; each has keys of its own in the store.
GROUP_NUMBERS = itertools.count()


class LostProcess(OSError):
    """Another process of the group failed or was killed."""


@dataclass(frozen=True)
class Group:
    """This process's rank among `size`; `device` is its own GPU under torchrun, else None."""

    rank: int
    size: int
    device: torch.device | None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """Every `size`-th item; empty where there are fewer items than ranks."""
        return items[self.rank :: self.size]

    def count(self, items: int) -> int:
        """How many of so many items the main rank's share has."""
        return -(-items // self.size)

    def all_reduce_(self, values: Tensor) -> None:
        """Sums over all ranks, in place."""
        if self.size > 1:
            with _exchange():
                dist.all_reduce(values)

    def barrier(self) -> None:
        """Waits for all ranks."""
        if self.size > 1:
            with _exchange():
                dist.barrier()

    def gather(self, values: list[Item]) -> list[Item]:
        """The lists of all ranks, one after the other, on every rank; they are pickled."""
        return gather_lists(values) if self.size > 1 else values

    def from_main(self, compute: Callable[[], Item]) -> Item:
        """What the main rank computes, on every rank; it is pickled."""
        values: list[Any] = [compute() if self.is_main else None]
        if self.size > 1:
            with _exchange():
                dist.broadcast_object_list(values)
        return values[0]

    def require_equal(self, given: Mapping[str, Any]) -> None:
        """InputError on every rank that names the values in which ranks differ."""
        first, *others = self.gather([dict(given)])
        for rank, other in enumerate(others, 1):
            if differing := sorted(name for name in first if other.get(name) != first[name]):
                raise InputError(
                    f"process {rank} of {self.size} differs from process 0 in "
                    f"{', '.join(differing)}; give all processes the same options and files"
                )

    def peak_memory_gb(self) -> float:
        """Peak memory of this process's device in GB: allocated on CUDA, else resident."""
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            return torch.cuda.max_memory_allocated() / 1e9
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


ALONE = Group(0, 1, None)


@contextmanager
def process_group(*, on_host: bool = False) -> Iterator[Group]:
    """The group torchrun describes in the environment; one process without it.

    Args:
        on_host: the ranks exchange only Python objects, and may wait long for each other.

    Raises:
        InputError: a variable of the environment is missing or invalid: not a number, a rank or GPU
        that does not exist, a port in use. LostProcess: another rank failed or was killed.
    """
    if "WORLD_SIZE" not in os.environ:
        yield ALONE
        return
    device = _own_gpu()
    group = Group(whole_number("RANK"), processes(), device)
    store = _common_store(group)
    _await_all(store, group)
    dist.init_process_group(
        "nccl" if device and not on_host else "gloo",
        store=store,
        rank=group.rank,
        world_size=group.size,
        timeout=LONGEST_WAIT if on_host else None,
    )
    try:
        # A sharded model and its checkpoints use collectives of PyTorch's.
        with nullcontext() if group.is_main else quiet(), _exchange(alone=False):
            yield group
            group.barrier()  # so that all learn of a failure at the end
    except BaseException as error:
        _tell(store, group, error)
        raise
    finally:
        dist.destroy_process_group()


def _common_store(group: Group) -> dist.Store:
    """The store that all ranks reach, for keys of this group alone."""
    if group.rank >= group.size:
        raise InputError(
            f"RANK: is {group.rank}, and WORLD_SIZE is {group.size}; ranks are numbered from 0"
        )
    port = whole_number("MASTER_PORT")
    try:
        store = _meet(group, port)
    except ValueError as error:  # a variable is not set
        raise InputError(f"{error}; start several processes with torchrun") from None
    except dist.DistError as error:
        raise InputError(
            f"MASTER_PORT: the processes cannot meet at port {port} of "
            f"{os.environ['MASTER_ADDR']} ({str(error).splitlines()[0]}); choose a free port"
        ) from error
    # torchrun keeps the store when it restarts all processes (--max-restarts).
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"gift/{attempt}/{next(GROUP_NUMBERS)}", store)


@functools.cache  # without torchrun the main rank hosts it, for the later groups too
def _meet(group: Group, port: int) -> dist.Store:
    store, _, _ = next(dist.rendezvous("env://", timeout=START_WAIT))
    return store


def _await_all(store: dist.Store, group: Group) -> None:
    """LostProcess where a rank does not start; otherwise all would wait for its share."""
    names = [f"gift/started/{rank}" for rank in range(group.size)]
    store.set(names[group.rank], "")
    try:
        store.wait(names, START_WAIT)
    except RuntimeError as error:
        raise LostProcess(
            f"not all of {group.size} processes have started within {START_WAIT}"
        ) from error


def _own_gpu() -> torch.device | None:
    """The GPU of this process, made the current one; None without CUDA."""
    if not torch.cuda.is_available():
        return None
    number, count = whole_number("LOCAL_RANK", "0"), torch.cuda.device_count()
    if number >= count:
        raise InputError(
            f"LOCAL_RANK: is {number}, and this machine has {count} GPUs; start at most {count} "
            "processes on it (--nproc-per-node)"
        )
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    return device


@contextmanager
def _exchange(*, alone: bool = True) -> Iterator[None]:
    """LostProcess where a collective fails.

    Args:
        alone: the block does nothing else, so any error is the collective's.
    """
    try:
        yield
    except RuntimeError as error:
        if not alone and not isinstance(error, dist.DistError) and GONE not in str(error).lower():
            raise
        first_line = (str(error).splitlines() or [repr(error)])[0].split(". ")[0]
        raise LostProcess(
            "another process of this run ended without a message, killed or out of memory "
            f"({first_line}); run the same command again to resume"
        ) from error


def _tell(store: dist.Store, group: Group, error: BaseException) -> None:
    """Stores the first failure; LostProcess with it where this error only follows from it."""
    message = (str(error).splitlines() or [""])[0] or type(error).__name__
    if isinstance(error, KeyboardInterrupt):
        message = str(error) or "interrupted"
    elif not isinstance(error, InputError | OSError):
        message = f"{type(error).__name__}: {message}"
    own = f"process {group.rank} of {group.size}: {message}"
    try:
        first = store.compare_set(FAILED, "", own).decode()
    except RuntimeError:  # the process that hosts the store has ended
        return
    # torchrun ends the others by a signal, which arrives as an interruption.
    if first != own and isinstance(error, LostProcess | dist.DistError | KeyboardInterrupt):
        raise LostProcess(first) from error


def gather_lists(values: list[Item]) -> list[Item]:
    """The lists of all ranks, one after the other, on every rank."""
    if not dist.is_initialized():
        return values
    lists: list[Any] = [None] * dist.get_world_size()
    with _exchange():
        dist.all_gather_object(lists, values)
    return [value for part in lists for value in part]


def gather_tensors(value: Tensor) -> list[Tensor]:
    """The tensor of every rank, on every rank."""
    return gather_lists([value])


@contextmanager
def shared_folder(
    group: Group, path: Path, *, overwrite: bool = False, key: str = ""
) -> Iterator[Output]:
    """`publish.output_folder` of all ranks: the main rank owns it and publishes it."""
    owned = output_folder(path, overwrite=overwrite, key=key)
    with owned if group.is_main else nullcontext(Output(path, key)) as output:
        group.barrier()
        yield output


def begin_shared(
    group: Group, output: Output, made_from: Mapping[str, Any], keep: Collection[str] = ()
) -> Path:
    """`Output.begin` by the main rank; all return once the folder is there.

    InputError on every rank: one has another `made_from` or output, or does not see the folder.
    """
    group.require_equal({"output": str(output.path), **made_from})
    if group.is_main:
        output.begin(made_from, keep)
    group.barrier()
    if not (output.work / MADE_FROM_FILE).exists():
        raise InputError(
            f"--output: process {group.rank} does not see {output.work}, which process 0 made; "
            "several machines need a folder that all of them share"
        )
    return output.partial
