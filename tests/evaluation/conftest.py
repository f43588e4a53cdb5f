"""A tiny model, and a server that misbehaves."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
from misbehaving_server import Misbehaving

import gift.evaluation.endpoint


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Misbehaving]:
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr(gift.evaluation.endpoint, "FIRST_WAIT", 0.01)
    with Misbehaving() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()
