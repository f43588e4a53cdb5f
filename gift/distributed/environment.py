"""Whole numbers that torchrun puts into the environment."""

import os

from gift.errors import InputError


def whole_number(name: str, default: str | None = None, least: int = 0) -> int:
    """The variable's value; InputError: it is not set and has no default, or is no such number."""
    given = os.environ.get(name, default)
    if given is None:
        raise InputError(f"{name}: is not set; start several processes with torchrun")
    if not (given.isascii() and given.isdigit() and int(given) >= least):
        raise InputError(
            f"{name}: is {given!r} in the environment, not a whole number from {least}; start "
            "several processes with torchrun, or unset it"
        )
    return int(given)


def processes() -> int:
    """How many processes torchrun started; 1 without it."""
    return whole_number("WORLD_SIZE", "1", least=1)
