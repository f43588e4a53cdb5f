"""TIES' election on task vectors that DARE dropped entries from; nothing is trimmed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gift.merge.method import Method, Rows
from gift.merge.methods.dare import dropped_vectors
from gift.merge.methods.ties import elected_mean

if TYPE_CHECKING:
    from torch import Tensor

    from gift.config.merge import MergeOptions


def merge(rows: Rows, options: MergeOptions) -> Tensor:
    vectors = dropped_vectors(rows, options)
    return rows.origin + elected_mean(vectors, [0.0] * len(vectors), options.task_weight)


METHOD = Method(
    name="dare-ties",
    about="As ties, of changes that dare dropped from; the same as dare with one change.",
    formula="TIES' election on vectors that DARE dropped from",
    source="DARE, arXiv 2311.03099",
    merge=merge,
    settings=("task_weight", "drop_rate", "dare_seed"),
)
