"""Options of `gift evaluate`."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from gift.benchmarks import BENCHMARKS
from gift.config.options import LARGEST_SEED, DeviceOptions, OutputOptions, RowOptions
from gift.errors import InputError

if TYPE_CHECKING:
    BenchmarkName = str
else:
    BenchmarkName = Literal[tuple(BENCHMARKS)]
# What only generated replies have.
GENERATION = (
    *("answer_pattern", "check_timeout", "unfinished", "samples", "temperature", "top_p"),
    *("max_new_tokens", "seed"),
)


class EvaluateOptions(RowOptions):
    """How to ask and how to check."""

    benchmark: BenchmarkName | None = Field(
        default=None,
        description="A benchmark by name: its data set is downloaded (needs the extra `hub`) or "
        "read from --data in its own format; it sets the check and the prompt.",
    )
    check: Literal["exact", "math", "choice"] | None = Field(
        default=None,
        description="How an answer is compared with the reference: math-verify (needs the extra "
        "`eval`), text equality that ignores differences in white space, or the option with the "
        "likeliest letter, without a reply. By default the benchmark's, else math.",
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

    def check_by(self) -> Literal["exact", "math", "choice"]:
        """The check in effect; InputError where an option has no part in it."""
        of_benchmark = BENCHMARKS[self.benchmark].check if self.benchmark else None
        check = self.check or of_benchmark or "math"
        if of_benchmark is not None and (check == "choice") != (of_benchmark == "choice"):
            raise InputError(
                f"--check: {check} is no check for --benchmark {self.benchmark}, whose questions "
                f"are {'multiple choice' if of_benchmark == 'choice' else 'open'}; leave it out"
            )
        defaults = EvaluateOptions.model_fields
        for name in GENERATION if check == "choice" else ():
            if getattr(self, name) != defaults[name].default:
                raise InputError(
                    f"--{name.replace('_', '-')}: the answer of a multiple choice is its likeliest "
                    "letter, nothing is generated; leave it out"
                )
        return check


class EvaluateConfig(EvaluateOptions, DeviceOptions, OutputOptions):
    """Options of `gift evaluate`."""

    model: str = Field(description="Model to evaluate: a local folder or a hub id.")
    data: Path | None = Field(
        default=None,
        description="JSONL rows: a question (instruction, problem, question, prompt or messages) "
        "and its `answer`, a text or a number; for --check choice also `choices`, a list of texts, "
        "and the answer's letter or its place counted from 0.",
    )
