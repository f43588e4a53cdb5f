"""Compile Triton kernels for NVIDIA's architectures on any machine, and read the results.

A helper for tests, not a test. Where there is no GPU the tests run with TRITON_INTERPRET=1, under
which `@triton.jit` yields an interpreted function that cannot be compiled. So the kernels are
compiled in child processes without that variable: `compile_kernels` starts up to four for the
requests that this process has not compiled yet and keeps the results until the process ends. So
hand it all the requests of a file at once. A kernel takes about a second. Nothing is read from or
written to Triton's own cache.

Use, in a file `tests/test_<op>_compiles.py`:

    from compiling import ARCHITECTURES, KernelRequest, compile_kernels

    REQUESTS = [
        KernelRequest(
            kernel="gift_kernels.lora_merge.kernels:lora_merge_kernel",
            signature={"weight_ptr": "*bf16", "n_columns": "i32"},   # all that is no constexpr
            constexprs={"BLOCK_N": 128, "DTYPE": "tl.bfloat16", "stride_k": 1},
            divisible=("n_columns",),              # integers that are multiples of 16 at launch
            arch=arch,
            num_warps=4,
            num_stages=2,
        )
        for arch in ARCHITECTURES
    ]

    @pytest.fixture(scope="module")
    def compiled():
        return dict(zip(REQUESTS, compile_kernels(REQUESTS), strict=True))

    @pytest.mark.parametrize("request_", REQUESTS, ids=str)
    def test_no_spills(compiled, request_):
        compiled[request_].assert_fits()
        assert "wgmma" in compiled[request_].ptx

- `kernel` is "module:attribute"; autotuners and heuristics are unwrapped to the jitted function.
- `signature` names a type for every argument that is no constexpr: "*bf16", "*fp16", "*fp32",
  "*i64", "i32", "i64", "fp32", "u64", "tensordesc<bf16[128, 64]>". An integer that is 1 at launch
  is a constant to Triton: put it under `constexprs`, whether or not the kernel says `tl.constexpr`.
- a tuple argument is a NamedTuple of types; what is no string in it is a constant, such as a stride
  that is 1. Its fields are called "size.D" under `divisible` and `unaligned`.
- pointers are taken as 16-byte aligned, as PyTorch's are, except those named in `unaligned`.
- a constexpr that is a type is written "tl.float32"; a jitted function as "@module:attribute"; in
  the fields of a NamedTuple too.
- `config_options(config)` turns a `triton.Config` into the constexprs and options of a request.
- registers, spills and stack come from the log of the very `ptxas -v` run that made the cubin;
  SASS from the `nvdisasm` of Triton's package. `kernel.log` also holds ptxas' warnings, such as
  "wgmma.mma_async instructions are serialized".
- `markdown_table(kernels)` prints registers, shared memory and predicted occupancy.
- a request that does not compile raises RuntimeError with the compiler's message; the others of
  the batch are kept.

With pytest-xdist run with `--dist loadfile`, else every worker compiles its own batch.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import pickle
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent
# Ampere, Ada (with the shared memory of consumer Ampere), Hopper, Blackwell, consumer Blackwell.
ARCHITECTURES = (80, 89, 90, 100, 120)
# KiB of shared memory that one block may use (CUDA C++ Programming Guide, technical specifications
# by compute capability: the opt-in maximum), and that one SM holds; warps and blocks of an SM.
_BLOCK_SHARED = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}
_SM_SHARED = {80: 164, 89: 100, 90: 228, 100: 228, 120: 100}
_SM_WARPS = {80: 64, 89: 48, 90: 64, 100: 64, 120: 48}
_SM_BLOCKS = {80: 32, 89: 24, 90: 32, 100: 32, 120: 24}
_RESERVED_SHARED = 1024  # the driver takes this much of every block
_SM_REGISTERS = 65536


class _FrozenDict(dict[str, Any]):
    """A dictionary that can be part of a key."""

    def __hash__(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return hash(tuple(self.items()))


@dataclass(frozen=True)
class KernelRequest:
    """One kernel, specialised: see the module's docstring for the fields."""

    kernel: str
    signature: Mapping[str, Any]
    constexprs: Mapping[str, Any]
    arch: int
    num_warps: int = 4
    num_stages: int = 3
    divisible: tuple[str, ...] = ()
    unaligned: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""

    def __post_init__(self) -> None:
        for name in ("signature", "constexprs", "options"):
            object.__setattr__(self, name, _FrozenDict(getattr(self, name)))
        for name in ("divisible", "unaligned"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.arch not in ARCHITECTURES:
            raise ValueError(f"arch: got {self.arch}, expected one of {ARCHITECTURES}")

    def __str__(self) -> str:
        label = self.label or "-".join(
            f"{name}{value}" for name, value in self.constexprs.items() if name.isupper()
        )
        return f"sm_{self.arch}-{label}-w{self.num_warps}-s{self.num_stages}"


@dataclass(frozen=True)
class CompiledKernel:
    """What the compiler made of a request."""

    request: KernelRequest
    ptx: str
    sass: str
    log: str  # of ptxas -v
    registers: int  # per thread
    spill_stores: int  # bytes per thread
    spill_loads: int
    stack: int
    shared: int  # bytes per block
    num_warps: int  # larger than requested where Triton specialises warps

    def blocks_per_sm(self) -> int:
        """Blocks of this kernel that one SM can hold, by registers, shared memory and warps."""
        per_warp = -(-self.registers * 32 // 256) * 256  # registers are handed out 256 at a time
        by_registers = _SM_REGISTERS // (per_warp * self.num_warps)
        arch = self.request.arch
        by_shared = 1024 * _SM_SHARED[arch] // (self.shared + _RESERVED_SHARED)
        by_warps = _SM_WARPS[arch] // self.num_warps
        return min(by_registers, by_shared, by_warps, _SM_BLOCKS[arch])

    def assert_fits(self) -> None:
        """No spills, and shared memory within the limit of a block."""
        assert self.spill_stores == self.spill_loads == 0, self.log
        assert self.shared <= shared_memory_limit(self.request.arch)

    def occupancy(self) -> float:
        """Share of an SM's warp slots that this kernel fills."""
        return self.blocks_per_sm() * self.num_warps / _SM_WARPS[self.request.arch]


def shared_memory_limit(arch: int) -> int:
    """Bytes of shared memory that a block may use on this architecture."""
    return 1024 * _BLOCK_SHARED[arch]


def config_options(config: Any) -> dict[str, Any]:
    """The part of a KernelRequest that a `triton.Config` decides: pass it as keywords.

    The constexprs of the result hold the configuration's only; merge your own into them.
    """
    options = {"num_ctas": config.num_ctas, "maxnreg": config.maxnreg}
    return {
        "constexprs": dict(config.kwargs),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "options": {name: value for name, value in options.items() if value not in (None, 1)},
    }


_compiled: dict[KernelRequest, CompiledKernel | str] = {}


def compile_kernels(requests: Sequence[KernelRequest]) -> list[CompiledKernel]:
    """Compile every request, in order; what this process has compiled before is not redone."""
    missing = list(dict.fromkeys(r for r in requests if r not in _compiled))
    if missing:
        # A child needs seconds to import PyTorch and Triton: not one for a few requests.
        children = max(1, min(4, os.cpu_count() or 1, len(missing) // 6))
        parts = [missing[first::children] for first in range(children)]
        with ThreadPoolExecutor(children) as pool:
            for part, answers in zip(parts, pool.map(_in_child, parts), strict=True):
                for request, answer in zip(part, answers, strict=True):
                    failure = answer.pop("error", None)
                    _compiled[request] = failure or CompiledKernel(request=request, **answer)
    kernels: list[CompiledKernel] = []
    for request in requests:
        result = _compiled[request]
        if isinstance(result, str):
            raise RuntimeError(f"{request.kernel} [{request}] does not compile:\n{result}")
        kernels.append(result)
    return kernels


def _in_child(requests: Sequence[KernelRequest]) -> list[dict[str, Any]]:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(
        [str(TESTS.parent), str(TESTS), *filter(None, [env.get("PYTHONPATH")])]
    )
    with tempfile.TemporaryDirectory() as cache:
        env |= {"TRITON_CACHE_DIR": cache, "TRITON_DUMP_PTXAS_LOG": "1"}
        child = subprocess.run(
            [sys.executable, str(TESTS / "compiling.py")],
            input=pickle.dumps([asdict(request) for request in requests]),
            capture_output=True,
            env=env,
            check=False,
        )
    if child.returncode:
        raise RuntimeError(f"the compiling process failed:\n{child.stderr.decode()[-8000:]}")
    return json.loads(child.stdout)


def markdown_table(kernels: Iterable[CompiledKernel]) -> str:
    """Registers, shared memory and predicted occupancy of each kernel."""
    lines = [
        "| kernel | registers | spills | shared memory (KiB) | blocks per SM | occupancy |",
        "|---|---|---|---|---|---|",
    ]
    for kernel in kernels:
        lines.append(
            f"| {kernel.request} | {kernel.registers} | {kernel.spill_stores + kernel.spill_loads} "
            f"| {kernel.shared / 1024:.1f} | {kernel.blocks_per_sm()} | {kernel.occupancy():.0%} |"
        )
    return "\n".join(lines)


def _resolve(name: str) -> Any:
    """The jitted function behind "module:attribute"."""
    module, attribute = name.split(":")
    found = getattr(importlib.import_module(module), attribute)
    while hasattr(found, "configs") or type(found).__name__ == "Heuristics":
        found = found.fn
    return found


def _constexpr(value: Any) -> Any:
    import triton.language as tl

    if isinstance(value, str) and value.startswith("tl."):
        return getattr(tl, value.removeprefix("tl."))
    if isinstance(value, str) and value.startswith("@"):
        return _resolve(value.removeprefix("@"))
    if isinstance(value, tuple):
        return type(value)(*map(_constexpr, value))
    return value


def _compile(request: KernelRequest) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = _resolve(request.kernel)
    names = list(function.arg_names)
    given = {**request.signature, **request.constexprs}
    if surplus := sorted(set(given) ^ set(names)):
        raise ValueError(f"arguments {surplus} are missing in the request or unknown to the kernel")
    constexprs = {(names.index(n),): _constexpr(v) for n, v in request.constexprs.items()}
    signature: dict[str, Any] = dict.fromkeys(names, "constexpr")
    kinds: dict[str, tuple[tuple[int, ...], str]] = {}  # place and type of everything that is none
    for name, kind in request.signature.items():
        place = names.index(name)
        if isinstance(kind, str):
            signature[name], kinds[name] = kind, ((place,), kind)
            continue
        fields = [part if isinstance(part, str) else "constexpr" for part in kind]
        signature[name] = type(kind)(*fields)
        for number, (field_name, part) in enumerate(kind._asdict().items()):
            if isinstance(part, str):
                kinds[f"{name}.{field_name}"] = ((place, number), part)
            else:
                constexprs[place, number] = part
    plain = {param.name for param in function.params if param.do_not_specialize}
    if constants := sorted(plain & set(request.constexprs)):
        raise ValueError(f"arguments {constants} are never specialised")
    aligned = {name for name, (_, kind) in kinds.items() if kind.startswith("*")}
    aligned = aligned - set(request.unaligned) | set(request.divisible) - plain
    attrs = {kinds[name][0]: [["tt.divisibility", 16]] for name in sorted(aligned)}
    source = ASTSource(function, signature, constexprs=constexprs, attrs=attrs)
    options = {
        "num_warps": request.num_warps,
        "num_stages": request.num_stages,
        **request.options,
    }
    with contextlib.redirect_stdout(io.StringIO()) as log:
        kernel = triton.compile(source, target=GPUTarget("cuda", request.arch, 32), options=options)
    return {
        "ptx": kernel.asm["ptx"],
        "sass": _disassemble(kernel.asm["cubin"]),
        "shared": kernel.metadata.shared,
        "num_warps": kernel.metadata.num_warps,
        **_read_ptxas_log(log.getvalue()),
    }


def _read_ptxas_log(log: str) -> dict[str, Any]:
    # A kernel that calls device functions has one line for each: the worst counts.
    def worst(pattern: str) -> int:
        found = re.findall(pattern, log)
        if not found:
            raise RuntimeError(f"the log of ptxas has nothing like {pattern!r}:\n{log}")
        return max(map(int, found))

    return {
        "log": log,
        "registers": worst(r"Used (\d+) registers"),
        "spill_stores": worst(r"(\d+) bytes spill stores"),
        "spill_loads": worst(r"(\d+) bytes spill loads"),
        "stack": worst(r"(\d+) bytes stack frame"),
    }


def _disassemble(cubin: bytes) -> str:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = knobs.nvidia.nvdisasm.path
        return subprocess.run(
            [tool, "-c", file.name], capture_output=True, text=True, check=True
        ).stdout


def main() -> None:
    """Answer the pickled requests on stdin with results in JSON on stdout."""
    answers: list[dict[str, Any]] = []
    for fields in pickle.load(sys.stdin.buffer):
        request = KernelRequest(**fields)
        try:
            answers.append(_compile(request))
        except Exception as error:
            answers.append({"error": f"{type(error).__name__}: {error}"})
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main()
