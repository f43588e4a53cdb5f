"""Stage 1: the guide's confidence in every target token, one forward pass over the data.

    q_t = softmax(z_t)[y_t]     z the logits of the instruct model

Source: GIFT, ACL 2026 (arXiv 2605.01256), offline annotation. q is raw: not normalised, clipped or
tempered. Batches are filled by a budget of padded tokens; only target rows reach the head.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from gift.batches import pad_batch, plan_batches, target_ids
from gift.confidence_store import read_author_scores, write_store
from gift.config import AnnotateConfig, ImportScoresConfig
from gift.console import print_summary, progress
from gift.data import EncodedData, Example, data_summary, encode_file, read_rows, require_vocabulary
from gift.errors import InputError
from gift.files import hash_json, output_folder, read_json, replacing, write_json
from gift.models import (
    check_head,
    folder_context,
    last_hidden_state,
    lm_head,
    load_causal_lm,
    load_tokenizer,
    model_hash,
    pick_device,
    pick_dtype,
    resolve_model,
    template_hash,
    tokenizer_hash,
    versions,
)
from gift.show import show_rows
from gift_kernels import token_confidence

PARTS_FOLDER = "parts"
PROGRESS_FILE = "progress.json"


def annotate(config: AnnotateConfig) -> dict[str, Any]:
    """Writes the confidence store of `config.data` under `config.model`; returns its summary.

    With `config.show_rows` it prints the first rows, writes nothing and returns nothing.
    """
    folder = resolve_model(config.model)
    tokenizer = load_tokenizer(resolve_model(config.tokenizer) if config.tokenizer else folder)
    context = folder_context(folder)
    if config.show_rows is not None:
        shown = config.model_copy(update={"limit": config.show_rows, "max_dropped": 1.0})
        show_rows(encode_file(config.data, tokenizer, shown, context), tokenizer)
        return {}
    data = encode_file(config.data, tokenizer, config, context)
    fingerprint = annotate_fingerprint(config)
    with output_folder(config.output, overwrite=config.overwrite, resume=True) as partial:
        batches = plan_batches(data.kept, config.batch_tokens)
        parts = [
            batches[start : start + config.part_batches]
            for start in range(0, len(batches), config.part_batches)
        ]
        _start_or_resume(partial, fingerprint)
        missing = [number for number in range(len(parts)) if not _part(partial, number).exists()]
        if missing:
            _annotate_parts(config, folder, data, partial, parts, missing)
        confidence = _collect(data, partial, parts)
        manifest = {
            "kind": "gift confidence store",
            "model": config.model,
            "model_hash": model_hash(folder),
            "fingerprint": fingerprint,
            "settings": config.model_dump(mode="json", exclude={"output", "overwrite"}),
            "versions": versions(),
        }
        summary = {**data_summary(data), **confidence_summary(np.concatenate(confidence))}
        write_store(partial, data, confidence, tokenizer, {**manifest, "summary": summary})
        _remove_progress(partial)
    print_summary(f"Annotated {config.data.name}: {config.output}", summary)
    return summary


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
    with output_folder(config.output, overwrite=config.overwrite) as partial:
        write_store(partial, data, confidence, tokenizer, manifest)
    print_summary(f"Imported {config.scores.name}: {config.output}", summary)
    return summary


def annotate_fingerprint(config: AnnotateConfig) -> str:
    """Hash of all that decides the store's content: model, tokenizer, data and settings."""
    folder = resolve_model(config.model)
    tokenizer = load_tokenizer(resolve_model(config.tokenizer) if config.tokenizer else folder)
    return hash_json(
        {
            "settings": config.model_dump(
                mode="json", exclude={"output", "overwrite", "model", "tokenizer", "data"}
            ),
            "model": model_hash(folder),
            "tokenizer": tokenizer_hash(tokenizer),
            "template": template_hash(tokenizer),
            "data": hash_json(read_rows(config.data, config)),
        }
    )


def confidence_summary(confidence: np.ndarray) -> dict[str, float]:
    """Mean and spread of the confidences, as numbers for the summary table."""
    return {
        "mean_confidence": float(confidence.mean(dtype=np.float64)),
        "median_confidence": float(np.median(confidence)),
        "share_below_0.1": float((confidence < 0.1).mean()),
        "share_above_0.9": float((confidence > 0.9).mean()),
    }


def _annotate_parts(
    config: AnnotateConfig,
    folder: Path,
    data: EncodedData,
    partial: Path,
    parts: Sequence[Sequence[Sequence[Example]]],
    missing: Sequence[int],
) -> None:
    device = pick_device(config.device)
    model = load_causal_lm(folder, pick_dtype(config.dtype, device), device)
    require_vocabulary(model, data, config.model)
    shortest = min(data.kept, key=lambda example: len(example.input_ids))
    check_head(model, torch.from_numpy(shortest.input_ids).long().to(device))
    with progress(
        "annotate", sum(map(len, parts)), sum(map(len, parts)) - _count(parts, missing)
    ) as bar:
        for number in missing:
            values = {}
            for batch in parts[number]:
                rows = annotate_batch(model, batch, config.guide_temperature)
                values |= {str(example.row): row for example, row in zip(batch, rows, strict=True)}
                bar.advance()
            with replacing(_part(partial, number)) as temporary:
                save_file(values, temporary)


@torch.no_grad()
def annotate_batch(
    model: Any, batch: Sequence[Example], temperature: float = 1.0
) -> list[np.ndarray]:
    """Confidences float32 of each row's targets."""
    device = model.get_input_embeddings().weight.device
    ids, attention, predicts = pad_batch(batch, device)
    head = lm_head(model)
    hidden = last_hidden_state(model, ids, attention)[predicts].to(head.weight.dtype)  # [n, D]
    confidence = token_confidence(
        hidden,
        head.weight,
        target_ids(batch, device),
        temperature=temperature,
        **head.options(),
    )
    values = confidence.float().cpu().numpy()
    if not np.isfinite(values).all():
        rows = [example.row for example in batch]
        raise InputError(f"--model: the guide's confidence is not finite in rows {rows}")
    lengths = [example.targets for example in batch]
    return np.split(values, np.cumsum(lengths)[:-1])


def _start_or_resume(partial: Path, fingerprint: str) -> None:
    """Keeps the parts of an interrupted annotation with the same inputs; removes all others."""
    state = partial / PROGRESS_FILE
    if state.exists() and read_json(state) == {"fingerprint": fingerprint}:
        return
    _remove_progress(partial)
    (partial / PARTS_FOLDER).mkdir(exist_ok=True)
    write_json(state, {"fingerprint": fingerprint})


def _remove_progress(partial: Path) -> None:
    for path in (partial / PARTS_FOLDER).glob("*"):
        path.unlink()
    if (partial / PARTS_FOLDER).exists():
        (partial / PARTS_FOLDER).rmdir()
    (partial / PROGRESS_FILE).unlink(missing_ok=True)


def _part(partial: Path, number: int) -> Path:
    return partial / PARTS_FOLDER / f"part-{number:05d}.safetensors"


def _count(parts: Sequence[Sequence[Any]], numbers: Sequence[int]) -> int:
    return sum(len(parts[number]) for number in numbers)


def _collect(data: EncodedData, partial: Path, parts: Sequence[Any]) -> list[np.ndarray]:
    """Confidences in row order, from all parts."""
    values: dict[str, np.ndarray] = {}
    for number in range(len(parts)):
        values |= load_file(_part(partial, number))
    return [
        values[str(example.row)] if example else np.zeros(0, np.float32)
        for example in data.examples
    ]
