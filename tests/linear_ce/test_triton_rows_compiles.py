"""The row kernels of the cross-entropy compiled as calls launch them at the sizes of real heads."""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import triton.language as tl
from ce_problems import ce, plans, problem_of
from compiling import CompiledKernel, KernelRequest, compile_kernels
from torch import Tensor

from gift_kernels.linear_ce.triton.tiles import Machine
from gift_kernels.linear_ce.types import LinearInputs, Problem, WeightTransform

PACKAGE = "gift_kernels.linear_ce.triton.kernels"
pytestmark = pytest.mark.xdist_group("cross-entropy kernels compiled")
POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}
DTYPES = {tl.bfloat16: "tl.bfloat16", tl.float32: "tl.float32"}
KERNELS = [
    (module, name)
    for module in ("logits", "matmul", "rows", "row_gradients")
    for name in vars(importlib.import_module(f"{PACKAGE}.{module}"))
    if name.endswith("_kernel")
]
# They have tests of their own, with all of their tiles.
MATRIX_KERNELS = {"_logits_kernel", "_two_heads_kernel", "_dh_kernel", "_dw_kernel"}


class Recorder:
    """Stands for a kernel; a launch becomes a request."""

    def __init__(self, module: str, name: str, arch: int, requests: list[KernelRequest]) -> None:
        self.path, self.arch, self.requests = (
            f"{PACKAGE}.{module}:{name}",
            arch,
            requests,
        )
        kernel = getattr(importlib.import_module(f"{PACKAGE}.{module}"), name)
        self.names = list(inspect.signature(kernel.fn).parameters)
        self.label = name.strip("_")

    def __getitem__(self, grid: Any) -> Any:
        return self.launch

    def launch(self, *arguments: Any, num_warps: int = 4, **named: Any) -> None:
        values = dict(zip(self.names, arguments, strict=False)) | named
        # As at a launch: None and the integer 1 decide on code, too.
        given = {n: v for n, v in values.items() if n in named or v is None or is_1(v)}
        numbers = {name: value for name, value in values.items() if name not in given}
        request = KernelRequest(
            kernel=self.path,
            signature={name: kind_of(value) for name, value in numbers.items()},
            constexprs={name: DTYPES.get(value, value) for name, value in given.items()},
            divisible=tuple(divisible(numbers)),
            arch=self.arch,
            num_warps=num_warps,
            label=self.label,
        )
        if request not in self.requests:
            self.requests.append(request)


def is_1(value: Any) -> bool:
    return isinstance(value, int) and value == 1


def divisible(numbers: dict[str, Any]) -> Iterator[str]:
    for name, value in numbers.items():
        if isinstance(value, tuple):
            fields: Any = value
            yield from divisible({f"{name}.{n}": v for n, v in fields._asdict().items()})
        elif isinstance(value, int) and not is_1(value) and value % 16 == 0:
            yield name


def kind_of(value: Any) -> Any:
    if isinstance(value, Tensor):
        return POINTERS[value.dtype]
    if isinstance(value, tuple):
        parts = (p if p is None or is_1(p) else kind_of(p) for p in value)
        return type(value)(*parts)
    return "fp32" if isinstance(value, float) else "i32"


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def problems() -> list[Problem]:
    """Llama 3's head with no option, and Gemma 2's with all of them."""
    target = empty(8192, dtype=torch.int64)
    plain = problem_of(empty(8192, 4096), empty(128256, 4096), target, with_entropy=False)
    gemma = LinearInputs(empty(8192, 3584), empty(256000, 3584), empty(256000), 0.5, 30.0)
    full = plain._replace(head=gemma, with_entropy=True)
    frozen = {"want_dw": False, "want_db": False}
    weights = {"row_weight": empty(8192, dtype=torch.float32), "with_stats": False, **frozen}
    own = {"self_weight": True, "transform": WeightTransform(0.5, 0.1, 0.2)}
    return [
        plain,
        plain._replace(**frozen),
        plain._replace(**weights),
        plain._replace(**own),
        full,
        full._replace(guide=gemma),
        full._replace(guide=gemma, **frozen),
        full._replace(want_dh=False, **frozen),
        # So few rows that dH is summed in parts.
        problem_of(empty(512, 4096), empty(128256, 4096), target[:512], with_entropy=False),
        problem_of(empty(512, 3584), gemma.weight, target[:512], **frozen),
        # Sizes and strides of 1, which Triton takes as constants.
        problem_of(empty(1, 1), empty(1, 1), target[:1], with_entropy=False),
    ]


def requests_of(arch: int) -> list[KernelRequest]:
    found: list[KernelRequest] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(plans, "machine_of", lambda _: Machine(arch, 132)))
        for module, name in KERNELS:
            kernel = Recorder(module, name, arch, [] if name in MATRIX_KERNELS else found)
            stack.enter_context(mock.patch(f"{PACKAGE}.{module}.{name}", kernel))
        for problem in problems():
            ce.solve(problem)
        rows, factor = empty(8192, 4096, dtype=torch.float32), empty(8192, dtype=torch.float32)
        ce.scaled_rows(rows, factor, factor, torch.bfloat16)
    return found


REQUESTS = [request for arch in (80, 100) for request in requests_of(arch)]


@pytest.fixture(scope="module")
def compiled() -> dict[KernelRequest, CompiledKernel]:
    return dict(zip(REQUESTS, compile_kernels(REQUESTS), strict=True))


def test_every_kernel_is_launched_and_so_compiled() -> None:
    launched = {request.kernel.split(":")[1] for request in REQUESTS}
    assert launched == {name for _, name in KERNELS} - MATRIX_KERNELS


@pytest.mark.parametrize("request_", REQUESTS, ids=str)
def test_no_spills_and_shared_memory_within_the_limit(
    compiled: dict[KernelRequest, CompiledKernel], request_: KernelRequest
) -> None:
    compiled[request_].assert_fits()
