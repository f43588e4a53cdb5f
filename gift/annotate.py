"""Stage 1: the guide's confidence in every target token, one forward pass over the data.

    q_t = softmax(z_t)[y_t]     z the logits of the instruct model

Source: GIFT, ACL 2026 (arXiv 2605.01256), offline annotation. q is raw: not normalised, clipped or
tempered. The same pass finds the largest probability, whether it is the target's, and the entropy,
for `gift calibration`. Rows are packed without padding (`gift.data.packing`); only target rows
reach the head.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from gift.annotation.batches import Guide, Plan, fewer, note_tokens
from gift.annotation.parts import (
    begun_tokens,
    collect_parts,
    split_by_row,
    unfinished,
    write_part,
)
from gift.confidence_store import GuideStatistics, write_store
from gift.config import AnnotateConfig, DataOptions
from gift.config.annotate import AnnotateOptions
from gift.console import Bar, error_console, print_summary, progress
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
from gift.models.head import check_head
from gift.models.loading import (
    folder_context,
    load_causal_lm,
    model_structure,
    pick_device,
    pick_dtype,
    resolve_model,
    versions,
)
from gift.models.tokenizer import template_hash, tokenizer_hash
from gift.speed import SPEED_FILE, Clock, load_and_hash, print_times, stage_speed
from gift.storage.files import hash_json, write_json
from gift.storage.publish import Output


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
    load = partial(_load_guide, config, folder, data)
    guide, weights = load_and_hash(folder, clock, load)
    made_from = _made_from(config, weights, tokenizer, guide.packed)
    ranks.begin_shared(group, output, made_from)
    plan = _annotate_rows(config, guide, data.kept, output.work, group, clock)
    if not group.is_main:
        return {}
    values = collect_parts(data, output.work, plan.tokens)
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
    rows = [example for number in plan.missing for example in plan.batches[number]]
    speed = {
        "batch_tokens": plan.tokens,
        **stage_speed(clock, guide.model, rows, devices=group.size),
    }
    write_json(output.partial / SPEED_FILE, {"seconds": clock.seconds, **speed})
    print_summary(f"Annotated {config.data.name}: {config.output}", {**summary, **speed})
    print_times(clock)
    return summary


class Annotator:
    """A guide that annotates batches of rows: an actor class for `ray.data.Dataset.map_batches`.

    Ray is not needed: an instance can be called with a batch. The model is loaded once.

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
        options = AnnotateOptions(batch_tokens=batch_tokens, guide_temperature=guide_temperature)
        self._tokens = options.batch_tokens
        place = pick_device(device)
        folder = resolve_model(model)
        self._name, self._context = model, folder_context(folder)
        self._tokenizer, self._other = tokenizer_for(folder, tokenizer)
        self._folder, self._whose = folder, tokenizer
        model = load_causal_lm(folder, pick_dtype(dtype, place), place)
        trial = _trial_rows(model, max_length)
        check_head(model, torch.from_numpy(trial[0].input_ids).long().to(place))
        self._guide = Guide(model, enable_packing(model, trial), options.guide_temperature)
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
            require_vocabulary(self._guide.model, data, self._name)
        confidence: dict[int, np.ndarray] = {}
        pending = data.kept
        while pending:
            rows, *others = self._guide.plan(self._tokens, pending)
            found = self._guide.attempt(rows)
            if found is None:
                self._tokens = fewer(self._tokens, [rows])
                note_tokens(self._tokens)
                continue
            by_row = split_by_row(rows, found.cpu().numpy())
            confidence |= {int(row): values[0] for row, values in by_row.items()}
            pending = [example for batch in others for example in batch]
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


def _load_guide(config: AnnotateConfig, folder: Path, data: EncodedData) -> Guide:
    device = pick_device(config.device)
    model = load_causal_lm(folder, pick_dtype(config.dtype, device), device)
    shortest = min(data.kept, key=lambda example: len(example.input_ids))
    check_head(model, torch.from_numpy(shortest.input_ids).long().to(device))
    return Guide(model, enable_packing(model, data.kept), config.guide_temperature)


def _annotate_rows(
    config: AnnotateConfig,
    guide: Guide,
    rows: Sequence[Example],
    work: Path,
    group: Group,
    clock: Clock,
) -> Plan:
    """Saves the values of all rows in `work`; returns the plan, whose batches fit on every rank."""
    tokens = group.from_main(lambda: begun_tokens(work)) or config.batch_tokens
    if tokens < config.batch_tokens:
        note_tokens(tokens)
    while True:
        batches = guide.plan(tokens, rows)
        missing = partial(unfinished, batches, work, tokens)
        plan = Plan(tokens, batches, group.from_main(missing))
        too_large = _annotate_batches(config, guide, plan, work, group, clock)
        if not too_large:
            return plan
        lost = len(batches) - len(group.from_main(missing))
        tokens = fewer(tokens, [batches[number] for number in too_large])
        note_tokens(tokens, lost)


def _annotate_batches(
    config: AnnotateConfig, guide: Guide, plan: Plan, work: Path, group: Group, clock: Clock
) -> list[int]:
    """Annotates this rank's share of the missing batches; saves several per part in `work`.

    All ranks stop after a part in which a batch did not fit on one of them; returns the numbers of
    such batches. The first part is the largest batch alone, so that little is lost.
    """
    share, count = group.share(plan.missing), group.count(len(plan.missing))
    done = group.count(len(plan.batches) - len(plan.missing))
    with progress("annotate", done + count, done) as bar:
        for start, stop in pairwise([0, *range(1, count, config.part_batches), count]):
            too_large = _annotate_part(guide, plan, share[start:stop], work, clock, bar)
            if group.size > 1:
                with clock("others"):
                    too_large = group.gather(too_large)
            if too_large:
                return too_large
    return []


def _annotate_part(
    guide: Guide, plan: Plan, part: Sequence[int], work: Path, clock: Clock, bar: Bar
) -> list[int]:
    """Saves the values of these batches; saves nothing and returns the one that does not fit."""
    if not part:
        return []
    found = []
    with clock("compute"):
        for number in part:
            values = guide.attempt(plan.batches[number])
            if values is None:
                return [number]
            found.append(values)
            bar.advance()
    with clock("wait"):
        values = np.concatenate([of_batch.cpu().numpy() for of_batch in found], axis=1)
    rows = [example for number in part for example in plan.batches[number]]
    with clock("save"):
        write_part(work, plan.tokens, part[0], rows, values)
    return []


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
