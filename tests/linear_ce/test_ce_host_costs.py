"""What a call makes the host do: launches of our kernels, and calls of PyTorch's operations.

Both are counted at the size of a real head, forward and backward, where nothing runs. Host time
follows from them; `python -m benchmarks.host_time` takes it.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gift_kernels import Guide, token_confidence, weighted_ce
from gift_kernels.linear_ce.triton.tiles import Machine

plans: Any = importlib.import_module("gift_kernels.linear_ce.triton.chunk_size")
HIDDEN_SIZE, VOCAB_SIZE = 4096, 128256


class Counted:
    """Stands for a kernel."""

    def __init__(self, name: str, launched: list[str]) -> None:
        self.name, self.launched = name, launched

    def __getitem__(self, grid: Any) -> Any:
        return lambda *arguments, **named: self.launched.append(self.name)


def _plain(*tensors: Tensor | None) -> bool:
    return True


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that would have been launched on an H100 since."""
    names: list[str] = []
    monkeypatch.setattr(plans, "machine_of", lambda device: Machine(90, 132))
    # As where tensors have values: those here have none, so that nothing is computed.
    monkeypatch.setattr(importlib.import_module("gift_kernels.linear_ce.op"), "is_plain", _plain)
    for module in ("logits", "matmul", "rows", "row_gradients"):
        kernels = importlib.import_module(f"gift_kernels.linear_ce.triton.kernels.{module}")
        for name in [attribute for attribute in vars(kernels) if attribute.endswith("_kernel")]:
            monkeypatch.setattr(kernels, name, Counted(name, names))
    return names


class Calls(TorchDispatchMode):
    """Names of the operations of PyTorch that are called, views and allocations too."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.namespace == "aten", "what a registered operator does inside is not seen"
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def problem(tokens: int, trainable: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, head and targets, as a training step has them: with a batch dimension."""
    hidden = empty(2, tokens // 2, HIDDEN_SIZE).requires_grad_()
    head = empty(VOCAB_SIZE, HIDDEN_SIZE).requires_grad_(trainable)
    return hidden, head, empty(2, tokens // 2, dtype=torch.int64)


OLD_PYTORCH = torch.__version__ < (2, 10)  # detaches once more in every backward


def step(tokens: int, trainable: bool = False, guided: bool = False, **options: Any) -> list[str]:
    hidden, head, target = problem(tokens, trainable)
    guide = Guide(hidden.detach(), head.detach()) if guided else None
    weight = None if guided else empty(2, tokens // 2, dtype=torch.float32)
    with Calls() as calls:
        weighted_ce(hidden, head, target, weight, guide=guide, impl="triton", **options).backward()
    return calls.names[:-1] if OLD_PYTORCH else calls.names


@pytest.mark.parametrize(
    ("tokens", "launches", "calls"),
    [(256, 7, 25), (512, 7, 25), (1024, 10, 25), (2048, 19, 25), (8192, 67, 34)],
)
def test_frozen_head(tokens: int, launches: int, calls: int, launched: list[str]) -> None:
    names = step(tokens)
    assert len(launched) <= launches, launched
    assert len(names) <= calls, names


@pytest.mark.parametrize(("tokens", "launches", "calls"), [(256, 9, 80), (1024, 13, 90)])
def test_trainable_head(tokens: int, launches: int, calls: int, launched: list[str]) -> None:
    """Chunks of columns for dW fit the rows there are, too."""
    names = step(tokens, trainable=True)
    assert len(launched) <= launches, launched
    # Of dH alone: dW is stored once, in the backward.
    assert launched.count("_scale_rows_kernel") == 1 and "_dw_kernel" in launched[-3:]
    assert len(names) <= calls, names


@pytest.mark.parametrize("tokens", [256, 1024])
def test_weights_of_any_kind_cost_no_chain_of_small_calls(tokens: int, launched: list[str]) -> None:
    """A guide takes the launches of its own pass; other options none."""
    hidden, head, target = problem(tokens)
    transform = importlib.import_module("gift_kernels").WeightTransform(0.5, 0.1, 0.2)
    plain = len(step(tokens)) + OLD_PYTORCH
    launches = len(launched)
    launched.clear()
    for more in ({"token_weight": "self"}, {}):
        with Calls() as calls:
            loss = weighted_ce(hidden, head, target, transform=transform, impl="triton", **more)
            loss.backward()
        assert len(calls.names) <= plain and len(launched) == launches
        launched.clear()
    assert len(step(tokens, guided=True)) <= plain + 10
    assert len(launched) <= launches + 3


@pytest.mark.parametrize(
    ("tokens", "launches", "calls"), [(256, 5, 18), (1024, 5, 18), (8192, 8, 21)]
)
def test_token_confidence(tokens: int, launches: int, calls: int, launched: list[str]) -> None:
    with Calls() as mode:
        token_confidence(*problem(tokens), impl="triton")
    assert len(launched) <= launches, launched
    assert len(mode.names) <= calls, mode.names
