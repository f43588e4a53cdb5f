"""The Triton kernel of the merge: every configuration, its memory accesses, its dispatch."""

import contextlib
import importlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from merge_cases import (
    DTYPES,
    Adapter,
    assert_rounded_once,
    assert_within_budget,
    make_adapter,
    make_weight,
    truth,
)
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.autotuner import Autotuner

from gift_kernels.lora_merge import triton as kernel
from gift_kernels.lora_merge.api import lora_merge, lora_merge_

# path: dtype of W and of the factors, and a rank that takes more than one block of A
PATHS: dict[kernel.Path, tuple[str, str, int]] = {
    "native": ("bf16", "bf16", 200),
    "split": ("bf16", "fp32", 200),
    "wide": ("fp32", "fp32", 20),
}
CHOICES = [
    pytest.param(path, config, id=f"{path}-{'x'.join(map(str, config.kwargs.values()))}")
    for path in PATHS
    for config in kernel.configs(path, stochastic=False, arch=90)
]


def test_at_most_eight_configurations():
    assert len(CHOICES) <= 8


@pytest.mark.parametrize("ranks", ["one block", "several blocks"])
@pytest.mark.parametrize(("path", "config"), CHOICES)
def test_every_configuration_fills_the_output_and_nothing_beside_it(path, config, ranks, device):
    dtype, factors, rank = PATHS[path]
    rank = 12 if ranks == "one block" else rank
    # Not a multiple of any tile, and two programs below one another in each configuration.
    weight = make_weight((1, 270, 150), dtype, device)
    adapter = make_adapter(weight.shape, rank, factors, device)
    buffer = torch.full((1, 274, 160), float("nan"), dtype=DTYPES[dtype], device=device)
    out = buffer[:, 2:272, 5:155]
    kernel.merge(weight, out, [adapter.a], [adapter.b], [adapter.scale], None, config)
    assert_within_budget(out, weight, [adapter])
    out.fill_(float("nan"))
    assert buffer.isnan().all()


@pytest.mark.parametrize("ranks", ["one block", "several blocks"])
@pytest.mark.parametrize(("path", "config"), CHOICES)
def test_every_configuration_reads_only_its_own_factors(path, config, ranks, device):
    """Factors and W lie in buffers of NaN: one entry too many would show."""
    dtype, factors, rank = PATHS[path]
    rank = 12 if ranks == "one block" else rank
    weight = make_weight((2, 70, 150), dtype, device)
    adapter = make_adapter(weight.shape, rank, factors, device)
    inside = []
    for tensor in (weight, adapter.a, adapter.b):
        buffer = torch.full((tensor.numel() + 512,), float("nan"), device=device)
        buffer = buffer.to(tensor.dtype)
        inside.append(buffer[256:-256].view(tensor.shape).copy_(tensor))
    out = torch.empty_like(weight)
    kernel.merge(inside[0], out, [inside[1]], [inside[2]], [adapter.scale], None, config)
    assert_within_budget(out, weight, [adapter])


def test_random_bits_do_not_depend_on_the_configuration(device):
    weight = make_weight((2, 70, 136), "bf16", device)
    adapter = make_adapter(weight.shape, 16, "bf16", device)
    results = []
    for config in kernel.configs("native", stochastic=True, arch=90):
        out = torch.empty_like(weight)
        kernel.merge(weight, out, [adapter.a], [adapter.b], [adapter.scale], 5, config)
        results.append(out)
    for other in results[1:]:
        # The accumulator's last bit may differ between tile shapes.
        assert (results[0] != other).double().mean() < 1e-3


@pytest.mark.parametrize("rank", [1, 16, 20, 64, 130])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_parts_and_scale_give_the_factor_back(layout, dtype, rank, device):
    """Every row of B and column of A to 22 bits, or to 2**-39 of its largest entry."""
    spread = torch.exp2(torch.linspace(-100, 60, 70, device=device))
    a, b, _ = make_adapter((2, 70, 70), rank, "fp32", device)
    b *= spread.unsqueeze(1)
    a = (a if dtype == "fp16" else a * spread).to(DTYPES[dtype])
    a[0, 0, 3], b[1, 5, 0] = float("inf"), float("nan")
    if layout == "transposed":
        a, b = a.mT.contiguous().mT, b.mT.contiguous().mT
    padded = 192 if rank > 128 else max(16, kernel.triton.next_power_of_2(rank))
    parts = torch.full((2, 2, 2 * padded * 70), torch.nan, dtype=torch.float16, device=device)
    scales = torch.full((2, 2, 70), torch.nan, device=device)
    weight = make_weight((2, 70, 70), "bf16", device)
    split = kernel._prepare(weight, weight, a, b, False, None, None).split
    assert split is not None
    split(a, b, parts, scales)
    a_parts, b_parts = (half.view(2, 2, padded, 70) for half in parts.unbind(1))
    a_scale, b_scale = scales.unbind(1)
    b_parts = b_parts.view(2, 2, 70, padded)
    for x, parts, scale in ((a.mT, a_parts.mT, a_scale), (b, b_parts, b_scale)):
        given = parts.double().sum(1) * scale.double().unsqueeze(-1)
        finite = x.isfinite()
        size = torch.where(finite, x.double().abs(), 0)
        allowed = 2**-22 * size + 2**-39 * size.amax(-1, keepdim=True)
        assert ((given[..., :rank] - x.double()).abs() <= allowed)[finite].all()
        assert not given[..., :rank][~finite].isfinite().any()
        assert (given[..., rank:] == 0).all()
        assert torch.equal(scale, torch.exp2(torch.log2(scale).round()))


def test_rows_and_columns_of_any_size_are_merged_to_float32_accuracy(device):
    rows, columns = 60, 136
    a, b, scale = make_adapter((rows, columns), 16, "fp32", device)
    a *= torch.exp2(torch.arange(columns, device=device) % 81 - 40)
    b *= torch.exp2(torch.arange(rows, device=device) % 79 - 39).unsqueeze(1)
    weight = -(scale * (b.double() @ a.double())).to(torch.bfloat16)
    adapter = Adapter(a, b, scale)
    assert_rounded_once(lora_merge(weight, *adapter, impl="triton"), weight, [adapter])


@pytest.mark.parametrize(
    ("weight", "a", "b", "scale"),
    [
        pytest.param(1.0, [0.0, 1e24], [1e24, 0.0], 1.0, id="largest entries never meet"),
        pytest.param(1.0, [0.0, 3e38], [3e38, 0.0], 1.0, id="of the largest numbers"),
        pytest.param(0.0, [1e-19], [1e-19], 1.0, id="smallest products"),
        pytest.param(0.0, [2.0**-63], [2.0**-63], 2.0**100, id="small products, large scale"),
        pytest.param(0.0, [2.0**-120], [2.0**120], 1.0, id="small times large"),
        pytest.param(0.0, [2.0**127], [2.0**-127], 1.0, id="largest times smallest"),
        pytest.param(0.0, [1e24], [-1e24], 1.0, id="overflow"),
    ],
)
def test_split_factors_of_extreme_sizes_give_what_float32_gives(weight, a, b, scale, device):
    w = torch.tensor([[weight]], dtype=torch.bfloat16, device=device)
    factor_a, factor_b = torch.tensor([a], device=device).mT, torch.tensor([b], device=device)
    adapter = Adapter(factor_a, factor_b, scale)
    for given in (adapter, Adapter(factor_b.mT, factor_a.mT, scale)):
        merged = lora_merge(w, *given, impl="triton")
        assert torch.equal(merged, lora_merge(w, *given, impl="eager"))


def test_addresses_beyond_two_to_the_31(device):
    """Three rows with 2**30 entries between them: only a few pages of the buffer are touched."""
    step = (1 << 30) + 8
    buffer = torch.empty(2 * step + 32, dtype=torch.bfloat16, device=device)
    weight = buffer.as_strided((3, 20), (step, 1))
    weight.copy_(make_weight((3, 20), "bf16", device))
    adapter = make_adapter(weight.shape, 4, "bf16", device)
    before = weight.clone()
    lora_merge_(weight, *adapter, impl="triton")
    assert_within_budget(weight, before, [adapter])


class _Kernel:
    """Stands for a kernel and for what it is compiled to, and notes their launches."""

    def __init__(self, name: str, launched: list[str], compiled: Any = None) -> None:
        self.name, self.launched, self.compiled = name, launched, compiled

    def __getitem__(self, grid: Any) -> Any:
        return self.launch

    def launch(self, *arguments: Any, **options: Any) -> Any:
        self.launched.append(self.name)
        return self.compiled


class _Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("factors", ["bf16", "fp32"])
def test_a_second_call_binds_no_arguments_and_computes_nothing_on_the_host(
    factors, monkeypatch, device
):
    launched: list[str] = []
    names = ["lora_merge_kernel"] if factors == "bf16" else ["split_kernel", "lora_merge_kernel"]
    for name in names:
        compiled = _Kernel(f"compiled {name}", launched)
        monkeypatch.setattr(kernel, name, _Kernel(name, launched, compiled))
    monkeypatch.setattr(kernel, "_known", {})
    weight = make_weight((24, 40), "bf16", device)
    adapter = make_adapter(weight.shape, 8, factors, device)
    lora_merge_(weight, *adapter, impl="triton")
    assert launched == names
    with _Operators() as operators:
        lora_merge_(weight, *adapter, impl="triton")
    assert launched[len(names) :] == [f"compiled {name}" for name in names]
    work = [name for name in operators.names if not name.startswith(("aten.detach", "gift"))]
    assert len(work) <= 2 and set(work) <= {"aten.new_empty.default"}
    odd = torch.cat([weight.view(-1), weight.view(-1)])[1:961].view(24, 40)
    for other in (weight[:, :8], weight.half(), odd):
        launched.clear()
        a, b, scale = make_adapter(other.shape, 8, factors, device)
        lora_merge_(other, a, b, scale, impl="triton")
        assert launched == names


def test_the_environment_is_heeded_for_calls_seen_before(monkeypatch, device):
    launched: list[str] = []
    tuner = _Kernel("tuned", launched, _Kernel("tuned again", launched))
    monkeypatch.setattr(kernel, "_autotuned", lambda *_: tuner)
    first = _Kernel("first", launched, _Kernel("first again", launched))
    monkeypatch.setattr(kernel, "lora_merge_kernel", first)
    monkeypatch.setattr(kernel, "_known", {})
    compiling = SimpleNamespace(runtime=SimpleNamespace(interpret=False))
    monkeypatch.setattr(kernel, "knobs", compiling)
    weight = make_weight((24, 40), "bf16", device)
    adapter = make_adapter(weight.shape, 8, "bf16", device)
    for value in ("1", "0", "1", "0"):
        monkeypatch.setenv(kernel.AUTOTUNE_VARIABLE, value)
        lora_merge_(weight, *adapter, impl="triton")
    assert launched == ["tuned", "first", "tuned again", "first again"]


class _Tuner(Autotuner):
    """Finds another configuration for every call, and waits for other calls before it returns."""

    def __init__(self) -> None:
        self.calls = threading.Barrier(2)

    def run(self, rows: int, **_: Any) -> Any:
        self.best_config = kernel.triton.Config({"BLOCK_M": rows})
        with contextlib.suppress(threading.BrokenBarrierError):  # no call came in between
            self.calls.wait(0.2)
        return f"compiled for {rows}"


def test_threads_that_share_an_autotuner_keep_their_own_configurations():
    tuner = _Tuner()
    launches = [kernel.Launch(tuner, lambda tiles: tiles["BLOCK_M"], (n,), {}) for n in (32, 64)]
    with ThreadPoolExecutor(2) as threads:
        kept = list(threads.map(lambda launch: launch(), launches))
    assert [(k.kernel, k.grid) for k in kept] == [("compiled for 32", 32), ("compiled for 64", 64)]


def test_explicit_requests_are_never_replaced(monkeypatch, device):
    weight = make_weight((4, 5), "fp32", device)
    adapter = make_adapter(weight.shape, 2, "fp32", device)
    with pytest.raises(ValueError, match="float64"):
        lora_merge(weight.double(), *adapter, impl="triton")
    monkeypatch.delitem(os.environ, "TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="TRITON_INTERPRET"):
        lora_merge(weight.cpu(), adapter.a.cpu(), adapter.b.cpu(), 1.0, impl="triton")
    with pytest.raises(ValueError, match="impl"):
        lora_merge(weight, *adapter, impl="cuda")  # pyright: ignore[reportArgumentType]


def test_each_implementation_is_the_one_asked_for(monkeypatch, device):
    used = []
    monkeypatch.setattr(kernel, "merge", lambda *_: used.append("triton"))
    op = importlib.import_module("gift_kernels.lora_merge.api")
    monkeypatch.setattr(op, "merge_in_blocks", lambda *_: used.append("eager"))
    weight = make_weight((4, 5), "fp32", device)
    adapter = make_adapter(weight.shape, 2, "fp32", device)
    for impl in ("triton", "eager", "auto"):
        lora_merge(weight, *adapter, impl=impl)
    assert used == ["triton", "eager", "triton" if device == "cuda" else "eager"]


@pytest.mark.parametrize("factors", ["bf16", "fp32"])
def test_autotuning_in_place_leaves_one_merge(factors, monkeypatch, device):
    """Timing runs a kernel many times: the weight must be put back before each."""
    monkeypatch.setattr(kernel, "_autotuning", lambda: True)
    if device == "cpu":

        def run_twice(call, quantiles, **_times):
            call()
            call()
            return [1.0] * len(quantiles)

        monkeypatch.setattr(kernel.triton.testing, "do_bench", run_twice)
    kernel._autotuned.cache_clear()
    weight = make_weight((70, 136), "bf16", device)
    adapter = make_adapter(weight.shape, 12, factors, device)
    before = weight.clone()
    lora_merge_(weight, *adapter, impl="triton")
    assert_rounded_once(weight, before, [adapter])
    assert_rounded_once(lora_merge(before, *adapter, impl="triton"), before, [adapter])
    kernel._autotuned.cache_clear()


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements(device):
    rows, columns = 33_000, 66_000
    weight = torch.zeros(rows, columns, dtype=torch.bfloat16, device=device)
    adapter = make_adapter(weight.shape, 8, "bf16", device)
    lora_merge_(weight, *adapter)
    for part in (slice(0, 64), slice(rows // 2, rows // 2 + 64), slice(rows - 64, rows)):
        few = adapter._replace(b=adapter.b[part])
        start = torch.zeros(64, columns, dtype=torch.bfloat16, device=device)
        error = (weight[part].double() - truth(start, [few])).abs().max()
        assert error <= 2**-8 * truth(start, [few]).abs().max()
