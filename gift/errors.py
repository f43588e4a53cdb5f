"""Errors the user can fix."""

# Messages of PyTorch, cuBLAS, cuDNN and Triton when memory runs out.
OUT_OF_MEMORY = (
    "outofmemoryerror",
    "out of memory",
    "can't allocate",
    "not enough memory",
    "alloc_failed",
)


class InputError(ValueError):
    """Bad input: the message names the argument or file, what was given and how to fix it.

    The command line prints it as one line and exits with status 2; any other exception is a defect
    of this program and keeps its stack trace.
    """


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out; PyTorch has an error type for GPUs only."""
    said = repr(error).lower()
    return isinstance(error, RuntimeError) and any(words in said for words in OUT_OF_MEMORY)
