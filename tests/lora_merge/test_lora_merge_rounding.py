"""Stochastic rounding of the merge: unbiased, seeded, and only between neighbours."""

import importlib
import math
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from merge_cases import make_adapter, make_weight, truth

from gift_kernels.implementation import Impl
from gift_kernels.lora_merge.api import lora_merge, lora_merge_
from gift_kernels.lora_merge.kernels import round_stochastically

op: Any = importlib.import_module("gift_kernels.lora_merge.api")

IMPLS = ["eager", "triton"]
FACTORS = ["bf16", "fp32"]


STEP = 2.0**-7  # the bfloat16 after 1 is 1 + STEP


def _round(share: torch.Tensor, columns: int, seed: int, impl: Impl, device: str) -> torch.Tensor:
    """Rounds rows of ±(1 + |share| · STEP); 1 where the result is the neighbour farther from 0."""
    share = share.to(device)
    weight = share.sign().bfloat16()[:, None].expand(-1, columns).contiguous()
    a = torch.full((1, columns), STEP, device=device)
    merged = lora_merge(
        weight, a, share[:, None], 1.0, stochastic_rounding_seed=seed, impl=impl
    ).float()
    up = (merged.abs() - 1.0) / STEP
    assert torch.isin(up, torch.tensor([0.0, 1.0], device=device)).all()
    assert torch.equal(merged.sign(), weight.float())
    return up.cpu()


@pytest.mark.parametrize("impl", IMPLS)
def test_values_are_rounded_up_as_often_as_they_are_near(impl, device):
    shares = torch.tensor([2.0**-16, 0.03, 0.25, 0.5, 0.9, -0.03, -0.25, -0.9])
    up = _round(shares.repeat_interleave(16), 320, 11, impl, device).view(len(shares), -1)
    expected = shares.abs()
    deviation = (expected * (1 - expected) / up.shape[1]).sqrt()
    assert ((up.mean(1) - expected).abs() <= 4.5 * deviation).all(), up.mean(1)


@pytest.mark.parametrize("impl", IMPLS)
def test_entries_are_rounded_independently(impl, device):
    noise = _round(torch.full((96,), 0.5), 264, 3, impl, device) * 2 - 1
    for first, second in [
        (noise[:, 1:], noise[:, :-1]),
        (noise[1:], noise[:-1]),
        (noise[:, 8:], noise[:, :-8]),
        (noise[64:], noise[:-64]),
        (noise[:, 128:], noise[:, :-128]),
    ]:
        assert abs((first * second).mean().item()) <= 4.5 / math.sqrt(first.numel())
    assert noise.mean(0).abs().max() <= 5 / math.sqrt(noise.shape[0])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("factors", FACTORS)
def test_every_result_is_a_neighbour_of_the_exact_one(factors, impl, device):
    weight = make_weight((33, 136), "bf16", device)
    adapter = make_adapter(weight.shape, 12, factors, device)
    merged = lora_merge(weight, *adapter, stochastic_rounding_seed=1, impl=impl)
    exact = truth(weight, [adapter])
    spacing = torch.exp2(torch.floor(torch.log2(exact.abs())) - 7)
    assert ((merged.double() - exact).abs() <= spacing * (1 + 2**-6)).all()
    assert not torch.equal(merged, lora_merge(weight, *adapter, impl=impl))


@pytest.mark.parametrize("impl", IMPLS)
def test_the_seed_decides(impl, device):
    weight = make_weight((2, 9, 40), "bf16", device)
    adapter = make_adapter(weight.shape, 4, "bf16", device)
    results = [
        lora_merge(weight, *adapter, stochastic_rounding_seed=seed, impl=impl)
        for seed in (1, 1, 2, 2**31 - 1, 2**40, 2**63 - 1)
    ]
    assert torch.equal(results[0], results[1])
    for i, first in enumerate(results[1:]):
        for second in results[i + 2 :]:
            assert not torch.equal(first, second)
    equal_experts = lora_merge(
        weight[:1].expand(2, -1, -1),
        adapter.a[:1].expand(2, -1, -1),
        adapter.b[:1].expand(2, -1, -1),
        adapter.scale,
        stochastic_rounding_seed=1,
        impl=impl,
    )
    assert not torch.equal(equal_experts[0], equal_experts[1])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(33, 136), (70, 9), (3, 20, 40)], ids=str)
def test_the_result_depends_on_seed_and_position_and_not_on_the_layout(shape, impl, device):
    # Sums that are exact in float32: only the random bits can differ.
    generator = torch.Generator().manual_seed(5)
    weight = torch.randint(-64, 64, shape, generator=generator).bfloat16().to(device)
    *experts, rows, columns = shape
    a = torch.randint(-9, 9, (*experts, 3, columns), generator=generator).float().to(device)
    b = torch.randint(-9, 9, (*experts, rows, 3), generator=generator).float().to(device)
    options = {"stochastic_rounding_seed": 7, "impl": impl}
    expected = lora_merge(weight, a, b, 2.0**-9, **options)
    assert not torch.equal(expected, lora_merge(weight, a, b, 2.0**-9, impl=impl))
    wide = torch.nn.functional.pad(weight, (1, 2))[..., 1:-2]
    layouts = {
        "transposed": weight.mT.contiguous().mT,
        "padded": wide,
        "transposed and padded": torch.nn.functional.pad(weight.mT, (1, 2))[..., 1:-2].mT,
    }
    for name, stored in layouts.items():
        for factors in ((a, b), (a.mT.contiguous().mT, b.mT.contiguous().mT)):
            merged = lora_merge(stored, *factors, 2.0**-9, **options)
            assert torch.equal(merged, expected), name
            in_place = torch.empty_strided(stored.shape, stored.stride(), dtype=stored.dtype)
            in_place = in_place.to(device).copy_(stored)
            assert torch.equal(lora_merge_(in_place, *factors, 2.0**-9, **options), expected), name


@pytest.mark.parametrize("impl", IMPLS)
def test_representable_and_non_finite_values_are_kept(impl, device):
    weight = make_weight((16, 24), "bf16", device)
    weight[0, :3] = torch.tensor([float("nan"), float("inf"), float("-inf")])
    weight.view(torch.int16)[0, 3] = 0x7FFF  # a NaN with every bit set
    a, b = torch.zeros(1, 24, device=device), torch.zeros(16, 1, device=device)
    merged = lora_merge(weight, a, b, 1.0, stochastic_rounding_seed=9, impl=impl)
    torch.testing.assert_close(merged, weight, rtol=0, atol=0, equal_nan=True)


@triton.jit
def _round_kernel(x_ptr, out_ptr, random_bits, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    bits = tl.full((SIZE,), 0, tl.uint32) + random_bits
    tl.store(out_ptr + offs, round_stochastically(tl.load(x_ptr + offs), bits))


def test_no_nan_becomes_a_number(device):
    """CUDA's own NaN has every bit set but the sign: any random bits carry it over to -0."""
    bits = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, 0x7F800000], dtype=torch.int32)
    x = bits.view(torch.float32).to(device)
    out = torch.zeros(4, dtype=torch.bfloat16, device=device)
    launch: Any = _round_kernel
    launch[(1,)](x, out, 0xFFFF, SIZE=4)
    assert out[:3].isnan().all() and out[3].isinf()
    eager = op._round_stochastically(x.cpu(), torch.Generator().manual_seed(0))
    assert eager[:3].isnan().all() and eager[3].isinf()
