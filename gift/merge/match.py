"""Matches adapter tensors with the weights that they change, from headers alone.

Nothing is raised here: adapter tensors without a weight are collected for one error message.
"""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from gift.merge.adapter import Adapter, LoraModule
from gift.storage.shards import Checkpoint, TensorEntry

# Leading parts of a name that may differ between a checkpoint and PEFT's module path, as in
# "language_model.model.layers" and "model.language_model.layers", or "h.0" and "transformer.h.0".
CONTAINERS = frozenset(
    {"model", "base_model", "transformer", "language_model", "text_model", "gpt_neox", "backbone"}
)
HEADS = ("lm_head", "embed_out", "output")
INPUT_EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings")
# Names of a fused expert stack in a checkpoint with one tensor per expert.
EXPERT_PARTS = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}


@dataclass(frozen=True)
class LoraDelta:
    """One adapter's additive change to one tensor: scale * B @ A, or its transpose.

    `a` is [E * R, K] and `b` [M, R * E] for a stack of E experts (E = 1 for a matrix). `expert`
    picks one expert and `rows` some rows of B, where the checkpoint stores an expert stack as
    single matrices. A bias has no `b`: its change is scale * a.
    """

    adapter: int
    a: TensorEntry
    b: TensorEntry | None
    scale: float
    experts: int = 1
    transposed: bool = False
    expert: int | None = None
    rows: tuple[int, int] | None = None
    magnitude: TensorEntry | None = None

    @property
    def rank(self) -> int:
        """R of one matrix."""
        return self.a.shape[0] // self.experts if self.b is not None else 1


@dataclass(frozen=True)
class Saved:
    """A full tensor that an adapter holds (`modules_to_save`, a trained bias)."""

    adapter: int
    entry: TensorEntry
    scale: float


@dataclass
class AdapterMatch:
    """Which weights the adapters' tensors change; `match_adapters` fills it in."""

    changes: dict[str, list[LoraDelta]] = field(default_factory=dict)
    saved: dict[str, list[Saved]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Names:
    """Finds a checkpoint's tensor by a module path that may have another prefix."""

    def __init__(self, checkpoint: Checkpoint, extra: Sequence[TensorEntry] = ()) -> None:
        self.tensors = checkpoint.tensors | {entry.name: entry for entry in extra}
        self._canonical: dict[str, list[str]] = {}
        for name in self.tensors:
            self._canonical.setdefault(canonical(name), []).append(name)

    def find(self, name: str) -> TensorEntry | None:
        """The tensor of this name, else the only one whose name differs only in its containers."""
        if name in self.tensors:
            return self.tensors[name]
        found = self._canonical.get(canonical(name), ())
        return self.tensors[found[0]] if len(found) == 1 else None


def canonical(name: str) -> str:
    """The name without its leading container modules, and with one name for Mixtral's blocks.

    Transformers 5 calls `mlp` what Mixtral's checkpoints call `block_sparse_moe`.
    """
    parts = name.replace(".block_sparse_moe.", ".mlp.").split(".")
    while len(parts) > 1 and parts[0] in CONTAINERS:
        parts.pop(0)
    return ".".join(parts)


def match_adapters(
    checkpoint: Checkpoint,
    adapters: Sequence[Adapter],
    coefficients: Sequence[float],
    head: TensorEntry | None = None,
) -> AdapterMatch:
    """Maps every adapter tensor to the weight it changes; one without a match is a problem.

    `head` is the output head of tied embeddings, which has no tensor of its own.
    """
    matched, names = AdapterMatch(), Names(checkpoint, [head] if head is not None else [])
    for number, (adapter, coefficient) in enumerate(zip(adapters, coefficients, strict=True)):
        label = f"adapter {adapter.folder.name}: "
        one = AdapterMatch(problems=[*adapter.problems])
        _match_modules(one, names, adapter, number, coefficient)
        _match_full_tensors(one, names, adapter, number, coefficient)
        _check_coverage(one, checkpoint, adapter)
        matched.problems += [label + problem for problem in one.problems]
        matched.notes += [label + note for note in one.notes]
        for name, changes in one.changes.items():
            matched.changes.setdefault(name, []).extend(changes)
        for name, saved in one.saved.items():
            matched.saved.setdefault(name, []).extend(saved)
    return matched


def _match_modules(
    matched: AdapterMatch, names: Names, adapter: Adapter, number: int, coefficient: float
) -> None:
    groups: dict[str, list[LoraModule]] = {}
    for module in adapter.modules:
        groups.setdefault(module.path, []).append(module)
    evidence: set[bool] = set()
    squares: list[str] = []
    for path, modules in groups.items():
        target = names.find(f"{path}.weight")
        module = modules[0]
        if target is not None and len(modules) == 1:
            transposed = _orientation(module, target, adapter.fan_in_fan_out, matched)
            if transposed is None:
                continue
            if module.kind == "linear" and target.shape[0] != target.shape[1]:
                evidence.add(transposed)
            elif module.kind == "linear":
                squares.append(path)
            if not _rank_agrees(adapter, module, path, 1, matched):
                continue
            scale = coefficient * adapter.scale(path)
            change = LoraDelta(
                number, module.a, module.b, scale, transposed=transposed, magnitude=module.magnitude
            )
            _add(matched, target.name, change)
            _match_bias(matched, names, module, number, scale)
        else:
            _match_parameters(matched, names, adapter, path, modules, number, coefficient)
    if squares and evidence - {adapter.fan_in_fan_out}:
        matched.problems.append(
            f"fan_in_fan_out={adapter.fan_in_fan_out} disagrees with the shapes of some weights, "
            f"so the orientation of these square ones is unknown: {', '.join(squares)}"
        )


def _orientation(
    module: LoraModule, target: TensorEntry, flag: bool, matched: AdapterMatch
) -> bool | None:
    """Whether the stored weight is [K, M] rather than [M, K]; None (and a problem) if neither."""
    inner, outer = module.a.shape[1], module.b.shape[0]
    if not _is_plain(target, matched):
        return None
    if module.magnitude is not None and (
        module.kind == "embedding" or target.shape != (outer, inner)
    ):
        matched.problems.append(
            f"{module.path}: DoRA on an embedding or on a transposed weight is not merged"
        )
        return None
    if module.kind == "embedding":
        if target.shape == (inner, outer):
            return True
        expected = [inner, outer]
    else:
        expected = [outer, inner]
        if target.shape == (outer, inner) == (inner, outer):
            return flag
        if target.shape in ((outer, inner), (inner, outer)):
            return target.shape == (inner, outer)
    hint = (
        "; the vocabulary differs: resize the model's embeddings as for training, or train the "
        "adapter without them"
        if module.path.endswith((*HEADS, *INPUT_EMBEDDINGS))
        else "; was it trained on a model of another size?"
    )
    matched.problems.append(
        f"{module.path}: the adapter is for a weight {expected}, the model's {target.name} is "
        f"{list(target.shape)}{hint}"
    )
    return None


def _is_plain(target: TensorEntry, matched: AdapterMatch) -> bool:
    if target.is_float:
        return True
    matched.problems.append(
        f"{target.name} is stored as {target.dtype}; a quantised weight cannot be merged into: use "
        "the model's bf16 or float16 version"
    )
    return False


def _rank_agrees(
    adapter: Adapter, module: LoraModule, key: str, experts: int, matched: AdapterMatch
) -> bool:
    expected = adapter.rank(key) * experts
    if module.a.shape[0] == expected:
        return True
    matched.problems.append(
        f"{key}: lora_A has {module.a.shape[0]} rows, by the config's r and rank_pattern it should "
        f"have {expected}"
    )
    return False


def _add(matched: AdapterMatch, name: str, change: LoraDelta) -> None:
    present = matched.changes.setdefault(name, [])
    if present and (present[0].expert, present[0].rows) == (change.expert, change.rows):
        matched.problems.append(f"{name}: two modules of the adapter change it")
    present.append(change)


def _match_bias(
    matched: AdapterMatch, names: Names, module: LoraModule, number: int, scale: float
) -> None:
    if module.bias is None:
        return
    target = names.find(f"{module.path}.bias")
    if target is None or target.shape != module.bias.shape:
        matched.problems.append(
            f"{module.bias.name}: the adapter has a bias (lora_bias) but the model's module has "
            f"{'none' if target is None else f'one of shape {list(target.shape)}'}"
        )
    elif _is_plain(target, matched):
        _add(matched, target.name, LoraDelta(number, module.bias, None, scale))


@dataclass(frozen=True)
class _Stack:
    """A parameter [E, M, K] as stored: one tensor, or E lists of matrices stacked by rows."""

    shape: tuple[int, int, int]
    whole: TensorEntry | None
    pieces: tuple[tuple[TensorEntry, ...], ...] = ()


def _match_parameters(
    matched: AdapterMatch,
    names: Names,
    adapter: Adapter,
    path: str,
    modules: list[LoraModule],
    number: int,
    coefficient: float,
) -> None:
    """Matches modules that adapt raw parameters (PEFT's `target_parameters`, for experts).

    The keys show only how PEFT's wrappers are nested, so the parameter is found by its shape.
    """
    leaves = sorted(
        {
            target.rpartition(".")[2]
            for target in adapter.config.get("target_parameters") or ()
            if f".{path}.{target.rpartition('.')[2]}".endswith(f".{target}")
        }
    )
    stacks = {leaf: stack for leaf in leaves if (stack := _find_stack(names, path, leaf))}
    tensors = ", ".join(entry.name for module in modules for entry in module.entries)
    if len(stacks) != len(modules):
        where = (
            f"has no weight {path}.weight" if not leaves else f"lacks some of {leaves} in {path}"
        )
        matched.problems.append(f"no weight for {tensors}: the model {where}")
        return
    fits = []
    for order in itertools.permutations(stacks.items()):
        for transposed in (False, True):
            if all(
                _stack_fits(adapter, module, f"{path}.{leaf}", stack, transposed)
                for module, (leaf, stack) in zip(modules, order, strict=True)
            ):
                fits.append((order, transposed))
    if len(fits) != 1:
        shapes = {leaf: list(stack.shape) for leaf, stack in stacks.items()}
        reason = "fits none" if not fits else "fits more than one way (a square expert weight)"
        matched.problems.append(f"{tensors}: {reason} of the expert weights {shapes} in {path}")
        return
    order, transposed = fits[0]
    for module, (leaf, stack) in zip(modules, order, strict=True):
        scale = coefficient * adapter.scale(f"{path}.{leaf}")
        change = LoraDelta(
            number, module.a, module.b, scale, experts=stack.shape[0], transposed=transposed
        )
        if stack.whole is not None and _is_plain(stack.whole, matched):
            _add(matched, stack.whole.name, change)
        for expert, pieces in enumerate(stack.pieces):
            begin = 0
            for piece in pieces:
                rows = (begin, begin + piece.shape[0])
                begin = rows[1]
                if _is_plain(piece, matched):
                    _add(matched, piece.name, replace(change, expert=expert, rows=rows))


def _find_stack(names: Names, path: str, leaf: str) -> _Stack | None:
    whole = names.find(f"{path}.{leaf}")
    if whole is not None:
        return _Stack(whole.matrices, whole) if len(whole.shape) in (2, 3) else None
    for parts in EXPERT_PARTS.get(leaf, ()):
        experts: list[tuple[TensorEntry, ...]] = []
        while True:
            found = [names.find(f"{path}.{len(experts)}.{part}.weight") for part in parts]
            pieces = tuple(entry for entry in found if entry is not None)
            if len(pieces) < len(parts):
                break
            experts.append(pieces)
        if experts and len({tuple(piece.shape for piece in one) for one in experts}) == 1:
            rows = sum(piece.shape[0] for piece in experts[0])
            shape = (len(experts), rows, experts[0][0].shape[1])
            return _Stack(shape, None, tuple(experts))
    return None


def _stack_fits(
    adapter: Adapter, module: LoraModule, key: str, stack: _Stack, transposed: bool
) -> bool:
    experts, rows, width = stack.shape
    if transposed and stack.whole is None:
        return False
    outer, inner = (width, rows) if transposed else (rows, width)
    return (
        module.kind == "linear"
        and module.bias is None
        and module.magnitude is None
        and module.a.shape == (adapter.rank(key) * experts, inner)
        and module.b.shape == (outer, adapter.rank(key) * experts)
    )


def _match_full_tensors(
    matched: AdapterMatch, names: Names, adapter: Adapter, number: int, coefficient: float
) -> None:
    for name, entry in (adapter.saved | adapter.copies).items():
        target = names.find(name)
        if target is None:
            matched.problems.append(f"no weight for {entry.name}: the model has no {name}")
        elif target.shape != entry.shape:
            matched.problems.append(
                f"{entry.name}: {list(entry.shape)} in the adapter, {list(target.shape)} in the "
                "model; was the vocabulary resized for training?"
            )
        elif name in adapter.saved and _is_plain(target, matched):
            matched.saved[target.name] = [Saved(number, entry, coefficient)]
    if copies := [name for name in adapter.copies if names.find(name)]:
        matched.notes.append(
            f"untrained copies of the training model's weights are not merged: {', '.join(copies)}"
        )


def _check_coverage(matched: AdapterMatch, checkpoint: Checkpoint, adapter: Adapter) -> None:
    """Reports an adapter that lacks some layers of its modules: it was made for another model.

    A note if its config may intend this (it names layers, or has a pattern), else a problem.
    """
    targets = adapter.config.get("target_modules")
    if adapter.config.get("layers_to_transform") is not None or adapter.config.get(
        "exclude_modules"
    ):
        return
    patterns = {_without_numbers(name) for name in matched.changes}
    missing = [
        name
        for name in checkpoint.tensors
        if _without_numbers(name) in patterns and name not in matched.changes
    ]
    if not missing or matched.problems:
        return
    listed = f"{', '.join(missing[:8])}{' …' if len(missing) > 8 else ''}"
    text = f"nothing for {len(missing)} weights like those it adapts: {listed}"
    if isinstance(targets, list) and not any(re.search(r"\d", name) for name in targets):
        matched.problems.append(f"made for a model with fewer layers? {text}")
    else:
        matched.notes.append(text)


def _without_numbers(name: str) -> str:
    return re.sub(r"\b\d+\b", "*", name)
