"""The `gift` command: one subcommand per stage, its flags made from the stage's options.

Errors the user can fix are printed as one line; exit status 2 is bad input, 1 a failing disk or
device, 130 an interruption.
"""

import importlib
import inspect
import signal
import sys
import types
import typing
from pathlib import Path
from typing import Any

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from safetensors import SafetensorError

import gift
from gift.config import (
    AnnotateConfig,
    CalibrationConfig,
    DemoConfig,
    DiffConfig,
    EvaluateConfig,
    ImportScoresConfig,
    MergeConfig,
    Options,
    ReportConfig,
    RunConfig,
    StatisticsConfig,
    StudyConfig,
    TrainConfig,
    UnmergeConfig,
)
from gift.config.recipe import build_config
from gift.distributed.environment import processes
from gift.errors import InputError, is_out_of_memory

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    invoke_without_command=True,
    help="Guided fine-tuning: annotate data with an instruct model, train an adapter on its base "
    "model, merge it into the instruct model, evaluate. Every option can also come from --config "
    "recipe.yaml; flags win.",
)


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", help="Show the version and exit."),
) -> None:
    if version:
        print(f"gift {gift.__version__}")
        raise typer.Exit


CONFIGS: dict[str, type[Options]] = {}
# Commands that share their work among processes.
SHARED = ("annotate", "train", "merge", "evaluate", "run")
# Options that determine the memory of a forward pass.
SIZES = ("batch_tokens", "batch_size", "micro_batch_tokens", "eval_batch_size")


def _add_command(
    name: str,
    config: type[Options],
    function: str,
    help_text: str,
    positional: tuple[str, ...] = (),
) -> None:
    """Registers a subcommand that builds `config` and calls `module:function` with it."""

    fields = config.model_fields.items()
    in_file = [key for key, field in fields if field.is_required() and not has_flag(field)]

    def command(**values: Any) -> None:
        recipe = values.pop("config")
        flags = {key: value for key, value in values.items() if value not in (None, [])}
        if recipe is None and (missing := [key.upper() for key in positional if key not in flags]):
            raise InputError(
                f"gift {name}: {' and '.join(missing)} missing; see gift {name} --help"
            )
        if recipe is None and in_file:
            raise InputError(f"--config: is required; its file has the {', '.join(in_file)}")
        if processes() > 1 and name not in SHARED:
            raise InputError(
                f"gift {name}: runs in one process, {processes()} were started; start it without "
                f"torchrun (several processes share {', '.join(SHARED)})"
            )
        module, attribute = function.split(":")
        options = build_config(config, recipe, flags)
        try:
            getattr(importlib.import_module(module), attribute)(options)
        except KeyboardInterrupt as error:  # Typer would end without a message
            _fail(f"{str(error) or 'interrupted'}; run the same command again to resume", 130)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            sizes = [f"--{key.replace('_', '-')}" for key in SIZES if key in config.model_fields]
            advice = f"lower {' or '.join(sizes)}" if sizes else "compute less at once"
            first_line = (str(error).splitlines() or [repr(error)])[0]
            _fail(f"out of memory ({first_line}); {advice}, or use a larger device", 1)

    recipe_option = typer.Option(
        None, "--config", metavar="FILE", help="YAML recipe with any of the options below."
    )
    parameters = [
        inspect.Parameter(
            "config",
            inspect.Parameter.KEYWORD_ONLY,
            default=recipe_option,
            annotation=Path | None,
        )
    ]
    for key, field in fields:
        if not has_flag(field):
            continue
        kind, option = _flag(key, field)
        if key in positional:
            option = typer.Argument(
                None, metavar=key.upper(), help=field.description, show_default=False
            )
        parameters.append(
            inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=kind)
        )
    CONFIGS[name] = config
    command.__signature__ = inspect.Signature(parameters)  # pyright: ignore
    summary = help_text[: help_text.index(".") + 1]
    app.command(name, help=help_text, short_help=summary)(command)


def _flag(key: str, field: FieldInfo) -> tuple[Any, Any]:
    """Type and typer option of one field; the help shows the default, the config applies it."""
    flag = f"--{key.replace('_', '-')}"
    help_text = field.description or ""
    if field.default is PydanticUndefined:
        help_text += " [required]"
    elif field.default is not None and field.default != []:
        help_text += f" [default: {field.default}]"
    options: dict[str, Any] = {"help": help_text, "show_default": False}
    kinds = [kind for kind in _union(field.annotation) if kind is not type(None)]
    kind = kinds[0]
    if bool in kinds:
        return bool | None, typer.Option(None, f"{flag}/--no-{flag[2:]}", **options)
    return kind | None, typer.Option(None, flag, **options)


def has_flag(field: FieldInfo) -> bool:
    """Whether a flag can give the option; mappings are in the recipe only."""
    return all(
        typing.get_origin(kind) is not dict
        and not (isinstance(kind, type) and issubclass(kind, BaseModel))
        for kind in _union(field.annotation)
    )


def _union(annotation: Any) -> tuple[Any, ...]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


_add_command(
    "annotate",
    AnnotateConfig,
    "gift.annotate:annotate",
    "Stage 1: find the instruct model's confidence in the data. Writes it for every target "
    "token. Costs one forward pass of the model over the data and stores no logits; a killed run "
    "resumes where it stopped. Under torchrun each process takes a share of the batches.",
)
_add_command(
    "import-scores",
    ImportScoresConfig,
    "gift.scores:import_scores",
    "Turn the authors' scores file into a confidence store. Loads no model.",
)
_add_command(
    "calibration",
    CalibrationConfig,
    "gift.calibration.command:calibration",
    "Show how far the guide's confidence can be trusted. Reliability, confidence by kind of "
    "token, examples and, if rows say whether they are correct, the AUROC of confidence. Reads a "
    "store and its data; loads no model.",
    positional=("store",),
)
_add_command(
    "train",
    TrainConfig,
    "gift.train:train",
    "Stage 2: train a LoRA adapter on the base model. Confidence weights the loss. Costs about "
    "three forward passes per epoch and memory for the frozen model, the adapter and one "
    "micro-batch. Under torchrun each process takes a share of every batch, and with --shard of "
    "the model.",
)


_add_command(
    "merge",
    MergeConfig,
    "gift.merge.command:merge",
    "Stage 3: merge adapters into the instruct model. Reads and writes the weights once, with a "
    "few tensors in memory; a killed merge resumes where it stopped. Under torchrun each process "
    "takes a share of the files.",
)
_add_command(
    "merge-statistics",
    StatisticsConfig,
    "gift.merge.statistics:merge_statistics",
    "Collect the statistics that some merge methods need. Costs a pass over the data (with "
    "gradients for the Fisher diagonal), and memory for a float32 copy of the parameters or one "
    "Gram matrix per layer.",
)
_add_command(
    "diff",
    DiffConfig,
    "gift.merge.diff:diff",
    "Show what changed between two models, layer by layer. Size and rank of the change, and how "
    "much of it bf16 cannot represent. Reads both models once.",
    positional=("model_a", "model_b"),
)
_add_command(
    "unmerge",
    UnmergeConfig,
    "gift.merge.unmerge:unmerge",
    "Undo a merge. Bitwise exact if it was made with --save-residual, else to within one "
    "rounding error. Costs as much as the merge.",
)
_add_command(
    "evaluate",
    EvaluateConfig,
    "gift.evaluate:evaluate",
    "Stage 4: sample replies to questions and check them. Reports avg@k and pass@k. Costs the "
    "generation of samples x questions replies; finished batches are kept. Under torchrun each "
    "process takes a share of the batches.",
)
_add_command(
    "run",
    RunConfig,
    "gift.run:run",
    "Run all stages in one folder. Finished stages are skipped while their settings and inputs "
    "stay the same; a killed run resumes where it stopped. Options of the evaluation begin with "
    "eval-.",
)
_add_command(
    "study",
    StudyConfig,
    "gift.study.run:study",
    "Compare methods over seeds, pairs and evaluations. The file names pairs, settings, methods, "
    "evaluations and tuning (docs/study.md); every run is annotate, train, merge, evaluate; runs "
    "share equal stages. Finished stages are kept; a killed study resumes where it stopped.",
)
_add_command(
    "report",
    ReportConfig,
    "gift.study.report:report",
    "Write a study's report, one HTML file. It needs no network to view.",
    positional=("study",),
)
_add_command(
    "demo",
    DemoConfig,
    "gift.demo.main:demo",
    "Make tiny models, adapt them in four ways and compare. Pairs of base and instruct models "
    "are trained from scratch and adapted by the real stages. Takes a few minutes on two CPU "
    "cores; needs no network.",
)


def main() -> None:
    """Entry point of the console script."""
    try:
        if processes() > 1:
            signal.signal(signal.SIGTERM, _stop)
        app()
    except InputError as error:
        _fail(str(error), 2)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"{where}{error.strerror or error}; nothing was published", 1)
    except SafetensorError as error:
        _fail(f"{error}; nothing was published", 1)


def _stop(*_: Any) -> None:
    """torchrun's signal to the processes that are left, as an error that says so."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough
    raise KeyboardInterrupt(
        "ended by a signal, as torchrun does where another process failed or was killed; its last "
        "message names that one"
    )


def _fail(message: str, status: int) -> None:
    print(f"gift: {message}", file=sys.stderr)
    raise SystemExit(status)


if __name__ == "__main__":
    main()
