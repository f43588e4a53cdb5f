"""Memory of a call at the sizes of real heads, counted: nothing is launched, nothing allocated."""

from __future__ import annotations

import importlib
import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gift_kernels.problem import Head, Problem, WeightTransform
from gift_kernels.triton_tiles import Machine

triton_ce: Any = importlib.import_module("gift_kernels.triton_ce")
H100 = Machine(90, 132)
LLAMA_3, QWEN_2_5, GEMMA_2 = (4096, 128256), (3584, 152064), (3584, 256000)
CALLS: dict[str, dict[str, Any]] = {
    "confidence": {"want_dh": False, "with_entropy": True, "keep_zero_rows": True},
    "frozen head": {},
    "frozen head, statistics": {"with_entropy": True, "keep_zero_rows": True},
    "trainable head": {"want_dw": True},
    "trainable head, a gradient for each row": {"want_dw": True, "rowwise": True},
}


class NoKernel:
    def __getitem__(self, grid: Any) -> Any:
        return lambda *arguments, **options: None


class Memory(TorchDispatchMode):
    """Bytes of the storages that operations make, now and at most."""

    def __init__(self, *inputs: torch.Tensor) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known = {tensor.untyped_storage()._cdata for tensor in inputs}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        return result

    def _freed(self, key: int, count: int) -> None:
        self.known.remove(key)
        self.now -= count


@pytest.fixture(autouse=True)
def counted_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("triton_logits", "triton_products", "triton_rows"):
        module = importlib.import_module(f"gift_kernels.{name}")
        for kernel in [attribute for attribute in vars(module) if attribute.endswith("_kernel")]:
            monkeypatch.setattr(module, kernel, NoKernel())
    planning = importlib.import_module("gift_kernels.triton_plan")
    monkeypatch.setattr(planning, "machine_of", lambda device: H100)


def peak(count: int, hidden_size: int, vocab_size: int, guided: bool, **changes: Any) -> int:
    """Bytes beside the inputs and dW, in bfloat16."""

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def head() -> Head:
        return Head(empty(count, hidden_size), empty(vocab_size, hidden_size), None, 1.0, None)

    problem = Problem(
        head=head(),
        guide=head() if guided else None,
        target=empty(count, dtype=torch.int64),
        row_weight=None if guided else empty(count, dtype=torch.float32),
        temperature=1.0,
        self_weight=False,
        transform=WeightTransform(1.0, 0.0, 0.0),
        ignore_index=-100,
        **{
            "want_dh": True,
            "want_dw": False,
            "want_db": False,
            "rowwise": False,
            "with_entropy": False,
            "keep_zero_rows": False,
            "shard": None,
            "chunk_size": None,
            **changes,
        },
    )
    heads = [one for one in (problem.head, problem.guide) if one is not None]
    inputs = [tensor for one in heads for tensor in (one.hidden, one.weight)]
    with Memory(*inputs, problem.target) as memory:
        result = triton_ce.solve(problem)
    assert result.dh.numel() == count * hidden_size * problem.want_dh
    return memory.peak - 4 * result.dw.numel()


@pytest.mark.parametrize("guided", [False, True], ids=["", "guide"])
@pytest.mark.parametrize("sizes", [LLAMA_3, QWEN_2_5, GEMMA_2], ids=str)
@pytest.mark.parametrize("call", CALLS)
def test_at_most_300_megabytes_at_8192_tokens(
    call: str, sizes: tuple[int, int], guided: bool
) -> None:
    at_least = 4 * 8192 * sizes[0] if CALLS[call].get("want_dh", True) else 8192 * sizes[0]
    assert at_least < peak(8192, *sizes, guided, **CALLS[call]) <= 300e6


@pytest.mark.parametrize("guided", [False, True], ids=["", "guide"])
@pytest.mark.parametrize("call", CALLS)
def test_memory_does_not_grow_with_tokens_times_vocabulary(call: str, guided: bool) -> None:
    """What is left of all four corners once tokens and vocabulary have each paid for themselves."""
    hidden_size, vocab_size = LLAMA_3

    def of(tokens: int, vocabularies: int) -> int:
        return peak(16384 * tokens, hidden_size, vocab_size * vocabularies, guided, **CALLS[call])

    assert of(2, 2) - of(2, 1) - of(1, 2) + of(1, 1) < 1e6
