"""Every stage refuses a model whose token ids differ from the data's."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny

from gift.annotate import Annotator, annotate
from gift.config import AnnotateConfig, MergeConfig, TrainConfig
from gift.data import token_ids
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
    number = token_ids.own_ids(folder / "base")[0]["1"]
    return f"2 tokens .*have another id in {folder}/other .* as '1': .*{number}"


def rename(folder: Path, source: str, name: str, names: dict[str, str]) -> Path:
    """A copy of a model whose tokens have other names at their ids; "" stands for all others."""
    shutil.copytree(folder / source, folder / name)
    path = folder / name / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    added = {token["content"] for token in tokenizer["added_tokens"]}
    for token in tokenizer["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    tokenizer["model"]["vocab"] = {
        names.get(token, token if token in added else names.get("", "") + token): number
        for token, number in tokenizer["model"]["vocab"].items()
    }
    tokenizer["model"]["merges"] = []
    path.write_text(json.dumps(tokenizer))
    return folder / name


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


def test_a_model_of_another_vocabulary_is_refused(folder: Path) -> None:
    odd = rename(folder, "base", "odd", {"": "_"})
    data, output = folder / "task.jsonl", folder / "new"
    with pytest.raises(InputError, match=r"--model: .* as \d+: '_.*' and "):
        train(TrainConfig(model=str(odd), data=data, confidence=folder / "store", output=output))
    options: dict[str, Any] = {"model": str(odd), "tokenizer": f"{folder}/base"}
    with pytest.raises(InputError, match=r"--tokenizer: .* as \d+: '_.*' and "):
        annotate(AnnotateConfig(**options, data=data, output=output))
    row = json.loads(data.read_text().splitlines()[0])
    with pytest.raises(InputError, match=r"tokenizer: .* as \d+: '_.*' and "):
        Annotator(**options, device="cpu")({key: [value] for key, value in row.items()})
    with pytest.raises(InputError, match=r"--model: .* have only 0 tokens in common"):
        merge(MergeConfig(model=str(odd), adapter=[f"{folder}/adapter"], output=output))
    assert not output.exists()


def test_tokens_that_the_data_does_not_have_are_no_matter(folder: Path) -> None:
    """Nor other names of added tokens, as where a chat model takes a reserved one."""
    names = {"Z": "<other>", "<|im_start|>": "<|reserved|>"}
    near = str(rename(folder, "base", "near", names))
    data, store = folder / "task.jsonl", folder / "store"
    annotate(
        AnnotateConfig(model=near, tokenizer=f"{folder}/base", data=data, output=folder / "near-q")
    )
    train(TrainConfig(model=near, data=data, confidence=store, output=folder / "near-a", epochs=1))
    merge(MergeConfig(model=near, adapter=[f"{folder}/adapter"], output=folder / "near-m"))


def test_a_damaged_tokenizer_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match=f"{tmp_path}/tokenizer.json: not a tokenizer"):
        token_ids.own_ids(tmp_path)
    assert token_ids.own_ids(tmp_path / "absent") == ({}, {})
