"""A real server, `transformers serve`: the same answers as locally."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from endpoints import QUESTIONS, configure, free_port, read_samples
from transformers import AutoTokenizer

from gift.errors import InputError
from gift.evaluate import evaluate

pytestmark = pytest.mark.xdist_group("a server")


@pytest.fixture(scope="module")
def served(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`transformers serve` of the model, in a process of its own; its URL."""
    log = tmp_path_factory.mktemp("serve") / "log"
    port = free_port()
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(model)]
    with log.open("w") as output:
        server = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"],
            stdout=output,
            stderr=output,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server, log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait()


def wait_for(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while server.poll() is None and time.monotonic() < deadline:
        try:
            urlopen(url).close()
            return
        except OSError:
            time.sleep(0.1)
    pytest.fail(f"the server did not start:\n{log.read_text()}")


def test_a_server_gives_the_greedy_replies_of_the_model(
    model: Path, served: str, tmp_path: Path
) -> None:
    # Not 12: a reply whose 12th token is its end is cut off by this server's account.
    options: dict[str, Any] = {"samples": 1, "temperature": 0, "max_new_tokens": 13}
    (tmp_path / "local").mkdir()
    local = configure(tmp_path / "local", None, model=str(model), device="cpu", **options)
    evaluate(local)
    config = configure(tmp_path, served, served_model=str(model), model=str(model), **options)
    metrics = evaluate(config)
    expected, samples = read_samples(local), read_samples(config)
    assert [sample["reply"] for sample in samples] == [sample["reply"] for sample in expected]
    for name in ("correct", "extracted", "finished", "tokens", "answer"):
        assert [s[name] for s in samples] == [s[name] for s in expected], name
    assert [s["finish_reason"] == "stop" for s in samples] == [s["finished"] for s in samples]
    assert samples[0]["prompt"] == [{"role": "user", "content": QUESTIONS[0]["question"]}]
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompts = [tokenizer(s["prompt"], add_special_tokens=False)["input_ids"] for s in expected]
    assert metrics["server"] == {
        "endpoint": served,
        "served_model": str(model),
        "answered_as": [f"{model}@main"],
        "finish_reasons": {"length": 4, "stop": 1},
        "prompt_tokens": sum(map(len, prompts)),
        "reply_tokens": sum(s["tokens"] for s in expected),
    }


def test_samples_differ_by_seed_and_come_again(model: Path, served: str, tmp_path: Path) -> None:
    """One request at a time: this server draws all of them from one generator."""
    sampling = {"do_sample": True, "eos_token_id": 2}
    texts = []
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        config = configure(
            tmp_path / name,
            served,
            served_model=str(model),
            samples=2,
            concurrency=1,
            extra_body={"generation_config": json.dumps(sampling)},
        )
        evaluate(config)
        texts.append([sample["reply"] for sample in read_samples(config)])
    assert texts[0] == texts[1]
    assert all(texts[0][n] != texts[0][n + 1] for n in range(0, 10, 2))


def test_a_server_that_does_not_sample_is_named(
    model: Path, served: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    evaluate(configure(tmp_path, served, served_model=str(model), samples=2))
    assert "gave every question 2 equal replies at temperature 1" in capfd.readouterr().err


def test_another_model_name_is_refused(served: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"{served} refuses .*line 1 .*Server is pinned to"):
        evaluate(configure(tmp_path, served, served_model="other", concurrency=1))
