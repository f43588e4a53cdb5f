"""Stage 3: an adapter merged into the instruct model, whatever the model's size.

    θ_I' = θ_I + Σ_i c_i (α_i / r_i) B_i A_i        (GIFT, ACL 2026, arXiv 2605.01256, and others)

Plan (match adapter tensors with weights), validate (report all problems before any output exists),
apply: shard by shard and block by block, in a few hundred megabytes of memory. Each finished shard
is re-read, compared with what was written, and recorded, so that a killed merge resumes after it;
one rename makes the output folder appear when it is complete (`gift.storage.publish`).
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gift.config import MergeConfig
from gift.console import console, print_summary, print_table
from gift.data.token_ids import require_same_ids
from gift.distributed import ranks
from gift.distributed.ranks import Group
from gift.errors import InputError
from gift.merge import output as merge_output
from gift.merge.adapter import read_adapter, refuse_unusable_values
from gift.merge.build import MergeSettings, build_shards, open_statistics
from gift.merge.method import Method
from gift.merge.methods import METHODS
from gift.merge.plan import MergePlan, plan_merge, plan_rows
from gift.merge.residual import RESIDUAL_FOLDER
from gift.merge.stream import MANIFEST_FILE, ShardPlan, write_shards
from gift.merge.transforms import BLOCK_BYTES
from gift.models.loading import pick_device, resolve_model, versions
from gift.speed import Clock, print_times
from gift.storage.files import hash_json, read_json, write_json
from gift.storage.publish import Output, check_published
from gift.storage.shards import INDEX_FILE, Checkpoint, open_checkpoint

OUTPUT_DTYPES = {"keep": None, "float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def merge(config: MergeConfig, key: str = "") -> dict[str, Any]:
    """Plans, validates and writes the merged model; returns the summary.

    Several ranks share the shards; the main one writes the other files and publishes. `key` is
    stored in the folder's `gift_files.json`, see `publish.output_folder`.

    InputError: everything that cannot be merged correctly, in one message and before any output is
    written; an existing output without `overwrite`; too little disk.
    """
    clock = Clock()
    with ranks.process_group(on_host=True) as group:
        with clock("plan"):
            prepared = _prepare(config)
        if config.dry_run:
            return prepared.summary
        with ranks.shared_folder(
            group, config.output, overwrite=config.overwrite, key=key
        ) as output:
            _write(config, prepared, output, group, clock)
        print_summary(f"Merged model: {config.output}", prepared.summary)
        print_times(clock)
        return prepared.summary


class _Prepared(NamedTuple):
    """A merge that was validated, before anything is written."""

    plan: MergePlan
    shards: Sequence[ShardPlan]
    side_files: Sequence[Path]
    notes: Sequence[str]
    summary: dict[str, Any]
    made_from: dict[str, Any]


def _prepare(config: MergeConfig) -> _Prepared:
    """Plans and validates the merge, and prints the plan."""
    method = METHODS[config.method]
    _check_options(config, method)
    folder = resolve_model(config.model)
    checkpoint = open_checkpoint(folder)
    base = open_checkpoint(resolve_model(config.base)) if config.base else None
    adapters = [read_adapter(adapter_folder(name)) for name in config.adapter]
    for adapter in adapters:
        require_same_ids("--model", folder, adapter.folder)
    plan = plan_merge(
        checkpoint,
        read_json(folder / merge_output.CONFIG_FILE),
        adapters,
        config.coefficients(),
        base=base,
        untie=config.untie_embeddings,
        allow_dora=method.takes_dora,
    )
    device, dtype = pick_device(config.device), OUTPUT_DTYPES[config.dtype]
    settings = MergeSettings(config, len(plan.adapters), device, dtype)
    statistics = open_statistics(config.statistics, method, plan)
    shards = build_shards(plan, settings, statistics)
    files, left_out = merge_output.side_files(
        folder, [INDEX_FILE, *(shard.name for shard in shards)]
    )
    notes = [*plan.notes, *_notes(config, plan, folder, left_out), *statistics.notes]
    _print_plan(config, plan, notes)
    made_from = {}
    if not config.dry_run:
        for adapter in adapters:
            refuse_unusable_values(adapter)
        made_from = _made_from(config, checkpoint, base, plan, settings, statistics.fingerprint)
    return _Prepared(plan, shards, files, notes, _summary(plan, shards), made_from)


def _write(
    config: MergeConfig, prepared: _Prepared, output: Output, group: Group, clock: Clock
) -> None:
    """Writes the merged model to `output`."""
    plan, shards, files, notes, summary, made_from = prepared
    keep = [RESIDUAL_FOLDER, *(shard.name for shard in shards)]
    partial = ranks.begin_shared(group, output, made_from, keep)
    if group.is_main:
        _check_disk(partial, shards)
    done = write_shards(output, shards, clock, config.save_residual, group)
    if not group.is_main:
        return
    with clock("save"):
        merge_output.copy_side_files(plan.checkpoint.folder, files, partial)
        _write_rest(config, plan, shards, partial)
        manifest = _manifest(config, plan, hash_json(made_from), notes, summary)
        merge_output.write_card(partial, manifest)
        write_json(partial / MANIFEST_FILE, {**manifest, "shards": done})


def adapter_folder(name: str) -> Path:
    """A local adapter folder, or the snapshot of a hub id.

    InputError: no such adapter, or a stage's output whose files have changed.
    """
    if not Path(name).is_dir():
        return resolve_model(name)
    check_published(Path(name))
    return Path(name)


def _check_options(config: MergeConfig, method: Method) -> None:
    if method.needs_base and not config.base:
        raise InputError(f"--base: --method {method.name} needs the base model")
    if method.statistics and len(config.statistics) != 1 + len(config.adapter):
        raise InputError(
            f"--statistics: --method {method.name} needs {1 + len(config.adapter)} folders (the "
            f"instruct model's, then one per adapter), got {len(config.statistics)}"
        )
    if config.statistics and not method.statistics:
        raise InputError(f"--statistics: --method {method.name} uses none; leave it out")
    config.refuse_unread_settings()
    if config.save_residual and config.dtype != "keep":
        raise InputError("--save-residual: needs --dtype keep; another dtype loses the bits")


def _notes(
    config: MergeConfig, plan: MergePlan, folder: Path, left_out: Sequence[str]
) -> list[str]:
    vectors = len(plan.adapters) + (config.base is not None)
    note = METHODS[config.method].note(config, vectors)
    notes = [note] if note else []
    own_names = {config.model, str(folder), folder.name}
    for adapter in plan.adapters:
        if adapter.base_name and adapter.base_name not in own_names:
            notes.append(
                f"adapter {adapter.folder.name} was trained on {adapter.base_name} and is merged "
                f"into {config.model}; its shapes fit"
            )
        if adapter.saved and not config.base:
            notes.append(
                f"adapter {adapter.folder.name} holds {len(adapter.saved)} full tensors "
                "(modules_to_save or biases), which replace the model's; with --base only their "
                "change since the base would be added"
            )
    if left_out:
        notes.append(f"other weights in the model folder are left out: {', '.join(left_out)}")
    return notes


def _print_plan(config: MergeConfig, plan: MergePlan, notes: Sequence[str]) -> None:
    print_table(
        f"Plan: {config.method} into {config.model}",
        ("tensors", "count", "shape", "rank", "scale"),
        plan_rows(plan),
    )
    for note in notes:
        console.print(f"Note: {note}", markup=False, highlight=False, soft_wrap=True)


def _summary(plan: MergePlan, shards: Sequence[ShardPlan]) -> dict[str, Any]:
    written = [shard for shard in shards if not shard.is_unchanged]
    return {
        "tensors": len(plan.tensors),
        "adapted_tensors": sum(tensor.is_adapted for tensor in plan.tensors.values()),
        "shards_rewritten": len(written),
        "shards_unchanged": len(shards) - len(written),
        "gigabytes_rewritten": sum(shard.size for shard in written) / 1e9,
    }


def _made_from(
    config: MergeConfig,
    checkpoint: Checkpoint,
    base: Checkpoint | None,
    plan: MergePlan,
    settings: MergeSettings,
    statistics: str,
) -> dict[str, Any]:
    """Everything that determines the output's bytes; shards by name, size, time and header."""
    return {
        **config.model_dump(mode="json", exclude={"output", "overwrite", "dry_run"}),
        "model's shards": checkpoint.fingerprint(),
        "base's shards": base.fingerprint() if base is not None else None,
        "adapters": [adapter.hashes() for adapter in plan.adapters],
        "statistics": statistics,
        "device": settings.device.type,
        "block bytes": BLOCK_BYTES,
        "versions": versions(),
    }


def _manifest(
    config: MergeConfig,
    plan: MergePlan,
    fingerprint: str,
    notes: Sequence[str],
    summary: dict[str, Any],
) -> dict[str, Any]:
    """The record of the merge, without its shards."""
    method = METHODS[config.method]
    return {
        "kind": "gift merge",
        "fingerprint": fingerprint,
        "model": config.model,
        "base": config.base,
        "method": config.method,
        "formula": method.formula,
        "settings": {name: getattr(config, name) for name in method.settings},
        "dtype": config.dtype,
        "untied_head": plan.untied_head,
        "added_head": None if plan.untied_head in plan.checkpoint.tensors else plan.untied_head,
        "adapters": merge_output.adapter_provenance(plan, config.coefficients()),
        "notes": notes,
        "summary": summary,
        "versions": versions(),
    }


def _write_rest(
    config: MergeConfig, plan: MergePlan, shards: Sequence[ShardPlan], partial: Path
) -> None:
    """Config and index, adapted to the new weights; with a residual, the originals too."""
    folder = plan.checkpoint.folder
    untied = plan.untied_head is not None
    converted = any(job.spec.dtype != job.source.dtype for shard in shards for job in shard.jobs)
    dtype = OUTPUT_DTYPES[config.dtype] if converted else None
    merge_output.write_config(folder, partial, dtype=dtype, untied=untied)
    sizes = {job.spec.name: (shard.name, job.spec.size) for shard in shards for job in shard.jobs}
    merge_output.write_index(plan.checkpoint, partial, sizes, converted or untied)
    if config.save_residual:
        for name in (merge_output.CONFIG_FILE, INDEX_FILE):
            if (folder / name).exists():
                shutil.copyfile(folder / name, partial / RESIDUAL_FOLDER / name)


def _check_disk(partial: Path, shards: Sequence[ShardPlan]) -> None:
    present = sum(path.stat().st_size for path in partial.glob("*.safetensors"))
    needed = sum(shard.size for shard in shards if not shard.is_unchanged) - present
    free = shutil.disk_usage(partial).free
    if needed > free:
        raise InputError(
            f"--output: the disk of {partial.parent} has {free / 1e9:.1f} GB free, the merged "
            f"model needs {needed / 1e9:.1f} GB; choose another disk"
        )
