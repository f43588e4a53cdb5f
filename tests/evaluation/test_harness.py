"""Tasks of lm-eval from a local folder, against numbers computed from the model directly."""

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import lm_eval.evaluator
import lm_eval.tasks
import pytest
import tiny
import torch
import transformers
import yaml
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

import gift
from gift.config import EvaluateConfig
from gift.data.encoding import prompt_ids
from gift.errors import InputError
from gift.evaluate import check_evaluation, evaluate

pytestmark = pytest.mark.xdist_group("lm-eval")

ROWS = [{"a": n, "b": n % 3, "sum": str(n + n % 3)} for n in range(4)]
CHOICES = ["0", "1", "2", "3"]
QUESTION = "What is {a} plus {b}?"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tasks: one of replies, one of choices, and both as a group."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "doc_to_text": "What is {{a}} plus {{b}}?",
    }
    replies = {
        "task": "sums",
        "output_type": "generate_until",
        "doc_to_target": "{{sum}}",
        "generation_kwargs": {"until": [], "max_gen_toks": 6, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.5},
    }
    choices = {
        "task": "sums_choice",
        "output_type": "multiple_choice",
        "doc_to_choice": CHOICES,
        "doc_to_target": "{{sum}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 2.0},
    }
    group = {"group": "both", "task": ["sums", "sums_choice"], "metadata": {"version": 3.0}}
    missing = {
        **shared,
        **replies,
        "task": "missing",
        "dataset_kwargs": {"data_files": {"test": str(folder / "nowhere.jsonl")}},
    }
    unsafe = {**shared, **replies, "task": "unsafe", "unsafe_code": True}
    endless = {**shared, **replies, "task": "endless"}
    endless["generation_kwargs"] = {**replies["generation_kwargs"], "max_gen_toks": 512}
    long: dict[str, Any] = {"doc_to_text": "word " * 400 + "What is {{a}}?"}
    others = {
        "missing": missing,
        "unsafe": unsafe,
        "endless": endless,
        "cut": {**shared, **replies, **long, "task": "cut"},
        "cut_choice": {**shared, **choices, **long, "task": "cut_choice"},
    }
    files = {"sums": shared | replies, "sums_choice": shared | choices, "both": group}
    for name, content in {**files, **others}.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return folder


@pytest.fixture(autouse=True)
def quick_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the index of lm-eval's own 15 000 files, and without its list of all packages."""
    manager = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", manager)
    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda results: None)


def configure(model: Path, tasks: Path, folder: Path, /, **options: Any) -> EvaluateConfig:
    settings: dict[str, Any] = {
        "model": str(model),
        "lm_eval": "both",
        "include_path": tasks,
        "output": folder / "out",
        "device": "cpu",
        "batch_size": 3,
    }
    return EvaluateConfig(**settings | options)


def test_tasks_get_the_models_own_numbers(
    model: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configure(model, tasks, tmp_path)
    metrics = evaluate(config)
    assert json.loads((config.output / "metrics.json").read_text()) == metrics
    samples = [json.loads(line) for line in (config.output / "samples.jsonl").open()]
    loaded: Any = AutoModelForCausalLM.from_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    by_task = {
        task: [row for row in samples if row["task"] == task] for task in ("sums", "sums_choice")
    }
    for row, sample, rated in zip(ROWS, by_task["sums"], by_task["sums_choice"], strict=True):
        turns = [{"role": "user", "content": QUESTION.format(**row)}]
        prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        assert sample["arguments"][0][0] == prompt == rated["arguments"][0][0]
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
        reply = loaded.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
        assert sample["resps"] == [[tokenizer.decode(reply, skip_special_tokens=True)]]
        logprobs = loaded(ids).logits[0].detach().log_softmax(-1)
        line_break = logprobs[-2, ids[0, -1]]  # lm-eval counts the prompt's last white space too
        letters = [tokenizer(c)["input_ids"][0] for c in CHOICES]
        expected = [float(line_break + logprobs[-1, letter]) for letter in letters]
        assert [scores[0][0] for scores in rated["resps"]] == pytest.approx(expected, rel=1e-4)
        right = CHOICES[int(torch.tensor(expected).argmax())] == row["sum"]
        assert rated["acc"] == float(right)
    accuracy = sum(row["acc"] for row in by_task["sums_choice"]) / 4
    assert metrics["tasks"]["sums_choice"]["acc,none"] == accuracy
    assert metrics["tasks"]["sums"]["exact_match,none"] == 0.0
    assert metrics["task_versions"] == {"sums": 1.5, "sums_choice": 2.0, "both": "3.0"}
    assert metrics["prompts_cut_by_context"] == 0
    assert metrics["configs"]["sums"]["generation_kwargs"]["max_gen_toks"] == 6
    assert metrics["n_samples"]["sums"] == {"original": 4, "effective": 4}
    assert metrics["versions"]["gift"] == gift.__version__ and "lm_eval" in metrics["versions"]
    assert metrics["settings"]["include_path"] == str(tasks) and metrics["model_hash"]
    assert "sums_choice" in (shown := capsys.readouterr().out) and f"{accuracy:.4g} ±" in shown


def test_what_lm_eval_leaves_open_is_passed_on(
    model: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}
    ask = lm_eval.evaluator.simple_evaluate

    def spy(**arguments: Any) -> Any:
        given.update(arguments)
        return ask(**arguments)

    monkeypatch.setattr(lm_eval.evaluator, "simple_evaluate", spy)
    options: dict[str, Any] = {"lm_eval": "sums", "limit": 2, "system_prompt": "Be brief."}
    config = configure(model, tasks, tmp_path, **options, dtype="bfloat16", seed=5)
    metrics = evaluate(config)
    samples = [json.loads(line) for line in (config.output / "samples.jsonl").open()]
    assert len(samples) == 2 and "<|im_start|>system\nBe brief." in samples[0]["arguments"][0][0]
    assert metrics["dtype"] == "bfloat16" and metrics["settings"]["seed"] == 5
    seeds = ("random_seed", "numpy_random_seed", "torch_random_seed")
    assert [given[name] for name in seeds] == [5, 5, 5]
    assert given["model"].batch_size == 3 and given["limit"] == 2
    with pytest.raises(InputError, match="already exists"):
        evaluate(config)


def test_a_tokenizer_that_adds_a_bos_adds_none_to_the_template(
    model: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ids are those of `gift evaluate`'s own questions."""
    folder = tmp_path / "bos"
    shutil.copytree(model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.bos_token = bos = "<|endoftext|>"
    pair = (bos, tokenizer.convert_tokens_to_ids(bos))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[pair]
    )
    tokenizer.save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder)("a")["input_ids"][0] == pair[1]
    read: list[list[int]] = []
    llama: Any = transformers.LlamaForCausalLM
    generate = llama.generate

    def spy(self: Any, *args: Any, **options: Any) -> Any:
        read.extend(options["input_ids"].tolist())
        return generate(self, *args, **options)

    monkeypatch.setattr(llama, "generate", spy)
    config = configure(folder, tasks, tmp_path, lm_eval="sums", batch_size=1)
    evaluate(config)
    turns = [[{"role": "user", "content": QUESTION.format(**row)}] for row in ROWS]
    assert sorted(read) == sorted(prompt_ids(turn, tokenizer) for turn in turns)


@pytest.mark.parametrize("task", ["cut", "cut_choice"])
def test_prompts_that_are_cut_are_counted(
    model: Path, tasks: Path, tmp_path: Path, task: str, capfd: pytest.CaptureFixture[str]
) -> None:
    metrics = evaluate(configure(model, tasks, tmp_path, lm_eval=task, limit=2))
    cut = metrics["prompts_cut_by_context"]
    assert cut == (2 if task == "cut" else 2 * len(CHOICES))
    assert f"left out the beginning of {cut} prompts" in " ".join(capfd.readouterr().err.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lm_eval": "endless"}, "endless: lm-eval fails .*generate .512. must be less than"),
        ({"lm_eval": "sums,nosuch"}, "--lm-eval: no task, group or tag is named nosuch; "),
        ({"lm_eval": " , "}, "--lm-eval: no task of lm-eval is named"),
        ({"lm_eval": "missing"}, "missing cannot be loaded .*nowhere.jsonl.*connect to the net"),
        ({"lm_eval": "unsafe"}, "unsafe executes code that the model writes"),
        ({"lm_eval": "sums,both"}, "cannot be loaded .*Duplicate task 'sums'"),
        ({"include_path": Path("nowhere")}, "--include-path: nowhere is no folder"),
        ({"lm_eval": None}, "--include-path: no task of lm-eval is named"),
        ({"samples": 2}, "--samples: lm-eval's tasks have questions and settings of their own"),
        ({"data": Path("rows.jsonl")}, "--data: lm-eval's tasks have questions"),
        ({"endpoint": "http://localhost/v1"}, "--endpoint: lm-eval's tasks have questions"),
        ({"benchmark": "ifeval"}, "--benchmark: lm-eval's tasks have questions"),
        ({"model": None}, "--model: is required"),
    ],
)
def test_what_cannot_be_asked_is_one_error(
    model: Path, tasks: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        evaluate(configure(model, tasks, tmp_path, **options))
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("out")]


def test_ifeval_is_a_benchmark_by_name(
    model: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a local task of that name: lm-eval's own needs the network."""
    task = yaml.safe_load((tasks / "sums.yaml").read_text()) | {"task": "ifeval"}
    (tmp_path / "ifeval.yaml").write_text(yaml.safe_dump(task))
    config = configure(model, tmp_path, tmp_path, lm_eval=None, benchmark="ifeval", limit=1)
    assert list(evaluate(config)["tasks"]) == ["ifeval"]
    with pytest.raises(InputError, match="ifeval is asked by lm-eval, in gift evaluate alone"):
        check_evaluation(config)


def test_without_lm_eval_the_extra_is_named(
    model: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"install gift-tuning\[harness\]"):
        evaluate(configure(model, tasks, tmp_path))


def test_several_processes_are_refused(
    model: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="--lm-eval: one process runs the tasks"):
        evaluate(configure(model, tasks, tmp_path))
