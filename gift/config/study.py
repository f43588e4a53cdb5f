"""Options of `gift study` and `gift report`.

Pairs, methods, evaluations and tuning come from the study's file only, not from flags.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from gift.config.evaluate import EvaluateOptions
from gift.config.options import LARGEST_SEED, DeviceOptions, Options, OutputOptions
from gift.config.run import RunStages
from gift.errors import InputError

INSTRUCT = "Instruct"


class PairOptions(Options):
    """The two models of a pair."""

    base: str = Field(description="The base model, a folder or a hub id.")
    instruct: str = Field(description="The instruct model made from it, a folder or a hub id.")


class MethodOptions(RunStages):
    """One way to adapt: options of annotation, training and merge, and which model is trained."""

    data: str = Field(
        description="JSONL training rows; {pair} and {seed} in it are replaced by those of the run."
    )
    trained: Literal["base", "instruct"] = Field(
        default="base", description="The model that the adapter is trained on."
    )
    about: str | None = Field(
        default=None, description="A sentence for the report that describes the method."
    )
    guide: str = Field(
        default="instruct",
        description="The model that annotates: instruct, base, or another's folder or hub id; "
        "{pair} in it is replaced by that of the run.",
    )


class EvaluationOptions(EvaluateOptions, DeviceOptions):
    """Questions for all models of a pair."""

    data: str | None = Field(
        default=None,
        description="JSONL questions with answers; {pair} in it is replaced by that of the run.",
    )
    about: str | None = Field(
        default=None, description="A sentence for the report that describes the questions."
    )
    retention: bool = Field(
        default=False,
        description="Whether this measures what the instruct model could do before, not the task.",
    )


class TuningOptions(EvaluateOptions, DeviceOptions):
    """The learning rates to try for every method, and the questions that decide."""

    learning_rates: list[Annotated[float, Field(gt=0)]] = Field(
        min_length=1, description="The rate with the best accuracy is taken, per pair and method."
    )
    data: str | None = Field(
        default=None,
        description="JSONL questions of no evaluation; {pair} is replaced by that of the run.",
    )


class StudyConfig(OutputOptions):
    """Options of `gift study`."""

    title: str | None = Field(default=None, description="The report's title.")
    pairs: dict[str, PairOptions] = Field(
        min_length=1, description="Base and instruct models, by name."
    )
    settings: dict[str, Any] = Field(default={}, description="Default options of all methods.")
    methods: dict[str, MethodOptions] = Field(
        min_length=1, description="Ways to adapt, by name; the unadapted instruct model is added."
    )
    evaluations: dict[str, EvaluationOptions] = Field(
        min_length=1, description="Evaluations of every model, by name."
    )
    tuning: TuningOptions | None = Field(
        default=None,
        description="Learning rates to choose from, and held-out questions that decide.",
    )
    reference: str | None = Field(
        default=None,
        description="The method that the others are compared with; default the first.",
    )
    output: Path = Field(description="The study's folder; finished stages are kept.")
    overwrite: bool = Field(
        default=False, description="Repeat stages whose folders were changed or damaged."
    )
    seeds: list[int] = Field(
        default=[0], min_length=1, description="Seeds of training; one run per seed."
    )
    correct_field: str | None = Field(
        default=None,
        description="Key of the training rows that says whether their response is correct, true or "
        "false; the report then has an AUROC of the guide's confidence.",
    )
    workers: int | None = Field(
        default=None,
        ge=1,
        description="Concurrent stages, each in a process with one GPU; default one per GPU, or 1.",
    )
    keep_models: bool = Field(
        default=True, description="Keep merged models after their evaluations."
    )

    @model_validator(mode="before")
    @classmethod
    def _share_settings(cls, values: Any) -> Any:
        """Gives every method the settings, and every evaluation those of the device."""
        settings = values.get("settings") or {}
        if not isinstance(settings, dict):
            return values
        device = {key: settings[key] for key in DeviceOptions.model_fields if key in settings}
        values = dict(values)
        for part, shared in (("methods", settings), ("evaluations", device)):
            if isinstance(values.get(part), dict):
                values[part] = {
                    name: {**shared, **(own or {})} if isinstance(own, dict | None) else own
                    for name, own in values[part].items()
                }
        if isinstance(values.get("tuning"), dict):
            values["tuning"] = {**device, **values["tuning"]}
        return values

    @model_validator(mode="after")
    def _check_names(self) -> "StudyConfig":
        if INSTRUCT in self.methods:
            raise InputError(
                f"methods: {INSTRUCT} is the name of the model as it is; choose another"
            )
        if self.reference not in (None, *self.methods):
            raise InputError(
                f"reference: no method {self.reference!r}; there are {', '.join(self.methods)}"
            )
        wrong = [seed for seed in self.seeds if not 0 <= seed <= LARGEST_SEED]
        if wrong or len(set(self.seeds)) < len(self.seeds):
            raise InputError(
                f"seeds: {self.seeds}: expected different numbers from 0 to {LARGEST_SEED}"
            )
        asked = {**self.evaluations, "tuning": self.tuning}
        for name, one in asked.items():
            if one is not None and "{seed}" in (one.data or ""):
                raise InputError(
                    f"{name}: data: {one.data} has {{seed}}, but all seeds are asked the same "
                    "questions; leave it out"
                )
        for name, method in self.methods.items():
            if "seed" in method.model_fields_set:
                raise InputError(f"methods.{name}: has a seed; name all seeds under `seeds`")
            if self.tuning is not None and "learning_rate" in method.model_fields_set:
                raise InputError(
                    f"methods.{name}: has a learning_rate, which tuning would replace; leave it out"
                )
        return self

    @property
    def compared(self) -> str:
        """The method that the others are compared with."""
        return self.reference or next(iter(self.methods))


class ReportConfig(Options):
    """Options of `gift report`."""

    study: Path = Field(description="The folder that gift study wrote.")
