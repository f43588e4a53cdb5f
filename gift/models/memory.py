"""Attempts at what the memory of a device may not hold."""

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

from gift.errors import lacks_memory

Found = TypeVar("Found")


def attempt(compute: Callable[[], Found]) -> Found | None:
    """What the call returns; None where memory was short, after what it took is free again."""
    try:
        return compute()
    except RuntimeError as error:
        if not lacks_memory(error):
            raise
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return None
