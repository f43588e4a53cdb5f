"""Options of `gift train`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from gift.config.options import LARGEST_SEED, DataOptions, DeviceOptions, Options, OutputOptions
from gift.weighting.formulas import WEIGHTINGS

if TYPE_CHECKING:
    WeightingName = str
else:  # the choices are the entries of WEIGHTINGS: a new one needs no change here
    WeightingName = Literal[tuple(WEIGHTINGS)]
Control = Literal["shuffle", "random", "invert", "constant"]
FORMULAS = "; ".join(f"{name}: {one.formula}" for name, one in WEIGHTINGS.items())
NEED_GUIDE = ", ".join(name for name in WEIGHTINGS if WEIGHTINGS[name].needs_guide)


class TrainOptions(Options):
    """How the adapter is trained; defaults are the paper's settings."""

    weighting: WeightingName = Field(
        default="guide",
        description=f"Weight of each token's loss ({FORMULAS}).",
    )
    excess_share: float = Field(
        default=0.6,
        gt=0,
        le=1,
        description="Share of each row's tokens that --weighting excess selects; half a token "
        "rounds up, at least one.",
    )
    confidence_level: Literal["token", "step", "sequence"] = Field(
        default="token",
        description="Which tokens share their mean confidence: none, those of a line of the "
        "response, or all of a response.",
    )
    control: Control | None = Field(
        default=None,
        description="Control of --weighting guide: a row's confidences in a random order, "
        "confidences drawn from all rows, 1 minus each, or their mean; scaled to the same mean "
        "weight. Drawn by --seed.",
    )
    normalization: Literal["tokens", "weights"] = Field(
        default="tokens",
        description="Divisor of a global batch's loss: its target tokens (the paper) or the sum of "
        "its weights (the authors' code).",
    )
    confidence_floor: float = Field(
        default=0.0,
        ge=0,
        description="Confidences below it are raised to it, before the power.",
    )
    confidence_power: float = Field(default=1.0, ge=0, description="Exponent of the weights.")
    confidence_threshold: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Tokens of less confidence weigh 0, whatever floor and power.",
    )
    end_weight: float | None = Field(
        default=None,
        ge=0,
        description="Fixed weight of end-of-turn tokens; by default like any other token.",
    )
    epochs: int = Field(default=1, ge=1, description="Passes over the data.")
    learning_rate: float = Field(default=2e-4, gt=0, description="Peak learning rate of AdamW.")
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = Field(
        default="linear", description="Learning-rate schedule after the warm-up."
    )
    warmup_ratio: float = Field(
        default=0.1, ge=0, le=1, description="Share of steps in the warm-up."
    )
    weight_decay: float = Field(default=0.0, ge=0, description="Weight decay of AdamW.")
    max_grad_norm: float = Field(default=1.0, gt=0, description="Gradient clipping by global norm.")
    micro_batch_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Most tokens per forward pass; a longer row is computed alone. Default 8192 on "
        "CUDA, 1024 elsewhere. Changes memory and speed, not the update.",
    )
    micro_batch_size: int | None = Field(
        default=None, ge=1, description="Most rows per forward pass; default no limit."
    )
    global_batch_size: int = Field(default=256, ge=1, description="Rows per optimizer step.")
    lora_rank: int = Field(default=64, ge=1, description="LoRA rank r.")
    lora_alpha: float = Field(
        default=128, gt=0, description="LoRA alpha; the update is scaled by alpha/r."
    )
    lora_dropout: float = Field(
        default=0.05, ge=0, lt=1, description="Dropout on the adapter's input."
    )
    lora_targets: str = Field(
        default="all-linear",
        description="Module names to adapt, separated by commas; all-linear is every linear layer "
        "of the blocks.",
    )
    rslora: bool = Field(default=False, description="Scale the update by alpha/sqrt(r) instead.")
    seed: int = Field(
        default=0,
        ge=0,
        le=LARGEST_SEED,
        description="Seed of initialisation, row order and dropout.",
    )
    gradient_checkpointing: str = Field(
        default="auto",
        pattern="^(auto|on|off|[1-9][0-9]*)$",
        description="Layers that recompute their activations in the backward, to save memory: on "
        "(all), off (none), a number (the first N), or auto: before the first step the largest "
        "micro-batch is tried without recomputation, with fewer tokens if needed, then with it.",
    )
    checkpoint_steps: int = Field(
        default=10,
        ge=1,
        description="Optimizer steps between checkpoints; a killed run resumes from the last.",
    )

    @field_validator("gradient_checkpointing", mode="before")
    @classmethod
    def _from_yaml(cls, value: Any) -> Any:
        """YAML reads on and off as booleans and a number of layers as an integer."""
        return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)

    @property
    def guided(self) -> bool:
        """Whether the weights need the guide's confidences."""
        return WEIGHTINGS[self.weighting].needs_guide


class ShardOptions(Options):
    """How the frozen model is divided among processes."""

    shard: bool = Field(
        default=False,
        description="Divide the frozen model among the processes of torchrun (FSDP2) in training, "
        "for models that one device does not hold. Changes memory and speed, not the adapter.",
    )


class TrainConfig(TrainOptions, ShardOptions, DataOptions, DeviceOptions, OutputOptions):
    """Options of `gift train`."""

    model: str = Field(description="The model to adapt: the base model, a folder or a hub id.")
    data: Path = Field(
        description="JSONL rows: instruction/response, prompt/completion or messages."
    )
    confidence: Path | None = Field(
        default=None,
        description=f"Folder made by gift annotate from the same data; needed for {NEED_GUIDE}.",
    )
    tokenizer: str | None = Field(
        default=None,
        description="Model whose tokenizer and chat template to use where there is no confidence "
        "store: the instruct model.",
    )
