"""Launches that Triton's binder does not see: the kernels and arguments are those it would choose.

In the interpreter only, which runs what is launched, whatever it was compiled for.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton
from ce_cases import one_tile_chunks
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from gift_kernels import Guide, WeightTransform, weighted_ce

PACKAGE = "gift_kernels.linear_ce.triton."
forward: Any = importlib.import_module(PACKAGE + "forward")
layout: Any = importlib.import_module(PACKAGE + "layout")
row_state: Any = importlib.import_module(PACKAGE + "row_state")
pytestmark = pytest.mark.skipif(
    not knobs.runtime.interpret, reason="natively there is nothing to compare with"
)


class Driver:
    """Stands for Triton's driver of a Hopper GPU."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0


class Bound:
    """A kernel of the interpreter that is bound for a GPU, too, and returns something compiled."""

    def __init__(self, kernel: Any, remembered: list[str]) -> None:
        self.kernel, self.remembered = kernel, remembered
        self.bind = JITFunction(kernel.fn, **kernel.kwargs).create_binder()[-1]

    def key(self, *arguments: Any, **named: Any) -> tuple[dict[str, Any], str]:
        """The arguments by name, and all that makes Triton compile another kernel."""
        values, specialization, options = self.bind(*arguments, **named, debug=False)
        return values, f"{specialization} {options}"

    def __getitem__(self, grid: Any) -> Any:
        def launch(*arguments: Any, **named: Any) -> Compiled:
            self.kernel[grid](*arguments, **named)
            options = {name: named[name] for name in named if name in ("num_warps", "num_stages")}
            return Compiled(self, self.key(*arguments, **named)[1], options)

        return launch


class Compiled:
    """Compiled for a first launch; checks that Triton would take it for all others as well."""

    def __init__(self, bound: Bound, key: str, options: dict[str, int]) -> None:
        self.bound, self.key, self.options = bound, key, options

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        assert len(grid) == 3

        def launch(*arguments: Any) -> None:
            values, key = self.bound.key(*arguments, **self.options)
            assert key == self.key
            self.bound.remembered.append(self.bound.kernel.fn.__name__)
            self.bound.kernel[grid](*arguments)
            assert list(values) == self.bound.kernel.arg_names

        return launch


def _forget() -> None:
    for cached in (layout.layout_of, layout.logits_with_guide, forward._scale_launch):
        cached.cache_clear()
    for name in ("_compact_launch", "_finish_launch", "_finish_dh_launch"):
        getattr(row_state, name).cache_clear()


@pytest.fixture
def remembered(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of kernels launched without the binder since."""
    names: list[str] = []
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(Driver())
    for module in ("logits", "matmul", "rows", "row_gradients"):
        kernels = importlib.import_module(f"{PACKAGE}kernels.{module}")
        for name in [name for name in vars(kernels) if name.endswith("_kernel")]:
            monkeypatch.setattr(kernels, name, Bound(getattr(kernels, name), names))
    # Several chunks of rows and columns, the last of each smaller.
    plan = forward.default_plan
    monkeypatch.setattr(
        forward, "default_plan", lambda *heads, **more: one_tile_chunks(plan(*heads, **more))
    )
    _forget()
    yield names
    _forget()
    triton.runtime.driver._active = before


def moved(tensor: Tensor, by: int) -> Tensor:
    """The tensor at an address of `by` elements more than a multiple of 16."""
    memory = torch.zeros(tensor.numel() + 16, dtype=tensor.dtype)
    return memory[by : by + tensor.numel()].view(tensor.shape).copy_(tensor)


def step(count: int, by: int, dtype: torch.dtype = torch.bfloat16, **options: Any) -> list[Tensor]:
    """Loss and gradients of a call whose tensors begin so many elements off."""
    generator = torch.Generator().manual_seed(count)
    hidden = moved(torch.randn(count, 16, generator=generator), by).to(dtype)
    head = torch.randn(150, 16, generator=generator).to(dtype)
    hidden, head = moved(hidden, by).requires_grad_(), moved(head, by)
    target = moved(torch.randint(150, (count,), generator=generator), by % 2)
    weight = torch.rand(count, generator=generator).to(options.pop("weight_dtype", torch.float32))
    weight = moved(weight, by)
    if options.pop("guided", False):
        weight, options["guide"] = None, Guide(hidden.detach(), head)
    if options.pop("biased", False):
        options["bias"] = moved(torch.randn(150, generator=generator), by).to(dtype)
    trained = [hidden]
    if options.pop("trainable", False):
        trained.append(head.requires_grad_())
    loss = weighted_ce(hidden, head, target, weight, impl="triton", **options)
    return [loss, *torch.autograd.grad(loss.sum(), trained)]


CALLS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": torch.float32},
    "trainable": {"trainable": True, "biased": True},
    "float16": {"trainable": True, "dtype": torch.float16, "logit_softcap": 5.0},
    "rows": {"reduction": "none", "transform": WeightTransform(0.5, 0.1, 0.2), "ignore_index": 1},
    "guide": {"guided": True},
}


@pytest.mark.parametrize("call", CALLS)
def test_every_launch_is_of_the_kernel_that_its_arguments_take(
    call: str, remembered: list[str]
) -> None:
    """Numbers of rows that are 1, odd or a multiple of 16, and addresses that are not aligned."""
    for count, by in ((33, 1), (33, 0), (1, 0), (48, 0), (48, 1), (48, 0)):
        step(count, by, **CALLS[call])
    step(48, 0, **CALLS[call], weight_dtype=torch.bfloat16)
    assert {"_gather_kernel", "_compact_kernel", "_finish_kernel"} <= set(remembered)
    assert {"_logits_kernel", "_two_heads_kernel"} & set(remembered)


def test_a_second_call_binds_nothing(
    remembered: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = step(48, 0, trainable=True)
    bound: list[Any] = []
    getitem = Bound.__getitem__
    monkeypatch.setattr(
        Bound, "__getitem__", lambda self, grid: bound.append(self) or getitem(self, grid)
    )
    second = step(48, 0, trainable=True)
    assert not bound and remembered
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
