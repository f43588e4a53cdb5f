"""Trained embeddings and output layers, tied or not, merged as PEFT reloads them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from merge_models import (
    LLAMA,
    change_json,
    llama,
    load,
    logits,
    run_merge,
    save_adapter,
    save_model,
    tensors,
)
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
    Qwen2Config,
)

from gift.errors import InputError
from gift.merge.adapter import read_adapter


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]])
def test_a_change_to_tied_embeddings_is_refused_or_unties_them(
    targets: list[str], tmp_path: Path
) -> None:
    save_model(tmp_path / "model", llama(tie_word_embeddings=True))
    assert "lm_head.weight" not in tensors(tmp_path / "model")
    adapted = save_adapter(tmp_path / "adapter", tmp_path / "model", target_modules=targets)
    with pytest.raises(InputError, match=r"tied to model.embed_tokens.*--untie-embeddings"):
        run_merge(tmp_path)
    assert not list(tmp_path.glob("merged*"))
    merged = run_merge(tmp_path, untie_embeddings=True)
    assert json.loads((merged / "config.json").read_text())["tie_word_embeddings"] is False
    torch.testing.assert_close(logits(load(merged)), logits(adapted), rtol=2e-5, atol=2e-5)


def test_an_untied_head_is_entered_in_the_index_of_a_sharded_model(tmp_path: Path) -> None:
    save_model(tmp_path / "model", llama(tie_word_embeddings=True), shard_size="20KB")
    adapted = save_adapter(tmp_path / "adapter", tmp_path / "model", target_modules=["lm_head"])
    merged = run_merge(tmp_path, untie_embeddings=True)
    index = json.loads((merged / "model.safetensors.index.json").read_text())
    stored = tensors(merged)
    assert index["weight_map"].keys() == stored.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in stored.values())
    torch.testing.assert_close(logits(load(merged)), logits(adapted), rtol=2e-5, atol=2e-5)


def test_an_adapter_off_the_head_leaves_tied_embeddings_tied(tmp_path: Path) -> None:
    save_model(tmp_path / "model", llama(tie_word_embeddings=True))
    adapted = save_adapter(tmp_path / "adapter", tmp_path / "model")
    merged = run_merge(tmp_path)
    assert "lm_head.weight" not in tensors(merged)
    torch.testing.assert_close(logits(load(merged)), logits(adapted), rtol=2e-5, atol=2e-5)


def tied(**options: Any) -> PreTrainedConfig:
    return Qwen2Config(**LLAMA, **{"tie_word_embeddings": True, **options})


def peft_logits(folder: Path) -> torch.Tensor:
    return logits(PeftModel.from_pretrained(load(folder / "model"), str(folder / "adapter")).eval())


@pytest.mark.parametrize("saved", [["embed_tokens"], ["lm_head"], ["lm_head", "embed_tokens"]])
def test_a_trained_tie_stays_tied_as_peft_reloads_it(saved: list[str], tmp_path: Path) -> None:
    save_model(tmp_path / "model", tied())
    options: dict[str, Any] = {"target_modules": ["q_proj"], "modules_to_save": saved}
    save_adapter(tmp_path / "adapter", tmp_path / "model", ensure_weight_tying=True, **options)
    merged = run_merge(tmp_path)
    assert "lm_head.weight" not in tensors(merged)
    torch.testing.assert_close(logits(load(merged)), peft_logits(tmp_path), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("saved", [["embed_tokens"], ["lm_head"], ["lm_head", "embed_tokens"]])
def test_one_trained_side_of_a_tie_is_untied_as_peft_reloads_it(
    saved: list[str], tmp_path: Path
) -> None:
    save_model(tmp_path / "model", tied())
    options: dict[str, Any] = {"target_modules": ["q_proj"], "modules_to_save": saved}
    save_adapter(tmp_path / "adapter", tmp_path / "model", **options)
    with pytest.raises(InputError, match="--untie-embeddings"):
        run_merge(tmp_path)
    merged = run_merge(tmp_path, untie_embeddings=True)
    torch.testing.assert_close(logits(load(merged)), peft_logits(tmp_path), rtol=2e-5, atol=2e-5)


def store_shifted_ends(folder: Path) -> None:
    """Embedding and output layer trained in full, but named nowhere in the adapter's config."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            layer.weight += 0.5
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    adapted.save_pretrained(str(folder / "adapter"), save_embedding_layers=True)


def test_stored_tensors_that_differ_from_the_training_model_are_merged(tmp_path: Path) -> None:
    save_model(tmp_path / "model", tied(tie_word_embeddings=False))
    store_shifted_ends(tmp_path)
    assert not read_adapter(tmp_path / "adapter").config["modules_to_save"]
    merged = run_merge(tmp_path)
    torch.testing.assert_close(logits(load(merged)), peft_logits(tmp_path), rtol=2e-5, atol=2e-5)


def test_stored_tensors_of_an_absent_training_model_need_it_as_base(tmp_path: Path) -> None:
    """Whether they were trained shows only beside the model that the adapter was trained on."""
    save_model(tmp_path / "model", tied(tie_word_embeddings=False))
    store_shifted_ends(tmp_path)
    settings = tmp_path / "adapter" / "adapter_config.json"
    change_json(settings, base_model_name_or_path="some/base")
    with pytest.raises(InputError, match=r"embed_tokens.weight: differs .*some/base.*--base"):
        run_merge(tmp_path)
    merged = run_merge(tmp_path, base=str(tmp_path / "model"))
    torch.testing.assert_close(logits(load(merged)), peft_logits(tmp_path), rtol=2e-5, atol=2e-5)
