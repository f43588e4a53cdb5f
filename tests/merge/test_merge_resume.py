"""A merge killed within a shard leaves nothing that looks finished, and resumes.

`tests/storage/test_kills.py` kills between the operations on files; here the kill comes between two
blocks of one file, with shards finished before it.
"""

import os
import signal
from pathlib import Path
from typing import Any

import torch
from merge_models import llama, run_merge, save_adapter, save_model

from gift.storage.shards import ShardWriter


def files(folder: Path) -> dict[str, bytes]:
    """Contents of all files of a folder, by relative path."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def merge_in_child(folder: Path, blocks: int) -> int:
    """Merges in a process that kills itself before its block number `blocks`; its exit status."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            torch.set_num_threads(1)
            write, written = ShardWriter.write, 0

            def counting(writer: ShardWriter, block: Any) -> None:
                nonlocal written
                written += 1
                if written == blocks:
                    os.kill(os.getpid(), signal.SIGKILL)
                write(writer, block)

            ShardWriter.write = counting
            run_merge(folder)
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_killed_every_sixteen_blocks_and_run_again_gives_the_same_bytes(tmp_path: Path) -> None:
    config = llama(num_hidden_layers=8, hidden_size=128, intermediate_size=256, vocab_size=512)
    save_model(tmp_path / "model", config, dtype=torch.bfloat16, shard_size="200KB")
    save_adapter(tmp_path / "adapter", tmp_path / "model")
    expected = files(run_merge(tmp_path, output=tmp_path / "expected"))
    shards = sum(name.endswith(".safetensors") for name in expected)
    kept = []
    while (status := merge_in_child(tmp_path, blocks=16)) != 0:
        assert status == -signal.SIGKILL and len(kept) < shards
        assert not (tmp_path / "merged").exists()
        kept.append(len(list((tmp_path / "merged.partial" / "work").glob("model-*.json"))))
    assert kept == sorted(set(kept)) and len(kept) > 3, f"no progress from kill to kill: {kept}"
    assert files(tmp_path / "merged") == expected
    assert {path.name for path in tmp_path.iterdir()} == {"model", "adapter", "expected", "merged"}
