"""Products with float32 results of operands of any dtype and layout."""

from __future__ import annotations

import pytest
import torch

from gift_kernels.linear_ce.matmul import float32_mm


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("accumulate", [False, True], ids=["overwrite", "accumulate"])
def test_sums_are_float32(accumulate: bool, dtype: torch.dtype, device: str) -> None:
    """1/256 beside 256 and a sum of 4096 terms: 16-bit sums would lose both."""
    generator = torch.Generator().manual_seed(0)
    a = (torch.rand(5, 4096, generator=generator) + 0.5).to(device, dtype)
    b = (torch.rand(3, 4096, generator=generator) + 0.5).to(device, dtype).T
    wide = torch.full((5, 7), 256 + 2**-8, device=device)
    out = wide[:, 2:5]
    true = a.double() @ b.double() + (out.double() if accumulate else 0)
    float32_mm(a, b, out, accumulate=accumulate)
    assert ((out - true).abs() / true).max() < 2e-6
    assert (wide[:, [0, 1, 5, 6]] == 256 + 2**-8).all()
