"""TRL's `SFTTrainer` with a weighted loss; imports TRL."""

from typing import Any

from datasets import Dataset
from trl import SFTTrainer
from trl.data_utils import pack_dataset

from gift.errors import InputError
from gift.integrations.collator import TOKEN_WEIGHT, require_aligned
from gift.integrations.trainer import WeightedLossMixin

COLUMNS = ["input_ids", "labels", TOKEN_WEIGHT]


class WeightedSFTTrainer(WeightedLossMixin, SFTTrainer):
    """TRL's `SFTTrainer` with a weighted loss: see `WeightedLossMixin`.

    With `weights="column"` the data sets have `input_ids`, `labels` and `token_weight`, as
    `gift.datasets.with_confidence` makes them. `max_length`, `truncation_mode` and `packing` apply
    to all three; `assistant_only_loss` is refused, since the labels determine the targets. With
    other weights TRL prepares the data. Its metric `entropy` is not logged.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self._is_vision_dataset:
            raise InputError("train_dataset: has images; the weighted loss reads text alone")
        loss_type = getattr(self.args, "loss_type", "nll")
        if loss_type != "nll":
            raise InputError(f"loss_type: {loss_type} would have no effect; weights='self' is DFT")

    def _prepare_dataset(
        self,
        dataset: Any,
        processing_class: Any,
        args: Any,
        packing: bool,
        formatting_func: Any,
        dataset_name: str,
    ) -> Any:
        self._check_columns(f"{dataset_name}_dataset", dataset)
        if self.weights != "column":
            return super()._prepare_dataset(
                dataset, processing_class, args, packing, formatting_func, dataset_name
            )
        if args.assistant_only_loss:
            raise InputError(
                "assistant_only_loss: the column labels already says what is learned; leave it out"
            )
        missing = {*COLUMNS} - {*(dataset.column_names or COLUMNS)}
        if missing:
            raise InputError(
                f"{dataset_name}_dataset: has {TOKEN_WEIGHT} but no {', '.join(sorted(missing))}; "
                "weights belong to tokens, so give the tokens that they were made for "
                "(gift.datasets.with_confidence does)"
            )
        return _fit(dataset.select_columns(COLUMNS), args, packing)


def _fit(dataset: Any, args: Any, packing: bool) -> Any:
    """Rows truncated to `max_length`, or packed, as in TRL, together with the weights."""
    options = {"num_proc": args.dataset_num_proc} if isinstance(dataset, Dataset) else {}
    cut = slice(None)
    if args.max_length is not None and not packing:
        keeps_start = args.truncation_mode == "keep_start"
        cut = slice(args.max_length) if keeps_start else slice(-args.max_length, None)
    dataset = dataset.map(_cut_row, with_indices=True, fn_kwargs={"cut": cut}, **options).filter(
        _has_label, **options
    )
    if packing:
        if args.max_length is None:
            raise InputError("max_length: packing needs the length to pack to")
        if args.shuffle_dataset:
            dataset = dataset.shuffle(seed=args.seed)
        dataset = pack_dataset(dataset, args.max_length, args.packing_strategy, options)
    return dataset.shuffle(seed=args.seed) if args.shuffle_dataset else dataset


def _cut_row(row: dict[str, Any], number: int, cut: slice) -> dict[str, Any]:
    require_aligned(row, f"row {number}")
    return {key: values[cut] for key, values in row.items()}


def _has_label(row: dict[str, Any]) -> bool:
    return any(label != -100 for label in row["labels"])
