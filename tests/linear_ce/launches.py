"""Addresses of interpreted launches: inside the launch's tensors, and no two programs at odds.

A helper for tests, not a test. A GPU may read past the end of a tensor, or let one program see what
another is writing, without anything to show for it; the interpreter runs programs one after
another, so results alone show neither. `checked_launches` looks at every address instead.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
from torch import Tensor
from triton.runtime import interpreter
from triton.tools.tensor_descriptor import TensorDescriptor


@dataclass
class Launch:
    """Tensors of one launch as address ranges, and the addresses each program used."""

    kernel: str
    ranges: list[tuple[str, int, int]] = field(default_factory=list)
    loaded: list[tuple[int, np.ndarray]] = field(default_factory=list)
    stored: list[tuple[int, np.ndarray]] = field(default_factory=list)

    def add_tensor(self, name: str, tensor: Tensor) -> None:
        if tensor.numel() > 0:
            steps = zip(tensor.shape, tensor.stride(), strict=True)
            last = sum((size - 1) * stride for size, stride in steps)
            first = tensor.data_ptr()
            self.ranges.append((name, first, first + (last + 1) * tensor.element_size()))

    def use(self, kind: str, program: tuple[int, ...], addresses: np.ndarray, size: int) -> None:
        inside = np.zeros(addresses.shape, bool)
        for _, first, end in self.ranges:
            inside |= (addresses >= first) & (addresses + size <= end)
        assert inside.all(), f"{self.kernel}: {kind} outside all tensors by program {program}"
        number = program[0] + (program[1] << 20) + (program[2] << 40)
        uses = self.stored if kind == "store" else self.loaded
        uses.append((number, np.unique(addresses)))

    def assert_programs_are_independent(self) -> None:
        if not self.stored:
            return
        stored = np.concatenate([addresses for _, addresses in self.stored])
        owner = np.concatenate([np.full(a.shape, number) for number, a in self.stored])
        order = np.lexsort((owner, stored))
        stored, owner = stored[order], owner[order]
        twice = (stored[1:] == stored[:-1]) & (owner[1:] != owner[:-1])
        assert not twice.any(), f"{self.kernel}: two programs store to one address"
        for number, addresses in self.loaded:
            at = np.minimum(np.searchsorted(stored, addresses), len(stored) - 1)
            foreign = (stored[at] == addresses) & (owner[at] != number)
            assert not foreign.any(), f"{self.kernel}: a program loads what another one stores"


@contextlib.contextmanager
def checked_launches() -> Iterator[list[str]]:
    """Checks every launch in the interpreter; yields the names of the kernels, in order."""
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    running: list[Launch] = []
    names: list[str] = []

    def watched(method: str, kind: str) -> Any:
        original = getattr(builder, method)

        def access(self: Any, pointers: Any, *arguments: Any, **options: Any) -> Any:
            # load(pointers, mask, other, ...), store(pointers, value, mask, ...)
            mask = arguments[0 if kind == "load" else 1]
            addresses = pointers.data
            if mask is not None:
                addresses = addresses[np.broadcast_to(mask.data, addresses.shape)]
            addresses = np.asarray(addresses, np.uint64).astype(np.int64).ravel()
            if addresses.size:
                size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
                running[-1].use(kind, self.grid_idx, addresses, size)
            return original(self, pointers, *arguments, **options)

        return mock.patch.object(builder, method, access)

    arguments_of_triton, call_of_triton = executor._init_args_hst, executor.__call__

    def arguments_of(self: Any, *given: Any) -> Any:
        result = arguments_of_triton(self, *given)
        for name, value in zip(self.arg_names, result[0], strict=False):
            for part in value if isinstance(value, tuple) else (value,):
                part = part.base if isinstance(part, TensorDescriptor) else part
                if isinstance(part, Tensor):
                    running[-1].add_tensor(name, part)
        return result

    def call(self: Any, *given: Any, **options: Any) -> Any:
        running.append(Launch(self.fn.__name__))
        result = call_of_triton(self, *given, **options)
        launch = running.pop()
        launch.assert_programs_are_independent()
        names.append(launch.kernel)
        return result

    with (
        watched("create_masked_load", "load"),
        watched("create_masked_store", "store"),
        mock.patch.object(executor, "_init_args_hst", arguments_of),
        mock.patch.object(executor, "__call__", call),
    ):
        yield names
