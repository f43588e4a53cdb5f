"""The weighted trainers in two processes over gloo: the loss and the gradients of one process.

The processes do all their work once; the tests judge what each of them has saved.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.distributed as dist
from datasets import Dataset
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from training import ROWS, expect, load, make_trainer, require_close, train

pytestmark = pytest.mark.xdist_group("trainers in several processes")

WORLD = 2
CASES = [(kind, accumulation) for kind in ("trainer", "sft") for accumulation in (1, 4)]


def _rank(rank: int, folder: Path, port: int) -> None:
    """One process: everything that the tests look at."""
    torch.set_num_threads(1)
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "MASTER_PORT": port}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MASTER_ADDR", "127.0.0.1")
        for name, value in variables.items():
            patch.setenv(name, str(value))
        found: dict[str, Any] = {}
        for kind, accumulation in CASES:
            found[f"{kind}-{accumulation}"] = train(
                kind, load(folder, {}), folder / "out", accumulation, WORLD, ddp_backend="gloo"
            )
        found["full"] = train("sft", load(folder), folder / "out", 4, WORLD, ddp_backend="gloo")
        found["evaluated"] = _evaluate(folder)
        found["fsdp2"] = _sharded_step(rank, folder)
        found["fsdp2-bf16"] = _sharded_weights(rank, folder)
        torch.save(found, folder / f"found-{rank}.pt")
        dist.destroy_process_group()


def _evaluate(folder: Path) -> dict[str, float]:
    trainer = make_trainer(
        "trainer",
        load(folder, {}),
        folder / "out",
        options={"eval_dataset": Dataset.from_list(ROWS)},
        per_device_eval_batch_size=len(ROWS) // WORLD,
        ddp_backend="gloo",
    )
    return trainer.evaluate()


def _sharded_step(rank: int, folder: Path) -> Any:
    """The loss and gradients of a step over a model that FSDP2 shards."""
    model, loss, _ = _sharded_loss(rank, folder, MixedPrecisionPolicy())
    loss.backward()
    shards = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(isinstance(shard, DTensor) for shard in shards.values())
    dist.all_reduce(loss := loss.detach() / WORLD)
    return float(loss), {name: shard.full_tensor() for name, shard in shards.items()}


def _sharded_weights(rank: int, folder: Path) -> float:
    """The sum of a rank's weights where FSDP2 rounds what the model is given to bfloat16."""
    _, _, trainer = _sharded_loss(rank, folder, MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    return float(trainer._sums["train"][1])


def _sharded_loss(rank: int, folder: Path, policy: MixedPrecisionPolicy) -> tuple[Any, Any, Any]:
    model = load(folder).train()
    trainer = make_trainer("trainer", model, folder / "out", ddp_backend="gloo")
    mesh = dist.init_device_mesh("cpu", (WORLD,))
    for layer in (*model.model.layers, model):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    batch = trainer.data_collator([dict(row) for row in ROWS[rank::WORLD]])
    labels = torch.tensor(sum(label != -100 for row in ROWS for label in row["labels"][1:]))
    loss = trainer.compute_loss(model, batch, num_items_in_batch=labels)
    return model, loss, trainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    tiny.make_model(folder, num_hidden_layers=1, hidden_size=16)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True)
    port = store.port
    del store
    torch.multiprocessing.start_processes(_rank, (folder, port), nprocs=WORLD, start_method="fork")
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"found-{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize(("kind", "accumulation"), CASES)
def test_two_processes_have_the_loss_and_gradients_of_full_logits(
    kind: str, accumulation: int, folder: Path, found: list[dict[str, Any]]
) -> None:
    for rank in found:
        require_close(rank[f"{kind}-{accumulation}"], expect(load(folder, {})))


@pytest.mark.parametrize("case", ["full", "fsdp2"])
def test_a_trained_head_has_the_gradient_of_full_logits(
    case: str, folder: Path, found: list[dict[str, Any]]
) -> None:
    for rank in found:
        require_close(rank[case], expect(load(folder)))


def test_evaluation_in_two_processes_is_that_of_one(
    folder: Path, found: list[dict[str, Any]]
) -> None:
    loss, _ = expect(load(folder, {}))
    for rank in found:
        assert rank["evaluated"]["eval_loss"] == pytest.approx(loss, rel=1e-5)


def test_weights_are_not_rounded_with_what_fsdp_gives_the_model(
    found: list[dict[str, Any]],
) -> None:
    for rank, saved in enumerate(found):
        rows = ROWS[rank::WORLD]
        weights = [
            weight
            for row in rows
            for label, weight in zip(row["labels"], row["token_weight"], strict=True)
            if label != -100
        ]
        assert saved["fsdp2-bf16"] == pytest.approx(sum(weights), rel=1e-6)
