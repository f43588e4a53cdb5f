"""Time of the host for calls of few tokens, on any machine: launches are bound, but nothing runs.

    python -m benchmarks.host_time

Prints, for Llama 3.1 8B's head and for merges, launches, calls of PyTorch and microseconds
of the calling thread. What the CUDA driver takes for a launch, and its allocator for memory, is not
in them. `on_device` takes the time until calls return on a GPU, in which all of that is.
"""

import ctypes
import os
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any
from unittest import mock

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from benchmarks.report import Row
from gift_kernels import Guide, checks, lora_merge_, token_confidence, weighted_ce
from gift_kernels.linear_ce import api
from gift_kernels.linear_ce.triton import chunk_size
from gift_kernels.linear_ce.triton.tiles import Machine
from gift_kernels.lora_merge import api as merge_api

HIDDEN_SIZE, VOCAB_SIZE = 4096, 128256
CPU = torch.device("cpu")
TOKENS = (256, 512, 1024, 2048, 8192)
REPEATS = 100


class Driver:
    """Stands for Triton's driver of a Hopper GPU."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Kernel:
    """Stands for a compiled kernel; counts its launches."""

    function = packed_metadata = None
    launches = 0

    def launch_metadata(self, *arguments: Any) -> None:
        """Nothing, as without a profiler."""

    def run(self, *arguments: Any) -> None:
        Kernel.launches += 1

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return self.run


def compiled(self: JITFunction, key: str, *rest: Any) -> Kernel:
    """Takes the place of `JITFunction._do_compile`."""
    kernel = self.device_caches[0][0][key] = Kernel()
    assert self.cache_key  # finds the globals that are compared at each launch
    return kernel


class Calls(TorchDispatchMode):
    """Counts operations of PyTorch."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def cases(
    tokens: int, device: torch.device, sizes: tuple[int, int] = (VOCAB_SIZE, HIDDEN_SIZE)
) -> dict[str, Callable[[], Any]]:
    """Calls by name, for a head of `sizes` [V, D]."""
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device": device}
    # On a CPU nothing reads it, and it takes no memory.
    head = (torch.empty if device.type == "cpu" else torch.zeros)(*sizes, **options)
    hidden = torch.zeros(1, tokens, sizes[1], **options, requires_grad=True)
    target = torch.zeros(1, tokens, dtype=torch.int64, device=device)
    weight = torch.ones(1, tokens, device=device)
    guide = Guide(hidden.detach(), head)

    def step(**weights: Any) -> None:
        # Not `backward`, which would add gradients up.
        torch.autograd.grad(weighted_ce(hidden, head, target, **weights), hidden)

    return {
        "frozen head": lambda: step(token_weight=weight),
        "with a guide": lambda: step(guide=guide),
        "token_confidence": lambda: token_confidence(hidden, head, target),
    }


def merges(device: torch.device) -> dict[str, Callable[[], Any]]:
    """Merges of rank 64 by name."""
    weight = torch.zeros(1024, 1024, dtype=torch.bfloat16, device=device)
    a, b = torch.zeros(64, 1024, device=device), torch.zeros(1024, 64, device=device)
    a16, b16 = a.bfloat16(), b.bfloat16()
    return {
        "lora_merge_, bfloat16 factors": lambda: lora_merge_(weight, a16, b16, 2.0),
        "lora_merge_, float32 factors": lambda: lora_merge_(weight, a, b, 2.0),
    }


def measure(call: Callable[[], Any]) -> tuple[int, int, float]:
    """Launches, calls of PyTorch, and the least of many times in microseconds."""
    call()
    Kernel.launches = 0
    with Calls() as calls:
        call()
    launches, times = Kernel.launches, []
    for _ in range(REPEATS):
        start = time.thread_time()
        call()
        times.append(time.thread_time() - start)
    return launches, calls.count, min(times) * 1e6


def on_device(device: torch.device, toy: bool = False) -> Iterator[Row]:
    """Microseconds until each call returns, the median of many, its kernels running meanwhile."""
    sizes = (320, 48) if toy else (VOCAB_SIZE, HIDDEN_SIZE)
    for tokens in (16,) if toy else (256, 1024, 8192):
        for name, call in cases(tokens, device, sizes).items():
            yield {"call": name, "tokens": tokens, "µs": _until_return(call, device)}
    for name, call in merges(device).items():
        yield {"call": name, "tokens": 0, "µs": _until_return(call, device)}


def _until_return(call: Callable[[], Any], device: torch.device) -> float:
    times = []
    for _ in range(23):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e6 * median(times[3:])


def keep_freed_memory() -> None:
    """Lets C's allocator keep what is freed, as a GPU's does, where it would call the system."""
    library, mmap_max, trim_threshold = ctypes.CDLL(None), -4, -1
    assert library.mallopt(mmap_max, 0) == library.mallopt(trim_threshold, (1 << 31) - 1) == 1


def main() -> None:
    """Prints one line a case and number of tokens."""
    assert os.environ.get("TRITON_INTERPRET") != "1", "TRITON_INTERPRET is set: nothing is bound"
    os.environ["GIFT_KERNELS_AUTOTUNE"] = "0"
    torch.set_num_threads(1)
    keep_freed_memory()
    triton.runtime.driver.set_active(Driver())
    with (
        mock.patch.object(JITFunction, "_do_compile", compiled),
        mock.patch.object(api, "resolve_impl", lambda *arguments: "triton"),
        mock.patch.object(merge_api, "resolve_impl", lambda *arguments: "triton"),
        mock.patch.object(chunk_size, "machine_of", lambda device: Machine(90, 132)),
        mock.patch.object(checks, "reads_targets", lambda target: False),
    ):
        print("| call | tokens | launches | calls | µs |\n|---|---|---|---|---|")
        for tokens in TOKENS:
            for name, call in cases(tokens, CPU).items():
                launches, calls, time_taken = measure(call)
                print(f"| {name} | {tokens} | {launches} | {calls} | {time_taken:.0f} |")
        for name, call in merges(CPU).items():
            launches, calls, time_taken = measure(call)
            print(f"| {name} | | {launches} | {calls} | {time_taken:.0f} |")


if __name__ == "__main__":
    main()
