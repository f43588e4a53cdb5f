"""Checks that all ranks of a vocabulary-parallel head made the same call, before any work.

Ranks with different arguments would deadlock in a collective, or sum unrelated values.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from gift_kernels.linear_ce.types import Problem, VocabShard


class Slices(NamedTuple):
    """The rows of one head: in total, and the most of any rank."""

    whole: int
    most: int


def agree(problem: Problem, shard: VocabShard, impl: str) -> dict[str, Slices]:
    """The slices of every head by argument; ValueError on every rank if they do not fit together.

    One all-gather of a few numbers, whose result is read on the host. Targets are compared by a
    checksum, weights by the number of nonzero ones.
    """
    target, row_weight = problem.target, problem.row_weight
    same = _same_everywhere(problem, impl)
    heads = problem.heads()
    given: list[float] = [shard.start, *(head.weight.shape[0] for head in heads.values())]
    # All ranks gather equally many numbers, with or without a guide.
    given += [-1.0] * (3 - len(given))
    given += [torch.inf if value is None else value for value in same.values()]
    places = torch.arange(1, target.numel() + 1, device=target.device)
    counted = target.new_zeros(())
    if row_weight is not None:
        counted = ((row_weight != 0) & (target != problem.ignore_index)).sum()
    checksum = (target * places).sum().remainder(1 << 50)  # exact in float64
    ranks = _gathered(given, torch.stack([counted, checksum]), shard)
    names = (*same, "token_weight (rows that are not 0)", "target (checksum)")
    for column, name in enumerate(names, start=3):
        values = [rank[column] for rank in ranks]
        if len(set(values)) > 1:
            raise ValueError(f"{name}: the ranks of vocab_parallel differ: {values}")
    starts = [int(rank[0]) for rank in ranks]
    return {
        name: _joined(name, starts, [int(rank[column]) for rank in ranks])
        for column, name in enumerate(heads, start=1)
    }


def most_rows(rows: int, shard: VocabShard) -> int:
    """The most rows of the head that any rank holds; a collective, read on the host."""
    return int(max(rank[0] for rank in _gathered([rows], None, shard)))


def _same_everywhere(problem: Problem, impl: str) -> dict[str, float | None]:
    """Numbers that must be equal on all ranks, by argument."""
    head, guide, transform = problem.head, problem.guide, problem.transform
    return {
        "hidden.requires_grad": problem.want_dh,
        "lm_head_weight.requires_grad": problem.want_dw,
        "bias.requires_grad": problem.want_db,
        "hidden (rows)": head.hidden.shape[0],
        "hidden (columns)": head.hidden.shape[1],
        "hidden (bytes of a number)": head.hidden.element_size(),
        "bias (given)": head.bias is not None,
        "token_weight (given)": problem.row_weight is not None,
        "token_weight (self)": problem.self_weight,
        "guide (given)": guide is not None,
        "logit_scale": head.logit_scale,
        "logit_softcap": head.logit_softcap,
        "guide.logit_scale": guide.logit_scale if guide is not None else None,
        "guide.logit_softcap": guide.logit_softcap if guide is not None else None,
        "temperature": problem.temperature,
        "transform.power": transform.power,
        "transform.floor": transform.floor,
        "transform.threshold": transform.threshold,
        "ignore_index": problem.ignore_index,
        "reduction (none)": problem.rowwise,
        "stats": problem.with_stats + 2 * problem.with_entropy + 4 * problem.keep_zero_rows,
        "impl (triton)": impl == "triton",
        "chunk_size": problem.chunk_size,
    }


def _gathered(numbers: list[float], more: Tensor | None, shard: VocabShard) -> list[list[float]]:
    """The numbers of every rank, those of `more` [K] last."""
    device = "cuda" if dist.get_backend(shard.group) == "nccl" else "cpu"
    own = torch.tensor(numbers, dtype=torch.float64, device=device)
    if more is not None:
        own = torch.cat([own, more.to(own)])
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size(shard.group))]
    dist.all_gather(parts, own, group=shard.group)
    return torch.stack(parts).tolist()


def _joined(name: str, starts: list[int], rows: list[int]) -> Slices:
    slices = [(start, start + count) for start, count in zip(starts, rows, strict=True)]
    if empty := [number for number, count in enumerate(rows) if count == 0]:
        raise ValueError(f"{name}: the slices of ranks {empty} of vocab_parallel have no rows")
    ends = [0, *(end for _, end in sorted(slices))]
    if [start for start, _ in sorted(slices)] != ends[:-1]:
        raise ValueError(
            f"vocab_parallel.start: the ranks' rows of {name} are {slices} (first, end), which "
            "do not join up from 0"
        )
    return Slices(ends[-1], max(rows))
