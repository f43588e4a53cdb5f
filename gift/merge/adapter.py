"""PEFT LoRA adapters on disk: which tensor belongs to which module, at what scale.

Only the headers are read here; the merge reads the tensors when it needs them.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from gift.errors import InputError
from gift.storage.files import hash_file, read_json
from gift.storage.shards import TensorEntry, open_shard, read_tensor

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

# Settings under which the merged weight is not W + scale * B @ A, and why.
REFUSED: dict[str, str] = {
    "use_qalora": "QALoRA pools its inputs; its update is no plain low-rank matrix",
    "alora_invocation_tokens": "activated LoRA acts on some tokens only; no merged weight exists",
    "arrow_config": "Arrow routes each token to its own experts; no merged weight exists",
    "kasa_config": "KaSA also truncates the base weight's singular values",
    "use_bdlora": "block-diagonal LoRA stores packed factors that this program does not unpack",
    "monteclora_config": "MonteCLoRA samples its update; no single merged weight exists",
    "layer_replication": "the adapter runs on a model with repeated layers, not on this one",
}
# Initialisations that subtract the initial adapter from the base weights. PEFT resets the field
# when save_pretrained converts such an adapter to an ordinary one.
CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")
KNOWN_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")

_FACTOR = re.compile(r"(?P<path>.+)\.lora_(?P<side>[AB])(\.[^.]+)?\.(?P<part>weight|bias)")
_EMBEDDING = re.compile(r"(?P<path>.+)\.lora_embedding_(?P<side>[AB])(\.[^.]+)?")
_MAGNITUDE = re.compile(r"(?P<path>.+)\.lora_magnitude_vector(\.[^.]+)?(\.weight)?")
# Layers that PEFT may store in full with an adapter, named in its config or not.
_EMBEDDINGS = re.compile(r"embed|lm_head|wte|shared|output_layer")
_SAVED = re.compile(r"(?P<path>.+?)(\.modules_to_save(\.[^.]+)?)?\.(?P<part>[^.]+)")


@dataclass(frozen=True)
class LoraModule:
    """One adapted module: factors A [R, K] and B [M, R], of an embedding A [R, V] and B [D, R]."""

    path: str
    kind: Literal["linear", "embedding"]
    a: TensorEntry
    b: TensorEntry
    bias: TensorEntry | None = None
    magnitude: TensorEntry | None = None

    @property
    def entries(self) -> list[TensorEntry]:
        """The module's tensors in the adapter file."""
        optional = (self.bias, self.magnitude)
        return [self.a, self.b, *(entry for entry in optional if entry is not None)]


@dataclass(frozen=True)
class Adapter:
    """An adapter folder: its config, its LoRA modules and the tensors that it holds in full.

    `saved` maps parameter names to trained full tensors (`modules_to_save`, trained biases);
    `copies` maps parameter names to full tensors that PEFT stored with the adapter; `settle_copies`
    decides which of them were trained. `problems` lists what cannot be merged, one sentence each.
    """

    folder: Path
    config: dict[str, Any]
    modules: tuple[LoraModule, ...]
    saved: dict[str, TensorEntry]
    copies: dict[str, TensorEntry]
    problems: tuple[str, ...]

    @property
    def uses_dora(self) -> bool:
        """Whether some module holds a DoRA magnitude."""
        return any(module.magnitude is not None for module in self.modules)

    @property
    def base_name(self) -> str | None:
        """The model that the adapter was trained on, as its config names it."""
        return self.config.get("base_model_name_or_path") or None

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether the config says that adapted weights are stored [in, out]."""
        return bool(self.config.get("fan_in_fan_out"))

    def rank(self, key: str) -> int:
        """The rank that the config gives to a module or parameter."""
        return int(_pattern_value(self.config.get("rank_pattern"), key, self.config["r"]))

    def scale(self, key: str) -> float:
        """alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv 2312.03732)."""
        alpha = float(
            _pattern_value(self.config.get("alpha_pattern"), key, self.config["lora_alpha"])
        )
        rank = self.rank(key)
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def hashes(self) -> dict[str, str]:
        """sha256 of the adapter's two files."""
        return {name: hash_file(self.folder / name) for name in (CONFIG_FILE, WEIGHTS_FILE)}


def _pattern_value(patterns: Mapping[str, Any] | None, key: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that matches the end of the key at a dot."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", key):
            return value
    return default


def read_adapter(folder: Path) -> Adapter:
    """Reads an adapter folder's config and headers.

    InputError: no adapter, only a pickled one, or one that is not LoRA. LoRA variants that
    cannot be merged are listed in `problems`, so that a plan can report everything at once.
    """
    if not (folder / CONFIG_FILE).exists():
        raise InputError(f"--adapter: {folder} has no {CONFIG_FILE}; pass a PEFT adapter folder")
    config = read_json(folder / CONFIG_FILE)
    if not (folder / WEIGHTS_FILE).exists():
        hint = (
            "has only a pickled adapter_model.bin; load it with PEFT and save_pretrained it once"
            if (folder / "adapter_model.bin").exists()
            else f"has no {WEIGHTS_FILE}"
        )
        raise InputError(f"--adapter: {folder} {hint}")
    if not isinstance(config, dict):
        raise InputError(f"{folder / CONFIG_FILE}: expected an object with the adapter's settings")
    if config.get("peft_type") != "LORA":
        raise InputError(
            f"--adapter: {folder} is of type {config.get('peft_type')}; only LORA can be merged"
        )
    for field in ("r", "lora_alpha"):
        value = config.get(field)
        if not isinstance(value, int | float) or value <= 0:
            raise InputError(f"{folder / CONFIG_FILE}: {field} is {value!r}, not a positive number")
    for field in ("rank_pattern", "alpha_pattern"):
        _check_pattern(folder / CONFIG_FILE, field, config.get(field) or {})
    adapter = Adapter(folder, config, (), {}, {}, tuple(_refusals(config)))
    return _sort_tensors(adapter, open_shard(folder / WEIGHTS_FILE).entries)


def _check_pattern(path: Path, field: str, patterns: Any) -> None:
    if not isinstance(patterns, dict):
        raise InputError(f"{path}: {field} is {patterns!r}, not an object of pattern and number")
    for pattern, value in patterns.items():
        try:
            re.compile(pattern)
        except re.error as error:
            raise InputError(f"{path}: {field}: {pattern!r} is no pattern ({error})") from None
        if not isinstance(value, int | float) or value <= 0:
            raise InputError(f"{path}: {field}: {pattern} is {value!r}, not a positive number")


def refuse_unusable_values(adapter: Adapter) -> None:
    """Reads an adapter's tensors once; InputError for NaN, infinity or an update that is all 0."""
    changes = adapter.saved or adapter.uses_dora
    for module in adapter.modules:
        for entry in module.entries:
            values = read_tensor(entry)
            if not bool(values.isfinite().all()):
                raise InputError(
                    f"--adapter: {adapter.folder}: {entry.name} holds NaN or infinity; its "
                    "training went wrong, choose an earlier checkpoint"
                )
            changes = changes or (entry in (module.b, module.bias) and bool(values.any()))
    if not changes:
        raise InputError(
            f"--adapter: {adapter.folder}: every lora_B is 0, so merging would change nothing; was "
            "the adapter trained?"
        )


def _refusals(config: Mapping[str, Any]) -> list[str]:
    problems = [f"{name}: {reason}" for name, reason in REFUSED.items() if config.get(name)]
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(CHANGES_BASE):
        problems.append(
            f"init_lora_weights={start}: this initialisation changes the base weights, so the "
            "adapter alone is not the change; save it with PEFT's "
            "path_initial_model_for_weight_conversion to make an ordinary LoRA of it"
        )
    return problems


def _sort_tensors(adapter: Adapter, entries: tuple[TensorEntry, ...]) -> Adapter:
    """Assigns each tensor to its module, or to `saved`, `copies` or `problems`."""
    parts: dict[str, dict[str, TensorEntry]] = {}
    saved: dict[str, TensorEntry] = {}
    copies: dict[str, TensorEntry] = {}
    problems = list(adapter.problems)
    for entry in entries:
        key = entry.name.removeprefix("base_model.model.")
        for wrapper in KNOWN_WRAPPERS:
            key = key.replace(wrapper, "")
        if match := _FACTOR.fullmatch(key):
            part = match["side"] if match["part"] == "weight" else f"bias {match['side']}"
        elif match := _EMBEDDING.fullmatch(key):
            part = f"embedding {match['side']}"
        elif match := _MAGNITUDE.fullmatch(key):
            part = "magnitude"
        else:
            _sort_full_tensor(adapter.config, key, entry, saved, copies, problems)
            continue
        present = parts.setdefault(match["path"], {}).setdefault(part, entry)
        if present is not entry:
            problems.append(_twice(present, entry))
    modules = []
    for path, found in parts.items():
        module = _module(path, found)
        if isinstance(module, str):
            problems.append(module)
        else:
            modules.append(module)
    if not modules and not saved and not problems:
        problems.append("the adapter file holds no tensor; nothing would change")
    return replace(
        adapter, modules=tuple(modules), saved=saved, copies=copies, problems=tuple(problems)
    )


def _twice(first: TensorEntry, second: TensorEntry) -> str:
    return (
        f"{first.name} and {second.name} are the same tensor of two adapters; save each adapter to "
        "a folder of its own and pass both as --adapter"
    )


def _sort_full_tensor(
    config: Mapping[str, Any],
    key: str,
    entry: TensorEntry,
    saved: dict[str, TensorEntry],
    copies: dict[str, TensorEntry],
    problems: list[str],
) -> None:
    match = _SAVED.fullmatch(key)
    path, part = (match["path"], match["part"]) if match else ("", key)
    module = path.removesuffix(".base_layer")
    # PEFT matches any suffix of a name, not only at a dot: "norm" matches input_layernorm too.
    in_saved = any(
        module.endswith(name) or f"{name}." in f"{module}."
        for name in config.get("modules_to_save") or ()
    )
    if "token_adapter" in key or "trainable_tokens" in key:
        problems.append(f"{entry.name}: trainable tokens (trainable_token_indices) are not merged")
    elif in_saved or (part == "bias" and config.get("bias", "none") != "none"):
        present = saved.setdefault(f"{module}.{part}", entry)
        if present is not entry:
            problems.append(_twice(present, entry))
    elif path.endswith(".base_layer") or (part == "weight" and _EMBEDDINGS.search(module)):
        copies[f"{module}.{part}"] = entry
    else:
        problems.append(f"{entry.name}: belongs to no LoRA module known to this program")


def _module(path: str, found: dict[str, TensorEntry]) -> LoraModule | str:
    """One module from its parts, or a sentence with the problem."""
    bare = path
    # PEFT nests one wrapper per adapted parameter of a module, as it does for fused experts.
    while bare.endswith(".base_layer"):
        bare = bare.removesuffix(".base_layer")
    embedding = "embedding A" in found or "embedding B" in found
    a, b = (found.get(f"embedding {side}" if embedding else side) for side in "AB")
    if a is None or b is None:
        return f"{path}: has {', '.join(sorted(found))} but lacks lora_{'A' if a is None else 'B'}"
    expected = {"embedding A", "embedding B"} if embedding else {"A", "B", "bias B"}
    if extra := set(found) - expected - {"magnitude"}:
        return f"{path}: unknown tensors beside its factors: {', '.join(sorted(extra))}"
    if len(a.shape) != 2 or len(b.shape) != 2:
        return (
            f"{path}: factors of shapes {list(a.shape)} and {list(b.shape)}; convolutions are not "
            "merged, only matrices, embeddings and expert stacks"
        )
    if a.shape[0] != b.shape[1]:
        return f"{path}: lora_A {list(a.shape)} and lora_B {list(b.shape)} have different ranks"
    if not a.is_float or not b.is_float:
        return f"{path}: factors of dtypes {a.dtype} and {b.dtype} are not floating-point"
    kind = "embedding" if embedding else "linear"
    return LoraModule(bare, kind, a, b, found.get("bias B"), found.get("magnitude"))
