"""A call's time on a GPU by kind of kernel, from the kernels' names."""

import re
import time
from collections.abc import Callable
from typing import Any

import torch

# The first pattern that a kernel's name matches decides.
KINDS = (
    (
        "ours",
        r"^_?(logits|two_heads|dh|dw|merge|finish|finish_dh|gather|compact|column_sum|scale_rows|"
        r"split|lora_merge)_kernel",
    ),
    ("attention", r"flash|fmha|attention|varlen"),
    ("32-bit product", r"sgemm|simt|f32f32|tf32|nvjet_s"),
    ("16-bit product", r"gemm|cutlass|xmma|nvjet|splitK"),
    ("copy", r"memcpy|memset|copy|cast|CatArray"),
    ("elementwise", r""),
)


def kind_of(kernel: str) -> str:
    """The kind of a kernel by its name."""
    return next(kind for kind, pattern in KINDS if re.search(pattern, kernel, re.IGNORECASE))


def time_by_kind(call: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """Milliseconds of one call in each kind of kernel, and without any; empty without a GPU."""
    if device.type != "cuda":
        return {}
    call()
    torch.cuda.synchronize(device)
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        started = time.perf_counter()
        call()
        torch.cuda.synchronize(device)
        wall = 1e3 * (time.perf_counter() - started)
    found = dict.fromkeys([kind for kind, _ in KINDS], 0.0)
    for event in profile.key_averages():
        found[kind_of(event.key)] += event.self_device_time_total / 1e3
    found["nothing"] = max(0.0, wall - sum(found.values()))
    return {f"{kind} ms": milliseconds for kind, milliseconds in found.items()}
