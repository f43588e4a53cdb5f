"""What the merge tests share: tiny models and real PEFT adapters on disk, and the exact truth."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig

from gift.config import MergeConfig
from gift.merge.command import merge
from gift.merge.methods import METHODS

LLAMA: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
IDS = torch.tensor([[3, 1, 4, 15, 92, 65, 35, 8, 9, 79, 32, 3, 8, 46]])


def llama(**overrides: Any) -> LlamaConfig:
    """A tiny Llama whose weights are all of different shapes but the square ones."""
    return LlamaConfig(**{**LLAMA, **overrides})


def save_model(
    folder: Path,
    config: PreTrainedConfig | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    shard_size: str = "5GB",
    seed: int = 0,
) -> Path:
    """Writes a random model; vectors too are random, so that losing one is seen."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config or llama()).to(dtype)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, 0.5, 0.2)
    model.save_pretrained(folder, max_shard_size=shard_size)
    return folder


def save_adapter(
    folder: Path, model: Path, *, seed: int = 1, dtype: torch.dtype = torch.float32, **options: Any
) -> PeftModel:
    """Writes a PEFT adapter with random factors for a model folder; returns the adapted model."""
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    defaults = {"r": 4, "lora_alpha": 6, "init_lora_weights": False}
    if "target_modules" not in options:
        options["target_modules"] = "all-linear"
    adapted = get_peft_model(base, LoraConfig(**{**defaults, **options}))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name and parameter.ndim > 1:
                parameter.normal_(0, 0.1)
            elif "magnitude" in name or "modules_to_save" in name or "lora_B.default.bias" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    adapted.save_pretrained(str(folder))
    return adapted.eval()


def save_pair(folder: Path, **options: Any) -> None:
    """Writes folder/model (see `save_model`) and folder/adapter."""
    save_model(folder / "model", **options)
    save_adapter(folder / "adapter", folder / "model")


def run_merge(folder: Path, **options: Any) -> Path:
    """Merges folder/adapter into folder/model, by default to folder/merged."""
    defaults = {
        "model": str(folder / "model"),
        "adapter": [str(folder / "adapter")],
        "output": folder / "merged",
    }
    config = MergeConfig(**{**defaults, **options})
    merge(config)
    return config.output


def tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors files, read by the safetensors library."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def load(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model of a folder, ready to run."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    """The model's logits on a fixed text."""
    return model(input_ids=IDS).logits


def factors(adapter: Path, module: str) -> tuple[Tensor, Tensor]:
    """A and B of one module of an adapter, float64."""
    stored = tensors(adapter)
    key = f"base_model.model.{module}.lora_"
    return stored[f"{key}A.weight"].double(), stored[f"{key}B.weight"].double()


def round_once(values: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 to a 16-bit dtype with one rounding.

    PyTorch converts by way of float32, which can round twice; rounding to odd in between cannot.
    """
    near = values.float()
    bits = near.view(torch.int32)
    inexact = (near.double() != values) & (bits % 2 == 0)
    outward = (values.abs() > near.double().abs()).int() * 2 - 1
    odd = torch.where(inexact, bits + outward, bits)
    return odd.view(torch.float32).to(dtype)


def ulps_apart(found: Tensor, truth: Tensor) -> Tensor:
    """How many representable 16-bit numbers lie between two tensors, elementwise."""

    def order(values: Tensor) -> Tensor:
        bits = values.view(torch.int16).int()
        return torch.where(bits < 0, -32768 - bits, bits)

    return (order(found) - order(truth)).abs()


def change_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def edit_adapter(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = folder / "adapter" / "adapter_model.safetensors"
    stored = load_file(path)
    edit(stored)
    save_file(stored, path)


def save_three(folder: Path) -> None:
    """A base, an instruct model near it and two adapters, in float64."""
    save_model(folder / "base", dtype=torch.float64)
    save_model(folder / "model", dtype=torch.float64)
    path = folder / "model" / "model.safetensors"
    weights = load_file(path)
    generator = torch.Generator().manual_seed(7)
    moved = {
        name: w + 0.05 * torch.randn(w.shape, generator=generator, dtype=w.dtype)
        for name, w in weights.items()
    }
    save_file(moved, path, {"format": "pt"})
    for number in (1, 2):
        options: dict[str, Any] = {"seed": number, "target_modules": ["q_proj", "down_proj"]}
        save_adapter(folder / f"adapter{number}", folder / "model", **options)


# For `merge_two`; none is a default.
SETTINGS = {"task_weight": 0.8, "instruct_weight": 0.6, "trim_keep": 30}


def merge_two(folder: Path, method: str, has_base: bool) -> Path:
    """The two adapters of `save_three` merged, the second at half its scale."""
    return run_merge(
        folder,
        method=method,
        adapter=[str(folder / f"adapter{number}") for number in (1, 2)],
        scale=["1", "0.5"],
        base=str(folder / "base") if has_base else None,
        **{name: SETTINGS[name] for name in SETTINGS if name in METHODS[method].settings},
    )
