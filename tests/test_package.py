"""What is built for an index: whole, and usable without the extras and without Triton."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import gift

ROOT = Path(__file__).parent.parent
PACKAGES = ("gift", "gift_kernels")
BUILD = """
import sys
from setuptools import build_meta
output = sys.argv[1]  # setuptools changes the arguments
build_meta.build_wheel(output)
build_meta.build_sdist(output)
"""
USE = """
import importlib.machinery, importlib.util, pkgutil, sys

# Triton, and what only extras bring.
OPTIONAL = {
    "triton", "math_verify", "datasets", "trl", "ray", "openai", "lm_eval", "matplotlib",
    "liger_kernel", "cut_cross_entropy",
}
assert all(importlib.util.find_spec(name) for name in OPTIONAL), "nothing would be tested"

class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in OPTIONAL else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Finder
import torch
import gift, gift_kernels

for package in (gift, gift_kernels):
    assert package.__file__.startswith(sys.argv[1]), package.__file__
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            print(module.name, "needs", error.name.split(".")[0])

hidden = torch.randn(3, 4, requires_grad=True)
gift_kernels.weighted_ce(hidden, torch.randn(5, 4), torch.tensor([0, 1, 4])).backward()
assert hidden.grad.abs().sum() > 0
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the source distribution."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-c", BUILD, str(output)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    return output


def test_wheel_and_sdist_hold_every_file_of_the_packages(built: Path) -> None:
    files = {
        path.relative_to(ROOT).as_posix()
        for name in PACKAGES
        for path in (ROOT / name).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert {"gift/py.typed", "gift_kernels/py.typed", "gift/study/report.html.jinja"} <= files
    name = f"gift_tuning-{gift.__version__}"
    with zipfile.ZipFile(built / f"{name}-py3-none-any.whl") as wheel:
        held = set(wheel.namelist())
    info = f"{name}.dist-info/"
    assert {file for file in held if not file.startswith(info)} == files
    assert f"{info}licenses/LICENSE" in held
    with tarfile.open(built / f"{name}.tar.gz") as archive:
        held = {member.removeprefix(f"{name}/") for member in archive.getnames()}
    assert files | {"pyproject.toml", "README.md", "LICENSE"} <= held


def test_only_kernels_need_triton_and_only_the_trainer_of_trl_an_extra(
    built: Path, tmp_path: Path
) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        wheel.extractall(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", USE, str(tmp_path)],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert not done.returncode, done.stderr
    refused = dict(line.split(" needs ") for line in done.stdout.splitlines())
    assert refused, "the kernels were imported without Triton"
    assert refused.pop("gift.integrations.sft") in {"datasets", "trl"}
    assert set(refused.values()) == {"triton"}
    assert all(".triton" in name or ".kernels" in name for name in refused), refused
