"""Real trainers on tiny models, and the same step with full logits in float32.

An optimizer step takes all ROWS once, whatever the accumulation and the number of processes, so
that there is one right loss and one right gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tiny
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, TrainerCallback, TrainingArguments
from trl import SFTConfig

from gift.integrations import WeightedSFTTrainer, WeightedTrainer

LABELS = (30, 1, 3, 17, 2, 24, 1, 9)  # of each row: a mean of means would be far off
PROMPT = 4
Row = dict[str, list[Any]]
Gradients = dict[str, Tensor]


def make_rows(vocabulary: int) -> list[Row]:
    """Rows of different lengths with random tokens and weights; the prompt is no target."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for count in LABELS:
        ids = torch.randint(vocabulary, (PROMPT + count,), generator=generator).tolist()
        weights = torch.rand(PROMPT + count, generator=generator).tolist()
        labels = [-100] * PROMPT + ids[PROMPT:]
        rows.append({"input_ids": ids, "labels": labels, "token_weight": weights})
    return rows


ROWS = make_rows(len(tiny.make_tokenizer()))


def load(folder: Path, lora: Any = None) -> Any:
    """The model of a folder, with an adapter whose two factors are random."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    if lora is None:
        return model
    torch.manual_seed(1)
    options = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **{**options, **lora}))


def column(model: Any, row: Row, nll: Tensor) -> Tensor:
    """Weights of a row's predictions, from its column."""
    return torch.tensor(row["token_weight"][1:])


def own(model: Any, row: Row, nll: Tensor) -> Tensor:
    """The model's own confidence."""
    return torch.exp(-nll.detach())


def row_nll(model: Any, row: Row) -> Tensor:
    """−log p of each label after the first token, with full logits; 0 where there is none."""
    logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1].float()
    return F.cross_entropy(logits, torch.tensor(row["labels"][1:]), reduction="none")


def expect(
    model: Any,
    rows: Sequence[Row] = ROWS,
    weigh: Callable[[Any, Row, Tensor], Tensor] = column,
) -> tuple[float, Gradients]:
    """The loss and the gradients of a step over all rows, one row at a time."""
    model.eval()
    labels = sum(label != -100 for row in rows for label in row["labels"][1:])
    losses = []
    for row in rows:
        nll = row_nll(model, row)
        losses.append((weigh(model, row, nll) * nll).sum() / labels)
    loss = torch.stack(losses).sum()
    loss.backward()
    return float(loss.detach()), gradients(model)


def gradients(model: Any) -> Gradients:
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


class KeepGradients(TrainerCallback):
    """The gradients of each optimizer step, before it."""

    def __init__(self) -> None:
        self.steps: list[Gradients] = []

    def on_pre_optimizer_step(self, *args: Any, model: Any, **kwargs: Any) -> None:
        self.steps.append(gradients(model))


def make_trainer(
    kind: str,
    model: Any,
    folder: Path,
    accumulation: int = 1,
    processes: int = 1,
    rows: Sequence[Row] | Any = ROWS,
    options: dict[str, Any] | None = None,
    **settings: Any,
) -> Any:
    """A trainer for one step over all rows; `settings` are of its arguments."""
    made: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "max_steps": 1,
        "per_device_train_batch_size": len(ROWS) // accumulation // processes,
        "gradient_accumulation_steps": accumulation,
        "max_grad_norm": 0,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        **settings,
    }
    data = Dataset.from_list(list(rows)) if isinstance(rows, (list, tuple)) else rows
    shared = {"train_dataset": data, "processing_class": tiny.make_tokenizer(), **(options or {})}
    if kind == "sft":
        arguments = SFTConfig(**{"bf16": False, "gradient_checkpointing": False, **made})
        return WeightedSFTTrainer(model, arguments, **shared)
    return WeightedTrainer(model, TrainingArguments(**made), **shared)


def train(*args: Any, **kwargs: Any) -> tuple[float, Gradients]:
    """The logged loss and the gradients of the first step of `make_trainer`'s trainer."""
    trainer = make_trainer(*args, **kwargs)
    kept = KeepGradients()
    trainer.add_callback(kept)
    trainer.train()
    return trainer.state.log_history[0]["loss"], kept.steps[0]


def require_close(found: tuple[float, Gradients], expected: tuple[float, Gradients]) -> None:
    """Float32 rounding apart, both losses and all gradients are the same."""
    assert abs(found[0] - expected[0]) <= 1e-5 * abs(expected[0]), (found[0], expected[0])
    named = {
        name.replace("_orig_mod.", "").removeprefix("module."): g for name, g in found[1].items()
    }
    assert named.keys() == expected[1].keys()
    for name, right in expected[1].items():
        scale = max(float(right.abs().max()), 1e-6)
        torch.testing.assert_close(named[name], right, rtol=1e-4, atol=1e-5 * scale, msg=name)
