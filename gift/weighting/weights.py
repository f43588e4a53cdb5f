"""The weight of each target token in the loss, in plain PyTorch; the formulas are in `formulas`.

The loss asks the kernels for each token's nll and for the statistics that the weighting reads,
forms the weights here without gradient, and adds up weight times nll. Weights that do not
depend on the trained model are formed once before training, by `guided_rows`.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from gift.config import TrainOptions
from gift.data.encoding import Example
from gift.errors import InputError
from gift.weighting.controls import controlled_weights
from gift.weighting.formulas import WEIGHTINGS
from gift.weighting.targets import GuidedRow, Targets, find_turn_ends, gather_targets
from gift_kernels import TokenStats, WeightTransform
from gift_kernels.reference import transform_weight


def check_weighting(config: TrainOptions) -> None:
    """InputError where an option is set that the weighting does not read."""
    fields = TrainOptions.model_fields
    for name in WEIGHTINGS[config.weighting].unread:
        if getattr(config, name) != fields[name].default:
            raise InputError(
                f"--{name.replace('_', '-')}: --weighting {config.weighting} has no confidence to "
                "change; leave it out, or choose another --weighting"
            )
    if config.excess_share != fields["excess_share"].default and config.weighting != "excess":
        raise InputError(
            f"--excess-share: --weighting {config.weighting} has none; leave it out, or choose "
            "--weighting excess"
        )
    if config.control is not None and config.weighting != "guide":
        raise InputError(
            f"--control: --weighting {config.weighting} is not formed of the guide's confidences "
            "alone; a control needs --weighting guide"
        )
    if config.control == "shuffle" and config.confidence_level == "sequence":
        raise InputError(
            "--control: with --confidence-level sequence a response's tokens have one confidence, "
            "and to shuffle them changes nothing; choose --control random"
        )


def refuse_all_zero(config: TrainOptions, rows: Sequence[GuidedRow]) -> None:
    """InputError where every weight is known to be 0, so that nothing would be learned."""
    if all(bool(known_zeros(config, gather_targets([row])).all()) for row in rows):
        raise InputError(
            f"every weight of the data is 0 (--weighting {config.weighting}, "
            f"--confidence-threshold {config.confidence_threshold:g}), so that nothing would be "
            "learned; lower --confidence-threshold, or give other confidences"
        )


def token_weights(config: TrainOptions, own: TokenStats, targets: Targets) -> Tensor:
    """Weights float32 [N] of N target tokens, as the options say.

    `own` has the statistics [N] of the trained model that the weighting reads.
    """
    weighting = WEIGHTINGS[config.weighting]
    if weighting.statistics:
        weight = _shape(config, weighting.signal(own, targets, config), targets)
    else:
        assert targets.fixed_weight is not None
        weight = targets.fixed_weight
    if config.end_weight is not None:
        weight = torch.where(targets.turn_ends, config.end_weight, weight)
    return weight


def known_zeros(config: TrainOptions, targets: Targets) -> Tensor:
    """Where `token_weights` is 0 for any trained model, bool [N].

    These targets are left out of the loss's matrix products.
    """
    weighting = WEIGHTINGS[config.weighting]
    if not weighting.statistics:
        return token_weights(config, TokenStats(), targets) == 0
    zero = torch.zeros_like(targets.turn_ends)
    if weighting.most is not None:  # mean and transform are monotonic
        zero = _shape(config, weighting.most(TokenStats(), targets, config), targets) == 0
    if config.end_weight is not None:
        zero = torch.where(targets.turn_ends, config.end_weight == 0, zero)
    return zero


def guided_rows(
    config: TrainOptions,
    examples: Sequence[Example],
    confidence: Sequence[Tensor] | None,
    line_starts: Sequence[np.ndarray] | None = None,
) -> list[GuidedRow]:
    """The rows for the loss.

    Args:
        confidence: float32 [targets] by example, None without a store.
        line_starts: for `--confidence-level step`, what `lines.line_starts` finds.
    """
    lines = line_starts or [None] * len(examples)
    spans = [_span(config, *pair) for pair in zip(examples, lines, strict=True)]
    given = confidence or [None] * len(examples)
    rows = [GuidedRow(*row) for row in zip(examples, given, spans, strict=True)]
    if WEIGHTINGS[config.weighting].statistics:
        return rows
    weights = _fixed_weights(config, rows)
    return [replace(row, weight=weight) for row, weight in zip(rows, weights, strict=True)]


def _fixed_weights(config: TrainOptions, rows: Sequence[GuidedRow]) -> list[Tensor]:
    """The weights float32 [targets] of every row, if they do not depend on the trained model."""
    signal = WEIGHTINGS[config.weighting].signal
    targets = [gather_targets([row]) for row in rows]
    signals = [signal(TokenStats(), row, config) for row in targets]
    if config.control is None:
        return [_shape(config, *pair) for pair in zip(signals, targets, strict=True)]
    # Tokens of a fixed weight are left out of the control.
    free = [
        torch.ones_like(row.turn_ends) if config.end_weight is None else ~row.turn_ends
        for row in targets
    ]
    shared = [_share(config, *pair) for pair in zip(signals, targets, strict=True)]
    numbers = [row.example.row for row in rows]
    return controlled_weights(
        config.control, config.seed, numbers, shared, free, _transform(config)
    )


def _span(config: TrainOptions, example: Example, line_starts: np.ndarray | None) -> Tensor:
    """Index int64 [targets] of the first target whose confidence is averaged with this one's."""
    begins = np.ones(example.targets, bool)
    if config.confidence_level != "token":
        ends = find_turn_ends(example).numpy()
        begins = np.append(True, ends[:-1])
        if config.confidence_level == "step":
            assert line_starts is not None
            begins |= line_starts
        if config.end_weight is not None:
            begins |= ends
    indices = np.where(begins, np.arange(len(begins)), 0)
    return torch.from_numpy(np.maximum.accumulate(indices))


def _shape(config: TrainOptions, signal: Tensor, targets: Targets) -> Tensor:
    """The weights [N] of a signal [N]: its means, then threshold, floor and power."""
    return transform_weight(_share(config, signal, targets), _transform(config))


def _share(config: TrainOptions, signal: Tensor, targets: Targets) -> Tensor:
    """The mean of the signal [N] over each span, repeated on its tokens [N]."""
    if config.confidence_level == "token":
        return signal
    span = targets.span
    sums = torch.zeros_like(signal, dtype=torch.float64).index_add_(0, span, signal.double())
    counts = torch.zeros_like(sums).index_add_(0, span, torch.ones_like(sums))
    return (sums[span] / counts[span]).to(signal.dtype)


def _transform(config: TrainOptions) -> WeightTransform:
    return WeightTransform(
        power=config.confidence_power,
        floor=config.confidence_floor,
        threshold=config.confidence_threshold,
    )
