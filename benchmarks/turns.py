"""Times providers in turns, and handles those that fail."""

import functools
import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.memory import peak_extra_bytes
from benchmarks.provider import Provider

CACHE_BYTES = 256 << 20  # larger than any cache of today's devices
SLOW = 4.0  # times the median of all providers' medians
LOST = "(the device was lost)"


@dataclass
class Settings:
    """`seconds` of timing a case; `rounds` at least and at most; whose call is `running`."""

    device: torch.device
    seconds: float = 8.0
    rounds: tuple[int, int] = (5, 60)
    seed: int = 0
    running: Provider | None = None


@dataclass
class Call:
    """`before` runs outside the clock and its result is handed to `timed`."""

    before: Callable[[], Any]
    timed: Callable[[Any], Any]
    after: Callable[[], None]


@dataclass
class Contender:
    """A provider that passed the gate, with one call for each set of inputs."""

    provider: Provider
    calls: list[Call]
    samples: list[float] = field(default_factory=list)
    failed: str = ""


class DeviceLost(Exception):
    """A provider failed and left the device unusable in this process."""

    def __init__(self, provider: str, status: str) -> None:
        super().__init__(f"{provider} {status} {LOST}")
        self.provider = provider
        self.status = f"{status} {LOST}"


def take_turns(contenders: Sequence[Contender], settings: Settings) -> None:
    """Rounds of one timed call each, in the order of `turn_order`; stops timing one that fails.

    Every turn takes the next set of inputs, so that no call finds its inputs in a cache.
    """
    started = time.monotonic()
    least, most = settings.rounds
    turn = 0
    for number in range(most):
        if number >= least and time.monotonic() - started > settings.seconds:
            break
        for contender in turn_order(contenders, number):
            if contender.failed or rests(contender, contenders, number):
                continue
            call = contender.calls[turn % len(contender.calls)]
            turn += 1
            settings.running = contender.provider
            try:
                contender.samples.append(once(call, settings.device))
            except Exception as error:  # other people's code may raise anything
                contender.failed = failure(error)
            if contender.failed:  # out of memory may be temporary
                recover(contender.provider.name, contender.failed, settings.device)


def turn_order(items: Sequence[Any], number: int) -> list[Any]:
    """The items rotated by the round, reversed every other time, so that nobody has a fixed place.

    Over 2·len(items) rounds each item stands in each place twice.
    """
    if not items:
        return []
    shift = (number // 2) % len(items)
    order = [*items[shift:], *items[:shift]]
    return order[::-1] if number % 2 else order


def rests(contender: Contender, contenders: Sequence[Contender], number: int) -> bool:
    """Whether a slow provider skips the round: it runs in one of four, to leave time for others."""
    if number % 4 == 0 or not contender.samples:
        return False
    medians = [statistics.median(other.samples) for other in contenders if other.samples]
    return statistics.median(contender.samples) > SLOW * statistics.median(medians)


def once(call: Call, device: torch.device) -> float:
    """Seconds of one call."""
    state = call.before()
    if device.type == "cuda":
        started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        # Flushes the caches, and keeps the device busy while the host launches the timed call, so
        # that the kernels are timed and not the host.
        _flushed(device).zero_()
        started.record()
        result = call.timed(state)
        ended.record()
        torch.cuda.synchronize(device)
        seconds = started.elapsed_time(ended) / 1e3
    else:
        begun = time.perf_counter()
        result = call.timed(state)
        seconds = time.perf_counter() - begun
    del result, state
    call.after()
    return seconds


@functools.cache
def _flushed(device: torch.device) -> Tensor:
    return torch.empty(CACHE_BYTES, dtype=torch.int8, device=device)


def peak_megabytes(contender: Contender, device: torch.device) -> float:
    """Largest extra memory of one more call; NaN where the call failed, which is noted."""
    try:
        return peak_extra_bytes(lambda: once(contender.calls[0], device), device) / 1e6
    except Exception as error:  # as in `take_turns`
        contender.failed = failure(error)
    recover(contender.provider.name, contender.failed, device)
    return math.nan


def percentile(ordered: Sequence[float], share: float) -> float:
    """Linear interpolation in a sorted sequence."""
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def failure(error: Exception) -> str:
    """A status that says what a provider raised."""
    if isinstance(error, torch.OutOfMemoryError):
        return "failed: out of memory"
    text = " ".join(str(error).split()).replace("|", "/")
    if isinstance(error, ImportError):
        return f"not installed: {text[:120]}"
    return f"failed: {type(error).__name__}: {text[:120]}"


def recover(provider: str, status: str, device: torch.device) -> None:
    """After a provider's failure: frees its memory; DeviceLost if the device is unusable."""
    free(device)
    if not device_works(device):
        raise DeviceLost(provider, status)


def device_works(device: torch.device) -> bool:
    """Whether the device still computes: after some CUDA errors it does not, in this process."""
    try:
        torch.zeros(1, device=device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except Exception:
        return False
    return True


def free(device: torch.device) -> None:
    """Frees unreferenced memory; never raises, even if the device is unusable."""
    gc.collect()
    if device.type == "cuda":
        try:
            torch.cuda.empty_cache()
        except Exception as error:
            print(f"the memory was not freed: {failure(error)}")
