"""Options that several commands share; each command's model is in a file of its own.

A command's options are one frozen pydantic model: its fields are the command's flags, the keys of
its YAML recipe and the settings written into its manifest.
"""

from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from gift.errors import InputError

AnyOptions = TypeVar("AnyOptions", bound=BaseModel)
# Stages derive 64-bit seeds from it, for an epoch or a rank.
LARGEST_SEED = 2**32 - 1


class Options(BaseModel):
    """A command's options: immutable; unknown keys, infinity and NaN are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def replaces_no_input(options: AnyOptions) -> AnyOptions:
    """InputError where `output` is no folder's name, or `overwrite` would remove an input."""
    values: dict[str, Any] = dict(options)
    output: Path | None = values.pop("output")
    if output is None:
        return options
    if output.name in ("", ".."):
        raise InputError(f"--output: {output} is no name for a new folder; add one")
    if not values["overwrite"] or not output.exists():
        return options
    place = output.resolve()
    for key, value in sorted(values.items()):
        for name in value if isinstance(value, list) else [value]:
            if not isinstance(name, str | Path) or not Path(name).exists():
                continue
            source = Path(name).resolve()
            if source == place or place in source.parents:
                raise InputError(
                    f"--output: {output} is or holds --{key.replace('_', '-')} {name}, "
                    "which --overwrite would remove; choose another folder"
                )
    return options


class OutputOptions(Options):
    """Where a stage writes."""

    output: Path = Field(description="Folder to write; it appears only when it is complete.")
    overwrite: bool = Field(default=False, description="Replace the output folder if it exists.")

    _replaces_no_input = model_validator(mode="after")(replaces_no_input)


class DeviceOptions(Options):
    """Where and in what precision a model runs."""

    device: str = Field(default="auto", description="auto, cpu, cuda or cuda:N; auto prefers CUDA.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="Dtype of the model; auto is bfloat16 on CUDA, float32 elsewhere.",
    )


class RowOptions(Options):
    """Which keys of a row are ignored."""

    ignore_keys: str = Field(
        default="",
        description="Keys of rows and messages to ignore, separated by commas. Keys that hold "
        "input for a model but are not supported (images, documents) are an error otherwise.",
    )

    def ignored_keys(self) -> set[str]:
        """The names in `ignore_keys`."""
        return {key.strip() for key in self.ignore_keys.split(",")} - {""}


class DataOptions(RowOptions):
    """How rows become tokens; the same in annotation and training."""

    max_length: int = Field(
        default=2048, ge=2, description="Longest row in tokens, prompt included."
    )
    overlong: Literal["drop", "truncate"] = Field(
        default="drop", description="Whether longer rows are dropped or truncated."
    )
    max_dropped: float = Field(
        default=0.01,
        ge=0,
        le=1,
        description="Largest share of rows that may be dropped or truncated before it is an error.",
    )
    limit: int | None = Field(default=None, ge=1, description="Use only this many rows, the first.")
