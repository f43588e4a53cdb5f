"""The command line: help, recipes, one-line errors, full disks."""

import multiprocessing
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny
import torch
from typer.testing import CliRunner

import gift as gift_package
from gift import cli
from gift import evaluate as gift_evaluate
from gift.config import EvaluateConfig, TrainConfig
from gift.config.recipe import build_config
from gift.errors import InputError

COMMANDS = {command.name: command for command in cli.app.registered_commands}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    tiny.make_model(folder / "instruct", "llama")
    tiny.write_rows(folder / "rows.jsonl", 40)
    return folder


class Result(NamedTuple):
    status: int | None
    stdout: str
    stderr: str


def gift(folder: Path, *arguments: str, limit_bytes: int | None = None) -> Result:
    """The command in a process of its own (forked: imports are slow), with a largest file size."""
    torch.set_num_threads(1)
    output, errors = folder / "stdout", folder / "stderr"

    def target() -> None:
        with output.open("w") as sys.stdout, errors.open("w") as sys.stderr:
            sys.argv = ["gift", *arguments]
            if limit_bytes is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
            cli.main()

    child = multiprocessing.get_context("fork").Process(target=target)
    child.start()
    child.join(timeout=120)
    return Result(child.exitcode, output.read_text(), errors.read_text())


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_the_stage_and_every_option(command):
    result = CliRunner().invoke(cli.app, [command, "--help"], terminal_width=200)
    assert result.exit_code == 0
    config = cli.CONFIGS[command]
    for name, field in config.model_fields.items():
        if not cli.has_flag(field):
            continue
        flag = f"--{name.replace('_', '-')}"
        assert flag in result.output or f" {name.upper()} " in result.output, name
        assert field.description, f"{command} --{name} has no description"


def test_help_gives_every_command_one_line():
    result = CliRunner().invoke(cli.app, ["--help"], terminal_width=80)
    lines = result.output.splitlines()
    listed = lines[lines.index("Commands:") + 1 :]
    assert [line.split()[0] for line in listed if line] == list(COMMANDS)
    assert all(len(line) <= 80 and line.endswith(".") for line in listed if line)


def test_the_version_is_the_packages():
    result = CliRunner().invoke(cli.app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"gift {gift_package.__version__}\n")


def test_help_does_not_wait_for_torch():
    code = "import sys, gift.cli; assert 'torch' not in sys.modules, 'torch was imported'"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_recipe_fills_options_and_flags_win(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: base\ndata: rows.jsonl\noutput: out\nlora-rank: 8\nepochs: 3\n")
    config = build_config(TrainConfig, recipe, {"epochs": 5})
    assert (config.model, config.lora_rank, config.epochs) == ("base", 8, 5)
    assert config.learning_rate == 2e-4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lora_rnak: 8\n", "unknown key lora_rnak; the keys are .*lora_rank"),
        ("lora_rank: eight\n", r"recipe.yaml: lora_rank: .* got 'eight'"),
        ("- a\n- b\n", "expected a mapping"),
        ("a: [1\n", "not valid YAML"),
        ("epochs: 0\n", "recipe.yaml: epochs: .*greater than or equal to 1, got 0"),
        ("epochs: 1\nepochs: 2\n", "recipe.yaml: epochs is there twice"),
        ("a:\n  b: {c: 1, d: 2, c: 3}\n", "recipe.yaml: c is there twice, .* from line 2"),
        ("lora-rank: 1\nlora_rank: 2\n", "recipe.yaml: lora_rank is there twice"),
        ("weight_decay: .inf\n", "recipe.yaml: weight_decay: .*finite"),
        (f"seed: {2**63 - 1}\n", "recipe.yaml: seed: .*less than or equal to"),
    ],
    ids=[
        "typo",
        "type",
        "list",
        "syntax",
        "range",
        "twice",
        "nested",
        "two-spellings",
        "infinite",
        "seed",
    ],
)
def test_bad_recipes_are_one_clear_error(tmp_path, text, message):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    flags = {"model": "base", "data": "rows.jsonl", "output": "out"}
    with pytest.raises(InputError, match=message):
        build_config(TrainConfig, recipe, flags)


def test_a_study_without_its_file_names_the_option(tmp_path):
    result = CliRunner().invoke(cli.app, ["study", "--output", str(tmp_path / "out")])
    expected = "--config: is required; its file has the pairs, methods, evaluations"
    assert isinstance(result.exception, InputError) and str(result.exception) == expected


def test_bad_input_is_one_line_without_a_stack_trace(folder, tmp_path):
    result = gift(
        tmp_path,
        *("annotate", "--model", str(folder / "instruct"), "--data", str(tmp_path / "none.jsonl")),
        *("--output", str(tmp_path / "store")),
    )
    assert result.status == 2 and result.stdout == ""
    assert result.stderr == f"gift: --data: {tmp_path / 'none.jsonl'}: no such file\n"


def test_an_interruption_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(config: EvaluateConfig) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(gift_evaluate, "evaluate", interrupt)
    monkeypatch.setattr(sys, "argv", ["gift", "evaluate", "--output", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 130
    assert capsys.readouterr().err == "gift: interrupted; run the same command again to resume\n"


@pytest.mark.parametrize("limit_bytes", [1000, 5000], ids=["first-part", "tokenizer"])
def test_full_disk_is_one_line_and_leaves_no_finished_folder(folder, tmp_path, limit_bytes):
    """A largest file size stands in for a full disk; parts and store are larger."""
    result = gift(
        tmp_path,
        *("annotate", "--model", str(folder / "instruct"), "--data", str(folder / "rows.jsonl")),
        *("--output", str(tmp_path / "store")),
        limit_bytes=limit_bytes,
    )
    assert result.status == 1, result.stderr
    assert "Traceback" not in result.stderr and "nothing was published" in result.stderr
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("inside", [False, True], ids=["the input", "a folder that holds it"])
def test_overwrite_never_removes_an_input(inside: bool, tmp_path: Path) -> None:
    model = tiny.make_model(tmp_path / "models" / "instruct")
    output = model.parent if inside else model
    arguments = ["merge", "--model", str(model), "--adapter", str(model), "--output", str(output)]
    finished = gift(tmp_path, *arguments, "--overwrite")
    assert finished.status == 2
    assert finished.stderr.startswith("gift: --output: ")
    assert "which --overwrite would remove" in finished.stderr
    assert (model / "config.json").exists()


def test_a_file_is_no_output_folder(tmp_path: Path) -> None:
    model = tiny.make_model(tmp_path / "model")
    finished = gift(
        tmp_path,
        *("train", "--model", str(model), "--tokenizer", str(model), "--weighting", "uniform"),
        *("--data", str(tiny.write_rows(tmp_path / "rows.jsonl")), "--overwrite"),
        *("--output", str(model / "config.json")),
    )
    assert finished.status == 2 and "is a file" in finished.stderr
    assert (model / "config.json").is_file()


def test_diff_takes_two_models_by_their_places(tmp_path: Path) -> None:
    one, other = (tiny.make_model(tmp_path / name, seed=seed) for seed, name in enumerate("ab"))
    finished = gift(tmp_path, "diff", str(one), str(other))
    assert finished.status == 0, finished.stderr
    assert "changed tensors" in finished.stdout
    finished = gift(tmp_path, "diff", str(one))
    assert finished.status == 2 and "MODEL_B missing" in finished.stderr


def test_an_interrupted_command_says_how_to_resume(folder, tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("gift.annotate.encode_file", interrupted)
    options = ["--model", str(folder / "instruct"), "--data", str(folder / "rows.jsonl")]
    monkeypatch.setattr(
        sys, "argv", ["gift", "annotate", *options, "--output", str(tmp_path / "s")]
    )
    with pytest.raises(SystemExit, match="130"):
        cli.main()
    assert capsys.readouterr().err == "gift: interrupted; run the same command again to resume\n"


@pytest.mark.parametrize(
    ("command", "advice"),
    [
        ("annotate", "lower --batch-tokens, or"),
        ("evaluate", "lower --batch-size, or"),
        ("train", "lower --micro-batch-tokens, or"),
        ("run", "lower --batch-tokens or --micro-batch-tokens or --eval-batch-size, or"),
        ("diff", "compute less at once, or"),
    ],
)
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA: no more\nhints"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
    ],
    ids=["PyTorch", "Triton"],
)
def test_a_lack_of_memory_is_one_line_that_names_the_options(
    folder: Path, monkeypatch: pytest.MonkeyPatch, command: str, advice: str, error: RuntimeError
) -> None:
    def full(*_: Any) -> None:
        raise error

    monkeypatch.setattr(cli, "build_config", lambda *_: None)
    module = {"run": "gift.run", "diff": "gift.merge.diff"}.get(command, f"gift.{command}")
    monkeypatch.setattr(f"{module}.{command}", full)
    result = gift(folder, command, *(("a", "b") if command == "diff" else ()))
    first_line = str(error).splitlines()[0]
    assert (result.status, result.stdout) == (1, "")
    assert result.stderr == (f"gift: out of memory ({first_line}); {advice} use a larger device\n")


def test_other_errors_of_a_device_keep_their_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(cli, "build_config", lambda *_: None)
    monkeypatch.setattr("gift.annotate.annotate", fail)
    monkeypatch.setattr(sys, "argv", ["gift", "annotate"])
    with pytest.raises(RuntimeError, match="a defect"):
        cli.main()
