"""Properties that hold for every input: random sizes, strides, masks, weights and logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from ce_cases import IMPLS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gift_kernels import TokenStats, reference, token_confidence, weighted_ce

every_impl = pytest.mark.parametrize("impl", IMPLS)
# The interpreter takes seconds for what a GPU does in milliseconds.
COUNT = 25 if torch.cuda.is_available() else 8
examples = settings(max_examples=COUNT, deadline=None, derandomize=True, database=None)
# Just inside and just outside of tiles of every likely size.
EDGES = [0, 1, 15, 16, 31, 32, 63, 64, 127, 128, 255]
STATISTICS = ("nll", "confidence", "lse", "entropy", "weight")
WEIGHTS = [0.0, 1.0, 0.5, 1e-3, 1e-12, 1e-30, 1e3, 1e20]


@dataclass(frozen=True)
class Problem:
    """float32 tensors [N, D], [V, D], [V], [N], [N] and the size of the logits."""

    hidden: Tensor
    head: Tensor
    bias: Tensor
    target: Tensor
    token_weight: Tensor
    level: float

    def arguments(self) -> dict[str, Any]:
        """All arguments of `weighted_ce` that every property leaves alone; leaves where trained."""
        return {
            "hidden": self.hidden.detach().requires_grad_(),
            "lm_head_weight": self.head.detach().requires_grad_(),
            "bias": self.bias.detach().requires_grad_(),
            "target": self.target,
            "token_weight": self.token_weight,
        }

    @property
    def precision(self) -> float:
        """Absolute error that float32 sums of D products may leave in a logit."""
        terms = self.hidden.abs().double() @ self.head.abs().double().T + self.bias.abs()
        largest = float(terms.max()) if terms.numel() else 0.0
        return 64 * torch.finfo(torch.float32).eps * (1 + largest)


@st.composite
def problems(
    draw: st.DrawFn, levels: tuple[float, ...] = (0.1, 5.0, 1e4), smallest: int = 0
) -> Problem:
    """Random problems; the numbers come from a drawn seed, all else is drawn."""
    count = draw(st.integers(smallest, 40) | st.sampled_from([64, 65]), label="rows")
    size = draw(st.integers(1, 40), label="hidden size")
    vocab_size = draw(st.integers(1, 140) | st.sampled_from([255, 256, 257]), label="vocabulary")
    level = draw(st.sampled_from(levels), label="size of the logits")
    stride = draw(st.integers(1, 3), label="stride")
    transposed = draw(st.booleans(), label="head transposed")
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32), label="seed"))
    edges = [edge for edge in [*EDGES, vocab_size - 1] if edge < vocab_size]
    tokens = st.sampled_from(edges) | st.integers(0, vocab_size - 1) | st.just(-100)
    target = draw(st.lists(tokens, min_size=count, max_size=count), label="targets")
    weights = st.lists(st.sampled_from(WEIGHTS), min_size=count, max_size=count)

    hidden = torch.randn(count, size * stride, generator=generator)[:, ::stride]
    head = torch.randn(vocab_size, size, generator=generator)
    logits = hidden @ head.T
    if logits.numel():
        head = head * level / float(logits.abs().max())
    return Problem(
        hidden=hidden,
        head=head.T.contiguous().T if transposed else head,
        bias=torch.randn(vocab_size, generator=generator) * min(level, 3),
        target=torch.tensor(target, dtype=torch.int64),
        token_weight=torch.tensor(draw(weights, label="weights")),
        level=level,
    )


def solve(
    arguments: dict[str, Any], upstream: float, impl: str, device: str, **options: Any
) -> tuple[dict[str, Tensor], TokenStats]:
    """Loss (sum, unless told) and gradients by name, and statistics, all on the CPU in float64."""
    placed = {
        name: value.detach().to(device).requires_grad_(value.requires_grad)
        for name, value in arguments.items()
    }
    options = {"reduction": "sum", "impl": impl, **options}
    loss, stats = weighted_ce(**placed, stats=TokenStats._fields, **options)
    loss.backward(torch.tensor(upstream, dtype=loss.dtype, device=loss.device).expand(loss.shape))
    found = {"loss": loss.detach()}
    found |= {name: v.grad for name, v in placed.items() if v.requires_grad}
    wide = {name: value.cpu().double() for name, value in found.items()}
    return wide, TokenStats(*(value.cpu() for value in stats if value is not None))


def assert_within(found: Tensor, true: Tensor, allowed: Tensor | float, name: str) -> None:
    # Numbers below this are no longer held to full precision by float32.
    allowed = torch.as_tensor(allowed, dtype=torch.float64) + 1e-36
    excess = (found.double() - true).abs() - allowed
    worst = float(excess.max()) if excess.numel() else 0.0
    assert worst <= 0, f"{name}: exceeds its tolerance by {worst:.2e}\n{found}\n{true}"
    assert found.isfinite().all(), f"{name}: not finite"


@every_impl
@examples
@given(problem=problems(), upstream=st.sampled_from([1.0, -0.5, 1e-3]), data=st.data())
def test_whatever_the_input_the_specification_is_met(
    problem: Problem, upstream: float, data: st.DataObject, impl: str, device: str
) -> None:
    reduction = data.draw(st.sampled_from(["none", "sum", "mean", "weighted_mean"]))
    arguments = problem.arguments()
    found, stats = solve(arguments, upstream, impl, device, reduction=reduction, chunk_size=7)
    wide = {
        name: value.detach().double().requires_grad_(value.requires_grad)
        if value.is_floating_point()
        else value
        for name, value in arguments.items()
    }
    loss, true = reference.weighted_ce(**wide, reduction=reduction)
    loss.backward(torch.full_like(loss, upstream))

    # An error e in the logits moves nll by up to 2 e and probabilities by as much of themselves.
    error = 2 * problem.precision
    weight = wide["token_weight"] * (problem.target != -100)
    divisor = 1.0
    if reduction == "mean":
        divisor = max(1, int((problem.target != -100).sum()))
    if reduction == "weighted_mean":
        divisor = float(weight.sum()) or 1.0
    factor = abs(upstream) * weight / divisor
    assert_within(stats.nll, true.nll, error, "nll")
    assert_within(stats.lse, true.lse, error, "lse")
    assert_within(stats.confidence, true.confidence, error, "confidence")
    assert_within(stats.entropy, true.entropy, error * (1 + 2 * problem.level), "entropy")
    rows = factor / (abs(upstream) or 1) * (error + 1e-6 * true.nll)
    allowed_loss = rows if reduction == "none" else float(rows.sum())
    assert_within(found["loss"], loss.detach(), allowed_loss, "loss")
    # A row's gradient is its factor times a mean of head rows minus one of them.
    row_size = 2 * wide["lm_head_weight"].detach().abs().amax(0, keepdim=True)
    hidden_size = wide["hidden"].detach().abs()
    for name, allowed in (
        ("hidden", error * factor.unsqueeze(1) * row_size),
        ("lm_head_weight", 2 * error * (factor.unsqueeze(1) * hidden_size).sum(0)),
        ("bias", 2 * error * factor.sum()),
    ):
        gradient = wide[name].grad
        assert gradient is not None
        assert_within(found[name], gradient, allowed, f"d_{name}")


@every_impl
@examples
@given(problem=problems((0.1, 5.0)), data=st.data())
def test_a_permutation_of_the_rows_permutes_the_results(
    problem: Problem, data: st.DataObject, impl: str, device: str
) -> None:
    order = torch.tensor(data.draw(st.permutations(range(len(problem.target)))), dtype=torch.int64)
    arguments = problem.arguments()
    shuffled = {
        name: value[order].detach().requires_grad_(value.requires_grad)
        if name in ("hidden", "target", "token_weight")
        else value
        for name, value in arguments.items()
    }
    found, stats = solve(arguments, 1.0, impl, device)
    permuted, permuted_stats = solve(shuffled, 1.0, impl, device)
    for name in STATISTICS:
        value = getattr(stats, name)[order]
        torch.testing.assert_close(getattr(permuted_stats, name), value, rtol=1e-4, atol=1e-5)
    close(permuted["hidden"], found["hidden"][order])
    for name in ("loss", "lm_head_weight", "bias"):
        close(permuted[name], found[name])


def close(value: Tensor, true: Tensor, error: float = 1e-5) -> None:
    """Equal up to rounding, relative to the largest value."""
    size = float(true.abs().max()) if true.numel() else 0.0
    torch.testing.assert_close(value, true, rtol=error, atol=error * size)


@every_impl
@examples
@given(
    problem=problems((0.1, 5.0)),
    exponent=st.integers(-20, 20),
    reduction=st.sampled_from(["sum", "mean", "weighted_mean"]),
)
def test_scaling_the_weights_scales_loss_and_gradients(
    problem: Problem, exponent: int, reduction: str, impl: str, device: str
) -> None:
    # Weights near the ends of float32 would leave its range when scaled.
    arguments = problem.arguments() | {"token_weight": problem.token_weight.clamp(max=1e3)}
    scaled = arguments | {"token_weight": arguments["token_weight"] * 2.0**exponent}
    scale = 1.0 if reduction == "weighted_mean" else 2.0**exponent
    found, _ = solve(arguments, 0.7, impl, device, reduction=reduction)
    more, _ = solve(scaled, 0.7, impl, device, reduction=reduction)
    for name, value in found.items():
        close(more[name], scale * value, 1e-6)


@every_impl
@examples
@given(problem=problems((0.1, 20.0, 1e4)), temperature=st.sampled_from([0.1, 1.0, 7.0]))
def test_confidence_is_a_probability_that_sums_to_one_over_the_vocabulary(
    problem: Problem, temperature: float, impl: str, device: str
) -> None:
    hidden, head, bias = (v.to(device) for v in (problem.hidden[:3], problem.head, problem.bias))
    vocab_size = len(head)
    every = torch.arange(vocab_size, device=device).expand(len(hidden), vocab_size)
    q = token_confidence(
        hidden.unsqueeze(1).expand(-1, vocab_size, -1),
        head,
        every,
        bias=bias,
        temperature=temperature,
        impl=impl,
    )
    assert ((q >= 0) & (q <= 1)).all()
    error = 2 * problem.precision / temperature
    torch.testing.assert_close(q.sum(1), torch.ones_like(q[:, 0]), rtol=error, atol=error)


@every_impl
@examples
@given(problem=problems((0.1, 5.0)), chunk_size=st.integers(1, 70), data=st.data())
def test_the_chunk_size_changes_nothing_but_rounding(
    problem: Problem, chunk_size: int, data: st.DataObject, impl: str, device: str
) -> None:
    reduction = data.draw(st.sampled_from(["none", "mean"]))
    arguments = problem.arguments()
    found, stats = solve(arguments, 0.7, impl, device, reduction=reduction)
    chunked, chunked_stats = solve(
        arguments, 0.7, impl, device, reduction=reduction, chunk_size=chunk_size
    )
    for name, value in found.items():
        close(chunked[name], value)
    for name in STATISTICS:
        close(getattr(chunked_stats, name).double(), getattr(stats, name).double())


@every_impl
@examples
@given(problem=problems((0.1, 5.0)), data=st.data())
def test_parts_of_a_batch_add_up_to_the_whole(
    problem: Problem, data: st.DataObject, impl: str, device: str
) -> None:
    count = len(problem.target)
    cuts = sorted(data.draw(st.lists(st.integers(0, count), max_size=3)))
    arguments = problem.arguments()
    whole, _ = solve(arguments, 0.7, impl, device, reduction="mean", normalizer=11.0)
    parts: list[dict[str, Tensor]] = []
    for start, end in zip([0, *cuts], [*cuts, count], strict=True):
        part = {
            name: value[start:end].detach().requires_grad_(value.requires_grad)
            if name in ("hidden", "target", "token_weight")
            else value
            for name, value in arguments.items()
        }
        parts.append(solve(part, 0.7, impl, device, reduction="mean", normalizer=11.0)[0])
    close(torch.cat([part["hidden"] for part in parts]), whole["hidden"])
    for name in ("loss", "lm_head_weight", "bias"):
        close(torch.stack([part[name] for part in parts]).sum(0), whole[name])


@every_impl
@examples
@given(problem=problems((0.1, 5.0)), reduction=st.sampled_from(["mean", "weighted_mean"]))
def test_ignored_rows_might_as_well_not_be_there(
    problem: Problem, reduction: str, impl: str, device: str
) -> None:
    arguments = problem.arguments()
    kept = problem.target != -100
    fewer = {
        name: value[kept].detach().requires_grad_(value.requires_grad)
        if name in ("hidden", "target", "token_weight")
        else value
        for name, value in arguments.items()
    }
    found, _ = solve(arguments, 0.7, impl, device, reduction=reduction)
    without, _ = solve(fewer, 0.7, impl, device, reduction=reduction)
    assert not found["hidden"][~kept].any()
    close(found["hidden"][kept], without["hidden"])
    for name in ("loss", "lm_head_weight", "bias"):
        close(found[name], without[name])


@every_impl
@examples
@given(problem=problems((0.1, 5.0)), shift=st.floats(-30, 30, width=32))
def test_a_shift_of_all_logits_changes_only_the_log_sum_exp(
    problem: Problem, shift: float, impl: str, device: str
) -> None:
    arguments = problem.arguments()
    shifted = arguments | {"bias": (problem.bias + shift).requires_grad_()}
    found, stats = solve(arguments, 0.7, impl, device)
    moved, moved_stats = solve(shifted, 0.7, impl, device)
    kept = problem.target != -100
    torch.testing.assert_close(moved_stats.lse[kept], stats.lse[kept] + shift, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(moved_stats.confidence, stats.confidence, rtol=1e-4, atol=1e-6)
    for name in ("hidden", "lm_head_weight", "bias"):
        close(moved[name], found[name], 1e-4)
