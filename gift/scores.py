"""The authors' scores file as a confidence store."""

from typing import Any

import numpy as np

from gift.annotate import confidence_summary
from gift.confidence_store import read_author_scores, write_store
from gift.config import ImportScoresConfig
from gift.console import print_summary
from gift.data.encoding import data_summary, encode_file
from gift.errors import InputError
from gift.models.loading import resolve_model, versions
from gift.models.tokenizer import load_tokenizer
from gift.storage.publish import output_folder


def import_scores(config: ImportScoresConfig) -> dict[str, Any]:
    """Turns the authors' scores file into a confidence store; returns its summary."""
    tokenizer = load_tokenizer(resolve_model(config.tokenizer))
    data = encode_file(config.scores, tokenizer, config, also_read=("scores",))
    scores = read_author_scores(config.scores)[: len(data.examples)]
    confidence = []
    for example, values in zip(data.examples, scores, strict=True):
        if example is None:
            confidence.append(np.zeros(0, np.float32))
            continue
        row = [*values, config.end_confidence] if len(values) == example.targets - 1 else values
        if len(row) != example.targets:
            raise InputError(
                f"--scores: row {example.row} has {len(values)} scores, its response has "
                f"{example.targets} tokens with the end of turn; another tokenizer made the scores"
            )
        if not all(0 <= value <= 1 for value in row):
            raise InputError(f"--scores: row {example.row} has a score outside [0, 1]")
        confidence.append(np.array(row, np.float32))
    summary = {**data_summary(data), **confidence_summary(np.concatenate(confidence))}
    manifest = {
        "kind": "gift confidence store",
        "model": "imported",
        "settings": config.model_dump(mode="json", exclude={"output", "overwrite"}),
        "versions": versions(),
        "summary": summary,
    }
    with output_folder(config.output, overwrite=config.overwrite) as output:
        write_store(output.begin(), data, confidence, tokenizer, manifest)
    print_summary(f"Imported {config.scores.name}: {config.output}", summary)
    return summary
