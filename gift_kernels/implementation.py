"""Which implementation runs: the Triton kernels, or eager PyTorch."""

import importlib.util
import os
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Impl = Literal["auto", "triton", "eager"]


def constant_under_compile(function: Any) -> Any:
    """Like `torch.compiler.assume_constant_result`, but without importing Dynamo and Triton."""
    function._dynamo_marked_constant = True
    return function


def resolve_impl(impl: object, tensors: Mapping[str, Tensor | None]) -> Literal["triton", "eager"]:
    """`auto` is Triton where Triton is installed and can run the kernels, else eager.

    The kernels need an NVIDIA GPU of compute capability 8.0 (Ampere) or higher and no float64
    input. An explicit request that cannot be met raises ValueError; it never falls back.
    """
    if not isinstance(impl, str) or impl not in get_args(Impl):
        error, found = (
            (ValueError, repr(impl)) if isinstance(impl, str) else (TypeError, type(impl))
        )
        raise error(f'impl: expected "auto", "triton" or "eager", got {found}')
    if impl == "eager":
        return "eager"
    given = {name: value for name, value in tensors.items() if value is not None}
    first = next(iter(given.values()))
    wide = next((name for name, value in given.items() if value.dtype == torch.float64), None)
    if impl == "auto":
        usable = first.is_cuda and wide is None and _triton_installed()
        return "triton" if usable and not _gpu_lacks(first.device) else "eager"
    if not _triton_installed():
        raise ValueError('impl: "triton" is not installed; install Triton or use impl="eager"')
    if wide is not None:
        raise ValueError(
            f'impl: "triton" does not support float64, and {wide} is; use impl="auto" or "eager"'
        )
    if first.is_cuda:
        if lacks := _gpu_lacks(first.device):
            raise ValueError(f'impl: "triton" needs {lacks}; use impl="auto" or "eager"')
    elif os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f'impl: "triton" needs CUDA tensors, got {first.device}; use impl="eager", or set '
            "TRITON_INTERPRET=1 before the first import of triton to run the interpreter"
        )
    return "triton"


@constant_under_compile
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@constant_under_compile
def _gpu_lacks(device: torch.device) -> str:
    """What this GPU lacks to run the kernels, for the error message; empty if nothing."""
    name = torch.cuda.get_device_name(device)
    if torch.version.hip is not None:
        return f"a GPU of NVIDIA's, got {name}"
    major, minor = torch.cuda.get_device_capability(device)
    return "" if major >= 8 else f"compute capability 8.0 or more, {name} has {major}.{minor}"
