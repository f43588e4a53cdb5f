"""The type of a provider, and workarounds that several of them share.

A CE provider turns a case and its inputs into the loss Σ w·nll / N (`weighted_ce`) or into
confidences [N] (`token_confidence`); gradients come from autograd. A merge provider returns the
merged weight. If a package lacks the operation, its users' usual workaround runs, and the
note of the row says so. Packages are imported only when they are used.
"""

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case, CECase, gpu_cases
from benchmarks.data import CEInputs

# "ours", "candidate" (ours with other settings), "peer", "baseline" or "floor" (the lower bound)
Kind = str
CE_OPS = ("weighted_ce", "token_confidence")


@dataclass(frozen=True)
class Provider:
    """One column of the comparison.

    `prepare` makes the function to time from a case and inputs, once, untimed; `skip` says why a
    case is not run (an empty string runs it); `note` says what differs from a native call;
    `budget` replaces the error budget where the provider approximates by design.
    """

    name: str
    kind: Kind
    ops: tuple[str, ...]
    prepare: Callable[[Any, Any], Callable[[], Tensor]]
    package: str | None = None
    skip: Callable[[Any, torch.device], str] = lambda case, device: ""
    note: Callable[[Any], str] = lambda case: ""
    budget: float | None = None

    def missing(self) -> str:
        """`not installed` where the package is absent."""
        absent = self.package is not None and importlib.util.find_spec(self.package) is None
        return "not installed" if absent else ""


def logits_of(case: CECase, hidden: Tensor, weight: Tensor) -> Tensor:
    """float32 logits [N, V] as in Transformers: product and soft-cap in the inputs' dtype."""
    logits = torch.nn.functional.linear(hidden, weight)
    softcap = case.shape.softcap
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.float()


def eager_nll(case: CECase, hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """−log softmax of the targets [N] from full logits."""
    logits = logits_of(case, hidden, weight)
    return torch.nn.functional.cross_entropy(logits, target, reduction="none")


def weights_from(
    case: CECase, inputs: CEInputs, nll: Tensor | None, guide_nll: Callable[[], Tensor]
) -> Tensor | None:
    """The row weights [N] of a case, None for 1; `guide_nll` is called without gradients."""
    if case.weighting == "offline":
        return inputs.token_weight
    if case.weighting == "self":
        assert nll is not None
        return torch.exp(-nll.detach())
    if case.weighting == "guide":
        with torch.no_grad():
            return torch.exp(-guide_nll())
    return None


def weighted_mean_loss(
    case: CECase, inputs: CEInputs, nll_of: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Σ w·nll / N from a function of hidden states and head to nll [N]."""
    nll = nll_of(inputs.hidden, inputs.weight)
    weight = weights_from(
        case,
        inputs,
        nll,
        lambda: nll_of(inputs.guide_hidden, inputs.guide_weight),  # pyright: ignore
    )
    weighted = nll if weight is None else nll * weight.to(nll.dtype)
    return weighted.sum() / len(nll)


def from_nll(
    nll_of: Callable[[CECase, Tensor, Tensor, Tensor], Tensor],
) -> Callable[[CECase, CEInputs], Callable[[], Tensor]]:
    """`prepare` of a provider that only has per-token losses."""

    def prepare(case: CECase, inputs: CEInputs) -> Callable[[], Tensor]:
        def rows(hidden: Tensor, weight: Tensor) -> Tensor:
            return nll_of(case, hidden, weight, inputs.target)

        if case.op == "token_confidence":
            return lambda: torch.exp(-rows(inputs.hidden, inputs.weight))
        return lambda: weighted_mean_loss(case, inputs, rows)

    return prepare


def needs_triton(case: Case, device: torch.device) -> str:
    """Why Triton kernels cannot run here; they can on CUDA, and anywhere in the interpreter."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return "needs a GPU"
    return ""


def compile_skip(case: CECase, device: torch.device) -> str:
    """Why torch.compile is not asked for a case."""
    if device.type != "cuda":
        return "needs a GPU"
    if case not in gpu_cases(quick=True):
        return "compiled only for the first cases: compiling takes too much time"
    return ""
