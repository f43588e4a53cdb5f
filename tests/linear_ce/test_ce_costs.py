"""The gradients, tensors and products of weighted_ce and token_confidence, and no more."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ce_cases import IMPLS, long_problem, one_tile_chunks, with_guide
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from gift_kernels import TokenStats, token_confidence, weighted_ce
from gift_kernels.linear_ce.types import LinearCE, Problem

# `gift_kernels.weighted_ce` is a function, so modules are found by their names.
operator: Any = importlib.import_module("gift_kernels.linear_ce.op")
OPERATORS = {
    torch.ops.gift_kernels.linear_ce.default: operator.linear_ce,
    torch.ops.gift_kernels.linear_ce_head_gradient.default: operator.head_gradient,
}
every_impl = pytest.mark.parametrize("impl", IMPLS)
# Sizes of `long_problem`, and how many of its rows have a target and how many a weight, too.
COUNT, SIZE, VOCAB, KEPT, WEIGHTED = 200, 16, 300, 160, 150


class Inside(TorchDispatchMode):
    """Hands the operations inside our operators, which are opaque, to the modes below it, and
    keeps the shape of every tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in OPERATORS:
            with self:
                result = OPERATORS[func]._init_fn(*args, **(kwargs or {}))
        else:
            result = func(*args, **(kwargs or {}))
        self.shapes += [tuple(t.shape) for t in tree_leaves(result) if isinstance(t, Tensor)]
        return result

    def largest(self) -> int:
        return max(torch.Size(shape).numel() for shape in self.shapes)


@every_impl
def test_only_gradients_that_are_wanted_are_made(
    impl: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[bool, ...]] = []

    class Recorder:
        def __init__(self, backend: Any) -> None:
            self.backend = backend

        def solve(self, problem: Problem) -> LinearCE:
            result = self.backend.solve(problem)
            made.append(tuple(value is not None for value in (result.dh, result.dw, result.db)))
            return result

    choose = operator._backend
    monkeypatch.setattr(operator, "_backend", lambda impl: Recorder(choose(impl)))
    given = long_problem(torch.float32, device)
    head = given["lm_head_weight"].requires_grad_()
    bias = torch.zeros(head.shape[0], device=device, requires_grad=True)

    def call(**more: Any) -> tuple[bool, ...]:
        weighted_ce(**given | more, impl=impl)
        return made.pop()

    assert call(bias=bias) == (True, True, True)
    assert call(bias=bias.detach()) == (True, True, False)
    assert call(lm_head_weight=head.detach()) == (True, False, False)
    assert call(hidden=given["hidden"].detach()) == (False, True, False)
    assert call(reduction="none") == (True, False, False), "dW is made in the backward"
    nothing = (False, False, False)
    assert call(hidden=given["hidden"].detach(), lm_head_weight=head.detach()) == nothing
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            assert call(bias=bias) == nothing
    token_confidence(given["hidden"], head, given["target"], bias=bias, impl=impl)
    assert made.pop() == nothing


@every_impl
@pytest.mark.parametrize(
    ("reduction", "dtype"), [("mean", torch.bfloat16), ("none", torch.float32)], ids=str
)
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("trainable_head", [False, True])
def test_no_tensor_grows_with_rows_times_vocabulary(
    trainable_head: bool,
    guided: bool,
    reduction: str,
    dtype: torch.dtype,
    impl: str,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chunk = 8
    if impl == "triton":
        # Only where one chunk cannot hold everything is there something to see.
        triton_ce: Any = importlib.import_module("gift_kernels.linear_ce.triton.forward")
        plan = triton_ce.default_plan
        monkeypatch.setattr(
            triton_ce, "default_plan", lambda *a, **options: one_tile_chunks(plan(*a, **options))
        )

    def run(scale: int) -> Inside:
        given = long_problem(dtype, device, scale * COUNT, SIZE, scale * VOCAB)
        given = with_guide(given) if guided else given
        given["lm_head_weight"].requires_grad_(trainable_head)
        options = {"reduction": reduction, "impl": impl, "chunk_size": chunk}
        with Inside() as inside:
            loss, _ = weighted_ce(**given, **options, stats=TokenStats._fields)
            loss.sum().backward()
            head = (given["hidden"], given["lm_head_weight"], given["target"])
            token_confidence(*head, impl=impl, chunk_size=chunk)
        assert (scale * COUNT, SIZE) in inside.shapes, "operations inside were not seen"
        return inside

    if impl == "triton":
        # What grew with N V would be four times as large.
        assert run(2).largest() <= 2 * run(1).largest()
        return
    allowed = max(chunk * VOCAB, COUNT * SIZE, VOCAB * SIZE)
    assert run(1).largest() <= allowed < COUNT * VOCAB / 10


def flops_of_product_added_in_place(
    shape: Any, left: tuple[int, int], right: tuple[int, int], **options: Any
) -> int:
    """Flops of `addmm_`, which PyTorch's counter overlooks."""
    return 2 * left[0] * left[1] * right[1]


def units(call: Callable[[], Tensor], rows: int) -> float:
    """Flops of matrix products, forward and backward, in passes of `rows` rows over the head."""
    mapping = {torch.ops.aten.addmm_: flops_of_product_added_in_place}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter, Inside():
        result = call()
        if result.requires_grad:
            result.backward(torch.ones_like(result))
    return counter.get_total_flops() / (2 * rows * VOCAB * SIZE)


@pytest.mark.parametrize("chunk_size", [None, 7])
@pytest.mark.parametrize(
    ("reduction", "trainable_head", "cost"),
    [
        *((reduction, False, 2) for reduction in ("none", "sum", "mean", "weighted_mean")),
        *((reduction, True, 3) for reduction in ("sum", "mean", "weighted_mean")),
        # dW must wait for the rows' upstream gradients, and the logits are made again.
        ("none", True, 4),
    ],
)
def test_passes_over_the_head_of_forward_and_backward(
    reduction: str, trainable_head: bool, cost: int, chunk_size: int | None, device: str
) -> None:
    given = long_problem(torch.float32, device)
    given["lm_head_weight"].requires_grad_(trainable_head)
    options = {"reduction": reduction, "impl": "eager", "chunk_size": chunk_size}

    assert units(lambda: weighted_ce(**given, **options), WEIGHTED) == cost
    statistics = {"stats": ("nll",), **options}
    # They need rows of weight 0 too, but the products of a later backward do not.
    with_statistics = cost if cost < 4 else 2 + 2 * WEIGHTED / KEPT
    assert units(lambda: weighted_ce(**given, **statistics)[0], KEPT) == with_statistics
    own = {**options, "token_weight": "self"}
    assert units(lambda: weighted_ce(**given | own), KEPT) == cost
    # The guide is half as wide, so that one pass over its head is half a unit.
    assert units(lambda: weighted_ce(**with_guide(given), **options), KEPT) == cost + 0.5


def test_passes_over_the_head_without_a_gradient(device: str) -> None:
    given = long_problem(torch.float32, device)
    names = ("hidden", "lm_head_weight", "target")
    plain = [given[name] for name in names]
    assert units(lambda: token_confidence(*plain, impl="eager"), KEPT) == 1
    with torch.no_grad():
        assert units(lambda: weighted_ce(**given, impl="eager"), WEIGHTED) == 1
        assert units(lambda: weighted_ce(**with_guide(given), impl="eager"), KEPT) == 1.5
