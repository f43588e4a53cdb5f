"""Makes Triton's interpreter (TRITON_INTERPRET=1) compute in bfloat16 as a GPU does.

The interpreter keeps bfloat16 as its 16 bits in NumPy's uint16. As of Triton 3.9 it multiplies
those integers in `tl.dot`, and truncates float32 instead of rounding it to the nearest bfloat16.
Other arithmetic on bfloat16 tensors stays wrong, so kernels compute in float32. Compiled kernels
are not affected.
"""

from typing import Any

_corrected = False


def correct_bfloat16() -> None:
    """Replaces the interpreter's `tl.dot` and casts between float32 and bfloat16.

    Called once by every file that defines kernels.

    Raises:
        RuntimeError: this version of Triton has no such functions to replace.
    """
    global _corrected
    from triton import knobs

    if _corrected or not knobs.runtime.interpret:
        return

    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    missing = [name for name in ("cast_impl", "create_dot") if not hasattr(builder, name)]
    if missing:
        raise RuntimeError(f"Triton's interpreter has no {missing}: use another Triton version")
    handle: Any = interpreter.TensorHandle
    cast_of_triton: Any = builder.cast_impl

    def widened(tensor: Any) -> Any:
        if tensor.dtype.scalar == tl.bfloat16:
            return (tensor.data.astype(np.uint32) << 16).view(np.float32)
        return tensor.data.astype(np.float32)

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        kinds = (src.dtype.scalar, dst_type.scalar)
        if kinds == (tl.bfloat16, tl.float32):
            return handle(widened(src), dst_type.scalar)
        if kinds == (tl.float32, tl.bfloat16):
            bits = np.ascontiguousarray(src.data).view(np.uint32)
            to_even = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
            rounded = np.where(np.isnan(src.data), 0x7FC0, to_even).astype(np.uint16)
            return handle(rounded.reshape(src.data.shape), dst_type.scalar)
        return cast_of_triton(self, src, dst_type)

    def create_dot(
        self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any
    ) -> Any:
        assert a.dtype.primitive_bitwidth > 8, "float8 is not interpreted"
        if a.dtype.primitive_bitwidth == 64:
            return handle(np.matmul(a.data, b.data) + d.data, d.dtype.scalar)
        with np.errstate(invalid="ignore", over="ignore"):
            total = np.matmul(widened(a), widened(b)) + d.data
        return handle(total.astype(d.data.dtype), d.dtype.scalar)

    builder.cast_impl = cast_impl
    builder.create_dot = create_dot
    _corrected = True
