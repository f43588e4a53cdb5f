"""Options of `gift evaluate`."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from gift.config.options import LARGEST_SEED, DeviceOptions, OutputOptions, RowOptions


class EvaluateOptions(RowOptions):
    """How to ask and how to check."""

    check: Literal["exact", "math"] = Field(
        default="math",
        description="How an answer is compared with the reference: math-verify (needs the extra "
        "`eval`), or text equality that ignores differences in white space.",
    )
    answer_pattern: str | None = Field(
        default=None,
        description=r"Regular expression, for example 'answer (\S+)'; the first group of its last "
        "match is the reply's answer. Without it the whole reply is compared (exact) or searched "
        "for the answer (math).",
    )
    check_timeout: float = Field(
        default=10.0, gt=0, description="Seconds that math-verify may take for one answer."
    )
    unfinished: Literal["wrong", "checked"] = Field(
        default="wrong",
        description="Whether a reply that has not ended within --max-new-tokens counts as wrong or "
        "is checked like any other.",
    )
    samples: int = Field(
        default=4,
        ge=1,
        description="Replies to every question (k of avg@k; the GIFT paper uses 16).",
    )
    temperature: float = Field(default=1.0, ge=0, description="Sampling temperature; 0 is greedy.")
    top_p: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Samples from the smallest set of likeliest tokens with this probability.",
    )
    max_new_tokens: int = Field(
        default=2048, ge=1, description="Longest reply in tokens (the GIFT paper allows 4096)."
    )
    seed: int = Field(default=0, ge=0, le=LARGEST_SEED, description="Seed of the sampling.")
    batch_size: int = Field(
        default=32, ge=1, description="Replies generated at a time; changes speed and memory only."
    )
    limit: int | None = Field(default=None, ge=1, description="Evaluate the first rows only.")
    system_prompt: str | None = Field(
        default=None, description="System turn put before every question."
    )
    prompt_suffix: str | None = Field(
        default=None, description="Text added to every question on a line of its own."
    )
    question_field: str | None = Field(
        default=None,
        description="Field that holds the question; by default the first found of instruction, "
        "problem, question and prompt, or the turns in messages.",
    )
    group_by: str | None = Field(
        default=None, description="Field of the data whose values get an accuracy each."
    )


class EvaluateConfig(EvaluateOptions, DeviceOptions, OutputOptions):
    """Options of `gift evaluate`."""

    model: str = Field(description="Model to evaluate: a local folder or a hub id.")
    data: Path = Field(
        description="JSONL rows: a question (instruction, problem, question, prompt or messages) "
        "and its `answer`, a text or a number."
    )
