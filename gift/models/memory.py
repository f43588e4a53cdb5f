"""Attempts that may run out of memory."""

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch

from gift.console import error_console
from gift.errors import is_out_of_memory

Found = TypeVar("Found")
Item = TypeVar("Item")


def attempt(compute: Callable[[], Found]) -> Found | None:
    """The call's result; None if memory ran out, after freeing what the call allocated."""
    try:
        return compute()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return None


def in_parts(
    compute: Callable[[Sequence[Item]], Found], batches: Iterable[Sequence[Item]], name: str
) -> Iterator[tuple[Sequence[Item], Found]]:
    """Every batch and its result; parts of it, from then on, where memory is short.

    Args:
        compute: its results must not depend on what else is in a batch.
        name: of the items in a note.
    """
    size: int | None = None
    for batch in batches:
        while batch:
            part = batch[:size]
            found = attempt(lambda part=part: compute(part)) if len(part) > 1 else compute(part)
            if found is None:
                size = len(part) // 2
                error_console.print(
                    f"note: at most {size} {name} at a time; the memory does not hold more",
                    markup=False,
                    highlight=False,
                    soft_wrap=True,
                )
                continue
            yield part, found
            batch = batch[len(part) :]
