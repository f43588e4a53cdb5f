"""Options of `gift run`: those of its stages."""

from pathlib import Path
from typing import Any

from pydantic import Field, create_model

from gift.config.annotate import AnnotateOptions
from gift.config.evaluate import EvaluateOptions
from gift.config.merge import MergeOptions
from gift.config.options import DataOptions, DeviceOptions, OutputOptions
from gift.config.train import ShardOptions, TrainOptions


class RunStages(
    AnnotateOptions, TrainOptions, ShardOptions, MergeOptions, DataOptions, DeviceOptions
):
    """The options of a run's first three stages; no two have the same name."""


class RunOptions(RunStages, OutputOptions):
    """Options of `gift run`: those of its stages, the evaluation's under names with eval_."""

    base: str = Field(description="The base model, a folder or a hub id.")
    instruct: str = Field(description="The instruct model made from it, a folder or a hub id.")
    data: Path = Field(
        description="JSONL rows: instruction/response, prompt/completion or messages."
    )
    eval_data: Path | None = Field(
        default=None,
        description="JSONL questions with answers; without it and --eval-benchmark nothing is "
        "evaluated.",
    )


RunConfig: Any = create_model(
    "RunConfig",
    __base__=RunOptions,
    __doc__=RunOptions.__doc__,
    **{
        f"eval_{name}": (field.annotation, field)
        for name, field in EvaluateOptions.model_fields.items()
    },  # pyright: ignore
)
