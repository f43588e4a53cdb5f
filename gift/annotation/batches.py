"""Batches of rows that fit into memory, and the guide's confidences in their targets.

If the largest batch does not fit, all batches get half the tokens, and so on down to the longest
row. Results are bitwise those of the smaller `--batch-tokens`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gift.annotation.parts import unfinished
from gift.confidence_store import STATISTICS
from gift.console import error_console
from gift.data.batches import Batch, make_batch, plan_batches, size_of
from gift.data.encoding import Example
from gift.distributed.ranks import Group
from gift.errors import InputError
from gift.models.head import last_hidden_state, lm_head
from gift.models.memory import attempt
from gift.storage.files import read_json, write_json
from gift_kernels import token_confidence

MEMORY_FILE = "memory.json"


@dataclass(frozen=True)
class Guide:
    """A model, whether it reads packed rows, and the temperature of its confidence."""

    model: Any
    packed: bool
    temperature: float

    def plan(self, tokens: int, rows: Sequence[Example]) -> list[list[Example]]:
        """All rows in batches, the largest first; each is computed as a whole by one rank."""
        lengths = [len(example.input_ids) for example in rows]
        plan = plan_batches(lengths, tokens, packed=self.packed)
        plan.sort(key=lambda batch: -size_of([lengths[n] for n in batch], packed=self.packed))
        return [[rows[number] for number in batch] for batch in plan]

    def annotate(self, rows: Sequence[Example]) -> Tensor:
        """`annotate_batch` of some rows."""
        batch = make_batch(rows, packed=self.packed).to(self.model.device)
        return annotate_batch(self.model, batch, self.temperature)

    def attempt(self, rows: Sequence[Example]) -> Tensor | None:
        """The same; None if it does not fit into memory."""
        return attempt(lambda: self.annotate(rows))


class Plan(NamedTuple):
    """All batches, of at most `tokens` tokens, and the numbers of those that are not finished.

    `share` has this rank's batches, and `found` the results of the first of them.
    """

    tokens: int
    batches: list[list[Example]]
    missing: Sequence[int]
    share: Sequence[int]
    found: list[Tensor]


def settle_batches(
    guide: Guide, rows: Sequence[Example], tokens: int, group: Group, work: Path
) -> Plan:
    """Batches of at most `tokens` tokens, or of as many as fit into the memory of every rank.

    The number is stored in `work`, so that a resumed run has the same batches.

    InputError: the longest row does not fit by itself.
    """
    asked, record = tokens, work / MEMORY_FILE
    tokens = group.from_main(lambda: read_json(record)["tokens"] if record.exists() else asked)
    while True:
        batches = guide.plan(tokens, rows)
        missing = group.from_main(partial(unfinished, batches, work))
        share = group.share(missing)
        first = [guide.attempt(batches[number]) for number in share[:1]]
        found = [one for one in first if one is not None]
        if all(group.gather([len(found) == len(first)])):
            break
        tokens = fewer(tokens, rows)
    if tokens < asked and group.is_main:
        note_tokens(tokens)
        write_json(record, {"tokens": tokens})
    return Plan(tokens, batches, missing, share, found)


def fewer(tokens: int, rows: Sequence[Example]) -> int:
    """Half the tokens of a batch; InputError where that would make no batch smaller."""
    longest = max(len(example.input_ids) for example in rows)
    if tokens <= longest:
        raise InputError(
            f"--max-length: the memory does not hold a row of {longest} tokens; lower it, or use "
            "a larger device"
        )
    return tokens // 2


def note_tokens(tokens: int) -> None:
    """Prints a note that larger batches do not fit."""
    error_console.print(
        f"note: batches of at most {tokens} tokens; the memory does not hold larger ones",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


@torch.no_grad()
def annotate_batch(model: Any, batch: Batch, temperature: float = 1.0) -> Tensor:
    """Confidence and `GuideStatistics` of the batch's N targets, float32 [4, N]."""
    head = lm_head(model)
    hidden = last_hidden_state(model, **batch.inputs).flatten(0, 1)  # [B · T, D]
    confidence, stats = token_confidence(
        hidden.index_select(0, batch.predicts).to(head.weight.dtype),
        head.weight,
        batch.targets,
        temperature=temperature,
        stats=STATISTICS,
        **head.options(),
    )
    found = [confidence, *(getattr(stats, name) for name in STATISTICS)]
    return torch.stack([values.float() for values in found])
