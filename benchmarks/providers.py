"""The registry of providers by operation; ours, full logits and lower bounds."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import merge_providers, peers
from benchmarks.cases import Case, CECase, MergeCase
from benchmarks.data import CEInputs
from benchmarks.provider import CE_OPS, Provider, compile_skip, eager_nll, from_nll, needs_triton


def providers_of(case: Case) -> list[Provider]:
    """Providers that implement the case's operation, ours first and lower bounds last."""
    registry = [*own_providers(), *peers.PROVIDERS, *merge_providers.PROVIDERS, *floors()]
    order = {"ours": 0, "baseline": 1, "peer": 2, "floor": 3}
    known = [provider for provider in registry if case.op in provider.ops]
    return sorted(known, key=lambda provider: order[provider.kind])


def gift_ce(impl: Any) -> Callable[[CECase, CEInputs], Callable[[], Tensor]]:
    """`prepare` of one of our implementations."""

    def prepare(case: CECase, inputs: CEInputs) -> Callable[[], Tensor]:
        from gift_kernels import Guide, token_confidence, weighted_ce

        softcap = case.shape.softcap
        head = (inputs.hidden, inputs.weight, inputs.target)
        if case.op == "token_confidence":
            return lambda: token_confidence(*head, logit_softcap=softcap, impl=impl)
        weight: Any = {"offline": inputs.token_weight, "self": "self"}.get(case.weighting)
        guide = None
        if case.weighting == "guide":
            assert inputs.guide_hidden is not None and inputs.guide_weight is not None
            guide = Guide(inputs.guide_hidden, inputs.guide_weight, logit_softcap=softcap)
        return lambda: weighted_ce(*head, weight, guide=guide, logit_softcap=softcap, impl=impl)

    return prepare


def _compiled(case: CECase, inputs: CEInputs) -> Callable[[], Tensor]:
    # The check has fewer tokens than the timed call: a dynamic size compiles once for both.
    for tensor in (inputs.hidden, inputs.guide_hidden, inputs.target):
        if tensor is not None:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return from_nll(torch.compile(eager_nll))(case, inputs)


def own_providers() -> list[Provider]:
    """Our implementations and the full-logits way that both are compared with."""
    return [
        Provider("gift triton", "ours", CE_OPS, gift_ce("triton"), skip=needs_triton),
        Provider("gift eager", "ours", CE_OPS, gift_ce("eager")),
        Provider("full logits", "baseline", CE_OPS, from_nll(eager_nll)),
        Provider("full logits, torch.compile", "peer", CE_OPS, _compiled, skip=compile_skip),
    ]


def floors() -> list[Provider]:
    """Lower bounds: the matrix products alone, and a copy."""

    def note(case: Case) -> str:
        if isinstance(case, MergeCase):
            return "reads and writes the weight once"
        return f"{case.units} bare products, {FLOOR_ROWS} rows at once"

    return [
        Provider("floor: products", "floor", CE_OPS, _bare_products, note=note),
        Provider("floor: copy", "floor", ("lora_merge",), _bare_copy, note=note),
    ]


FLOOR_ROWS = 4096


def _bare_products(case: CECase, inputs: CEInputs) -> Callable[[], Tensor]:
    """H Wᵀ for the forward (and the guide's), G W for dH, Gᵀ H for dW, in the case's dtype."""
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
    rows = min(FLOOR_ROWS, case.tokens)
    logits = hidden.new_empty(rows, case.shape.vocab)
    logits.normal_()
    gradient = torch.empty_like(hidden)
    head_gradient = torch.empty_like(weight) if case.trainable else None
    forwards = 0 if case.direction == "backward" else 1
    if case.direction != "backward" and case.weighting == "guide":
        forwards = 2

    def run() -> Tensor:
        for start in range(0, case.tokens, rows):
            part = hidden[start : start + rows]
            product = logits[: len(part)]
            for _ in range(forwards):
                torch.mm(part, weight.T, out=product)
            if case.direction == "forward":
                continue
            torch.mm(product, weight, out=gradient[start : start + rows])
            if head_gradient is not None:
                torch.mm(product.T, part, out=head_gradient)
        return gradient

    return run


def _bare_copy(case: MergeCase, inputs: Any) -> Callable[[], Tensor]:
    out = torch.empty_like(inputs.weight)
    return lambda: out.copy_(inputs.weight)
