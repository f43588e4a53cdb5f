"""The runs of a study: for every pair, method and seed a chain of stages; equal stages run once.

A stage's folder in `stages/` is named by its key, a hash of its settings and of its inputs (the
content of models and files, the keys of the stages before it). So runs share equal stages: a guide
annotates a data set once, the instruct model is evaluated once, methods that differ only in the
merge share one adapter. Only models' shapes are loaded here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gift.calibration.command import read_correct
from gift.config import (
    AnnotateConfig,
    CalibrationConfig,
    DiffConfig,
    EvaluateConfig,
    MergeConfig,
    MergeOptions,
    StatisticsConfig,
    TrainConfig,
)
from gift.config.run import RunOptions
from gift.config.study import (
    INSTRUCT,
    EvaluationOptions,
    MethodOptions,
    PairOptions,
    StudyConfig,
    TuningOptions,
)
from gift.data.encoding import read_rows
from gift.errors import InputError
from gift.evaluate import asked_questions
from gift.merge.methods import METHODS
from gift.models.loading import model_hash, resolve_model
from gift.run import PATH_FIELDS, TOKENIZER_FILES, check_pair, pick
from gift.storage.files import hash_file, hash_folder, hash_json

STAGES_FOLDER = "stages"
TUNING = "tuning"
INPUTS = PATH_FIELDS | {"model_a", "model_b", "store", "statistics"}
Rates = Mapping[tuple[str, str], float]


@dataclass(frozen=True)
class Stage:
    """A stage to run: `needs` are the stages that it depends on, `config` has its output folder."""

    kind: str
    key: str
    config: Any
    label: str
    needs: tuple["Stage", ...] = ()

    @property
    def folder(self) -> Path:
        """Where it writes."""
        return self.config.output


@dataclass(frozen=True)
class Run:
    """One line of the table of runs; the instruct model's line has no seed and no learning rate.

    `stages` are those that the run has of annotate, train, merge statistics, merge, calibrate and
    diff.
    """

    pair: str
    method: str
    seed: int | None = None
    learning_rate: float | None = None
    stages: dict[str, Stage] = field(default_factory=dict)
    evaluations: dict[str, Stage] = field(default_factory=dict)


def plan(config: StudyConfig, rates: Rates) -> list[Run]:
    """The table of runs; `rates` are the tuned learning rates by pair and method.

    InputError: models, data or options that do not fit each other.
    """
    runs = []
    for name, pair in config.pairs.items():
        planner = _Planner(config, name, pair)
        for evaluation, options in config.evaluations.items():
            _check_questions(f"evaluations.{evaluation}", options, name)
        evaluations = {
            evaluation: planner.evaluate(evaluation, options, None)
            for evaluation, options in config.evaluations.items()
        }
        runs.append(Run(name, INSTRUCT, evaluations=evaluations))
        for method in config.methods:
            for seed in config.seeds:
                rate = rates.get((name, method))
                run = planner.chain(method, seed, rate, examine=seed == config.seeds[0])
                for evaluation, options in config.evaluations.items():
                    stage = planner.evaluate(evaluation, options, run.stages["merge"])
                    run.evaluations[evaluation] = stage
                runs.append(run)
    return runs


def plan_tuning(config: StudyConfig) -> list[Run]:
    """A run for every pair, method and learning rate of the grid, with the first seed.

    InputError: an evaluation has a tuning question; or as `plan`.
    """
    if config.tuning is None:
        return []
    for name in config.pairs:
        _check_questions("tuning", config.tuning, name)
    _refuse_shared_questions(config, config.tuning)
    runs = []
    for name, pair in config.pairs.items():
        planner = _Planner(config, name, pair)
        for method in config.methods:
            for rate in config.tuning.learning_rates:
                run = planner.chain(method, config.seeds[0], rate, examine=False)
                stage = planner.evaluate(TUNING, config.tuning, run.stages["merge"])
                run.evaluations[TUNING] = stage
                runs.append(run)
    return runs


def _check_questions(part: str, options: TuningOptions | EvaluationOptions, pair: str) -> None:
    """InputError where a part's options or questions cannot be used."""
    try:
        asked = _asked(options, pair, "")
        asked_questions(asked, asked.check_by())
    except InputError as error:
        raise InputError(f"{part}: {error}") from None


def _refuse_shared_questions(config: StudyConfig, tuning: TuningOptions) -> None:
    for pair in config.pairs:
        held_out = _prompts(tuning, pair)
        for name, evaluation in config.evaluations.items():
            if shared := held_out & _prompts(evaluation, pair):
                raise InputError(
                    f"tuning: {len(shared)} questions of {tuning.data} are asked by the evaluation "
                    f"{name} too; tune on others"
                )


def _prompts(options: TuningOptions | EvaluationOptions, pair: str) -> set[str]:
    """The questions in the data, without options and suffixes."""
    config = _asked(options, pair, "").model_copy(update={"prompt_suffix": ""})
    questions, _ = asked_questions(config, "exact")
    return {question.turns[-1]["content"].strip() for question in questions}


def _asked(options: TuningOptions | EvaluationOptions, pair: str, model: str) -> EvaluateConfig:
    data = None if options.data is None else _path(options.data, pair)
    return pick(EvaluateConfig, options, model=model, data=data, output=Path("evaluate"))


def _path(text: str, pair: str, seed: int | None = None) -> Path:
    """A path of the study's file for one pair and seed."""
    path = Path(text.replace("{pair}", pair).replace("{seed}", str(seed)))
    if not path.is_file():
        raise InputError(f"data: {path}: no such file")
    return path


class _Planner:
    """Makes the stages of one pair."""

    def __init__(self, config: StudyConfig, name: str, pair: PairOptions) -> None:
        self._config = config
        self._name = name
        self._pair = pair
        self._models = {"base": resolve_model(pair.base), "instruct": resolve_model(pair.instruct)}
        self._tokenizer = hash_folder(self._models["instruct"], TOKENIZER_FILES)
        self._checked: set[str] = set()
        self._read: set[Path] = set()

    def chain(self, method: str, seed: int, rate: float | None, *, examine: bool) -> Run:
        """A method's stages up to the merge; with `examine` also calibration and diff."""
        options = self._config.methods[method]
        rate = options.learning_rate if rate is None else rate
        data = _path(options.data, self._name, seed)
        self._check(method, options, data)
        if self._config.correct_field is not None and data not in self._read:
            read_correct(data, self._config.correct_field)
            self._read.add(data)
        label = f"{method}, {self._name}"
        instruct, trained = self._models["instruct"], self._models[options.trained]
        rows = hash_json(read_rows(data, options))
        annotated = self._annotate(options, data, rows)
        train = self._stage(
            "train",
            pick(
                TrainConfig,
                options,
                model=str(trained),
                confidence=annotated.folder,
                tokenizer=str(instruct),
                data=data,
                seed=seed,
                learning_rate=rate,
                output=Path("train"),
            ),
            [model_hash(trained), self._tokenizer, rows, annotated.key],
            f"{label}, seed {seed}",
            annotated,
        )
        statistics = self._statistics(options, data, rows, train, f"{label}, seed {seed}")
        collected = [stage for stage in statistics.values() if stage.kind == "statistics"]
        merge = self._merge(
            options, train, f"{label}, seed {seed}", self._models["instruct"], collected
        )
        stages = {"annotate": annotated, "train": train, **statistics, "merge": merge}
        if examine:
            guide = CalibrationConfig(
                store=annotated.folder,
                data=data,
                correct_field=self._config.correct_field,
                output=Path("calibrate"),
            )
            inputs = [rows, hash_file(data), annotated.key]
            stages["calibrate"] = self._stage("calibrate", guide, inputs, label, annotated)
            changed = DiffConfig(
                model_a=str(instruct),
                model_b=str(merge.folder),
                device=options.device,
                output=Path("diff"),
            )
            stages["diff"] = self._stage("diff", changed, [merge.key], label, merge)
        return Run(self._name, method, seed, rate, stages)

    def evaluate(
        self, name: str, options: EvaluationOptions | TuningOptions, merged: Stage | None
    ) -> Stage:
        """The evaluation of a merged model, or of the unadapted instruct model."""
        model = merged.folder if merged else self._models["instruct"]
        asked = _asked(options, self._name, str(model))
        inputs = [merged.key] if merged else [model_hash(model), self._tokenizer]
        label = f"{name}, {merged.label if merged else f'{INSTRUCT}, {self._name}'}"
        needs = (merged,) if merged else ()
        questions = hash_file(asked.data) if asked.data else ""
        return self._stage("evaluate", asked, [questions, *inputs], label, *needs)

    def _annotate(self, options: MethodOptions, data: Path, rows: str) -> Stage:
        guide = self._models.get(options.guide) or resolve_model(
            options.guide.replace("{pair}", self._name)
        )
        annotation = pick(
            AnnotateConfig,
            options,
            model=str(guide),
            tokenizer=str(self._models["instruct"]),
            data=data,
            output=Path("annotate"),
        )
        inputs = [model_hash(guide), self._tokenizer, rows]
        return self._stage("annotate", annotation, inputs, f"{data.name} by {guide}")

    def _merge(
        self,
        options: MethodOptions,
        train: Stage,
        label: str,
        model: Path,
        statistics: Sequence[Stage] = (),
    ) -> Stage:
        """The adapter merged into a model."""
        # Statistics are of the trained model with its adapter, so the merge must use that model
        # too.
        of_base = bool(statistics) and options.trained == "base"
        with_base = METHODS[options.method].needs_base or of_base
        config = pick(
            MergeConfig,
            options,
            model=str(model),
            base=str(self._models["base"]) if with_base else None,
            adapter=[str(train.folder)],
            statistics=[str(stage.folder) for stage in statistics],
            dtype="keep",
            output=Path("merge"),
        )
        needs = (train, *statistics)
        read = [model_hash(one) for one in (model, self._models["base"])]
        inputs = [*read, self._tokenizer, *(stage.key for stage in needs)]
        return self._stage("merge", config, inputs, label, *needs)

    def _statistics(
        self, options: MethodOptions, data: Path, rows: str, train: Stage, label: str
    ) -> dict[str, Stage]:
        """The merge method's statistics of the instruct model and of the task model, by name.

        The task model is the trained one with its adapter. Both are computed on the training rows.
        """
        if METHODS[options.method].statistics is None:
            return {}
        plain = options.model_copy(
            update={**MergeOptions().model_dump(), "untie_embeddings": options.untie_embeddings}
        )
        trained, instruct = self._models[options.trained], self._models["instruct"]
        task = self._merge(plain, train, f"{label}, task model", trained)

        def collect(model: Path, name: str, source: str, *needs: Stage) -> Stage:
            config = pick(
                StatisticsConfig,
                options,
                model=str(model),
                tokenizer=str(instruct),
                data=data,
                kind=options.method,
                output=Path("statistics"),
            )
            inputs = [source, self._tokenizer, rows]
            return self._stage("statistics", config, inputs, name, *needs)

        return {
            "statistics of instruct": collect(
                instruct, f"{options.method}, {self._name}", model_hash(instruct)
            ),
            "task model": task,
            "statistics of task": collect(task.folder, label, task.key, task),
        }

    def _stage(
        self, kind: str, options: Any, inputs: Sequence[str], label: str, *needs: Stage
    ) -> Stage:
        settings = options.model_dump(mode="json", exclude=INPUTS)
        key = hash_json([kind, settings, inputs])
        output = self._config.output / STAGES_FOLDER / f"{kind}-{key[:16]}"
        options = options.model_copy(update={"output": output})
        return Stage(kind, key, options, f"{kind} {label}", needs)

    def _check(self, method: str, options: MethodOptions, data: Path) -> None:
        """InputError where a method's options do not fit the pair."""
        if method in self._checked:
            return
        run = pick(RunOptions, options, **dict(self._pair), data=data, output=Path("run"))
        try:
            check_pair(run)
        except InputError as error:
            raise InputError(f"methods.{method}: {error}") from None
        self._checked.add(method)
