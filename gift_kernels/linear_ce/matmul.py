"""Matrix products that accumulate in a wider dtype than their operands."""

import functools
from typing import Any

import torch
from torch import Tensor


def wide_mm(a: Tensor, b: Tensor, out: Tensor, *, accumulate: bool = False) -> None:
    """out [M, N] (+)= a [M, K] @ b [K, N], summed in the dtype of `out`: float32 or float64.

    Where the device has `mixed_products`, 16-bit operands are multiplied as they are; elsewhere
    they are converted to the dtype of `out` first.
    """
    options: dict[str, Any] = {}
    if a.dtype != out.dtype and mixed_products(a.device, a.dtype):
        options["out_dtype"] = out.dtype
    else:
        a, b = a.to(out.dtype), b.to(out.dtype)
    if accumulate:
        torch.addmm(out, a, b, out=out, **options)
    else:
        torch.mm(a, b, out=out, **options)


@functools.cache
def mixed_products(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether PyTorch multiplies matrices of a 16-bit dtype into float32 on this device.

    CUDA does from PyTorch 2.8 on; ROCm and Intel's GPUs depending on the build; CPUs and Apple's
    GPUs do not. So it is tried.
    """
    if device.type == "cpu" or dtype.itemsize != 2:
        return False
    ones = torch.ones(16, 16, dtype=dtype, device=device)
    out = torch.ones(16, 16, device=device)
    mm: Any = torch.mm
    addmm: Any = torch.addmm
    try:
        addmm(out, ones, ones, out=out, out_dtype=torch.float32)
        product = mm(ones, ones, out=torch.empty_like(out), out_dtype=torch.float32)
    except torch.OutOfMemoryError:  # does not depend on the build
        raise
    except (RuntimeError, TypeError):  # the build or device does not support it
        return False
    return bool((out == 17).all() and (product == 16).all())
