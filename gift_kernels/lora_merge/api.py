"""LoRA merge: W + Σ scale · B A, read once, accumulated in float32, rounded once.

Letters: E experts, M out, K in, R LoRA rank. The formula is LoRA's (Hu et al., ICLR 2022,
arXiv 2106.09685, section 4.1); a float32 delta that is rounded before it is added, or added in the
weight's own dtype, would round two or three times.

Two implementations behind one operator: a Triton kernel (`gift_kernels.lora_merge.triton`) and, in
this file, PyTorch on blocks of rows: any device, float64 too, working memory of a few blocks.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from gift_kernels import checks
from gift_kernels.implementation import Impl, resolve_impl

BLOCK_ELEMENTS = 1 << 19  # of W, upcast at a time


@contextlib.contextmanager
def _exact_float32_products() -> Iterator[None]:
    """Full float32 matrix products, even if the user has enabled TF32 or bfloat16 for them."""
    mkldnn: Any = torch.backends.mkldnn
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, mkldnn.matmul)
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def _round_stochastically(value: Tensor, generator: torch.Generator) -> Tensor:
    """Float32 to bfloat16, up or down with the probability that makes the mean exact."""
    noise = torch.randint(
        1 << 16, value.shape, generator=generator, device=value.device, dtype=torch.int32
    )
    bits = (value.view(torch.int32) + noise) & -(1 << 16)
    # A NaN's bits may overflow into those of zero.
    return torch.where(value.isnan(), value, bits.view(torch.float32)).to(torch.bfloat16)


def merge_in_blocks(
    weight: Tensor,
    out: Tensor,
    lora_a: list[Tensor],
    lora_b: list[Tensor],
    scale: list[float],
    seed: int | None,
) -> None:
    """out = round(weight + Σ scale · B A), weight [M, K] or [E, M, K]; `out` may be `weight`."""
    if weight.dim() == 2:
        weight, out = weight.unsqueeze(0), out.unsqueeze(0)
        lora_a, lora_b = [a.unsqueeze(0) for a in lora_a], [b.unsqueeze(0) for b in lora_b]
    wide = torch.float64 in {t.dtype for t in (weight, *lora_a, *lora_b)}
    dtype = torch.float64 if wide else torch.float32
    generator = None if seed is None else torch.Generator(weight.device).manual_seed(seed)
    rows_at_once = max(1, BLOCK_ELEMENTS // max(1, weight.shape[-1]))
    with _exact_float32_products():
        for expert in range(weight.shape[0]):
            # Contiguous, so that the result does not depend on the factors' memory layout.
            a_of = [a[expert].to(dtype).contiguous() for a in lora_a]
            for first in range(0, weight.shape[1], rows_at_once):
                rows = slice(first, first + rows_at_once)
                block = torch.empty_like(weight[expert, rows], dtype=dtype)
                block.copy_(weight[expert, rows])
                for a, b, factor in zip(a_of, lora_b, scale, strict=True):
                    # addmm may add the small products to W one by one, with W's rounding error.
                    block.add_(b[expert, rows].to(dtype).contiguous() @ a, alpha=factor)
                if generator is not None:
                    block = _round_stochastically(block.float(), generator)
                out[expert, rows].copy_(block)


def _merge_into(
    weight: Tensor,
    out: Tensor,
    lora_a: list[Tensor],
    lora_b: list[Tensor],
    scale: list[float],
    fan_in_fan_out: bool,
    seed: int | None,
    impl: str,
) -> None:
    tensors = {"weight": weight}
    tensors |= {f"lora_a[{i}]": a for i, a in enumerate(lora_a)}
    tensors |= {f"lora_b[{i}]": b for i, b in enumerate(lora_b)}
    implementation = resolve_impl(impl, tensors)
    if fan_in_fan_out:
        lora_a, lora_b = [b.mT for b in lora_b], [a.mT for a in lora_a]
    if implementation == "triton":
        from gift_kernels.lora_merge.triton import merge

        merge(weight, out, lora_a, lora_b, scale, seed)
    else:
        merge_in_blocks(weight, out, lora_a, lora_b, scale, seed)


def _merge_op(
    weight: Tensor,
    lora_a: list[Tensor],
    lora_b: list[Tensor],
    scale: list[float],
    fan_in_fan_out: bool,
    seed: int | None,
    impl: str,
) -> Tensor:
    out = torch.empty_like(weight)
    _merge_into(weight, out, lora_a, lora_b, scale, fan_in_fan_out, seed, impl)
    return out


def _merge_in_place_op(
    weight: Tensor,
    lora_a: list[Tensor],
    lora_b: list[Tensor],
    scale: list[float],
    fan_in_fan_out: bool,
    seed: int | None,
    impl: str,
) -> None:
    _merge_into(weight, weight, lora_a, lora_b, scale, fan_in_fan_out, seed, impl)
    torch.autograd.graph.increment_version(weight)


def _fake_merge(weight: Tensor, *_arguments: object) -> Tensor:
    return torch.empty_like(weight)


def _register(name: str, signature: str, implementation: Any, fake: Any) -> None:
    # torch.library.custom_op would import torch._dynamo, and Triton with it, at the first call.
    torch.library.define(name, signature, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(name, "CompositeExplicitAutograd", implementation)
    torch.library.register_fake(name, fake)


_ARGUMENTS = (
    "Tensor[] lora_a, Tensor[] lora_b, float[] scale, bool fan_in_fan_out, int? seed, str impl"
)
_register(
    "gift_kernels::lora_merge",
    f"(Tensor weight, {_ARGUMENTS}) -> Tensor",
    _merge_op,
    _fake_merge,
)
_register(
    "gift_kernels::lora_merge_",
    f"(Tensor(a!) weight, {_ARGUMENTS}) -> ()",
    _merge_in_place_op,
    lambda *_arguments: None,
)


def lora_merge(
    weight: Tensor,
    lora_a: Tensor | Sequence[Tensor],
    lora_b: Tensor | Sequence[Tensor],
    scale: float | Sequence[float],
    *,
    fan_in_fan_out: bool = False,
    stochastic_rounding_seed: int | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """W + Σ scale · B A as a new tensor: float32 inside, one rounding to W's dtype.

    Lists merge several adapters, of any ranks, in the same pass over W, with one rounding.

    Args:
        weight: [M, K], or [E, M, K] for fused experts; bfloat16, float16, float32 or float64; any
            strides (fastest where rows or columns are contiguous and 16-byte aligned).
        lora_a: [R, K] ([E, R, K]), or a list; any of the dtypes, not necessarily the weight's.
        lora_b: [M, R] ([E, M, R]), or a list as long as `lora_a`.
        scale: factor of B A, usually α / R; one number for all adapters, or a list.
        fan_in_fan_out: the weight is stored transposed, [K, M] ([E, K, M]), as in GPT-2's Conv1D;
            so is the result.
        stochastic_rounding_seed: rounds to bfloat16 up or down with the probability that makes the
            expected result exact; a finite result beyond the largest bfloat16 may become infinite
            as in rounding to nearest. The same seed gives the same result with the same
            implementation and device; Triton and eager draw different numbers. Use a different seed
            for every tensor.
        impl: "triton" (CUDA; on the CPU under TRITON_INTERPRET=1 only), "eager" (anywhere), or
            "auto": Triton on CUDA where it is installed and nothing is float64, else eager. The
            first call for a new (M, K, ΣR) on a machine autotunes over up to three configurations
            and caches the fastest on disk; GIFT_KERNELS_AUTOTUNE=0 in the environment takes the
            first.

    Returns:
        A tensor like `weight`, without gradient. Float64 anywhere makes the arithmetic float64.
        NaN and infinities in W, A or B give NaN or infinity in the entries that depend on them.

    Raises:
        TypeError, ValueError: naming the argument; an `impl` that cannot run never falls back.
    """
    arguments = checks.merge_arguments(
        weight, lora_a, lora_b, scale, fan_in_fan_out, stochastic_rounding_seed, impl
    )
    return torch.ops.gift_kernels.lora_merge.default(*arguments)


def lora_merge_(
    weight: Tensor,
    lora_a: Tensor | Sequence[Tensor],
    lora_b: Tensor | Sequence[Tensor],
    scale: float | Sequence[float],
    *,
    fan_in_fan_out: bool = False,
    stochastic_rounding_seed: int | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Like `lora_merge`, but overwrites `weight` and returns it, without a second copy.

    Raises:
        TypeError, ValueError: as `lora_merge`; also if entries of `weight` share memory.
    """
    arguments = checks.merge_arguments(
        weight, lora_a, lora_b, scale, fan_in_fan_out, stochastic_rounding_seed, impl
    )
    checks.no_shared_memory(weight)
    torch.ops.gift_kernels.lora_merge_.default(*arguments)
    return weight
