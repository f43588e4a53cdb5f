"""Implementations that add a LoRA product to a weight: ours, PEFT's and plain PyTorch.

Those in place change the weight of their inputs at every call, as in use; the time does not depend
on its values.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import MergeCase
from benchmarks.data import MergeInputs
from benchmarks.provider import Provider, needs_triton

MERGE = ("lora_merge",)


def _gift(impl: Any, in_place: bool) -> Callable[[MergeCase, MergeInputs], Callable[[], Tensor]]:
    def prepare(case: MergeCase, inputs: MergeInputs) -> Callable[[], Tensor]:
        from gift_kernels.lora_merge.api import lora_merge, lora_merge_

        function = lora_merge_ if in_place else lora_merge
        arguments = (inputs.weight, inputs.lora_a, inputs.lora_b, inputs.scale)
        return lambda: function(*arguments, impl=impl)

    return prepare


def _plain(case: MergeCase, inputs: MergeInputs) -> Callable[[], Tensor]:
    def run() -> Tensor:
        delta = inputs.scale * (inputs.lora_b @ inputs.lora_a)
        return inputs.weight.add_(delta.to(inputs.weight.dtype))

    return run


def _peft(safe: bool) -> Callable[[MergeCase, MergeInputs], Callable[[], Tensor]]:
    def prepare(case: MergeCase, inputs: MergeInputs) -> Callable[[], Tensor]:
        from peft import LoraConfig, get_peft_model

        rows, columns = inputs.weight.shape
        with torch.device("meta"):
            linear = torch.nn.Linear(columns, rows, bias=False)
        linear.weight = torch.nn.Parameter(inputs.weight, requires_grad=False)
        config = LoraConfig(
            r=case.rank, lora_alpha=int(inputs.scale * case.rank), target_modules=["proj"]
        )
        model: Any = torch.nn.ModuleDict({"proj": linear})
        adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
        layer: Any = adapted.base_model.model["proj"]
        layer.lora_A["default"].weight = torch.nn.Parameter(inputs.lora_a, requires_grad=False)
        layer.lora_B["default"].weight = torch.nn.Parameter(inputs.lora_b, requires_grad=False)

        def run() -> Tensor:
            layer.merged_adapters.clear()
            layer.merge(safe_merge=safe)
            return layer.get_base_layer().weight.data

        return run

    return prepare


PROVIDERS = [
    Provider("gift triton, in place", "ours", MERGE, _gift("triton", True), skip=needs_triton),
    Provider("gift triton", "ours", MERGE, _gift("triton", False), skip=needs_triton),
    Provider("gift eager, in place", "ours", MERGE, _gift("eager", True)),
    Provider("plain PyTorch, in place", "baseline", MERGE, _plain),
    Provider("PEFT, in place", "peer", MERGE, _peft(False), package="peft"),
    Provider("PEFT, safe_merge", "peer", MERGE, _peft(True), package="peft"),
]
