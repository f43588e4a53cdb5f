"""A weighted loss for every subclass of Transformers' `Trainer`.

    loss = Σ_t w_t · (−log p(y_t | y_<t)) / N      N the labels of the optimizer step, all ranks'

The model's forward returns the loss in place of logits: within the forward, DistributedDataParallel
and FSDP have gathered the parameters, and `torch.compile` compiles the loss too.
"""

import functools
import types
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DataCollatorForSeq2Seq, PreTrainedModel, Trainer

from gift.errors import InputError
from gift.integrations.collator import TOKEN_WEIGHT, WeightedCollator
from gift.integrations.limits import base_of, check_model, refuse_options
from gift.models.head import last_hidden_state, lm_head
from gift_kernels import Guide, WeightTransform, weighted_ce

IGNORE_INDEX = -100
# Sums over labels; the means of the first three are logged.
SUMS = ("nll", "mean_weight", "mean_token_accuracy", "labels")

Weights = Literal["column", "self"] | PreTrainedModel


class Objective:
    """The loss's inputs besides hidden states: targets and weights [B, T], guide, transform.

    DistributedDataParallel and FSDP pass on an object of an unknown class unchanged, but would
    round a tensor of weights to the dtype of the parameters.
    """

    def __init__(
        self,
        target: Tensor,
        token_weight: Tensor | Literal["self"] | None,
        guide: Guide | None,
        transform: WeightTransform | None,
    ) -> None:
        self.target = target
        self.token_weight: Tensor | Literal["self"] | None = token_weight
        self.guide = guide
        self.transform = transform

    def __call__(self, model: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """The loss Σ w·nll, and the sums of SUMS, under a causal language model."""
        hidden, head = last_hidden_state(model, **inputs), lm_head(model)
        loss, stats = weighted_ce(
            hidden.to(head.weight.dtype),
            head.weight,
            self.target,
            self.token_weight,
            guide=self.guide,
            transform=self.transform,
            reduction="sum",
            ignore_index=IGNORE_INDEX,
            stats=("nll", "weight", "top1"),
            **head.options(),
        )
        counted = (stats.nll, stats.weight, stats.top1, self.target != IGNORE_INDEX)
        return {"loss": loss, "sums": torch.stack([values.double().sum() for values in counted])}  # pyright: ignore


class WeightedLossMixin(Trainer if TYPE_CHECKING else object):
    """Goes before a `Trainer` of Transformers, or a subclass of it, and replaces its loss.

        class MyTrainer(WeightedLossMixin, TheirTrainer): ...

    Args:
        weights: the weight of a label: "column", the data's column `token_weight`
        (`gift.datasets.with_confidence` makes it); "self", the trained model's own confidence (DFT,
        arXiv 2508.05629); or a model with the same token ids, the guide, whose confidence is the
        weight. The guide is replicated on every process's device and not trained. transform:
        applied to all weights.

    All other arguments are those of the trainer. The loss is divided by the number of labels in
    all batches of the optimizer step, on all ranks if `average_tokens_across_devices` (the
    default). Besides the loss, `nll` (the loss without weights), `mean_weight` and
    `mean_token_accuracy` are logged, over all labels since the last log.

    InputError: a setting under which the loss would be wrong, such as an adapter on the head; see
    docs/trainers.md.
    """

    # `training_step` must not scale the loss.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        *args: Any,
        weights: Weights = "column",
        transform: WeightTransform | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(weights, PreTrainedModel) and weights not in ("column", "self"):
            raise InputError(
                f"weights: expected 'column', 'self' or a model as the guide, got {weights!r}"
            )
        self.weights = weights
        self.transform = transform
        super().__init__(*args, **kwargs)
        # Otherwise Trainer does not count the labels of the optimizer step.
        self.model_accepts_loss_kwargs = True
        refuse_options(self)
        for name, dataset in self._named_datasets():
            self._check_columns(name, dataset)
        check_model(self)
        _add_objective(base_of(self.model))
        if isinstance(weights, PreTrainedModel):
            self.weights = weights.to(self.args.device).eval().requires_grad_(False)  # pyright: ignore
        elif weights == "column" and not isinstance(self.data_collator, WeightedCollator):
            known = base_of(self.model).config.get_text_config().vocab_size
            self.data_collator = WeightedCollator(self.data_collator, known)
        self._sums = {
            mode: torch.zeros(len(SUMS), dtype=torch.float64, device=self.args.device)
            for mode in ("train", "eval")
        }

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The weighted loss; with `return_outputs` also the model's outputs, from a second forward.

        Without `num_items_in_batch` the divisor is the batch's number of labels.
        """
        inputs = dict(inputs)
        objective = self._objective(inputs)
        found = model(**inputs, objective=objective)
        self._sums["train" if model.training else "eval"] += found["sums"].detach()
        items = num_items_in_batch
        if items is None:
            items = (objective.target != IGNORE_INDEX).sum()
        loss = found["loss"] / torch.as_tensor(items, device=found["loss"].device).clamp(min=1)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # The labels of all ranks are counted, and their gradients are averaged.
            loss = loss * self.accelerator.num_processes
        if not return_outputs:
            return loss
        with torch.no_grad():
            return loss, model(**inputs)

    def prediction_step(
        self,
        model: Any,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The weighted loss of a batch; logits, from a second forward, only if requested.

        A batch without labels has no loss.
        """
        inputs = self._prepare_inputs(inputs)
        labels = inputs.get("labels")
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = None
            if labels is not None:
                items = (labels[:, 1:] != IGNORE_INDEX).sum()
                if self.args.average_tokens_across_devices:
                    items = self.accelerator.reduce(items)
                loss = self.compute_loss(model, inputs, num_items_in_batch=items).detach()  # pyright: ignore
            if prediction_loss_only:
                return loss, None, None
            read = {k: v for k, v in inputs.items() if k not in ("labels", TOKEN_WEIGHT)}
            return loss, model(**read).logits, labels

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the means to the logs of a training step or an evaluation."""
        losses = (key for key in logs if key == "loss" or key.endswith("_loss"))
        name = next((key for key in losses if key != "train_loss"), None)
        if name is not None:  # then every rank logs
            mode = "train" if name == "loss" else "eval"
            sums = self.accelerator.reduce(self._sums[mode]).tolist()  # pyright: ignore
            self._sums[mode].zero_()
            prefix, count = name.removesuffix("loss"), sums[-1] or 1.0
            logs |= {
                f"{prefix}{key}": total / count for key, total in zip(SUMS[:-1], sums, strict=False)
            }
        super().log(logs, *args, **kwargs)

    def _objective(self, inputs: dict[str, Any]) -> Objective:
        """Takes labels and weights out of a batch and shifts them to the predicting positions."""
        labels, column = inputs.pop("labels", None), inputs.pop(TOKEN_WEIGHT, None)
        if labels is None:
            raise InputError("the batch has no labels; the data set needs a column of them")
        if (column is not None) != (self.weights == "column"):
            raise InputError(
                f"the batch has no {TOKEN_WEIGHT}: make it with gift.datasets.with_confidence, or "
                "choose other weights"
                if column is None
                else f"the batch has {TOKEN_WEIGHT}, but the weights come from elsewhere; remove "
                "the column"
            )
        target = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
        weight, guide = None, None
        if column is not None:
            if column.shape != labels.shape:
                raise InputError(
                    f"{TOKEN_WEIGHT}: {tuple(column.shape)} weights for {tuple(labels.shape)} "
                    "labels; the collator must treat them alike"
                )
            weight = F.pad(column[:, 1:], (0, 1))
        elif self.weights == "self":
            weight = "self"
        else:
            with torch.no_grad():
                hidden = last_hidden_state(self.weights, **inputs)
            head = lm_head(self.weights)
            guide = Guide(hidden.to(head.weight.dtype), head.weight, **head.options())
        return Objective(target, weight, guide, self.transform)

    def _named_datasets(self) -> list[tuple[str, Any]]:
        evaluated = self.eval_dataset
        named = evaluated if isinstance(evaluated, dict) else {"": evaluated}
        pairs = [(f"eval_dataset {name}".strip(), dataset) for name, dataset in named.items()]
        return [("train_dataset", self.train_dataset), *pairs]

    def _check_columns(self, name: str, dataset: Any) -> None:
        """InputError where the column of weights is missing, or would be ignored."""
        columns = getattr(dataset, "column_names", None)
        if columns is None:
            return
        if self.weights == "column" and TOKEN_WEIGHT not in columns:
            raise InputError(
                f"{name}: no column {TOKEN_WEIGHT} (it has {', '.join(columns)}); add it with "
                "gift.datasets.with_confidence, or pass weights='self' or a guide model"
            )
        if self.weights != "column" and TOKEN_WEIGHT in columns:
            raise InputError(
                f"{name}: has a column {TOKEN_WEIGHT}, but the weights come from elsewhere; remove "
                "the column, or pass weights='column'"
            )

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns = self._signature_columns
        if self.weights == "column" and columns is not None and TOKEN_WEIGHT not in columns:
            columns.append(TOKEN_WEIGHT)


class WeightedTrainer(WeightedLossMixin, Trainer):
    """Transformers' `Trainer` with a weighted loss: see `WeightedLossMixin`.

    Without a `data_collator` rows are padded, labels too, with the tokenizer that is passed as
    `processing_class`.
    """

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        data_collator: Any = None,
        *,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        if data_collator is None:
            if processing_class is None:
                raise InputError(
                    "data_collator: pass one, or the tokenizer as processing_class to pad with"
                )
            data_collator = DataCollatorForSeq2Seq(processing_class)
        super().__init__(model, args, data_collator, processing_class=processing_class, **kwargs)


def _add_objective(model: Any) -> None:
    """Gives the model's forward an argument `objective`, whose result it then returns."""
    original = model.forward

    # The signature is unchanged: Trainer reads from it which columns a model takes.
    @functools.wraps(type(model).forward)
    def forward(
        self: Any, *args: Any, objective: Objective | None = None, **inputs: Any
    ) -> dict[str, Tensor]:
        if objective is None:
            return original(*args, **inputs)
        # PEFT adds arguments that were not given.
        return objective(self, {k: v for k, v in inputs.items() if v is not None})

    model.forward = types.MethodType(forward, model)
