"""Relative accuracy of confident tokens and of logits with a large common offset, in Triton."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from ce_cases import norm_error
from ce_problems import BF16, FP16, FP32, ce, problem_of
from torch import Tensor

from gift_kernels import reference
from gift_kernels.linear_ce.types import Problem

DTYPES = pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
WANTED = pytest.mark.parametrize("wanted", ["statistics", "frozen", "trainable"])
COLUMNS = 300  # three slices in the interpreter


def flags(wanted: str) -> dict[str, bool]:
    trainable = wanted == "trainable"
    return {"want_dh": wanted != "statistics", "want_dw": trainable, "want_db": trainable}


def truth(problem: Problem) -> dict[str, Tensor]:
    """Statistics, dH and dW [V, D] in float64, with nll as a sum of positive terms."""
    hidden, head = problem.head.hidden.double(), problem.head.weight.double()
    z = hidden @ head.T
    rows = torch.arange(len(z), device=z.device)
    gap = z - z[rows, problem.target][:, None]
    gap[rows, problem.target] = -torch.inf
    others = torch.exp(gap)
    nll = torch.log1p(others.sum(1))
    p = others / (1 + others.sum(1, keepdim=True))
    entropy = nll - torch.where(p > 0, p * gap, 0).sum(1)
    p[rows, problem.target] = -p.sum(1)
    return {"nll": nll, "entropy": entropy, "dh": p @ head, "dw": p.T @ hidden}


def row_errors(value: Tensor, true: Tensor) -> Tensor:
    """|value − true| / |true| of each row."""
    difference = (value.double() - true).reshape(len(true), -1).norm(dim=1)
    return difference / true.reshape(len(true), -1).norm(dim=1)


@DTYPES
@WANTED
@pytest.mark.parametrize("offset", [0.0, 1e2, 1e4, 1e6])
def test_an_offset_of_all_logits_changes_nothing(
    offset: float, wanted: str, dtype: torch.dtype, device: str
) -> None:
    """Logits offset + integer, each exact in float32: 256 · 2^k carries the offset in any dtype."""
    count = 40
    whole, size = offset, 8
    hidden, head = torch.zeros(count, size), torch.zeros(COLUMNS, size)
    columns = torch.arange(COLUMNS)
    head[:, 0], head[:, 1] = (columns % 7).float(), (columns % 5).float()
    hidden[:, 0], hidden[:, 1] = (torch.arange(count) % 3).float(), -1.0
    for d in range(2, size):  # the offset as a sum of products that every dtype holds
        part = float(torch.tensor(whole).to(BF16))
        left = min(part, 128.0)
        hidden[:, d] = left
        head[:, d] = float(torch.tensor(part / 128.0 if part > 128 else 1.0).to(BF16))
        whole -= left * float(head[0, d])
    assert whole == 0
    target = columns[:count] * 7 % COLUMNS
    problem = problem_of(
        hidden.to(device, dtype), head.to(device, dtype), target.to(device), **flags(wanted)
    )
    found, true = ce.solve(problem), truth(problem)
    assert row_errors(found.nll, true["nll"]).max() < 1e-6
    assert row_errors(found.entropy, true["entropy"]).max() < 1e-6
    # The other columns of dH and dW: dlogits sum to 0 but for their rounding, times the offset.
    rounding = {BF16: 3e-3, FP16: 4e-4, FP32: 3e-6}[dtype]
    if problem.want_dw:
        assert norm_error(found.dw[:, :2], true["dw"][:, :2]) < rounding
    if problem.want_dh:
        assert norm_error(found.dh[:, :2], true["dh"][:, :2]) < rounding


@DTYPES
@WANTED
@pytest.mark.parametrize("offset", [0.0, -96.0, 1000.0])
def test_confident_tokens_keep_their_relative_accuracy(
    offset: float, wanted: str, dtype: torch.dtype, device: str
) -> None:
    """nll of 1e-3 to 1e-12, from others that are equal, and from others that differ."""
    nll = torch.logspace(-3, -12, 37, dtype=torch.float64)
    # Gaps that are multiples of 1/8 and so exact in every dtype.
    gaps = torch.round(torch.log((COLUMNS - 1) / nll) * 8) / 8
    count = len(gaps)
    target = torch.arange(count) * 8 % COLUMNS
    # hidden has the gap and 1; the head, at each row's target in a column of its own.
    size = count + 8
    hidden, head = torch.zeros(count, size), torch.zeros(COLUMNS, size)
    hidden[range(count), range(count)] = gaps.float()
    head[target, range(count)] = 1
    hidden[:, count], head[:, count] = 1, offset
    for spread in (0.0, 0.25):
        hidden[:, count + 1], head[:, count + 1] = -spread, (torch.arange(COLUMNS) % 11).float()
        problem = problem_of(
            hidden.to(device, dtype), head.to(device, dtype), target.to(device), **flags(wanted)
        )
        found, true = ce.solve(problem), truth(problem)
        assert true["nll"].min() < 1e-11 and true["nll"].max() > 1e-4
        assert row_errors(found.nll, true["nll"]).max() < 1e-6
        assert row_errors(found.entropy, true["entropy"]).max() < 1e-6
        if problem.want_dh and dtype != FP16:  # E of 2^−40 is 0 in float16
            rounding = {BF16: 3e-3, FP32: 3e-6}[dtype]
            # Columns without cancellation: dlogits sum to 0 but for their rounding.
            assert row_errors(found.dh[:, :count], true["dh"][:, :count]).max() < rounding


def test_a_difference_that_float32_cannot_hold(device: str) -> None:
    """Logits with all of their bits: target minus the others would be rounded by 1e-6."""
    target_logit = torch.linspace(14, 27, 50).nextafter(torch.tensor(99.0))
    head = torch.full((COLUMNS, 8), -0.0)
    head[:, 0], head[:, 1] = -0.71828183, 0
    head[7, :2] = torch.tensor([0.0, 1.0])
    hidden = torch.ones(50, 8)
    hidden[:, 1] = target_logit
    problem = problem_of(hidden.to(device), head.to(device), torch.full((50,), 7, device=device))
    found, true = ce.solve(problem), truth(problem)
    assert row_errors(found.nll, true["nll"]).max() < 1e-6


def test_self_and_guide_weights_of_large_logits(device: str) -> None:
    """q, and with it the weights, is as exact at an offset of 1e6 as without."""
    generator = torch.Generator().manual_seed(0)
    head = torch.randint(8, (COLUMNS, 8), generator=generator).float()
    hidden = torch.randint(3, (30, 8), generator=generator).float()
    hidden[:, 0], head[:, 0] = 1000, 1000
    problem = problem_of(
        hidden.to(device), head.to(device), torch.arange(30, device=device), self_weight=True
    )
    true = torch.exp(-truth(problem)["nll"])
    changes: list[dict[str, Any]] = [{}, {"self_weight": False, "guide": problem.head}]
    for change in changes:
        found = ce.solve(problem._replace(**change))
        # e^−nll turns an absolute error of nll into a relative one.
        assert ((found.weight - true).abs() / true).max() < 3e-6
        assert norm_error(found.nll, -true.log()) < 1e-6


@pytest.mark.parametrize("logits", [[36.0, 20.0], [1e6, 1e6 - 16], [-1e6, -1e6 - 16]])
def test_the_logits_of_one_confident_token(logits: list[float], device: str) -> None:
    head = torch.tensor(logits, device=device)[:, None]
    hidden, target = (
        torch.ones(1, 1, device=device),
        torch.zeros(1, dtype=torch.long, device=device),
    )
    found = ce.solve(problem_of(hidden, head, target))
    assert float(found.nll) == pytest.approx(math.log1p(math.exp(-16)), rel=1e-6)
    stats = reference.token_stats((hidden @ head.T).double(), target)
    assert found.lse == stats.lse.float()
