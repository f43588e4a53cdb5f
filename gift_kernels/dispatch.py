"""Which implementation runs, and the checks that all operations share."""

import importlib.util
import os
from typing import Any, Literal

import torch
from torch import Tensor

Impl = Literal["auto", "triton", "eager"]
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
CHECK_TARGETS_VARIABLE = "GIFT_KERNELS_CHECK_TARGETS"


def resolve_impl(impl: Impl, tensor: Tensor) -> Literal["triton", "eager"]:
    """`auto` is Triton where Triton is installed and can run the kernels, else eager.

    It can on NVIDIA's GPUs of compute capability 8.0 (Ampere) or more, but not for float64. An
    explicit request is obeyed or refused with ValueError, never replaced.
    """
    if impl == "auto":
        usable = tensor.is_cuda and tensor.dtype != torch.float64 and _triton_installed()
        return "triton" if usable and not _gpu_lacks(tensor.device) else "eager"
    if impl == "eager":
        return "eager"
    if impl != "triton":
        raise ValueError(f'impl: expected "auto", "triton" or "eager", got {impl!r}')
    if not _triton_installed():
        raise ValueError('impl="triton": Triton is not installed; install it or use impl="eager"')
    if tensor.is_cuda:
        if lacks := _gpu_lacks(tensor.device):
            raise ValueError(f'impl="triton" needs {lacks}; use impl="auto" or "eager"')
    elif os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f'impl="triton" needs CUDA tensors, got {tensor.device}; use impl="eager", or set '
            "TRITON_INTERPRET=1 before the first import of triton to run the interpreter"
        )
    return "triton"


def _constant_under_compile(function: Any) -> Any:
    """As `torch.compiler.assume_constant_result`, whose call imports Dynamo, and Triton with it."""
    function._dynamo_marked_constant = True
    return function


@_constant_under_compile
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@_constant_under_compile
def _gpu_lacks(device: torch.device) -> str:
    """What the kernels need and this GPU has not; empty where it has all."""
    name = torch.cuda.get_device_name(device)
    if torch.version.hip is not None:
        return f"a GPU of NVIDIA's, got {name}"
    major, minor = torch.cuda.get_device_capability(device)
    return "" if major >= 8 else f"compute capability 8.0 or more, {name} has {major}.{minor}"


def check_plain(name: str, tensor: Tensor) -> None:
    """Raises TypeError for a DTensor: its gradient would have to be reduced as its module does."""
    if type(tensor).__name__ == "DTensor":
        raise TypeError(
            f"{name}: expected a plain tensor, got a DTensor, as parameters of FSDP2 are outside "
            "their module's forward; compute the loss inside that forward, or pass "
            f"{name}.full_tensor(), or for a head that is sharded over the vocabulary "
            f"{name}.to_local() with process_group and vocab_start"
        )


def check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    """Raises ValueError where a tensor's shape or device differs from what `like` calls for."""
    check_plain(name, tensor)
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(tensor.shape)}")
    if tensor.device != like.device:
        raise ValueError(f"{name}: expected device {like.device}, got {tensor.device}")


def check_head(
    prefix: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, batch: tuple[int, ...]
) -> None:
    """Checks hidden [*batch, D], head weight [V, D] and bias [V] of one model."""
    hidden_name, weight_name = f"{prefix}hidden", f"{prefix}lm_head_weight"
    check_plain(weight_name, weight)
    if weight.ndim != 2:
        raise ValueError(f"{weight_name}: expected shape [V, D], got {list(weight.shape)}")
    check_tensor(hidden_name, hidden, (*batch, weight.shape[1]), weight)
    if weight.dtype not in _DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        raise TypeError(f"{weight_name}: expected one of {known}, got {weight.dtype}")
    if hidden.dtype != weight.dtype:
        raise TypeError(
            f"{hidden_name} and {weight_name}: expected one dtype, got {hidden.dtype} and "
            f"{weight.dtype}; cast one of them"
        )
    if bias is not None:
        check_tensor(f"{prefix}bias", bias, (weight.shape[0],), weight)


def check_positive(name: str, value: float | None) -> None:
    """Raises ValueError unless the value is a positive finite number or None."""
    if value is not None and not 0 < value < float("inf"):
        raise ValueError(f"{name}: expected a positive number, got {value}")


def check_target(target: Tensor, hidden: Tensor) -> None:
    """Raises TypeError unless targets are int64 or int32, ValueError on another device."""
    check_plain("target", target)
    if target.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"target: expected int64 or int32, got {target.dtype}")
    if target.device != hidden.device:
        raise ValueError(f"target: expected device {hidden.device}, got {target.device}")


def check_target_values(target: Tensor, vocab_size: int, ignore_index: int, head: str) -> None:
    """Raises ValueError on the first value [N] that is neither a row of `head` nor ignore_index."""
    wrong = (target != ignore_index) & ((target < 0) | (target >= vocab_size))
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0, 0])
        raise ValueError(
            f"target: value {int(target[row])} at row {row} is outside [0, {vocab_size}), the rows "
            f"of {head}, and is not ignore_index ({ignore_index})"
        )


def reads_targets(target: Tensor) -> bool:
    """Whether target values are checked: on CPU, or anywhere if GIFT_KERNELS_CHECK_TARGETS is 1.

    Elsewhere reading them would stall the device, and a wrong row becomes NaN instead.
    """
    return target.device.type == "cpu" or os.environ.get(CHECK_TARGETS_VARIABLE) == "1"


def autocast_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Casts as `torch.nn.functional.linear` would under torch.autocast; else returns the inputs."""
    device = hidden.device.type
    enabled = _knows_autocast(device) and torch.is_autocast_enabled(device)
    if not enabled or hidden.dtype == torch.float64:
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype) if bias is not None else None


@_constant_under_compile
def _knows_autocast(device: str) -> bool:
    """Some devices, such as meta, know no autocast. Dynamo before torch 2.13 cannot ask."""
    return torch.amp.is_autocast_available(device)


def check_shard(process_group: object, vocab_start: int) -> None:
    """Raises ValueError for a slice of the vocabulary without a group of ranks that share it."""
    if process_group is None and vocab_start != 0:
        raise ValueError(f"vocab_start: {vocab_start} needs a process_group")
