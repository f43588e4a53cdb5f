"""Stage 1: the guide's confidence in every target token, one forward pass over the data.

    q_t = softmax(z_t)[y_t]     z the logits of the instruct model

Source: GIFT, ACL 2026 (arXiv 2605.01256), offline annotation. q is raw: not normalised, clipped or
tempered. The same pass finds the largest probability, whether it is the target's, and the entropy,
for `gift calibration`. Rows are packed without padding (`gift.packing`); only target rows reach the
head.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from torch import Tensor

from gift import ranks
from gift.batches import Batch, make_batch, plan_batches
from gift.confidence_store import STATISTICS, GuideStatistics, read_author_scores, write_store
from gift.config import AnnotateConfig, ImportScoresConfig
from gift.console import print_summary, progress
from gift.data import EncodedData, Example, data_summary, encode_file, read_rows, require_vocabulary
from gift.errors import InputError
from gift.files import hash_json, replacing, sealed_files, write_json
from gift.models import (
    check_head,
    folder_context,
    last_hidden_state,
    lm_head,
    load_causal_lm,
    load_tokenizer,
    model_hash,
    model_structure,
    pick_device,
    pick_dtype,
    resolve_model,
    template_hash,
    tokenizer_hash,
    versions,
)
from gift.packing import enable_packing
from gift.publish import Output, output_folder
from gift.ranks import Group
from gift.show import show_rows
from gift.speed import SPEED_FILE, Clock, print_times, stage_speed
from gift_kernels import token_confidence

PART = "part-"  # begins the names of files with what was found of some rows


def annotate(config: AnnotateConfig, key: str = "") -> dict[str, Any]:
    """Writes the confidence store of `config.data` under `config.model`; returns its summary.

    Several ranks share the batches; the main one writes the store, the others return nothing. With
    `config.show_rows` it prints the first rows, writes nothing and returns nothing. `key` is stored
    in the folder's `gift_files.json`, see `publish.output_folder`.
    """
    with ranks.process_group(on_host=True) as group:
        if config.show_rows is not None:
            _show_rows(config, config.show_rows)
            return {}
        with ranks.shared_folder(
            group, config.output, overwrite=config.overwrite, key=key
        ) as output:
            return _annotate(config, output, group)


def _annotate(config: AnnotateConfig, output: Output, group: Group) -> dict[str, Any]:
    folder = resolve_model(config.model)
    tokenizer = load_tokenizer(resolve_model(config.tokenizer) if config.tokenizer else folder)
    structure = model_structure(folder)
    data = encode_file(config.data, tokenizer, config, folder_context(folder))
    require_vocabulary(structure, data, config.model)
    clock = Clock()
    # The files are hashed while the model is loaded from them.
    with ThreadPoolExecutor(1) as pool:
        hashing = pool.submit(model_hash, folder)
        model, packed = _load_guide(config, folder, data, clock)
        with clock("hash"):
            weights = hashing.result()
    made_from = _made_from(config, weights, tokenizer, packed)
    ranks.begin_shared(group, output, made_from)
    batches = _plan(config, packed, data)
    missing = group.from_main(lambda: _unfinished(batches, output.work))
    _annotate_batches(config, model, packed, batches, missing, output.work, group, clock)
    if group.size > 1:
        with clock("others"):
            group.barrier()
    if not group.is_main:
        return {}
    values = _collect(data, output.work)
    confidence = [row[0] for row in values]
    largest, top1, entropy = np.concatenate(values, axis=1)[1:]
    statistics = GuideStatistics(largest, top1.astype(bool), entropy)
    summary = {**data_summary(data), **confidence_summary(np.concatenate(confidence))}
    manifest = {
        "kind": "gift confidence store",
        "model": config.model,
        "model_hash": made_from["model"],
        "fingerprint": hash_json(made_from),
        "settings": config.model_dump(mode="json", exclude={"output", "overwrite"}),
        "versions": versions(),
        "summary": summary,
    }
    with clock("save"):
        write_store(output.partial, data, confidence, tokenizer, manifest, statistics)
    rows = [example for number in missing for example in batches[number]]
    speed = stage_speed(clock, model, rows, devices=group.size)
    write_json(output.partial / SPEED_FILE, {"seconds": clock.seconds, **speed})
    print_summary(f"Annotated {config.data.name}: {config.output}", {**summary, **speed})
    print_times(clock)
    return summary


def _show_rows(config: AnnotateConfig, count: int) -> None:
    folder = resolve_model(config.model)
    tokenizer = load_tokenizer(resolve_model(config.tokenizer) if config.tokenizer else folder)
    shown = config.model_copy(update={"limit": count, "max_dropped": 1.0})
    show_rows(encode_file(config.data, tokenizer, shown, folder_context(folder)), tokenizer)


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


def _made_from(
    config: AnnotateConfig, weights: str, tokenizer: Any, packed: bool
) -> dict[str, Any]:
    """Everything that determines the parts: settings, model, tokenizer, data and layout."""
    inputs = {"output", "overwrite", "model", "tokenizer", "data", "part_batches"}
    device = pick_device(config.device)
    return {
        **config.model_dump(mode="json", exclude=inputs),
        "device": device.type,
        "dtype": str(pick_dtype(config.dtype, device)),
        "model": weights,
        "tokenizer": tokenizer_hash(tokenizer),
        "template": template_hash(tokenizer),
        "data": hash_json(read_rows(config.data, config)),
        "layout": "packed" if packed else "padded",
    }


def confidence_summary(confidence: np.ndarray) -> dict[str, float]:
    """Mean and spread of the confidences, as numbers for the summary table."""
    return {
        "mean_confidence": float(confidence.mean(dtype=np.float64)),
        "median_confidence": float(np.median(confidence)),
        "share_below_0.1": float((confidence < 0.1).mean()),
        "share_above_0.9": float((confidence > 0.9).mean()),
    }


def _load_guide(
    config: AnnotateConfig, folder: Path, data: EncodedData, clock: Clock
) -> tuple[Any, bool]:
    """The guide, checked, and whether it reads packed rows."""
    device = pick_device(config.device)
    with clock("load"):
        model = load_causal_lm(folder, pick_dtype(config.dtype, device), device)
    shortest = min(data.kept, key=lambda example: len(example.input_ids))
    check_head(model, torch.from_numpy(shortest.input_ids).long().to(device))
    return model, enable_packing(model, data.kept)


def _plan(config: AnnotateConfig, packed: bool, data: EncodedData) -> list[list[Example]]:
    """The batches of all rows; one is computed as a whole by one rank, however many there are."""
    lengths = [len(example.input_ids) for example in data.kept]
    plan = plan_batches(lengths, config.batch_tokens, packed=packed)
    return [[data.kept[number] for number in batch] for batch in plan]


def _unfinished(batches: Sequence[Sequence[Example]], work: Path) -> list[int]:
    """Numbers of the batches that an interrupted run did not finish."""
    finished: set[str] = set()
    for path in _parts(work):
        with safe_open(path, "numpy") as part:
            finished |= set(part.keys())
    return [number for number, rows in enumerate(batches) if str(rows[0].row) not in finished]


def _annotate_batches(
    config: AnnotateConfig,
    model: Any,
    packed: bool,
    batches: Sequence[Sequence[Example]],
    missing: Sequence[int],
    work: Path,
    group: Group,
    clock: Clock,
) -> None:
    """Annotates this rank's share of the missing batches; some of them become a file in `work`."""
    share = group.share(missing)
    done = (len(batches) - len(missing)) // group.size
    with progress("annotate", done + len(share), done) as bar:
        for start in range(0, len(share), config.part_batches):
            part = share[start : start + config.part_batches]
            found = []
            with clock("compute"):
                for number in part:
                    made = make_batch(batches[number], packed=packed).to(model.device)
                    found.append(annotate_batch(model, made, config.guide_temperature))
                    bar.advance()
            with clock("wait"):
                values = torch.cat(found, dim=1).cpu().numpy()
            rows = [example for number in part for example in batches[number]]
            path = work / f"{PART}{part[0]:06d}.safetensors"
            with clock("save"), replacing(path, sealed=True) as temporary:
                save_file(_by_row(rows, values), temporary)


@torch.no_grad()
def annotate_batch(model: Any, batch: Batch, temperature: float = 1.0) -> Tensor:
    """Of the batch's targets float32 [4, N]: the confidence, and `GuideStatistics`."""
    head = lm_head(model)
    hidden = last_hidden_state(model, **batch.inputs).flatten(0, 1)  # [B · T, D]
    confidence, stats = token_confidence(
        hidden.index_select(0, batch.predicts).to(head.weight.dtype),
        head.weight,
        batch.targets,
        temperature=temperature,
        stats=STATISTICS,
        **head.options(),
    )
    found = [confidence, *(getattr(stats, name) for name in STATISTICS)]
    return torch.stack([values.float() for values in found])


def _by_row(rows: Sequence[Example], values: np.ndarray) -> dict[str, np.ndarray]:
    """Each row's part of what `annotate_batch` found; InputError where one is not finite."""
    ends = np.cumsum([example.targets for example in rows])
    by_row = {
        str(example.row): np.ascontiguousarray(row)
        for example, row in zip(rows, np.split(values, ends[:-1], axis=1), strict=True)
    }
    if bad := [int(row) for row, of_row in by_row.items() if not np.isfinite(of_row).all()]:
        raise InputError(f"--model: the guide's confidence is not finite in rows {sorted(bad)}")
    return by_row


def _collect(data: EncodedData, work: Path) -> list[np.ndarray]:
    """What `annotate_batch` found, in row order, from the parts of all ranks."""
    values: dict[str, np.ndarray] = {}
    for path in _parts(work):
        values |= load_file(path)
    if len(values) != len(data.kept):
        raise OSError(
            f"{work}: parts are missing or differ from what was written; the disk is failing or "
            "another program changed them"
        )
    return [
        values[str(example.row)] if example else np.zeros((4, 0), np.float32)
        for example in data.examples
    ]


def _parts(work: Path) -> list[Path]:
    """The whole parts in the work folder."""
    return [path for name, path in sealed_files(work).items() if name.startswith(PART)]
