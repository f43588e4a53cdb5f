"""--lora-targets: which weights get a LoRA pair, and what is refused before loading."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig

from gift.config import RunConfig, TrainConfig, TrainOptions
from gift.errors import InputError
from gift.models.loading import model_structure
from gift.run import run
from gift.train import train
from gift.training.lora_targets import find_targets, lora_config

EXPERTS = {
    "num_experts_per_tok": 2,
    "head_dim": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 96,
    **tiny.SHARED,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("targets")
    tiny.make_model(folder / "untied", "llama")
    tiny.make_model(folder / "tied", "llama", tie_word_embeddings=True)
    tiny.write_rows(folder / "rows.jsonl", 4)
    return folder


def structure(config) -> torch.nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("pair", ["untied", "tied"])
@pytest.mark.parametrize(
    ("targets", "kind"),
    [
        ("q_proj,lm_head", "output layer"),
        ("q_proj, embed_tokens", "embedding"),
        ("model.embed_tokens", "embedding"),
    ],
)
def test_the_output_layer_and_the_embedding_are_refused_by_name(
    folder, tmp_path, pair, targets, kind
):
    model = str(folder / pair)
    with pytest.raises(InputError, match=f"--lora-targets: .* is the model's {kind}"):
        train(
            TrainConfig(
                model=model,
                tokenizer=model,
                data=folder / "no rows are read",
                weighting="uniform",
                lora_targets=targets,
                output=tmp_path / "adapter",
            )
        )
    with pytest.raises(InputError, match=f"--lora-targets: .* is the model's {kind}"):
        run(
            RunConfig(
                base=model,
                instruct=model,
                data=folder / "rows.jsonl",
                lora_targets=targets,
                output=tmp_path / "run",
            )
        )
    assert not list(tmp_path.iterdir()), "nothing may be made before the refusal"


@pytest.mark.parametrize("pair", ["untied", "tied"])
def test_all_linear_is_every_linear_layer_but_the_output_layer(folder, pair):
    targets = find_targets(TrainOptions(), model_structure(folder / pair))
    assert set(targets.modules) == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    assert not targets.parameters and not targets.not_adapted


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (".*_proj", r"\.\*_proj is not in the model; adapt linear layers \(down_proj, "),
        ("input_layernorm", "input_layernorm is a LlamaRMSNorm"),
        ("self_attn", "self_attn is a LlamaAttention"),
        (" , ", "names nothing"),
    ],
)
def test_targets_that_cannot_be_adapted_are_named(folder, targets, message):
    with pytest.raises(InputError, match=f"--lora-targets: {message}"):
        find_targets(TrainOptions(lora_targets=targets), model_structure(folder / "untied"))


@pytest.mark.parametrize(
    "config",
    [
        MixtralConfig(**EXPERTS, num_local_experts=3),
        Qwen3MoeConfig(**EXPERTS, num_experts=3, moe_intermediate_size=20),
    ],
    ids=["mixtral", "qwen3-moe"],
)
def test_all_linear_adapts_fused_experts_and_names_the_routers_it_leaves(config):
    with pytest.raises(InputError, match="--lora-dropout: 0.05 .*experts.gate_up_proj.*dropout 0"):
        find_targets(TrainOptions(), structure(config))
    options = TrainOptions(lora_dropout=0.0, lora_rank=2)
    model = structure(config)
    targets = find_targets(options, model)
    assert targets.parameters == ("experts.down_proj", "experts.gate_up_proj")
    assert targets.not_adapted == ("layers.*.mlp.gate.weight",)
    adapted = get_peft_model(model, lora_config(options, targets))
    pairs = [name for name, _ in adapted.named_parameters() if "lora_A" in name]
    assert len([name for name in pairs if "experts" in name]) == 2 * config.num_hidden_layers
    assert len(pairs) == (4 + 2) * config.num_hidden_layers


@pytest.mark.parametrize("name", ["experts", "gate_up_proj", "experts.down_proj"])
def test_experts_can_be_named(name):
    model = structure(MixtralConfig(**EXPERTS, num_local_experts=3))
    options = TrainOptions(lora_targets=f"q_proj,{name}", lora_dropout=0.0)
    targets = find_targets(options, model)
    assert targets.modules == ("q_proj",)
    assert len(targets.parameters) == (2 if name == "experts" else 1)
    with pytest.raises(InputError, match="pass --lora-dropout 0"):
        find_targets(TrainOptions(lora_targets=name), model)


def test_an_adapter_of_experts_is_trained(folder, tmp_path):
    config = Qwen3MoeConfig(
        **{**EXPERTS, "vocab_size": len(tiny.make_tokenizer())},
        num_experts=3,
        moe_intermediate_size=20,
        max_position_embeddings=512,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tiny.make_tokenizer().save_pretrained(tmp_path / "model")
    train(
        TrainConfig(
            model=str(tmp_path / "model"),
            tokenizer=str(tmp_path / "model"),
            data=folder / "rows.jsonl",
            weighting="uniform",
            lora_dropout=0.0,
            lora_rank=2,
            output=tmp_path / "adapter",
        )
    )
    stored = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert set(stored["target_parameters"]) == {"experts.down_proj", "experts.gate_up_proj"}
