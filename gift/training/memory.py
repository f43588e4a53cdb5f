"""Fits a training step into memory: the size of micro-batches, and activation checkpointing.

With `--gradient-checkpointing auto` the largest micro-batch of the run is tried before the first
step: with all activations kept, with half the tokens and so on while the device stays busy; then,
from the full size again, with those of every layer recomputed in the backward, down to the longest
row. All ranks take the first that fits on each of them.

A sharded model is not tried: a rank that fails in the middle would leave the others waiting to
gather the next block. Its memory is measured on short rows and extrapolated to the tokens of a
micro-batch.
"""

import gc
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from gift.config import TrainConfig, TrainOptions
from gift.console import error_console
from gift.data.batches import size_of
from gift.data.encoding import Example
from gift.distributed.ranks import Group
from gift.errors import InputError, is_out_of_memory
from gift.models.memory import attempt
from gift.storage.files import read_json, write_json
from gift.training.gradients import accumulate_gradients
from gift.training.micro_batches import Split, global_batches, plan_micro_batches
from gift.weighting.targets import GuidedRow

RECORD = "memory.json"
# Fewer tokens leave a device idle; below this it is better to recompute activations.
BUSY_TOKENS = 1024
# Lengths of the rows on which a sharded model's memory is measured.
SHORT, LONG = 128, 256
# Share of a GPU that a trial leaves free: later micro-batches of other shapes fragment the memory.
MARGIN = 0.05


@dataclass(frozen=True)
class Memory:
    """At most `tokens` tokens a micro-batch; the first `recomputed` layers recompute theirs."""

    tokens: int
    recomputed: int


def settle_memory(
    config: TrainConfig,
    model: Any,
    rows: Sequence[GuidedRow],
    split: Split,
    group: Group,
    work: Path,
) -> Split:
    """Sets which layers of the model recompute their activations; returns the split to train with.

    The result is stored in `work`, so that a run resumed with the same settings, on as many devices
    of the same kind, uses it again. A trial leaves no gradients and restores random states.

    InputError: a micro-batch of one row does not fit even with all layers recomputed.
    """
    layers = layers_of(model)
    asked = config.gradient_checkpointing
    if asked != "auto":
        count = {"on": len(layers), "off": 0}.get(asked)
        found = Memory(split.tokens, min(int(asked), len(layers)) if count is None else count)
        if count != 0 and not layers:
            raise InputError(
                f"--gradient-checkpointing: {type(model.get_base_model()).__name__} has no layers "
                "whose activations can be recomputed; choose off"
            )
    else:
        tried_for = _situation(config, model, split, group)
        found = group.from_main(lambda: _recorded(work, tried_for))
        if found is None:
            found = _try(config, model, rows, split, group, len(layers))
            if group.is_main:
                write_json(work / RECORD, {**asdict(found), "tried_for": tried_for})
    recompute(model, found.recomputed)
    if group.is_main:
        error_console.print(
            f"note: micro-batches of at most {found.tokens} tokens; activations of "
            f"{found.recomputed} of {len(layers)} layers are recomputed",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    return replace(split, tokens=found.tokens, recomputed=found.recomputed)


@contextmanager
def forgotten_if_short(work: Path) -> Iterator[None]:
    """Removes the trial's result if the block runs out of memory, so that resuming tries again."""
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            (work / RECORD).unlink(missing_ok=True)
        raise


def _situation(config: TrainConfig, model: Any, split: Split, group: Group) -> dict[str, Any]:
    """What a trial depends on besides the inputs and settings of the adapter, as JSON.

    `devices` has name and bytes of each rank's device; for a CPU there is no limit.
    """
    device = next(model.parameters()).device
    own: list[Any] = [device.type, 0]
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        own = [properties.name, properties.total_memory]
    return {
        "shard": config.shard,
        "micro_batch_tokens": split.tokens,
        "micro_batch_size": config.micro_batch_size,
        "devices": group.gather([own]),
    }


def _recorded(work: Path, tried_for: dict[str, Any]) -> Memory | None:
    """The result of an interrupted run in the same situation."""
    if not (work / RECORD).exists():
        return None
    record = read_json(work / RECORD)
    return Memory(**record) if record.pop("tried_for") == tried_for else None


def _try(
    config: TrainConfig,
    model: Any,
    rows: Sequence[GuidedRow],
    split: Split,
    group: Group,
    layers: int,
) -> Memory:
    """The first of `_choices` with which the largest micro-batch fits on every rank."""
    longest = max(len(row.example.input_ids) for row in rows)
    device = next(model.parameters()).device
    measured: dict[int, tuple[int, int]] = {}
    for choice in _choices(split.tokens, layers, longest):
        chosen = largest_micro_batch(config, rows, replace(split, tokens=choice.tokens), group)
        recompute(model, choice.recomputed)
        whole = replace(split, tokens=sys.maxsize)
        if config.shard:
            if choice.recomputed not in measured:
                measured[choice.recomputed] = _measure(config, model, whole)
            fits = _would_fit(model, _size(chosen, split), *measured[choice.recomputed])
        else:
            fits = _fits(config, model, chosen, whole)
        misses = torch.tensor(float(not fits), device=device)
        group.all_reduce_(misses)
        if not misses:
            return choice
    how = " with all activations recomputed" if layers else ""
    raise InputError(
        f"--max-length: the memory does not hold a row of {longest} tokens{how}; lower it, or "
        "--lora-rank, or train on a larger device"
    )


def _choices(tokens: int, layers: int, longest: int) -> Iterator[Memory]:
    """First with all activations kept, down to BUSY_TOKENS; then with all layers recomputed."""
    for recomputed in dict.fromkeys((0, layers)):
        limit = tokens
        yield Memory(limit, recomputed)
        while limit > longest and (recomputed == layers or limit >= 2 * BUSY_TOKENS):
            limit //= 2
            yield Memory(limit, recomputed)


def largest_micro_batch(
    config: TrainOptions, rows: Sequence[GuidedRow], split: Split, group: Group
) -> list[GuidedRow]:
    """The micro-batch of most tokens that the rank will have; empty if it has none."""

    def size(micro: list[GuidedRow]) -> tuple[int, int]:
        return _size(micro, split), sum(row.example.targets for row in micro)

    shares = (group.share(batch) for batch in global_batches(config, rows))
    planned = (plan_micro_batches(config, share, split) for share in shares)
    return max(chain.from_iterable(planned), key=size, default=[])


def _size(micro: Sequence[GuidedRow], split: Split) -> int:
    """Tokens of a micro-batch, padding included."""
    return size_of([len(row.example.input_ids) for row in micro], packed=split.packed)


def _fits(config: TrainOptions, model: Any, rows: Sequence[GuidedRow], split: Split) -> bool:
    """Whether a forward and backward over the rows fit into memory besides the optimizer state."""
    device = next(model.parameters()).device

    def step() -> bool:
        _held = torch.empty(_reserve(model), dtype=torch.uint8, device=device)
        _attempt(config, model, rows, split)
        return True

    fits = attempt(step)
    _forget(model)
    return fits is not None


def _reserve(model: Any) -> int:
    """Bytes that a step needs besides activations and gradients: AdamW's state and the margin."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    size = 8 * sum(parameter.numel() for parameter in trained)  # two float32 of AdamW's
    if trained[0].device.type == "cuda":
        size += int(MARGIN * torch.cuda.get_device_properties(trained[0].device).total_memory)
    return size


def _attempt(config: TrainOptions, model: Any, rows: Sequence[GuidedRow], split: Split) -> None:
    """A forward and backward; keeps the gradients, restores random states."""
    device = next(model.parameters()).device
    model.train()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        accumulate_gradients(config, model, rows, split)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _forget(model: Any) -> None:
    """Drops the gradients of attempts and frees their memory."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = None
    device = next(model.parameters()).device
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _measure(config: TrainOptions, model: Any, split: Split) -> tuple[int, int]:
    """Most bytes in use in a forward and backward over a row of SHORT and of LONG tokens."""
    peaks = []
    for tokens in (SHORT, SHORT, LONG):  # the first also has what stays for good
        row = Example(0, np.ones(tokens, np.int32), np.arange(tokens) > 0)
        known = torch.ones(row.targets)
        _attempt(config, model, [GuidedRow(row, known, torch.arange(row.targets), known)], split)
        peaks.append(_peak_bytes(next(model.parameters()).device))
        _forget(model)
    return peaks[1], peaks[2]


def _would_fit(model: Any, tokens: int, short: int, long: int) -> bool:
    """Whether a micro-batch of so many tokens fits on this rank, extrapolated from `_measure`."""
    growth = (long - short) / (LONG - SHORT)
    needed = long + growth * (tokens - LONG) + _reserve(model)
    return needed <= _usable_bytes(next(model.parameters()).device)


def _peak_bytes(device: torch.device) -> int:
    """Most bytes in use since the last `_forget`; 0 on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def _usable_bytes(device: torch.device) -> float:
    """Bytes that this process can use; without a limit on a CPU."""
    if device.type != "cuda":
        return math.inf
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device)


def layers_of(model: Any) -> list[Any]:
    """The layers that can recompute their activations, in order."""
    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]


def recompute(model: Any, count: int) -> None:
    """Makes only the first `count` layers recompute their activations in the backward."""
    for number, layer in enumerate(layers_of(model)):
        layer.gradient_checkpointing = number < count
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
