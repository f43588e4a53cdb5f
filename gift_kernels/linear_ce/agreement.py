"""Whether the ranks that share a vocabulary were given the same call, before they work on it.

Ranks that disagree would wait for each other for ever, or add up what does not belong together.
"""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from gift_kernels.linear_ce.types import VocabShard


def check_agreement(
    shard: VocabShard,
    heads: Mapping[str, Tensor | None],
    target: Tensor,
    same: Mapping[str, float | None],
) -> None:
    """Raises ValueError on every rank where the ranks' slices or arguments do not fit.

    One gather of a few numbers, whose result is read on the host. `heads` are this rank's slices by
    argument, `same` what all ranks must have passed alike; targets are compared by a checksum.
    """
    device = "cuda" if dist.get_backend(shard.group) == "nccl" else "cpu"
    places = torch.arange(1, target.numel() + 1, device=target.device)
    checksum = (target * places).sum().remainder(1 << 50)  # float64 holds it
    given: list[float] = [shard.start]
    given += [head.shape[0] if head is not None else -1 for head in heads.values()]
    given += [torch.inf if value is None else value for value in same.values()]
    own = torch.tensor(given, dtype=torch.float64, device=device)
    own = torch.cat([own, checksum.to(own).reshape(1)])
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size(shard.group))]
    dist.all_gather(parts, own, group=shard.group)
    ranks = torch.stack(parts).tolist()
    for column, name in enumerate((*same, "target"), start=1 + len(heads)):
        values = [rank[column] for rank in ranks]
        if len(set(values)) > 1:
            found = "checksums " if name == "target" else ""
            raise ValueError(f"{name}: the ranks of vocab_parallel differ: {found}{values}")
    _check_slices(ranks, [name for name, head in heads.items() if head is not None])


def _check_slices(ranks: list[list[float]], names: list[str]) -> None:
    for column, name in enumerate(names, start=1):
        slices = [(int(rank[0]), int(rank[0] + rank[column])) for rank in ranks]
        if empty := [number for number, (start, end) in enumerate(slices) if start == end]:
            raise ValueError(f"{name}: the slices of ranks {empty} of vocab_parallel have no rows")
        ends = [0, *(end for _, end in sorted(slices))]
        if [start for start, _ in sorted(slices)] != ends[:-1]:
            raise ValueError(
                f"vocab_parallel.start: the ranks' rows of {name} are {slices} (first, end), which "
                "do not join up from 0"
            )
