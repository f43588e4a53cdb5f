"""Training checkpoints: the state to resume from, with any number of ranks.

A checkpoint is a folder of `torch.distributed.checkpoint`, to which every rank writes a part, and a
sealed file (`files.replacing`) with the rest and the sha256 of the folder's files. That file is
written last: without it, or if the folder's content differs, the checkpoint is ignored.
"""

import json
import shutil
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from gift.distributed.ranks import Group, gather_tensors
from gift.storage.files import hash_file, naming_file, read_json, replacing, sealed_files, sync
from gift.training.micro_batches import BAND_NAMES


class TrainingState:
    """Adapter weights, optimizer, schedule and random states of one run."""

    def __init__(self, model: Any, optimizer: Any, scheduler: Any, group: Group) -> None:
        self._model = model
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._group = group

    def save(
        self, work: Path, step: int, history: list[dict[str, float]], loss_by_band: Tensor
    ) -> None:
        """Writes the state after `step` steps, then removes older ones; every rank takes part."""
        folder = work / f"checkpoint-{step:08d}"
        if self._group.is_main:
            _remove(work.glob(f"{folder.name}*"))  # a damaged one of the same step
            older = list(work.glob("checkpoint-*"))
        state = {**self._tensors(), "random": torch.stack(gather_tensors(torch.get_rng_state()))}
        if torch.cuda.is_initialized():
            state["cuda_random"] = torch.stack(gather_tensors(torch.cuda.get_rng_state()))
        with naming_file(folder), _quiet():
            try:
                dcp.save(state, checkpoint_id=folder, no_dist=self._group.size == 1)
            except CheckpointException as error:  # a BaseException
                raise next(iter(error.failures.values()))[0] from error
        if not self._group.is_main:
            return
        sync(folder)
        record = {
            "step": step,
            "history": history,
            "loss_by_band": loss_by_band.tolist(),
            "scheduler": self._scheduler.state_dict(),
            "ranks": self._group.size,
            "files": {path.name: hash_file(path) for path in folder.iterdir()},
        }
        with replacing(work / f"{folder.name}.json", sealed=True) as temporary:
            temporary.write_text(json.dumps(record))
        _remove(older)

    def load(self, work: Path) -> tuple[int, list[dict[str, float]], Tensor]:
        """Restores the last intact checkpoint; returns step (0 if none), metrics, loss by band.

        No parameter may have a gradient yet: PyTorch makes the optimizer's state by an empty step.
        Ranks that the saved run did not have keep their random states.
        """
        found = self._group.from_main(lambda: _newest(work))
        if found is None:
            return 0, [], torch.zeros(len(BAND_NAMES), dtype=torch.float64)
        record = read_json(found)
        state = self._tensors()
        generators = {"random": (torch.get_rng_state, torch.set_rng_state)}
        if torch.cuda.is_initialized():
            generators["cuda_random"] = torch.cuda.get_rng_state, torch.cuda.set_rng_state
        for name, (get, _) in generators.items():
            state[name] = get().repeat(record["ranks"], 1)
        with _quiet():
            dcp.load(state, checkpoint_id=_folder(found), no_dist=True)
        set_optimizer_state_dict(self._model, self._optimizer, state["optimizer"])
        self._scheduler.load_state_dict(record["scheduler"])
        for name, (_, put) in generators.items():
            if self._group.rank < record["ranks"]:
                put(state[name][self._group.rank].clone())  # a view is misread
        loss_by_band = torch.tensor(record["loss_by_band"], dtype=torch.float64)
        return record["step"], record["history"], loss_by_band

    def _tensors(self) -> dict[str, Any]:
        """The adapter and the optimizer's state; `dcp.load` writes into these tensors."""
        adapter = {
            name: parameter.detach()
            for name, parameter in self._model.named_parameters()
            if parameter.requires_grad
        }
        optimizer = get_optimizer_state_dict(self._model, self._optimizer)
        return {"adapter": adapter, "optimizer": optimizer}


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppresses PyTorch's warning about a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def _remove(paths: Iterable[Path]) -> None:
    for path in list(paths):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _folder(record: Path) -> Path:
    """The folder of a sealed file."""
    return record.with_name(record.name.partition(".")[0])


def _newest(work: Path) -> Path | None:
    """The sealed file of the last checkpoint whose folder is intact."""
    for _, path in sorted(sealed_files(work).items(), reverse=True):
        written = {_folder(path) / name: sha for name, sha in read_json(path)["files"].items()}
        if all(file.is_file() and hash_file(file) == sha for file, sha in written.items()):
            return path
    return None
