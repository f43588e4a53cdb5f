"""A merge killed at random moments leaves nothing that looks finished, and goes on from there."""

import os
import random
import signal
import time
from pathlib import Path

import torch
from merge_models import llama, run_merge, save_adapter, save_model


def files(folder: Path) -> dict[str, bytes]:
    """Contents of all files of a folder, by relative path."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def merge_in_child(folder: Path) -> int:
    """Starts the merge of folder/adapter into folder/model in a process of its own."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            torch.set_num_threads(1)
            run_merge(folder)
            status = 0
        finally:
            os._exit(status)
    return child


def test_killed_at_ten_random_moments_and_run_again_gives_the_same_bytes(tmp_path: Path) -> None:
    config = llama(num_hidden_layers=8, hidden_size=128, intermediate_size=256, vocab_size=512)
    save_model(tmp_path / "model", config, dtype=torch.bfloat16, shard_size="200KB")
    save_adapter(tmp_path / "adapter", tmp_path / "model")
    start = time.monotonic()
    expected = files(run_merge(tmp_path, output=tmp_path / "expected"))
    duration = time.monotonic() - start
    assert len(expected) > 10
    moments = random.Random(0)
    kills = begun = 0
    for _ in range(10):
        child = merge_in_child(tmp_path)
        time.sleep(moments.uniform(0.05, 0.8) * duration)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            kills += 1
            assert not (tmp_path / "merged").exists()
            begun += len(list(tmp_path.iterdir())) > 3
        else:
            assert os.WEXITSTATUS(status) == 0
            break
    if not (tmp_path / "merged").exists():
        run_merge(tmp_path)
    assert kills > 0 and begun > 0, (kills, begun)
    assert files(tmp_path / "merged") == expected
    assert {path.name for path in tmp_path.iterdir()} == {"model", "adapter", "expected", "merged"}
