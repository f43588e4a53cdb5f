"""Training checkpoints: everything that decides the rest of a run, in one file, replaced whole."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gift.files import replacing
from gift.ranks import Group, gather_tensors

CHECKPOINT_FILE = "checkpoint.pt"
METRICS_FILE = "metrics.jsonl"


class TrainingState:
    """Adapter weights, optimizer, schedule and random states of one run."""

    def __init__(self, model: Any, optimizer: Any, scheduler: Any, group: Group) -> None:
        self._model = model
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._group = group

    def save(
        self,
        folder: Path,
        fingerprint: str,
        step: int,
        history: list[dict[str, float]],
        signal: Tensor,
    ) -> None:
        """Writes the state after `step` steps; every rank takes part."""
        random = gather_tensors(torch.get_rng_state())
        cuda = gather_tensors(torch.cuda.get_rng_state()) if torch.cuda.is_initialized() else []
        if not self._group.is_main:
            return
        state = {
            "fingerprint": fingerprint,
            "step": step,
            "history": history,
            "signal": signal,
            "adapter": self._trainable(),
            "optimizer": self._optimizer.state_dict(),
            "scheduler": self._scheduler.state_dict(),
            "random": random,
            "cuda_random": cuda,
        }
        with replacing(folder / CHECKPOINT_FILE) as temporary:
            torch.save(state, temporary)
        with replacing(folder / METRICS_FILE) as temporary:
            temporary.write_text("".join(json.dumps(entry) + "\n" for entry in history))

    def load(self, folder: Path, fingerprint: str) -> tuple[int, list[dict[str, float]], Tensor]:
        """Restores the last checkpoint of the same run: its step, metrics and signal; else 0."""
        path = folder / CHECKPOINT_FILE
        state = torch.load(path, map_location="cpu", weights_only=True) if path.exists() else {}
        if state.get("fingerprint") != fingerprint:
            return 0, [], torch.zeros(0)
        with torch.no_grad():
            for name, parameter in self._trainable().items():
                parameter.copy_(state["adapter"][name])
        self._optimizer.load_state_dict(state["optimizer"])
        self._scheduler.load_state_dict(state["scheduler"])
        torch.set_rng_state(state["random"][self._group.rank])
        if state["cuda_random"]:
            torch.cuda.set_rng_state(state["cuda_random"][self._group.rank])
        return state["step"], state["history"], state["signal"]

    def _trainable(self) -> dict[str, Tensor]:
        return {
            name: parameter
            for name, parameter in self._model.named_parameters()
            if parameter.requires_grad
        }


def remove(folder: Path) -> None:
    """Removes the checkpoint of a finished run."""
    (folder / CHECKPOINT_FILE).unlink(missing_ok=True)
