"""θ_B + α Σ τ + β (θ_I − θ_B) (RE-Adapt)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gift.merge.method import Method, Rows

if TYPE_CHECKING:
    from torch import Tensor

    from gift.config.merge import MergeOptions


def merge(rows: Rows, options: MergeOptions) -> Tensor:
    assert rows.base is not None
    return add_instruct_part(rows, rows.instruct - rows.base, options)


def add_instruct_part(rows: Rows, part: Tensor, options: MergeOptions) -> Tensor:
    """θ_B + α Σ τ + β · `part`, all or some of θ_I − θ_B."""
    import torch

    assert rows.base is not None
    task = torch.stack(list(rows.tasks)).sum(0)
    return rows.base + options.task_weight * task + options.instruct_weight * part


METHOD = Method(
    name="re-adapt",
    about="Adds to the base model the adapter's change and, times a factor, instruct - base.",
    formula="base + α τ + β (instruct - base)",
    source="RE-Adapt, arXiv 2405.15007",
    merge=merge,
    settings=("task_weight", "instruct_weight"),
    needs_base=True,
    sum_weight=lambda options, adapters, has_base: (
        options.task_weight if options.instruct_weight == 1 else None
    ),
    note=lambda options, vectors: (
        "re-adapt with an instruct weight of 1 is instruct + α τ"
        if options.instruct_weight == 1
        else ""
    ),
)
