"""Launches that bypass Triton's binder, which takes as long as a small kernel.

For every `kernel[grid](...)` the binder takes 17 µs in Python to find the compiled kernel for the
arguments. A `Launch` caches the compiled kernel and starts it directly.
"""

from typing import Any

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


class Launch:
    """Repeated launches of one kernel on one device with the same last arguments and options.

    Named arguments are the kernel's last parameters, in their order.
    """

    def __init__(self, *alike: Any, warps_and_stages: tuple[int, int] | None = None, **named: Any):
        self.alike, self.named = alike, named
        self.options: dict[str, Any] = {}
        if warps_and_stages is not None:
            self.options = dict(zip(("num_warps", "num_stages"), warps_and_stages, strict=True))
        self.last = (*alike, *named.values())
        self.compiled: dict[tuple[Any, ...], Any] = {}

    def __call__(self, kernel: Any, grid: tuple[int, int, int], *arguments: Any) -> None:
        """`kernel[grid](*arguments, *alike, **named, **options)`, always of the same kernel."""
        kinds = tuple(map(_kind, arguments))
        known = self.compiled.get(kinds)
        if known is not None:
            known[grid](*arguments, *self.last)
            return
        found = kernel[grid](*arguments, *self.alike, **self.named, **self.options)
        # Not None, as in the interpreter, nor the future of an asynchronous compilation.
        if hasattr(type(found), "__getitem__"):
            self.compiled[kinds] = found


def _kind(value: Any) -> Any:
    """The properties of an argument that Triton specialises kernels for, or more."""
    kind = type(value)
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if kind is int:
        return value == 1, value % 16 == 0, -(1 << 31) <= value < 1 << 31
    if kind is float:
        return float
    if kind is TensorDescriptor:
        return (value.base.dtype, *value.block_shape)
    if isinstance(value, tuple):
        return tuple(map(_kind, value))
    return value
