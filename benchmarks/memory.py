"""Peak memory of one call beyond the memory in use before it."""

import ctypes
import gc
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_M_MMAP_THRESHOLD = -3  # malloc.h


def peak_extra_bytes(call: Callable[[], Any], device: torch.device) -> float:
    """Peak bytes of the call beyond those in use before; NaN if that cannot be measured.

    CUDA: PyTorch's allocator. Elsewhere: resident memory, as Linux counts it.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if not _STATUS.exists():
        return float("nan")
    _return_freed_memory()
    before = resident_bytes("VmRSS")
    try:
        _CLEAR.write_text("5")  # sets the high-water mark back to what is resident now
    except OSError:
        return _sampled_peak(call) - before
    call()
    return max(0, resident_bytes("VmHWM") - before)


def resident_bytes(entry: str) -> int:
    """VmRSS (now) or VmHWM (most so far) of this process."""
    for line in _STATUS.read_text().splitlines():
        if line.startswith(entry + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{_STATUS} has no {entry}")


def _c_library() -> Any:
    """glibc, told to give large buffers back when they are freed; None where there is none.

    Called at import, so that all timings use the same allocator settings, before and after memory
    is measured.
    """
    try:
        library = ctypes.CDLL("libc.so.6")
        library.mallopt(_M_MMAP_THRESHOLD, 1 << 20)
    except (OSError, AttributeError):
        return None
    return library


_LIBRARY = _c_library()


def _return_freed_memory() -> None:
    """Returns freed memory to the system, so that it is not counted as still held."""
    if _LIBRARY is not None:
        _LIBRARY.malloc_trim(0)


def _sampled_peak(call: Callable[[], Any]) -> int:
    """For systems that cannot reset the high-water mark: samples memory every millisecond."""
    done = threading.Event()
    largest = [resident_bytes("VmRSS")]

    def watch() -> None:
        while not done.wait(1e-3):
            largest[0] = max(largest[0], resident_bytes("VmRSS"))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        call()
    finally:
        done.set()
        watcher.join()
    return largest[0]
