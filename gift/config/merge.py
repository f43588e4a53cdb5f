"""Options of `gift merge` and of the tools around it: `diff`, `unmerge`, `merge-statistics`."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator

from gift.config.options import (
    LARGEST_SEED,
    DataOptions,
    DeviceOptions,
    Options,
    OutputOptions,
    replaces_no_input,
)
from gift.errors import InputError
from gift.merge.methods import METHODS

if TYPE_CHECKING:
    MergeMethod = StatisticsMethod = str
else:  # the choices are the files in `methods`
    MergeMethod = Literal[tuple(METHODS)]
    StatisticsMethod = Literal[tuple(name for name in METHODS if METHODS[name].statistics)]
NEED_BASE = " and ".join(name for name in METHODS if METHODS[name].needs_base)
NEED_STATISTICS = " and ".join(name for name in METHODS if METHODS[name].statistics)


def _setting(description: str, name: str, **field: Any) -> Any:
    """A field that is a setting of merge methods; its description names them."""
    readers = ", ".join(key for key, method in METHODS.items() if name in method.settings)
    return Field(description=f"{description} ({readers}).", **field)


class MergeOptions(Options):
    """How to merge; defaults are those of each method's paper."""

    method: MergeMethod = Field(
        default="lora", description="The merge method; lora is that of GIFT and of Shadow-FT."
    )
    task_weight: float = _setting("λ or α, the factor on task vectors", "task_weight", default=1.0)
    instruct_weight: float = _setting(
        "β, the factor on instruct - base", "instruct_weight", default=1.0
    )
    trim_keep: float = _setting(
        "Percent of each task vector that is kept", "trim_keep", default=20.0, gt=0, le=100
    )
    drop_rate: float = _setting(
        "Probability with which an entry is dropped", "drop_rate", default=0.9, ge=0, lt=1
    )
    dare_seed: int = _setting(
        "Seed of the entries that are dropped", "dare_seed", default=0, ge=0, le=LARGEST_SEED
    )
    energy_share: float = _setting(
        "Share of the squared singular values that the low-rank part holds",
        "energy_share",
        default=0.5,
        gt=0,
        le=1,
    )
    off_diagonal: float = _setting(
        "Factor on the off-diagonal of Gram matrices", "off_diagonal", default=0.9, ge=0, le=1
    )
    untie_embeddings: bool = Field(
        default=False,
        description="Write a separate output head where an adapter changes one side of tied "
        "embeddings; without it that is an error.",
    )
    save_residual: bool = Field(
        default=False,
        description="Save what an exact gift unmerge needs (10 to 40 % of the weights' size).",
    )

    def refuse_unread_settings(self) -> None:
        """InputError for a setting of another method that is not at its default."""
        for name in sorted({key for method in METHODS.values() for key in method.settings}):
            is_default = getattr(self, name) == MergeOptions.model_fields[name].default
            if not is_default and name not in METHODS[self.method].settings:
                raise InputError(
                    f"--{name.replace('_', '-')}: --method {self.method} does not read it; leave "
                    "it out"
                )


class MergeConfig(MergeOptions, OutputOptions):
    """Options of `gift merge`."""

    model: str = Field(description="The instruct model to merge into: a folder or a hub id.")
    adapter: list[str] = Field(
        min_length=1,
        description="PEFT LoRA adapter, a folder or a hub id; repeat the option for several.",
    )
    scale: list[str] = Field(
        default=[], description="Coefficient of each --adapter, in their order; default 1."
    )
    base: str | None = Field(
        default=None,
        description=f"The base model: needed by {NEED_BASE}; where a method has an origin, it is "
        "the base model then, and instruct - base becomes one of the task vectors.",
    )
    statistics: list[str] = Field(
        default=[],
        description=f"Folders made by gift merge-statistics for {NEED_STATISTICS}: the instruct "
        "model's first, then one per adapter.",
    )
    dtype: Literal["keep", "float32", "bfloat16", "float16"] = Field(
        default="keep", description="Dtype of the written weights; keep preserves each tensor's."
    )
    device: str = Field(default="auto", description="auto, cpu, cuda or cuda:N; auto prefers CUDA.")
    dry_run: bool = Field(
        default=False, description="Only print the plan as a table; write nothing."
    )

    @field_validator("scale", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        return [str(item) for item in value] if isinstance(value, list | tuple) else value

    def coefficients(self) -> list[float]:
        """One number per adapter; InputError for another count or a value that is not a number."""
        if not self.scale:
            return [1.0] * len(self.adapter)
        try:
            numbers = [float(item) for item in self.scale]
        except ValueError as error:
            raise InputError(f"--scale: {error}; give one number per --adapter") from None
        if not all(map(math.isfinite, numbers)):
            raise InputError(f"--scale: {', '.join(self.scale)}: expected finite numbers")
        if len(numbers) != len(self.adapter):
            raise InputError(
                f"--scale: {len(numbers)} values for {len(self.adapter)} adapters; give one each"
            )
        return numbers


class DiffConfig(Options):
    """Options of `gift diff`."""

    model_a: str = Field(description="The model before: a folder or a hub id.")
    model_b: str = Field(description="The model after: a folder or a hub id.")
    adapter: str | None = Field(
        default=None,
        description="The merged adapter; the bf16 rounding loss is computed for its change.",
    )
    output: Path | None = Field(
        default=None,
        description="Folder for diff.json and, with matplotlib, diff.png; default none.",
    )
    overwrite: bool = Field(default=False, description="Replace the output folder if it exists.")
    sketch: int = Field(
        default=512,
        ge=1,
        description="Ranks are exact for matrices whose shorter side is at most this; larger ones "
        "are sketched to this size.",
    )
    seed: int = Field(default=0, ge=0, le=LARGEST_SEED, description="Seed of the sketches.")
    device: str = Field(default="auto", description="auto, cpu, cuda or cuda:N; auto prefers CUDA.")

    _replaces_no_input = model_validator(mode="after")(replaces_no_input)


class UnmergeConfig(OutputOptions):
    """Options of `gift unmerge`."""

    model: str = Field(description="The folder that gift merge wrote.")
    adapter: list[str] = Field(
        default=[],
        description="The merged adapters, in the order of the merge; needed where the merge was "
        "made without --save-residual.",
    )
    device: str = Field(default="auto", description="auto, cpu, cuda or cuda:N; auto prefers CUDA.")


class StatisticsConfig(DataOptions, DeviceOptions, OutputOptions):
    """Options of `gift merge-statistics`."""

    model: str = Field(description="One of the models to merge: a folder or a hub id.")
    data: Path = Field(
        description="JSONL rows: instruction/response, prompt/completion or messages."
    )
    kind: StatisticsMethod = Field(description="The merge method that will use them.")
    tokenizer: str | None = Field(
        default=None,
        description="Model whose tokenizer and chat template to use; default the model's own. Give "
        "the instruct model here for a task model made from a base model.",
    )
