"""lora_merge and lora_merge_ against the specification in float64, eager and Triton."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from merge_cases import (
    DTYPES,
    Adapter,
    assert_rounded_once,
    assert_within_budget,
    make_adapter,
    make_weight,
    merge_with,
    truth,
    ulps,
)
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from gift_kernels.lora_merge.api import lora_merge, lora_merge_, merge_in_blocks

GOLDEN = Path(__file__).parents[1] / "golden" / "merge.safetensors"
IMPLS = ["eager", "triton"]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("factors", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_result_is_within_twice_the_error_of_plain_float32(dtype, factors, impl, device):
    weight = make_weight((70, 200), dtype, device)
    adapter = make_adapter(weight.shape, 24, factors, device)
    assert_within_budget(lora_merge(weight, *adapter, impl=impl), weight, [adapter])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("factors", ["bf16", "fp32"])
@pytest.mark.parametrize("rank", [1, 2, 3, 8, 17, 64, 100, 130, 512])
def test_every_rank_is_summed_completely(rank, factors, impl, device):
    weight = make_weight((40, 72), "bf16", device)
    adapter = make_adapter(weight.shape, rank, factors, device)
    assert_within_budget(lora_merge(weight, *adapter, impl=impl), weight, [adapter])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 300), (300, 1), (7, 9), (65, 129), (2, 3, 5)], ids=str
)
def test_odd_shapes(shape, impl, device):
    weight = make_weight(shape, "fp32", device)
    adapter = make_adapter(shape, 5, "fp32", device)
    assert_within_budget(lora_merge(weight, *adapter, impl=impl), weight, [adapter])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("factors", ["bf16", "fp32"])
def test_bfloat16_result_is_the_exact_one_rounded_once(factors, impl, device):
    weight = make_weight((256, 512), "bf16", device)
    adapter = make_adapter(weight.shape, 16, factors, device)
    assert_rounded_once(lora_merge(weight, *adapter, impl=impl), weight, [adapter])


def test_a_second_rounding_is_noticed(device):
    weight = make_weight((60, 136), "bf16", device)
    adapter = make_adapter(weight.shape, 16, "fp32", device)
    delta = (adapter.scale * (adapter.b @ adapter.a)).bfloat16()
    with pytest.raises(AssertionError, match="entries"):
        assert_rounded_once(weight + delta, weight, [adapter])


@pytest.mark.parametrize("impl", IMPLS)
def test_float32_factors_are_not_multiplied_in_fewer_bits(impl, device):
    """B A cancels W to one part in 2**12: products in bfloat16 or TF32 would leave noise."""
    adapter = make_adapter((64, 128), 16, "fp32", device, scale=1.0)
    delta = (adapter.b.double() @ adapter.a.double()).float()
    weight = (-delta).to(torch.bfloat16)
    merged = lora_merge(weight, *adapter, impl=impl).double()
    exact = truth(weight, [adapter])
    allowed = exact.abs() * 2**-8 + delta.abs().max() * 2**-21
    assert ((merged - exact).abs() <= allowed).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("scales", [(0.5, -2.0, 1.3), (0.7, 0.7, 0.7)], ids=["differ", "equal"])
@pytest.mark.parametrize(
    "factors",
    [("bf16", "bf16", "bf16"), ("fp32", "fp32", "fp32"), ("bf16", "fp16", "fp32")],
    ids=str,
)
def test_several_adapters_are_merged_with_one_rounding(factors, scales, impl, device):
    weight = make_weight((60, 136), "bf16", device)
    adapters = [
        make_adapter(weight.shape, rank, dtype, device, scale, seed=rank)
        for rank, dtype, scale in zip((4, 33, 16), factors, scales, strict=True)
    ]
    merged = merge_with(lora_merge, weight, adapters, impl=impl)
    assert_within_budget(merged, weight, adapters)
    assert_rounded_once(merged, weight, adapters)


@pytest.mark.parametrize("impl", IMPLS)
def test_one_scale_serves_all_adapters(impl, device):
    weight = make_weight((20, 30), "fp32", device)
    a, b, _ = make_adapter(weight.shape, 4, "fp32", device)
    merged = lora_merge(weight, [a, a], [b, b], 2.0, impl=impl)
    assert_within_budget(merged, weight, [Adapter(a, b, 2.0)] * 2)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("view", ["columns", "transposed", "every second", "negative offset"])
def test_strided_weights_and_factors(view, impl, device):
    whole = make_weight((90, 140), "bf16", device)
    weight = {
        "columns": whole[:, 3:120],
        "transposed": whole.mT,
        "every second": whole[::2, ::2],
        "negative offset": whole[5:, 1:],
    }[view]
    a, b, scale = make_adapter(weight.shape, 12, "fp32", device)
    strided = Adapter(a.mT.contiguous().mT, torch.cat([b, b], 1)[:, : b.shape[1]], scale)
    expected = lora_merge(weight.contiguous(), a, b, scale, impl=impl)
    assert_within_budget(expected, weight, [strided])
    assert_within_budget(lora_merge(weight, *strided, impl=impl), weight, [strided])
    in_place = weight.clone()
    whole_before = whole.clone()
    lora_merge_(weight, *strided, impl=impl)
    assert_within_budget(weight, in_place, [strided])
    untouched = torch.ones_like(whole, dtype=torch.bool)
    mask = torch.as_strided(untouched, weight.shape, weight.stride(), weight.storage_offset())
    mask.fill_(False)
    assert torch.equal(whole[untouched], whole_before[untouched])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(40, 72), (3, 40, 72)], ids=["matrix", "experts"])
def test_fan_in_fan_out_is_the_merge_of_the_transpose(shape, impl, device):
    weight = make_weight(shape, "bf16", device)
    adapter = make_adapter(shape, 9, "bf16", device)
    stored = weight.mT.contiguous()
    merged = lora_merge(stored, *adapter, fan_in_fan_out=True, impl=impl)
    assert merged.is_contiguous()
    assert_within_budget(merged.mT, weight, [adapter])


@pytest.mark.parametrize("impl", IMPLS)
def test_experts_are_merged_each_with_its_own_factors(impl, device):
    weight = make_weight((5, 33, 130), "bf16", device)
    adapter = make_adapter(weight.shape, 7, "bf16", device)
    merged = lora_merge(weight, *adapter, impl=impl)
    for expert in range(5):
        alone = lora_merge(weight[expert], adapter.a[expert], adapter.b[expert], 0.7, impl=impl)
        assert torch.equal(merged[expert], alone)


@pytest.mark.parametrize("impl", IMPLS)
def test_in_place_equals_out_of_place_and_only_the_weight_changes(impl, device):
    weight = make_weight((50, 90), "bf16", device)
    adapter = make_adapter(weight.shape, 6, "fp32", device)
    before = [t.clone() for t in (weight, adapter.a, adapter.b)]
    merged = lora_merge(weight, *adapter, impl=impl)
    assert merged.data_ptr() != weight.data_ptr()
    for tensor, copy in zip((weight, adapter.a, adapter.b), before, strict=True):
        assert torch.equal(tensor, copy)
    version = weight._version
    assert lora_merge_(weight, *adapter, impl=impl) is weight
    assert weight._version > version
    assert torch.equal(weight, merged)
    for tensor, copy in zip(adapter[:2], before[1:], strict=True):
        assert torch.equal(tensor, copy)


def test_parameters_are_merged_without_a_graph(device):
    weight = torch.nn.Parameter(make_weight((8, 9), "fp32", device))
    a, b, scale = make_adapter(weight.shape, 2, "fp32", device)
    a, b = torch.nn.Parameter(a), torch.nn.Parameter(b)
    merged = lora_merge(weight, a, b, scale)
    assert not merged.requires_grad
    assert lora_merge_(weight, a, b, scale) is weight and weight.requires_grad
    assert torch.equal(weight, merged)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 4, 5), (2, 0, 3)], ids=str)
def test_empty_weights_stay_empty(shape, impl, device):
    weight = make_weight(shape, "bf16", device)
    adapter = make_adapter(shape, 3, "bf16", device)
    assert lora_merge(weight, *adapter, impl=impl).shape == weight.shape
    assert lora_merge_(weight, *adapter, impl=impl).shape == weight.shape


@pytest.mark.parametrize("impl", IMPLS)
def test_rank_zero_leaves_the_weight(impl, device):
    weight = make_weight((4, 5), "bf16", device)
    adapter = make_adapter(weight.shape, 0, "bf16", device)
    assert torch.equal(lora_merge(weight, *adapter, impl=impl), weight)
    assert torch.equal(lora_merge_(weight.clone(), *adapter, impl=impl), weight)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("factors", ["bf16", "fp32"])
def test_nan_and_infinity_reach_their_entries_and_no_others(factors, bad, impl, device):
    weight = make_weight((70, 140), "bf16", device)
    a, b, scale = make_adapter(weight.shape, 5, factors, device)
    clean = lora_merge(weight, a, b, scale, impl=impl)
    hit = torch.zeros_like(weight, dtype=torch.bool)
    weight[2, 3], a[1, 100], b[66, 4] = bad, bad, bad
    hit[2, 3], hit[:, 100], hit[66] = True, True, True
    merged = lora_merge(weight, a, b, scale, impl=impl)
    assert not merged[hit].isfinite().any()
    assert torch.equal(merged[~hit], clean[~hit])


def test_float64_is_computed_in_float64(device):
    weight = make_weight((9, 11), "fp32", device).double()
    a, b, scale = make_adapter(weight.shape, 4, "fp32", device)
    merged = lora_merge(weight, a.double(), b, scale)
    torch.testing.assert_close(
        merged, truth(weight, [Adapter(a, b, scale)]), rtol=1e-15, atol=1e-15
    )
    merged = lora_merge(weight.bfloat16(), a.double(), b.double(), scale)
    expected = truth(weight.bfloat16(), [Adapter(a, b, scale)]).bfloat16()
    assert torch.equal(merged, expected)


def test_large_weights_are_merged_in_several_blocks(monkeypatch, device):
    monkeypatch.setattr(sys.modules["gift_kernels.lora_merge.api"], "BLOCK_ELEMENTS", 100)
    weight = make_weight((2, 37, 30), "fp32", device)
    adapter = make_adapter(weight.shape, 4, "fp32", device)
    assert_within_budget(lora_merge(weight, *adapter, impl="eager"), weight, [adapter])


class _PrecisionOfProducts(TorchDispatchMode):
    """Notes what precision is allowed whenever two matrices are multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.precisions: list[object] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.mm.default:
            mkldnn: Any = torch.backends.mkldnn
            self.precisions.append(torch.backends.cuda.matmul.fp32_precision)
            self.precisions.append(mkldnn.matmul.fp32_precision)
        return func(*args, **(kwargs or {}))


def test_reduced_float32_precision_elsewhere_does_not_reach_the_merge(device):
    weight = make_weight((64, 64), "fp32", device)
    a, b, scale = make_adapter(weight.shape, 64, "fp32", device)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with _PrecisionOfProducts() as products:
            merge_in_blocks(weight[None], weight[None], [a[None]], [b[None]], [scale], None)
        assert products.precisions and set(products.precisions) == {"ieee"}
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("name", ["matrix", "half", "mixed", "adapters", "experts", "transposed"])
@pytest.mark.parametrize("impl", IMPLS)
def test_golden_results_are_reproduced(name, impl, device):
    stored = {k: v.to(device) for k, v in load_file(GOLDEN).items() if k.startswith(name + ".")}
    weight, expected = stored[f"{name}.weight"], stored[f"{name}.expected"]
    scales = stored[f"{name}.scale"].tolist()
    a = [stored[f"{name}.lora_a.{i}"] for i in range(len(scales))]
    b = [stored[f"{name}.lora_b.{i}"] for i in range(len(scales))]
    options = {"fan_in_fan_out": name == "transposed"}
    in_float64 = lora_merge(weight.double(), a, b, scales, **options)
    torch.testing.assert_close(in_float64, expected, rtol=1e-14, atol=1e-14)
    merged = lora_merge(weight, a, b, scales, impl=impl, **options)
    if weight.dtype == torch.float32:
        torch.testing.assert_close(merged.double(), expected, rtol=3e-7, atol=3e-7)
    else:
        assert ulps(merged, expected.to(weight.dtype)).max() <= 1


def _views(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    if layout == "transposed":
        return tensor.mT.contiguous().mT
    if layout == "padded":
        return torch.nn.functional.pad(tensor, (1, 2))[..., 1:-2]
    return tensor


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 140),
    rank=st.integers(1, 40),
    dtypes=st.tuples(*[st.sampled_from(sorted(DTYPES))] * 3),
    layouts=st.tuples(*[st.sampled_from(["contiguous", "transposed", "padded"])] * 3),
    scale=st.sampled_from([0.0, 1.0, -0.3, 1e-30, 1e4]),
    fan_in_fan_out=st.booleans(),
)
def test_any_shape_layout_and_dtype_is_merged(
    rows, columns, rank, dtypes, layouts, scale, fan_in_fan_out, device
):
    weight = _views(make_weight((rows, columns), dtypes[0], device), layouts[0])
    a = _views(make_adapter(weight.shape, rank, dtypes[1], device).a, layouts[1])
    b = _views(make_adapter(weight.shape, rank, dtypes[2], device).b, layouts[2])
    adapter = Adapter(a, b, scale)
    given_weight = weight.mT if fan_in_fan_out else weight
    merged = lora_merge(given_weight, *adapter, fan_in_fan_out=fan_in_fan_out, impl="triton")
    merged = merged.mT if fan_in_fan_out else merged
    if scale == 0.0:
        assert torch.equal(merged, weight)
    elif weight.dtype == torch.float32:
        size = weight.abs().max().item() + abs(scale)
        assert (merged.double() - truth(weight, [adapter])).abs().max() <= 4e-7 * size
    else:
        # Where W and scale · B A cancel, float32 leaves up to about 2**-22 of their size.
        expected = truth(weight, [adapter])
        close = (merged.double() - expected).abs() <= 2**-20 * (1 + abs(scale))
        assert (close | (ulps(merged, expected.to(weight.dtype)) <= 1)).all()


def test_eager_needs_no_triton():
    code = (
        "import sys, torch\nfrom gift_kernels.lora_merge.api import lora_merge\n"
        "lora_merge(torch.ones(4, 4), torch.ones(1, 4), torch.ones(4, 1), 1.0)\n"
        "assert 'triton' not in sys.modules"
    )
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
