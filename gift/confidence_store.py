"""The confidence store: one float32 per target token, and what it was made from.

`confidence.safetensors` holds `confidence` float32 [all target tokens, row after row] and `offsets`
int64 [rows + 1]; a dropped row has length 0. `statistics.safetensors` holds further values of the
guide's softmax at the same tokens, see `GuideStatistics`; imported scores have none.
`manifest.json` names model, tokenizer and template by hash and every row by a digest of its tokens;
`tokenizer/` is the tokenizer that made them.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import load_file, save_file
from transformers import PreTrainedTokenizerBase

from gift.data.encoding import EncodedData
from gift.data.rows import json_lines
from gift.errors import InputError
from gift.models.tokenizer import load_tokenizer, template_hash, tokenizer_hash
from gift.storage.files import naming_file, read_record, write_json
from gift.storage.publish import check_published
from gift_kernels.linear_ce.types import Statistic

CONFIDENCE_FILE = "confidence.safetensors"
STATISTICS_FILE = "statistics.safetensors"
MANIFEST_FILE = "manifest.json"
MANIFEST_KEYS = (
    "model",
    "settings",
    "tokenizer_hash",
    "template_hash",
    "data.row_digests",
    "data.context",
)
TOKENIZER_FOLDER = "tokenizer"
# The fields of `GuideStatistics`, as the kernels call them.
STATISTICS: tuple[Statistic, ...] = ("largest", "top1", "entropy")


@dataclass(frozen=True)
class ConfidenceStore:
    """Confidences of all rows: `confidence` float32 [targets], `offsets` int64 [rows + 1]."""

    confidence: np.ndarray
    offsets: np.ndarray
    manifest: dict[str, Any]
    folder: Path

    def row(self, row: int) -> np.ndarray:
        """Confidences of one row's target tokens, float32."""
        return self.confidence[self.offsets[row] : self.offsets[row + 1]]

    def shorter_context(self, context: int | None) -> int | None:
        """The smaller of the guide's context length and `context`; None means no limit."""
        return min(filter(None, (self.manifest["data"]["context"], context)), default=None)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer the store was made with."""
        return load_tokenizer(self.folder / TOKENIZER_FOLDER)


class GuideStatistics(NamedTuple):
    """Values of the guide's softmax at each target token, all [targets]."""

    largest: np.ndarray  # float32, the largest probability
    top1: np.ndarray  # bool, whether the target has it
    entropy: np.ndarray  # float32, in nats


def write_store(
    folder: Path,
    data: EncodedData,
    confidence: list[np.ndarray],
    tokenizer: PreTrainedTokenizerBase,
    manifest: dict[str, Any],
    statistics: GuideStatistics | None = None,
) -> None:
    """Writes the store's files into an existing folder; `confidence` has one array per row."""
    lengths = [example.targets if example else 0 for example in data.examples]
    assert lengths == [len(values) for values in confidence]
    tensors = {
        "confidence": np.concatenate([np.zeros(0, np.float32), *confidence]).astype(np.float32),
        "offsets": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
    }
    with naming_file(folder / CONFIDENCE_FILE):
        save_file(tensors, folder / CONFIDENCE_FILE)
    if statistics is not None:
        with naming_file(folder / STATISTICS_FILE):
            save_file(statistics._asdict(), folder / STATISTICS_FILE)
    tokenizer.save_pretrained(folder / TOKENIZER_FOLDER)
    hashes = {
        "tokenizer_hash": tokenizer_hash(tokenizer),
        "template_hash": template_hash(tokenizer),
    }
    write_json(folder / MANIFEST_FILE, {**manifest, **hashes, "data": data.manifest()})


def load_store(folder: Path, option: str = "--confidence") -> ConfidenceStore:
    """Reads a store; InputError where a file is missing, damaged or does not fit the others.

    `option` names the folder in error messages.
    """
    manifest_path = folder / MANIFEST_FILE
    if not manifest_path.is_file():
        raise InputError(
            f"{option}: {folder} is no confidence store (no {MANIFEST_FILE}); "
            "make one with gift annotate"
        )
    check_published(folder)
    manifest = read_record(manifest_path, MANIFEST_KEYS)
    try:
        tensors = load_file(folder / CONFIDENCE_FILE)
        confidence, offsets = tensors["confidence"], tensors["offsets"]
        rows = len(manifest["data"]["row_digests"])
    except Exception as error:
        raise InputError(f"{option}: {folder}: damaged store ({error!r})") from error
    if len(offsets) != rows + 1 or offsets[-1] != len(confidence):
        raise InputError(f"{option}: {folder}: damaged store (offsets do not fit the values)")
    return ConfidenceStore(confidence, offsets, manifest, folder)


def load_statistics(store: ConfidenceStore, option: str) -> GuideStatistics:
    """The statistics of a store; InputError where it has none, or they are damaged."""
    path = store.folder / STATISTICS_FILE
    if not path.is_file():
        raise InputError(
            f"{option}: {store.folder} has confidences only (no {STATISTICS_FILE}), as imported "
            "scores do; make a store with gift annotate"
        )
    try:
        statistics = GuideStatistics(**load_file(path))
    except Exception as error:
        raise InputError(f"{option}: {path}: damaged ({error!r})") from error
    if any(len(values) != len(store.confidence) for values in statistics):
        raise InputError(f"{option}: {path}: damaged (its sizes do not fit the confidences)")
    return statistics


def require_same_rows(
    store: ConfidenceStore,
    data: EncodedData,
    tokenizer: PreTrainedTokenizerBase,
    option: str = "--confidence",
) -> None:
    """InputError unless the store was made from these rows, tokens and template."""
    manifest = store.manifest
    for name, ours in (
        ("tokenizer", tokenizer_hash(tokenizer)),
        ("template", template_hash(tokenizer)),
    ):
        if manifest[f"{name}_hash"] != ours:
            raise InputError(
                f"{option}: {store.folder} was annotated with another {name} "
                f"({manifest[f'{name}_hash'][:12]}, here {ours[:12]}); annotate again with this one"
            )
    theirs = manifest["data"]["row_digests"]
    digests = [example.digest if example else "" for example in data.examples]
    if len(theirs) != len(digests):
        raise InputError(
            f"{option}: {store.folder} has {len(theirs)} rows, --data has {len(digests)}; "
            "annotate this data"
        )
    for row, (expected, got) in enumerate(zip(theirs, digests, strict=True)):
        # An empty digest: the row was dropped here, as too long for the model that is trained.
        if expected != got and got:
            raise InputError(
                f"{option}: row {row} of the data is not the row that was annotated; annotate "
                "again with the same data, --max-length and --overlong"
            )


def read_author_scores(path: Path) -> list[list[float]]:
    """Scores of the authors' JSONL format: rows with `scores`, a pair [q, q] per response token."""
    rows = []
    for place, _, row in json_lines(path, "--scores"):
        try:
            rows.append([float(pair[0]) for pair in row["scores"]])
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise InputError(
                f"{place}: expected an object with scores, a list of pairs [q, q] ({error!r})"
            ) from None
    return rows
