"""token_confidence: every statistic against the float64 specification, and how exact q is."""

from __future__ import annotations

import re

import pytest
import torch
from ce_cases import CASE, IMPLS, Case, check_token_confidence, readable, with_impls
from ce_mutants import install
from torch import Tensor

from gift_kernels import token_confidence

every_impl = pytest.mark.parametrize("impl", IMPLS)
# A case of `weighted_ce` gives hidden states, head and its options; weights play no part.
CASES = [
    CASE[id_]
    for id_ in (
        *("unweighted", "bias", "scale", "softcap", "head-options", "flat", "huge-logits"),
        *("batch", "no-batch", "transposed", "sliced", "tied", "one-row", "one-row-ignored"),
        *("no-row", "all-ignored", "one-token", "tile-edges", "past-tile-edges", "large"),
    )
]
CASES_AND_DTYPES = [
    *((case, dtype) for case in CASES for dtype in (torch.float32, torch.bfloat16)),
    *((CASE["head-options"], dtype) for dtype in (torch.float16, torch.float64)),
]


@pytest.mark.parametrize(("case", "dtype", "impl"), with_impls(*CASES_AND_DTYPES), ids=readable)
def test_all_statistics_match_the_specification(
    case: Case, dtype: torch.dtype, impl: str, device: str
) -> None:
    check_token_confidence(case, dtype, impl, device)


@every_impl
@pytest.mark.parametrize("temperature", [0.3, 2.5])
@pytest.mark.parametrize("case", ["unweighted", "head-options"])
def test_temperature_divides_the_logits(
    case: str, temperature: float, impl: str, device: str
) -> None:
    check_token_confidence(CASE[case], torch.bfloat16, impl, device, temperature)


def rivals(count: int, size: int, vocab_size: int, level: float) -> tuple[Tensor, Tensor, Tensor]:
    """bfloat16 hidden states and head that give the target and three more tokens of every row
    logits between `level` and `level` + 3, and the targets."""
    generator = torch.Generator().manual_seed(3)
    head = torch.randn(vocab_size, size, generator=generator) * size**-0.5
    shuffled = torch.rand(count, vocab_size, generator=generator).argsort(1)
    tokens = shuffled[:, :4]
    wanted = level + 3 * torch.rand(count, 4, 1, generator=generator)
    hidden = torch.linalg.pinv(head[tokens]) @ wanted
    return hidden.squeeze(2).bfloat16(), head.bfloat16(), tokens[:, 0].clone()


def q_errors(level: float, impl: str, device: str) -> dict[str, tuple[float, float]]:
    """Largest and mean relative error of q against float64 on the same bfloat16 inputs."""
    hidden, head, target = (value.to(device) for value in rivals(70, 96, 700, level))

    def confidence(logits: Tensor) -> Tensor:
        return logits.softmax(-1).gather(1, target.unsqueeze(1)).squeeze(1)

    logits = hidden.double() @ head.double().T
    truth = confidence(logits)
    assert level + 1 < logits.amax(1).median() < level + 4
    assert truth.min() > 0.005 and truth.median() < 0.9
    ways = {
        "ours": token_confidence(hidden, head, target, impl=impl),
        "bfloat16 logits": confidence((hidden @ head.T).float()),
        "bfloat16 throughout": confidence(hidden @ head.T),
    }
    errors = {name: (q.double() / truth - 1).abs() for name, q in ways.items()}
    return {name: (float(e.max()), float(e.mean())) for name, e in errors.items()}


@every_impl
@pytest.mark.parametrize("level", [20, 25, 30])
def test_q_is_exact_where_sixteen_bit_logits_are_percents_off(
    level: int, impl: str, device: str
) -> None:
    errors = q_errors(level, impl, device)
    assert errors["ours"][0] <= 1e-3, errors
    assert errors["bfloat16 logits"][0] > 0.03, errors


@every_impl
def test_confidence_has_no_gradient_and_is_a_probability(impl: str, device: str) -> None:
    hidden, head, target = (value.to(device) for value in rivals(20, 32, 67, 5))
    target[:3] = -100
    hidden.requires_grad_()
    confidence = token_confidence(hidden, head, target, impl=impl)
    assert confidence.dtype == torch.float32 and not confidence.requires_grad
    assert not confidence[:3].any()
    assert ((confidence[3:] > 0) & (confidence[3:] <= 1)).all()
    for_all = torch.arange(67, device=device).expand(20, 67)
    repeated = hidden.unsqueeze(1).expand(20, 67, 32)
    whole = token_confidence(repeated, head, for_all, impl=impl)
    torch.testing.assert_close(whole.sum(1), torch.ones(20, device=device))


@every_impl
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_poisoned_row_gives_nan_and_leaves_the_others_alone(
    poison: float, impl: str, device: str
) -> None:
    hidden, head, target = (value.to(device) for value in rivals(20, 32, 67, 5))
    clean = token_confidence(hidden, head, target, impl=impl)
    hidden[4, 1] = poison
    _, stats = token_confidence(hidden, head, target, impl=impl, stats=("nll", "confidence"))
    assert stats.confidence is not None and stats.nll is not None
    expected = torch.arange(20, device=device) == 4
    assert torch.equal(stats.confidence.isnan(), expected)
    assert torch.equal(stats.nll.isnan(), expected)
    torch.testing.assert_close(stats.confidence[~expected], clean[~expected])


BROKEN = {
    "row-skipped": {"nll", "confidence", "lse", "entropy"},
    "temperature-ignored": {"nll", "confidence", "lse", "entropy"},
    "confidence-rounded": {"confidence"},
}


@every_impl
@pytest.mark.parametrize("mutation", BROKEN)
def test_the_check_rejects_a_broken_implementation(
    mutation: str, impl: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, mutation)
    with pytest.raises(AssertionError, match="over budget") as caught:
        check_token_confidence(CASE["unweighted"], torch.bfloat16, impl, device, 1.5)
    named = set(re.findall(r"'(\w+)'", str(caught.value).splitlines()[0]))
    assert BROKEN[mutation] <= named, str(caught.value)
