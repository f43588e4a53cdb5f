"""Flipped bits, full disks, first failures and second runs, in every stage."""

import errno
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from stages import STAGES, an_owner, call, make_inputs
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from gift.errors import InputError
from gift.storage.lock import lock_path
from gift.storage.publish import LIST_FILE, partial_path

# Stage: what to interrupt, at which call, and the kept result that is damaged then.
INTERRUPTED = {
    "annotate": ("gift.annotation.batches.annotate_batch", 5, "work/part-*-000000.*"),
    "train": ("gift.train.accumulate_gradients", 2, "work/checkpoint-*/__0_0.distcp"),
    "merge": ("gift.merge.output.copy_side_files", 1, "gift_residual/model.safetensors.json"),
    "evaluate": ("gift.evaluate._check", 1, "work/000000-0000.*"),
}
WITH_STATISTICS = {
    "method": "regmean",
    "base": "base",
    "statistics": ["statistics", "statistics"],
    "save_residual": False,
}
# A published file, and the stage that reads it next, with its options.
READ_NEXT: list[tuple[str, str, dict[str, Any]]] = [
    ("confidence/confidence.safetensors", "train", {}),
    ("confidence/manifest.json", "train", {}),
    ("confidence/statistics.safetensors", "calibration", {}),
    ("confidence/tokenizer/tokenizer.json", "train", {}),
    ("adapter/adapter_model.safetensors", "merge", {}),
    ("adapter/adapter_config.json", "merge", {}),
    ("statistics/statistics.safetensors", "merge", WITH_STATISTICS),
    ("merged/model.safetensors", "evaluate", {"model": "merged"}),
    ("merged/tokenizer.json", "annotate", {"model": "merged"}),
    ("merged/model.safetensors", "merge-statistics", {"model": "merged"}),
    ("merged/gift_residual/model.safetensors.bin", "unmerge", {}),
    ("merged/gift_residual/model.safetensors.json", "unmerge", {}),
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_inputs(tmp_path_factory.mktemp("damage"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        call("merge-statistics", Path("statistics"))
    return folder


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def weights_and_samples(folder: Path) -> dict[str, bytes]:
    files = (*folder.glob("*.safetensors"), *folder.glob("*/*.bin"), *folder.glob("samples.jsonl"))
    return {path.name: path.read_bytes() for path in files}


@pytest.mark.parametrize("stage", INTERRUPTED)
def test_a_kept_result_with_a_flipped_bit_is_made_anew(
    inputs: Path, tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(inputs)
    call(stage, tmp_path / "whole")
    name, last, pattern = INTERRUPTED[stage]
    module, _, attribute = name.rpartition(".")
    function, calls = getattr(sys.modules[module], attribute), 0

    def interrupted(*values: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == last:
            raise KeyboardInterrupt
        return function(*values, **options)

    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
        patch.setattr(name, interrupted)
        call(stage, tmp_path / "out")
    (kept,) = partial_path(tmp_path / "out").glob(pattern)
    flip_a_bit(kept)
    call(stage, tmp_path / "out")
    expected = weights_and_samples(tmp_path / "whole")
    assert expected and weights_and_samples(tmp_path / "out") == expected


@pytest.mark.parametrize(("file", "stage", "options"), READ_NEXT)
def test_a_published_file_with_a_flipped_bit_is_refused_by_the_next_stage(
    inputs: Path,
    tmp_path: Path,
    file: str,
    stage: str,
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(inputs)
    content = Path(file).read_bytes()
    flip_a_bit(Path(file))
    try:
        with pytest.raises(InputError, match=rf"{file}: is not what was written"):
            call(stage, tmp_path / "out", **options)
    finally:
        Path(file).write_bytes(content)
    assert not list(tmp_path.iterdir())


def test_a_run_does_not_go_on_from_a_damaged_stage(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(inputs)
    call("run", tmp_path / "out", eval_data=None)
    flip_a_bit(tmp_path / "out" / "merged" / "model.safetensors")
    with pytest.raises(InputError, match=r"merged/model.safetensors: is not what was written"):
        call("run", tmp_path / "out")
    assert not (tmp_path / "out" / "evaluation").exists()


@pytest.mark.parametrize("wrong", [{"base": "bse"}, {"data": "row.jsonl"}, {"eval_data": "ask"}])
def test_a_run_that_fails_at_once_leaves_nothing_in_the_way_of_the_right_one(
    inputs: Path, tmp_path: Path, wrong: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(inputs)
    with pytest.raises(InputError, match=next(iter(wrong.values()))):
        call("run", tmp_path / "out", **wrong)
    assert not list(tmp_path.iterdir())
    states = call("run", tmp_path / "out", eval_data=None)
    assert set(states.values()) == {"done"}


def test_a_checkpoint_that_does_not_fit_the_disk_names_itself_and_the_space(
    inputs: Path, tmp_path: Path
) -> None:
    receiving, sending = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.chdir(inputs)
            resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
            call("train", tmp_path / "out")
        except OSError as error:
            told = {"errno": error.errno, "file": str(error.filename), "text": error.strerror}
            os.write(sending, json.dumps(told).encode())
        finally:
            os._exit(0)
    os.close(sending)
    os.waitpid(child, 0)
    with os.fdopen(receiving) as pipe:
        told = json.loads(pipe.read())
    assert told["errno"] == errno.EFBIG
    assert "out.partial/work/" in told["file"] and "checkpoint-00000001" in told["file"]
    assert "limit on a file's size" in told["text"] and "GB are free" in told["text"]
    assert not (tmp_path / "out").exists()


TWICE = """
import sys
from pathlib import Path
from gift.config import TrainConfig
from gift.train import train
train(TrainConfig(model="model", tokenizer="model", data=Path("rows.jsonl"), weighting="uniform",
      lora_dropout=0.0, lora_rank=2, device="cpu", output=Path(sys.argv[1])))
"""


def test_equal_trainings_give_equal_bytes_whatever_the_order_of_sets(tmp_path: Path) -> None:
    config = Qwen3MoeConfig(
        **{**tiny.SHARED, "num_hidden_layers": 1, "vocab_size": len(tiny.make_tokenizer())},
        **{"num_experts_per_tok": 2, "head_dim": 8, "num_key_value_heads": 2},
        **{"intermediate_size": 48, "num_experts": 3, "moe_intermediate_size": 20},
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tiny.make_tokenizer().save_pretrained(tmp_path / "model")
    tiny.write_rows(tmp_path / "rows.jsonl", 4)
    found = []
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", TWICE, seed]
        subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
        names = ("adapter_config.json", "adapter_model.safetensors")
        found.append([(tmp_path / seed / name).read_bytes() for name in names])
    assert found[0] == found[1]
    stored = json.loads(found[0][0])
    assert len(stored["target_modules"]) > 1 and len(stored["target_parameters"]) > 1


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_is_told_who_owns_its_output(
    inputs: Path, tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(inputs)
    output = tmp_path / "out"
    with (
        an_owner(output) as process,
        pytest.raises(InputError, match=rf"process {process} on {socket.gethostname()} since"),
    ):
        call(stage, output)
    lock = lock_path(output)
    lock.write_text(json.dumps({"host": "elsewhere", "process": 1, "since": "noon"}))
    with pytest.raises(InputError, match=rf"on elsewhere since noon.* remove {lock}"):
        call(stage, output)
    assert [path.name for path in tmp_path.iterdir()] == [lock.name]


def test_a_stage_of_a_run_is_owned_like_the_run(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(inputs)
    with (
        an_owner(tmp_path / "out" / "confidence") as process,
        pytest.raises(InputError, match=rf"out/confidence is being written by .* {process} "),
    ):
        call("run", tmp_path / "out")


def test_the_ranks_of_one_training_share_one_lock_and_end_as_one_process_does(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(inputs)
    call("train", tmp_path / "alone", lora_dropout=0.0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    children = []
    for rank in ("0", "1"):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.environ |= {"WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                call("train", tmp_path / "two", lora_dropout=0.0)
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert {path.name for path in tmp_path.iterdir()} == {"alone", "two"}
    alone, two = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("alone", "two"))
    assert alone.keys() == two.keys()
    for name, values in alone.items():
        torch.testing.assert_close(two[name], values, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("file", "key", "stage"),
    [
        ("confidence/manifest.json", "data.context", "train"),
        ("confidence/manifest.json", "template_hash", "train"),
        ("confidence/manifest.json", "settings", "calibration"),
        ("merged/gift_merge.json", "added_head", "unmerge"),
        ("merged/gift_files.json", "files", "unmerge"),
    ],
)
def test_a_record_without_what_is_expected_of_it_is_one_error(
    inputs: Path, tmp_path: Path, file: str, key: str, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(inputs, tmp_path / "inputs")
    monkeypatch.chdir(folder)
    path = Path(file)
    record = json.loads(path.read_text())
    *outer, last = key.split(".")
    del (record[outer[0]] if outer else record)[last]
    path.write_text(json.dumps(record))
    if path.name != LIST_FILE:
        (path.parent / LIST_FILE).unlink()
    with pytest.raises(InputError, match=rf"{file}: lacks {key}; .* make {path.parent} again"):
        call(stage, tmp_path / "out")
