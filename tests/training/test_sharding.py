"""Sharded training by two and by four processes: the adapter of one, memory, resuming, failures.

Ranks are forked, and exchange over gloo. A group does all its work once, for all tests.
"""

import json
import os
import signal
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from processes import fork_ranks
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

import gift.cli
import gift.train
import gift.training.memory
import gift.training.sharding
from gift.annotate import annotate
from gift.config import AnnotateConfig, TrainConfig
from gift.distributed.ranks import process_group
from gift.errors import InputError
from gift.models.head import last_hidden_state, lm_head
from gift.models.loading import load_causal_lm
from gift.storage.publish import partial_path
from gift.train import train
from gift.training.memory import LONG, SHORT, layers_of
from gift.training.sharding import load_sharded, whole_head
from gift_kernels import weighted_ce

pytestmark = pytest.mark.xdist_group("sharded training")

ADAPTER = "adapter_model.safetensors"
# Runs: a model, and options of its own. A tied head, rows that are padded, experts that are fused.
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "untied": ("llama", {}),
    "tied": ("gemma2", {"weighting": "self", "gradient_checkpointing": "on"}),
    "bfloat16": ("llama", {"dtype": "bfloat16", "weighting": "entropy"}),
    "experts": ("experts", {"normalization": "weights"}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("sharding")
    tiny.make_model(folder / "llama", "llama", seed=1)
    tiny.make_model(folder / "gemma2", "gemma2", seed=2)
    experts = Qwen3MoeConfig(
        **{**tiny.SHARED, "vocab_size": len(tiny.make_tokenizer()), "initializer_range": 0.2},
        **{"num_experts_per_tok": 2, "head_dim": 8, "num_key_value_heads": 2},
        **{"intermediate_size": 48, "num_experts": 3, "moe_intermediate_size": 20},
    )
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(experts).save_pretrained(folder / "experts")
    data = tiny.write_rows(folder / "rows.jsonl", 7)
    annotate(AnnotateConfig(model=str(folder / "llama"), data=data, output=folder / "store"))
    return folder


def call(folder: Path, model: str, output: Path, **options: Any) -> dict[str, Any]:
    """Trains with batches of three rows, micro-batches of one or two."""
    settings: dict[str, Any] = {
        "model": str(folder / model),
        "data": folder / "rows.jsonl",
        "confidence": folder / "store",
        "global_batch_size": 3,
        "micro_batch_tokens": 60,
        "lora_rank": 4,
        "lora_dropout": 0.0,
        "learning_rate": 1e-3,
        "checkpoint_steps": 1,
        "device": "cpu",
        **options,
    }
    return train(TrainConfig(output=output, **settings))


class Cut(Exception):
    """An injected failure."""


def count_steps(patch: pytest.MonkeyPatch, last: int = 0, sig: int | None = None) -> list[int]:
    """Counts the steps; the last ends the process with `Cut`, or by a signal."""
    real, steps = gift.train.accumulate_gradients, []

    def step(*values: Any) -> Any:
        steps.append(1)
        if len(steps) == last:
            if sig is None:
                raise Cut
            os.kill(os.getpid(), sig)
        return real(*values)

    patch.setattr(gift.train, "accumulate_gradients", step)
    return steps


def share(model: Any) -> float:
    """Share of a model's bytes that this rank holds."""
    held = [w.to_local() if isinstance(w, DTensor) else w for w in model.parameters()]
    return sum(w.nbytes for w in held) / size(model)


def size(model: Any) -> int:
    """Bytes of a model, wherever they are."""
    return sum(weight.nbytes for weight in model.parameters())


def watch_loading(patch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of weights that this rank holds whole, each time that a module has its values."""
    real, received, whole = gift.training.sharding._receive, [], []

    def receive(module: Any, source: Any) -> None:
        real(module, source)
        received.extend(weakref.ref(weight) for weight in module.parameters(recurse=False))
        whole.append(sum(weight.nbytes for ref in received if (weight := ref()) is not None))

    patch.setattr(gift.training.sharding, "_receive", receive)
    return whole


def look_at(folder: Path) -> dict[str, Any]:
    """What a rank holds of a sharded model, and what the loss says of its head."""
    found: dict[str, Any] = {}
    with process_group(), pytest.MonkeyPatch.context() as patch:
        whole = watch_loading(patch)
        model = load_sharded(folder, torch.float32, torch.device("cpu"))
        truth = load_causal_lm(folder, torch.float32, torch.device("cpu"))
        found["loaded"] = share(model)
        units = model.get_input_embeddings(), model.get_output_embeddings(), *truth.model.layers
        found["whole at once"] = max(whole) / max(map(size, units))
        ids = torch.arange(4, 24)[None]
        hidden = last_hidden_state(model, input_ids=ids)
        found["same states"] = torch.equal(hidden, last_hidden_state(truth, input_ids=ids))
        found["blocks after use"] = share(model.get_decoder().layers)
        with whole_head(model):
            found["same head"] = torch.equal(lm_head(model).weight, lm_head(truth).weight)
        found["head after use"] = share(model.get_output_embeddings())
        try:
            weighted_ce(hidden[0], lm_head(model).weight, ids[0])
        except TypeError as error:
            found["refusal"] = str(error)
    return found


def limit_memory(patch: pytest.MonkeyPatch, rank: int) -> None:
    """Activations of a token take 3 bytes, or 1 if recomputed; the second rank has 120."""

    def measure(_: Any, model: Any, split: Any) -> tuple[int, int]:
        kept = 3 - sum(layer.gradient_checkpointing for layer in layers_of(model))
        return SHORT * kept, LONG * kept

    patch.setattr(gift.training.memory, "_measure", measure)
    patch.setattr(gift.training.memory, "_reserve", lambda _: 0)
    patch.setattr(gift.training.memory, "_usable_bytes", lambda _: (1e9, 120)[rank])


@pytest.fixture(scope="module")
def ranks(folder: Path) -> Path:
    """All work of four ranks, more than a step has rows, and then of two."""

    def of_four(_: int) -> None:
        call(folder, "llama", folder / "four", shard=True)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Cut):
            count_steps(patch, last=3)
            call(folder, "llama", folder / "resumed", shard=True)

    def of_two(rank: int) -> None:
        found = {}
        for name, (model, options) in RUNS.items():
            call(folder, model, folder / f"two {name}", shard=True, **options)
        call(folder, "llama", folder / "two whole", shard=False)
        for name in ("llama", "gemma2"):
            found[name] = look_at(folder / name)
        with pytest.MonkeyPatch.context() as patch:
            limit_memory(patch, rank)
            steps = count_steps(patch)
            found["resumed"] = call(folder, "llama", folder / "resumed", shard=True)
            found["steps"] = len(steps)
        dropout = {"shard": True, "lora_dropout": 0.2}
        call(folder, "llama", folder / "masked", **dropout)
        found["random"] = [torch.get_rng_state().tolist()]
        found["seed"] = torch.initial_seed()
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Cut):
            count_steps(patch, last=3)
            call(folder, "llama", folder / "masked resumed", **dropout)
        call(folder, "llama", folder / "masked resumed", **dropout)
        found["random"].append(torch.get_rng_state().tolist())
        (folder / f"found-{rank}.json").write_text(json.dumps(found))

    for size, work in ((4, of_four), (2, of_two)):
        ended = fork_ranks(size, work, folder / f"rank-of-{size}")
        assert [status for status, _ in ended] == [0] * size, ended
    return folder


@pytest.fixture(scope="module")
def found(ranks: Path) -> list[dict[str, Any]]:
    """What the two ranks saw."""
    return [json.loads((ranks / f"found-{rank}.json").read_text()) for rank in (0, 1)]


def judge(ours: Path, truth: Path) -> None:
    """Asserts that the folders have the same files, and adapters equal within float32 rounding."""
    found, expected = load_file(ours / ADAPTER), load_file(truth / ADAPTER)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert float((found[name] - value).norm() / value.norm()) < 4e-6
    for file in ("adapter_config.json", "tokenizer.json"):
        assert (ours / file).read_bytes() == (truth / file).read_bytes()
    assert {path.name for path in ours.iterdir()} == {path.name for path in truth.iterdir()}


@pytest.mark.parametrize("name", RUNS)
def test_the_adapter_is_that_of_one_process(ranks: Path, name: str) -> None:
    model, options = RUNS[name]
    call(ranks, model, ranks / f"one {name}", **options)
    judge(ranks / f"two {name}", ranks / f"one {name}")
    if name == "untied":
        judge(ranks / "two whole", ranks / "one untied")
        judge(ranks / "four", ranks / "one untied")
        # Cut short in its last step under four ranks, and ended by two.
        judge(ranks / "resumed", ranks / "one untied")


def test_a_run_resumes_with_another_number_of_ranks(found: list[dict[str, Any]]) -> None:
    assert [rank["steps"] for rank in found] == [1, 1]
    assert all(rank["resumed"]["steps"] == 3 for rank in found)


def test_ranks_draw_masks_of_their_own_and_resume_them(
    ranks: Path, found: list[dict[str, Any]]
) -> None:
    whole, resumed = (load_file(ranks / name / ADAPTER) for name in ("masked", "masked resumed"))
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    for rank in found:
        uncut, cut = rank["random"]
        assert uncut == cut
    assert found[0]["seed"] != found[1]["seed"]


def test_ranks_measure_and_take_what_fits_on_all_of_them(found: list[dict[str, Any]]) -> None:
    for rank in found:
        taken = [rank["resumed"][name] for name in ("micro_batch_tokens", "recomputed_layers")]
        assert taken == [60, 2]


@pytest.mark.parametrize("model", ["llama", "gemma2"])
def test_a_rank_holds_its_share_of_the_model(found: list[dict[str, Any]], model: str) -> None:
    for rank in found:
        seen = rank[model]
        assert seen["same states"] and seen["same head"]
        assert 1 <= seen["whole at once"] < 1.01  # the final norm is whole a little longer
        for when in ("loaded", "blocks after use", "head after use"):
            assert 0.49 < seen[when] < 0.51, when


@pytest.mark.parametrize("model", ["llama", "gemma2"])
def test_a_head_that_is_not_gathered_is_refused(found: list[dict[str, Any]], model: str) -> None:
    for rank in found:
        assert "lm_head_weight: expected a plain tensor, got a DTensor" in rank[model]["refusal"]


def test_a_killed_rank_ends_the_other_with_an_error_that_says_so(folder: Path) -> None:
    def work(rank: int) -> None:
        with pytest.MonkeyPatch.context() as patch:
            count_steps(patch, last=2, sig=signal.SIGKILL if rank == 1 else 0)
            patch.setattr(
                gift.cli, "app", lambda: call(folder, "llama", folder / "dead", shard=True)
            )
            with pytest.raises(SystemExit):
                gift.cli.main()

    started = time.monotonic()
    (status, said), (killed, _) = fork_ranks(2, work, folder / "dead-rank")
    assert time.monotonic() - started < 60
    assert (status, killed) == (0, -signal.SIGKILL)
    assert "gift: another process of this run ended without a message, killed" in said
    assert "run the same command again to resume" in said
    assert not (folder / "dead").exists() and partial_path(folder / "dead").exists()


def test_one_process_alone_has_nothing_to_share(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--shard: .* start several with torchrun"):
        call(folder, "llama", tmp_path / "adapter", shard=True)
    assert not list(tmp_path.iterdir())
