"""Options of the tools around a merge: `gift diff`, `gift unmerge` and `gift merge-statistics`."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from gift.config import DataOptions, DeviceOptions, Options, OutputOptions


class DiffConfig(Options):
    """Options of `gift diff`."""

    model_a: str = Field(description="The model before: a folder or a hub id.")
    model_b: str = Field(description="The model after: a folder or a hub id.")
    adapter: str | None = Field(
        default=None,
        description="The adapter whose change bf16 had to hold, for the rounding loss.",
    )
    output: Path | None = Field(
        default=None,
        description="Folder for diff.json and, with matplotlib, diff.png; default none.",
    )
    overwrite: bool = Field(default=False, description="Replace the output folder if it exists.")
    sketch: int = Field(
        default=512,
        ge=1,
        description="Largest side on which ranks are computed exactly; 0 < sketch.",
    )
    seed: int = Field(default=0, ge=0, description="Seed of the sketches.")
    device: str = Field(default="auto", description="auto, cpu, cuda or cuda:N; auto prefers CUDA.")


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
    kind: Literal["fisher", "regmean"] = Field(description="The merge method that will use them.")
    tokenizer: str | None = Field(
        default=None,
        description="Model whose tokenizer and chat template to use; default the model's own. Give "
        "the instruct model here for a task model made from a base model.",
    )
