"""No traceback reaches a user: every command with every broken path and every broken model."""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from gift import cli
from gift.config import AnnotateConfig, MergeConfig, TrainConfig
from gift.merge.command import merge
from gift.storage.publish import LIST_FILE

MODELS = {"model", "base", "instruct", "tokenizer", "model_a", "model_b"}
FOLDERS = {*MODELS, "adapter", "confidence", "statistics", "store", "study"}
POSITIONAL = ("model_a", "model_b", "store", "study")
FILES = {"data", "eval_data", "scores", "config"}
NOBODY = 65534


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Whole inputs of every kind, in a folder that every user may read and write."""
    folder = Path(tempfile.mkdtemp(prefix="gift-guard-"))
    folder.chmod(0o777)
    tiny.make_model(folder / "model", "llama")
    tiny.write_rows(folder / "rows.jsonl", 4)
    row = {"instruction": "What is 1 plus 1?", "answer": "2", "response": "2", "scores": [[1, 1]]}
    (folder / "questions.jsonl").write_text(json.dumps(row) + "\n")
    (folder / "recipe.yaml").write_text("seed: 0\n")
    model, rows = str(folder / "model"), folder / "rows.jsonl"
    asked = {"data": str(folder / "questions.jsonl"), "check": "exact"}
    study = {
        "pairs": {"one": {"base": model, "instruct": model}},
        "methods": {"GIFT": {"data": str(rows)}},
        "evaluations": {"task": asked},
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(study))
    from gift.annotate import annotate
    from gift.train import train

    annotate(AnnotateConfig(model=model, data=rows, output=folder / "store"))
    options: dict[str, Any] = {"weighting": "uniform", "lora_rank": 2, "learning_rate": 0.01}
    train(
        TrainConfig(model=model, tokenizer=model, data=rows, output=folder / "adapter", **options)
    )
    merge(MergeConfig(model=model, adapter=[str(folder / "adapter")], output=folder / "merged"))
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    yield folder
    shutil.rmtree(folder)


def arguments(folder: Path, command: str) -> dict[str, str]:
    """A whole command line, by option."""
    model, output = str(folder / "model"), str(folder / "output")
    rows, questions = str(folder / "rows.jsonl"), str(folder / "questions.jsonl")
    data = {"model": model, "tokenizer": model, "data": rows, "output": output}
    adapted = {"model": model, "adapter": str(folder / "adapter"), "output": output}
    return {
        "annotate": data,
        "import-scores": {"scores": questions, "tokenizer": model, "output": output},
        "calibration": {"store": str(folder / "store"), "data": rows, "output": output},
        "train": {**data, "confidence": str(folder / "store"), "lora_rank": "2"},
        "merge": {**adapted, "base": model},
        "merge-statistics": {**data, "kind": "regmean"},
        "diff": {"model_a": model, "model_b": model, "output": output},
        "unmerge": {**adapted, "model": str(folder / "merged")},
        "evaluate": {"model": model, "data": questions, "output": output, "check": "exact"},
        "run": {"base": model, "instruct": model, "data": rows, "eval_data": questions}
        | {"output": output, "eval_check": "exact"},
        "report": {"study": model},
        "study": {"config": str(folder / "study.yaml"), "output": output},
        "demo": {"output": output},
    }[command]


def command_line(command: str, options: dict[str, str]) -> list[str]:
    positional = [options[name] for name in POSITIONAL if name in options]
    named = {name: value for name, value in options.items() if name not in POSITIONAL}
    flags = [
        part for name, value in named.items() for part in (f"--{name.replace('_', '-')}", value)
    ]
    return ["gift", command, *positional, *flags]


def refused(
    folder: Path,
    command: str,
    options: dict[str, str],
    named: str,
    capsys: Any,
    monkeypatch: Any,
    *flags: str,
) -> str:
    """Runs the command in this process; it must end with one error that names the culprit."""
    before = sorted(path.name for path in folder.iterdir())
    monkeypatch.setattr(sys, "argv", [*command_line(command, options), *flags])
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        cli.main()
    message = capsys.readouterr().err
    assert caught.value.code == 2, message
    assert "Traceback" not in message
    assert any(name in message for name in named.split("|")), message
    assert before == sorted(path.name for path in folder.iterdir()), message
    return message


CASES = [
    (command, option)
    for command, config in cli.CONFIGS.items()
    for option in [*config.model_fields, "config"]
    if option in FOLDERS | FILES | {"output"}
]


@pytest.mark.parametrize(("command", "option"), CASES)
def test_a_missing_path_or_one_of_another_kind_is_one_error(
    command: str, option: str, folder: Path, capsys: Any, monkeypatch: Any
) -> None:
    wrong = str(folder / ("store" if option in FILES else "rows.jsonl"))
    # The output need not exist, so only a file in its place is wrong.
    for value in [wrong] if option == "output" else [wrong, str(folder / "not there")]:
        options = {**arguments(folder, command), option: value}
        flag = f"--{option.replace('_', '-')}"
        refused(folder, command, options, f"{value}|{flag}", capsys, monkeypatch)


WRITING = [command for command, config in cli.CONFIGS.items() if "output" in config.model_fields]


@pytest.mark.parametrize("command", WRITING)
def test_an_output_that_would_replace_the_wrong_folder_is_one_error(
    command: str, folder: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.chdir(folder)
    whole = arguments(folder, command)
    inputs = [value for option, value in whole.items() if option in FOLDERS]
    for output in (".", "..", "/", "rows.jsonl/below", *inputs):
        options = {**whole, "output": output}
        refused(folder, command, options, "--output: ", capsys, monkeypatch, "--overwrite")


# The one folder of statistics that a method takes is refused before it is read: it takes several.
@pytest.mark.parametrize(
    ("command", "option"), [case for case in CASES if case != ("merge", "statistics")]
)
def test_a_path_without_permission_is_one_error(command: str, option: str, folder: Path) -> None:
    """Root may read everything, so a child process gives up its rights first."""
    options = {**arguments(folder, command)}
    place = folder / "locked"
    if option == "output":
        place.mkdir()
        options["output"] = str(place / "output")
    elif option in FILES:
        place.write_text("{}\n")
        options[option] = str(place)
    else:
        shutil.copytree(options.get(option, folder / "model"), place)
        options[option] = str(place)
    place.chmod(0)
    try:
        status, message = as_nobody(folder, command_line(command, options))
    finally:
        place.chmod(0o700)
        shutil.rmtree(place) if place.is_dir() else place.unlink()
    assert "Traceback" not in message and status in (1, 2), message
    assert str(place) in message, message
    assert not [*folder.glob("*output*"), *folder.glob(".output*")], message


def as_nobody(folder: Path, line: list[str]) -> tuple[int, str]:
    errors = folder / "errors"
    child = os.fork()
    if child == 0:
        try:
            os.dup2(os.open(errors, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o666), 2)
            sys.stderr = os.fdopen(2, "w", closefd=False)
            sys.stdout = sys.stderr
            if os.getuid() == 0:
                os.setgid(NOBODY)
                os.setuid(NOBODY)
            torch.set_num_threads(1)
            sys.argv = line
            cli.main()
            os._exit(0)
        except SystemExit as ended:
            sys.stderr.flush()
            os._exit(int(ended.code or 0))
        except BaseException:
            import traceback

            traceback.print_exc()
            sys.stderr.flush()
            os._exit(99)
    _, status = os.waitpid(child, 0)
    message = errors.read_text()
    errors.unlink()
    return os.waitstatus_to_exitcode(status), message


def change_weights(folder: Path, edit: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    path = folder / "model.safetensors"
    save_file(edit(load_file(path)), path, {"format": "pt"})


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def split(folder: Path) -> None:
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="50KB")
    (folder / "model.safetensors").unlink(missing_ok=True)


def cut_the_second(folder: Path) -> None:
    split(folder)
    path = next(folder.glob("model-00002-of-*"))
    path.write_bytes(path.read_bytes()[:-100])


def break_index(folder: Path) -> None:
    split(folder)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["lm_head.weight"] = 7
    path.write_text(json.dumps(index))


def pickle_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def shrink_embeddings(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(20)
    model.save_pretrained(folder)


LOADING = ("annotate", "train", "evaluate", "merge-statistics", "run")
WEIGHTS_ONLY = ("merge", "diff", "unmerge")
# What breaks a model, what the message must name, and the commands to which it matters.
BROKEN: dict[str, tuple[Callable[[Path], Any], str, tuple[str, ...]]] = {
    "missing tensor": (
        lambda f: change_weights(f, lambda w: {k: w[k] for k in w if k != "lm_head.weight"}),
        "lacks lm_head.weight|lm_head.weight",
        (*LOADING, *WEIGHTS_ONLY),
    ),
    "renamed keys": (
        lambda f: change_weights(f, lambda w: {k.replace("q_proj", "query"): w[k] for k in w}),
        "q_proj",
        (*LOADING, *WEIGHTS_ONLY),
    ),
    "other shape": (
        lambda f: change_weights(
            f, lambda w: {k: w[k][:8].clone() if "up_proj" in k else w[k] for k in w}
        ),
        "up_proj",
        (*LOADING, *WEIGHTS_ONLY),
    ),
    "cut shard": (cut, "model.safetensors", (*LOADING, *WEIGHTS_ONLY)),
    "cut shard of several": (cut_the_second, "model-00002-of-", (*LOADING, "merge", "diff")),
    "index of no names": (break_index, "weight_map", (*LOADING, "merge", "diff")),
    "pickled only": (pickle_weights, "pickled weights", (*LOADING, *WEIGHTS_ONLY)),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json", (*LOADING, *WEIGHTS_ONLY)),
    "config is no JSON": (
        lambda f: (f / "config.json").write_text("{"),
        "config.json",
        (*LOADING, *WEIGHTS_ONLY),
    ),
    "unknown architecture": (lambda f: change_config(f, model_type="nope"), "nope", LOADING),
    "tokenizer too large": (shrink_embeddings, "20 token embeddings", LOADING),
    "no template": (
        lambda f: (f / "chat_template.jinja").unlink(),
        "no chat template",
        ("annotate", "train", "evaluate", "merge-statistics", "run"),
    ),
    **{
        f"quantised, {method}": (
            lambda f, method=method: change_config(
                f, quantization_config={"quant_method": method, "load_in_4bit": True, "bits": 4}
            ),
            method,
            (*LOADING, *WEIGHTS_ONLY),
        )
        for method in ("bitsandbytes", "gptq", "awq", "compressed-tensors", "nonsense")
    },
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_model_is_one_error_in_every_stage(
    fault: str, folder: Path, capsys: Any, monkeypatch: Any
) -> None:
    spoil, named, commands = BROKEN[fault]
    for command in commands:
        options = arguments(folder, command)
        option = {"run": "instruct", "diff": "model_a"}.get(command, "model")
        broken = folder / "broken"
        shutil.copytree(options[option], broken)
        spoil(broken)
        (broken / LIST_FILE).unlink(missing_ok=True)  # or all are "not what was written"
        options[option] = str(broken)
        if command == "train":
            options["tokenizer"] = str(broken if fault == "no template" else folder / "model")
        elif "tokenizer" in options:
            options["tokenizer"] = str(broken)
        try:
            refused(folder, command, options, named, capsys, monkeypatch)
        finally:
            shutil.rmtree(broken)
