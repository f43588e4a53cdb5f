"""A step's operations, counted: 16-bit products, no synchronisation, nothing unused."""

import sys
from collections import Counter
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.helpers import disable_input_dtype_casting
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, Qwen2Config

from gift.annotation.batches import annotate_batch
from gift.config import TrainConfig
from gift.data.batches import make_batch
from gift.data.encoding import Example
from gift.data.packing import enable_packing
from gift.models.head import last_hidden_state
from gift.training.gradients import accumulate_gradients, flat_gradients, predicting_states
from gift.training.memory import recompute
from gift.training.micro_batches import Split
from gift.weighting.weights import guided_rows

CONFIG = Qwen2Config(
    vocab_size=300,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "linear", "matmul"}
# Operations for which the host must know what the device has computed.
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "is_nonzero"}


def inside_an_operator() -> bool:
    """Whether a function of `gift_kernels` is being called."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("gift_kernels"):
            return True
        frame = frame.f_back
    return False


class Counted(TorchDispatchMode):
    """Counts waits, and products by the dtype of their operands.

    What the operators of `gift_kernels` do inside does not count; they have tests of their own.
    """

    def __init__(self) -> None:
        super().__init__()
        self.products: Counter[torch.dtype] = Counter()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if inside_an_operator():
            return func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        tensors = [value for value in args if isinstance(value, Tensor)]
        if name in PRODUCTS and min(tensors[-1].shape[-2:]) > 1:  # positions times frequencies
            self.products[tensors[-1].dtype] += 1
        indices = args[1] if name.startswith("index") and len(args) > 1 else ()
        if name in WAITS or any(
            isinstance(index, Tensor) and index.dtype == torch.bool
            for index in (indices if isinstance(indices, list | tuple) else ())
        ):
            self.waits.append(name)
        return func(*args, **(kwargs or {}))


def make_adapted(dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    model = (
        AutoModelForCausalLM.from_config(deepcopy(CONFIG), dtype=torch.bfloat16).to(dtype).eval()
    )
    lora = LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False)
    adapted = get_peft_model(model, lora)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.mul_(0.05)
    assert enable_packing(model, make_examples())
    return adapted.train()


def make_examples() -> list[Example]:
    generator = np.random.default_rng(0)
    return [
        Example(row, generator.integers(1, 300, n).astype(np.int32), np.arange(n) >= 4)
        for row, n in enumerate((40, 17, 23, 36))
    ]


def trained(model: Any) -> list[Any]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def config(**options: Any) -> TrainConfig:
    return TrainConfig(model="", data=Path("rows"), output=Path("adapter"), **options)


def rows_of(settings: TrainConfig) -> Any:
    examples = make_examples()
    torch.manual_seed(1)
    return guided_rows(settings, examples, [torch.rand(example.targets) for example in examples])


@pytest.mark.parametrize("recomputed", [0, 2])
def test_no_float32_product_is_left_in_a_bfloat16_step(recomputed: int) -> None:
    model = make_adapted(torch.bfloat16)
    assert {parameter.dtype for parameter in trained(model)} == {torch.float32}
    recompute(model, recomputed)
    with Counted() as counted:
        accumulate_gradients(config(), model, rows_of(config()), Split(1000, True, recomputed))
    # In each of 7 layers of 2 blocks a product of the layer and two of its adapter, and at least as
    # many for their gradients.
    assert counted.products.keys() == {torch.bfloat16} and counted.products[torch.bfloat16] > 84
    assert {parameter.grad.dtype for parameter in trained(model)} == {torch.float32}


def test_rounded_products_cost_no_accuracy() -> None:
    """Against float32 throughout, adapters in float32 and in bfloat16 are off by as much."""
    gradients: dict[str, Tensor] = {}
    batch = make_batch(make_examples(), packed=True)
    for name, dtype in (("truth", torch.float32), ("ours", torch.bfloat16)):
        model = make_adapted(dtype)
        direction = torch.randn(batch.targets.numel(), 128, generator=torch.Generator())
        with disable_input_dtype_casting(model, active=name == "ours"):
            (predicting_states(model, batch).float() * direction).mean().backward()
        gradients[name] = torch.cat([p.grad.flatten() for p in trained(model)])
    model = make_adapted(torch.bfloat16)
    assert not torch.is_autocast_enabled("cpu")
    hidden = last_hidden_state(model.get_base_model(), **batch.inputs)[0, batch.predicts]
    (hidden.float() * direction).mean().backward()
    gradients["float32 adapters"] = torch.cat([p.grad.flatten() for p in trained(model)])
    truth = gradients.pop("truth")
    errors = {name: float((g - truth).norm() / truth.norm()) for name, g in gradients.items()}
    assert 0 < errors["ours"] < 1.2 * errors["float32 adapters"] < 0.05, errors


@pytest.mark.parametrize("weighting", ["guide", "self", "own-times-guide", "entropy"])
def test_nothing_in_a_micro_batch_waits_for_the_device(weighting: Any) -> None:
    threshold = 0.1 if weighting == "guide" else 0.0
    settings = config(weighting=weighting, confidence_threshold=threshold)
    model, rows = make_adapted(torch.float32), rows_of(settings)
    gradients = flat_gradients(trained(model))
    with Counted() as counted:
        sums, losses = accumulate_gradients(settings, model, rows, Split(60, True))
    micro_batches = len(losses)
    assert micro_batches == 3 and len(counted.waits) <= micro_batches, counted.waits
    assert gradients.any() and sums[0] > 0


def test_annotation_of_a_batch_waits_at_most_once() -> None:
    model = make_adapted(torch.float32).get_base_model()
    with Counted() as counted:
        annotate_batch(model, make_batch(make_examples(), packed=True))
    assert len(counted.waits) <= 1, counted.waits


def test_all_gradients_are_one_buffer() -> None:
    model = make_adapted(torch.float32)
    flat = flat_gradients(trained(model))
    accumulate_gradients(config(), model, rows_of(config()), Split(1000, True))
    joined = torch.cat([parameter.grad.flatten() for parameter in trained(model)])
    assert torch.equal(flat, joined) and flat.abs().max() > 0
    flat.zero_()
    assert not any(parameter.grad.any() for parameter in trained(model))
