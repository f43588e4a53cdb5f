"""Options of `gift evaluate`."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from gift.config.options import LARGEST_SEED, DeviceOptions, Options, OutputOptions, RowOptions
from gift.errors import InputError
from gift.evaluation.benchmarks import BENCHMARKS, HARNESS_TASKS

if TYPE_CHECKING:
    BenchmarkName = str
else:
    BenchmarkName = Literal[(*BENCHMARKS, *HARNESS_TASKS)]
# Options of generated replies only.
GENERATION = (
    *("answer_pattern", "check_timeout", "unfinished", "samples", "temperature", "top_p"),
    *("max_new_tokens", "seed"),
)
# Options that lm-eval's tasks take.
HARNESS = (
    *("lm_eval", "benchmark", "include_path", "limit", "system_prompt", "seed", "batch_size"),
    *("model", "output", "overwrite", "device", "dtype"),
)
# Options of a local model only, and of a server only.
LOCAL = ("device", "dtype", "batch_size")
SERVED = ("served_model", "concurrency", "retries", "request_timeout", "extra_body")


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
        description="Replies per question (k of avg@k; the GIFT paper uses 16).",
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
    limit: int | None = Field(
        default=None, ge=1, description="Evaluate only this many rows, the first."
    )
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
        default=None,
        description="Field of the data; accuracy is also reported for each of its values.",
    )

    def check_by(self) -> Literal["exact", "math", "choice"]:
        """The check in effect; InputError where an option does not apply to it."""
        if self.benchmark in HARNESS_TASKS:
            raise InputError(
                f"--benchmark: {self.benchmark} is asked by lm-eval, in gift evaluate alone"
            )
        of_benchmark = BENCHMARKS[self.benchmark].check if self.benchmark else None
        check = self.check or of_benchmark or "math"
        if of_benchmark is not None and (check == "choice") != (of_benchmark == "choice"):
            raise InputError(
                f"--check: {check} is no check for --benchmark {self.benchmark}, whose questions "
                f"are {'multiple choice' if of_benchmark == 'choice' else 'open'}; leave it out"
            )
        if check == "choice":
            refuse_given(
                self,
                GENERATION,
                "the answer of a multiple choice is its likeliest letter, nothing is generated",
            )
        return check


class EndpointOptions(Options):
    """The server to evaluate through."""

    endpoint: str | None = Field(
        default=None,
        description="Ask an OpenAI-compatible server at this URL, such as "
        "http://localhost:8000/v1 (needs the extra `endpoint`; the key is OPENAI_API_KEY).",
    )
    served_model: str | None = Field(default=None, description="The server's name for the model.")
    concurrency: int = Field(
        default=16, ge=1, le=1000, description="Concurrent requests to the server."
    )
    retries: int = Field(
        default=5,
        ge=0,
        description="How often a failed request is repeated, after waits of 0.5 to 8 seconds.",
    )
    request_timeout: float = Field(
        default=600.0, gt=0, description="Seconds that the server may take for one reply."
    )
    extra_body: dict[str, Any] = Field(
        default={},
        description="Further fields of every request, such as top_k where the server takes it.",
    )


class EvaluateConfig(EvaluateOptions, EndpointOptions, DeviceOptions, OutputOptions):
    """Options of `gift evaluate`."""

    model: str | None = Field(
        default=None,
        description="Model to evaluate: a local folder or a hub id. Optional with "
        "--endpoint: its tokenizer is then used to detect a second BOS, and an interrupted call "
        "resumes only for the same weights.",
    )
    data: Path | None = Field(
        default=None,
        description="JSONL rows: a question (instruction, problem, question, prompt or messages) "
        "and its `answer`, a text or a number; for --check choice also `choices`, a list of texts, "
        "and the answer's letter or its index from 0.",
    )
    lm_eval: str | None = Field(
        default=None,
        description="Tasks, groups or tags of lm-evaluation-harness in place of questions, "
        "separated by commas (needs the extra `harness`).",
    )
    include_path: Path | None = Field(
        default=None, description="Folder with further tasks for --lm-eval, as lm-eval's YAML."
    )

    def harness_tasks(self) -> list[str]:
        """The tasks of lm-eval; none for an evaluation without it."""
        if self.benchmark in HARNESS_TASKS:
            return [HARNESS_TASKS[self.benchmark]]
        return [name.strip() for name in (self.lm_eval or "").split(",") if name.strip()]

    def refuse_unread_settings(self) -> None:
        """InputError where options contradict each other, or one does not apply."""
        if self.harness_tasks():
            unread = [name for name in type(self).model_fields if name not in HARNESS]
            unread += ["benchmark"] * (self.lm_eval is not None)
            refuse_given(self, unread, "lm-eval's tasks have questions and settings of their own")
        else:
            refuse_given(self, ("lm_eval", "include_path"), "no task of lm-eval is named")
        if self.endpoint is None:
            refuse_given(self, SERVED, "is for a server, whose URL --endpoint gives")
            if self.model is None:
                raise InputError("--model: is required, or the --endpoint of a server")
            return
        if self.served_model is None:
            raise InputError(
                "--served-model: is required with --endpoint, the server's name for the model"
            )
        if self.check_by() == "choice":
            raise InputError(
                "--check: choice reads the likelihoods of the options' letters, which servers do "
                "not give alike; leave out --endpoint and give --model"
            )
        refuse_given(self, LOCAL, "the server decides it")


def refuse_given(options: Options, names: Iterable[str], reason: str) -> None:
    """InputError with `reason` for the first of the named options that is not at its default."""
    for name in names:
        if getattr(options, name) != type(options).model_fields[name].default:
            raise InputError(f"--{name.replace('_', '-')}: {reason}; leave it out")
