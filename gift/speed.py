"""Where a stage's time goes, and how much of the device's arithmetic it uses.

Useful operations are counted once: products of the blocks for every token, causal attention within
each row, the head for every target; neither padding nor recomputation.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from gift.console import print_table
from gift.data.encoding import Example
from gift.models.loading import model_hash

Loaded = TypeVar("Loaded")

SPEED_FILE = "speed.json"
# Dense 16-bit TFLOP/s from the makers' data sheets, by a part of the device's name.
# The first part that the name has counts.
PEAK = {
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "H200": 989,
    "B200": 2250,
    "A100": 312,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "4090": 165,
    "3090": 71,
}


class Clock:
    """Seconds of a stage by kind: load, hash, compute, wait (for the device), others, save.

    `others` is the time spent waiting for other processes.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, kind: str) -> Iterator[None]:
        """Adds the block's time to a kind."""
        started = time.perf_counter()
        try:
            yield
        finally:
            passed = time.perf_counter() - started
            self.seconds[kind] = self.seconds.get(kind, 0.0) + passed


def load_and_hash(folder: Path, clock: Clock, load: Callable[[], Loaded]) -> tuple[Loaded, str]:
    """What `load` returns, and the `model_hash` of the folder that it reads, found meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        hashing = pool.submit(model_hash, folder)
        with clock("load"):
            loaded = load()
        with clock("hash"):
            return loaded, hashing.result()


def useful_flops(
    model: Any, lengths: Sequence[int], targets: int, *, trains: bool = False
) -> float:
    """Floating-point operations that rows of these lengths with so many targets need.

    Training needs, besides the forward, gradients of all inputs and of the adapter's weights.
    """
    config = model.config.get_text_config()
    tokens, layers = sum(lengths), config.num_hidden_layers
    frozen = adapter = 0.0
    for parameter in model.get_decoder().parameters():
        if parameter.ndim > 1 and parameter is not model.get_input_embeddings().weight:
            share = _active_share(config) if parameter.ndim == 3 else 1.0
            if parameter.requires_grad and trains:
                adapter += share * parameter.numel()
            else:
                frozen += share * parameter.numel()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    # Scores and values, 2 operations an element, half of the square of each row's length.
    attention = 2.0 * layers * config.num_attention_heads * width * sum(n * n for n in lengths)
    head = 2.0 * model.get_output_embeddings().weight.numel() * targets
    if not trains:
        return 2 * frozen * tokens + attention + head
    return (4 * frozen + 6 * adapter) * tokens + 3 * attention + 2 * head


def _active_share(config: Any) -> float:
    """Share of the experts that a token is routed to."""
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    return config.num_experts_per_tok / experts if experts else 1.0


def stage_speed(
    clock: Clock, model: Any, rows: Sequence[Example], *, devices: int = 1
) -> dict[str, float]:
    """`speed` of a stage over these rows, in its seconds of compute and waiting."""
    seconds = sum(clock.seconds.get(kind, 0.0) for kind in ("compute", "wait", "others"))
    if not rows or not seconds:
        return {}
    return speed(model, rows, seconds, devices=devices)


def speed(
    model: Any, rows: Sequence[Example], seconds: float, *, trains: bool = False, devices: int = 1
) -> dict[str, float]:
    """Tokens per second, useful TFLOP/s a device, and their share of its peak where it is known."""
    lengths = [len(row.input_ids) for row in rows]
    targets = sum(row.targets for row in rows)
    rate = useful_flops(model, lengths, targets, trains=trains) / seconds / devices / 1e12
    found = {"tokens_per_second": sum(lengths) / seconds, "useful_tflops": rate}
    peak = _peak(model.device)
    return found if peak is None else {**found, "share_of_peak": rate / peak}


def print_times(clock: Clock) -> None:
    """The stage's seconds by kind."""
    total = sum(clock.seconds.values()) or 1.0
    rows = [
        (kind, f"{seconds:.1f}", f"{100 * seconds / total:.0f} %")
        for kind, seconds in clock.seconds.items()
    ]
    print_table("Time", ("", "seconds", "share"), rows)


def _peak(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK.items() if part in name), None)
