"""Gradients of Σ w·nll over the rows of an optimizer step, one micro-batch after the other.

Nothing here synchronises with the device: the host runs ahead, and reads results once per step, at
its end.
"""

from collections.abc import Sequence
from typing import Any

import torch
from peft.helpers import disable_input_dtype_casting
from torch import Tensor

from gift.config import TrainOptions
from gift.data.batches import Batch, make_batch
from gift.models.head import LMHead, last_hidden_state, lm_head
from gift.training.micro_batches import BAND_NAMES, IGNORE_INDEX, MicroBatch, Split, micro_batches
from gift.training.sharding import whole_head
from gift.weighting.formulas import WEIGHTINGS
from gift.weighting.targets import GuidedRow
from gift.weighting.weights import token_weights
from gift_kernels import weighted_ce

# Sums over micro-batches; in the tensor the loss of each confidence band follows them. Tokens whose
# weight is known to be 0 have no nll, are not `counted` and cannot be correct; `not_finite` counts
# micro-batches.
SUMS = ("loss", "nll", "weight", "tokens", "counted", "correct", "not_finite")


def flat_gradients(parameters: Sequence[Tensor]) -> Tensor:
    """One buffer of zeros, float32; the `grad` of every parameter becomes a part of it."""
    sizes = [parameter.numel() for parameter in parameters]
    flat = torch.zeros(sum(sizes), device=parameters[0].device)
    for parameter, part in zip(parameters, flat.split(sizes), strict=True):
        parameter.grad = part.view_as(parameter)
    return flat


def accumulate_gradients(
    config: TrainOptions,
    model: Any,
    rows: Sequence[GuidedRow],
    split: Split,
    idle: Sequence[GuidedRow] = (),
) -> tuple[Tensor, list[tuple[tuple[int, ...], Tensor]]]:
    """Adds the gradients of Σ w·nll over a rank's rows, one micro-batch after the other.

    The `idle` rows pass through the model too, each alone, and add nothing (`idle_rows`).

    Returns, on the device, SUMS and the weighted loss Σ w·nll of each confidence band, float64,
    and the rows and the loss of every micro-batch.
    """
    base = model.get_base_model()
    device = lm_head(base).weight.device
    sums = torch.zeros(len(SUMS) + len(BAND_NAMES), dtype=torch.float64, device=device)
    losses = []
    # Also in the backward, where a layer may recompute its activations.
    with whole_head(base), disable_input_dtype_casting(model, active=in_bfloat16(model)):
        head = lm_head(base)
        for micro in micro_batches(config, rows, split, device):
            nll, weight, top1 = _token_losses(config, model, head, micro)
            # Not 0 · nll, which is NaN where the nll is infinite.
            row_loss = torch.where(weight == 0, 0, weight * nll)
            loss = row_loss.sum()
            loss.backward()
            loss = loss.detach()
            losses.append((micro.rows, loss))
            ones, diverged = torch.ones_like(nll), ~loss.isfinite()
            totals = (loss, nll, weight, ones, micro.counted, top1, diverged)
            sums[: len(SUMS)] += torch.stack([value.detach().double().sum() for value in totals])
            if micro.band is not None:
                sums[len(SUMS) :].index_add_(0, micro.band, row_loss.detach().double())
        for row in idle:
            batch = make_batch([row.example], packed=split.packed).to(device)
            (0 * predicting_states(model, batch)).sum().backward()
    return sums, losses


def _token_losses(
    config: TrainOptions, model: Any, head: LMHead, micro: MicroBatch
) -> tuple[Tensor, Tensor, Tensor]:
    """Of every target: its nll, its weight, and whether it is the model's likeliest token."""
    nll, stats = weighted_ce(
        predicting_states(model, micro.batch).to(head.weight.dtype),
        head.weight,
        micro.batch.targets,
        reduction="none",
        ignore_index=IGNORE_INDEX,
        stats=("top1", *WEIGHTINGS[config.weighting].statistics),
        **head.options(),
    )
    assert stats.top1 is not None
    return nll, token_weights(config, stats, micro.targets), stats.top1


def predicting_states(model: Any, batch: Batch) -> Tensor:
    """Hidden states [N, D] that predict the batch's targets.

    In a bfloat16 model the adapter's products are bfloat16 too. Its parameters, their gradients
    and the optimizer stay float32: autocast rounds a copy for each product.
    """
    kind = batch.predicts.device.type
    with torch.autocast(kind, torch.bfloat16, enabled=in_bfloat16(model)):
        hidden = last_hidden_state(model.get_base_model(), **batch.inputs)
    return hidden.flatten(0, 1).index_select(0, batch.predicts)


def in_bfloat16(model: Any) -> bool:
    """Whether the adapter multiplies in bfloat16; never in float16, whose sums overflow."""
    return lm_head(model.get_base_model()).weight.dtype == torch.bfloat16
