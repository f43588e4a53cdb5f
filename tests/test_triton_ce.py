"""What only the Triton implementation of the cross-entropy has: compaction, chunks, references.

Outputs and gradients for every option are judged in the tests that all implementations share.
"""

from __future__ import annotations

import importlib
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
from torch import Tensor

from gift_kernels import reference, weighted_ce
from gift_kernels.problem import Head, Problem, WeightTransform

ce: Any = importlib.import_module("gift_kernels.triton_ce")
passes: Any = importlib.import_module("gift_kernels.triton_passes")
chunks: Any = importlib.import_module("gift_kernels.triton_chunk")
NAN = float("nan")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def problem_of(hidden: Tensor, head: Tensor, target: Tensor, **changes: Any) -> Problem:
    """Everything trainable, weights 1, no options."""
    return Problem(
        head=Head(hidden, head, None, 1.0, None),
        guide=None,
        target=target,
        row_weight=None,
        temperature=1.0,
        self_weight=False,
        transform=WeightTransform(1.0, 0.0, 0.0),
        ignore_index=-100,
        want_dh=True,
        want_dw=True,
        want_db=True,
        rowwise=False,
        with_entropy=True,
        keep_zero_rows=False,
        shard=None,
        chunk_size=None,
    )._replace(**changes)


def random_problem(
    count: int, size: int, vocab_size: int, dtype: torch.dtype, device: str, **changes: Any
) -> Problem:
    generator = torch.Generator().manual_seed(3)
    target = torch.randint(vocab_size, (count,), generator=generator)
    hidden, head = model_side(target, size, vocab_size, False, generator)
    weight = torch.rand(count, generator=generator)
    weight[::7] = 0
    target[::5] = -100
    values = {"row_weight": weight.to(device)} | changes
    return problem_of(hidden.to(device, dtype), head.to(device, dtype), target.to(device), **values)


def truth_of(problem: Problem) -> dict[str, Tensor]:
    """Statistics and gradients of a problem without options, in float64."""
    hidden = problem.head.hidden.double().requires_grad_()
    head = problem.head.weight.double().requires_grad_()
    loss, stats = reference.weighted_ce(
        hidden, head, problem.target, problem.row_weight, reduction="sum"
    )
    rows, _ = reference.weighted_ce(hidden, head, problem.target, reduction="none")
    (dh,) = torch.autograd.grad(rows.sum(), hidden, retain_graph=True)
    (dw,) = torch.autograd.grad(loss, head)
    counted = stats.weight != 0
    dh = torch.where(counted[:, None], dh, 0)
    return {"total": loss, "nll": torch.where(counted, stats.nll, 0), "dh": dh, "dw": dw}


def check(problem: Problem, plan: Any = None, precision: float = 1.0) -> Any:
    """Solves the problem in poisoned memory and compares it with the truth."""
    with poisoned_memory():
        found = ce.solve(problem, plan)
    rounding = {BF16: 3e-3, FP16: 4e-4, FP32: 3e-6}[problem.head.hidden.dtype]
    for name, true in truth_of(problem).items():
        value = getattr(found, name)
        if value.numel() > 0:
            allowed = rounding if name in ("dh", "dw") else 3e-6
            allowed = max(allowed, 3e-6 * precision)
            error = norm_error(value, true.detach())
            assert error <= allowed, f"{name}: error {error:.1e}, allowed {allowed:.1e}"
    return found


def small_plan(problem: Problem, guide: Head | None = None) -> Any:
    """The plan of this device with chunks of one tile."""
    return one_tile_chunks(chunks.default_plan(problem.head, guide))


def random_targets(count: int, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    target = torch.randint(-2, 4, (count,), generator=generator)
    return target.masked_fill(target < 0, -100).to(device)


@pytest.mark.parametrize("count", [0, 1, 5, 64, 65, 200])
def test_the_rows_that_count_are_found_in_order(count: int, device: str) -> None:
    target = random_targets(count, device)
    weight = torch.rand(count, device=device)
    weight[::3] = 0
    weight[1::9] = NAN
    for given in (None, weight):
        kept = target != -100
        if given is not None:
            kept &= given != 0
        with poisoned_memory():
            rows = passes.rows_that_count(target, -100, given)
        expected = kept.nonzero().squeeze(1)
        assert int(rows.count) == len(expected)
        assert torch.equal(rows.index[: len(expected)].long(), expected)
        assert not rows.index[len(expected) :].any()
        place = torch.where(kept, kept.cumsum(0) - 1, -1)
        assert torch.equal(rows.place.long(), place)


def test_rows_that_do_not_count_are_never_multiplied(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many tiles are made for 64 rows of which half are ignored as for the other half alone."""
    if device != "cpu":
        return  # products can be counted in the interpreter only
    from triton.runtime.interpreter import InterpreterBuilder

    calls = []
    dot = InterpreterBuilder.create_dot
    monkeypatch.setattr(
        InterpreterBuilder, "create_dot", lambda *args: calls.append(1) or dot(*args)
    )
    problem = random_problem(64, 32, 130, BF16, device, row_weight=None)
    counts = []
    for ignored in (0, 32):
        target = torch.full((64,), 3)
        target[torch.randperm(64)[:ignored]] = -100
        calls.clear()
        ce.solve(problem._replace(target=target))
        counts.append(len(calls))
    assert counts[0] == 2 * counts[1] > 0, counts


def test_hidden_states_of_rows_that_do_not_count_are_never_read(device: str) -> None:
    problem = random_problem(70, 40, 130, BF16, device)
    expected = ce.solve(problem)
    hidden = problem.head.hidden.clone()
    hidden[(problem.target == -100) | (problem.row_weight == 0)] = NAN
    found = ce.solve(problem._replace(head=problem.head._replace(hidden=hidden)))
    for name, value in found._asdict().items():
        assert torch.equal(value, getattr(expected, name)), name


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("want_dw", [False, True], ids=["frozen", "trainable"])
def test_references_that_the_first_columns_could_not_foresee(
    want_dw: bool, dtype: torch.dtype, device: str
) -> None:
    """Logits that rise by 30 to 120 from slice to slice, and targets far below or far above."""
    count, size, vocab_size = 40, 16, 600
    generator = torch.Generator().manual_seed(0)
    steps = torch.arange(vocab_size) // 64
    head = torch.randn(vocab_size, size, generator=generator) * 0.2
    head[:, 0] = steps * 30.0
    hidden = torch.randn(count, size, generator=generator)
    hidden[:, 0] = torch.linspace(0, 4, count)
    hidden[::6, 0] *= -1
    target = torch.randint(vocab_size, (count,), generator=generator)
    target[::3] = vocab_size - 1
    problem = problem_of(
        hidden.to(device, dtype), head.to(device, dtype), target.to(device), want_dw=want_dw
    )
    # float32 itself knows logits of 1000 to 6e-5.
    check(problem._replace(want_db=want_dw), precision=30)


@pytest.mark.parametrize("logits", ["triton", "library"])
@pytest.mark.parametrize("products", ["triton", "library"])
@pytest.mark.parametrize("want_dw", [False, True], ids=["frozen", "trainable"])
def test_whoever_multiplies_the_gradients_are_the_same(
    want_dw: bool, products: str, logits: str, device: str
) -> None:
    problem = random_problem(150, 48, 300, BF16, device, want_dw=want_dw, want_db=want_dw)
    plan = chunks.default_plan(problem.head)._replace(logits=logits, products=products)
    check(problem, plan)


@pytest.mark.parametrize("size", [8, 24, 40, 200])
def test_rows_whose_exponentials_are_kept_and_rows_multiplied_again(size: int, device: str) -> None:
    """dW [V, D] has room for none, some and all of 150 rows; `keep_zero_rows` with NaN in them."""
    for dtype in (BF16, FP32):
        problem = random_problem(150, size, 300, dtype, device, keep_zero_rows=True)
        plan = chunks.default_plan(problem.head)._replace(head_rows=128)
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
    logits: Any = importlib.import_module("gift_kernels.triton_logits")

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
    guide = Head(*model_side(target.cpu(), 40, guide_vocab, False, generator), None, 1.0, 20.0)
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
    for name, value in together._asdict().items():
        # A GPU has a plan of its own for a guide that goes first, and sums in its order.
        if device == "cpu":
            assert torch.equal(value, getattr(apart, name)), name
        elif value.numel() > 0:
            assert norm_error(value, getattr(apart, name).double()) < 3e-3, name


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_an_answer_is_the_same_bit_by_bit_each_time(dtype: torch.dtype, device: str) -> None:
    problem = random_problem(100, 40, 300, dtype, device)
    first = ce.solve(problem)
    for _ in range(1 if device == "cpu" else 10):
        for name, value in ce.solve(problem)._asdict().items():
            assert torch.equal(value, getattr(first, name)), name


def test_sizes_of_chunks_change_results_by_rounding_only(device: str) -> None:
    problem = random_problem(100, 40, 700, FP32, device)
    plan = small_plan(problem)
    for rows, columns in ((1, 1), (2, 2), (2, 5), (4, 8)):
        sizes = {"rows": rows * plan.rows, "columns": columns * plan.columns}
        check(problem, plan._replace(**sizes, **{f"head_{k}": v for k, v in sizes.items()}))


def test_a_target_outside_the_vocabulary_spoils_its_row_only(device: str) -> None:
    problem = random_problem(40, 24, 130, BF16, device, want_dw=False, want_db=False)
    expected = ce.solve(problem._replace(row_weight=None))
    for wrong in (130, 10**9, -7):
        target = problem.target.clone()
        target[6] = wrong
        found = ce.solve(problem._replace(target=target, row_weight=None))
        assert found.nll[6].isnan() and found.dh[6].isnan().all() and found.total.isnan()
        others = torch.arange(40, device=device) != 6
        for name in ("nll", "lse", "entropy", "dh"):
            assert torch.equal(getattr(found, name)[others], getattr(expected, name)[others])


def test_a_loss_near_0_keeps_its_relative_accuracy(device: str) -> None:
    """Others have 1e-3 to 1e-12 of the probability: a difference of logarithms would lose it."""
    head = torch.zeros(50, 16, device=device)
    head[7, 0] = 1.0
    hidden = torch.zeros(40, 16, device=device)
    hidden[:, 0] = torch.linspace(8, 30, 40)
    target = torch.full((40,), 7, device=device)
    found = ce.solve(problem_of(hidden, head, target, want_dw=False, want_db=False))
    expected = torch.log1p(49 * torch.exp(-hidden[:, 0].double()))
    # The logarithm of the others' share, up to 32, is known to 2 roundings of float32.
    assert ((found.nll - expected).abs() / expected).max() < 2 * 32 * 2**-24
    true_dh = (torch.exp(-expected) - 1)[:, None] * head[7].double()
    assert ((found.dh - true_dh).norm(dim=1) / true_dh.norm(dim=1)).max() < 2 * 32 * 2**-24


@pytest.mark.parametrize("want_dw", [False, True], ids=["frozen", "trainable"])
def test_targets_weights_and_biases_of_any_strides(want_dw: bool, device: str) -> None:
    problem = random_problem(40, 24, 130, FP32, device, want_dw=want_dw, want_db=want_dw)
    bias = torch.randn(130, device=device)
    guide = Head(problem.head.hidden, problem.head.weight, bias, 1.0, None)
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
        for name, value in found._asdict().items():
            assert torch.equal(value, getattr(expected, name)), name
    factor = torch.rand(40, device=device)
    options = {"ignore_index": -100, "want_dw": True, "want_db": True, "shard": None}
    expected, found = (
        ce.solve_head_gradient(one.head, one.target, factor, **options, chunk_size=None)
        for one in (plain, strided)
    )
    assert torch.equal(expected[0], found[0]) and torch.equal(expected[1], found[1])


@pytest.mark.parametrize("default", [BF16, torch.float64], ids=str)
def test_the_default_dtype_of_pytorch_changes_nothing(default: torch.dtype, device: str) -> None:
    problem = random_problem(40, 24, 130, BF16, device)
    expected = ce.solve(problem)
    torch.set_default_dtype(default)
    try:
        found = ce.solve(problem)
    finally:
        torch.set_default_dtype(FP32)
    for name, value in found._asdict().items():
        assert value.dtype == getattr(expected, name).dtype, name
        assert torch.equal(value, getattr(expected, name)), name


@pytest.mark.parametrize("size", [8, 64], ids=["multiplied-again", "kept"])
def test_rows_of_weight_0_are_shut_out_of_dw_where_the_head_itself_is_nan(
    size: int, device: str
) -> None:
    """The last tile is completed by zeros, which meet the NaN too."""
    problem = random_problem(5, size, 130, BF16, device, keep_zero_rows=True)
    problem.head.weight[7] = NAN
    found = ce.solve(problem._replace(row_weight=torch.zeros(5, device=device)))
    assert not found.dw.any() and not found.db.any() and found.total == 0


@pytest.mark.parametrize("offset", [10.0, 1000.0])
@pytest.mark.parametrize("size", [96, 8], ids=["kept", "multiplied-again"])
def test_a_large_offset_of_all_logits_costs_no_more_than_in_plain_pytorch(
    size: int, offset: float, device: str
) -> None:
    """Probabilities are not made of the log-sum-exp, whose rounding grows with the offset."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, size, generator=generator)
    head = torch.randn(600, size, generator=generator) * 0.1
    hidden[:, 0] = head[:, 0] = offset**0.5
    target = torch.randint(600, (40,), generator=generator)
    problem = problem_of(hidden.to(device), head.to(device), target.to(device), want_db=False)
    true = truth_of(problem)
    logits = (problem.head.hidden @ problem.head.weight.T).requires_grad_()
    (gradient,) = torch.autograd.grad(
        reference.token_stats(logits, problem.target).nll.sum(), logits
    )
    plain = {"dh": gradient @ problem.head.weight, "dw": gradient.T @ problem.head.hidden}
    for want_dw in (False, True):
        found = ce.solve(problem._replace(want_dw=want_dw))
        for name in ("dh", "dw") if want_dw else ("dh",):
            error = norm_error(getattr(found, name), true[name])
            budget = max(2 * norm_error(plain[name], true[name]), 3e-6)
            assert error <= budget, f"{name}: error {error:.1e}, budget {budget:.1e}"


@pytest.mark.parametrize("size", [8, 32], ids=["multiplied-again", "kept"])
@pytest.mark.parametrize("weight", [1.0, 1e6, 1e-9])
def test_rare_tokens_keep_their_dw_in_float16(weight: float, size: int, device: str) -> None:
    """Their probabilities are 1e-7, and weights may exceed what float16 can hold."""
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(300, size, generator=generator) * 0.05
    head[:, 0] = (torch.arange(300) < 20).float()
    hidden = torch.randn(40, size, generator=generator)
    hidden[:, 0] = 16
    target = torch.randint(20, (40,), generator=generator)
    problem = problem_of(hidden.to(device, FP16), head.to(device, FP16), target.to(device))
    problem = problem._replace(row_weight=torch.full((40,), weight, device=device))
    found, true = ce.solve(problem), truth_of(problem)
    assert norm_error(found.dw[20:], true["dw"][20:].detach()) < 1e-3
    assert norm_error(found.dw, true["dw"].detach()) < 1e-3


def test_float64_is_refused(device: str) -> None:
    problem = random_problem(4, 8, 9, torch.float64, device)
    with pytest.raises(ValueError, match=r'torch.float64; use impl="eager"'):
        ce.solve(problem)


@pytest.mark.parametrize("unaligned", [0, 1], ids=["copy-engine", "plain-loads"])
def test_a_head_whose_last_row_lies_beyond_2_to_the_31_elements(
    unaligned: int, device: str
) -> None:
    """A view of memory of which only a few pages are ever touched."""
    size, stride = 24, 2**30 + 8 + unaligned
    memory = torch.empty(2 * stride + size, dtype=BF16, device=device)
    head = memory.as_strided((3, size), (stride, 1))
    generator = torch.Generator().manual_seed(0)
    head.copy_(torch.randn(3, size, generator=generator))
    hidden = torch.randn(9, size, generator=generator).to(device, BF16)
    target = torch.arange(9, device=device) % 3
    for want_dw in (False, True):
        check(problem_of(hidden, head, target, want_dw=want_dw, want_db=False))


@pytest.mark.parametrize("case", ["guide-all-options", "head-options-none"])
def test_plain_loads_and_the_copy_engine_give_the_same(case: str, device: str) -> None:
    """D 40 has rows of 16-byte multiples; 37 has not."""
    for size in (37, 40):
        changed = Case(**{**vars(CASE[case]), "hidden_size": size})
        values = generate(changed, BF16)

        def ours(**arguments: Any) -> Any:
            return weighted_ce(**arguments, impl="triton", return_stats=True)

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
    for problem in problems:
        ce.solve(problem)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for problem in problems:
            ce.solve(problem)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_head_of_more_than_2_to_the_31_elements(device: str) -> None:
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(64, 8192, generator=generator, device=device, dtype=BF16)
    head = torch.randn(262144 + 300, 8192, generator=generator, device=device, dtype=BF16)
    head *= 0.05
    target = torch.randint(len(head), (64,), generator=generator, device=device)
    target[0] = len(head) - 1
    found = ce.solve(problem_of(hidden, head, target, want_dw=False, want_db=False))
    logits = torch.cat([hidden.double() @ part.double().T for part in head.split(16384)], 1)
    stats = reference.token_stats(logits, target)
    assert norm_error(found.nll, stats.nll) < 1e-5
    logits = torch.exp(logits - stats.lse[:, None])
    logits[torch.arange(64, device=device), target] -= 1
    parts = zip(logits.split(16384, 1), head.split(16384), strict=True)
    true_dh = sum(gradient @ part.double() for gradient, part in parts)
    assert norm_error(found.dh, true_dh) < 3e-3


@pytest.mark.gpu
@pytest.mark.parametrize("want_dw", [False, True], ids=["frozen", "trainable"])
def test_memory_beside_the_inputs_and_dw_is_bounded(want_dw: bool, device: str) -> None:
    count, size, vocab_size = 8192, 4096, 128256
    hidden = torch.randn(count, size, device=device, dtype=BF16)
    head = torch.randn(vocab_size, size, device=device, dtype=BF16) * 0.02
    target = torch.randint(vocab_size, (count,), device=device)
    problem = problem_of(hidden, head, target, want_dw=want_dw, want_db=False, with_entropy=False)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    ce.solve(problem)
    extra = torch.cuda.max_memory_allocated() - before - (4 * vocab_size * size if want_dw else 0)
    assert extra <= (320 if want_dw else 300) * 10**6, extra
