"""A finished study, made once."""

from pathlib import Path

import pytest
import studies

from gift.study.run import study


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair, rows and questions."""
    return studies.make_inputs(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="session")
def finished(folder: Path) -> Path:
    """A study of two methods and two seeds, run by two workers."""
    study(studies.config(folder, folder / "finished"))
    return folder / "finished"
