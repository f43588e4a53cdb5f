"""Safetensors files: read by rows, written as a stream, kept as they were where nothing changes."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from merge_models import run_merge, save_pair, tensors
from safetensors.torch import load_file, save_file

from gift.storage.shards import ShardWriter, TensorSpec, open_shard, read_span, spans


def test_shards_keep_their_index_names_order_metadata_and_untouched_files(tmp_path: Path) -> None:
    save_pair(tmp_path, dtype=torch.bfloat16, shard_size="10KB")
    model, merged = tmp_path / "model", run_merge(tmp_path)
    index = "model.safetensors.index.json"
    assert (merged / index).read_bytes() == (model / index).read_bytes()
    names = sorted(path.name for path in model.glob("*.safetensors"))
    assert names == sorted(path.name for path in merged.glob("*.safetensors"))
    linked = 0
    for name in names:
        before, after = open_shard(model / name), open_shard(merged / name)
        assert [e.name for e in before.entries] == [e.name for e in after.entries]
        assert [e.name for e in before.data_order] == [e.name for e in after.data_order]
        assert before.metadata == after.metadata
        adapted = any("proj" in entry.name for entry in before.entries)
        assert os.path.samefile(model / name, merged / name) is not adapted
        linked += not adapted
    assert linked >= 1


def test_untouched_shards_are_copied_and_compared_where_links_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_pair(tmp_path, shard_size="10KB")

    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    merged = run_merge(tmp_path)
    made = json.loads((merged / "gift_merge.json").read_text())["shards"].values()
    assert sorted({shard["made"] for shard in made}) == ["copied", "written"]
    assert tensors(merged).keys() == tensors(tmp_path / "model").keys()


def test_the_written_format_is_read_by_the_safetensors_library(tmp_path: Path) -> None:
    """All dtypes, scalars, empty tensors, names beyond ASCII; metadata kept."""
    generator = torch.Generator().manual_seed(0)
    stored = {
        "a": torch.randn(3, 5, generator=generator).bfloat16(),
        "βeta": torch.randn(2, 3, 4, generator=generator, dtype=torch.float64),
        "count": torch.tensor(7),
        "empty": torch.zeros(0, 4),
        "flags": torch.tensor([True, False, True]),
        "eight": torch.randn(9, generator=generator).to(torch.float8_e4m3fn),
    }
    save_file(stored, tmp_path / "in.safetensors", {"format": "pt", "note": "ü"})
    shard = open_shard(tmp_path / "in.safetensors")
    specs = [TensorSpec(e.name, e.dtype, e.shape, e.size) for e in shard.data_order]
    order = [entry.name for entry in shard.entries]
    writer = ShardWriter(tmp_path / "out.safetensors", specs, order, shard.metadata)
    for spec in specs:
        writer.begin(spec.name)
        writer.write(stored[spec.name])
    writer.finish()
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "in.safetensors").read_bytes()
    for name, tensor in load_file(tmp_path / "out.safetensors").items():
        assert tensor.dtype == stored[name].dtype
        assert torch.equal(
            tensor.view(-1).view(torch.uint8), stored[name].view(-1).view(torch.uint8)
        )


def test_blocks_cover_every_row_once(tmp_path: Path) -> None:
    stored = torch.arange(3 * 7 * 5, dtype=torch.float32).view(3, 7, 5)
    save_file({"x": stored}, tmp_path / "x.safetensors")
    entry = open_shard(tmp_path / "x.safetensors").entries[0]
    blocks = [read_span(entry, span) for span in spans(entry, 45)]
    assert max(len(block) for block in blocks) == 2
    assert torch.equal(torch.cat(blocks).view(3, 7, 5), stored)
