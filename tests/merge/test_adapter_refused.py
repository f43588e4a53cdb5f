"""Adapters and targets that cannot be merged are refused with the reason."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from merge_models import (
    change_json,
    edit_adapter,
    llama,
    load,
    run_merge,
    save_adapter,
    save_model,
    save_pair,
    tensors,
)
from peft import IA3Config, get_peft_model
from safetensors.torch import save_file

from gift.errors import InputError
from gift.merge.adapter import REFUSED


@pytest.mark.parametrize("field", REFUSED)
def test_variants_that_are_no_low_rank_sum_are_refused_with_the_reason(
    field: str, tmp_path: Path
) -> None:
    save_model(tmp_path / "model", llama(num_hidden_layers=1))
    save_adapter(tmp_path / "adapter", tmp_path / "model", target_modules=["q_proj"])
    change_json(tmp_path / "adapter" / "adapter_config.json", **{field: [[1, 2]]})
    with pytest.raises(InputError, match=REFUSED[field][:30]):
        run_merge(tmp_path)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "corda", "loftq"])
def test_initialisations_that_change_the_base_weights_are_refused(
    start: str, tmp_path: Path
) -> None:
    save_model(tmp_path / "model", llama(num_hidden_layers=1))
    save_adapter(tmp_path / "adapter", tmp_path / "model", target_modules=["q_proj"])
    change_json(tmp_path / "adapter" / "adapter_config.json", init_lora_weights=start)
    with pytest.raises(InputError, match=f"{start}.*changes the base weights"):
        run_merge(tmp_path)


def test_adapters_that_are_not_lora_are_refused(tmp_path: Path) -> None:
    model = load(save_model(tmp_path / "model"))
    config = IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")  # pyright: ignore
    with pytest.raises(InputError, match="is of type IA3; only LORA"):
        run_merge(tmp_path)


def test_trained_tokens_are_refused(tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    options: dict[str, Any] = {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]}
    save_adapter(tmp_path / "adapter", tmp_path / "model", **options)
    with pytest.raises(InputError, match="trainable tokens"):
        run_merge(tmp_path)


@pytest.mark.parametrize("options", [{"scale": ["0.5"]}, {"method": "ties"}])
def test_dora_is_refused_where_it_would_be_a_term_of_a_sum(
    options: dict[str, Any], tmp_path: Path
) -> None:
    save_model(tmp_path / "model", llama(num_hidden_layers=1))
    save_adapter(tmp_path / "adapter", tmp_path / "model", use_dora=True)
    with pytest.raises(InputError, match="is DoRA"):
        run_merge(tmp_path, **options)


@pytest.mark.parametrize(
    ("value", "message"),
    [(0.0, "every lora_B is 0"), (float("nan"), "NaN or infinity"), (float("inf"), "NaN or inf")],
)
def test_an_adapter_that_says_nothing_or_nonsense_is_refused(
    value: float, message: str, tmp_path: Path
) -> None:
    save_pair(tmp_path)
    stored = tensors(tmp_path / "adapter")
    for name in stored:
        if "lora_B" in name:
            stored[name] = torch.full_like(stored[name], value)
    save_file(stored, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(InputError, match=message):
        run_merge(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "model"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "adapter_config.json").unlink(), "has no adapter_config.json"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "has no adapter_model"),
        (
            lambda folder: (folder / "adapter_model.safetensors").rename(
                folder / "adapter_model.bin"
            ),
            "only a pickled adapter_model.bin",
        ),
        (lambda folder: change_json(folder / "adapter_config.json", r=0), "r is 0"),
        (
            lambda folder: change_json(folder / "adapter_config.json", rank_pattern=[1]),
            "rank_pattern is [[]1[]], not an object",
        ),
        (
            lambda folder: change_json(folder / "adapter_config.json", alpha_pattern={"(": 2}),
            "alpha_pattern: '[(]' is no pattern",
        ),
        (
            lambda folder: change_json(folder / "adapter_config.json", alpha_pattern={"q": "x"}),
            "alpha_pattern: q is 'x', not a positive number",
        ),
        (lambda folder: (folder / "adapter_config.json").write_text("[]"), "expected an object"),
        (
            lambda folder: (folder.parent / "model" / "config.json").write_text("[]"),
            "expected an object of settings",
        ),
        (
            lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"12345"),
            "not a safetensors file",
        ),
    ],
)
def test_a_broken_adapter_folder_is_named(
    spoil: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    save_model(tmp_path / "model", llama(num_hidden_layers=1))
    save_adapter(tmp_path / "adapter", tmp_path / "model")
    spoil(tmp_path / "adapter")
    with pytest.raises(InputError, match=message):
        run_merge(tmp_path)


def test_two_adapters_in_one_file_are_refused_by_name(tmp_path: Path) -> None:
    save_pair(tmp_path)

    def edit(stored: dict[str, torch.Tensor]) -> None:
        for name in list(stored):
            stored[name.replace(".weight", ".other.weight")] = stored[name] + 1

    edit_adapter(tmp_path, edit)
    with pytest.raises(InputError, match="lora_A.weight are the same tensor of two adapters"):
        run_merge(tmp_path)


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "compressed-tensors", "fp8"])
def test_a_quantised_model_is_no_target_of_a_merge(method: str, tmp_path: Path) -> None:
    save_pair(tmp_path)
    change_json(tmp_path / "model/config.json", quantization_config={"quant_method": method})
    with pytest.raises(InputError, match=f"is quantised with {method}, and only plain weights"):
        run_merge(tmp_path)
    assert not list(tmp_path.glob("merged*"))
