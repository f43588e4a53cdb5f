"""The plan of a merge: the sources of every output tensor, validated before any output exists."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gift.errors import InputError
from gift.merge.adapter import Adapter
from gift.merge.copies import same_values, settle_copies
from gift.merge.match import (
    HEADS,
    INPUT_EMBEDDINGS,
    AdapterMatch,
    LoraDelta,
    Names,
    Saved,
    canonical,
    match_adapters,
)
from gift.models.loading import missing_tensors, quantisation
from gift.storage.shards import Checkpoint, TensorEntry


@dataclass(frozen=True)
class TensorPlan:
    """One output tensor: its source in the model, its counterpart in the base, and its changes."""

    name: str
    source: TensorEntry
    changes: tuple[LoraDelta, ...] = ()
    saved: tuple[Saved, ...] = ()
    base: TensorEntry | None = None

    @property
    def is_adapted(self) -> bool:
        """Whether an adapter changes the tensor."""
        return bool(self.changes or self.saved)


@dataclass(frozen=True)
class MergePlan:
    """All output tensors by name, in the checkpoint's order.

    `untied_head` is the name of the separate output head of a model whose embedding was tied.
    """

    checkpoint: Checkpoint
    adapters: tuple[Adapter, ...]
    tensors: dict[str, TensorPlan]
    notes: tuple[str, ...]
    untied_head: str | None = None


def plan_merge(
    checkpoint: Checkpoint,
    config: Mapping[str, Any],
    adapters: Sequence[Adapter],
    coefficients: Sequence[float],
    *,
    base: Checkpoint | None = None,
    untie: bool = False,
    allow_dora: bool = True,
) -> MergePlan:
    """Builds and checks the plan; InputError lists all problems.

    `config` is the model's config.json, `coefficients` one factor per adapter. With `untie` a model
    with tied embeddings gets a separate head if an adapter changes one side of the tie.
    `allow_dora` is false for methods that add task vectors.
    """
    refuse_quantised(checkpoint.folder, config)
    adapters = [settle_copies(adapter, checkpoint, base) for adapter in adapters]
    embedding = tied_embedding(config, checkpoint)
    head = None
    if embedding is not None:
        head = _stored_head(checkpoint) or replace(embedding, name=_head_name(embedding.name))
    matched = match_adapters(checkpoint, adapters, coefficients, head)
    untied = None
    if embedding is not None and head is not None and _stays_tied(matched, embedding, head):
        del matched.saved[head.name]
        head = None
    touched = set(matched.changes) | set(matched.saved)
    if embedding is not None and head is not None and touched & {embedding.name, head.name}:
        untied = head.name
        if not untie:
            matched.problems.append(_tie_problem(embedding, head, touched))
    problems, notes = check_whole(checkpoint)
    matched.problems += problems
    matched.notes += notes
    if base is not None:
        matched.problems += check_base(checkpoint, base)
    matched.problems += _dora_problems(adapters, coefficients, matched, allow_dora)
    if matched.problems:
        listed = "\n- ".join(matched.problems)
        raise InputError(f"the merge is not possible:\n- {listed}")
    entries = dict(checkpoint.tensors)
    if untied is not None and head is not None:
        entries.setdefault(head.name, head)
    base_names = Names(base) if base is not None else None
    tensors = {
        name: TensorPlan(
            name,
            entry,
            tuple(matched.changes.get(name, ())),
            tuple(matched.saved.get(name, ())),
            base_names.find(name) if base_names is not None else None,
        )
        for name, entry in entries.items()
    }
    return MergePlan(checkpoint, tuple(adapters), tensors, tuple(matched.notes), untied)


def refuse_quantised(folder: Path, config: Any) -> None:
    """InputError where a model's config.json names a quantisation, or is no object."""
    if not isinstance(config, Mapping):
        raise InputError(f"{folder / 'config.json'}: expected an object of settings")
    method = quantisation(config)
    if method is not None:
        raise InputError(
            f"{folder}: is quantised with {method}, and only plain weights can be merged, unmerged "
            "or compared: use the model's bf16 or float16 version"
        )


def check_whole(checkpoint: Checkpoint) -> tuple[list[str], list[str]]:
    """Missing tensors, and notes: not every architecture can be checked for completeness."""
    missing = missing_tensors(checkpoint.folder)
    if missing is None:
        return [], [
            f"whether {checkpoint.folder} is whole was not checked: Transformers cannot make a "
            "model from its config.json"
        ]
    names = Names(checkpoint)
    return [
        f"{checkpoint.folder} lacks {name}, or has it in another shape than its config.json says"
        for name in missing
        if names.find(name) is None or name in checkpoint.tensors
    ], []


def _stays_tied(matched: AdapterMatch, embedding: TensorEntry, head: TensorEntry) -> bool:
    """Whether an adapter holds both sides of the tie in full, with the same values."""
    sides = [matched.saved.get(entry.name, []) for entry in (embedding, head)]
    if embedding.name in matched.changes or head.name in matched.changes or not all(sides):
        return False
    return len(sides[0]) == len(sides[1]) and all(
        one.adapter == other.adapter and same_values(one.entry, other.entry)
        for one, other in zip(*sides, strict=True)
    )


def _tie_problem(embedding: TensorEntry, head: TensorEntry, touched: set[str]) -> str:
    changed = " and ".join(sorted(touched & {embedding.name, head.name}))
    return (
        f"the model's output head is tied to {embedding.name} and the adapter changes {changed}: "
        "merging into the shared tensor would change the other side too; pass --untie-embeddings "
        f"to give the output a head of its own ({embedding.size / 1e6:.0f} MB more)"
    )


def _dora_problems(
    adapters: Sequence[Adapter],
    coefficients: Sequence[float],
    matched: AdapterMatch,
    allowed: bool,
) -> list[str]:
    """DoRA rescales the whole weight, so its change cannot be added to others."""
    problems = []
    for number, adapter in enumerate(adapters):
        if adapter.uses_dora and not allowed:
            problems.append(
                f"adapter {adapter.folder.name} is DoRA, which is no task vector; use --method lora"
            )
        elif adapter.uses_dora and coefficients[number] != 1:
            problems.append(
                f"adapter {adapter.folder.name} is DoRA, which has no meaning at --scale "
                f"{coefficients[number]}; use 1"
            )
    for name, changes in matched.changes.items():
        if len(changes) > 1 and any(change.magnitude is not None for change in changes):
            problems.append(f"{name}: DoRA cannot be added to another adapter's change")
    return problems


def check_base(model: Checkpoint, base: Checkpoint) -> list[str]:
    """Problems that prevent pairing the base model's tensors with the instruct model's."""
    problems = []
    names = Names(base)
    for name, entry in model.tensors.items():
        other = names.find(name)
        if other is None:
            problems.append(f"--base has no tensor {name}")
        elif other.shape != entry.shape:
            problems.append(
                f"{name}: {list(entry.shape)} in --model, {list(other.shape)} in --base; the "
                "method needs equal shapes (resize the larger vocabulary first)"
            )
        elif entry.is_float and not other.is_float:
            problems.append(f"{name}: stored as {other.dtype} in --base, which is quantised")
    return problems


def tied_embedding(config: Mapping[str, Any], checkpoint: Checkpoint) -> TensorEntry | None:
    """The input embedding if it is also the output head; None if the head is separate."""
    parts = (config, config.get("text_config"))
    flags = [part.get("tie_word_embeddings") for part in parts if isinstance(part, Mapping)]
    if False in flags or (_stored_head(checkpoint) is not None and True not in flags):
        return None
    found = [
        entry
        for name, entry in checkpoint.tensors.items()
        if canonical(name).removesuffix(".weight") in INPUT_EMBEDDINGS
    ]
    return found[0] if len(found) == 1 else None


def _stored_head(checkpoint: Checkpoint) -> TensorEntry | None:
    names = Names(checkpoint)
    return next((entry for head in HEADS if (entry := names.find(f"{head}.weight"))), None)


def _head_name(embedding_name: str) -> str:
    prefix = "language_model." if embedding_name.startswith("language_model.model.") else ""
    return f"{prefix}lm_head.weight"


def plan_rows(plan: MergePlan) -> list[tuple[str, str, str, str, str]]:
    """The plan as table rows, grouped by kind of tensor, with shapes, ranks and scales."""
    groups: dict[tuple[str, str, str, str], list[str]] = {}
    for tensor in plan.tensors.values():
        if tensor.is_adapted:
            parts = [part if not part.isdigit() else "*" for part in tensor.name.split(".")]
            ranks = "+".join(str(change.rank) for change in tensor.changes) or "full"
            scales = "+".join(f"{part.scale:.4g}" for part in (*tensor.changes, *tensor.saved))
            shape = "x".join(str(size) for size in tensor.source.shape)
            groups.setdefault((".".join(parts), shape, ranks, scales), []).append(tensor.name)
    rows = [
        (name, f"{len(members)}", shape, ranks, scales)
        for (name, shape, ranks, scales), members in groups.items()
    ]
    untouched = sum(not tensor.is_adapted for tensor in plan.tensors.values())
    return [*rows, ("(no adapter)", str(untouched), "", "", "")]
