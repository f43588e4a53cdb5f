"""Vocabulary-parallel heads, DDP and FSDP2 over gloo, in real processes, against one process.

The processes do all their work once, for all tests; the tests judge what every rank has saved.
"""

from __future__ import annotations

import datetime
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ce_cases import (
    CASE,
    IMPLS,
    TAKE_FLOAT64,
    Case,
    Values,
    arrange,
    generate,
    judge,
    outcome,
    poisoned_memory,
    readable,
    with_impls,
)
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from gift_kernels import TokenStats, VocabParallel, checks, reference, token_confidence, weighted_ce
from gift_kernels.linear_ce import eager

pytestmark = pytest.mark.xdist_group("ranks of a cross-entropy")

WORLD = 2
# The vocabulary of the cases is 130. A guide has 6 more tokens, which the last rank holds.
SLICES = {"equal": (0, 65, 130), "unequal": (0, 7, 130)}
SHARDED = [
    *((CASE[id_], torch.float32) for id_ in ("weights-mean", "weights-none", "self", "no-row")),
    *((CASE[id_], torch.float32) for id_ in ("guide-all-options", "huge-logits", "all-ignored")),
    *((CASE[id_], torch.bfloat16) for id_ in ("head-options", "head-options-none", "guide-none")),
    (CASE["head-options-self"], torch.float64),
]
WRAPPERS = ["ddp", "fsdp2"]
every_impl = pytest.mark.parametrize("impl", IMPLS)


class Model(nn.Module):
    """A body, a trainable head with a bias, and the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.layer = nn.Linear(16, 16)
        self.head = nn.Linear(16, 50)

    def forward(self, ids: Tensor, target: Tensor, weight: Tensor, normalizer: Tensor) -> Tensor:
        hidden = torch.tanh(self.layer(self.embedding(ids)))
        return weighted_ce(
            hidden, self.head.weight, target, weight, bias=self.head.bias, normalizer=normalizer
        )


def new_model() -> tuple[Model, list[Tensor]]:
    """A model, and a batch [6, 5] of ids, targets and weights in whose second half all rows are
    ignored but two."""
    torch.manual_seed(1)
    ids, target = torch.randint(50, (2, 6, 5))
    target[3:] = -100
    target[3, :2] = 7
    return Model(), [ids, target, torch.rand(6, 5)]


def train(model: nn.Module, batch: list[Tensor], normalizer: float) -> list[Tensor]:
    """Gradients of two steps, and the parameters that the steps lead to."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    found: list[Tensor] = []
    for _ in range(2):
        optimizer.zero_grad()
        model(*batch, torch.tensor(normalizer)).backward()
        found += [parameter.grad for parameter in model.parameters()]  # pyright: ignore
        optimizer.step()
    found += [parameter.detach() for parameter in model.parameters()]
    return [value.full_tensor() if isinstance(value, DTensor) else value for value in found]


def slice_of(values: Values, slicing: str, rank: int) -> tuple[Values, int]:
    """This rank's rows of every head and bias, and the number of the first."""
    start, end = SLICES[slicing][rank : rank + 2]
    guide_end = end if rank < WORLD - 1 else None
    sliced = {name: values[name][start:end] for name in ("head", "bias")}
    sliced |= {name: values[name][start:guide_end] for name in ("guide_head", "guide_bias")}
    return values | sliced, start


def sharded(start: int, impl: str) -> dict[str, Any]:
    """Options of a call with a slice of the vocabulary."""
    group = dist.group.WORLD
    assert group is not None
    return {"vocab_parallel": VocabParallel(group, start), "impl": impl}


def sharded_results(rank: int, impl: str, device: str) -> dict[str, Any]:
    """Everything that this rank computes from its slices of the vocabulary."""
    results: dict[str, Any] = {}
    for slicing in SLICES:
        for case, dtype in SHARDED:
            if dtype == torch.float64 and impl not in TAKE_FLOAT64:
                continue
            values, start = slice_of(generate(case, dtype), slicing, rank)

            def op(start: int = start, **arguments: Any) -> Any:
                return weighted_ce(
                    **arguments, **sharded(start, impl), stats=TokenStats._fields, chunk_size=7
                )

            with poisoned_memory():
                key = f"{slicing} {case.id} {dtype}"
                results[key] = outcome(op, case, values, dtype, device)
        results[f"{slicing} edges"] = edge_results(slicing, rank, impl, device)
    return results


def edge_results(slicing: str, rank: int, impl: str, device: str) -> dict[str, Any]:
    """Confidences that one rank alone could not know, and a refusal."""
    values, start = slice_of(generate(CASE["bias"], torch.float32), slicing, rank)
    _, arguments = arrange(CASE["bias"], values, torch.float32, device)
    names = ("hidden", "lm_head_weight", "target", "bias")
    given = {name: arguments[name].detach() for name in names}
    shard = sharded(start, impl)
    found = {"plain": token_confidence(**given, **shard)}
    if rank == 0:
        given["bias"] = torch.full_like(given["bias"], -torch.inf)
    found["first rank masked"] = token_confidence(**given, **shard)
    if rank == 0:
        given["lm_head_weight"] = given["lm_head_weight"] * torch.nan
        given["bias"] = torch.zeros_like(given["bias"])
    found["first rank NaN"] = token_confidence(**given, **shard)
    given["target"] = given["target"].clone()
    given["target"][4] = 130
    os.environ[checks.CHECK_TARGETS_VARIABLE] = "1"
    try:
        token_confidence(**given, **shard)
    except ValueError as error:
        found["refusal"] = str(error)
    del os.environ[checks.CHECK_TARGETS_VARIABLE]
    return found


def work(rank: int, folder: str, device: str) -> None:
    """What each process does."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=WORLD,
        timeout=datetime.timedelta(seconds=120),
    )
    # Chunks of a few rows, so that ranks which disagreed about their size would not meet.
    eager.CHUNK_BYTES = 4096
    results: dict[str, Any] = {impl: sharded_results(rank, impl, device) for impl in IMPLS}
    for wrapper in WRAPPERS:
        model, batch = new_model()
        wrapped = DistributedDataParallel(model) if wrapper == "ddp" else fully_shard(model)
        own = [part.chunk(WORLD)[rank] for part in batch]
        # Gradients are averaged over the ranks: each divides by its share of the count.
        results[wrapper] = train(wrapped, own, 17 / WORLD)
    sharded = fully_shard(new_model()[0])
    try:  # outside the forward a parameter is a shard
        weighted_ce(torch.zeros(1, 16), sharded.head.weight, torch.zeros(1, dtype=torch.long))
    except TypeError as error:
        results["refusal"] = str(error)
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory, device: str) -> list[dict[str, Any]]:
    """The results of every rank."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(work, (str(folder), device), nprocs=WORLD)
    return [torch.load(folder / f"rank{rank}.pt", map_location="cpu") for rank in range(WORLD)]


@pytest.mark.parametrize(("case", "dtype", "impl"), with_impls(*SHARDED), ids=readable)
@pytest.mark.parametrize("slicing", SLICES)
def test_slices_of_the_vocabulary_give_the_unsharded_result(
    slicing: str, case: Case, dtype: torch.dtype, impl: str, ranks: list[dict[str, Any]]
) -> None:
    parts = [results[impl][f"{slicing} {case.id} {dtype}"] for results in ranks]
    values = generate(case, dtype)
    truth, naive, single = (
        outcome(reference.weighted_ce, case, values, in_dtype, "cpu")
        for in_dtype in (torch.float64, dtype, torch.float32)
    )
    sliced = [name for name in ("d_head", "d_bias") if name in truth]
    whole = {name: torch.cat([part[name] for part in parts]) for name in sliced}
    for part in parts:
        judge(part | whole, truth, naive, single, dtype)
    for name in truth.keys() - set(sliced):
        assert torch.equal(parts[0][name], parts[1][name]), f"{name} differs between the ranks"


@every_impl
@pytest.mark.parametrize("slicing", SLICES)
def test_what_one_slice_holds_reaches_every_rank(
    slicing: str, impl: str, ranks: list[dict[str, Any]]
) -> None:
    values = generate(CASE["bias"], torch.float32)
    _, arguments = arrange(CASE["bias"], values, torch.float32, "cpu")
    names = ("hidden", "lm_head_weight", "target", "bias")
    given = {name: arguments[name].detach() for name in names}
    plain = token_confidence(**given)
    given["bias"][: SLICES[slicing][1]] = -torch.inf
    masked = token_confidence(**given)
    assert (masked > 0).any() and ((masked == 0) & (plain > 0)).any()
    for results in ranks:
        found = results[impl][f"{slicing} edges"]
        torch.testing.assert_close(found["plain"], plain)
        torch.testing.assert_close(found["first rank masked"], masked)
        assert torch.equal(found["first rank NaN"].isnan(), given["target"] != -100)
        assert "target: value 130 at row 4 is outside [0, 130)" in found["refusal"]


def test_a_shard_of_fsdp2_is_refused_with_a_way_out(ranks: list[dict[str, Any]]) -> None:
    for results in ranks:
        assert "lm_head_weight: expected a plain tensor, got a DTensor" in results["refusal"]
        assert "inside that forward, or pass lm_head_weight.full_tensor()" in results["refusal"]


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_data_parallel_training_equals_training_in_one_process(
    wrapper: str, ranks: list[dict[str, Any]]
) -> None:
    model, batch = new_model()
    assert (batch[1] != -100).sum() == 17
    expected = train(model, batch, 17)
    assert all(value.any() for value in expected)
    for results in ranks:
        for value, true in zip(results[wrapper], expected, strict=True):
            torch.testing.assert_close(value, true)
