"""Adapters to other packages' linear cross-entropies, called as their users would call them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import CECase
from benchmarks.data import CEInputs
from benchmarks.provider import (
    CE_OPS,
    Provider,
    compile_skip,
    eager_nll,
    from_nll,
    needs_triton,
    weighted_mean_loss,
    weights_from,
)

BY_ROWS = 'reduction="none" and a product with the weights'


def _rows_note(case: CECase) -> str:
    if case.op == "token_confidence":
        return 'exp of reduction="none"'
    if case.weighting == "guide":
        return BY_ROWS + "; the guide in a call of its own"
    return "" if case.weighting == "uniform" else BY_ROWS


def _no_softcap(case: CECase, device: torch.device) -> str:
    return "has no soft-cap" if case.shape.softcap is not None else ""


def _gpu(case: CECase, device: torch.device) -> str:
    return "" if device.type == "cuda" else "needs a GPU"


def _liger_skip(case: CECase, device: torch.device) -> str:
    if device.type != "cuda" and case.shape.softcap is not None:
        return "its soft-cap needs a GPU"
    return needs_triton(case, device)


def _gpu_no_softcap(case: CECase, device: torch.device) -> str:
    return _gpu(case, device) or _no_softcap(case, device)


def _or_mean(
    nll_of: Callable[[CECase, Tensor, Tensor, Tensor], Tensor],
    mean: Callable[[CECase, CEInputs], Tensor],
) -> Callable[[CECase, CEInputs], Callable[[], Tensor]]:
    """A provider's own mean where all weights are 1 (its fast path), else its per-token losses."""
    by_rows = from_nll(nll_of)

    def prepare(case: CECase, inputs: CEInputs) -> Callable[[], Tensor]:
        if case.op == "weighted_ce" and case.weighting == "uniform":
            return lambda: mean(case, inputs)
        return by_rows(case, inputs)

    return prepare


def _torch_chunked() -> Callable[[CECase, CEInputs], Callable[[], Tensor]]:
    def call(hidden: Tensor, weight: Tensor, target: Tensor, reduction: str) -> Tensor:
        options = torch.nn.LinearCrossEntropyOptions()  # pyright: ignore
        return torch.nn.functional.linear_cross_entropy(  # pyright: ignore
            hidden, weight, target, reduction=reduction, options=options
        )

    return _or_mean(
        lambda case, hidden, weight, target: call(hidden, weight, target, "none"),
        lambda case, inputs: call(inputs.hidden, inputs.weight, inputs.target, "mean"),
    )


def _torch_missing(case: CECase, device: torch.device) -> str:
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return "needs torch 2.13"
    return _no_softcap(case, device)


def _liger(chunk_mem: int) -> Callable[[CECase, CEInputs], Callable[[], Tensor]]:
    def call(case: CECase, hidden: Tensor, weight: Tensor, target: Tensor, reduction: str) -> Any:
        from liger_kernel.transformers.functional import (  # pyright: ignore
            liger_fused_linear_cross_entropy,
        )

        return liger_fused_linear_cross_entropy(
            hidden,
            weight,
            target,
            reduction=reduction,
            softcap=case.shape.softcap,
            chunk_mem_const=chunk_mem,
        )

    return _or_mean(
        lambda case, hidden, weight, target: call(case, hidden, weight, target, "none"),
        lambda case, inputs: call(case, inputs.hidden, inputs.weight, inputs.target, "mean"),
    )


def _liger_token_scaling(case: CECase, inputs: CEInputs) -> Callable[[], Tensor]:
    def run() -> Tensor:
        from liger_kernel.transformers.functional import (  # pyright: ignore
            liger_fused_linear_cross_entropy,
        )

        loss = liger_fused_linear_cross_entropy(
            inputs.hidden,
            inputs.weight,
            inputs.target,
            reduction="sum",
            softcap=case.shape.softcap,
            use_token_scaling=True,
        )
        return loss / len(inputs.target)

    return run


def _only_self(case: CECase, device: torch.device) -> str:
    return _liger_skip(case, device) or (
        "" if case.weighting == "self" else "weights by the model's own confidence alone"
    )


def _scaled_skip(case: CECase, device: torch.device) -> str:
    reason = _no_softcap(case, device) or needs_triton(case, device)
    if not reason and _on_sm90(device) and case.dtype != "bfloat16":
        return "supports only bfloat16 on this device"
    return reason


def _scaled_note(case: CECase) -> str:
    kernel = "its CUTLASS kernel for sm_90" if _on_sm90(torch.device("cuda")) else ""
    return "; ".join(filter(None, [kernel, _rows_note(case)]))


def _on_sm90(device: torch.device) -> bool:
    if device.type != "cuda" or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability() == (9, 0)


def _liger_scaled(case: CECase, hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction  # pyright: ignore

    return LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, target)


def _cce(exact: bool) -> Callable[[CECase, CEInputs], Callable[[], Tensor]]:
    def nll_of(case: CECase, hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        from cut_cross_entropy import linear_cross_entropy  # pyright: ignore

        options = _cce_exact_options() if exact else {}
        softcap = case.shape.softcap
        return linear_cross_entropy(
            hidden, weight, target, softcap=softcap, reduction="none", **options
        )

    return from_nll(nll_of)


def _cce_exact_options() -> dict[str, Any]:
    """`cce_exact` where the version has it; in 25.1 the gradient filter is switched off instead."""
    from cut_cross_entropy import LinearCrossEntropyImpl  # pyright: ignore

    known = hasattr(LinearCrossEntropyImpl, "CCE_EXACT")
    return {"impl": "cce_exact"} if known else {"filter_eps": None}


def _cce_compiled(case: CECase, hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy  # pyright: ignore

    return linear_cross_entropy(
        hidden,
        weight,
        target,
        softcap=case.shape.softcap,
        reduction="none",
        impl="torch_compile",
    )


def _not_float32(case: CECase, device: torch.device) -> str:
    reason = _gpu(case, device)
    return reason or ("supports only 16-bit inputs" if case.dtype == "float32" else "")


def _quack(case: CECase, inputs: CEInputs) -> Callable[[], Tensor]:
    def rows(hidden: Tensor, weight: Tensor) -> Tensor:
        from quack.linear_cross_entropy import linear_cross_entropy_func  # pyright: ignore

        return linear_cross_entropy_func(hidden, weight, None, inputs.target, reduction="none")

    def mean() -> Tensor:
        from quack.linear_cross_entropy import chunked_linear_cross_entropy  # pyright: ignore

        return chunked_linear_cross_entropy(
            inputs.hidden,
            inputs.weight,
            inputs.target,
            chunk_size=_quack_chunk(case),
            reduction="mean",
        )

    if case.op == "token_confidence":
        return lambda: torch.exp(-rows(inputs.hidden, inputs.weight))
    if case.weighting == "uniform":
        return mean
    return lambda: weighted_mean_loss(case, inputs, rows)


def _quack_chunk(case: CECase) -> int:
    """Rows per chunk: quack's default, unless that equals D, where its epilogue fails."""
    return 4096 if case.shape.hidden != 4096 else 2048


def _quack_note(case: CECase) -> str:
    packages = "its compiler needs its packages installed, not on PYTHONPATH"
    if case.op == "weighted_ce" and case.weighting == "uniform":
        rows = _quack_chunk(case)
        return f"chunks of {rows} rows (fails where these are D); {packages}"
    return f"holds all logits: no per-token loss in chunks; {_rows_note(case)}; {packages}"


def _checkpointed_chunks(case: CECase, inputs: CEInputs) -> Callable[[], Tensor]:
    """Full logits of 1024 rows at a time, recomputed in the backward: needs no package."""
    from torch.utils.checkpoint import checkpoint

    def part(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return eager_nll(case, hidden, weight, target)

    def rows(hidden: Tensor, weight: Tensor) -> Tensor:
        parts = []
        for start in range(0, len(hidden), 1024):
            piece = slice(start, start + 1024)
            arguments = (hidden[piece], weight, inputs.target[piece])
            parts.append(checkpoint(part, *arguments, use_reentrant=False))
        return torch.cat(parts)  # pyright: ignore

    if case.op == "token_confidence":
        return lambda: torch.exp(-rows(inputs.hidden, inputs.weight))

    def loss() -> Tensor:
        nll = rows(inputs.hidden, inputs.weight)
        guide = (inputs.guide_hidden, inputs.guide_weight)
        weight = weights_from(case, inputs, nll, lambda: rows(*guide))  # pyright: ignore
        return (nll if weight is None else nll * weight).sum() / len(nll)

    return loss


_APPROXIMATE = 0.15

PROVIDERS = [
    Provider("full logits, checkpointed chunks", "peer", CE_OPS, _checkpointed_chunks),
    Provider(
        "torch linear_cross_entropy",
        "peer",
        CE_OPS,
        _torch_chunked(),
        skip=_torch_missing,
        note=_rows_note,
    ),
    *(
        Provider(
            f"Liger FLCE, chunk {size}",
            "peer",
            CE_OPS,
            _liger(size),
            package="liger_kernel",
            skip=_liger_skip,
            note=_rows_note,
        )
        for size in (1, 16)
    ),
    Provider(
        "Liger FLCE, token scaling",
        "peer",
        ("weighted_ce",),
        _liger_token_scaling,
        package="liger_kernel",
        skip=_only_self,
    ),
    Provider(
        "Liger scaled CE",
        "peer",
        CE_OPS,
        from_nll(_liger_scaled),
        package="liger_kernel",
        skip=_scaled_skip,
        note=_scaled_note,
    ),
    Provider(
        "CCE",
        "peer",
        CE_OPS,
        _cce(exact=False),
        package="cut_cross_entropy",
        skip=_not_float32,
        note=lambda case: "; ".join(filter(None, ["filters its gradient", _rows_note(case)])),
        budget=_APPROXIMATE,
    ),
    Provider(
        "CCE, exact",
        "peer",
        CE_OPS,
        _cce(exact=True),
        package="cut_cross_entropy",
        skip=_not_float32,
        note=_rows_note,
    ),
    Provider(
        "CCE, torch.compile",
        "peer",
        CE_OPS,
        from_nll(_cce_compiled),
        package="cut_cross_entropy",
        skip=compile_skip,
        note=_rows_note,
    ),
    Provider(
        "quack",
        "peer",
        CE_OPS,
        _quack,
        package="quack",
        skip=_gpu_no_softcap,
        note=_quack_note,
    ),
]
