"""Options of `gift annotate`, `gift import-scores` and `gift calibration`."""

from pathlib import Path

from pydantic import Field, model_validator

from gift.config.options import (
    LARGEST_SEED,
    DataOptions,
    DeviceOptions,
    Options,
    OutputOptions,
    replaces_no_input,
)


class AnnotateOptions(Options):
    """How the data is annotated."""

    batch_tokens: int = Field(
        default=16384, ge=1, description="Tokens per forward pass; lower it to save memory."
    )
    part_batches: int = Field(
        default=16,
        ge=1,
        description="Batches per part; an interrupted annotation loses at most one part.",
    )
    guide_temperature: float = Field(
        default=1.0, gt=0, description="Divides the guide's logits; 1 is the method of the paper."
    )


class AnnotateConfig(AnnotateOptions, DataOptions, DeviceOptions, OutputOptions):
    """Options of `gift annotate`."""

    model: str = Field(description="The guide: the instruct model, a folder or a hub id.")
    data: Path = Field(
        description="JSONL rows: instruction/response, prompt/completion or messages."
    )
    tokenizer: str | None = Field(
        default=None,
        description="Model whose tokenizer and chat template to use; default the guide's own. "
        "Give the instruct model here when the guide is a base model.",
    )
    show_rows: int | None = Field(
        default=None,
        ge=1,
        description="Print that many rows as the guide reads them, the target tokens marked, and "
        "stop: no weights are loaded, nothing is written.",
    )


class ImportScoresConfig(DataOptions, OutputOptions):
    """Options of `gift import-scores`."""

    scores: Path = Field(
        description="The authors' JSONL: rows of instruction, response and scores [[q, q], ...]."
    )
    tokenizer: str = Field(description="The model whose tokenizer made the scores.")
    end_confidence: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="Confidence of the end-of-turn token, which the authors' files leave out.",
    )


class CalibrationConfig(Options):
    """Options of `gift calibration`."""

    store: Path = Field(description="Folder written by gift annotate.")
    data: Path = Field(description="The JSONL rows that were annotated.")
    correct_field: str | None = Field(
        default=None,
        description="Key of a row that says whether its response is correct, true or false; rows "
        "without it are left out. By default there is no AUROC.",
    )
    bands: int = Field(
        default=10,
        ge=1,
        le=1000,
        description="Number of equally wide bands of the largest probability.",
    )
    examples: int = Field(default=5, ge=0, description="Examples to show of each kind.")
    resamples: int = Field(
        default=2000, ge=100, description="Bootstrap samples of rows for the intervals."
    )
    seed: int = Field(default=0, ge=0, le=LARGEST_SEED, description="Seed of the bootstrap.")
    output: Path | None = Field(
        default=None,
        description="Folder for calibration.json and, with matplotlib, calibration.png; default "
        "none.",
    )
    overwrite: bool = Field(default=False, description="Replace the output folder if it exists.")

    _replaces_no_input = model_validator(mode="after")(replaces_no_input)
