"""All merge methods by name. A file in this folder that defines `METHOD` is one.

Names and settings are read by `gift --help`, so these files import torch where they compute.
"""

import importlib
import pkgutil

from gift.merge.method import Method


def read_methods() -> dict[str, Method]:
    """Imports every file of this folder and takes its method, in the order of file names."""
    modules = (
        importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)
    )
    return {module.METHOD.name: module.METHOD for module in modules}


METHODS: dict[str, Method] = read_methods()
