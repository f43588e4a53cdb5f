"""Errors that the user can mend."""

# What errors of PyTorch, cuBLAS, cuDNN and Triton say where memory is short.
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


def lacks_memory(error: BaseException) -> bool:
    """Whether the error says that memory is short; PyTorch has a type for GPUs only."""
    said = repr(error).lower()
    return isinstance(error, RuntimeError) and any(words in said for words in OUT_OF_MEMORY)
