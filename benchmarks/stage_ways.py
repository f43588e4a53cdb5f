"""Ways to annotate and to train: ours, and how others would do it with the same model and rows."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.turns import failure
from gift.annotation.batches import annotate_batch
from gift.config import TrainConfig
from gift.data.batches import make_batch, plan_batches
from gift.data.encoding import Example
from gift.models.head import last_hidden_state
from gift.training.gradients import accumulate_gradients
from gift.training.memory import layers_of
from gift.training.micro_batches import Split
from gift.weighting.targets import GuidedRow, gather_targets


@dataclass(frozen=True)
class Way:
    """`ready`, untimed, sets the shared model up; `run` returns what the way found."""

    ready: Callable[[], None]
    run: Callable[[], list[Tensor]]


def annotate_ours(
    model: Any, examples: Sequence[Example], tokens: int, packed: bool
) -> list[Tensor]:
    """Confidences of all targets in batches of so many tokens, as `gift annotate` does it."""
    groups = _groups(examples, tokens, packed)
    batches = [make_batch(group, packed=packed).to(model.device) for group in groups]
    found = [annotate_batch(model, batch)[0] for batch in batches]
    return [_in_order(groups, torch.cat(found))]


def annotate_full(model: Any, examples: Sequence[Example], tokens: int) -> list[Tensor]:
    """The same from full logits of padded batches; with 0 tokens, of one row at a time."""
    groups = _groups(examples, tokens, packed=False)
    found = [full_logit_confidence(model, group) for group in groups]
    return [_in_order(groups, torch.cat(found))]


@torch.no_grad()
def full_logit_confidence(model: Any, rows: Sequence[Example]) -> Tensor:
    """softmax of all logits in float32, of which the targets' are taken."""
    batch = make_batch(rows, packed=False).to(model.device)
    logits = model(**batch.inputs, use_cache=False).logits.float()
    probability = torch.log_softmax(logits, -1).flatten(0, 1)
    return probability[batch.predicts].gather(1, batch.targets[:, None]).squeeze(1).exp()


def _groups(examples: Sequence[Example], tokens: int, packed: bool) -> list[list[Example]]:
    lengths = [len(example.input_ids) for example in examples]
    plan = plan_batches(lengths, tokens, packed=packed)
    return [[examples[number] for number in numbers] for numbers in plan]


def _in_order(groups: Sequence[Sequence[Example]], confidence: Tensor) -> Tensor:
    """Confidences of the groups' targets in the order of the rows, on the CPU."""
    rows = [example for group in groups for example in group]
    parts = dict(zip([row.row for row in rows], range(len(rows)), strict=True))
    split = confidence.cpu().split([example.targets for example in rows])
    return torch.cat([split[parts[row]] for row in sorted(parts)])


def loss_ours(config: TrainConfig, adapted: Any, rows: Sequence[GuidedRow], split: Split) -> float:
    """Σ w·nll and its gradients, as `gift train` finds them."""
    return float(accumulate_gradients(config, adapted, rows, split)[0][0])


def loss_by_micro_batches(
    loss_of: Callable[[Any, Sequence[GuidedRow]], Tensor],
    adapted: Any,
    rows: Sequence[GuidedRow],
    size: int,
) -> float:
    """Σ w·nll and its gradients by another way, so many padded rows at once."""
    total = 0.0
    ordered = sorted(rows, key=lambda row: (-len(row.example.input_ids), row.example.row))
    for start in range(0, len(ordered), size):
        loss = loss_of(adapted, ordered[start : start + size])
        loss.backward()
        total += float(loss.detach())
    return total


def full_logit_loss(adapted: Any, micro: Sequence[GuidedRow]) -> Tensor:
    """Σ w·nll from the logits of all positions, as a Trainer's subclass computes it."""
    device = adapted.device
    batch = make_batch([row.example for row in micro], packed=False).to(device)
    logits = adapted(**batch.inputs, use_cache=False).logits.float().flatten(0, 1)
    following = batch.inputs["input_ids"].roll(-1, 1).flatten()
    nll = torch.nn.functional.cross_entropy(logits, following, reduction="none")
    weight: Any = gather_targets(micro).guide
    return (weight.to(device) * nll[batch.predicts]).sum()


def liger_loss(adapted: Any, micro: Sequence[GuidedRow]) -> Tensor:
    """Σ w·nll from Liger's fused loss over the target positions."""
    from liger_kernel.transformers.functional import (  # pyright: ignore
        liger_fused_linear_cross_entropy,
    )

    base = adapted.get_base_model()
    head = base.get_output_embeddings().weight
    batch = make_batch([row.example for row in micro], packed=False).to(head.device)
    hidden = last_hidden_state(base, **batch.inputs).flatten(0, 1)[batch.predicts].to(head.dtype)
    nll: Any = liger_fused_linear_cross_entropy(hidden, head, batch.targets, reduction="none")
    weight: Any = gather_targets(micro).guide
    return (weight.to(head.device) * nll).sum()


def liger_fails(model: Any) -> str:
    """Gives a model Liger's layers; returns what failed, empty if nothing did."""
    try:
        _use_liger_layers(model)
    except Exception as error:  # other people's code may raise anything
        return failure(error)
    return ""


def _use_liger_layers(model: Any) -> None:
    """Uses Liger's norms and MLPs in this model only: its patches of the module are undone."""
    from liger_kernel.transformers.monkey_patch import (  # pyright: ignore
        _apply_liger_kernel_to_instance,
    )

    module = sys.modules[type(model).__module__]
    before = dict(vars(module))
    _apply_liger_kernel_to_instance(
        model, rope=False, rms_norm=True, swiglu=True, cross_entropy=False,
        fused_linear_cross_entropy=False,
    )  # fmt: skip
    vars(module).update(before)


def compile_blocks(model: Any, compiled: bool) -> None:
    """Each block compiled by itself for any length, or as it was; what was compiled is kept."""
    layers = layers_of(model)
    if compiled and not hasattr(layers[0], "compiled_before"):
        torch.compiler.reset()  # all models share the limit of variants of a block's code
        for layer in layers:
            layer.compile(dynamic=True)
            layer.compiled_before = layer._compiled_call_impl
    for layer in layers:
        layer._compiled_call_impl = layer.compiled_before if compiled else None
