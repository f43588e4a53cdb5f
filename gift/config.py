"""Options shared by several stages, and how a command's options are made from its model.

Each command's options are one frozen pydantic model: its fields are the command's flags, the keys
of its YAML recipe and the settings written into its manifest.
"""

from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gift.errors import InputError


class Options(BaseModel):
    """A command's options: immutable, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class OutputOptions(Options):
    """Where a stage writes."""

    output: Path = Field(description="Folder to write; it appears only when it is complete.")
    overwrite: bool = Field(False, description="Replace the output folder if it exists.")


class DeviceOptions(Options):
    """Where and in what precision a model runs."""

    device: str = Field("auto", description="auto, cpu, cuda or cuda:N; auto prefers CUDA.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Dtype of the model; auto is bfloat16 on CUDA, float32 elsewhere."
    )


class DataOptions(Options):
    """How rows become tokens; the same in annotation and training."""

    max_length: int = Field(2048, ge=2, description="Longest row in tokens, prompt included.")
    overlong: Literal["drop", "truncate"] = Field(
        "drop", description="What happens to longer rows."
    )
    max_dropped: float = Field(
        0.01,
        ge=0,
        le=1,
        description="Largest share of rows that may be dropped or truncated before it is an error.",
    )
    limit: int | None = Field(None, ge=1, description="Use only the first rows of the data.")


class AnnotateOptions(Options):
    """How the guide reads the data."""

    batch_tokens: int = Field(
        16384, ge=1, description="Padded tokens per forward pass; lower it to save memory."
    )
    part_batches: int = Field(
        16, ge=1, description="Batches per part; an interrupted annotation loses at most one part."
    )
    guide_temperature: float = Field(
        1.0, gt=0, description="Divides the guide's logits; 1 is the method of the paper."
    )


class AnnotateConfig(AnnotateOptions, DataOptions, DeviceOptions, OutputOptions):
    """Options of `gift annotate`."""

    model: str = Field(description="The guide: the instruct model, a folder or a hub id.")
    data: Path = Field(
        description="JSONL rows: instruction/response, prompt/completion or messages."
    )
    tokenizer: str | None = Field(
        None,
        description="Model whose tokenizer and chat template to use; default the guide's own. "
        "Give the instruct model here when the guide is a base model.",
    )


class ImportScoresConfig(DataOptions, OutputOptions):
    """Options of `gift import-scores`."""

    scores: Path = Field(
        description="The authors' JSONL: rows of instruction, response and scores [[q, q], ...]."
    )
    tokenizer: str = Field(description="The model whose tokenizer made the scores.")
    end_confidence: float = Field(
        1.0, ge=0, le=1, description="Confidence of the end-of-turn token, which they leave out."
    )


class TrainOptions(Options):
    """How the adapter is trained; defaults are the paper's settings."""

    weighting: Literal["guide", "uniform", "self"] = Field(
        "guide",
        description="Weight of each token's loss: the annotated confidence (GIFT), 1 (Shadow-FT, "
        "SFT) or the trained model's own confidence (DFT).",
    )
    normalization: Literal["tokens", "weights"] = Field(
        "tokens",
        description="Divisor of a global batch's loss: its target tokens (the paper) or the sum of "
        "its weights (the authors' code).",
    )
    confidence_floor: float = Field(0.0, ge=0, description="Smallest weight a token can have.")
    confidence_power: float = Field(1.0, ge=0, description="Exponent of the weights.")
    confidence_threshold: float = Field(0.0, ge=0, description="Smaller weights become 0.")
    end_weight: float | None = Field(
        None, ge=0, description="Fixed weight of end-of-turn tokens; default like any other token."
    )
    epochs: int = Field(1, ge=1, description="Passes over the data.")
    learning_rate: float = Field(2e-4, gt=0, description="Peak learning rate of AdamW.")
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = Field(
        "linear", description="Learning-rate schedule after the warm-up."
    )
    warmup_ratio: float = Field(0.1, ge=0, le=1, description="Share of steps with rising rate.")
    weight_decay: float = Field(0.0, ge=0, description="Weight decay of AdamW.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradient clipping by global norm.")
    micro_batch_size: int = Field(
        4, ge=1, description="Rows per forward pass; changes memory and speed, not the update."
    )
    global_batch_size: int = Field(256, ge=1, description="Rows per optimizer step.")
    lora_rank: int = Field(64, ge=1, description="LoRA rank r.")
    lora_alpha: float = Field(128, gt=0, description="LoRA alpha; the update is scaled by alpha/r.")
    lora_dropout: float = Field(0.05, ge=0, lt=1, description="Dropout on the adapter's input.")
    lora_targets: str = Field(
        "all-linear",
        description="Module names to adapt, separated by commas; all-linear is every linear layer "
        "of the blocks.",
    )
    rslora: bool = Field(False, description="Scale the update by alpha/sqrt(r) instead.")
    seed: int = Field(0, ge=0, description="Seed of initialisation, row order and dropout.")
    gradient_checkpointing: bool | None = Field(
        None, description="Recompute activations in the backward; default on CUDA only."
    )
    checkpoint_steps: int = Field(
        10,
        ge=1,
        description="Optimizer steps between checkpoints, from which a killed run goes on.",
    )


class TrainConfig(TrainOptions, DataOptions, DeviceOptions, OutputOptions):
    """Options of `gift train`."""

    model: str = Field(description="The model to adapt: the base model, a folder or a hub id.")
    data: Path = Field(
        description="JSONL rows: instruction/response, prompt/completion or messages."
    )
    confidence: Path | None = Field(
        None, description="Folder made by gift annotate from the same data; needed for guide."
    )
    tokenizer: str | None = Field(
        None,
        description="Model whose tokenizer and chat template to use where there is no confidence "
        "store: the instruct model.",
    )


Config = TypeVar("Config", bound=BaseModel)


def build_config(
    model: type[Config], recipe: Path | None, flags: dict[str, Any], command: str = ""
) -> Config:
    """A config from a YAML recipe and flags; flags win, and every mistake is named.

    `flags` holds only what the user gave.
    """
    values = _read_recipe(recipe) if recipe is not None else {}
    values = {key.replace("-", "_"): value for key, value in values.items()}
    unknown = sorted(set(values) - set(model.model_fields))
    if unknown:
        known = ", ".join(sorted(model.model_fields))
        raise InputError(f"{recipe}: unknown key {', '.join(unknown)}; the keys are {known}")
    try:
        return model.model_validate({**values, **flags})
    except ValidationError as error:
        problems = [
            f"{_place(problem, recipe, flags)}: {_reason(problem)}" for problem in error.errors()
        ]
        raise InputError("; ".join(problems)) from None


def _read_recipe(recipe: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"--config: {recipe}: no such file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        detail = " ".join(str(error).split())
        raise InputError(f"--config: {recipe}: not valid YAML ({detail})") from None
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise InputError(f"--config: {recipe}: expected a mapping of option names to values")
    return content


def _place(problem: Any, recipe: Path | None, flags: dict[str, Any]) -> str:
    name = str(problem["loc"][0]) if problem["loc"] else "options"
    flag = f"--{name.replace('_', '-')}"
    return flag if name in flags or recipe is None else f"{recipe}: {name}"


def _reason(problem: Any) -> str:
    if problem["type"] == "missing":
        return "is required"
    return f"{problem['msg'].lower()}, got {problem['input']!r}"
