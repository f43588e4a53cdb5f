"""Every implementation reproduces stored results that were derived without PyTorch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ce_cases import norm_error, readable, with_impls
from safetensors import safe_open
from torch import Tensor

from gift_kernels import (
    Guide,
    TokenStats,
    WeightTransform,
    reference,
    token_confidence,
    weighted_ce,
)

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = ["ce_weights", "ce_self", "ce_guide"]
# Relative error allowed to statistics and to gradients.
TOLERANCE = {
    torch.float64: (1e-13, 1e-13),
    torch.float32: (5e-6, 5e-6),
    torch.bfloat16: (5e-6, 4e-3),
    torch.float16: (5e-6, 5e-4),
}

COMBINATIONS = with_impls(*((name, dtype) for name in NAMES for dtype in TOLERANCE))


def by_dataclass(arguments: dict[str, Any]) -> dict[str, Any]:
    """The stored options in the groups in which `weighted_ce` takes them."""
    groups: dict[str, Any] = {"guide_": Guide, "weight_": WeightTransform}
    rest = {key: v for key, v in arguments.items() if not key.startswith(tuple(groups))}
    for prefix, name in (("guide_", "guide"), ("weight_", "transform")):
        found = {key: v for key, v in arguments.items() if key.startswith(prefix)}
        if found:
            fields = {key.removeprefix(prefix): value for key, value in found.items()}
            rest[name] = groups[prefix](**fields)
    return rest


def load(name: str, dtype: torch.dtype, device: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Arguments of `weighted_ce`, with what has a gradient as leaves, and all stored tensors."""
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        arguments = json.loads(file.metadata()["options"])
    inputs = [key for key, value in stored.items() if value.dtype == torch.float32]
    for key in set(inputs) - {"upstream"}:
        arguments[key] = stored[key].to(device, dtype)
        arguments[key].requires_grad_(f"d_{key}" in stored)
    arguments["target"] = stored["target"].to(device)
    return by_dataclass(arguments), stored


def compare(found: dict[str, Tensor], stored: dict[str, Tensor], dtype: torch.dtype) -> None:
    for key, value in found.items():
        tolerance = TOLERANCE[dtype][key.startswith("d_")]
        error = norm_error(value.cpu(), stored[key])
        assert error <= tolerance, f"{key}: relative error {error:.2e}, allowed {tolerance:.0e}"


def loss_and_gradients(op: Any, name: str, dtype: torch.dtype, device: str) -> None:
    arguments, stored = load(name, dtype, device)
    loss, stats = op(**arguments)
    loss.backward(stored["upstream"].to(device, loss.dtype))
    found = {"loss": loss.detach()} | stats._asdict()
    gradients = [key for key in stored if key.startswith("d_")]
    assert {"d_hidden", "d_lm_head_weight"} <= set(gradients)
    found |= {key: arguments[key.removeprefix("d_")].grad for key in gradients}
    compare(found, stored, dtype)


@pytest.mark.parametrize("name", NAMES)
def test_the_specification_agrees_with_formulas_derived_by_hand(name: str, device: str) -> None:
    loss_and_gradients(reference.weighted_ce, name, torch.float64, device)


@pytest.mark.parametrize(("name", "dtype", "impl"), COMBINATIONS, ids=readable)
def test_loss_statistics_and_gradients_are_the_stored_ones(
    name: str, dtype: torch.dtype, impl: str, device: str
) -> None:
    def op(**arguments: Any) -> Any:
        return weighted_ce(**arguments, impl=impl, stats=TokenStats._fields)

    loss_and_gradients(op, name, dtype, device)


@pytest.mark.parametrize(("name", "dtype", "impl"), COMBINATIONS, ids=readable)
def test_confidence_is_the_stored_one(
    name: str, dtype: torch.dtype, impl: str, device: str
) -> None:
    arguments, stored = load(name, dtype, device)
    names = ("hidden", "lm_head_weight", "target", "bias", "logit_scale", "logit_softcap")
    chosen = {key: arguments[key] for key in names if key in arguments}
    compare({"confidence": token_confidence(**chosen, impl=impl)}, stored, dtype)
