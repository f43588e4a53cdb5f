"""Unsupported settings of the weighted loss are refused by name before training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from training import ROWS, load, make_trainer
from transformers import MixtralConfig, MixtralForCausalLM

from gift.errors import InputError
from gift.integrations import WeightedTrainer

PLAIN = [{key: row[key] for key in ("input_ids", "labels")} for row in ROWS]
TEXTS = [{"messages": [{"role": "user", "content": "2 + 3?"}], "token_weight": [0.5]}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return tiny.make_model(folder, num_hidden_layers=1, hidden_size=16)


@pytest.mark.parametrize(
    ("kind", "message", "given"),
    [
        ("trainer", "label_smoothing_factor: ", {"label_smoothing_factor": 0.1}),
        ("trainer", "use_liger_kernel: Liger's loss", {"use_liger_kernel": True}),
        ("trainer", "train_dataset: no column token_weight", {"rows": PLAIN}),
        ("sft", "train_dataset: no column token_weight", {"rows": PLAIN}),
        ("sft", "train_dataset: has token_weight but no input_ids, labels", {"rows": TEXTS}),
        ("sft", "loss_type: dft would have no effect", {"loss_type": "dft"}),
        ("trainer", "compute_loss_func: ", {"options": {"compute_loss_func": sum}}),
        ("trainer", "weights: expected 'column', 'self'", {"options": {"weights": "guide"}}),
        ("trainer", "train_dataset: has a column token_weight", {"options": {"weights": "self"}}),
        ("sft", "train_dataset: has a column token_weight", {"options": {"weights": "self"}}),
        (
            "trainer",
            "eval_dataset held: no column token_weight",
            {"options": {"eval_dataset": {"held": Dataset.from_list(PLAIN)}}},
        ),
    ],
)
def test_options_that_would_be_passed_over(
    kind: str, message: str, given: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        make_trainer(kind, load(folder), tmp_path, **given)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoraConfig(target_modules=["lm_head"]), "the head has a Linear of PEFT"),
        (
            LoraConfig(target_modules=["q_proj"], trainable_token_indices={"lm_head": [1]}),
            "the head has a TrainableTokensWrapper of PEFT",
        ),
        (
            PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
            "prompt learning puts tokens",
        ),
    ],
    ids=["lora-on-head", "trainable-tokens", "prompt-tuning"],
)
def test_adapters_that_the_loss_would_not_see(
    config: Any, message: str, folder: Path, tmp_path: Path
) -> None:
    model = get_peft_model(load(folder), config)
    with pytest.raises(InputError, match=f"^peft_config: {message}"):
        make_trainer("trainer", model, tmp_path)


def test_a_head_that_does_something_unknown(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    model.lm_head.register_forward_hook(lambda module, args, logits: 2 * logits)
    with pytest.raises(InputError, match="is not supported$"):
        make_trainer("trainer", model, tmp_path)


def test_the_loss_of_routers(tmp_path: Path) -> None:
    config = MixtralConfig(
        vocab_size=len(tiny.make_tokenizer()),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
        output_router_logits=True,
    )
    with pytest.raises(InputError, match="^the model adds an auxiliary loss of its routers"):
        make_trainer("trainer", MixtralForCausalLM(config), tmp_path)


def test_a_guide_of_fewer_tokens(folder: Path, tmp_path: Path) -> None:
    guide = load(folder)
    guide.resize_token_embeddings(300)
    with pytest.raises(InputError, match="^weights: the guide's head has 300 tokens, the model's"):
        make_trainer("trainer", load(folder), tmp_path, rows=PLAIN, options={"weights": guide})


def test_a_guide_that_is_the_model_itself(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    with pytest.raises(InputError, match="^weights: the guide is the model that is trained"):
        make_trainer("trainer", model, tmp_path, rows=PLAIN, options={"weights": model})


def test_a_model_that_is_made_anew(folder: Path, tmp_path: Path) -> None:
    options = {"model_init": lambda: load(folder)}
    with pytest.raises(InputError, match="^model_init: the loss is put into the model"):
        make_trainer("trainer", None, tmp_path, options=options)


def test_rows_that_were_cut_without_their_weights(folder: Path, tmp_path: Path) -> None:
    cut = [{**row, "input_ids": row["input_ids"][:5], "labels": row["labels"][:5]} for row in ROWS]
    with pytest.raises(InputError, match="^row 0 has 5 input_ids, 5 labels and 34 token_weight"):
        make_trainer("sft", load(folder), tmp_path, rows=cut)
    with pytest.raises(InputError, match="^a row has 5 input_ids, 5 labels and "):
        make_trainer("trainer", load(folder), tmp_path, rows=cut).train()


def test_a_data_set_for_evaluation_that_trl_is_given_late(folder: Path, tmp_path: Path) -> None:
    trainer = make_trainer("sft", load(folder), tmp_path)
    with pytest.raises(InputError, match="^eval_dataset: no column token_weight"):
        trainer.evaluate(Dataset.from_list(PLAIN))


def test_a_mask_of_trls_beside_labels(folder: Path, tmp_path: Path) -> None:
    content = "{{ message['content'] }}"
    marked = tiny.CHATML.replace(content, f"{{% generation %}}{content}{{% endgeneration %}}")
    rows = [{**row, "messages": TEXTS[0]["messages"]} for row in ROWS]
    options = {"processing_class": tiny.make_tokenizer(marked)}
    with pytest.raises(InputError, match="^assistant_only_loss: the column labels already"):
        make_trainer(
            "sft", load(folder), tmp_path, rows=rows, options=options, assistant_only_loss=True
        )


def test_nothing_to_pad_with(folder: Path) -> None:
    with pytest.raises(InputError, match="^data_collator: pass one, or the tokenizer"):
        WeightedTrainer(load(folder), train_dataset=Dataset.from_list(ROWS))


def test_a_batch_of_the_wrong_shape(folder: Path, tmp_path: Path) -> None:
    trainer = make_trainer("trainer", load(folder), tmp_path)
    batch = {key: torch.tensor([row]) for key, row in ROWS[0].items()}
    with pytest.raises(InputError, match=r"^token_weight: \(1, 3\) weights for \(1, 34\) labels"):
        trainer.compute_loss(trainer.model, {**batch, "token_weight": batch["token_weight"][:, :3]})
    with pytest.raises(InputError, match="^the batch has no token_weight"):
        trainer.compute_loss(trainer.model, {**batch, "token_weight": None})
    with pytest.raises(InputError, match="^the batch has no labels"):
        trainer.compute_loss(trainer.model, {**batch, "labels": None})
