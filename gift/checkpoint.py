"""Training checkpoints: the full state that a run resumes from, in one file with its sha256."""

import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gift.files import replacing, sealed_files
from gift.ranks import Group, gather_tensors


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
        random = gather_tensors(torch.get_rng_state())
        cuda = gather_tensors(torch.cuda.get_rng_state()) if torch.cuda.is_initialized() else []
        if not self._group.is_main:
            return
        state = {
            "step": step,
            "history": history,
            "loss_by_band": loss_by_band,
            "adapter": self._trainable(),
            "optimizer": self._optimizer.state_dict(),
            "scheduler": self._scheduler.state_dict(),
            "random": random,
            "cuda_random": cuda,
        }
        # When torch.save writes to a path itself, a failure does not say why.
        content = io.BytesIO()
        torch.save(state, content)
        older = list(work.glob("checkpoint-*"))
        with replacing(work / f"checkpoint-{step:08d}.pt", sealed=True) as temporary:
            temporary.write_bytes(content.getbuffer())
        for path in older:
            path.unlink(missing_ok=True)

    def load(self, work: Path) -> tuple[int, list[dict[str, float]], Tensor]:
        """Restores the last whole checkpoint; returns step (0 if none), metrics, loss by band."""
        checkpoints = [path for name, path in sealed_files(work).items() if name.endswith(".pt")]
        if not checkpoints:
            return 0, [], torch.zeros(0)
        state = torch.load(max(checkpoints), map_location="cpu", weights_only=True)
        with torch.no_grad():
            for name, parameter in self._trainable().items():
                parameter.copy_(state["adapter"][name])
        self._optimizer.load_state_dict(state["optimizer"])
        self._scheduler.load_state_dict(state["scheduler"])
        torch.set_rng_state(state["random"][self._group.rank])
        if state["cuda_random"]:
            torch.cuda.set_rng_state(state["cuda_random"][self._group.rank])
        return state["step"], state["history"], state["loss_by_band"]

    def _trainable(self) -> dict[str, Tensor]:
        return {
            name: parameter
            for name, parameter in self._model.named_parameters()
            if parameter.requires_grad
        }
