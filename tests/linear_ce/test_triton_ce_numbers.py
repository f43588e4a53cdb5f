"""The Triton cross-entropy where numbers are extreme: large, tiny, infinite, NaN."""

from __future__ import annotations

import pytest
import torch
from ce_cases import norm_error
from ce_problems import (
    BF16,
    FP16,
    FP32,
    NAN,
    ce,
    check,
    plans,
    problem_of,
    random_problem,
    tensors,
    truth_of,
)

from gift_kernels import reference


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("want_dw", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("falling", [False, True], ids=["rising", "rising-and-falling"])
def test_references_that_the_first_columns_could_not_foresee(
    falling: bool, want_dw: bool, dtype: torch.dtype, device: str
) -> None:
    """Logits that rise by 30 to 120 from slice to slice, and targets far below or far above."""
    count, size, vocab_size = 40, 16, 600
    generator = torch.Generator().manual_seed(0)
    steps = torch.arange(vocab_size) // 64
    head = torch.randn(vocab_size, size, generator=generator) * 0.2
    head[:, 0] = steps * 30.0
    hidden = torch.randn(count, size, generator=generator)
    hidden[:, 0] = torch.linspace(0 if falling else 2, 4, count)
    if falling:
        hidden[::6, 0] *= -1
    target = torch.randint(vocab_size, (count,), generator=generator)
    target[::3] = vocab_size - 1
    problem = problem_of(
        hidden.to(device, dtype), head.to(device, dtype), target.to(device), want_dw=want_dw
    )
    plan = plans.default_plan(problem.head)
    one = type(plan.chunk)(plan.chunk.rows, 1024)
    for sizes in ({}, {"chunk": one, "kept": one, "again": one}):
        # float32 itself knows logits of 1000 to 6e-5.
        check(problem._replace(want_db=want_dw), plan._replace(**sizes), precision=30)


def test_a_target_outside_the_vocabulary_spoils_its_row_only(device: str) -> None:
    problem = random_problem(40, 24, 130, BF16, device, want_dw=False, want_db=False)
    expected = ce.solve(problem._replace(row_weight=None))
    for wrong in (130, 10**9, -7):
        target = problem.target.clone()
        target[6] = wrong
        found = ce.solve(problem._replace(target=target, row_weight=None))
        assert found.nll[6].isnan() and found.dh[6].isnan().all() and found.loss.isnan()
        others = torch.arange(40, device=device) != 6
        for name in ("nll", "lse", "entropy", "dh"):
            assert torch.equal(getattr(found, name)[others], getattr(expected, name)[others])


def test_a_loss_near_0_keeps_its_relative_accuracy(device: str) -> None:
    """Others have 1e-3 to 1e-12 of the probability: a difference of logarithms would lose it."""
    head = torch.zeros(50, 16, device=device)
    head[7, 0] = 1.0
    hidden = torch.zeros(40, 16, device=device)
    hidden[:, 0] = torch.linspace(8, 30, 40)
    target = torch.full((40,), 7, device=device)
    found = ce.solve(problem_of(hidden, head, target, want_dw=False, want_db=False))
    expected = torch.log1p(49 * torch.exp(-hidden[:, 0].double()))
    # The logarithm of the others' share, up to 32, is known to 2 roundings of float32.
    assert ((found.nll - expected).abs() / expected).max() < 2 * 32 * 2**-24
    true_dh = (torch.exp(-expected) - 1)[:, None] * head[7].double()
    assert ((found.dh - true_dh).norm(dim=1) / true_dh.norm(dim=1)).max() < 2 * 32 * 2**-24


@pytest.mark.parametrize("default", [BF16, torch.float64], ids=str)
def test_the_default_dtype_of_pytorch_changes_nothing(default: torch.dtype, device: str) -> None:
    problem = random_problem(40, 24, 130, BF16, device)
    expected = ce.solve(problem)
    torch.set_default_dtype(default)
    try:
        found = ce.solve(problem)
    finally:
        torch.set_default_dtype(FP32)
    for name, value in tensors(found).items():
        assert value.dtype == getattr(expected, name).dtype, name
        assert torch.equal(value, getattr(expected, name)), name


@pytest.mark.parametrize("size", [8, 64], ids=["multiplied-again", "kept"])
def test_rows_of_weight_0_are_shut_out_of_dw_where_the_head_itself_is_nan(
    size: int, device: str
) -> None:
    """The last tile is completed by zeros, which meet the NaN too."""
    problem = random_problem(5, size, 130, BF16, device, keep_zero_rows=True)
    problem.head.weight[7] = NAN
    found = ce.solve(problem._replace(row_weight=torch.zeros(5, device=device)))
    assert not found.dw.any() and not found.db.any() and found.loss == 0


@pytest.mark.parametrize("offset", [10.0, 1000.0])
@pytest.mark.parametrize("size", [96, 8], ids=["kept", "multiplied-again"])
def test_a_large_offset_of_all_logits_costs_no_more_than_in_plain_pytorch(
    size: int, offset: float, device: str
) -> None:
    """Probabilities are not made of the log-sum-exp, whose rounding grows with the offset."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, size, generator=generator)
    head = torch.randn(600, size, generator=generator) * 0.1
    hidden[:, 0] = head[:, 0] = offset**0.5
    target = torch.randint(600, (40,), generator=generator)
    problem = problem_of(hidden.to(device), head.to(device), target.to(device), want_db=False)
    true = truth_of(problem)
    logits = (problem.head.hidden @ problem.head.weight.T).requires_grad_()
    (gradient,) = torch.autograd.grad(
        reference.token_stats(logits, problem.target).nll.sum(), logits
    )
    plain = {"dh": gradient @ problem.head.weight, "dw": gradient.T @ problem.head.hidden}
    for want_dw in (False, True):
        found = ce.solve(problem._replace(want_dw=want_dw))
        for name in ("dh", "dw") if want_dw else ("dh",):
            error = norm_error(getattr(found, name), true[name])
            budget = max(2 * norm_error(plain[name], true[name]), 3e-6)
            assert error <= budget, f"{name}: error {error:.1e}, budget {budget:.1e}"


@pytest.mark.parametrize("size", [8, 32], ids=["multiplied-again", "kept"])
@pytest.mark.parametrize("weight", [1.0, 1e6, 1e-9])
def test_rare_tokens_keep_their_dw_in_float16(weight: float, size: int, device: str) -> None:
    """Their probabilities are 1e-7, and weights may exceed what float16 can hold."""
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(300, size, generator=generator) * 0.05
    head[:, 0] = (torch.arange(300) < 20).float()
    hidden = torch.randn(40, size, generator=generator)
    hidden[:, 0] = 16
    target = torch.randint(20, (40,), generator=generator)
    problem = problem_of(hidden.to(device, FP16), head.to(device, FP16), target.to(device))
    problem = problem._replace(row_weight=torch.full((40,), weight, device=device))
    found, true = ce.solve(problem), truth_of(problem)
    assert norm_error(found.dw[20:], true["dw"][20:].detach()) < 1e-3
    assert norm_error(found.dw, true["dw"].detach()) < 1e-3
