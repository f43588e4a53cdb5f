"""Files of a merged model other than its weights: copied files, configs, the model card."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gift.merge.plan import MergePlan
from gift.merge.residual import RESIDUAL_FOLDER
from gift.merge.stream import MANIFEST_FILE
from gift.storage.files import read_json, write_json
from gift.storage.publish import LIST_FILE
from gift.storage.shards import INDEX_FILE, TORCH_DTYPES, Checkpoint

CARD_FILE = "README.md"
CONFIG_FILE = "config.json"
TRAIN_MANIFEST_FILE = "gift_train.json"
WEIGHT_SUFFIXES = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
    ".npz",
    ".index.json",
)
OWN_FILES = (CARD_FILE, MANIFEST_FILE, LIST_FILE, CONFIG_FILE, RESIDUAL_FOLDER)


def side_files(folder: Path, weights: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Files to copy, relative to a model folder, and names of weights in other formats to leave
    out.

    All files but weights are copied: tokenizer, chat templates, generation config, code, licences.
    `weights` are the files that the merge writes itself. Folders that contain weights (training
    checkpoints, another format of the model) are left out.
    """
    kept: list[Path] = []
    left_out: list[str] = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name in OWN_FILES or path.name in weights:
            continue
        inside = sorted(path.rglob("*")) if path.is_dir() else [path]
        files = [item for item in inside if item.is_file()]
        if any(item.name.endswith(WEIGHT_SUFFIXES) for item in files):
            left_out.append(path.name)
        else:
            kept += [item.relative_to(folder) for item in files]
    return kept, left_out


def copy_side_files(folder: Path, files: Sequence[Path], output: Path) -> None:
    """Copies files into the output, with their folders."""
    for file in files:
        (output / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / file, output / file)


def write_config(folder: Path, output: Path, *, dtype: str | None, untied: bool) -> None:
    """Copies config.json with the dtype of the weights and, if the head was untied, without the
    tie.

    `dtype` is a safetensors name, or None where the model keeps its own.
    """
    source, target = folder / CONFIG_FILE, output / CONFIG_FILE
    if dtype is None and not untied:
        shutil.copyfile(source, target)
        return
    config = read_json(source)
    parts = [config, *(part for part in [config.get("text_config")] if isinstance(part, dict))]
    for part in parts:
        if dtype is not None:
            name = str(TORCH_DTYPES[dtype]).removeprefix("torch.")
            for key in ("dtype", "torch_dtype"):
                if key in part or (key == "dtype" and part is config):
                    part[key] = name
        if untied and (part is config or "tie_word_embeddings" in part):
            part["tie_word_embeddings"] = False
    write_json(target, config)


def write_index(
    checkpoint: Checkpoint, output: Path, sizes: Mapping[str, tuple[str, int]], changed: bool
) -> None:
    """Copies the shard index; with `changed`, its file names and total size are rewritten.

    `sizes` maps every output tensor to its file and bytes.
    """
    if checkpoint.index is None:
        return
    if not changed:
        shutil.copyfile(checkpoint.folder / INDEX_FILE, output / INDEX_FILE)
        return
    index = dict(checkpoint.index)
    order = [*index["weight_map"], *(name for name in sizes if name not in index["weight_map"])]
    index["weight_map"] = {name: sizes[name][0] for name in order}
    total = sum(size for _, size in sizes.values())
    index["metadata"] = {**(index.get("metadata") or {}), "total_size": total}
    text = json.dumps(index, indent=2) + "\n"
    (output / INDEX_FILE).write_text(text, encoding="utf-8")


def adapter_provenance(plan: MergePlan, coefficients: Sequence[float]) -> list[dict[str, Any]]:
    """The origin of each adapter: its files' hashes, its base, and its training manifest."""
    entries = []
    for adapter, coefficient in zip(plan.adapters, coefficients, strict=True):
        entry: dict[str, Any] = {
            "name": adapter.folder.name,
            "scale": coefficient,
            "trained_on": adapter.base_name,
            "rank": adapter.config["r"],
            "alpha": adapter.config["lora_alpha"],
            "sha256": adapter.hashes(),
        }
        manifest = adapter.folder / TRAIN_MANIFEST_FILE
        if manifest.exists():
            training = read_json(manifest)
            keys = (
                "base_model",
                "base_model_hash",
                "guide_model",
                "guide_model_hash",
                "data_hash",
                "confidence_hash",
                "settings",
            )
            entry["training"] = {key: training.get(key) for key in keys}
        entries.append(entry)
    return entries


def write_card(output: Path, manifest: Mapping[str, Any]) -> None:
    """Writes the model card with the merge's provenance."""
    adapters = manifest["adapters"]
    head = ["---", "library_name: transformers", "tags:", "- merge", "- lora"]
    if "/" in manifest["model"] and not Path(manifest["model"]).is_absolute():
        head += ["base_model:", f"- {manifest['model']}"]
    lines = [
        *head,
        "---",
        "",
        f"# {Path(manifest['model']).name} merged with "
        + ", ".join(adapter["name"] for adapter in adapters),
        "",
        f"Made by `gift merge` with the method `{manifest['method']}`: {manifest['formula']}.",
        "",
        "| | |",
        "|---|---|",
        f"| model | {Path(manifest['model']).name} |",
    ]
    if manifest["base"]:
        lines.append(f"| base | {Path(manifest['base']).name} |")
    for adapter in adapters:
        training = adapter.get("training") or {}
        lines += [
            f"| adapter | {adapter['name']} (rank {adapter['rank']}, alpha {adapter['alpha']}, "
            f"scale {adapter['scale']:g}) |",
            f"| trained on | {Path(adapter['trained_on'] or 'unknown').name} |",
            *(
                f"| {key.replace('_', ' ')} | `{training[key]}` |"
                for key in ("data_hash", "confidence_hash", "base_model_hash", "guide_model_hash")
                if training.get(key)
            ),
            *(f"| sha256 of {name} | `{value}` |" for name, value in adapter["sha256"].items()),
        ]
    settings = ", ".join(f"{key} {value}" for key, value in manifest["settings"].items())
    lines += [f"| settings | {settings or 'none'} |", ""]
    if manifest["notes"]:
        lines += ["Notes:", "", *(f"- {note}" for note in manifest["notes"]), ""]
    lines += [f"Hashes of all merged tensors are in `{MANIFEST_FILE}`.", ""]
    (output / CARD_FILE).write_text("\n".join(lines), encoding="utf-8")
