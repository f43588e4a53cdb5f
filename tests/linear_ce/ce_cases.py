"""Cases, data and comparisons that all tests of the linear cross-entropy share.

Truth is `gift_kernels.reference` in float64 on the inputs as they were rounded to the tested dtype.
The budget is twice the error that the reference makes when it computes in that dtype itself, or a
few roundings (ROUNDING) where that error happens to be smaller. Loss and statistics of 16-bit
inputs must moreover stay within the budget of float32, in which every implementation accumulates.
Memory that PyTorch leaves uninitialised is filled with NaN.

To test one more implementation, add its name to IMPLS.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from gift_kernels import (
    Guide,
    TokenStats,
    WeightTransform,
    reference,
    token_confidence,
    weighted_ce,
)

IMPLS = ["eager", "triton"]
TAKE_FLOAT64 = ["eager"]
# Allowed in any case, relative to the truth: of a whole tensor, and of one row of a gradient, which
# is a difference (p − 1) and so has lost digits where p is near 1.
ROUNDING = {
    torch.float64: 1e-13,
    torch.float32: 2e-6,
    torch.float16: 2**-11,
    torch.bfloat16: 2**-8,
}
ROW_ROUNDING = ROUNDING | {torch.float64: 1e-12, torch.float32: 2e-5}
# An entropy is log S less a mean, and S >= 1 has been rounded: two roundings of numbers near 1.
ENTROPY_ROUNDING = {torch.float64: 2**-51, torch.float32: 2**-22}
STATISTICS = TokenStats._fields

Values = dict[str, Tensor]
Layout = Literal["contiguous", "transposed", "sliced", "tied"]


@dataclass(frozen=True)
class Case:
    """One combination of sizes, data and options.

    `spread` multiplies the logits. `options` are passed on as they are; a bias that is True there
    becomes a random vector, and those under "guide" are the guide's.
    """

    id: str
    batch: tuple[int, ...] = (23,)
    hidden_size: int = 40
    vocab_size: int = 130
    weighting: Literal["none", "tensor", "self", "guide"] = "tensor"
    reduction: reference.Reduction = "mean"
    flat: bool = False
    spread: float = 1.0
    ignored: float = 0.2
    layout: Layout = "contiguous"
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.id


HEAD = {"bias": True, "logit_scale": 0.25, "logit_softcap": 12.0}
GUIDE = {"guide": {"bias": True, "logit_scale": 0.5, "logit_softcap": 15.0, "temperature": 1.7}}
TRANSFORM = {"transform": WeightTransform(power=0.5, floor=0.2, threshold=0.05)}
NORMALIZER = {"normalizer": 37.5}

CASES = [
    Case("unweighted", weighting="none"),
    Case("unweighted-none", weighting="none", reduction="none"),
    Case("weights-mean"),
    Case("weights-sum", reduction="sum"),
    Case("weights-weighted_mean", reduction="weighted_mean"),
    Case("weights-none", reduction="none"),
    Case("weights-mean-normalizer", options=NORMALIZER),
    Case("weights-weighted_mean-normalizer", reduction="weighted_mean", options=NORMALIZER),
    Case("weights-transformed", (65,), options=TRANSFORM),
    Case("weights-transformed-none", (65,), reduction="none", options=TRANSFORM),
    Case("self", weighting="self"),
    Case("self-none", weighting="self", reduction="none"),
    Case("self-transformed", (65,), weighting="self", reduction="sum", options=TRANSFORM),
    Case("guide", weighting="guide"),
    Case("guide-none", weighting="guide", reduction="none"),
    Case("guide-weighted_mean", weighting="guide", reduction="weighted_mean"),
    Case("guide-normalizer", weighting="guide", options=NORMALIZER),
    Case("guide-options", weighting="guide", options=GUIDE),
    Case("guide-temperature", weighting="guide", options={"guide": {"temperature": 0.6}}),
    Case("guide-transformed", (65,), weighting="guide", options=TRANSFORM),
    Case("guide-all-options", (65,), weighting="guide", options=HEAD | GUIDE | TRANSFORM),
    Case("bias", options={"bias": True}),
    Case("scale", options={"logit_scale": 0.0625}),
    Case("softcap", options={"logit_softcap": 10.0}),
    Case("head-options", options=HEAD),
    Case("head-options-none", reduction="none", options=HEAD),
    Case("head-options-self", weighting="self", options=HEAD),
    Case("flat", flat=True),
    Case("flat-guide-none", weighting="guide", reduction="none", flat=True),
    Case("huge-logits", spread=600, weighting="none"),
    Case("huge-logits-self-none", spread=600, weighting="self", reduction="none"),
    Case("batch", (2, 3, 5)),
    Case("batch-none", (2, 3, 5), reduction="none"),
    Case("no-batch", (), ignored=0),
    Case("transposed", (5, 7), layout="transposed"),
    Case("sliced", layout="sliced", options={"bias": True}),
    Case("sliced-none", layout="sliced", reduction="none"),
    Case("tied", (4, 6), layout="tied"),
    Case("one-row", (1,), ignored=0),
    Case("one-row-ignored", (1,), ignored=1),
    Case("no-row", (0,)),
    Case("no-row-guide-none", (0, 3), weighting="guide", reduction="none"),
    Case("all-ignored", ignored=1),
    Case("all-ignored-weighted_mean", ignored=1, reduction="weighted_mean"),
    Case("all-ignored-normalizer-0", ignored=1, options={"normalizer": 0.0}),
    Case("all-ignored-guide-none", ignored=1, weighting="guide", reduction="none"),
    Case("one-token", (5,), 8, 1),
    Case("two-tokens", (20,), 3, 2, flat=True),
    Case("tile-edges", (64,), 64, 512),
    Case("past-tile-edges", (65,), 33, 513, weighting="guide"),
    Case("large", (70,), 96, 700),
]
CASE = {case.id: case for case in CASES}
# The cases that run in every dtype; all run in float32 and bfloat16.
DTYPE_CASES = [CASE[id_] for id_ in ("weights-none", "self", "guide-all-options", "sliced")]
CASES_AND_DTYPES = [
    *((case, dtype) for case in CASES for dtype in (torch.float32, torch.bfloat16)),
    *((case, dtype) for case in DTYPE_CASES for dtype in (torch.float16, torch.float64)),
]


def with_impls(*combinations: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """Each combination of parameters with each implementation that takes its dtype."""
    return [
        (*parameters, impl)
        for impl in IMPLS
        for parameters in combinations
        if torch.float64 not in parameters or impl in TAKE_FLOAT64
    ]


def readable(value: object) -> str | None:
    """Ids of parameters."""
    if isinstance(value, set):
        return ""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return value.id if isinstance(value, Case) else None


def model_side(
    target: Tensor, hidden_size: int, vocab_size: int, flat: bool, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Hidden states [N, D] and a head [V, D] in float64.

    The softmax over their logits is a language model's: some targets nearly certain, others far
    from it, logits up to about 20; or flat, every token about as probable as any other.
    """
    count = target.shape[0]
    head = torch.randn(vocab_size, hidden_size, generator=generator, dtype=torch.float64)
    head *= hidden_size**-0.5
    hidden = torch.randn(count, hidden_size, generator=generator, dtype=torch.float64)
    if flat:
        return 0.5 * hidden, head
    pull = 20 * torch.rand(count, 1, generator=generator, dtype=torch.float64) - 3
    towards = head[target]
    return 2.5 * hidden + pull * towards / (towards**2).sum(1, keepdim=True), head


def generate(case: Case, dtype: torch.dtype) -> Values:
    """All values of a case, rounded to `dtype` but held in float64 on the CPU; rows flat [N]."""
    generator = torch.Generator().manual_seed(zlib.crc32(case.id.encode()))
    count, vocab_size = torch.Size(case.batch).numel(), case.vocab_size

    def random(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    zipf = 1 / torch.arange(1.0, vocab_size + 1)
    target = torch.multinomial(zipf, count + 1, replacement=True, generator=generator)[:count]
    target[:1], target[1:2] = 0, vocab_size - 1
    hidden, head = model_side(target, case.hidden_size, vocab_size, case.flat, generator)
    # A guide of another width, whose embedding has been padded.
    guide_vocab = vocab_size + 6
    guide_hidden, guide_head = model_side(target, 24, guide_vocab, case.flat, generator)
    token_weight = random(count) ** 2
    token_weight[token_weight < 0.02] = 0
    token_weight[:3] = torch.tensor([0.6, 0.3, 1])[:count]
    ignored = random(count) < case.ignored
    if case.ignored < 1:
        ignored[:3] = False
    upstream = random(count) * 4 - 2
    values = {
        "hidden": hidden * case.spread / case.options.get("logit_scale", 1.0),
        "head": head,
        "bias": random(vocab_size) * 3 - 1.5,
        "token_weight": token_weight,
        "guide_hidden": guide_hidden / case.options.get("guide", {}).get("logit_scale", 1.0),
        "guide_head": guide_head,
        "guide_bias": random(guide_vocab) * 3 - 1.5,
        "upstream": upstream if case.reduction == "none" else random()[()] * 4 - 2,
    }
    rounded = {name: value.to(dtype).double() for name, value in values.items()}
    return rounded | {"target": target.masked_fill(ignored, -100)}


def lay_out(case: Case, hidden: Tensor, head: Tensor) -> tuple[Values, Callable[[Values], Any]]:
    """Leaf tensors, and the function that makes hidden [*B, D] and head [V, D] views of them."""
    (count, size), vocab_size = hidden.shape, head.shape[0]
    batched = (*case.batch, size)
    if case.layout == "contiguous":
        leaves = {"hidden": hidden.reshape(batched), "head": head}
        return leaves, lambda leaf: (leaf["hidden"], leaf["head"])
    if case.layout == "transposed":
        leaves = {"hidden": hidden.reshape(batched).transpose(0, 1), "head": head.T}
        leaves = {name: leaf.contiguous() for name, leaf in leaves.items()}
        return leaves, lambda leaf: (leaf["hidden"].transpose(0, 1), leaf["head"].T)
    if case.layout == "sliced":
        wide_hidden = hidden.new_full((count, size + 5), torch.nan)
        wide_head = head.new_full((vocab_size + 2, 2 * size), torch.nan)
        wide_hidden[:, 2:-3], wide_head[1:-1, ::2] = hidden, head
        leaves = {"hidden": wide_hidden, "head": wide_head}
        return leaves, lambda leaf: (leaf["hidden"][:, 2:-3], leaf["head"][1:-1, ::2])
    both = torch.cat([head, hidden])

    def views(leaf: Values) -> tuple[Tensor, Tensor]:
        return leaf["both"][vocab_size:].reshape(batched), leaf["both"][:vocab_size]

    return {"both": both}, views


def arrange(
    case: Case, values: Values, dtype: torch.dtype, device: str, frozen: tuple[str, ...] = ()
) -> tuple[Values, dict[str, Any]]:
    """Leaves that require gradients, unless named in `frozen`, and arguments made of them."""
    leaves, views = lay_out(case, values["hidden"], values["head"])
    options = dict(case.options)
    of_guide = options.pop("guide", {})
    if options.get("bias"):
        leaves["bias"] = values["bias"]
    if case.weighting == "tensor":
        leaves["token_weight"] = values["token_weight"].reshape(case.batch)
    leaves = {
        name: leaf.to(device, dtype, copy=True).requires_grad_(name not in frozen)
        for name, leaf in leaves.items()
    }
    hidden, head = views(leaves)
    arguments = {
        "hidden": hidden,
        "lm_head_weight": head,
        "target": values["target"].reshape(case.batch).to(device),
        "token_weight": "self" if case.weighting == "self" else leaves.get("token_weight"),
        "reduction": case.reduction,
        **options,
    }
    if "bias" in leaves:
        arguments["bias"] = leaves["bias"]
    if case.weighting == "guide":
        guide = {name: values[name].to(device, dtype) for name in values if "guide" in name}
        if of_guide.get("bias"):
            of_guide = of_guide | {"bias": guide["guide_bias"]}
        hidden = guide["guide_hidden"].reshape(*case.batch, 24)
        arguments["guide"] = Guide(hidden, guide["guide_head"], **of_guide)
    return leaves, arguments


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fills every tensor that is allocated without a value with NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def outcome(
    op: Callable[..., Any],
    case: Case,
    values: Values,
    dtype: torch.dtype,
    device: str,
    frozen: tuple[str, ...] = (),
) -> Values:
    """Loss, statistics and the gradient of every leaf, as `op` computes them in `dtype`."""
    leaves, arguments = arrange(case, values, dtype, device, frozen)
    result = op(**arguments)
    loss, stats = result if isinstance(result, tuple) else (result, None)
    upstream = values["upstream"].to(device, loss.dtype)
    loss.backward(upstream.reshape(loss.shape))
    found = {"loss": loss.detach()}
    if isinstance(stats, TokenStats):
        assert not any(value.requires_grad for value in stats if value is not None), (
            "statistics have a gradient"
        )
        found |= {name: value for name, value in stats._asdict().items() if value is not None}
    for name, leaf in leaves.items():
        if leaf.requires_grad:
            assert leaf.grad is not None, f"{name}: no gradient"
            found[f"d_{name}"] = leaf.grad
    return found


def check_weighted_ce(case: Case, dtype: torch.dtype, impl: str, device: str, lean: bool) -> None:
    """Every output and gradient with everything trainable; or `lean`, the loss and the gradient of
    hidden with a frozen head and no statistics, when rows of weight 0 may be left out."""
    values = generate(case, dtype)
    frozen = ("head", "bias", "token_weight") if lean else ()

    def ours(**arguments: Any) -> Any:
        stats = None if lean else STATISTICS
        return weighted_ce(**arguments, impl=impl, chunk_size=7, stats=stats)

    truth, naive, single = (
        outcome(reference.weighted_ce, case, values, in_dtype, device, frozen)
        for in_dtype in (torch.float64, dtype, torch.float32)
    )
    with poisoned_memory():
        found = outcome(ours, case, values, dtype, device, frozen)
    judge(found, truth, naive, single, dtype)


def check_token_confidence(
    case: Case, dtype: torch.dtype, impl: str, device: str, temperature: float = 1.0
) -> None:
    """Every statistic, and the confidence alone."""
    values = generate(case, dtype)

    def compute(op: Callable[..., Any], in_dtype: torch.dtype, **more: Any) -> Any:
        _, arguments = arrange(case, values, in_dtype, device)
        names = ("hidden", "lm_head_weight", "target", "bias", "logit_scale", "logit_softcap")
        chosen = {name: arguments[name] for name in names if name in arguments}
        with torch.no_grad():
            return op(**chosen, temperature=temperature, **more)

    with poisoned_memory():
        _, stats = compute(token_confidence, dtype, impl=impl, chunk_size=7, stats=STATISTICS)
        alone = compute(token_confidence, dtype, impl=impl, chunk_size=7)
    truth, naive, single = (
        compute(reference.token_confidence, in_dtype)._asdict()
        for in_dtype in (torch.float64, dtype, torch.float32)
    )
    judge(stats._asdict(), truth, naive, single, dtype)
    judge({"confidence": alone}, truth, naive, single, dtype)


def one_tile_chunks(plan: Any) -> Any:
    """A plan of the Triton implementation with chunks as small as its tiles allow."""
    one = type(plan.chunk)(plan.pad, plan.logit_tiles.BLOCK_V)
    return plan._replace(chunk=one, kept=one, again=one, statistics=one)


def judge(found: Values, truth: Values, naive: Values, single: Values, dtype: torch.dtype) -> None:
    """Compares all values of `found` with the truth; the message holds every error and budget.

    `naive` is the reference in `dtype`, `single` in float32.
    """
    accumulated = torch.float64 if dtype == torch.float64 else torch.float32
    report, failed = [], []
    for name, value in found.items():
        true = truth[name]
        assert value.shape == true.shape, f"{name}: shape {value.shape}, not {true.shape}"
        if name == "top1":
            report.append(f"top1: wrong in rows {(value != true).nonzero().tolist()}")
            failed += [name] * (not torch.equal(value, true))
            continue
        is_gradient = name.startswith("d_")
        expected = dtype if is_gradient else accumulated
        assert value.dtype == expected, f"{name}: {value.dtype}, not {expected}"
        # 1 − p of 1e-20 is 0 in float64, but not where it is computed without that difference.
        nothing = true == 0
        if not (value[nothing].abs() <= 1e-11).all():
            report.append(f"{name}: not 0 where the truth is")
            failed.append(name)
        if name == "entropy":
            rounded = (value - true).abs() <= ENTROPY_ROUNDING[accumulated]
            value = torch.where(rounded, true, value.double())
        measures = [(norm_error, ROUNDING[expected])]
        if is_gradient:
            measures.append((row_error, ROW_ROUNDING[expected]))
        for measure, rounding in measures:
            error, naive_error = measure(value, true), measure(naive[name], true)
            budget = max(2 * naive_error, rounding)
            if not is_gradient:
                budget = min(budget, max(2 * measure(single[name], true), rounding))
            line = f"{name:16} {measure.__name__:10} error {error:.2e} naive {naive_error:.2e}"
            report.append(f"{line} budget {budget:.2e}")
            if not error <= budget:
                failed.append(name)
    assert not failed, f"over budget: {sorted(set(failed))}\n" + "\n".join(report)


def norm_error(value: Tensor, true: Tensor) -> float:
    """|value − true| / |true| over the whole tensor; absolute where the truth is 0."""
    size = float(true.norm())
    return float((value.double() - true).norm()) / (size if size > 0 else 1.0)


def row_error(value: Tensor, true: Tensor) -> float:
    """The largest error of a row (last dimension), or element of a vector, relative to its size.

    Rows smaller than a tenth of the largest are measured against that.
    """
    if true.numel() == 0:
        return 0.0
    rows = true if true.ndim > 1 else true.reshape(-1, 1)
    sizes = rows.norm(dim=-1)
    sizes = sizes.clamp(min=0.1 * float(sizes.max()))
    errors = (value.double().reshape(rows.shape) - rows).norm(dim=-1)
    return float((errors / torch.where(sizes > 0, sizes, 1)).max())


def long_problem(
    dtype: torch.dtype, device: str, count: int = 200, size: int = 16, vocab_size: int = 300
) -> dict[str, Any]:
    """Arguments with many rows, 40 of them ignored and 10 others of weight 0; hidden a leaf."""
    generator = torch.Generator().manual_seed(5)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    target = torch.randint(vocab_size, (count,), generator=generator).to(device)
    target[:40] = -100
    token_weight = random(count).abs() + 0.1
    token_weight[40:50] = 0
    return {
        "hidden": random(count, size).requires_grad_(),
        "lm_head_weight": random(vocab_size, size),
        "target": target,
        "token_weight": token_weight,
    }


def with_guide(given: dict[str, Any]) -> dict[str, Any]:
    """The same, its weights now from a guide that is half as wide."""
    hidden, head = given["hidden"].detach(), given["lm_head_weight"].detach()
    rest = {name: value for name, value in given.items() if name != "token_weight"}
    half = hidden.shape[1] // 2
    return rest | {"guide": Guide(hidden[:, :half], head[:, :half])}
