"""Full tensors that PEFT stored with an adapter: trained ones, or copies of the model's weights.

PEFT stores the embedding and the output layer when one of them is adapted or was resized, and both
tied weights (`ensure_weight_tying`) even if `modules_to_save` names only one. When PEFT loads the
adapter, it uses the stored values. A merge must not: for an adapter of the base model they may be
the base model's unchanged values. So they are compared with the model that the adapter was trained
on.
"""

from dataclasses import replace
from pathlib import Path

import torch

from gift.errors import InputError
from gift.merge.adapter import Adapter
from gift.merge.match import HEADS, INPUT_EMBEDDINGS, Names, canonical
from gift.storage.shards import Checkpoint, TensorEntry, open_checkpoint, read_span, spans

BLOCK_BYTES = 1 << 24


def settle_copies(adapter: Adapter, model: Checkpoint, base: Checkpoint | None) -> Adapter:
    """Moves the stored tensors that were trained to `saved`; `copies` keeps untrained copies.

    Args:
        model: the model to merge into.
        base: the model that the adapter was trained on; without it the adapter's config names it.
    """
    if not adapter.copies:
        return adapter
    trained_on = base or _training_model(adapter)
    problems, copies, saved = list(adapter.problems), {}, dict(adapter.saved)
    for name, entry in adapter.copies.items():
        own = _stored(model, name)
        original = _stored(trained_on, name) if trained_on is not None else own
        if original is None or original.shape != entry.shape or same_values(entry, original):
            copies[name] = entry  # `match_adapters` reports differing shapes
        elif trained_on is not None:
            saved[name] = entry
        else:
            problems.append(
                f"{entry.name}: differs from the model's; whether it was trained can only be "
                f"told from {adapter.base_name or 'the model that the adapter was trained on'}, "
                "which is not available locally: pass it as --base"
            )
    return replace(adapter, saved=saved, copies=copies, problems=tuple(problems))


def _training_model(adapter: Adapter) -> Checkpoint | None:
    folder = Path(adapter.base_name or "")
    if not adapter.base_name or not folder.is_dir():
        return None
    try:
        return open_checkpoint(folder)
    except InputError:
        return None


def _stored(checkpoint: Checkpoint, name: str) -> TensorEntry | None:
    """The tensor of this name; for a tied output layer the embedding that it shares."""
    found = Names(checkpoint).find(name)
    if found is None and canonical(name).removesuffix(".weight") in HEADS:
        for other in checkpoint.tensors:
            if canonical(other).removesuffix(".weight") in INPUT_EMBEDDINGS:
                return checkpoint.tensors[other]
    return found


def same_values(entry: TensorEntry, other: TensorEntry) -> bool:
    """Whether `entry` holds the values of `other` in its own dtype."""
    if entry.shape != other.shape or not (entry.is_float and other.is_float):
        return False
    return all(
        torch.equal(read_span(entry, span), read_span(other, span).to(entry.torch_dtype))
        for span in spans(other, BLOCK_BYTES)
    )
