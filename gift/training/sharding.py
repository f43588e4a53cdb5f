"""FSDP2: every rank holds its share of the frozen model, and gathers one block at a time.

Adapters are not sharded: PEFT adds them afterwards, so that every rank has them whole and their
gradients are all-reduced as without sharding. Frozen weights have no gradients and are stored in
the dtype of their products: FSDP reduces nothing and casts nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers.modeling_layers import GradientCheckpointingLayer

from gift.distributed.environment import processes
from gift.distributed.ranks import LONGEST_WAIT
from gift.errors import InputError
from gift.models.head import lm_head
from gift.models.loading import load_causal_lm, model_structure


def require_processes() -> None:
    """InputError where this process is alone."""
    if processes() == 1:
        raise InputError(
            "--shard: divides the model among processes, and this is a single one; start "
            "several with torchrun --nproc-per-node N -m gift.cli, or leave --shard out"
        )


def load_sharded(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """The causal language model of a folder in evaluation mode, a share of it on every rank.

    Rank 0 reads it into the host's memory. From there one block after the other is sent to all
    ranks, and each keeps its share: a device holds its share and one block, or the embedding or the
    head, at most.

    InputError: see `model_structure`; or the model has no blocks.
    """
    # Frozen before sharding: FSDP keeps `requires_grad` as it was when a weight is first gathered.
    model = model_structure(folder, dtype).eval().requires_grad_(False)
    lm_head(model)  # refuses a model without one
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    decoder = model.get_decoder()
    blocks = [m for m in decoder.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not blocks:
        raise InputError(f"--shard: {type(model).__name__} has no blocks that could be sharded")
    is_tied = head.weight is embedding.weight
    if is_tied:
        head.weight = None
    source = load_causal_lm(folder, dtype, torch.device("cpu")) if dist.get_rank() == 0 else None
    # The others wait here without a time limit: a collective of NCCL's has one of ten minutes.
    waiting: Any = dist.new_group(backend="gloo", timeout=LONGEST_WAIT)
    dist.barrier(waiting)
    units = {*blocks, embedding, decoder} | (set() if is_tied else {head})
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for name, module in reversed(list(model.named_modules())):  # children before their parents
        module.to_empty(device=device, recurse=False)
        _receive(module, None if source is None else source.get_submodule(name))
        if module in units:
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
    if is_tied:
        head.weight = embedding.weight
    embedding.set_unshard_in_backward(False)
    # Gathered and dropped by `whole_head`.
    owner: Any = embedding if is_tied else head
    owner.set_reshard_after_forward(False, recurse=False)
    owner.set_reshard_after_backward(False, recurse=False)
    return model


def _receive(module: Any, source: Any) -> None:
    """Fills a module's own parameters and buffers with those that rank 0 has."""
    with torch.no_grad():
        for name, value in chain(
            module.named_parameters(recurse=False), module.named_buffers(recurse=False)
        ):
            if source is not None:
                value.copy_(getattr(source, name))
            dist.broadcast(value.detach(), src=0)


@contextmanager
def whole_head(model: Any) -> Iterator[None]:
    """Gathers the head of a sharded model once, for the duration of the block.

    The loss reads the weight itself, and takes no DTensor. Slices of the vocabulary would need
    every rank's hidden states on all ranks, since each rank has rows of its own.
    """
    head: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    owner: Any = next((m for m in (head, embedding) if isinstance(m, FSDPModule)), None)
    if owner is None:
        yield
        return
    owner.unshard()
    head.weight = owner.weight  # a tied head is not sharded itself
    try:
        yield
    finally:
        owner.reshard()
        head.weight = owner.weight
