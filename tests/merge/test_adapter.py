"""Adapters of every kind that PEFT writes: merged as PEFT runs them, or refused with the reason."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from merge_models import (
    IDS,
    LLAMA,
    change_json,
    edit_adapter,
    llama,
    load,
    logits,
    run_merge,
    save_adapter,
    save_model,
    tensors,
)
from safetensors.torch import load_file, save_file
from transformers import (
    GPT2Config,
    GptOssConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3MoeConfig,
)

from gift.errors import InputError
from gift.merge.adapter import read_adapter

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
MOE: dict[str, Any] = {"num_experts_per_tok": 2, "head_dim": 8}
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": llama,
    "qwen2-bias": lambda: Qwen2Config(**LLAMA),
    "gpt2-conv1d": lambda: GPT2Config(
        vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2
    ),
    "mixtral-per-expert": lambda: MixtralConfig(**LLAMA, num_local_experts=3, **MOE),
    "qwen3-per-expert": lambda: Qwen3MoeConfig(
        **LLAMA, num_experts=3, moe_intermediate_size=20, **MOE
    ),
    "gpt-oss-fused-transposed": lambda: GptOssConfig(
        **LLAMA, num_local_experts=3, rope_parameters={"rope_type": "default"}, **MOE
    ),
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {}),
    "rslora": ("llama", {"use_rslora": True}),
    "rank and alpha patterns": (
        "llama",
        {
            "rank_pattern": {"k_proj": 2, "layers.1.mlp.up_proj": 7},
            "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 20, "up_proj": 3},
        },
    ),
    "some layers": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "lora bias": ("qwen2-bias", {"target_modules": ["q_proj", "v_proj"], "lora_bias": True}),
    "trained biases": ("qwen2-bias", {"target_modules": ["q_proj"], "bias": "all"}),
    "modules to save": ("llama", {"modules_to_save": ["lm_head", "input_layernorm"]}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "dora": ("llama", {"use_dora": True}),
    "conv1d": ("gpt2-conv1d", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "experts, mixtral": (
        "mixtral-per-expert",
        {"target_modules": ["q_proj"], "target_parameters": EXPERTS},
    ),
    "experts, qwen3": (
        "qwen3-per-expert",
        {"target_modules": [], "target_parameters": EXPERTS, "rank_pattern": {"down_proj": 3}},
    ),
    "experts, gpt-oss": (
        "gpt-oss-fused-transposed",
        {"target_modules": ["q_proj"], "target_parameters": EXPERTS},
    ),
    "one expert parameter": (
        "qwen3-per-expert",
        {"target_modules": [], "target_parameters": EXPERTS[1:]},
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_merged_model_computes_what_the_adapted_model_computes(kind: str, tmp_path: Path) -> None:
    """PEFT's forward and PEFT's own merge are the oracles, on real adapters of every kind."""
    architecture, options = KINDS[kind]
    save_model(tmp_path / "model", CONFIGS[architecture]())
    adapted = save_adapter(tmp_path / "adapter", tmp_path / "model", **options)
    expected = logits(adapted)
    before = logits(load(tmp_path / "model"))
    merged = run_merge(tmp_path)
    assert (expected - before).abs().max() > 1e-2
    torch.testing.assert_close(logits(load(merged)), expected, rtol=2e-5, atol=2e-5)
    adapted.merge_and_unload().save_pretrained(tmp_path / "peft")
    theirs, ours = tensors(tmp_path / "peft"), tensors(merged)
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    "rename",
    [
        pytest.param(lambda name: name.removeprefix("model."), id="saved without the head's class"),
        pytest.param(
            lambda name: "language_model." + name, id="language model of a multimodal checkpoint"
        ),
    ],
)
def test_a_checkpoint_with_another_prefix_takes_the_adapter(
    rename: Callable[[str], str], tmp_path: Path
) -> None:
    """A vision tower's module of the same name must not take the language model's change."""
    save_model(tmp_path / "model")
    save_adapter(tmp_path / "adapter", tmp_path / "model", target_modules=["q_proj"])
    expected = tensors(run_merge(tmp_path))
    path = tmp_path / "model" / "model.safetensors"
    weights = {rename(name): tensor for name, tensor in load_file(path).items()}
    tower = "vision_tower.encoder.layers.0.self_attn.q_proj.weight"
    weights[tower] = torch.ones(32, 32)
    save_file(weights, path, {"format": "pt"})
    found = tensors(run_merge(tmp_path, overwrite=True))
    assert torch.equal(found.pop(tower), weights[tower])
    assert found.keys() == {rename(name) for name in expected}
    assert all(torch.equal(found[rename(name)], tensor) for name, tensor in expected.items())


def test_keys_with_an_adapter_name_or_a_training_wrapper_land(tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    save_adapter(tmp_path / "adapter", tmp_path / "model")
    expected = tensors(run_merge(tmp_path))
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    odd = {
        name.replace("lora_A.", "lora_A.default.").replace("mlp.", "mlp._fsdp_wrapped_module."): t
        for name, t in load_file(path).items()
    }
    assert any("default" in name for name in odd) and any("fsdp" in name for name in odd)
    save_file(odd, path)
    found = tensors(run_merge(tmp_path, overwrite=True))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_every_key_that_does_not_land_is_listed_before_any_output(tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    save_adapter(tmp_path / "adapter", tmp_path / "model")
    layer = "base_model.model.model.layers"

    def edit(stored: dict[str, torch.Tensor]) -> None:
        stored[f"{layer}.7.mlp.up_proj.lora_A.weight"] = torch.ones(4, 32)
        stored[f"{layer}.7.mlp.up_proj.lora_B.weight"] = torch.ones(48, 4)
        stored[f"{layer}.0.mlp.mystery"] = torch.ones(3)
        stored[f"{layer}.0.self_attn.q_proj.lora_A.weight"] = torch.ones(4, 31)
        stored[f"{layer}.1.self_attn.k_proj.lora_A.weight"] = torch.ones(2, 32)
        stored[f"{layer}.1.self_attn.k_proj.lora_B.weight"] = torch.ones(16, 2)
        del stored[f"{layer}.1.mlp.down_proj.lora_B.weight"]

    edit_adapter(tmp_path, edit)
    with pytest.raises(InputError) as caught:
        run_merge(tmp_path)
    message = str(caught.value)
    for part in (
        "no weight for base_model.model.model.layers.7.mlp.up_proj.lora_A.weight",
        "layers.0.mlp.mystery: belongs to no LoRA module",
        "layers.0.self_attn.q_proj: the adapter is for a weight [32, 31]",
        "layers.1.self_attn.k_proj: lora_A has 2 rows",
        "layers.1.mlp.down_proj: has A but lacks lora_B",
    ):
        assert part in message
    assert not list(tmp_path.glob("merged*"))


def test_an_adapter_for_fewer_layers_or_another_size_is_an_error(tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    save_adapter(tmp_path / "adapter", tmp_path / "model", target_modules=["gate_proj", "v_proj"])
    save_model(tmp_path / "deeper" / "model", llama(num_hidden_layers=3))
    (tmp_path / "deeper" / "adapter").symlink_to(tmp_path / "adapter")
    with pytest.raises(InputError, match=r"fewer layers\? nothing for 2 weights.*layers.2"):
        run_merge(tmp_path / "deeper")
    save_model(tmp_path / "wider" / "model", llama(intermediate_size=56))
    (tmp_path / "wider" / "adapter").symlink_to(tmp_path / "adapter")
    with pytest.raises(InputError, match=r"gate_proj: the adapter is for a weight \[48, 32\], the"):
        run_merge(tmp_path / "wider")


def test_layers_that_an_adapter_leaves_out_by_name_are_noted(tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    options: dict[str, Any] = {"target_modules": ["model.layers.1.mlp.up_proj"]}
    save_adapter(tmp_path / "adapter", tmp_path / "model", **options)
    notes = json.loads((run_merge(tmp_path) / "gift_merge.json").read_text())["notes"]
    assert any("nothing for 1 weights like those it adapts" in note for note in notes)


def test_another_vocabulary_is_an_error_that_says_so(tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    save_adapter(tmp_path / "adapter", tmp_path / "model", target_modules=["lm_head"])
    save_model(tmp_path / "other" / "model", llama(vocab_size=128))
    (tmp_path / "other" / "adapter").symlink_to(tmp_path / "adapter")
    with pytest.raises(InputError, match="the vocabulary differs"):
        run_merge(tmp_path / "other")


def test_a_quantised_weight_is_an_error(tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    save_adapter(tmp_path / "adapter", tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    weights = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({**weights, name: weights[name].to(torch.float8_e4m3fn)}, path)
    with pytest.raises(InputError, match=rf"{name} is stored as F8_E4M3; a quantised"):
        run_merge(tmp_path)


def test_square_weights_of_contradictory_orientation_are_refused(tmp_path: Path) -> None:
    save_model(tmp_path / "model", CONFIGS["gpt2-conv1d"]())
    options: dict[str, Any] = {"target_modules": ["c_attn", "attn.c_proj"], "fan_in_fan_out": True}
    save_adapter(tmp_path / "adapter", tmp_path / "model", **options)
    change_json(tmp_path / "adapter" / "adapter_config.json", fan_in_fan_out=False)
    with pytest.raises(InputError, match=r"orientation of these square ones is unknown.*c_proj"):
        run_merge(tmp_path)


def test_square_expert_weights_are_refused(tmp_path: Path) -> None:
    config = GptOssConfig(
        **{**LLAMA, "intermediate_size": 32},
        num_local_experts=3,
        rope_parameters={"rope_type": "default"},
        **MOE,
    )
    save_model(tmp_path / "model", config)
    options: dict[str, Any] = {"target_modules": [], "target_parameters": EXPERTS[1:]}
    save_adapter(tmp_path / "adapter", tmp_path / "model", **options)
    with pytest.raises(InputError, match="fits more than one way"):
        run_merge(tmp_path)


def test_untrained_copies_of_base_weights_are_noted_and_not_merged(tmp_path: Path) -> None:
    """PEFT stores the embedding beside an adapter of it; the training model's, not ours."""
    save_model(tmp_path / "base", seed=5)
    save_model(tmp_path / "model", seed=0)
    save_adapter(tmp_path / "adapter", tmp_path / "base", target_modules=["embed_tokens"])
    adapter = read_adapter(tmp_path / "adapter")
    assert set(adapter.copies) == {"model.embed_tokens.weight"}
    merged = run_merge(tmp_path)
    stored = tensors(tmp_path / "adapter")
    key = "base_model.model.model.embed_tokens.lora_embedding_"
    delta = 1.5 * (stored[f"{key}B"].double() @ stored[f"{key}A"].double()).T
    expected = tensors(tmp_path / "model")["model.embed_tokens.weight"] + delta
    found = tensors(merged)["model.embed_tokens.weight"]
    torch.testing.assert_close(found.double(), expected)
    notes = json.loads((merged / "gift_merge.json").read_text())["notes"]
    assert any("untrained copies" in note for note in notes)


def test_modules_to_save_are_matched_as_peft_matches_them(tmp_path: Path) -> None:
    """ "norm" is every module whose name ends so: PEFT trains the layers' norms too."""
    save_model(tmp_path / "model")
    save_adapter(
        tmp_path / "adapter",
        tmp_path / "model",
        target_modules=["q_proj"],
        modules_to_save=["norm"],
    )
    stored = tensors(tmp_path / "adapter")
    saved = {name: value for name, value in stored.items() if "norm" in name}
    assert any("input_layernorm" in name for name in saved)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: stored[name] + (name in saved) for name in stored}, path)
    merged = tensors(run_merge(tmp_path))
    for name, value in saved.items():
        assert torch.equal(merged[name.removeprefix("base_model.model.")], value + 1)


def test_the_oracle_sees_a_change(tmp_path: Path) -> None:
    """The fixed text reaches every position of the model: no test above compares constants."""
    model = load(save_model(tmp_path / "model"))
    found = logits(model)
    assert found.shape == (1, IDS.shape[1], LLAMA["vocab_size"])
    assert found.std() > 0.1
