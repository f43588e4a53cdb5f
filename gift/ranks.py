"""Data parallelism under torchrun: the process group, shares of a batch and who writes files."""

import os
import resource
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Item = TypeVar("Item")


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

    def sum_(self, values: Tensor) -> None:
        """Sums over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(values)

    def barrier(self) -> None:
        """Waits for all ranks."""
        if self.size > 1:
            dist.barrier()

    def peak_memory_gb(self) -> float:
        """Peak memory of this process's device in GB: allocated on CUDA, else resident."""
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            return torch.cuda.max_memory_allocated() / 1e9
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


@contextmanager
def process_group() -> Iterator[Group]:
    """The group torchrun describes in the environment; one process without it."""
    if "WORLD_SIZE" not in os.environ:
        yield Group(0, 1, None)
        return
    device = None
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device else "gloo")
    try:
        yield Group(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()


def gather_lists(values: list[Item]) -> list[Item]:
    """The lists of all ranks, one after the other, on every rank."""
    if not dist.is_initialized():
        return values
    lists: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(lists, values)
    return [value for part in lists for value in part]


def gather_tensors(value: Tensor) -> list[Tensor]:
    """The tensor of every rank, on every rank."""
    return gather_lists([value])
