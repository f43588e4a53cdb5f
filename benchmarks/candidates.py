"""Alternative tile and chunk sizes of the Triton cross-entropy, measured to choose the defaults.

The default of each table is a candidate too, so one run compares all.
"""

from collections.abc import Callable
from typing import Any
from unittest import mock

from torch import Tensor

from benchmarks.cases import CECase
from benchmarks.data import CEInputs
from benchmarks.providers import CE_OPS, Provider, gift_ce, needs_triton
from gift_kernels.linear_ce.triton import forward as triton_ce
from gift_kernels.linear_ce.triton.chunk_size import Plan, Shape, default_plan
from gift_kernels.linear_ce.triton.tiles import (
    DW_TILES,
    LOGIT_TILES,
    NARROW_LOGIT_TILES,
    PRODUCT_TILES,
    tiles_for,
)
from gift_kernels.linear_ce.types import LinearInputs


def candidates(case: CECase, inputs: CEInputs) -> list[Provider]:
    """Plans that each differ from the default in one setting, the default first."""
    head = LinearInputs(inputs.hidden, inputs.weight, None, 1.0, case.shape.softcap)
    default = default_plan(head)
    changes: dict[str, dict[str, Any]] = {"default": {}}
    tables = {"logit_tiles": (LOGIT_TILES, NARROW_LOGIT_TILES), "product_tiles": (PRODUCT_TILES,)}
    if case.trainable:
        tables["dw_tiles"] = (DW_TILES,)
    for field, known in tables.items():
        for table in known:
            for tiles in tiles_for(table, default.machine, case.torch_dtype):
                if tiles != getattr(default, field):
                    changes[f"{field} {'-'.join(map(str, tiles))}"] = {field: tiles}
    field, factors = "chunk", [(1, 0.5), (1, 2), (2, 0.5), (4, 0.25), (0.5, 2), (0.25, 4)]
    if case.trainable:  # as many rows as dW can keep, else there is one product more
        field, factors = "kept", [(1, 0.25), (1, 0.5), (1, 2)]
    shape: Shape = getattr(default, field)
    for rows, columns in factors:
        # Whole tiles: 128 rows and 256 columns the largest.
        changed = Shape(
            int(shape.rows * rows) // 128 * 128, int(shape.columns * columns) // 256 * 256
        )
        if min(changed) > 0:
            changes[f"{changed.rows} rows, {changed.columns} columns"] = {field: changed}
    if default.splits > 1:
        for splits in sorted({1, default.splits // 2, 2 * default.splits}):
            changes[f"columns of dH in {splits} parts"] = {"splits": splits}
    replaced = {name: {"default_plan": _planned(change)} for name, change in changes.items()}
    if case.weighting == "guide":
        replaced["the guide in launches of its own"] = {"shares_launches": lambda problem: False}
    return [
        Provider(name, "candidate", CE_OPS, _with(functions), skip=needs_triton)
        for name, functions in replaced.items()
    ]


def _planned(change: dict[str, Any]) -> Callable[..., Plan]:
    return lambda *heads, **options: default_plan(*heads, **options)._replace(**change)


def _with(functions: dict[str, Any]) -> Callable[[CECase, CEInputs], Callable[[], Tensor]]:
    """Our Triton implementation with other functions in its module `forward`."""

    def prepare(case: CECase, inputs: CEInputs) -> Callable[[], Tensor]:
        call = gift_ce("triton")(case, inputs)

        def run() -> Tensor:
            with mock.patch.multiple(triton_ce, **functions):
                return call()

        return run

    return prepare
