"""Makes merge.safetensors: small inputs of lora_merge and W + Σ scale · B A in float64.

Run it from the repository's root: python tests/golden/make_merge.py
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# name: dtype of W, leading dimensions, (rank, dtype of the factors, scale) of each adapter
CASES: dict[str, tuple[torch.dtype, tuple[int, ...], list[tuple[int, torch.dtype, float]]]] = {
    "matrix": (BF16, (), [(8, BF16, 2.0)]),
    "half": (FP16, (), [(5, FP16, 0.25)]),
    "mixed": (BF16, (), [(16, FP32, 0.7)]),
    "adapters": (BF16, (), [(4, BF16, 1.5), (19, FP32, -0.3)]),
    "experts": (FP32, (3,), [(6, FP32, 1.0)]),
    "transposed": (BF16, (), [(8, FP32, 2.0)]),
}
ROWS, COLUMNS = 24, 40


def main() -> None:
    """Writes the file beside this one."""
    generator = torch.Generator().manual_seed(20260501)
    tensors: dict[str, Tensor] = {}
    for name, (dtype, experts, adapters) in CASES.items():
        weight = torch.randn(*experts, ROWS, COLUMNS, generator=generator).to(dtype)
        expected = weight.double()
        for i, (rank, factor_dtype, scale) in enumerate(adapters):
            a = torch.randn(*experts, rank, COLUMNS, generator=generator) * 0.1
            b = torch.randn(*experts, ROWS, rank, generator=generator)
            tensors[f"{name}.lora_a.{i}"] = a = a.to(factor_dtype)
            tensors[f"{name}.lora_b.{i}"] = b = b.to(factor_dtype)
            expected = expected + scale * (b.double() @ a.double())
        if name == "transposed":
            weight, expected = weight.T.contiguous(), expected.T.contiguous()
        tensors[f"{name}.weight"], tensors[f"{name}.expected"] = weight, expected
        scales = [scale for _, _, scale in adapters]
        tensors[f"{name}.scale"] = torch.tensor(scales, dtype=torch.float64)
    save_file(tensors, Path(__file__).with_name("merge.safetensors"))


if __name__ == "__main__":
    main()
