"""Problems for the Triton implementation alone, their truth in float64, and the comparison."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from ce_cases import model_side, norm_error, poisoned_memory
from torch import Tensor

from gift_kernels import reference
from gift_kernels.linear_ce.types import LinearInputs, Problem, WeightTransform

ce: Any = importlib.import_module("gift_kernels.linear_ce.triton.forward")
plans: Any = importlib.import_module("gift_kernels.linear_ce.triton.chunk_size")
NAN = float("nan")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def problem_of(hidden: Tensor, head: Tensor, target: Tensor, **changes: Any) -> Problem:
    """Everything trainable, weights 1, no options."""
    return Problem(
        head=LinearInputs(hidden, head, None, 1.0, None),
        guide=None,
        target=target,
        row_weight=None,
        temperature=1.0,
        self_weight=False,
        transform=WeightTransform(1.0, 0.0, 0.0),
        ignore_index=-100,
        want_dh=True,
        want_dw=True,
        want_db=True,
        rowwise=False,
        with_stats=True,
        with_entropy=True,
        keep_zero_rows=False,
        shard=None,
        chunk_size=None,
    )._replace(**changes)


def random_problem(
    count: int, size: int, vocab_size: int, dtype: torch.dtype, device: str, **changes: Any
) -> Problem:
    generator = torch.Generator().manual_seed(3)
    target = torch.randint(vocab_size, (count,), generator=generator)
    hidden, head = model_side(target, size, vocab_size, False, generator)
    weight = torch.rand(count, generator=generator)
    weight[::7] = 0
    target[::5] = -100
    values = {"row_weight": weight.to(device)} | changes
    return problem_of(hidden.to(device, dtype), head.to(device, dtype), target.to(device), **values)


def truth_of(problem: Problem) -> dict[str, Tensor]:
    """Statistics and gradients of a problem without options, in float64."""
    hidden = problem.head.hidden.double().requires_grad_()
    head = problem.head.weight.double().requires_grad_()
    loss, stats = reference.weighted_ce(
        hidden, head, problem.target, problem.row_weight, reduction="sum"
    )
    rows, _ = reference.weighted_ce(hidden, head, problem.target, reduction="none")
    (dh,) = torch.autograd.grad(rows.sum(), hidden, retain_graph=True)
    (dw,) = torch.autograd.grad(loss, head)
    counted = stats.weight != 0
    dh = torch.where(counted[:, None], dh, 0)
    return {"loss": loss, "nll": torch.where(counted, stats.nll, 0), "dh": dh, "dw": dw}


def tensors(result: Any) -> dict[str, Tensor]:
    """What was asked for, by name."""
    return {name: value for name, value in result._asdict().items() if value is not None}


def check(problem: Problem, plan: Any = None, precision: float = 1.0) -> Any:
    """Solves the problem in poisoned memory and compares it with the truth."""
    with poisoned_memory():
        found = ce.solve(problem, plan)
    rounding = {BF16: 3e-3, FP16: 4e-4, FP32: 3e-6}[problem.head.hidden.dtype]
    for name, true in truth_of(problem).items():
        value = getattr(found, name)
        if value is not None and value.numel() > 0:
            allowed = rounding if name in ("dh", "dw") else 3e-6
            allowed = max(allowed, 3e-6 * precision)
            error = norm_error(value, true.detach())
            assert error <= allowed, f"{name}: error {error:.1e}, allowed {allowed:.1e}"
    return found
