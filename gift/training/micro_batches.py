"""The micro-batches of an optimizer step: planned and made on the host, copied ahead of their use.

Targets, the guide's confidences and the weights known to be 0 are on the host, so that making a
micro-batch needs no synchronisation with the device.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gift.config import TrainOptions
from gift.data.batches import Batch, copy_to, make_batch, plan_batches
from gift.distributed.ranks import Group
from gift.weighting.targets import GuidedRow, Targets, gather_targets
from gift.weighting.weights import known_zeros

BAND_EDGES = (0.1, 0.5, 0.9)
BAND_NAMES = ("q < 0.1", "0.1 ≤ q < 0.5", "0.5 ≤ q < 0.9", "q ≥ 0.9")
IGNORE_INDEX = -100
# Default tokens of a micro-batch: enough to keep the device busy.
TOKENS_ON_CUDA, TOKENS_ELSEWHERE = 8192, 1024


@dataclass(frozen=True)
class Split:
    """How rows become micro-batches: `tokens` at most, packed or padded.

    The first `recomputed` layers recompute their activations in the backward.
    """

    tokens: int
    packed: bool
    recomputed: int = 0


@dataclass(frozen=True)
class MicroBatch:
    """Some rows of a step: their numbers in the data, their batch, and its targets [N].

    `counted` is True where a target's weight may be other than 0; the others are IGNORE_INDEX in
    the batch. `band` int64 is the band of the guide's confidence (None without a store).
    """

    rows: tuple[int, ...]
    batch: Batch
    targets: Targets
    counted: Tensor
    band: Tensor | None

    def to(self, device: torch.device) -> "MicroBatch":
        """The micro-batch on a device; the host does not wait for the copies."""
        return MicroBatch(
            self.rows,
            self.batch.to(device),
            self.targets.to(device),
            copy_to(self.counted, device),
            None if self.band is None else copy_to(self.band, device),
        )


def token_limit(config: TrainOptions, device: torch.device) -> int:
    """Most tokens of a micro-batch: the given number, else the device's default."""
    default = TOKENS_ON_CUDA if device.type == "cuda" else TOKENS_ELSEWHERE
    return config.micro_batch_tokens or default


def global_batches(config: TrainOptions, rows: Sequence[GuidedRow]) -> Iterator[list[GuidedRow]]:
    """The rows of every optimizer step, from a seeded permutation per epoch."""
    for epoch in range(config.epochs):
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
        order = torch.randperm(len(rows), generator=generator).tolist()
        for first in range(0, len(rows), config.global_batch_size):
            yield [rows[number] for number in order[first : first + config.global_batch_size]]


def plan_micro_batches(
    config: TrainOptions, rows: Sequence[GuidedRow], split: Split
) -> list[list[GuidedRow]]:
    """The micro-batches of some rows, in order."""
    lengths = [len(row.example.input_ids) for row in rows]
    plan = plan_batches(lengths, split.tokens, packed=split.packed, rows=config.micro_batch_size)
    return [[rows[number] for number in numbers] for numbers in plan]


def idle_rows(
    config: TrainOptions, rows: Sequence[GuidedRow], split: Split, group: Group
) -> list[GuidedRow]:
    """Rows that a rank passes through a sharded model in addition to its share of a step.

    All ranks gather a block together, so all need as many passes as the rank with the most
    micro-batches: a rank with fewer repeats the step's shortest row.
    """
    counts = [
        len(plan_micro_batches(config, rows[rank :: group.size], split))
        for rank in range(group.size)
    ]
    shortest = min(rows, key=lambda row: len(row.example.input_ids))
    return [shortest] * (max(counts) - counts[group.rank])


def micro_batches(
    config: TrainOptions, rows: Sequence[GuidedRow], split: Split, device: torch.device
) -> Iterator[MicroBatch]:
    """All rows in micro-batches on the device, the next one copied before the last is used."""
    ahead = None
    for chosen in plan_micro_batches(config, rows, split):
        following = make_micro_batch(config, chosen, packed=split.packed).to(device)
        if ahead is not None:
            yield ahead
        ahead = following
    if ahead is not None:
        yield ahead


def make_micro_batch(
    config: TrainOptions, rows: Sequence[GuidedRow], *, packed: bool
) -> MicroBatch:
    """A micro-batch on the host."""
    examples = [row.example for row in rows]
    batch, targets = make_batch(examples, packed=packed), gather_targets(rows)
    left_out = known_zeros(config, targets)
    batch = replace(batch, targets=batch.targets.masked_fill(left_out, IGNORE_INDEX))
    band = None
    if targets.guide is not None:
        band = torch.bucketize(targets.guide, torch.tensor(BAND_EDGES), right=True)
    return MicroBatch(tuple(e.row for e in examples), batch, targets, ~left_out, band)
