"""Every address of the cross-entropy's launches, with the tiles of GPUs too; and their products.

In the interpreter only: what is checked here is what a GPU would not tell.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from ce_cases import CASE, Case, generate, judge, one_tile_chunks, outcome
from ce_problems import BF16, random_problem
from launches import checked_launches
from triton import knobs
from triton.runtime import interpreter

from gift_kernels import TokenStats, reference, weighted_ce
from gift_kernels.linear_ce.triton.tiles import Machine

ce: Any = importlib.import_module("gift_kernels.linear_ce.triton.forward")
plans: Any = importlib.import_module("gift_kernels.linear_ce.triton.chunk_size")
pytestmark = pytest.mark.skipif(
    not knobs.runtime.interpret, reason="only the interpreter shows addresses"
)


@triton.jit
def _copy_kernel(source_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(source_ptr + offs, mask=offs < n, other=0), mask=offs < n)


@triton.jit
def _number_kernel(out_ptr):
    tl.store(out_ptr, tl.program_id(0))


def test_the_check_sees_what_it_is_for() -> None:
    source = torch.arange(17.0)
    with checked_launches() as names:
        _copy_kernel[(2,)](source, torch.empty(16), 16, BLOCK=8)
        assert names == ["_copy_kernel"]
        with pytest.raises(Exception, match="load outside all tensors by program"):
            _copy_kernel[(2,)](source[:5], torch.empty(16), 16, BLOCK=8)
        with pytest.raises(Exception, match="store outside all tensors by program"):
            _copy_kernel[(2,)](source, torch.empty(5), 16, BLOCK=8)
        with pytest.raises(AssertionError, match="two programs store to one address"):
            _number_kernel[(2,)](torch.empty(1))
        with pytest.raises(AssertionError, match="a program loads what another one stores"):
            _copy_kernel[(2,)](source[1:], source[:-1], 16, BLOCK=8)


@pytest.mark.parametrize("arch", [0, 80, 90])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["guide-all-options", "weights-none", "head-options", "self"])
def test_programs_stay_inside_tensors_and_out_of_each_others_way(
    name: str, dtype: torch.dtype, arch: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several chunks of rows and columns, none of them full; results as everywhere."""
    case = Case(**{**vars(CASE[name]), "batch": (150,), "hidden_size": 40, "vocab_size": 300})
    if arch:
        monkeypatch.setattr(plans, "machine_of", lambda device: Machine(arch, 3))
    plan = ce.default_plan
    monkeypatch.setattr(
        ce, "default_plan", lambda *a, **options: one_tile_chunks(plan(*a, **options))
    )

    def ours(**arguments: Any) -> Any:
        return weighted_ce(**arguments, impl="triton", stats=TokenStats._fields)

    values = generate(case, dtype)
    with checked_launches() as names:
        found = outcome(ours, case, values, dtype, device)
    assert {"_gather_kernel", "_merge_kernel", "_dh_kernel", "_dw_kernel"} < set(names)
    truth, naive, single = (
        outcome(reference.weighted_ce, case, values, wanted, device)
        for wanted in (torch.float64, dtype, torch.float32)
    )
    judge(found, truth, naive, single, dtype)


def test_rows_that_do_not_count_are_never_multiplied(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many tiles are made for 64 rows of which half are ignored as for the other half alone."""
    calls = []
    dot = interpreter.InterpreterBuilder.create_dot
    monkeypatch.setattr(
        interpreter.InterpreterBuilder, "create_dot", lambda *args: calls.append(1) or dot(*args)
    )
    problem = random_problem(64, 32, 130, BF16, device, row_weight=None)
    counts = []
    for ignored in (0, 32):
        target = torch.full((64,), 3)
        target[torch.randperm(64)[:ignored]] = -100
        calls.clear()
        ce.solve(problem._replace(target=target))
        counts.append(len(calls))
    assert counts[0] == 2 * counts[1] > 0, counts
