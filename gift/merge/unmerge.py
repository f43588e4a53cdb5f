"""Undoes a merge: bitwise with the residual that the merge saved, else to one rounding error.

Without the residual the adapter's change is subtracted from the merged weights. A merged weight was
rounded once, the difference is rounded once more, so a weight comes back to within half a unit in
the last place of the merged weight plus half a unit of its own; this bound is tight.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gift.config import MergeOptions, UnmergeConfig
from gift.console import print_summary
from gift.errors import InputError
from gift.merge import output as merge_output
from gift.merge.adapter import Adapter, read_adapter
from gift.merge.build import Statistics, build_shards
from gift.merge.command import adapter_folder
from gift.merge.methods import METHODS
from gift.merge.plan import check_whole, plan_merge, refuse_quantised
from gift.merge.residual import RESIDUAL_FOLDER, ResidualReader, RestoreTransform
from gift.merge.stream import MANIFEST_FILE, Job, ShardPlan, write_shards
from gift.merge.transforms import MergeSettings
from gift.models.loading import pick_device, resolve_model, versions
from gift.speed import Clock
from gift.storage.files import read_json, read_record, write_json
from gift.storage.publish import Output, check_published, output_folder
from gift.storage.shards import INDEX_FILE, Checkpoint, open_checkpoint, spec_of

MANIFEST_KEYS = ("fingerprint", "added_head", "adapters", "method", "settings", "base", "dtype")
RESULT_FILE = "gift_unmerge.json"
EXACT = "exact: every changed tensor has its original bits"
ROUNDED = (
    "to within one rounding: half a unit in the last place of the merged weight plus half of the "
    "original's; a merge with --save-residual can be taken back exactly"
)


def unmerge(config: UnmergeConfig) -> dict[str, Any]:
    """Writes the model before the merge; returns the summary, which states the accuracy.

    InputError: a folder that gift merge did not write, other adapters than the merged ones, a
    method that cannot be undone without its residual.
    """
    with output_folder(config.output, overwrite=config.overwrite) as output:
        summary = _unmerge(config, output)
    print_summary(f"Unmerged model: {config.output}", summary)
    return summary


def _unmerge(config: UnmergeConfig, output: Output) -> dict[str, Any]:
    folder = resolve_model(config.model)
    if not (folder / MANIFEST_FILE).exists():
        raise InputError(f"--model: {folder} has no {MANIFEST_FILE}; gift merge did not write it")
    check_published(folder)
    manifest = read_record(folder / MANIFEST_FILE, MANIFEST_KEYS)
    checkpoint = open_checkpoint(folder)
    refuse_quantised(folder, read_json(folder / merge_output.CONFIG_FILE))
    problems, _ = check_whole(checkpoint)
    if problems:
        raise InputError("--model: " + "; ".join(problems))
    residual = folder / RESIDUAL_FOLDER
    exact = residual.is_dir()
    if exact:
        shards, originals = _restoring_shards(checkpoint, manifest, residual)
    else:
        shards, originals = _subtracting_shards(config, checkpoint, manifest, folder), {}
    names = [shard.name for shard in shards]
    files, _ = merge_output.side_files(folder, [INDEX_FILE, *names])
    summary = {
        "tensors_restored": sum(job.transform is not None for s in shards for job in s.jobs),
        "precision": EXACT if exact else ROUNDED,
    }
    made_from = {
        "merge": manifest["fingerprint"],
        "shards": checkpoint.fingerprint(),
        "exact": exact,
        "versions": versions(),
    }
    partial = output.begin(made_from, keep=names)
    done = write_shards(output, shards, Clock())
    found: dict[str, str] = {}
    for entry in done.values():
        found |= entry.get("sha256", {})
    wrong = sorted(name for name in originals if found.get(name) != originals[name])
    if wrong:
        raise InputError(
            f"{residual}: does not fit the merged weights (the first: {wrong[0]}); was one of "
            "them changed after the merge?"
        )
    merge_output.copy_side_files(folder, files, partial)
    for name in (merge_output.CONFIG_FILE, INDEX_FILE):
        source = residual / name if exact else folder / name
        if source.exists():
            merge_output.copy_side_files(source.parent, [Path(name)], partial)
    write_json(partial / RESULT_FILE, {"kind": "gift unmerge", **summary})
    return summary


def _restoring_shards(
    checkpoint: Checkpoint, manifest: Mapping[str, Any], residual: Path
) -> tuple[list[ShardPlan], dict[str, str]]:
    """Jobs that restore each changed tensor, and the expected hashes."""
    shards, originals = [], {}
    for shard in checkpoint.shards:
        has_residual = (residual / f"{shard.path.name}.json").exists()
        reader = ResidualReader(residual, shard.path.name) if has_residual else None
        hashes = reader.hashes if reader is not None else {}
        jobs = []
        kept = [entry for entry in shard.data_order if entry.name != manifest["added_head"]]
        for entry in kept:
            transform = None
            if reader is not None and entry.name in hashes:
                transform = RestoreTransform(entry, reader)
                originals[entry.name] = hashes[entry.name]
            jobs.append(Job(spec_of(entry), entry, transform))
        order = tuple(entry.name for entry in shard.entries if entry in kept)
        name, is_whole = shard.path.name, len(kept) == len(shard.entries)
        shards.append(ShardPlan(name, shard.path, tuple(jobs), order, shard.metadata, is_whole))
    return shards, originals


def _subtracting_shards(
    config: UnmergeConfig, checkpoint: Checkpoint, manifest: Mapping[str, Any], folder: Path
) -> list[ShardPlan]:
    """Jobs that subtract the adapters' changes."""
    adapters = [read_adapter(adapter_folder(name)) for name in config.adapter]
    weight = _subtractable_weight(manifest, adapters)
    scales = [-weight * entry["scale"] for entry in manifest["adapters"]]
    plan = plan_merge(checkpoint, read_json(folder / "config.json"), adapters, scales)
    settings = MergeSettings(MergeOptions(), len(adapters), pick_device(config.device))
    return build_shards(plan, settings, Statistics())


def _subtractable_weight(manifest: Mapping[str, Any], adapters: list[Adapter]) -> float:
    """The factor on all changes of a merge that was a plain sum; InputError for any other."""
    merged = [entry["sha256"] for entry in manifest["adapters"]]
    if [adapter.hashes() for adapter in adapters] != merged:
        names = ", ".join(entry["name"] for entry in manifest["adapters"])
        raise InputError(
            f"--adapter: without a saved residual the merged adapters are needed, in order: {names}"
        )
    method = METHODS[manifest["method"]]
    options = MergeOptions(**manifest["settings"])
    weight = method.sum_weight(options, len(merged), manifest["base"] is not None)
    full = any(adapter.uses_dora or adapter.saved for adapter in adapters)
    if weight is None or manifest["dtype"] != "keep" or full:
        raise InputError(
            f"--model: this merge ({method.name}, dtype {manifest['dtype']}) is no plain sum that "
            "could be subtracted; only a merge with --save-residual could be taken back"
        )
    return weight
