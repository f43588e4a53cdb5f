"""Products with wider results of operands of any dtype and layout."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import DeviceType

from gift_kernels.linear_ce.matmul import mixed_products, wide_mm


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("accumulate", [False, True], ids=["overwrite", "accumulate"])
def test_sums_are_wide(accumulate: bool, dtype: torch.dtype, device: str) -> None:
    """1/256 beside 256 and a sum of 4096 terms: 16-bit sums would lose both."""
    generator = torch.Generator().manual_seed(0)
    a = (torch.rand(5, 4096, generator=generator) + 0.5).to(device, dtype)
    b = (torch.rand(3, 4096, generator=generator) + 0.5).to(device, dtype).T
    wide = torch.full((5, 7), 256 + 2**-8, device=device)
    out = wide[:, 2:5]
    true = a.double() @ b.double() + (out.double() if accumulate else 0)
    wide_mm(a, b, out, accumulate=accumulate)
    assert ((out - true).abs() / true).max() < 2e-6
    assert (wide[:, [0, 1, 5, 6]] == 256 + 2**-8).all()


def test_float64_stays_float64(device: str) -> None:
    a = torch.rand(3, 40, dtype=torch.float64, device=device)
    out = torch.empty(3, 3, dtype=torch.float64, device=device)
    wide_mm(a, a.T, out)
    assert torch.allclose(out, a @ a.T, rtol=1e-14, atol=0)


def test_cpus_convert() -> None:
    assert not mixed_products(torch.device("cpu"), torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_operands_are_multiplied_as_they_are(dtype: torch.dtype) -> None:
    assert mixed_products(torch.device("cuda", 0), dtype)
    a = torch.randn(256, 256, dtype=dtype, device="cuda")
    out = torch.empty(256, 256, device="cuda")
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        wide_mm(a, a, out)
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if event.device_type == DeviceType.CUDA]
    assert kernels and not any("elementwise" in name for name in kernels), "converted before"
