"""What only the Triton implementation of the cross-entropy has: compaction, chunks, references.

Outputs and gradients for every option are judged in the tests that all implementations share.
"""

from __future__ import annotations

import importlib
import weakref
from typing import Any

import pytest
import torch
from ce_cases import (
    CASE,
    Case,
    generate,
    judge,
    model_side,
    norm_error,
    one_tile_chunks,
    outcome,
    poisoned_memory,
)
from ce_problems import (
    BF16,
    FP16,
    FP32,
    NAN,
    ce,
    check,
    plans,
    random_problem,
    tensors,
)
from torch import Tensor

from gift_kernels import TokenStats, reference, weighted_ce
from gift_kernels.linear_ce.types import LinearInputs, Problem, WeightTransform

row_state: Any = importlib.import_module("gift_kernels.linear_ce.triton.row_state")


def small_plan(problem: Problem, guide: LinearInputs | None = None) -> Any:
    """The plan of this device with chunks of one tile."""
    return one_tile_chunks(plans.default_plan(problem.head, guide))


def random_targets(count: int, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    target = torch.randint(-2, 4, (count,), generator=generator)
    return target.masked_fill(target < 0, -100).to(device)


@pytest.mark.parametrize("count", [0, 1, 5, 64, 65, 200])
def test_the_valid_tokens_are_found_in_order(count: int, device: str) -> None:
    target = random_targets(count, device)
    weight = torch.rand(count, device=device)
    weight[::3] = 0
    weight[1::9] = NAN
    for given in (None, weight):
        kept = target != -100
        if given is not None:
            kept &= given != 0
        with poisoned_memory():
            rows = row_state.valid_tokens(target, -100, given)
        expected = kept.nonzero().squeeze(1)
        assert int(rows.count) == len(expected)
        assert torch.equal(rows.index[: len(expected)].long(), expected)
        assert not rows.index[len(expected) :].any()
        place = torch.where(kept, kept.cumsum(0) - 1, -1)
        assert torch.equal(rows.place.long(), place)


def test_hidden_states_of_rows_that_do_not_count_are_never_read(device: str) -> None:
    problem = random_problem(70, 40, 130, BF16, device)
    expected = ce.solve(problem)
    hidden = problem.head.hidden.clone()
    hidden[(problem.target == -100) | (problem.row_weight == 0)] = NAN
    found = ce.solve(problem._replace(head=problem.head._replace(hidden=hidden)))
    for name, value in tensors(found).items():
        assert torch.equal(value, getattr(expected, name)), name


@pytest.mark.parametrize("want_dw", [False, True], ids=["frozen", "trainable"])
def test_chunks_without_a_valid_token(want_dw: bool, device: str) -> None:
    """Rows past the last valid one have the weight of row 0."""
    problem = random_problem(150, 48, 300, BF16, device, want_dw=want_dw, want_db=want_dw)
    check(problem)
    target = problem.target.clone()
    target[0], target[20:] = 3, -100
    check(problem._replace(target=target, row_weight=torch.ones(150, device=device)))


@pytest.mark.parametrize("size", [8, 24, 40, 200])
def test_rows_whose_exponentials_are_kept_and_rows_multiplied_again(size: int, device: str) -> None:
    """dW [V, D] has room for none, some and all of 150 rows; `keep_zero_rows` with NaN in them."""
    for dtype in (BF16, FP32):
        problem = random_problem(150, size, 300, dtype, device, keep_zero_rows=True)
        plan = plans.default_plan(problem.head)
        plan = plan._replace(kept=plan.kept._replace(rows=128))
        found = ce.solve(problem, plan)
        hidden = problem.head.hidden.clone()
        hidden[problem.row_weight == 0] = NAN
        poisoned = ce.solve(problem._replace(head=problem.head._replace(hidden=hidden)), plan)
        assert torch.equal(poisoned.dw, found.dw) and torch.equal(poisoned.db, found.db)
        check(problem._replace(keep_zero_rows=False), plan)


@pytest.mark.parametrize("guide_vocab", [290, 900])
@pytest.mark.parametrize("want_dw", [False, True], ids=["frozen", "trainable"])
def test_a_guide_in_the_same_launches_or_before_them_gives_the_same(
    want_dw: bool, guide_vocab: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two row chunks; the guide is wider than the model or narrower, and has a soft-cap."""
    launches: dict[str, int] = {}
    logits: Any = importlib.import_module("gift_kernels.linear_ce.triton.kernels.logits")

    class Counted:
        def __init__(self, name: str) -> None:
            self.name, self.kernel = name, getattr(logits, name)

        def __getitem__(self, grid: Any) -> Any:
            launches[self.name] = launches.get(self.name, 0) + 1
            return self.kernel[grid]

    for name in ("_logits_kernel", "_two_heads_kernel"):
        monkeypatch.setattr(logits, name, Counted(name))
    problem = random_problem(130, 24, 300, BF16, device, want_dw=want_dw, want_db=want_dw)
    target = problem.target.clamp(max=guide_vocab - 1)
    generator = torch.Generator().manual_seed(5)
    guide = LinearInputs(
        *model_side(target.cpu(), 40, guide_vocab, False, generator), None, 1.0, 20.0
    )
    guide = guide._replace(
        hidden=guide.hidden.to(device, BF16), weight=guide.weight.to(device, BF16)
    )
    changes = {"row_weight": None, "guide": guide, "target": target, "temperature": 1.3}
    plan = small_plan(problem, guide)
    together = ce.solve(problem._replace(**changes), plan)
    one_launch = dict(launches)
    launches.clear()
    # No row is below this threshold, but one might be.
    transform = WeightTransform(1.0, 0.0, 1e-30)
    apart = ce.solve(problem._replace(**changes, transform=transform), plan)
    assert one_launch["_two_heads_kernel"] >= 2
    assert one_launch.get("_logits_kernel", 0) < launches["_logits_kernel"]
    assert "_two_heads_kernel" not in launches
    assert (together.weight > 0).sum() == (target != -100).sum()
    for name, value in tensors(together).items():
        # A GPU has a plan of its own for a guide that goes first, and sums in its order.
        if device == "cpu":
            assert torch.equal(value, getattr(apart, name)), name
        elif value.numel() > 0:
            assert norm_error(value, getattr(apart, name).double()) < 3e-3, name


def solve_deferred(problem: Any, deferred: Any, upstream: Tensor) -> tuple[Tensor, Tensor]:
    dw = torch.full_like(problem.head.weight, torch.nan)
    return ce.solve_deferred(problem.head._replace(weight=dw), deferred, upstream, want_db=True)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_dw_made_in_the_backward_is_rounded_once(dtype: torch.dtype, device: str) -> None:
    """Whatever the upstream gradient; and again the same, because autograd may ask twice."""
    size = 64 if dtype == FP32 else 32
    problem = random_problem(64, size, 300, dtype, device)
    whole, kept = ce.solve(problem), ce.solve(problem._replace(defer=True))
    assert kept.dw is None and torch.equal(kept.dh, whole.dh)
    for upstream in (0.3, 1.0, 0.3):
        factor = torch.tensor(upstream, device=device)
        dw, db = solve_deferred(problem, kept.deferred, factor)
        # In float16 the sum has a scale of its own, which is multiplied in another order.
        dw_rounding, db_rounding = (2**-10, 1e-6) if dtype == FP16 else (0, 0)
        true = (whole.dw * factor).to(dtype)
        torch.testing.assert_close(dw, true, rtol=dw_rounding, atol=dw_rounding / 2**14)
        torch.testing.assert_close(db, whole.db * factor, rtol=db_rounding, atol=0)
    none = solve_deferred(problem, kept.deferred, 0 * factor)
    assert not any(tensor.any() for tensor in none)


def test_the_head_may_change_or_go_before_the_backward(device: str) -> None:
    """As with a ZeRO-3 gather, an optimizer of another loss, or a head made for one call."""
    problem = random_problem(40, 32, 70, BF16, device)
    hidden, head = problem.head.hidden, problem.head.weight.clone().requires_grad_()
    bias = torch.zeros(70, device=device)

    def loss_of(weight: Tensor) -> Tensor:
        return weighted_ce(hidden, weight, problem.target, bias=bias, impl="triton")

    expected = torch.autograd.grad(loss_of(head), head)[0]
    assert bool((expected != 0).any(1).all())
    loss = loss_of(head)
    with torch.no_grad():
        head.zero_()
        bias.fill_(torch.nan)
    assert torch.equal(torch.autograd.grad(loss, head)[0], expected)
    made = (head * 1).detach().requires_grad_() * 2
    alive = weakref.ref(made)
    loss = loss_of(made)
    del made
    assert loss.requires_grad and alive() is None


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_an_answer_is_the_same_bit_by_bit_each_time(dtype: torch.dtype, device: str) -> None:
    problem = random_problem(100, 40, 300, dtype, device)
    first = ce.solve(problem)
    for _ in range(1 if device == "cpu" else 10):
        for name, value in tensors(ce.solve(problem)).items():
            assert torch.equal(value, getattr(first, name)), name


def test_sizes_of_chunks_change_results_by_rounding_only(device: str) -> None:
    problem = random_problem(100, 40, 700, FP32, device)
    plan = small_plan(problem)
    for rows, columns in ((1, 1), (2, 2), (2, 5), (4, 8)):
        shape = type(plan.chunk)(rows * plan.chunk.rows, columns * plan.chunk.columns)
        check(problem, plan._replace(chunk=shape, kept=shape, again=shape, statistics=shape))


@pytest.mark.parametrize("want_dw", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("splits", [1, 3, 20])
def test_parts_of_the_columns_sum_to_dh(splits: int, want_dw: bool, device: str) -> None:
    """A chunk is a few steps over columns wide, so that most of 20 parts are empty."""
    problem = random_problem(40, 40, 600, FP32, device, want_dw=want_dw, want_db=want_dw)
    # References that grow from chunk to chunk: all parts are brought to the new ones.
    head = problem.head
    growing = head.weight * torch.linspace(1, 400, 600, device=device).unsqueeze(1)
    problem = problem._replace(head=head._replace(weight=growing))
    check(problem, small_plan(problem)._replace(splits=splits))


@pytest.mark.parametrize("want_dw", [False, True], ids=["frozen", "trainable"])
def test_targets_weights_and_biases_of_any_strides(want_dw: bool, device: str) -> None:
    problem = random_problem(40, 24, 130, FP32, device, want_dw=want_dw, want_db=want_dw)
    bias = torch.randn(130, device=device)
    guide = LinearInputs(problem.head.hidden, problem.head.weight, bias, 1.0, None)
    plain = problem._replace(head=problem.head._replace(bias=bias))
    # What lies between the values would be taken for a row of another target, or of another weight.
    between = torch.stack([plain.target, torch.full_like(plain.target, 3)], 1)
    strided = plain._replace(
        head=plain.head._replace(bias=bias.repeat_interleave(3)[::3]),
        target=between[:, 0],
        row_weight=torch.stack([plain.row_weight, plain.row_weight + 1], 1)[:, 0],
    )
    for one, other in (
        (plain, strided),
        (
            plain._replace(row_weight=None, guide=guide),
            strided._replace(row_weight=None, guide=guide._replace(bias=strided.head.bias)),
        ),
    ):
        with poisoned_memory():
            expected, found = ce.solve(one), ce.solve(other)
        for name, value in tensors(found).items():
            assert torch.equal(value, getattr(expected, name)), name
    factor = torch.rand(40, device=device)
    options = {"ignore_index": -100, "want_dw": True, "want_db": True, "shard": None}
    expected, found = (
        ce.solve_head_gradient(one.head, one.target, factor, **options, chunk_size=None)
        for one in (plain, strided)
    )
    assert torch.equal(expected[0], found[0]) and torch.equal(expected[1], found[1])


def test_float64_is_refused(device: str) -> None:
    problem = random_problem(4, 8, 9, torch.float64, device)
    with pytest.raises(ValueError, match=r'torch.float64; use impl="eager"'):
        ce.solve(problem)


@pytest.mark.parametrize("case", ["guide-all-options", "head-options-none"])
def test_plain_loads_and_the_copy_engine_give_the_same(case: str, device: str) -> None:
    """D 40 has rows of 16-byte multiples; 37 has not."""
    for size in (37, 40):
        changed = Case(**{**vars(CASE[case]), "hidden_size": size})
        values = generate(changed, BF16)

        def ours(**arguments: Any) -> Any:
            return weighted_ce(**arguments, impl="triton", stats=TokenStats._fields)

        found = outcome(ours, changed, values, BF16, device)
        truth, naive, single = (
            outcome(reference.weighted_ce, changed, values, dtype, device)
            for dtype in (torch.float64, BF16, FP32)
        )
        judge(found, truth, naive, single, BF16)


@pytest.mark.gpu
def test_nothing_waits_for_the_device(device: str) -> None:
    problems = [
        random_problem(300, 128, 1000, BF16, device),
        random_problem(300, 128, 1000, BF16, device, want_dw=False, want_db=False),
        random_problem(300, 128, 1000, BF16, device, want_dh=False, want_dw=False, want_db=False),
        random_problem(300, 128, 1000, BF16, device, row_weight=None, self_weight=True),
    ]
    problems.append(problems[1]._replace(row_weight=None, guide=problems[1].head))
    head, target = problems[1].head, problems[1].target

    normalizers = (7.0, torch.tensor(7.0), torch.tensor(7, device=device))

    def run() -> None:
        for problem in problems:
            ce.solve(problem)
        for normalizer in normalizers:
            weighted_ce(head.hidden, head.weight, target, normalizer=normalizer)

    run()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
