"""What a training step keeps in memory: tokens of a micro-batch, and whose activations.

With `--gradient-checkpointing auto` the largest micro-batch of the run is tried before the first
step: with all activations kept, then with half the tokens, and so on down to the longest row; then,
from the full size again, with those of every layer recomputed in the backward. All ranks take the
first that fits on each of them.
"""

import gc
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from gift.config import TrainOptions
from gift.console import error_console
from gift.errors import InputError
from gift.files import read_json, write_json
from gift.gradients import accumulate_gradients
from gift.micro_batches import Split, global_batches, plan_micro_batches
from gift.ranks import Group
from gift.weighting import GuidedRow

RECORD = "memory.json"
# Share of a GPU that a trial leaves free: later micro-batches of other shapes fragment the memory.
MARGIN = 0.05
# What errors of PyTorch, cuBLAS, cuDNN and Triton say where memory is short.
OUT_OF_MEMORY = ("out of memory", "can't allocate", "not enough memory", "alloc_failed")


@dataclass(frozen=True)
class Memory:
    """At most `tokens` tokens a micro-batch; the first `recomputed` layers recompute theirs."""

    tokens: int
    recomputed: int


def settle_memory(
    config: TrainOptions,
    model: Any,
    rows: Sequence[GuidedRow],
    split: Split,
    group: Group,
    work: Path,
) -> Split:
    """Sets which layers of the model recompute their activations; returns the split to train with.

    What was found is kept in `work`, so that a resumed run computes the same. A trial leaves no
    gradients, and random states as they were.

    InputError: a micro-batch of one row is too large with all recomputed that can be.
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
    elif (work / RECORD).exists():
        found = Memory(**read_json(work / RECORD))
    else:
        found = _try(config, model, rows, split, group, len(layers))
        if group.is_main:
            write_json(work / RECORD, asdict(found))
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


def _try(
    config: TrainOptions,
    model: Any,
    rows: Sequence[GuidedRow],
    split: Split,
    group: Group,
    layers: int,
) -> Memory:
    """The first of `_choices` with which the largest micro-batch fits on every rank."""
    longest = max(len(row.example.input_ids) for row in rows)
    device = next(model.parameters()).device
    for choice in _choices(split.tokens, layers, longest):
        chosen = largest_micro_batch(config, rows, replace(split, tokens=choice.tokens), group)
        recompute(model, choice.recomputed)
        fits = _fits(config, model, chosen, replace(split, tokens=sys.maxsize))
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
    """Down to the longest row: first with all activations kept, then with none of the layers'."""
    for recomputed in dict.fromkeys((0, layers)):
        limit = tokens
        yield Memory(limit, recomputed)
        while limit > longest:
            limit //= 2
            yield Memory(limit, recomputed)


def largest_micro_batch(
    config: TrainOptions, rows: Sequence[GuidedRow], split: Split, group: Group
) -> list[GuidedRow]:
    """Of all micro-batches that the rank will have, the one of most tokens; empty without any."""

    def size(micro: list[GuidedRow]) -> tuple[int, int]:
        lengths = [len(row.example.input_ids) for row in micro]
        tokens = sum(lengths) if split.packed else len(lengths) * max(lengths)
        return tokens, sum(row.example.targets for row in micro)

    shares = (group.share(batch) for batch in global_batches(config, rows))
    planned = (plan_micro_batches(config, share, split) for share in shares)
    return max(chain.from_iterable(planned), key=size, default=[])


def _fits(config: TrainOptions, model: Any, rows: Sequence[GuidedRow], split: Split) -> bool:
    """Whether a forward and backward over the rows fit into memory beside the optimizer's."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    device = parameters[0].device
    size = 8 * sum(parameter.numel() for parameter in parameters)  # two float32 of AdamW's
    if device.type == "cuda":
        size += int(MARGIN * torch.cuda.get_device_properties(device).total_memory)
    fits = True
    model.train()
    try:
        held = torch.empty(size, dtype=torch.uint8, device=device)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            accumulate_gradients(config, model, rows, split)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        del held
    except RuntimeError as error:  # PyTorch has a type of its own for GPUs only
        said = str(error).lower()
        if not isinstance(error, torch.OutOfMemoryError) and not any(
            words in said for words in OUT_OF_MEMORY
        ):
            raise
        fits = False
    for parameter in parameters:
        parameter.grad = None
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return fits


def layers_of(model: Any) -> list[Any]:
    """The layers that can recompute their activations, in order."""
    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]


def recompute(model: Any, count: int) -> None:
    """Lets the first `count` layers recompute their activations in the backward, and no others."""
    for number, layer in enumerate(layers_of(model)):
        layer.gradient_checkpointing = number < count
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
