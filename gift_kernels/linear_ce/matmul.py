"""Matrix products of 16-bit operands with float32 results."""

from typing import Any

import torch
from torch import Tensor


def float32_mm(a: Tensor, b: Tensor, out: Tensor, *, accumulate: bool = False) -> None:
    """out float32 [M, N] (+)= a [M, K] @ b [K, N], both of one 16-bit dtype or float32.

    Sums are float32. On CUDA 16-bit operands are multiplied as they are; elsewhere they are
    converted to float32 first.
    """
    options: dict[str, Any] = {}
    if a.is_cuda and a.dtype != torch.float32:
        options["out_dtype"] = torch.float32
    else:
        a, b = a.float(), b.float()
    if accumulate:
        torch.addmm(out, a, b, out=out, **options)
    else:
        torch.mm(a, b, out=out, **options)
