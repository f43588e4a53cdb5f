"""Options shared by several stages, and how a command's options are made from its model.

Each command's options are one frozen pydantic model: its fields are the command's flags, the keys
of its YAML recipe and the settings written into its manifest.
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    create_model,
    field_validator,
    model_validator,
)

from gift.errors import InputError


class Options(BaseModel):
    """A command's options: immutable, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class OutputOptions(Options):
    """Where a stage writes."""

    output: Path = Field(description="Folder to write; it appears only when it is complete.")
    overwrite: bool = Field(default=False, description="Replace the output folder if it exists.")

    @model_validator(mode="after")
    def _replaces_no_input(self) -> "OutputOptions":
        """InputError where `overwrite` would remove what another option names."""
        if not self.overwrite or not self.output.exists():
            return self
        place = self.output.resolve()
        for key in sorted(set(type(self).model_fields) - {"output"}):
            value = getattr(self, key)
            for name in value if isinstance(value, list) else [value]:
                if not isinstance(name, str | Path) or not Path(name).exists():
                    continue
                source = Path(name).resolve()
                if source == place or place in source.parents:
                    raise InputError(
                        f"--output: {self.output} is or holds --{key.replace('_', '-')} {name}, "
                        "which --overwrite would remove; choose another folder"
                    )
        return self


class DeviceOptions(Options):
    """Where and in what precision a model runs."""

    device: str = Field(default="auto", description="auto, cpu, cuda or cuda:N; auto prefers CUDA.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="Dtype of the model; auto is bfloat16 on CUDA, float32 elsewhere.",
    )


class DataOptions(Options):
    """How rows become tokens; the same in annotation and training."""

    max_length: int = Field(
        default=2048, ge=2, description="Longest row in tokens, prompt included."
    )
    overlong: Literal["drop", "truncate"] = Field(
        default="drop", description="What happens to longer rows."
    )
    max_dropped: float = Field(
        default=0.01,
        ge=0,
        le=1,
        description="Largest share of rows that may be dropped or truncated before it is an error.",
    )
    limit: int | None = Field(
        default=None, ge=1, description="Use only the first rows of the data."
    )


class AnnotateOptions(Options):
    """How the guide reads the data."""

    batch_tokens: int = Field(
        default=16384, ge=1, description="Padded tokens per forward pass; lower it to save memory."
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
        description="Confidence of the end-of-turn token, which they leave out.",
    )


class TrainOptions(Options):
    """How the adapter is trained; defaults are the paper's settings."""

    weighting: Literal["guide", "uniform", "self"] = Field(
        default="guide",
        description="Weight of each token's loss: the annotated confidence (GIFT), 1 (Shadow-FT, "
        "SFT) or the trained model's own confidence (DFT).",
    )
    normalization: Literal["tokens", "weights"] = Field(
        default="tokens",
        description="Divisor of a global batch's loss: its target tokens (the paper) or the sum of "
        "its weights (the authors' code).",
    )
    confidence_floor: float = Field(
        default=0.0, ge=0, description="Smallest weight a token can have."
    )
    confidence_power: float = Field(default=1.0, ge=0, description="Exponent of the weights.")
    confidence_threshold: float = Field(default=0.0, ge=0, description="Smaller weights become 0.")
    end_weight: float | None = Field(
        default=None,
        ge=0,
        description="Fixed weight of end-of-turn tokens; default like any other token.",
    )
    epochs: int = Field(default=1, ge=1, description="Passes over the data.")
    learning_rate: float = Field(default=2e-4, gt=0, description="Peak learning rate of AdamW.")
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = Field(
        default="linear", description="Learning-rate schedule after the warm-up."
    )
    warmup_ratio: float = Field(
        default=0.1, ge=0, le=1, description="Share of steps with rising rate."
    )
    weight_decay: float = Field(default=0.0, ge=0, description="Weight decay of AdamW.")
    max_grad_norm: float = Field(default=1.0, gt=0, description="Gradient clipping by global norm.")
    micro_batch_size: int = Field(
        default=4,
        ge=1,
        description="Rows per forward pass; changes memory and speed, not the update.",
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
    seed: int = Field(default=0, ge=0, description="Seed of initialisation, row order and dropout.")
    gradient_checkpointing: bool | None = Field(
        default=None, description="Recompute activations in the backward; default on CUDA only."
    )
    checkpoint_steps: int = Field(
        default=10,
        ge=1,
        description="Optimizer steps between checkpoints, from which a killed run goes on.",
    )


class TrainConfig(TrainOptions, DataOptions, DeviceOptions, OutputOptions):
    """Options of `gift train`."""

    model: str = Field(description="The model to adapt: the base model, a folder or a hub id.")
    data: Path = Field(
        description="JSONL rows: instruction/response, prompt/completion or messages."
    )
    confidence: Path | None = Field(
        default=None,
        description="Folder made by gift annotate from the same data; needed for guide.",
    )
    tokenizer: str | None = Field(
        default=None,
        description="Model whose tokenizer and chat template to use where there is no confidence "
        "store: the instruct model.",
    )


MergeMethod = Literal[
    "lora",
    "task-arithmetic",
    "re-adapt",
    "lore-adapt",
    "ties",
    "dare",
    "dare-ties",
    "fisher",
    "regmean",
]


class MergeOptions(Options):
    """How to merge; defaults are those of each method's paper."""

    method: MergeMethod = Field(
        default="lora",
        description="lora (GIFT, Shadow-FT), task-arithmetic, re-adapt, lore-adapt, ties, dare, "
        "dare-ties, fisher or regmean.",
    )
    task_weight: float = Field(
        default=1.0,
        description="λ of task-arithmetic, ties and dare; α of re-adapt and lore-adapt.",
    )
    instruct_weight: float = Field(
        default=1.0, description="β of re-adapt and lore-adapt, the weight of instruct - base."
    )
    trim_keep: float = Field(
        default=20.0, gt=0, le=100, description="Percent of each task vector that ties keeps."
    )
    drop_rate: float = Field(
        default=0.9,
        ge=0,
        lt=1,
        description="Probability with which dare and dare-ties drop an entry.",
    )
    dare_seed: int = Field(default=0, ge=0, description="Seed of the entries that dare drops.")
    energy_share: float = Field(
        default=0.5,
        gt=0,
        le=1,
        description="Share of the squared singular values that lore-adapt's low-rank part holds.",
    )
    off_diagonal: float = Field(
        default=0.9,
        ge=0,
        le=1,
        description="Factor on the off-diagonal of regmean's Gram matrices.",
    )
    untie_embeddings: bool = Field(
        default=False,
        description="Write a separate output head where an adapter changes one side of tied "
        "embeddings; without it that is an error.",
    )
    save_residual: bool = Field(
        default=False,
        description="Keep what an exact gift unmerge needs (some 10 to 40 % of the weights).",
    )


class MergeConfig(MergeOptions, OutputOptions):
    """Options of `gift merge`."""

    model: str = Field(description="The instruct model to merge into: a folder or a hub id.")
    adapter: list[str] = Field(
        min_length=1, description="PEFT LoRA adapter, a folder or a hub id; repeat for several."
    )
    scale: list[str] = Field(
        default=[], description="Coefficient of each --adapter, in their order; default 1."
    )
    base: str | None = Field(
        default=None,
        description="The base model: needed by re-adapt and lore-adapt; with the other methods it "
        "becomes the origin of the task vectors, and instruct - base one of them.",
    )
    statistics: list[str] = Field(
        default=[],
        description="Folders made by gift merge-statistics for fisher and regmean: the instruct "
        "model's first, then one per adapter.",
    )
    dtype: Literal["keep", "float32", "bfloat16", "float16"] = Field(
        default="keep", description="Dtype of the written weights; keep leaves each tensor's own."
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
        """One number an adapter; InputError where they are no numbers or too few."""
        if not self.scale:
            return [1.0] * len(self.adapter)
        try:
            numbers = [float(item) for item in self.scale]
        except ValueError as error:
            raise InputError(f"--scale: {error}; give one number per --adapter") from None
        if len(numbers) != len(self.adapter):
            raise InputError(
                f"--scale: {len(numbers)} values for {len(self.adapter)} adapters; give one each"
            )
        return numbers


class EvaluateOptions(Options):
    """How to ask and how to check."""

    check: Literal["exact", "math"] = Field(
        default="math",
        description="How an answer is compared with the reference: math-verify (needs the extra "
        "`eval`), or text equality, white space aside.",
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
    seed: int = Field(default=0, ge=0, description="Seed of the sampling.")
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


class _RunStages(AnnotateOptions, TrainOptions, MergeOptions, DataOptions, DeviceOptions):
    """The options of a run's first three stages; no two have the same name."""


class RunOptions(_RunStages, OutputOptions):
    """Options of `gift run`: those of its stages, the evaluation's under names with eval_."""

    base: str = Field(description="The base model, a folder or a hub id.")
    instruct: str = Field(description="The instruct model made from it, a folder or a hub id.")
    data: Path = Field(
        description="JSONL rows: instruction/response, prompt/completion or messages."
    )
    eval_data: Path | None = Field(
        default=None, description="JSONL questions with answers; without it nothing is evaluated."
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


class DemoConfig(OutputOptions):
    """Options of `gift demo`."""

    pairs: int = Field(
        default=2, ge=1, description="Base/instruct pairs to make, each from its own seed."
    )
    seeds: int = Field(
        default=3, ge=1, description="Task sets and adaptations per pair and method."
    )
    workers: int = Field(
        default=2, ge=1, description="Processes; each works on one pair, on one core."
    )
    clean: bool = Field(
        default=False,
        description="References without noise: a control in which direct fine-tuning is best.",
    )
    questions: int = Field(default=200, ge=4, description="Held-out questions per measure.")
    scale: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Share of the pair's training steps; less is only a trial.",
    )
