"""Finds and loads models, chooses device and dtype, and identifies models by hashes."""

import gc
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

import gift
from gift.distributed.environment import processes
from gift.errors import InputError
from gift.storage.files import hash_file, hash_json, read_json
from gift.storage.publish import check_published, warn
from gift.storage.shards import open_checkpoint

HASHED_AT_ONCE = 4


def resolve_model(name: str) -> Path:
    """A local folder, or the snapshot of a hub id, downloaded if necessary.

    InputError: no such model, or a stage's output whose files have changed.
    """
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise InputError(
                f"{folder}: no config.json, so this is not a Transformers model folder"
            )
        check_published(folder, nested=False)
        return folder
    if folder.exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise InputError(f"{name}: expected a model folder or a hub id such as org/name")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                name, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
            )
        )
    except Exception as error:
        raise InputError(
            f"{name}: no such folder, and not available from the hub ({type(error).__name__})"
        ) from error


def pick_device(device: str) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise InputError(
            f"--device: {device!r} is no device; use auto, cpu, cuda or cuda:1"
        ) from None
    if chosen.index is not None and processes() > 1:
        raise InputError(
            f"--device: {device} would be shared by all processes; use auto, by which each takes "
            "the GPU of its own"
        )
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise InputError("--device: cuda is asked for, but this machine has no CUDA device")
    try:
        torch.zeros(1, device=chosen).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first_line = (str(error).splitlines() or [repr(error)])[0]
        raise InputError(f"--device: {device} cannot be used here ({first_line})") from None
    return chosen


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """`auto` is bf16 on CUDA devices that have it, else float32."""
    if dtype == "auto":
        has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if has_bf16 else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]


def load_causal_lm(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """The causal language model of a folder, in evaluation mode.

    Weights that its class does not read are named in a warning. InputError: see `model_structure`.
    """
    gc.collect()  # PyTorch's checkpoints leave cycles, which keep the model of an earlier stage
    # Straight to a GPU, without a copy of the model in the host's memory.
    place = {"device_map": {"": device}} if device.type == "cuda" else {}
    model, unread = _load(folder, dtype=dtype, **place)
    if unread:
        warn(f"{folder}: {type(model).__name__} does not read {listed(unread)} of the checkpoint")
    return model.to(device).eval()


def model_structure(folder: Path, dtype: torch.dtype | None = None) -> Any:
    """The causal language model of a folder on the meta device: its modules without any values.

    `dtype` is that of its checkpoint unless given.

    InputError: no whole safetensors weights, weights that lack a tensor or have one of another
    shape, quantised weights that cannot be loaded here, an architecture unknown to Transformers.
    """
    return _load(folder, device_map="meta", dtype=dtype or "auto")[0]


def _load(folder: Path, **options: Any) -> tuple[Any, list[str]]:
    """The model, and the names in its checkpoint that its class does not read."""
    transformers.utils.logging.disable_progress_bar()  # its progress bar would interleave with ours
    open_checkpoint(folder)
    method = quantisation(read_json(folder / "config.json"))
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except Exception as error:
        # Transformers raises many types here: OSError, KeyError, errors of config validation.
        first_line = (str(error).splitlines() or [repr(error)])[0]
        if method is not None:
            raise InputError(
                f"{folder}: the weights are quantised with {method}, which cannot be loaded here "
                f"({first_line}); install what it needs, or use the bf16 or float16 model"
            ) from error
        raise InputError(f"{folder}: the model cannot be loaded ({first_line})") from error
    model, report = loaded
    if method is not None and getattr(model, "hf_quantizer", None) is None:
        raise InputError(
            f"{folder}: the weights are quantised with {method}, which Transformers "
            f"{transformers.__version__} does not know; use the bf16 or float16 model"
        )
    _refuse_incomplete(folder, type(model).__name__, report)
    return model, sorted(report["unexpected_keys"])


def _refuse_incomplete(folder: Path, name: str, report: dict[str, Any]) -> None:
    """InputError for what Transformers would fill with random values."""
    problems = [f"lacks {key}" for key in sorted(report["missing_keys"])]
    problems += [
        f"has {key} of shape {list(found)}, not {list(expected)}"
        for key, found, expected in sorted(report["mismatched_keys"])
    ]
    if problems:
        unknown = sorted(report["unexpected_keys"])
        hint = f" (renamed? it also has {listed(unknown)})" if unknown else ""
        raise InputError(
            f"{folder}: the checkpoint does not hold the whole {name}: it {listed(problems)}{hint};"
            " download or save the model again"
        )


def missing_tensors(folder: Path) -> list[str] | None:
    """Names that a model's class has and its weights lack; None for an unknown architecture."""
    transformers.utils.logging.disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True, ignore_mismatched_sizes=True, device_map="meta"
        )
    except Exception:  # a merge needs names only, so it takes models that Transformers cannot run
        return None
    _, report = loaded
    return sorted(report["missing_keys"] | {key for key, *_ in report["mismatched_keys"]})


def listed(names: Sequence[str], most: int = 8) -> str:
    """Names separated by commas, the first `most` of them."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def quantisation(config: Any) -> str | None:
    """The quantisation method that a model's config.json names; None where it names none."""
    parts = [config, config.get("text_config")] if isinstance(config, dict) else []
    for part in parts:
        settings = part.get("quantization_config") if isinstance(part, dict) else None
        if settings:
            method = settings.get("quant_method") if isinstance(settings, dict) else None
            return str(method or "an unnamed method")
    return None


def require_embeddings(model: Any, largest_id: int, name: str) -> None:
    """InputError where the model has no embedding for a token id."""
    size = model.get_input_embeddings().weight.shape[0]
    if largest_id >= size:
        raise InputError(
            f"--model: {name} has {size} token embeddings, but the tokenizer gives id {largest_id};"
            " the model and the tokenizer do not belong together (resize the model's embeddings)"
        )


def context_length(config: Any) -> int | None:
    """Tokens that a model's config allows, RoPE scaling included; None where it names no limit.

    `max_position_embeddings` is the length before linear, dynamic and YaRN scaling, but after
    scaling of any other type.
    """
    config = config.get_text_config()
    length = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    if length is None or rope.get("rope_type") not in ("linear", "dynamic", "yarn"):
        return length
    before = rope.get("original_max_position_embeddings", length)
    return max(length, int(before * (rope.get("factor") or 1)))


def folder_context(folder: Path) -> int | None:
    """`context_length` of a model folder."""
    try:
        return context_length(AutoConfig.from_pretrained(folder))
    except (OSError, ValueError, KeyError) as error:
        first_line = str(error).splitlines()[0]
        raise InputError(f"{folder}: config.json cannot be read ({first_line})") from error


def model_hash(folder: Path) -> str:
    """Hash of a model folder's config and weights; InputError: see `open_checkpoint`."""
    paths = [folder / "config.json", *(shard.path for shard in open_checkpoint(folder).shards)]
    with ThreadPoolExecutor(HASHED_AT_ONCE) as pool:  # a hash takes one core, and a disk has more
        hashes = pool.map(hash_file, paths)
    return hash_json(dict(zip([path.name for path in paths], hashes, strict=True)))


def versions() -> dict[str, str]:
    """Versions of the packages that computed a result."""
    return {
        "gift": gift.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
