"""What weighted_ce and token_confidence refuse, and the words they refuse it with."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ce_cases import IMPLS

from gift_kernels import (
    Guide,
    VocabParallel,
    WeightTransform,
    checks,
    implementation,
    token_confidence,
    weighted_ce,
)

every_impl = pytest.mark.parametrize("impl", IMPLS)
COUNT, SIZE, VOCAB = 6, 8, 10


def zeros(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def proper() -> dict[str, Any]:
    return {
        "hidden": zeros(COUNT, SIZE),
        "lm_head_weight": zeros(VOCAB, SIZE),
        "target": zeros(COUNT, dtype=torch.int64),
    }


GUIDE = Guide(zeros(COUNT, 4), zeros(VOCAB, 4))


def guide(**changes: Any) -> dict[str, Any]:
    return {"guide": replace(GUIDE, **changes)}


BY_BOTH: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {"lm_head_weight": zeros(VOCAB, SIZE, 1)},
        ValueError,
        "lm_head_weight: expected shape [V, D] with V >= 1, got [10, 8, 1]",
    ),
    (
        {"hidden": zeros(COUNT, SIZE - 1)},
        ValueError,
        "hidden and lm_head_weight: expected one last dimension D, got shapes [6, 7] and [10, 8]",
    ),
    (
        {"target": zeros(COUNT - 1, dtype=torch.int64)},
        ValueError,
        "target: expected shape [6] (hidden's without the last), got [5]",
    ),
    (
        {"hidden": zeros(COUNT, SIZE, device="meta")},
        ValueError,
        "hidden: expected device cpu, got meta",
    ),
    (
        {"target": zeros(COUNT, dtype=torch.int64, device="meta")},
        ValueError,
        "target: expected device cpu, got meta",
    ),
    (
        {"lm_head_weight": zeros(VOCAB, SIZE, dtype=torch.int32)},
        TypeError,
        "lm_head_weight: expected one of bfloat16, float16, float32, float64, got torch.int32",
    ),
    (
        {"hidden": zeros(COUNT, SIZE, dtype=torch.bfloat16)},
        TypeError,
        "hidden and lm_head_weight: expected one dtype, got torch.bfloat16 and torch.float32; "
        "cast one",
    ),
    (
        {"bias": zeros(VOCAB + 1)},
        ValueError,
        "bias: expected shape [10] (a number for each row of the head), got [11]",
    ),
    (
        {"target": zeros(COUNT)},
        TypeError,
        "target: expected one of int64, int32, got torch.float32",
    ),
    ({"logit_scale": -1.0}, ValueError, "logit_scale: expected a positive number, got -1.0"),
    ({"logit_softcap": 0.0}, ValueError, "logit_softcap: expected a positive number, got 0.0"),
    ({"chunk_size": 0}, ValueError, "chunk_size: expected 1 to 9223372036854775807, got 0"),
    (
        {"vocab_parallel": VocabParallel("world", 0)},  # pyright: ignore[reportArgumentType]
        TypeError,
        "vocab_parallel.group: expected a ProcessGroup, got 'world' (str)",
    ),
    ({"impl": "cuda"}, ValueError, 'impl: expected "auto", "triton" or "eager", got \'cuda\''),
]
BY_WEIGHTED_CE: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {"token_weight": zeros(COUNT + 1)},
        ValueError,
        "token_weight: expected shape [6] (target's), got [7]",
    ),
    (
        {"token_weight": zeros(COUNT, dtype=torch.int64)},
        TypeError,
        "token_weight: expected one of bfloat16, float16, float32, float64, got torch.int64",
    ),
    (
        {"token_weight": "guide"},
        ValueError,
        "token_weight: expected a tensor, \"self\" or None, got 'guide'",
    ),
    (
        guide() | {"token_weight": zeros(COUNT)},
        ValueError,
        "token_weight and guide: both set the weights; pass one of them",
    ),
    (
        {"guide": (zeros(COUNT, 4), zeros(VOCAB, 4))},
        TypeError,
        "guide: expected a Guide, got tuple",
    ),
    (
        guide(hidden=zeros(COUNT, SIZE)),
        ValueError,
        "guide.hidden and guide.lm_head_weight: expected one last dimension D, got shapes [6, 8]",
    ),
    (
        guide(hidden=zeros(COUNT + 1, 4)),
        ValueError,
        "guide.hidden: expected shape [6, 4] (rows of hidden), got [7, 4]",
    ),
    (
        guide(hidden=zeros(COUNT, 4, dtype=torch.float16)),
        TypeError,
        "guide.hidden and guide.lm_head_weight: expected one dtype, got torch.float16 and",
    ),
    (
        guide(bias=zeros(3)),
        ValueError,
        "guide.bias: expected shape [10] (a number for each row of the head), got [3]",
    ),
    (
        guide(temperature=-1.0),
        ValueError,
        "guide.temperature: expected a positive number, got -1.0",
    ),
    (
        guide(logit_softcap=float("inf")),
        ValueError,
        "guide.logit_softcap: expected a positive number, got inf",
    ),
    (
        {"reduction": "average"},
        ValueError,
        'reduction: expected "none", "sum", "mean" or "weighted_mean", got \'average\'',
    ),
    (
        {"reduction": "sum", "normalizer": 3.0},
        ValueError,
        "normalizer: only divides the reductions mean and weighted_mean, not sum",
    ),
    (
        {"normalizer": zeros(2)},
        ValueError,
        "normalizer: expected one number on cpu, got a tensor of shape [2], torch.float32, on cpu",
    ),
    (
        {"transform": WeightTransform(power=-0.5)},
        ValueError,
        "transform.power: expected a number >= 0, got -0.5",
    ),
    (
        {"transform": WeightTransform(floor=-1.0)},
        ValueError,
        "transform.floor: expected a number >= 0, got -1.0",
    ),
]


def message_id(value: object) -> str:
    return re.sub(r"\W+", "-", value)[:40] if isinstance(value, str) else ""


@pytest.mark.parametrize(("wrong", "error", "message"), BY_BOTH, ids=message_id)
def test_both_refuse(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    for op in (weighted_ce, token_confidence):
        with pytest.raises(error, match=re.escape(message)):
            op(**proper() | wrong)


@pytest.mark.parametrize(("wrong", "error", "message"), BY_WEIGHTED_CE, ids=message_id)
def test_weighted_ce_refuses(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        weighted_ce(**proper() | wrong)


@pytest.mark.parametrize("temperature", [0.0, -2.0, float("nan")])
def test_token_confidence_refuses_a_temperature_that_is_not_positive(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature: expected a positive number, got"):
        token_confidence(**proper(), temperature=temperature)


@every_impl
@pytest.mark.parametrize("value", [VOCAB, -1, 2**40])
def test_a_target_outside_the_vocabulary_is_refused(
    value: int, impl: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(checks.CHECK_TARGETS_VARIABLE, "1")
    given = {name: tensor.to(device) for name, tensor in proper().items()}
    given["target"][[1, 4]] = torch.tensor([-100, value], device=device)
    message = (
        f"target: value {value} at row 4 is outside [0, 10), the rows of lm_head_weight, and is "
        "not ignore_index (-100)"
    )
    for op in (weighted_ce, token_confidence):
        with pytest.raises(ValueError, match=re.escape(message)):
            op(**given, impl=impl)


@every_impl
def test_a_target_that_the_guide_does_not_know_is_refused(
    impl: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(checks.CHECK_TARGETS_VARIABLE, "1")
    given = {name: tensor.to(device) for name, tensor in proper().items()}
    given |= {"guide": Guide(zeros(COUNT, 4, device=device), zeros(VOCAB - 2, 4, device=device))}
    assert weighted_ce(**given, impl=impl).isfinite()
    given["target"][3] = VOCAB - 1
    with pytest.raises(ValueError, match=r"row 3 is outside \[0, 8\), the rows of guide.lm_head"):
        weighted_ce(**given, impl=impl)


@every_impl
def test_where_targets_are_not_read_a_wrong_one_makes_its_row_nan(
    impl: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "reads_targets", lambda target: False)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(COUNT, SIZE, generator=generator).to(device).requires_grad_()
    head = torch.randn(VOCAB, SIZE, generator=generator).to(device)
    target = torch.tensor([0, VOCAB, 9, -1, -100, 3], device=device)
    wrong = torch.tensor([False, True, False, True, False, False], device=device)
    confidence = token_confidence(hidden, head, target, impl=impl)
    assert torch.equal(confidence.isnan(), wrong)
    loss = weighted_ce(hidden, head, target, reduction="none", impl=impl)
    assert torch.equal(loss.isnan(), wrong)
    loss[~wrong].sum().backward()
    assert hidden.grad is not None and hidden.grad.isfinite().all()
    assert weighted_ce(hidden, head, target, impl=impl).isnan()


def test_an_explicit_request_for_triton_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r'impl: "triton" needs CUDA tensors, got cpu; use impl='):
        weighted_ce(**proper(), impl="triton")
    monkeypatch.setattr(implementation, "_triton_installed", lambda: False)
    with pytest.raises(ValueError, match='impl: "triton" is not installed; install Triton'):
        token_confidence(**proper(), impl="triton")


@pytest.mark.parametrize(
    ("capability", "hip", "lacks"),
    [
        ((7, 5), None, "compute capability 8.0 or more, X has 7.5"),
        ((9, 4), "6.4", "a GPU of NVIDIA's, got X"),
        ((8, 0), None, ""),
        ((12, 0), None, ""),
    ],
)
def test_auto_is_eager_on_gpus_that_the_kernels_do_not_know(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], hip: str | None, lacks: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "X")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    tensor: Any = SimpleNamespace(is_cuda=True, dtype=torch.float16, device=torch.device("cuda", 0))
    assert implementation.resolve_impl("auto", {"hidden": tensor}) == (
        "eager" if lacks else "triton"
    )
    assert implementation._gpu_lacks(tensor.device) == lacks
    if lacks:
        with pytest.raises(ValueError, match=f'impl: "triton" needs {lacks}; use impl="auto"'):
            implementation.resolve_impl("triton", {"hidden": tensor})
    torch.compiler.reset()
    asks = torch.compile(
        lambda x: x + 1 if implementation._gpu_lacks(torch.device("cuda", 0)) else x,
        fullgraph=True,
        backend="eager",
    )
    assert asks(torch.zeros(())) == bool(lacks)


def test_auto_is_eager_on_the_cpu() -> None:
    assert implementation.resolve_impl("auto", {"hidden": zeros(1)}) == "eager"
    assert implementation.resolve_impl("eager", {"hidden": zeros(1)}) == "eager"
