"""Joins a confidence store to a Hugging Face data set, row by row."""

import importlib.util
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from gift.confidence_store import ConfidenceStore, load_store
from gift.config import DataOptions
from gift.console import error_console
from gift.data.encoding import Example, encode, token_columns
from gift.data.rows import Conversation, read_conversation, without_none
from gift.errors import InputError
from gift.models.loading import listed

if TYPE_CHECKING:
    from datasets import Dataset


def with_confidence(
    dataset: "Dataset",
    store: ConfidenceStore | str | Path,
    *,
    missing: Literal["error", "drop"] = "error",
) -> "Dataset":
    """Tokenises the rows and adds the guide's confidence in each target token.

    Rows are tokenised with the store's tokenizer, chat template, `max_length`, `overlong` and
    `ignore_keys`, and found in the store by a hash of their tokens and targets: they may be a
    subset of the annotated rows, in any order.

    Args:
        dataset: rows in a format of `gift annotate`: instruction/response, prompt/completion or
            messages. None, at any depth, counts as absent.
        store: what `gift annotate` wrote, or its folder. missing: what happens where rows have no
        confidence. "error" names them; "drop" leaves them out and lists them on stderr.

    Returns:
        A data set of three columns, lists of one length: `input_ids`; `labels`, -100 where a token
        is no target; and `token_weight` float32, where `token_weight[i]` is the confidence in
        `labels[i]`, 0 where that is -100.

    Raises:
        InputError: rows without confidence, a row that cannot be used, a damaged store.
    """
    if importlib.util.find_spec("datasets") is None:
        raise InputError("the package datasets is not installed; pip install 'gift-tuning[hub]'")
    import datasets

    if not isinstance(dataset, datasets.Dataset):
        raise InputError(
            f"dataset: expected a datasets.Dataset, got {type(dataset).__name__} (take one split "
            "of a DatasetDict; load a stream as a whole)"
        )
    if missing not in ("error", "drop"):
        raise InputError(f"missing: expected 'error' or 'drop', got {missing!r}")
    if not isinstance(store, ConfidenceStore):
        store = load_store(Path(store), "store")
    examples, reasons = _encode(dataset, store)
    place = {digest: row for row, digest in enumerate(store.manifest["data"]["row_digests"])}
    columns: dict[str, list[np.ndarray]] = {"input_ids": [], "labels": [], "token_weight": []}
    lost = []
    for number, example in enumerate(examples):
        if example is None or example.digest not in place:
            lost.append(f"row {number} ({reasons.get(number, 'not annotated')})")
            continue
        found = token_columns(example, store.row(place[example.digest]))
        for column, values in zip(columns.values(), found, strict=True):
            column.append(values)
    if lost:
        _report(lost, len(examples), store, missing)
    kinds = {"input_ids": "int32", "labels": "int32", "token_weight": "float32"}
    features = {name: datasets.List(datasets.Value(kind)) for name, kind in kinds.items()}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def _encode(
    dataset: "Dataset", store: ConfidenceStore
) -> tuple[Sequence[Example | None], dict[int, str]]:
    """The rows tokenised as in annotation, None where dropped, with reasons by row number."""
    settings: dict[str, Any] = store.manifest["settings"]
    options = DataOptions(**{k: v for k, v in settings.items() if k in DataOptions.model_fields})
    conversations: list[Conversation] = []
    unread: Counter[str] = Counter()
    for number, row in enumerate(dataset):
        place = f"dataset, row {number}"
        conversation, keys = read_conversation(without_none(row), place, options.ignored_keys())
        conversations.append(conversation)
        unread.update(keys)
    if unread:
        _note("columns that nothing reads: " + ", ".join(sorted(unread)))
    data = encode(
        conversations,
        store.tokenizer(),
        max_length=options.max_length,
        context=store.manifest["data"]["context"],
        overlong=options.overlong,
        max_dropped=1,
    )
    return data.examples, {lost.row: lost.reason for lost in data.lost}


def _report(lost: list[str], rows: int, store: ConfidenceStore, missing: str) -> None:
    text = f"{len(lost)} of {rows} rows have no confidence in {store.folder}: {listed(lost)}"
    if missing == "error" or len(lost) == rows:
        raise InputError(
            f"dataset: {text}; annotate this data, or leave the rows out with missing='drop'"
        )
    _note(f"left out: {text}")


def _note(text: str) -> None:
    error_console.print(f"note: {text}", markup=False, highlight=False, soft_wrap=True)
