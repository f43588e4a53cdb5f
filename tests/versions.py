"""Runs the tests with other versions of PyTorch and Transformers, an environment for each.

    python tests/versions.py [--keep FOLDER] [-- pytest's arguments]

Needs the network and seven gigabytes a version; not a test itself. Ends with a table, and with
status 1 if any version failed. The interpreter of Triton 3.5 and 3.6 needs NumPy below 2.4.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# The oldest that pyproject.toml allows, those between, and the newest.
VERSIONS = [
    ("torch==2.9.1", "transformers==5.0.0", "numpy<2.4"),
    ("torch==2.10.0", "transformers==5.8.0", "numpy<2.4"),
    ("torch==2.11.0", "transformers==5.17.0", "numpy<2.4"),
    ("torch==2.12.1", "transformers==5.20.2"),
    ("torch==2.13.0", "transformers==5.24.0"),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", type=Path, help="folder for the environments, used again")
    parser.add_argument("pytest", nargs="*", default=["-n", "2", "--dist", "loadgroup"])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        ended = {versions: tested(versions, folder, arguments.pytest) for versions in VERSIONS}
    for versions, (status, last) in ended.items():
        print(" ".join(versions).ljust(60), "failed:" if status else "", last)
    return int(any(status for status, _ in ended.values()))


def tested(versions: tuple[str, ...], folder: Path, options: list[str]) -> tuple[int, str]:
    """pytest's status and last line with these versions; pip's where they cannot be installed."""
    python = folder / "-".join(versions).replace("<", "below") / "bin" / "python"
    print("##", *versions, flush=True)
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", python.parent.parent], check=True)
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    status, last = shown([*pip, "--editable", f"{ROOT}[test]", *versions])
    return (status, last) if status else shown([python, "-m", "pytest", *options])


def shown(command: list[str | Path]) -> tuple[int, str]:
    """Status and last line of a command whose output is passed on."""
    last = ""
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            last = line.strip() or last
    return process.returncode, last


if __name__ == "__main__":
    sys.exit(main())
