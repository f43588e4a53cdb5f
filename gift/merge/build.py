"""From a plan to shards of jobs: the transform that makes each output tensor, in which file."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from gift.errors import InputError
from gift.merge.match import Names
from gift.merge.method import Method
from gift.merge.plan import MergePlan, TensorPlan
from gift.merge.stream import Job, ShardPlan, shard_jobs
from gift.merge.transforms import (
    FactorReader,
    LoraTransform,
    MergeSettings,
    MethodTransform,
    ReplaceTransform,
    Transform,
)
from gift.storage.files import hash_file, hash_json, read_json
from gift.storage.publish import check_published
from gift.storage.shards import TORCH_DTYPES, Checkpoint, TensorEntry, open_shard, spec_of

STATISTICS_FILE = "statistics.safetensors"
STATISTICS_MANIFEST = "manifest.json"

__all__ = ["MergeSettings", "Statistics", "build_shards", "open_statistics"]


@dataclass(frozen=True)
class Statistics:
    """Fisher diagonals or Gram matrices by output tensor, one per model; empty if not needed."""

    entries: dict[str, tuple[TensorEntry, ...]] = field(default_factory=dict)
    fingerprint: str = ""
    notes: tuple[str, ...] = ()


def open_statistics(folders: Sequence[str], method: Method, plan: MergePlan) -> Statistics:
    """Finds every tensor's statistics; InputError for a folder of another kind or with gaps.

    RegMean averages tensors without a Gram matrix (all but linear layers), as its paper does;
    Fisher merging needs the diagonal of every tensor that differs between the models.
    """
    if not folders:
        return Statistics()
    names, hashes = [], []
    for folder in map(Path, folders):
        check_published(folder)
        manifest = read_json(folder / STATISTICS_MANIFEST)
        if manifest.get("kind") != f"gift {method.name} statistics":
            raise InputError(
                f"--statistics: {folder} holds {manifest.get('kind')!r}, --method {method.name} "
                f"needs 'gift {method.name} statistics'"
            )
        shard = open_shard(folder / STATISTICS_FILE)
        tensors = {entry.name: entry for entry in shard.entries}
        names.append(Names(Checkpoint(folder, (shard,), None, tensors)))
        hashes.append(hash_file(folder / STATISTICS_FILE))
    entries: dict[str, tuple[TensorEntry, ...]] = {}
    lacking = []
    for name, tensor in plan.tensors.items():
        if not _differs(tensor):
            continue
        found = [one.find(name) for one in names]
        present = tuple(entry for entry in found if entry is not None)
        shape = tensor.source.shape
        if method.statistics == "gram":
            shape = shape[-1:] * 2
        if len(present) == len(names) and all(entry.shape == shape for entry in present):
            entries[name] = present
        else:
            lacking.append(name)
    if lacking and method.statistics == "diagonal":
        raise InputError(f"--statistics: no fitting Fisher diagonal for {', '.join(lacking)}")
    notes = (f"{len(lacking)} tensors without a Gram matrix are averaged",) if lacking else ()
    return Statistics(entries, hash_json(hashes), notes)


def _differs(tensor: TensorPlan) -> bool:
    return tensor.source.is_float and (tensor.is_adapted or tensor.base is not None)


def build_shards(
    plan: MergePlan, settings: MergeSettings, statistics: Statistics
) -> list[ShardPlan]:
    """One plan per file of the checkpoint, its tensors in the source's order.

    An untied head is appended to the file that holds the embedding.
    """
    reader = FactorReader(settings.device)
    checkpoint = plan.checkpoint
    head = plan.tensors.get(plan.untied_head or "")
    extra = head if head is not None and head.name not in checkpoint.tensors else None
    shards = []
    for shard in checkpoint.shards:
        jobs, converted = [], False
        for entry in shard.data_order:
            tensor = plan.tensors.get(entry.name)
            if tensor is None or tensor.source != entry:
                # A duplicate that the index does not point to: copied unchanged.
                tensor = TensorPlan(entry.name, entry)
            jobs.append(_job(tensor, settings, reader, statistics))
        header_order = [entry.name for entry in shard.entries]
        if extra is not None and extra.source.path == shard.path:
            jobs.append(_job(extra, settings, reader, statistics))
            header_order.append(extra.name)
        converted = any(job.spec.dtype != job.source.dtype for job in jobs)
        shards.append(
            ShardPlan(
                shard.path.name,
                shard.path,
                shard_jobs(jobs, converted),
                tuple(header_order),
                shard.metadata,
            )
        )
    return shards


def _job(
    tensor: TensorPlan, settings: MergeSettings, reader: FactorReader, statistics: Statistics
) -> Job:
    source = tensor.source
    if not source.is_float:
        return Job(spec_of(source), source)
    out = settings.dtype or source.dtype
    spec = spec_of(source, out, name=tensor.name)
    transform = _transform(tensor, settings, reader, statistics, TORCH_DTYPES[out])
    if transform is None and out != source.dtype:
        transform = Transform([source], TORCH_DTYPES[out])
    return Job(spec, source, transform)


def _transform(
    tensor: TensorPlan,
    settings: MergeSettings,
    reader: FactorReader,
    statistics: Statistics,
    out: torch.dtype,
) -> Transform | None:
    """The method's transform for one floating-point tensor; None if the tensor stays unchanged."""
    method = settings.method
    weight = method.sum_weight(settings.options, settings.adapters, tensor.base is not None)
    if weight is not None:
        if not tensor.is_adapted:
            return None
        if not tensor.saved:
            return LoraTransform(tensor, reader, weight, settings.device, out)
        alone = len(tensor.saved) == 1 and not tensor.changes
        if alone and tensor.base is None and tensor.saved[0].scale * weight == 1:
            return ReplaceTransform([tensor.source, tensor.saved[0].entry], out)
    elif not _differs(tensor):
        return None
    found = statistics.entries.get(tensor.name, ())
    return MethodTransform(
        tensor,
        reader,
        settings,
        out,
        fishers=found if method.statistics == "diagonal" else (),
        grams=found if method.statistics == "gram" else (),
    )
