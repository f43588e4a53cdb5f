"""Ranks of a vocabulary-parallel head with different arguments: an error on every rank."""

from __future__ import annotations

import datetime
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from gift_kernels import Guide, VocabParallel, weighted_ce

pytestmark = pytest.mark.xdist_group("ranks that disagree")

# What rank 1 passes instead, and how the error on both ranks begins.
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "same": ({}, ""),
    "frozen head": ({"trainable": False}, "lm_head_weight.requires_grad: the ranks"),
    "empty slice": ({"rows": (10, 10)}, "lm_head_weight: the slices of ranks [1]"),
    "overlap": ({"start": 0}, "vocab_parallel.start: the ranks' rows of lm_head_weight are"),
    "gap": ({"start": 6}, "vocab_parallel.start: the ranks' rows of lm_head_weight are"),
    "targets": ({"target": [1, 2, 4]}, "target (checksum): the ranks"),
    "rows": ({"target": [1, 2]}, "hidden (rows): the ranks"),
    "scale": ({"logit_scale": 2.0}, "logit_scale: the ranks"),
    "statistics": ({"stats": ("entropy",)}, "stats: the ranks"),
    "guide": ({"guide": True}, "guide (given): the ranks"),
}


def call(rank: int, changes: dict[str, Any]) -> str:
    """The error of one call, or ""."""
    given = {"rows": ((0, 5), (5, 10))[rank], "start": 5 * rank, "trainable": True}
    given |= {"target": [1, 2, 3]} | (changes if rank == 1 else {})
    (first, end), start = given.pop("rows"), given.pop("start")
    target = torch.tensor(given.pop("target"))
    head = torch.arange(30.0).reshape(10, 3)[first:end].requires_grad_(given.pop("trainable"))
    hidden = torch.ones(len(target), 3)
    if given.pop("guide", False):
        given["guide"] = Guide(hidden, head.detach())
    group = dist.group.WORLD
    assert group is not None
    shard = VocabParallel(group, start)
    try:
        weighted_ce(hidden, head, target, vocab_parallel=shard, reduction="none", **given)
    except ValueError as error:
        return str(error)
    return ""


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    wait = datetime.timedelta(seconds=30)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=wait)
    errors = {name: call(rank, changes) for name, (changes, _) in CASES.items()}
    short = dist.new_group(timeout=datetime.timedelta(seconds=2))
    hidden = torch.ones(3, 3, dtype=torch.float32 if rank == 0 else torch.int64)
    shard = VocabParallel(short, 5 * rank)
    try:
        weighted_ce(hidden, torch.ones(5, 3), torch.tensor([1, 2, 3]), vocab_parallel=shard)
    except (TypeError, RuntimeError) as error:
        errors["wrong on rank 1"] = f"{type(error).__name__}: {error}"
    if rank == 1:
        time.sleep(4)  # at work elsewhere: its end alone would free the other
    torch.save(errors, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(work, (str(folder),), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_ranks_that_disagree_all_raise(case: str, errors: list[dict[str, str]]) -> None:
    first, second = (found[case] for found in errors)
    assert first == second
    begins = CASES[case][1]
    assert first.startswith(begins) and bool(first) == bool(begins), first


def test_an_argument_wrong_on_one_rank_holds_the_others_until_the_timeout(
    errors: list[dict[str, str]],
) -> None:
    waited, wrong = (found["wrong on rank 1"] for found in errors)
    assert wrong.startswith("TypeError: hidden: expected one of")
    assert waited.startswith(("RuntimeError", "DistBackendError")) and "imed out" in waited, waited
