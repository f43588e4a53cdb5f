"""weighted_ce and token_confidence under PyTorch's machinery: torch.compile, autograd, autocast."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from ce_cases import CASE, IMPLS, arrange, generate, long_problem, outcome, with_guide
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from gift_kernels import Guide, TokenStats, token_confidence, weighted_ce

# `gift_kernels.weighted_ce` is a function, so modules are found by their names.
operator: Any = importlib.import_module("gift_kernels.linear_ce.op")
every_impl = pytest.mark.parametrize("impl", IMPLS)
COMPILED = ["weights-mean", "weights-none", "self", "guide-all-options", "head-options-none"]


@every_impl
@pytest.mark.parametrize("case", COMPILED)
def test_compiles_without_a_graph_break_and_changes_no_number(
    case: str, impl: str, device: str
) -> None:
    def op(**arguments: Any) -> Any:
        return weighted_ce(**arguments, impl=impl, stats=TokenStats._fields)

    torch.compiler.reset()
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    values = generate(CASE[case], torch.float32)
    expected, found = (
        outcome(way, CASE[case], values, torch.float32, device) for way in (op, compiled)
    )
    assert expected.keys() == found.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0, msg=name)


@every_impl
def test_compiles_for_any_number_of_rows_at_once(impl: str, device: str) -> None:
    def step(hidden: Tensor, head: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        q = token_confidence(hidden, head, target, impl=impl)
        return weighted_ce(hidden, head, target, q, impl=impl), q

    torch.compiler.reset()
    graphs: list[Any] = []

    def backend(graph: Any, example: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    given = long_problem(torch.float32, device)
    for rows in (slice(33, 64), slice(100, 200), slice(7, 70)):
        arguments = given["hidden"][rows], given["lm_head_weight"], given["target"][rows]
        for value, true in zip(compiled(*arguments), step(*arguments), strict=True):
            torch.testing.assert_close(value, true, rtol=0, atol=0)
    assert len(graphs) == 1


@every_impl
@pytest.mark.parametrize("case", COMPILED)
@pytest.mark.parametrize("frozen_head", [False, True])
def test_the_operators_pass_opcheck(
    frozen_head: bool, case: str, impl: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, tuple[Any, ...]]] = []

    def recorded(op: Any) -> Any:
        def call(*arguments: Any) -> Any:
            calls.append((op, arguments))
            return op(*arguments)

        return call

    registered = operator.linear_ce
    # As under torch.compile, where the registered operators run.
    monkeypatch.setattr(operator, "is_plain", lambda *tensors: False)
    monkeypatch.setattr(operator, "linear_ce", recorded(registered))
    monkeypatch.setattr(operator, "head_gradient", recorded(operator.head_gradient))
    values = generate(CASE[case], torch.float32)
    frozen = ("head", "bias") if frozen_head else ()
    _, arguments = arrange(CASE[case], values, torch.float32, device, frozen)
    weighted_ce(**arguments, impl=impl).sum().backward()
    assert len(calls) == (2 if CASE[case].reduction == "none" and not frozen_head else 1)
    for op, given in tuple(calls):  # opcheck runs the backward, which calls again
        differentiable = op is registered
        leaves = tuple(
            value.detach().requires_grad_(value.requires_grad and differentiable)
            if isinstance(value, Tensor)
            else value
            for value in given
        )
        torch.library.opcheck(op, leaves)


@every_impl
def test_autocast_computes_in_its_dtype_and_returns_gradients_in_the_inputs(
    impl: str, device: str
) -> None:
    given = with_guide(long_problem(torch.float32, device))
    given["lm_head_weight"].requires_grad_()
    leaves = given["hidden"], given["lm_head_weight"]
    with torch.autocast(device, torch.bfloat16):
        loss = weighted_ce(**given, impl=impl)
        confidence = token_confidence(*leaves, given["target"], impl=impl)
    gradients = torch.autograd.grad(loss, leaves)
    narrow = {
        name: value.bfloat16() if name in ("hidden", "lm_head_weight") else value
        for name, value in given.items()
    }
    guide = given["guide"]
    narrow["guide"] = Guide(guide.hidden.bfloat16(), guide.lm_head_weight.bfloat16())
    expected = weighted_ce(**narrow, impl=impl)
    assert loss.dtype == confidence.dtype == torch.float32
    assert torch.equal(loss, expected)
    assert loss != weighted_ce(**given, impl=impl)
    names = ("hidden", "lm_head_weight", "target")
    narrow_confidence = token_confidence(*(narrow[name] for name in names), impl=impl)
    assert torch.equal(confidence, narrow_confidence)
    for gradient, true in zip(gradients, torch.autograd.grad(expected, leaves), strict=True):
        assert gradient.dtype == torch.float32
        assert torch.equal(gradient, true)


def test_float64_stays_float64_under_autocast(device: str) -> None:
    given = long_problem(torch.float64, device)
    expected = weighted_ce(**given)
    with torch.autocast(device, torch.bfloat16):
        loss = weighted_ce(**given)
    assert loss.dtype == torch.float64
    assert torch.equal(loss, expected)


@every_impl
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_gradient_of_the_gradient_is_refused(reduction: str, impl: str, device: str) -> None:
    given = long_problem(torch.float32, device)
    loss = weighted_ce(**given, reduction=reduction, impl=impl).sum()
    with pytest.raises(RuntimeError, match="without create_graph=True"):
        torch.autograd.grad(loss, given["hidden"], create_graph=True)


@every_impl
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("trainable_head", [False, True])
def test_a_second_backward_needs_retain_graph(
    trainable_head: bool, reduction: str, impl: str, device: str
) -> None:
    given = long_problem(torch.float32, device)
    given["lm_head_weight"].requires_grad_(trainable_head)
    leaves = [given["hidden"], given["lm_head_weight"]][: 1 + trainable_head]
    loss = weighted_ce(**given, reduction=reduction, impl=impl).square().sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, leaves)


@every_impl
def test_works_under_activation_checkpointing(impl: str, device: str) -> None:
    given = long_problem(torch.float32, device)
    expected = torch.autograd.grad(weighted_ce(**given, impl=impl), given["hidden"])
    loss = checkpoint(lambda: weighted_ce(**given, impl=impl), use_reentrant=False)
    assert isinstance(loss, Tensor)
    assert torch.equal(torch.autograd.grad(loss, given["hidden"])[0], expected[0])


def test_tracers_see_one_operator_and_keep_its_meaning(device: str) -> None:
    """Traced with all rows valid, run with some ignored."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 8, generator=generator).to(device)
    head = torch.randn(9, 8, generator=generator).to(device)
    target = torch.tensor([1, 2, 3, 4], device=device)
    fewer = torch.tensor([1, -100, 3, -100], device=device)
    expected = weighted_ce(hidden, head, fewer)
    traced = torch.jit.trace(weighted_ce, (hidden, head, target), check_trace=False)
    torch.testing.assert_close(traced(hidden, head, fewer), expected)
    graph = make_fx(lambda *given: weighted_ce(*given))(hidden, head, target)
    assert "gift_kernels.linear_ce" in graph.code
    torch.testing.assert_close(graph(hidden, head, fewer), expected)


@every_impl
def test_tensors_without_values_give_the_shapes_of_the_results(impl: str) -> None:
    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    hidden, head = empty(2, 4, 8).requires_grad_(), empty(9, 8).requires_grad_()
    target = empty(2, 4, dtype=torch.int64)
    loss, stats = weighted_ce(hidden, head, target, stats=("nll",), impl=impl)
    loss.backward()
    assert loss.shape == () and stats.nll is not None and stats.nll.shape == (2, 4)
    assert hidden.grad is not None and hidden.grad.shape == hidden.shape
    assert head.grad is not None and head.grad.shape == head.shape


@every_impl
def test_statistics_may_be_changed_before_the_backward(impl: str, device: str) -> None:
    values = generate(CASE["weights-mean"], torch.float32)
    gradients = []
    for factor in (1.0, 2.0):
        leaves, given = arrange(CASE["weights-mean"], values, torch.float32, device)
        loss, stats = weighted_ce(**given, stats=("weight",), impl=impl)
        stats.weight.mul_(factor)
        loss.backward()
        gradients.append(leaves["hidden"].grad)
    torch.testing.assert_close(*gradients, rtol=0, atol=0)
