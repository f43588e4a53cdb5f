"""Stage 1: the guide's confidence in every target token, one forward pass over the data.

    q_t = softmax(z_t)[y_t]     z the logits of the instruct model

Source: GIFT, ACL 2026 (arXiv 2605.01256), offline annotation. q is raw: not normalised, clipped or
tempered. The same pass finds the largest probability, whether it is the target's, and the entropy,
for `gift calibration`. Rows are packed without padding (`gift.data.packing`); only target rows
reach the head.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from torch import Tensor

from gift.confidence_store import STATISTICS, GuideStatistics, write_store
from gift.config import AnnotateConfig, DataOptions
from gift.config.annotate import AnnotateOptions
from gift.console import error_console, print_summary, progress
from gift.data.batches import Batch, make_batch, plan_batches
from gift.data.encoding import (
    EncodedData,
    Example,
    data_summary,
    encode_file,
    encode_rows,
    read_rows,
    require_vocabulary,
    token_columns,
)
from gift.data.packing import enable_packing
from gift.data.rows import read_conversation, without_none
from gift.data.show import show_rows
from gift.data.token_ids import require_same_tokens, tokenizer_for
from gift.distributed import ranks
from gift.distributed.ranks import Group
from gift.errors import InputError
from gift.models.head import check_head, last_hidden_state, lm_head
from gift.models.loading import (
    folder_context,
    load_causal_lm,
    model_hash,
    model_structure,
    pick_device,
    pick_dtype,
    resolve_model,
    versions,
)
from gift.models.tokenizer import template_hash, tokenizer_hash
from gift.speed import SPEED_FILE, Clock, print_times, stage_speed
from gift.storage.files import hash_json, replacing, sealed_files, write_json
from gift.storage.publish import Output
from gift_kernels import token_confidence

PART = "part-"  # prefix of the files that hold values of some rows


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
    tokenizer, other = tokenizer_for(folder, config.tokenizer)
    structure = model_structure(folder)
    data = encode_file(config.data, tokenizer, config, folder_context(folder))
    require_vocabulary(structure, data, config.model)
    require_same_tokens("--tokenizer", folder, other, data.kept, config.tokenizer)
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


class Annotator:
    """A guide that annotates batches of rows: an actor class for `ray.data.Dataset.map_batches`.

    It needs no Ray: an instance is a function of a batch. The model is loaded once.

    Args:
        model: the guide, a folder or a hub id; `tokenizer` names another model's tokenizer and
            chat template. All others are options of `gift annotate`.

    Raises:
        InputError: a model or tokenizer that cannot be used.
        ValueError: an option out of range.
    """

    def __init__(
        self,
        model: str,
        *,
        tokenizer: str | None = None,
        device: str = "auto",
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        max_length: int = 2048,
        overlong: Literal["drop", "truncate"] = "drop",
        ignore_keys: str = "",
        batch_tokens: int = 16384,
        guide_temperature: float = 1.0,
    ) -> None:
        self._rows = DataOptions(max_length=max_length, overlong=overlong, ignore_keys=ignore_keys)
        self._options = AnnotateOptions(
            batch_tokens=batch_tokens, guide_temperature=guide_temperature
        )
        place = pick_device(device)
        folder = resolve_model(model)
        self._name, self._context = model, folder_context(folder)
        self._tokenizer, self._other = tokenizer_for(folder, tokenizer)
        self._folder, self._whose = folder, tokenizer
        self._model = load_causal_lm(folder, pick_dtype(dtype, place), place)
        trial = _trial_rows(self._model, max_length)
        check_head(self._model, torch.from_numpy(trial[0].input_ids).long().to(place))
        self._packed = enable_packing(self._model, trial)
        self._noted: set[str] = set()

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The batch with the tokens of its rows, and the guide's confidence in the targets.

        Args:
            batch: columns by name, which hold the keys of `gift annotate`'s rows:
                instruction/response, prompt/completion or messages. None counts as absent, also
                inside objects.

        Returns:
            All columns, and three object arrays of lists, as `gift.datasets.with_confidence` makes
            them: `input_ids`, `labels` (-100 where a token is no target) and `token_weight`, the
            confidence in each label, 0 where that is -100. A row that is dropped, because it is
            longer than `max_length` or without an assistant's text, has empty lists.

        Raises:
            InputError: columns of these names or of unequal lengths, a row that cannot be used, or
                a confidence that is not finite.
        """
        found: dict[str, list[list[Any]]] = {"input_ids": [], "labels": [], "token_weight": []}
        columns = {name: _plain(values) for name, values in batch.items()}
        if taken := sorted(columns.keys() & found.keys()):
            raise InputError(f"batch: has {', '.join(taken)} already; rename or drop these columns")
        lengths = {name: len(values) for name, values in columns.items()}
        if len(set(lengths.values())) > 1:
            raise InputError(f"batch: expected columns of one length, got {lengths}")
        conversations, unread = [], dict[str, None]()
        for number, values in enumerate(zip(*columns.values(), strict=True)):
            row = without_none(dict(zip(columns, values, strict=True)))
            place = f"row {number} of the batch"
            conversation, keys = read_conversation(row, place, self._rows.ignored_keys())
            conversations.append(conversation)
            unread |= dict.fromkeys(keys)
        data = encode_rows(
            conversations,
            self._tokenizer,
            max_length=self._rows.max_length,
            context=self._context,
            overlong=self._rows.overlong,
        )
        require_same_tokens("tokenizer", self._folder, self._other, data.kept, self._whose)
        notes = [note.rpartition(" (")[0] for note in data.notes]  # without the number of rows
        self._note([*notes, *(f"column that nothing reads: {key}" for key in unread)])
        confidence = self._annotate(data)
        for row, example in enumerate(data.examples):
            made = token_columns(example, confidence[row]) if example else [np.zeros(0)] * 3
            for column, values in zip(found.values(), made, strict=True):
                column.append(values.tolist())
        return {**batch, **{name: _object_array(rows) for name, rows in found.items()}}

    def _note(self, notes: Sequence[str]) -> None:
        """Prints the notes that no earlier batch printed."""
        for note in notes:
            if note not in self._noted:
                self._noted.add(note)
                error_console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)

    def _annotate(self, data: EncodedData) -> dict[int, np.ndarray]:
        """The confidences of the rows that are kept, by row."""
        if data.kept:
            require_vocabulary(self._model, data, self._name)
        confidence = {}
        for rows in _plan(self._options, self._packed, data):
            made = make_batch(rows, packed=self._packed).to(self._model.device)
            found = annotate_batch(self._model, made, self._options.guide_temperature)
            by_row = _by_row(rows, found.cpu().numpy())
            confidence |= {int(row): values[0] for row, values in by_row.items()}
        return confidence


def _show_rows(config: AnnotateConfig, count: int) -> None:
    folder = resolve_model(config.model)
    tokenizer, other = tokenizer_for(folder, config.tokenizer)
    shown = config.model_copy(update={"limit": count, "max_dropped": 1.0})
    data = encode_file(config.data, tokenizer, shown, folder_context(folder))
    require_same_tokens("--tokenizer", folder, other, data.kept, config.tokenizer)
    show_rows(data, tokenizer)


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


def _plan(config: AnnotateOptions, packed: bool, data: EncodedData) -> list[list[Example]]:
    """The batches of all rows; each is computed by one rank, whatever the number of ranks."""
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
    """Annotates this rank's share of the missing batches; saves several per file in `work`."""
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


def _trial_rows(model: Any, max_length: int) -> list[Example]:
    """Arbitrary rows to test packing: two short ones, one longer than the window if any."""
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    lengths = [5, 8] + ([window + 2] if window is not None and window < max_length else [])
    vocabulary = model.get_input_embeddings().weight.shape[0]
    return [
        Example(row, np.arange(length, dtype=np.int32) % vocabulary, np.arange(length) > 0)
        for row, length in enumerate(lengths)
    ]


def _plain(value: Any) -> Any:
    """Arrays, at any depth, as lists and numbers for JSON."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, dict) else value


def _object_array(rows: Sequence[list[Any]]) -> np.ndarray:
    """Lists as an array of objects, which Ray keeps as lists even where all have one length."""
    array = np.empty(len(rows), object)
    array[:] = rows
    return array


@torch.no_grad()
def annotate_batch(model: Any, batch: Batch, temperature: float = 1.0) -> Tensor:
    """Confidence and `GuideStatistics` of the batch's N targets, float32 [4, N]."""
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
    """Splits results of `annotate_batch` by row; InputError where a value is not finite."""
    ends = np.cumsum([example.targets for example in rows])
    by_row = {
        str(example.row): np.ascontiguousarray(row)
        for example, row in zip(rows, np.split(values, ends[:-1], axis=1), strict=True)
    }
    if bad := [int(row) for row, of_row in by_row.items() if not np.isfinite(of_row).all()]:
        raise InputError(f"--model: the guide's confidence is not finite in rows {sorted(bad)}")
    return by_row


def _collect(data: EncodedData, work: Path) -> list[np.ndarray]:
    """Results of `annotate_batch` in row order, from the parts of all ranks."""
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
    """The intact parts in the work folder."""
    return [path for name, path in sealed_files(work).items() if name.startswith(PART)]
