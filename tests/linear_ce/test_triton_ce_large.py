"""The Triton cross-entropy beyond 2^31 elements, and its memory on a GPU."""

from __future__ import annotations

import contextlib
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from ce_cases import norm_error, one_tile_chunks
from ce_problems import BF16, FP32, ce, check, plans, problem_of
from launches import checked_launches
from torch import Tensor

from gift_kernels import reference
from gift_kernels.linear_ce.triton.kernels.matmul import RowWeights
from gift_kernels.linear_ce.types import LinearInputs

chunks: Any = importlib.import_module("gift_kernels.linear_ce.triton.chunk")
row_state: Any = importlib.import_module("gift_kernels.linear_ce.triton.row_state")


@pytest.mark.parametrize("unaligned", [0, 1], ids=["copy-engine", "plain-loads"])
def test_a_head_whose_last_row_lies_beyond_2_to_the_31_elements(
    unaligned: int, device: str
) -> None:
    """A view of memory of which only a few pages are ever touched."""
    size, stride = 24, 2**30 + 8 + unaligned
    memory = torch.empty(2 * stride + size, dtype=BF16, device=device)
    head = memory.as_strided((3, size), (stride, 1))
    generator = torch.Generator().manual_seed(0)
    head.copy_(torch.randn(3, size, generator=generator))
    hidden = torch.randn(9, size, generator=generator).to(device, BF16)
    target = torch.arange(9, device=device) % 3
    for want_dw in (False, True):
        check(problem_of(hidden, head, target, want_dw=want_dw, want_db=False))


def test_gradients_whose_rows_lie_beyond_2_to_the_31_elements(device: str, tmp_path: Path) -> None:
    """The last rows of dW and of dH's parts, in memory of which only these are ever touched."""
    size, far = 64, 2**25
    shape = (far + 300, size)
    if device == "cpu":
        watched = checked_launches
        file = str(tmp_path / "sparse")
        numbers = torch.from_file(file, shared=True, size=2 * shape[0] * size, dtype=FP32)
        parts = numbers.view(2, *shape)
    else:
        watched = contextlib.nullcontext
        parts = torch.empty(2, *shape, device=device)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(20, size, generator=generator).to(device, BF16)
    weight = torch.randn(300, size, generator=generator).to(device, BF16)
    rows = row_state.valid_tokens(torch.zeros(20, dtype=torch.int64, device=device), -100)
    plan = one_tile_chunks(plans.default_plan(LinearInputs(hidden, weight, None, 1.0, None)))
    plan = plan._replace(splits=2)

    def chunk_of(weight: Tensor) -> Any:
        head = LinearInputs(hidden, weight, None, 1.0, None)
        chunk = chunks.Chunk(head, plan, 20, plan.chunk, final=True)
        chunk.exp.zero_()[:20] = torch.rand(20, chunk.columns, generator=generator).to(device)
        chunk.hidden.zero_()[:20] = hidden
        return chunk

    chunk = chunk_of(weight[:1].expand(shape))
    ones = torch.ones(20, device=device)
    nowhere = torch.full((20,), -1, dtype=torch.int32, device=device)
    with watched():
        chunk.add_to_dw(rows, RowWeights(ones, ones, nowhere), parts[0], ones[:1], 0, far)
    true = chunk.exp[:20].double().T @ hidden.double()
    assert norm_error(parts[0, far : far + chunk.columns], true) < 1e-6
    chunk = chunk_of(weight)
    places = torch.arange(far, far + 20, dtype=torch.int32, device=device)
    with watched():
        chunk.add_to_dh(rows._replace(index=places), parts, 0, 0)
    true = chunk.exp[:20].double() @ weight[: chunk.columns].double()
    assert norm_error(parts[:, far : far + 20].sum(0), true) < 1e-6


@pytest.mark.gpu
def test_a_head_of_more_than_2_to_the_31_elements(device: str) -> None:
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(64, 8192, generator=generator, device=device, dtype=BF16)
    head = torch.randn(262144 + 300, 8192, generator=generator, device=device, dtype=BF16)
    head *= 0.05
    target = torch.randint(len(head), (64,), generator=generator, device=device)
    target[0] = len(head) - 1
    found = ce.solve(problem_of(hidden, head, target, want_dw=False, want_db=False))
    logits = torch.cat([hidden.double() @ part.double().T for part in head.split(16384)], 1)
    stats = reference.token_stats(logits, target)
    assert norm_error(found.nll, stats.nll) < 1e-5
    logits = torch.exp(logits - stats.lse[:, None])
    logits[torch.arange(64, device=device), target] -= 1
    parts = zip(logits.split(16384, 1), head.split(16384), strict=True)
    true_dh = sum(gradient @ part.double() for gradient, part in parts)
    assert norm_error(found.dh, true_dh) < 3e-3


@pytest.mark.gpu
@pytest.mark.parametrize("want_dw", [False, True], ids=["frozen", "trainable"])
def test_memory_beside_the_inputs_and_dw_is_bounded(want_dw: bool, device: str) -> None:
    count, size, vocab_size = 8192, 4096, 128256
    hidden = torch.randn(count, size, device=device, dtype=BF16)
    head = torch.randn(vocab_size, size, device=device, dtype=BF16) * 0.02
    target = torch.randint(vocab_size, (count,), device=device)
    problem = problem_of(hidden, head, target, want_dw=want_dw, want_db=False, with_entropy=False)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    ce.solve(problem)
    extra = torch.cuda.max_memory_allocated() - before - (4 * vocab_size * size if want_dw else 0)
    assert extra <= (385 if want_dw else 300) * 10**6, extra
