"""weighted_ce: every output and gradient against the float64 specification, and its edges."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from ce_cases import (
    CASE,
    CASES,
    CASES_AND_DTYPES,
    IMPLS,
    TRANSFORM,
    Case,
    arrange,
    check_weighted_ce,
    generate,
    model_side,
    readable,
    with_impls,
)
from ce_mutants import install
from torch import Tensor

from gift_kernels import Guide, reference, weighted_ce
from gift_kernels.linear_ce import eager

NAN, INF = float("nan"), float("inf")
every_impl = pytest.mark.parametrize("impl", IMPLS)


def random_problem(count: int = 19, size: int = 16, vocab_size: int = 67) -> dict[str, Tensor]:
    """float32 arguments with weights, all that can be trained a leaf."""
    generator = torch.Generator().manual_seed(7)
    target = torch.randint(vocab_size, (count,), generator=generator)
    hidden, head = model_side(target, size, vocab_size, False, generator)
    return {
        "hidden": hidden.float().requires_grad_(),
        "lm_head_weight": head.float().requires_grad_(),
        "target": target,
        "token_weight": torch.rand(count, generator=generator).requires_grad_(),
    }


def on(device: str, arguments: dict[str, Tensor]) -> dict[str, Any]:
    return {
        name: value.detach().to(device).requires_grad_(value.requires_grad)
        for name, value in arguments.items()
    }


@pytest.mark.parametrize(("case", "dtype", "impl"), with_impls(*CASES_AND_DTYPES), ids=readable)
def test_all_outputs_and_gradients_match_the_specification(
    case: Case, dtype: torch.dtype, impl: str, device: str
) -> None:
    check_weighted_ce(case, dtype, impl, device, lean=False)


@pytest.mark.parametrize(("case", "dtype", "impl"), with_impls(*CASES_AND_DTYPES), ids=readable)
def test_with_a_frozen_head_and_no_statistics_too(
    case: Case, dtype: torch.dtype, impl: str, device: str
) -> None:
    check_weighted_ce(case, dtype, impl, device, lean=True)


@pytest.fixture
def mixed_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager rounds its operands as it does where 16-bit matrices are multiplied into float32."""
    monkeypatch.setattr(eager, "mixed_products", lambda device, dtype: dtype.itemsize == 2)


@pytest.mark.usefixtures("mixed_products")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("lean", [False, True], ids=["", "lean"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_eager_with_16_bit_operands_matches_the_specification(
    case: Case, lean: bool, dtype: torch.dtype, device: str
) -> None:
    check_weighted_ce(case, dtype, "eager", device, lean)


@pytest.mark.usefixtures("mixed_products")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("nll", [1e-3, 1e-6, 1e-9])
def test_the_gradient_of_a_nearly_certain_token_keeps_its_accuracy_in_16_bits(
    nll: float, dtype: torch.dtype, device: str
) -> None:
    """Exponentials of 1e-11 are below the range of float16; rows of W have a common part."""
    generator = torch.Generator().manual_seed(0)
    lead = -torch.log(torch.tensor(nll / 300)).item()
    head = torch.randn(300, 9, generator=generator) + 1
    head[:, 0] = 3 / lead * torch.rand(300, generator=generator)
    head[7, 0] = 1
    head = head.to(device, dtype)
    hidden = torch.tensor([[lead, *[0.0] * 8]], device=device).to(dtype).requires_grad_()
    target, weight = torch.tensor([7], device=device), torch.tensor([1 / nll], device=device)
    weighted_ce(hidden, head, target, weight, impl="eager").backward()
    exact = hidden.detach().double().requires_grad_()
    reference.weighted_ce(exact, head.double(), target, weight.double())[0].backward()
    assert hidden.grad is not None and exact.grad is not None
    error = (hidden.grad.double() - exact.grad).norm() / exact.grad.norm()
    assert error <= {torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype], error


@pytest.mark.usefixtures("mixed_products")
@pytest.mark.parametrize("lead", [50.0, 90.0, 94.0, 100.0, 103.0, 110.0])
def test_a_token_that_is_all_but_certain_has_a_gradient_in_float16(
    lead: float, device: str
) -> None:
    """Other exponentials are smaller than any normal float32."""
    head = torch.zeros(6, 2, dtype=torch.float16, device=device)
    head[3, 0] = lead
    hidden = torch.ones(1, 2, dtype=torch.float16, device=device, requires_grad=True)
    weighted_ce(hidden, head, torch.tensor([3], device=device), impl="eager").backward()
    assert hidden.grad is not None and hidden.grad.abs().max() < 1e-6


@pytest.mark.parametrize("vocab_size", [100, 32000, 128256, 256000, 1 << 28])
def test_chunks_on_a_gpu_are_whole_tiles_of_rows_within_their_bytes(vocab_size: int) -> None:
    rows = eager.rows_per_chunk(vocab_size, torch.bfloat16, device="cuda")
    assert rows == 1 or rows % 128 == 0
    assert rows == 1 or 0.75 * eager.CHUNK_BYTES <= 4 * rows * vocab_size <= eager.CHUNK_BYTES


@pytest.mark.parametrize("id_", ["guide-all-options", "head-options-none", "flat"])
def test_a_vocabulary_of_several_blocks(
    id_: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eager, "VOCAB_BLOCK", 48)
    for lean in (False, True):
        check_weighted_ce(CASE[id_], torch.float32, "eager", device, lean)


@pytest.mark.parametrize("case", [c for c in CASES if c.weighting != "none"], ids=str)
def test_the_weights_of_a_case_really_vary(case: Case) -> None:
    """A case whose weights are all alike would not notice that they are ignored."""
    values = generate(case, torch.float32)
    if (values["target"] != -100).sum() < 5 or case.vocab_size == 1:
        return
    _, arguments = arrange(case, values, torch.float64, "cpu")
    _, stats = reference.weighted_ce(**arguments)
    weight = stats.weight.flatten()[values["target"] != -100]
    assert weight.std() > (0.002 if case.flat else 0.1), weight
    if "transform" in case.options:
        floor, power = TRANSFORM["transform"].floor, TRANSFORM["transform"].power
        at_floor = torch.isclose(weight, torch.tensor(floor**power, dtype=torch.float64))
        for share in (weight == 0, at_floor, weight > floor**power + 0.01):
            assert share.sum() >= 3, f"the transform does nothing: {weight}"


def test_the_specification_agrees_with_cross_entropy_of_pytorch() -> None:
    given = random_problem()
    target = given["target"].clone()
    target[3] = -100
    logits = given["hidden"] @ given["lm_head_weight"].T
    for reduction in ("none", "sum", "mean"):
        loss, _ = reference.weighted_ce(
            given["hidden"], given["lm_head_weight"], target, reduction=reduction
        )
        theirs = torch.nn.functional.cross_entropy(logits, target, reduction=reduction)
        torch.testing.assert_close(loss, theirs)


@every_impl
@pytest.mark.parametrize("poison", [NAN, INF])
@pytest.mark.parametrize("stats", [None, ("nll",)], ids=["", "stats"])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "weighted_mean"])
def test_a_row_of_weight_0_contributes_exactly_0_even_with_poisoned_hidden_states(
    reduction: Any, stats: Any, poison: float, impl: str, device: str
) -> None:
    given = on(device, random_problem())
    rows = [0, 5, 18]
    with torch.no_grad():
        given["token_weight"][rows] = 0
    clean_loss = weighted_ce(**given, reduction=reduction, impl=impl)
    clean_loss.sum().backward()
    poisoned = {
        name: value.detach().clone().requires_grad_(value.requires_grad)
        for name, value in given.items()
    }
    with torch.no_grad():
        poisoned["hidden"][rows] = poison
    result: Any = weighted_ce(**poisoned, reduction=reduction, impl=impl, stats=stats)
    loss = result[0] if stats else result
    loss.sum().backward()
    torch.testing.assert_close(loss, clean_loss)
    for name in ("hidden", "lm_head_weight", "token_weight"):
        gradient, clean = poisoned[name].grad, given[name].grad
        assert gradient is not None and clean is not None
        if name == "token_weight":
            # The poisoned rows' nll is unknown, so their weight has no gradient.
            share = clean_loss.detach() if reduction == "weighted_mean" else 0
            expected = -share / given["token_weight"].sum() * torch.ones(3, device=device)
            torch.testing.assert_close(gradient[rows], expected)
            clean[rows] = gradient[rows]
        if name == "hidden":
            assert not gradient[rows].any()
        torch.testing.assert_close(gradient, clean)


@every_impl
def test_a_weight_of_0_has_the_same_gradient_in_every_reduction(impl: str, device: str) -> None:
    given = on(device, random_problem())
    with torch.no_grad():
        given["token_weight"][4] = 0
    gradients = []
    for reduction in ("none", "sum"):
        loss = weighted_ce(**given, reduction=reduction, impl=impl).sum()
        gradients.append(torch.autograd.grad(loss, given["token_weight"])[0])
    assert gradients[0][4] > 0
    torch.testing.assert_close(gradients[0], gradients[1])


POISONED = {
    "hidden": ("hidden", (4, 2), NAN),
    "hidden-inf": ("hidden", (4, 2), INF),
    "head": ("lm_head_weight", (9, 0), NAN),
    "weight": ("token_weight", (4,), NAN),
    "weight-inf": ("token_weight", (4,), INF),
}


@every_impl
@pytest.mark.parametrize("source", POISONED)
def test_nan_and_infinity_in_a_row_that_counts_reach_the_loss(
    source: str, impl: str, device: str
) -> None:
    given = on(device, random_problem())
    name, place, value = POISONED[source]
    with torch.no_grad():
        given[name][place] = value
        assert not weighted_ce(**given, impl=impl).isfinite()
        rows = weighted_ce(**given, impl=impl, reduction="none")
    spoilt = ~rows.isfinite()
    expected = torch.ones_like(spoilt)
    if name != "lm_head_weight":
        expected = torch.arange(len(rows), device=device) == 4
    assert torch.equal(spoilt, expected), rows


@every_impl
def test_nan_in_a_guide_reaches_the_loss(impl: str, device: str) -> None:
    given = on(device, random_problem())
    del given["token_weight"]
    poisoned = given["hidden"].detach().clone()
    poisoned[4, 2] = NAN
    guide = Guide(poisoned, given["lm_head_weight"])
    rows = weighted_ce(**given, guide=guide, reduction="none", impl=impl)
    assert torch.equal(rows.isnan(), torch.arange(len(rows), device=device) == 4)


@every_impl
def test_a_token_masked_by_a_bias_of_minus_infinity(impl: str, device: str) -> None:
    """As a target it costs infinity; elsewhere it has no probability and no gradient."""
    given = on(device, random_problem())
    bias = torch.zeros(67, device=device)
    bias[11] = -INF
    bias.requires_grad_()
    given["target"][:] = 3
    loss = weighted_ce(**given, bias=bias, impl=impl)
    loss.backward()
    assert loss.isfinite()
    for leaf in (given["hidden"].grad, given["lm_head_weight"].grad, bias.grad):
        assert leaf is not None and leaf.isfinite().all()
    assert bias.grad[11] == 0
    given["target"][2] = 11
    assert weighted_ce(**given, bias=bias, impl=impl) == INF


@every_impl
@pytest.mark.parametrize("weighting", ["tensor", "self", "guide"])
@pytest.mark.parametrize("trainable_head", [False, True])
def test_micro_batches_with_a_global_normalizer_give_the_gradient_of_the_whole(
    trainable_head: bool, weighting: str, impl: str, device: str
) -> None:
    given = on(device, random_problem())
    given["lm_head_weight"].requires_grad_(trainable_head)
    weight = given.pop("token_weight").detach()
    rowwise: dict[str, Any] = {"hidden": given["hidden"], "target": given["target"]}
    shared: dict[str, Any] = {"lm_head_weight": given["lm_head_weight"], "impl": impl}
    if weighting == "guide":
        guide_hidden = given["hidden"].detach().flip(0)
    else:
        rowwise["token_weight"] = weight
    if weighting == "self":
        rowwise["token_weight"] = "self"

    def loss_of(rows: slice, **options: Any) -> Tensor:
        part = {name: v if isinstance(v, str) else v[rows] for name, v in rowwise.items()}
        if weighting == "guide":
            part["guide"] = Guide(guide_hidden[rows], given["lm_head_weight"].detach())
        return weighted_ce(**part, **shared, **options)

    leaves = [given[name] for name in ("hidden", "lm_head_weight") if given[name].requires_grad]
    count = torch.tensor(len(weight), device=device)
    whole = torch.autograd.grad(loss_of(slice(None)), leaves)
    total = [torch.zeros_like(leaf) for leaf in leaves]
    for rows in (slice(0, 1), slice(1, 12), slice(12, 12), slice(12, None)):
        loss = loss_of(rows, normalizer=count)
        for sum_, gradient in zip(total, torch.autograd.grad(loss, leaves), strict=True):
            sum_ += gradient
    for sum_, gradient in zip(total, whole, strict=True):
        torch.testing.assert_close(sum_, gradient)


@every_impl
def test_targets_may_be_int32_and_any_number_may_mean_ignored(impl: str, device: str) -> None:
    given = on(device, random_problem())
    given["target"][3:6] = -100
    expected = weighted_ce(**given, impl=impl)
    given["target"] = given["target"].int()
    torch.testing.assert_close(weighted_ce(**given, impl=impl), expected, rtol=0, atol=0)
    for ignore_index in (-1, 12, 10**6):
        kept = given["target"] != ignore_index
        target = torch.where(kept & (given["target"] != -100), given["target"], ignore_index)
        loss = weighted_ce(**given | {"target": target}, ignore_index=ignore_index, impl=impl)
        same = torch.where(target == ignore_index, -100, target)
        torch.testing.assert_close(loss, weighted_ce(**given | {"target": same}, impl=impl))


@every_impl
def test_a_normalizer_divides_whatever_its_dtype_and_shape(impl: str, device: str) -> None:
    given = on(device, random_problem())
    expected = weighted_ce(**given, reduction="sum", impl=impl) / 40
    for normalizer in (40, torch.tensor(40), torch.tensor([40.0], dtype=torch.float64)):
        loss = weighted_ce(**given, normalizer=normalizer, impl=impl)
        assert loss.shape == () and loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected)


@every_impl
def test_a_guide_gets_no_gradient(impl: str, device: str) -> None:
    given = on(device, random_problem())
    del given["token_weight"]
    guide = [given["hidden"].detach().clone(), given["lm_head_weight"].detach().clone()]
    for leaf in guide:
        leaf.requires_grad_()
    weighted_ce(**given, guide=Guide(*guide), impl=impl).backward()
    assert guide[0].grad is None and guide[1].grad is None
    frozen = {name: value.detach() for name, value in given.items()}
    loss = weighted_ce(**frozen, guide=Guide(*guide), impl=impl)
    assert not loss.requires_grad


# What must be over budget, at the least, when an implementation is broken. One small row is within
# the error that a gradient in bfloat16 has by nature, so there only its loss gives it away.
BROKEN = [
    (torch.bfloat16, "weights-ignored", {"loss", "d_hidden", "d_head"}),
    (torch.bfloat16, "row-skipped", {"loss", "nll"}),
    (torch.float32, "row-skipped", {"loss", "nll", "d_hidden", "d_head"}),
    (torch.bfloat16, "hidden-gradient-zeroed", {"d_hidden"}),
    (torch.bfloat16, "head-gradient-zeroed", {"d_head"}),
    (torch.bfloat16, "head-gradient-doubled", {"d_head"}),
]


@every_impl
@pytest.mark.parametrize(("dtype", "mutation", "broken"), BROKEN, ids=readable)
@pytest.mark.parametrize("case", ["weights-sum", "self", "guide", "guide-none"])
def test_the_check_rejects_a_broken_implementation(
    case: str,
    dtype: torch.dtype,
    mutation: str,
    broken: set[str],
    impl: str,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(monkeypatch, mutation)
    for lean, expected in ((False, broken), (True, broken & {"loss", "d_hidden"})):
        if not expected:
            continue  # a frozen head has no gradient that could be broken
        with pytest.raises(AssertionError, match="over budget") as caught:
            check_weighted_ce(CASE[case], dtype, impl, device, lean)
        named = set(re.findall(r"'(\w+)'", str(caught.value).splitlines()[0]))
        assert expected <= named, str(caught.value)
