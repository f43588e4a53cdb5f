"""lora_merge under torch.compile and fake tensors, and what it says to wrong arguments."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from gift_kernels.lora_merge.api import lora_merge, lora_merge_


def _inputs(device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((12, 20), (3, 20), (12, 3))
    weight, a, b = (torch.randn(shape, generator=generator) for shape in shapes)
    return weight.to(device), a.to(device), b.to(device)


def test_compiles_without_a_graph_break(device):
    def step(weight, a, b):
        doubled = weight * 2
        lora_merge_(doubled, [a, a], [b, b], [0.5, 0.25])
        return doubled, lora_merge(weight, a, b, 0.5) + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(*_inputs(device)), step(*_inputs(device)), strict=True):
        assert torch.equal(got, expected)


def test_compiled_merge_in_place_changes_its_argument(device):
    weight, a, b = _inputs(device)
    expected = lora_merge(weight, a, b, 0.5)
    compiled = torch.compile(
        lambda w: lora_merge_(w, a, b, 0.5), fullgraph=True, backend="aot_eager"
    )
    compiled(weight)
    assert torch.equal(weight, expected)


@pytest.mark.parametrize("name", ["lora_merge", "lora_merge_"])
def test_operator_is_registered_rightly(name, device):
    weight, a, b = _inputs(device)
    operator = getattr(torch.ops.gift_kernels, name).default
    torch.library.opcheck(operator, (weight, [a], [b], [0.5], False, None, "auto"))


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "columns"])
def test_fake_result_has_the_strides_of_the_real_one(layout, device):
    weight, a, b = _inputs(device)
    if layout == "transposed":
        weight = weight.mT.contiguous().mT
    elif layout == "columns":
        weight, a = weight[:, 2:14], a[:, 2:14]
    real = lora_merge(weight, a, b, 0.5)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(tensor) for tensor in (weight, a, b)]
        fake = lora_merge(fakes[0], fakes[1], fakes[2], 0.5)
    assert fake.shape == real.shape and fake.stride() == real.stride()


WEIGHT, A, B = torch.zeros(4, 6), torch.zeros(2, 6), torch.zeros(4, 2)
EXPERTS = torch.zeros(3, 4, 6)
WRONG = {
    "weight is a list": ((WEIGHT.tolist(), A, B, 1.0), {}, TypeError, "weight.*list"),
    "integer weight": ((WEIGHT.int(), A, B, 1.0), {}, TypeError, "weight.*int32"),
    "vector weight": ((WEIGHT[0], A, B, 1.0), {}, ValueError, r"weight.*\[M, K\].*\[6\]"),
    "complex factor": ((WEIGHT, A, B.to(torch.complex64), 1.0), {}, TypeError, "lora_b.*complex64"),
    "number as factor": ((WEIGHT, [3.0], B, 1.0), {}, TypeError, "lora_a.*float"),
    "wrong columns": ((WEIGHT, A[:, :5], B, 1.0), {}, ValueError, r"lora_a.*\[R, 6\].*\[2, 5\]"),
    "wrong rank": ((WEIGHT, A, B[:, :1], 1.0), {}, ValueError, r"lora_b.*\[4, 2\].*\[4, 1\]"),
    "wrong rows": ((WEIGHT, A, B[:3], 1.0), {}, ValueError, r"lora_b.*\[4, 2\].*\[3, 2\]"),
    "factors swapped": ((WEIGHT, B, A, 1.0), {}, ValueError, "lora_a"),
    "second adapter": ((WEIGHT, [A, A], [B, A], 1.0), {}, ValueError, r"lora_b\[1\]"),
    "not transposed": ((WEIGHT, A, B, 1.0), {"fan_in_fan_out": True}, ValueError, "fan_in_fan_out"),
    "matrix for experts": ((EXPERTS, A, B, 1.0), {}, ValueError, "lora_a.*each expert"),
    "wrong experts": (
        (EXPERTS, A.expand(2, 2, 6), B.expand(3, 4, 2), 1.0),
        {},
        ValueError,
        r"lora_a.*\[3, R, 6\]",
    ),
    "no adapter": ((WEIGHT, [], [], []), {}, ValueError, "lora_a.*empty"),
    "one factor less": ((WEIGHT, [A, A], [B], 1.0), {}, ValueError, "lora_b.*2.*1"),
    "one scale less": ((WEIGHT, [A, A], [B, B], [1.0]), {}, ValueError, "scale.*2.*1"),
    "text as scale": ((WEIGHT, A, B, ["2"]), {}, TypeError, "scale.*str"),
    "tensor as scale": ((WEIGHT, A, B, torch.ones(1)), {}, ValueError, "scale.*tensor"),
    "text as flag": ((WEIGHT, A, B, 1.0), {"fan_in_fan_out": "no"}, TypeError, "fan_in_fan_out"),
    "float32 rounded stochastically": (
        (WEIGHT, A, B, 1.0),
        {"stochastic_rounding_seed": 1},
        ValueError,
        "stochastic_rounding_seed.*float32",
    ),
    "negative seed": (
        (WEIGHT.bfloat16(), A, B, 1.0),
        {"stochastic_rounding_seed": -1},
        ValueError,
        "stochastic_rounding_seed.*-1",
    ),
    "other device": ((WEIGHT, A.to("meta"), B, 1.0), {}, ValueError, "lora_a.*meta.*cpu"),
    "unknown impl": ((WEIGHT, A, B, 1.0), {"impl": "cuda"}, ValueError, "impl.*cuda"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_named(case):
    arguments, options, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        lora_merge(*arguments, **options)


def test_expanded_weights_cannot_be_overwritten():
    with pytest.raises(ValueError, match=r"weight.*clone"):
        lora_merge_(WEIGHT[:1].expand(4, 6), A, B, 1.0)
