"""The weighted trainers against full logits, in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset
from torch._dynamo.utils import counters
from training import (
    LABELS,
    PROMPT,
    ROWS,
    column,
    expect,
    gradients,
    load,
    make_trainer,
    own,
    require_close,
    row_nll,
    train,
)
from transformers import (
    AutoModelForCausalLM,
    DataCollatorWithFlattening,
    Trainer,
    TrainingArguments,
)

from gift.integrations import WeightedCollator, WeightedLossMixin
from gift_kernels import WeightTransform

UNWEIGHTED = [{key: row[key] for key in ("input_ids", "labels")} for row in ROWS]
every_kind = pytest.mark.parametrize("kind", ["trainer", "sft"])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    small = {"num_hidden_layers": 1, "hidden_size": 16}
    for seed, name in enumerate(("base", "guide")):
        tiny.make_model(folder / name, seed=seed, **small)
    tiny.make_model(folder / "tied", seed=2, tie_word_embeddings=True, **small)
    for name in ("gemma2", "phi-head-bias", "cohere-logit-scale"):
        tiny.make_model(folder / name, name, num_hidden_layers=1)
    return folder


@every_kind
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("lora", [None, {}], ids=["full", "lora"])
def test_loss_and_gradients_are_those_of_full_logits(
    kind: str, accumulation: int, lora: Any, models: Path, tmp_path: Path
) -> None:
    found = train(kind, load(models / "base", lora), tmp_path, accumulation)
    require_close(found, expect(load(models / "base", lora)))


@pytest.mark.parametrize("name", ["tied", "gemma2", "phi-head-bias", "cohere-logit-scale"])
def test_heads_keep_their_ties_biases_scales_and_soft_caps(
    name: str, models: Path, tmp_path: Path
) -> None:
    found = train("sft", load(models / name), tmp_path, 4)
    require_close(found, expect(load(models / name)))


@pytest.mark.parametrize("name", ["base", "tied"])
def test_a_head_that_peft_trains_as_a_copy_gets_its_gradient(
    name: str, models: Path, tmp_path: Path
) -> None:
    lora = {"modules_to_save": ["lm_head"]}
    found = train("trainer", load(models / name, lora), tmp_path, 4)
    require_close(found, expect(load(models / name, lora)))
    assert any("lm_head.modules_to_save" in key for key in found[1])


@every_kind
def test_the_models_own_confidence_and_a_transform(kind: str, models: Path, tmp_path: Path) -> None:
    options = {"weights": "self", "transform": WeightTransform(power=0.5, threshold=1e-3)}
    found = train(kind, load(models / "base"), tmp_path, 4, rows=UNWEIGHTED, options=options)

    def weigh(model: Any, row: Any, nll: torch.Tensor) -> torch.Tensor:
        p = own(model, row, nll)
        return torch.where(p < 1e-3, 0, p.sqrt())

    require_close(found, expect(load(models / "base"), weigh=weigh))


@every_kind
def test_a_guide_model(kind: str, models: Path, tmp_path: Path) -> None:
    guide = load(models / "guide").train()
    found = train(
        kind, load(models / "base", {}), tmp_path, 4, rows=UNWEIGHTED, options={"weights": guide}
    )

    def weigh(model: Any, row: Any, nll: torch.Tensor) -> torch.Tensor:
        return torch.exp(-row_nll(guide, row).detach())

    require_close(found, expect(load(models / "base", {}), weigh=weigh))
    assert not guide.training and not gradients(guide)


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
def test_rows_that_trl_packs_keep_their_weights(
    strategy: str, models: Path, tmp_path: Path
) -> None:
    length = max(LABELS) + PROMPT
    trainer = make_trainer(
        "sft",
        load(models / "base"),
        tmp_path,
        packing=True,
        packing_strategy=strategy,
        max_length=length,
        per_device_train_batch_size=1,
    )
    packed = list(trainer.train_dataset)
    assert len(packed) < len(ROWS)

    def labelled(rows: Any) -> list[tuple[float, ...]]:
        """Token, label and weight of every label, sorted."""
        triples = (
            triple
            for row in rows
            for triple in zip(row["input_ids"], row["labels"], row["token_weight"], strict=True)
        )
        return sorted(triple for triple in triples if triple[1] != -100)

    assert labelled(packed) == pytest.approx(np.array(labelled(ROWS)))


def test_packed_rows_are_attended_to_alone(models: Path, tmp_path: Path) -> None:
    packing = {"packing": True, "max_length": PROMPT + max(LABELS)}
    found = train(
        "sft", load(models / "base"), tmp_path, per_device_train_batch_size=len(ROWS), **packing
    )
    require_close(found, expect(load(models / "base")))


def test_a_collator_that_packs_for_trainer(models: Path, tmp_path: Path) -> None:
    options = {"data_collator": WeightedCollator(DataCollatorWithFlattening())}
    found = train("trainer", load(models / "base"), tmp_path, 4, options=options)
    require_close(found, expect(load(models / "base")))


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_rows_that_trl_cuts_keep_their_weights(mode: str, models: Path, tmp_path: Path) -> None:
    cut = slice(12) if mode == "keep_start" else slice(-12, None)
    rows = [{key: values[cut] for key, values in row.items()} for row in ROWS]
    found = train("sft", load(models / "base"), tmp_path, 2, max_length=12, truncation_mode=mode)
    require_close(found, expect(load(models / "base"), rows))


@every_kind
def test_recomputed_activations_give_the_same(kind: str, models: Path, tmp_path: Path) -> None:
    found = train(kind, load(models / "base", {}), tmp_path, 4, gradient_checkpointing=True)
    require_close(found, expect(load(models / "base", {})))


def test_mixed_precision_rounds_products_and_no_weights(models: Path, tmp_path: Path) -> None:
    trainer = make_trainer("trainer", load(models / "base"), tmp_path, 4, bf16=True)
    trainer.train()
    logs = trainer.state.log_history[0]
    assert logs["loss"] == pytest.approx(expect(load(models / "base"))[0], rel=1e-2)
    weights = [weight for row in ROWS for weight in row["token_weight"][PROMPT:]]
    assert logs["mean_weight"] == pytest.approx(np.mean(weights), rel=1e-6)


def test_a_compiled_model_and_its_loss_are_one_graph(models: Path, tmp_path: Path) -> None:
    torch._dynamo.reset()
    counters.clear()
    compiled = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    found = train("sft", load(models / "base", {}), tmp_path, **compiled)
    require_close(found, expect(load(models / "base", {})))
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@every_kind
def test_evaluation_is_weighted_and_logits_are_there_for_metrics(
    kind: str, models: Path, tmp_path: Path
) -> None:
    shapes = []

    def metrics(prediction: Any) -> dict[str, float]:
        shapes.append((prediction.predictions.shape, prediction.label_ids.shape))
        return {"seen": 1.0}

    trainer = make_trainer(
        kind,
        load(models / "base"),
        tmp_path,
        options={"eval_dataset": Dataset.from_list(ROWS[:3]), "compute_metrics": metrics},
        per_device_eval_batch_size=2,
    )
    found = trainer.evaluate()
    # Trainer's own mean over batches, by rows.
    batches = [expect(load(models / "base"), rows)[0] for rows in (ROWS[:2], ROWS[2:3])]
    assert found["eval_loss"] == pytest.approx((2 * batches[0] + batches[1]) / 3, rel=1e-5)
    nll = torch.cat([row_nll(load(models / "base"), row) for row in ROWS[:3]])
    labels = sum(LABELS[:3])
    assert found["eval_nll"] == pytest.approx(float(nll.detach().sum()) / labels, rel=1e-5)
    weights = [w for row in ROWS[:3] for w in row["token_weight"][PROMPT:]]
    assert found["eval_mean_weight"] == pytest.approx(sum(weights) / labels, rel=1e-5)
    width = PROMPT + max(LABELS[:3])
    assert found["eval_seen"] == 1
    assert shapes == [((3, width, len(tiny.make_tokenizer())), (3, width))]


def test_rows_without_labels_are_predicted(models: Path, tmp_path: Path) -> None:
    trainer = make_trainer("trainer", load(models / "base"), tmp_path)
    ids = ROWS[0]["input_ids"]
    found = trainer.predict(Dataset.from_list([{"input_ids": ids}]))
    logits = load(models / "base")(torch.tensor([ids])).logits
    np.testing.assert_allclose(found.predictions, logits.detach(), rtol=1e-4, atol=1e-5)
    assert "test_loss" not in found.metrics


@every_kind
def test_a_resumed_run_ends_as_one_that_was_not_stopped(
    kind: str, models: Path, tmp_path: Path
) -> None:
    steps = {"per_device_train_batch_size": 1, "num_train_epochs": 1, "save_steps": 2}
    settings = {**steps, "save_strategy": "steps", "max_steps": 4, "learning_rate": 1e-2}
    whole = make_trainer(kind, load(models / "base", {}), tmp_path, 2, **settings)
    whole.train()
    resumed = make_trainer(kind, load(models / "base", {}), tmp_path, 2, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    losses = [
        [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        for trainer in (whole, resumed)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_the_mixin_gives_another_trainer_its_loss(models: Path, tmp_path: Path) -> None:
    class Theirs(Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            self.steps = getattr(self, "steps", 0) + 1
            return super().training_step(*args, **kwargs)

    class Ours(WeightedLossMixin, Theirs):
        pass

    arguments = TrainingArguments(str(tmp_path), use_cpu=True, max_steps=1, report_to=[])
    trainer = Ours(
        load(models / "base"),
        arguments,
        train_dataset=Dataset.from_list(ROWS),
        data_collator=WeightedCollator(DataCollatorWithFlattening()),
    )
    trainer.train()
    assert trainer.steps == 1
    # The model is as before for everybody else.
    again = AutoModelForCausalLM.from_pretrained(models / "base")
    again.load_state_dict(trainer.model.state_dict())
    ids = torch.tensor([ROWS[0]["input_ids"]])
    torch.testing.assert_close(trainer.model(ids).logits, again(ids).logits)


def test_weights_of_the_wrong_label_would_be_noticed(models: Path) -> None:
    shifted = [{**row, "token_weight": [0.5, *row["token_weight"][:-1]]} for row in ROWS]
    model = load(models / "base")
    right = expect(model)
    model.zero_grad()
    with pytest.raises(AssertionError):
        require_close(expect(model, shifted, column), right)
