"""A model whose tokens have other ids than the data's is refused by every stage."""

import json
import shutil
from pathlib import Path

import pytest
import tiny

from gift import token_ids
from gift.annotate import annotate
from gift.config import AnnotateConfig, MergeConfig, TrainConfig
from gift.errors import InputError
from gift.merge.command import merge
from gift.train import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, a third with the ids of 1 and 2 exchanged, data, a store and an adapter."""
    folder = tmp_path_factory.mktemp("ids")
    for seed, name in enumerate(("base", "instruct")):
        tiny.make_model(folder / name, seed=seed)
    shutil.copytree(folder / "base", folder / "other")
    path = folder / "other" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    ids = tokenizer["model"]["vocab"]
    ids["1"], ids["2"] = ids["2"], ids["1"]
    path.write_text(json.dumps(tokenizer))
    tiny.write_rows(folder / "task.jsonl")
    data = folder / "task.jsonl"
    annotate(AnnotateConfig(model=f"{folder}/instruct", data=data, output=folder / "store"))
    options = {"data": data, "confidence": folder / "store", "epochs": 1, "lora_rank": 2}
    train(TrainConfig(model=f"{folder}/base", output=folder / "adapter", **options))
    return folder


def refused(folder: Path) -> str:
    ids = token_ids.own_ids(folder / "base")
    return f"2 tokens have another id in {folder}/other .* as '.': .*{min(ids['1'], ids['2'])}"


def test_training_refuses_a_base_with_other_ids(folder: Path) -> None:
    config = TrainConfig(
        model=f"{folder}/other",
        data=folder / "task.jsonl",
        confidence=folder / "store",
        output=folder / "new",
    )
    with pytest.raises(InputError, match=rf"--model: {refused(folder)}"):
        train(config)


def test_annotation_refuses_a_guide_with_other_ids(folder: Path) -> None:
    config = AnnotateConfig(
        model=f"{folder}/other",
        tokenizer=f"{folder}/instruct",
        data=folder / "task.jsonl",
        output=folder / "new",
    )
    with pytest.raises(InputError, match=rf"--tokenizer: {refused(folder)}"):
        annotate(config)


def test_a_merge_refuses_an_adapter_of_other_ids(folder: Path) -> None:
    adapter = folder / "adapter"
    config = MergeConfig(model=f"{folder}/other", adapter=[str(adapter)], output=folder / "new")
    with pytest.raises(InputError, match=rf"--model: {refused(folder)}"):
        merge(config)
    assert not (folder / "new").exists()


def test_tokens_that_one_of_them_lacks_are_no_matter(folder: Path) -> None:
    ids = token_ids.own_ids(folder / "base")
    fewer = {token: number for token, number in ids.items() if token != "1"} | {"<new>": 1 << 20}
    token_ids.require_same_ids("--model", folder / "base", fewer, "another")


def test_a_damaged_tokenizer_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match=f"{tmp_path}/tokenizer.json: not a tokenizer"):
        token_ids.own_ids(tmp_path)
    assert token_ids.own_ids(tmp_path / "absent") == {}
