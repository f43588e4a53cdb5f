"""Batches of rows that fit into memory, and the guide's confidences in their targets.

If a batch does not fit, all rows are computed in batches of half the tokens, and so on down to
single rows. Results are bitwise those of the smaller `--batch-tokens`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gift.confidence_store import STATISTICS
from gift.console import error_console
from gift.data.batches import Batch, make_batch, plan_batches, size_of
from gift.data.encoding import Example
from gift.errors import InputError
from gift.models.head import last_hidden_state, lm_head
from gift.models.memory import attempt
from gift_kernels import token_confidence


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
    """All batches, of at most `tokens` tokens, and the numbers of those that are not finished."""

    tokens: int
    batches: list[list[Example]]
    missing: Sequence[int]


def fewer(tokens: int, too_large: Iterable[Sequence[Example]]) -> int:
    """Half the tokens of batches that do not fit; InputError where one of them is a single row."""
    for rows in too_large:
        if len(rows) == 1:
            raise InputError(
                f"--max-length: the memory does not hold a row of {len(rows[0].input_ids)} tokens; "
                "lower it, or use a larger device"
            )
    return tokens // 2


def note_tokens(tokens: int, lost: int = 0) -> None:
    """Prints a note that larger batches do not fit, and how many finished ones are lost by it."""
    again = f"; finished ones that are computed again: {lost}" if lost else ""
    error_console.print(
        f"note: batches of at most {tokens} tokens; the memory does not hold larger ones{again}",
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
