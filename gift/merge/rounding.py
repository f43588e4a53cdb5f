"""A LoRA merge with an error of at most one unit in the last place.

Float32 sums have errors of about 2⁻²⁴ of their terms. After rounding to 16 bits these do not show,
except where the terms cancel: an entry far smaller than its terms W and B A has a last place finer
than the error. These few entries (about ten in a million) are found by their exponents and computed
again in float64.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gift_kernels.lora_merge.api import lora_merge

# Exponent bits, mantissa bits, and how many powers of two below its terms an entry is suspect.
_SUSPECT = {torch.bfloat16: (0x7F80, 7, 11), torch.float16: (0x7C00, 10, 9)}
_ROWS_AT_ONCE = 64


def merge_to_one_ulp(
    weight: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scales: Sequence[float],
    out_dtype: torch.dtype,
) -> Tensor:
    """W [M, K] + Σ scale · B [M, R] @ A [R, K], rounded once to `out_dtype`.

    Arithmetic is float32 (float64 where W or a factor is). For 16-bit outputs the result is the
    exact sum's nearest number, or its neighbour where the sum lies near the middle of two.
    """
    wide = weight if out_dtype == weight.dtype or weight.dtype == torch.float64 else weight.float()
    merged = lora_merge(wide, list(lora_a), list(lora_b), list(scales)).to(out_dtype)
    if out_dtype not in _SUSPECT or weight.dtype == torch.float64:
        return merged
    reach = torch.zeros(weight.shape[0], device=weight.device)
    for a, b, scale in zip(lora_a, lora_b, scales, strict=True):
        longest = torch.linalg.vector_norm(a.float(), dim=0).max()
        reach += abs(scale) * longest * torch.linalg.vector_norm(b.float(), dim=1)
    places = _suspects(weight.to(out_dtype), merged, reach)
    if places.numel():
        rows, columns = places // weight.shape[1], places % weight.shape[1]
        exact = weight[rows, columns].double()
        for a, b, scale in zip(lora_a, lora_b, scales, strict=True):
            exact += scale * (b[rows].double() * a[:, columns].T.double()).sum(1)
        merged.view(-1)[places] = exact.to(out_dtype)
    return merged


def _suspects(weight: Tensor, merged: Tensor, reach: Tensor) -> Tensor:
    """Flat indices of entries much smaller than the weight's entry or than `reach` [M], |B A|'s
    bound; all tensors of one 16-bit dtype but `reach`."""
    exponent, mantissa, distance = _SUSPECT[merged.dtype]
    limit = (reach * 2.0 ** -(distance + 2)).to(merged.dtype).view(torch.int16).unsqueeze(1)
    w, m = weight.contiguous().view(torch.int16), merged.view(torch.int16)
    if merged.is_cuda:
        small = ((w & exponent) - (m & exponent)) > (distance << mantissa)
        return (small | ((m & 0x7FFF) < limit)).flatten().nonzero().squeeze(1)
    # NumPy's 16-bit integer arithmetic is several times faster than PyTorch's on the CPU.
    w, m, limit = w.numpy(), m.numpy(), limit.numpy()
    found = []
    for row in range(0, len(m), _ROWS_AT_ONCE):
        part = slice(row, row + _ROWS_AT_ONCE)
        small = ((w[part] & exponent) - (m[part] & exponent)) > (distance << mantissa)
        small |= (m[part] & 0x7FFF) < limit[part]
        found.append(np.flatnonzero(small) + row * m.shape[1])
    return torch.from_numpy(np.concatenate(found)) if found else torch.zeros(0, dtype=torch.int64)
