"""nll, q, weights, entropy and gradients keep their accuracy at any offset and for sure tokens.

Logits are exact in float32 here, so that the truth is float64 on the same logits.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ce_cases import IMPLS, norm_error
from torch import Tensor

from gift_kernels import (
    Guide,
    TokenStats,
    VocabParallel,
    reference,
    token_confidence,
    weighted_ce,
)

every_impl = pytest.mark.parametrize("impl", IMPLS)
OFFSETS = [0.0, 1e2, 1e4, 1e6]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TARGET = torch.tensor([6, 3, 0, 10])


def offset_problem(offset: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """hidden [4, 3] and head [64, 3] with integer logits, all of a row about `offset`.

    An offset is a product of numbers that 16 bits hold, too.
    """
    rows = torch.tensor([[1.0, 1.0], [1.0, 2.0], [1.0, 0.5], [1.0, 3.0]])
    large = {0.0: (0.0, 0.0), 1e2: (10.0, 10.0), 1e4: (100.0, 100.0), 1e6: (1000.0, 1000.0)}[offset]
    head = torch.stack([torch.full((64,), large[1]), torch.arange(64) % 7.0, torch.zeros(64)], 1)
    hidden = torch.cat([rows[:, :1] * large[0], rows[:, 1:], torch.ones(4, 1)], 1)
    return hidden.to(dtype), head.to(dtype)


def sure_problem(nll: float, offset: float) -> tuple[Tensor, Tensor, Tensor]:
    """One row whose target has about this nll: the target's logit is a quarter's multiple."""
    lead = round(-4 * torch.log(torch.tensor(nll / 31)).item()) / 4
    head = torch.zeros(32, 2)
    head[5, 1] = lead
    head[:, 0] = offset
    return torch.ones(1, 2), head, torch.tensor([5])


def relative(value: Tensor, true: Tensor) -> float:
    return float(((value.double() - true).abs() / true.abs()).max())


@every_impl
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", OFFSETS)
def test_an_offset_of_all_logits_costs_no_accuracy(
    offset: float, dtype: torch.dtype, impl: str, device: str
) -> None:
    hidden, head = (value.to(device) for value in offset_problem(offset, dtype))
    target = TARGET.to(device)
    logits = hidden.float() @ head.float().T
    assert torch.equal(logits.double(), hidden.double() @ head.double().T)
    exact = logits.double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(exact, target, reduction="none")
    probability = exact.softmax(-1).detach()
    entropy = -(probability * probability.log()).sum(-1)
    hidden.requires_grad_()
    head.requires_grad_()
    weight = torch.ones(4, device=device)
    loss, stats = weighted_ce(
        hidden, head, target, weight, reduction="none", stats=TokenStats._fields, impl=impl
    )
    loss.sum().backward()
    (dlogits,) = torch.autograd.grad(expected.sum(), exact)
    assert stats.nll is not None and stats.confidence is not None and stats.entropy is not None
    assert relative(stats.nll, expected.detach()) <= 1e-6
    assert relative(loss.detach(), expected.detach()) <= 1e-6
    assert relative(stats.confidence, torch.exp(-expected.detach())) <= 2e-6
    assert relative(stats.entropy, entropy) <= 2e-6
    allowed = 2e-6 if dtype == torch.float32 else 1e-2
    assert head.grad is not None
    # The first column of dW sums to what cancels: it is judged by the size of its terms.
    true = dlogits.T @ hidden.detach().double()
    size = dlogits.abs().T @ hidden.detach().double().abs()
    assert ((head.grad.double() - true).abs() <= allowed * size).all()


@every_impl
@pytest.mark.parametrize("offset", [0.0, 1e4, 1e6])
@pytest.mark.parametrize("nll", [1e-3, 1e-5, 1e-7, 1e-9, 1e-12])
def test_the_nll_of_a_nearly_certain_token_is_not_lost(
    nll: float, offset: float, impl: str, device: str
) -> None:
    hidden, head, target = (value.to(device) for value in sure_problem(nll, offset))
    logits = hidden @ head.T
    assert torch.equal(logits.double(), hidden.double() @ head.double().T)
    others = logits.double()[:, torch.arange(32, device=device) != 5] - logits.double()[:, 5:6]
    expected = torch.log1p(others.exp().sum(-1))
    assert 0.5 * nll < float(expected) < 2 * nll
    head.requires_grad_()
    loss, stats = weighted_ce(hidden, head, target, stats=("nll", "entropy"), impl=impl)
    loss.backward()
    assert stats.nll is not None and stats.entropy is not None and head.grad is not None
    assert relative(stats.nll, expected) <= 1e-6
    assert relative(loss.detach(), expected) <= 1e-6
    assert relative(-head.grad[5, 1:], -torch.expm1(-expected)) <= 2e-6
    q = torch.exp(-expected)
    p = others.exp() * q
    entropy = q * expected - (p * p.log()).sum(-1)
    assert relative(stats.entropy, entropy) <= 2e-6


@every_impl
@pytest.mark.parametrize("temperature", [0.7, 3.0])
@pytest.mark.parametrize("offset", OFFSETS)
def test_confidences_and_guide_weights_know_no_offset(
    offset: float, temperature: float, impl: str, device: str
) -> None:
    hidden, head = (value.to(device) for value in offset_problem(offset, torch.float32))
    target = TARGET.to(device)
    logits = hidden.double() @ head.double().T
    own = logits.softmax(-1).gather(1, target[:, None]).squeeze(1)
    soft = (logits / temperature).softmax(-1).gather(1, target[:, None]).squeeze(1)
    q = token_confidence(hidden, head, target, temperature=temperature, impl=impl)
    assert relative(q, soft) <= 2e-6
    guide = Guide(hidden, head, temperature=temperature)
    for options, expected in (({"guide": guide}, soft), ({"token_weight": "self"}, own)):
        _, stats = weighted_ce(hidden, head, target, stats=("weight",), impl=impl, **options)
        assert stats.weight is not None and relative(stats.weight, expected) <= 2e-6


def offset_on_ranks(rank: int, folder: str, impl: str, device: str) -> None:
    """One process of two: statistics and dH from its slice of the vocabulary at every offset."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    assert dist.group.WORLD is not None
    start, end = ((0, 5), (5, 64))[rank]
    shard, found = VocabParallel(dist.group.WORLD, start), {}
    for offset in OFFSETS:
        hidden, head = (value.to(device) for value in offset_problem(offset, torch.float32))
        hidden.requires_grad_()
        loss, stats = weighted_ce(
            hidden,
            head[start:end],
            TARGET.to(device),
            reduction="sum",
            stats=("nll", "entropy"),
            vocab_parallel=shard,
            impl=impl,
        )
        loss.backward()
        found[offset] = (stats.nll, stats.entropy, hidden.grad)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@every_impl
def test_ranks_that_share_a_vocabulary_know_no_offset(
    impl: str, device: str, tmp_path: Path
) -> None:
    torch.multiprocessing.spawn(offset_on_ranks, (str(tmp_path), impl, device), nprocs=2)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", map_location="cpu")
        for offset, (nll, entropy, gradient) in found.items():
            hidden, head = (value.double() for value in offset_problem(offset, torch.float32))
            exact = (hidden @ head.T).requires_grad_()
            true = torch.nn.functional.cross_entropy(exact, TARGET, reduction="none")
            probability = exact.softmax(-1).detach()
            assert relative(nll, true.detach()) <= 1e-6
            assert relative(entropy, -(probability * probability.log()).sum(-1)) <= 2e-6
            (dlogits,) = torch.autograd.grad(true.sum(), exact)
            size = dlogits.abs() @ head.abs()
            assert ((gradient.double() - dlogits @ head).abs() <= 2e-6 * size).all()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("offset", OFFSETS)
def test_the_specification_in_float32_is_as_exact(offset: float, temperature: float) -> None:
    hidden, head = offset_problem(offset, torch.float32)
    found = reference.token_confidence(hidden, head, TARGET, temperature=temperature)
    exact = hidden.double() @ head.double().T / temperature
    nll = torch.nn.functional.cross_entropy(exact, TARGET, reduction="none")
    assert found.nll is not None and relative(found.nll, nll) <= 1e-6


def test_the_specification_has_the_gradient_of_cross_entropy() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 9, generator=generator, dtype=torch.float64)
    logits[0, 4] = 30
    logits[1, 2] = logits[1, 3] = 5  # a tie for the largest
    target = torch.tensor([4, 2, 0, 1, 8, 3])
    logits.requires_grad_()
    stats = reference.token_stats(logits, target)
    assert stats.nll is not None
    (found,) = torch.autograd.grad(stats.nll.sum(), logits)
    loss = torch.nn.functional.cross_entropy(logits, target, reduction="sum")
    (true,) = torch.autograd.grad(loss, logits)
    assert norm_error(found, true) <= 1e-14
    assert torch.autograd.gradcheck(lambda z: reference.token_stats(z, target)[0], logits)
