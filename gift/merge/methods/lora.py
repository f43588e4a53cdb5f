"""θ_I + Σ τ: the adapters' changes on top of the instruct model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gift.merge.method import Method, Rows
from gift.merge.methods.task_arithmetic import weighted_sum

if TYPE_CHECKING:
    from torch import Tensor

    from gift.config.merge import MergeOptions


def merge(rows: Rows, options: MergeOptions) -> Tensor:
    """For tensors that an adapter holds in full; products B A are added by `LoraTransform`."""
    return weighted_sum(rows.instruct, rows.tasks, 1.0)


METHOD = Method(
    name="lora",
    about="Adds the adapter's change to the instruct model.",
    formula="instruct + Σ scale · BA",
    source="GIFT, arXiv 2605.01256; Shadow-FT, arXiv 2505.12716",
    merge=merge,
    takes_dora=True,
    sum_weight=lambda options, adapters, has_base: 1.0,
)
