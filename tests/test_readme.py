"""Every example in README.md, CONTRIBUTING.md and docs/ that can run here does.

Blocks of `sh` and `python` run, those of a file one after another and in one folder; rows in `json`
blocks and recipes in `yaml` blocks are read. What needs more (a GPU, the network, minutes) is a
`console` block, and its first line says why it is not run.
"""

from __future__ import annotations

import functools
import json
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from benchmarks import readme
from benchmarks.__main__ import main as benchmarks_main
from gift import cli
from gift.config import DataOptions
from gift.data.encoding import encode_file
from gift.data.rows import json_lines
from gift.evaluation.questions import read_questions
from gift.study import run as study_run

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
FILES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
WHY = "# not run in a test: "
PROGRAMS = {"gift": cli.main, "python -m benchmarks": benchmarks_main}

every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)


class Block(NamedTuple):
    """A fenced block of a file."""

    language: str
    text: str


def blocks_of(path: Path) -> list[Block]:
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", path.read_text(encoding="utf-8"), re.M | re.S)
    return [Block(match[1], match[2]) for match in found]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the examples take for granted: models, data, results, and torchrun's variables."""
    for seed, name in enumerate(("base", "instruct")):
        tiny.make_model(tmp_path / name, seed=seed, max_position_embeddings=96)
    tiny.write_rows(tmp_path / "task.jsonl")
    tiny.write_chats(tmp_path / "chat.jsonl")
    for number, name in enumerate(("questions", "general", "held-out"), 1):
        questions = [{"question": f"What is {n} plus {number}?", "answer": n} for n in range(2)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, questions)))
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    (tmp_path / "bench-output").symlink_to(readme.newest()[-1])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    # Processes of their own would import PyTorch once more.
    monkeypatch.setattr(study_run, "worker_pool", lambda workers: ThreadPoolExecutor(1))
    torchrun = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in torchrun.items():
        monkeypatch.setenv(name, value)
    # PyTorch's own compiler takes most of a minute; the graph is made and checked all the same.
    compile_quickly = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", compile_quickly)
    return tmp_path


@every_file
def test_every_example_runs_or_says_why_not(
    path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: dict[str, Any] = training_loop(folder) if path == README else {}
    for language, text in blocks_of(path):
        if language == "python" and "TRITON_INTERPRET" in text:
            subprocess.run([sys.executable, "-c", text], check=True)
        elif language == "python":
            exec(compile(text, str(path), "exec"), names)
        elif language == "sh":
            run_commands(text, monkeypatch)
        elif language == "json":
            read_data(text, folder)
        elif language == "yaml":
            name = re.match(r"# (\w+\.yaml)\n", text)
            assert name is not None, text
            (folder / name[1]).write_text(text)
        else:
            assert language == "console", f"{path.name}: a block of {language!r} is not run"
            assert re.match(rf"{WHY}\w+", text), f"{path.name}: no reason not to run\n{text}"


def run_commands(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each line of a block with the program's own entry point, in this process."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        size = next((n for n in (1, 3) if " ".join(words[:n]) in PROGRAMS), None)
        assert size is not None, f"no program to run: {line}"
        monkeypatch.setattr(sys, "argv", words[size - 1 :])
        try:
            PROGRAMS[" ".join(words[:size])]()
        except SystemExit as end:
            assert not end.code, line


def read_data(text: str, folder: Path) -> None:
    """Rows of a block as the stages read them."""
    path = folder / "example.jsonl"
    path.write_text(text, encoding="utf-8")
    if '"answer"' in text:
        assert read_questions(json_lines(path))
    else:
        data = encode_file(path, tiny.make_tokenizer(), DataOptions())
        assert len(data.kept) == len(text.splitlines()) and not data.notes


def training_loop(folder: Path) -> dict[str, Any]:
    """The names that README's examples of a training loop use."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(64, (3, 9), generator=generator)
    labels = input_ids.masked_fill(torch.rand(3, 9, generator=generator) < 0.4, -100)
    return {
        "F": F,
        "model": AutoModelForCausalLM.from_pretrained(folder / "instruct"),
        "input_ids": input_ids,
        "labels": labels,
        "weights": torch.rand(3, 8, generator=generator),
        "num_tokens": int((labels[:, 1:] != -100).sum()),
    }


def test_the_training_loop_before_and_after_gives_the_same(folder: Path) -> None:
    names, found = training_loop(folder), []
    examples = [block.text for block in blocks_of(README) if block.language == "python"]
    assert len(examples) == 2
    for example in examples:
        exec(example, names)
        gradients = torch.autograd.grad(names["loss"], list(names["model"].parameters()))
        found.append((names["loss"], gradients))
    (before, gradients_before), (after, gradients_after) = found
    assert before > 0
    torch.testing.assert_close(after, before, rtol=1e-5, atol=0)
    for one, other in zip(gradients_after, gradients_before, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6 * float(other.abs().max()))


@every_file
def test_paths_links_and_targets_of_make_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    named = re.findall(r"\b(?:gift|gift_kernels|benchmarks|tests|docs)/[\w/-]+(?:\.\w+)?", text)
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing
    for link, _, heading in re.findall(r"\]\(((?!https?:)[^)#]*)(#([^)]*))?\)", text):
        linked = (path.parent / link).resolve() if link else path
        assert linked.exists(), link
        titles = re.findall(r"^#+ (.*)$", linked.read_text(errors="ignore"), re.M)
        anchors = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
        assert not heading or heading in anchors, f"{link}#{heading}"
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    assert {*re.findall(r"(?:^|`)make ([\w-]+)", text, re.M)} <= {*targets}
