"""Training: its gradients, its weights, its resumption, its refusals."""

import json
import os
import shutil
import subprocess
import sys
from math import log
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import gift.train as train_module
from gift.annotate import annotate
from gift.confidence_store import CONFIDENCE_FILE, load_store
from gift.config import AnnotateConfig, TrainConfig
from gift.data.encoding import encode, read_rows
from gift.errors import InputError
from gift.models.loading import pick_device
from gift.storage.publish import LIST_FILE, partial_path
from gift.train import train
from gift.weighting.formulas import WEIGHTINGS

ADAPTER = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("train")
    tiny.make_model(folder / "instruct", "llama", seed=1)
    tiny.make_model(folder / "base", "llama", seed=2)
    tiny.write_rows(folder / "rows.jsonl", 10)
    annotate(
        AnnotateConfig(
            model=str(folder / "instruct"),
            data=folder / "rows.jsonl",
            output=folder / "store",
        )
    )
    # An untrained guide is sure of nothing; spread its confidences over [0, 1].
    tensors = load_file(folder / "store" / CONFIDENCE_FILE)
    noise = torch.rand(len(tensors["confidence"]), generator=torch.Generator().manual_seed(0))
    save_file({**tensors, "confidence": noise**2}, folder / "store" / CONFIDENCE_FILE)
    (folder / "store" / LIST_FILE).unlink()  # it speaks of the values before
    return folder


def config(folder: Path, output: Path, **options) -> TrainConfig:
    settings = {
        "model": str(folder / "base"),
        "data": folder / "rows.jsonl",
        "confidence": folder / "store",
        "global_batch_size": 5,
        "micro_batch_size": 2,
        "lora_rank": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "learning_rate": 1e-2,
        "gradient_checkpointing": "off",
        **options,
    }
    return TrainConfig(output=output, **settings)


@pytest.fixture
def gradients(monkeypatch) -> list[list[Tensor]]:
    """The gradients of every optimizer step, as they are before clipping."""
    steps = []
    real = torch.nn.utils.clip_grad_norm_

    def recording(parameters, max_norm):
        steps.append([parameter.grad.clone() for parameter in parameters])
        return real(parameters, max_norm)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", recording)
    return steps


def reference_gradient(folder: Path, weighting: str, normalization: str) -> list[Tensor]:
    """Gradient of the first global batch from full logits of a fresh adapter."""
    # The same seeded initialisation; a huge batch so that all rows form one step.
    adapted, _ = train_module._adapted_model(
        config(folder, Path("unused")),
        encode(read_rows(folder / "rows.jsonl"), tiny.make_tokenizer(), max_length=2048),
        torch.float32,
        torch.device("cpu"),
    )
    adapted.get_base_model().set_attn_implementation("sdpa")
    store = load_store(folder / "store")
    total, tokens, weights = torch.zeros(()), 0, 0.0
    rows = encode(read_rows(folder / "rows.jsonl"), store.tokenizer(), max_length=2048)
    for example in rows.kept:
        ids = torch.from_numpy(example.input_ids).long()
        logits = adapted(ids[None]).logits[0, :-1]
        nll = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
        predicts = torch.from_numpy(example.is_target[1:])
        nll, own = nll[predicts], torch.softmax(logits[predicts].detach(), -1)
        guide, p = torch.from_numpy(store.row(example.row)), torch.exp(-nll.detach())
        excess = torch.zeros_like(p)
        excess[torch.topk(guide / p, round(0.6 * len(p))).indices] = 1
        weight = {
            "guide": guide,
            "uniform": torch.ones_like(nll),
            "self": p,
            "own-times-guide": p * guide,
            "excess": excess,
            "entropy": (-(own * own.log()).sum(-1) / log(20)).clamp(max=1),
        }[weighting]
        total = total + (weight * nll).sum()
        tokens += len(nll)
        weights += float(weight.sum())
    parameters = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    return list(
        torch.autograd.grad(total / (tokens if normalization == "tokens" else weights), parameters)
    )


@pytest.mark.parametrize("normalization", ["tokens", "weights"])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_gradient_is_that_of_the_weighted_loss_on_full_logits(
    folder, tmp_path, gradients, weighting, normalization
):
    options = {"weighting": weighting, "normalization": normalization, "global_batch_size": 10}
    train(config(folder, tmp_path / "adapter", **options))
    expected = reference_gradient(folder, weighting, normalization)
    largest = max(float(value.abs().max()) for value in expected)
    assert largest > 1e-4
    for ours, truth in zip(gradients[0], expected, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-4, atol=min(2e-6, 2e-3 * largest))


def test_the_weights_matter(folder, gradients, tmp_path):
    """The guide's gradient is far from every other weighting's: the test above can tell them."""
    guide = torch.cat([g.flatten() for g in reference_gradient(folder, "guide", "weights")])
    for weighting in WEIGHTINGS.keys() - {"guide"}:
        other = torch.cat([g.flatten() for g in reference_gradient(folder, weighting, "weights")])
        assert float((guide - other).norm() / guide.norm()) > 0.05


@pytest.mark.parametrize(
    "options",
    [
        {"normalization": "tokens"},
        {"normalization": "weights"},
        {"weighting": "excess"},
        {"control": "shuffle"},
        {"weighting": "self", "confidence_level": "sequence"},
    ],
    ids=lambda options: "-".join(options.values()),
)
def test_any_split_into_micro_batches_gives_the_same_gradients(
    folder, tmp_path, gradients, options
):
    splits = {}
    for size in (1, 2, 5):
        gradients.clear()
        train(config(folder, tmp_path / f"adapter-{size}", micro_batch_size=size, **options))
        splits[size] = [torch.cat([g.flatten() for g in step]) for step in gradients]
    assert len(splits[1]) == 2
    for size in (2, 5):
        for ours, other in zip(splits[1], splits[size], strict=True):
            assert float((ours - other).norm() / ours.norm()) < 1e-5


def test_gradient_checkpointing_changes_nothing(folder, tmp_path):
    train(config(folder, tmp_path / "plain"))
    train(config(folder, tmp_path / "saving", gradient_checkpointing="on"))
    plain, saving = (load_file(tmp_path / name / ADAPTER) for name in ("plain", "saving"))
    for name, value in plain.items():
        torch.testing.assert_close(saving[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("interrupted_at", [3, 9])
def test_interrupted_and_resumed_is_uninterrupted_bit_for_bit(
    folder, tmp_path, monkeypatch, interrupted_at
):
    options = {"lora_dropout": 0.2, "epochs": 3, "global_batch_size": 3, "checkpoint_steps": 2}
    options |= {"control": "random"}
    train(config(folder, tmp_path / "whole", **options))
    real, calls = train_module.accumulate_gradients, []

    def failing(*args):
        calls.append(1)
        if len(calls) == interrupted_at:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(train_module, "accumulate_gradients", failing)
    with pytest.raises(KeyboardInterrupt):
        train(config(folder, tmp_path / "cut", **options))
    assert not (tmp_path / "cut").exists()
    train(config(folder, tmp_path / "cut", **options))
    assert len(calls) < 12 + interrupted_at, "the run must go on from its checkpoint"
    assert (tmp_path / "whole" / ADAPTER).read_bytes() == (tmp_path / "cut" / ADAPTER).read_bytes()
    for name in ("loss", "gradient_norm", "learning_rate"):
        histories = [metrics(tmp_path / run, name) for run in ("whole", "cut")]
        assert histories[0] == histories[1] and len(histories[0]) == 12
    assert not partial_path(tmp_path / "cut").exists()
    assert not list((tmp_path / "cut").glob("checkpoint*"))


def metrics(folder: Path, name: str) -> list[float]:
    return [json.loads(line)[name] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_checkpoint_of_other_settings_is_not_used(folder, tmp_path, monkeypatch):
    real, calls = train_module.accumulate_gradients, []

    def failing(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(train_module, "accumulate_gradients", failing)
    with pytest.raises(KeyboardInterrupt):
        train(config(folder, tmp_path / "adapter", checkpoint_steps=1))
    monkeypatch.undo()
    train(config(folder, tmp_path / "adapter", checkpoint_steps=1, seed=5))
    train(config(folder, tmp_path / "fresh", checkpoint_steps=1, seed=5))
    adapters = [(tmp_path / name / ADAPTER).read_bytes() for name in ("adapter", "fresh")]
    assert adapters[0] == adapters[1]


def test_ranks_share_every_batch_and_may_have_none(folder, tmp_path):
    """Two processes, batches of three and one rows, a share of the model each: one's result."""
    options = {"global_batch_size": 3, "micro_batch_size": 2, "control": "random"}
    train(config(folder, tmp_path / "one", **options))
    arguments = ["--output", str(tmp_path / "two")]
    for key, value in config(folder, tmp_path / "two", **options).model_dump(mode="json").items():
        if key not in ("output", "overwrite") and value is not None:
            if isinstance(value, bool):
                continue
            arguments += [f"--{key.replace('_', '-')}", str(value)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    subprocess.run(
        [*launcher, "--nproc-per-node", "2", "-m", "gift.cli", "train", "--shard", *arguments],
        check=True,
        env=environment,
        timeout=240,
        capture_output=True,
    )
    for name in ("loss", "gradient_norm"):
        np.testing.assert_allclose(
            metrics(tmp_path / "two", name), metrics(tmp_path / "one", name), rtol=1e-4
        )
    one, two = (load_file(tmp_path / name / ADAPTER) for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-2, atol=1e-4)


def test_adapter_loads_in_peft_and_changes_the_model(folder, tmp_path):
    train(config(folder, tmp_path / "adapter"))
    model = AutoModelForCausalLM.from_pretrained(folder / "base").eval()
    ids = torch.arange(4, 24)[None]
    with torch.no_grad():
        before = model(ids).logits
        after = PeftModel.from_pretrained(model, tmp_path / "adapter").eval()(ids).logits
    assert float((after - before).abs().max()) > 1e-3
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["r"] == 4 and set(settings["target_modules"]) == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }


def test_loss_shares_by_confidence(folder, tmp_path):
    options = {"epochs": 1, "global_batch_size": 10}
    guide = train(config(folder, tmp_path / "guide", **options))
    uniform = train(config(folder, tmp_path / "uniform", weighting="uniform", **options))
    for summary in (guide, uniform):
        shares = [value for key, value in summary.items() if key.startswith("loss share at")]
        assert len(shares) == 4 and abs(sum(shares) - 1) < 1e-9
    low = "loss share at q < 0.1"
    assert guide[low] < uniform[low], "weighting by confidence must take loss from low bands"


def test_a_line_of_the_response_shares_its_confidence(folder, tmp_path):
    rows = [{"instruction": "Add.", "response": "The sum is 5.\n\nThe answer is 5."}] * 3
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    annotate(
        AnnotateConfig(
            model=str(folder / "instruct"), data=tmp_path / "rows.jsonl", output=tmp_path / "store"
        )
    )
    settings = {"data": tmp_path / "rows.jsonl", "confidence": tmp_path / "store"}
    token, step = (
        train(config(folder, tmp_path / level, confidence_level=level, **settings))
        for level in ("token", "step")
    )
    mean_weights = [metrics(tmp_path / level, "mean_weight")[0] for level in ("token", "step")]
    assert mean_weights[0] == pytest.approx(mean_weights[1], rel=1e-6)
    assert token["first_loss"] != step["first_loss"]


def test_divergence_stops_with_the_row_ids(folder, tmp_path):
    with pytest.raises(InputError, match=r"not finite in a micro-batch with rows \[\d"):
        train(config(folder, tmp_path / "adapter", learning_rate=1e30, max_grad_norm=1e30))
    assert not (tmp_path / "adapter").exists()


def test_a_gradient_that_is_not_finite_stops_the_last_step_too(folder, tmp_path, monkeypatch):
    real, calls = train_module.accumulate_gradients, []

    def overflowing(config, model, *rest):
        found = real(config, model, *rest)
        calls.append(1)
        if len(calls) == 2:
            next(p for p in model.parameters() if p.requires_grad).grad[0, 0] = float("inf")
        return found

    monkeypatch.setattr(train_module, "accumulate_gradients", overflowing)
    with pytest.raises(InputError, match="the gradient of step 2 is not finite"):
        train(config(folder, tmp_path / "adapter"))
    assert len(calls) == 2 and not (tmp_path / "adapter").exists()


def test_an_adapter_that_no_token_trained_is_not_published(folder, tmp_path):
    options = {"weighting": "self", "confidence_threshold": 1.0}
    with pytest.raises(InputError, match="every weight of every step was 0"):
        train(config(folder, tmp_path / "adapter", **options))
    assert not (tmp_path / "adapter").exists()
    with pytest.raises(InputError, match="every weight of the data is 0"):
        train(config(folder, tmp_path / "guided", confidence_threshold=1.0))
    assert not partial_path(tmp_path / "guided").exists()


def test_store_of_other_rows_is_refused_naming_the_first(folder, tmp_path):
    lines = (folder / "rows.jsonl").read_text().splitlines()
    lines[6] = lines[5]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(InputError, match="--confidence: row 6 of the data is not the row"):
        train(config(folder, tmp_path / "adapter", data=tmp_path / "rows.jsonl"))
    (tmp_path / "rows.jsonl").write_text("\n".join(lines[:5]) + "\n")
    with pytest.raises(InputError, match="has 10 rows, --data has 5"):
        train(config(folder, tmp_path / "adapter", data=tmp_path / "rows.jsonl"))


@pytest.mark.parametrize("changed", ["tokenizer", "template"])
def test_store_of_another_tokenizer_or_template_is_refused(folder, tmp_path, changed):
    shutil.copytree(folder / "instruct", tmp_path / "other")
    tokenizer = tiny.make_tokenizer(
        tiny.CHATML.replace("<|im_start|>", "<|im_start|> ")
        if changed == "template"
        else tiny.CHATML
    )
    if changed == "tokenizer":
        tokenizer.add_tokens(["apples"])
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match=f"was annotated with another {changed}"):
        train(config(folder, tmp_path / "adapter", tokenizer=str(tmp_path / "other")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"confidence": None}, "--weighting guide needs the folder"),
        ({"confidence": None, "weighting": "uniform"}, "--tokenizer: without --confidence"),
        ({"confidence": None, "weighting": "own-times-guide"}, "own-times-guide needs the folder"),
        ({"weighting": "uniform", "confidence_floor": 0.5}, "--confidence-floor: .*uniform"),
        ({"confidence": None, "weighting": "excess"}, "--weighting excess needs the folder"),
        ({"lora_targets": "nothing_proj"}, "--lora-targets: .*nothing_proj"),
        ({"confidence": Path("/no/store")}, "is no confidence store"),
    ],
    ids=[
        "no-store",
        "no-tokenizer",
        "product-no-store",
        "uniform-floor",
        "excess-no-store",
        "targets",
        "missing-store",
    ],
)
def test_impossible_options_are_one_clear_error(folder, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        train(config(folder, tmp_path / "adapter", **options))
    assert not (tmp_path / "adapter").exists()


def test_a_device_that_several_processes_would_share_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="--device: cpu:0 would be shared by all processes"):
        pick_device("cpu:0")
    assert pick_device("cpu") == torch.device("cpu")
