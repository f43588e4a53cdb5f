"""Where the tests run: natively on CUDA, else through Triton's interpreter on the CPU."""

from __future__ import annotations

import os
import sys

import pytest
import torch

HAS_CUDA = torch.cuda.is_available()
if not HAS_CUDA:
    # Triton reads the variable when it defines its own and our jitted functions. PyTorch does not
    # import Triton, so this is early enough unless a plugin of pytest did.
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("Triton was imported before tests/conftest.py: set TRITON_INTERPRET=1")
    os.environ["TRITON_INTERPRET"] = "1"
# Kernels take their first configuration: on a GPU every new shape would be autotuned.
os.environ["GIFT_KERNELS_AUTOTUNE"] = "0"


@pytest.fixture(scope="session")
def device() -> str:
    """The device that kernel tests put their tensors on."""
    return "cuda" if HAS_CUDA else "cpu"


def pytest_runtest_teardown() -> None:
    # The processes of pytest-xdist share the device's memory.
    if HAS_CUDA and torch.cuda.memory_reserved() > 1 << 32:
        torch.cuda.empty_cache()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if HAS_CUDA:
        return
    dropped = [item for item in items if item.get_closest_marker("gpu")]
    if dropped:
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=dropped)
