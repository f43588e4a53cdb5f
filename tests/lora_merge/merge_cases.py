"""What the tests of the merge share: inputs, the truth, and distances to it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gift_kernels import reference

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Adapter(NamedTuple):
    a: Tensor  # [R, K] or [E, R, K]
    b: Tensor  # [M, R] or [E, M, R]
    scale: float


def make_weight(shape: Sequence[int], dtype: str, device: str, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(device, DTYPES[dtype])


def make_adapter(
    shape: Sequence[int], rank: int, dtype: str, device: str, scale: float = 0.7, seed: int = 1
) -> Adapter:
    """Factors for a weight [.., M, K]; entries of scale · B A have a deviation of about 0.1."""
    *experts, rows, columns = shape
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(*experts, rank, columns, generator=generator) * (0.1 / max(1, rank) ** 0.5)
    b = torch.randn(*experts, rows, rank, generator=generator)
    return Adapter(a.to(device, DTYPES[dtype]), b.to(device, DTYPES[dtype]), scale)


def merge_with(
    function: Any, weight: Tensor, adapters: Sequence[Adapter], **options: Any
) -> Tensor:
    """Calls lora_merge or lora_merge_ with one adapter or lists of several."""
    if len(adapters) == 1:
        return function(weight, *adapters[0], **options)
    a, b, scale = (list(part) for part in zip(*adapters, strict=True))
    return function(weight, a, b, scale, **options)


def truth(weight: Tensor, adapters: Sequence[Adapter]) -> Tensor:
    """The specification in float64."""
    merged = weight.double()
    for a, b, scale in adapters:
        merged = reference.lora_merge(merged, a.double(), b.double(), scale)
    return merged


def same_dtype_eager(weight: Tensor, adapters: Sequence[Adapter]) -> Tensor:
    """The specification in float32 (as PyTorch multiplies it), rounded once."""
    merged = weight.float()
    for a, b, scale in adapters:
        merged = reference.lora_merge(merged, a.float(), b.float(), scale)
    return merged.to(weight.dtype)


def assert_within_budget(merged: Tensor, weight: Tensor, adapters: Sequence[Adapter]) -> None:
    """The largest error is at most twice that of the same arithmetic in plain PyTorch."""
    assert merged.shape == weight.shape and merged.dtype == weight.dtype
    exact = truth(weight, adapters)
    error = (merged.double() - exact).abs().max().item()
    budget = 2 * (same_dtype_eager(weight, adapters).double() - exact).abs().max().item()
    assert error <= budget, f"error {error:.3g}, budget {budget:.3g}"


def assert_rounded_once(merged: Tensor, weight: Tensor, adapters: Sequence[Adapter]) -> None:
    """Every entry is a number near the exact one, rounded once: near means within float32's error
    of the sum, 2**-20 of the terms' size. A second rounding would move entries by more."""
    exact = truth(weight, adapters)
    size = weight.double().abs()
    for a, b, scale in adapters:
        size = size + abs(scale) * (b.double().abs() @ a.double().abs())
    error = 2**-20 * size
    lowest, highest = (exact - error).to(merged.dtype), (exact + error).to(merged.dtype)
    wrong = (merged < lowest) | (merged > highest) | merged.isnan()
    assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()} entries"


def ulps(x: Tensor, y: Tensor) -> Tensor:
    """Distance of two 16-bit floating-point tensors in units in the last place."""

    def ordinal(value: Tensor) -> Tensor:
        bits = value.contiguous().view(torch.int16).int()
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)

    return (ordinal(x) - ordinal(y)).abs()
