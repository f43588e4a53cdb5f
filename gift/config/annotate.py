"""Options of `gift annotate` and `gift import-scores`."""

from pathlib import Path

from pydantic import Field

from gift.config.options import DataOptions, DeviceOptions, Options, OutputOptions


class AnnotateOptions(Options):
    """How the guide reads the data."""

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
