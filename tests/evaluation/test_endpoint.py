"""An evaluation through a server: its requests, its output, and what it refuses."""

import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
import yaml
from endpoints import QUESTIONS, configure, read_samples
from misbehaving_server import (
    Misbehaving,
    complete,
    completion,
    send,
    status,
)
from transformers import AutoTokenizer

from gift import cli
from gift.errors import InputError
from gift.evaluate import evaluate
from gift.evaluation.endpoint import request_seed


def test_greedy_replies_are_asked_for_once(server: Misbehaving, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="samples: got 4 at temperature 0"):
        evaluate(configure(tmp_path, server.url, temperature=0))
    assert not server.asked


@pytest.mark.parametrize("key", ["sec\nret", "sec\x01ret", "secretü"])
def test_a_key_that_no_header_takes_is_refused_unseen(
    server: Misbehaving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(InputError, match="^OPENAI_API_KEY: holds characters") as caught:
        evaluate(configure(tmp_path, server.url, retries=0))
    assert "sec" not in str(caught.value) and not server.asked


def test_a_key_is_sent_without_white_space_and_never_shown(
    server: Misbehaving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", " secret\n")
    for answer in (status(401, '{"detail": "bad key secret"}'), status(200, '"Bearer secret"')):
        server.answer = answer
        with pytest.raises(InputError, match=r"\*\*\*") as caught:
            evaluate(configure(tmp_path, server.url, retries=0))
        assert "secret" not in str(caught.value)
    assert set(server.keys) == {"Bearer secret"}


def test_requests_hold_what_was_asked_for(
    server: Misbehaving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    config = configure(
        tmp_path,
        server.url,
        samples=3,
        temperature=0.5,
        top_p=0.9,
        system_prompt="Be brief.",
        extra_body={"top_k": 5},
    )
    evaluate(config)
    assert set(server.keys) == {"Bearer secret"}
    assert "secret" not in (config.output / "metrics.json").read_text()
    seeds = {body.pop("seed") for body in server.asked}
    assert seeds == {request_seed(0, row, sample) for row in range(5) for sample in range(3)}
    assert len(seeds) == 15 and all(0 <= seed < 2**31 for seed in seeds)
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is 0 plus 0?"},
    ]
    asked = next(body for body in server.asked if body["messages"] == turns)
    expected = {"model": "tiny", "temperature": 0.5, "top_p": 0.9, "max_tokens": 12, "top_k": 5}
    assert asked == {**expected, "messages": turns}


def test_a_recipe_adds_fields_and_local_servers_need_no_key(
    server: Misbehaving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    settings = configure(tmp_path, server.url).model_dump(mode="json", exclude_defaults=True)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(settings | {"extra_body": {"top_k": 5, "min_p": 0.1}}))
    monkeypatch.setattr(sys, "argv", ["gift", "evaluate", "--config", str(recipe)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    assert {(body["top_k"], body["min_p"]) for body in server.asked} == {(5, 0.1)}
    assert set(server.keys) == {"Bearer EMPTY"}


def test_a_server_without_counts_is_named(
    model: Path, server: Misbehaving, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    uncounted = json.dumps({**json.loads(completion("It is 4")), "usage": None})
    server.answer = lambda handler, _: send(handler, 200, uncounted)
    metrics = evaluate(configure(tmp_path, server.url, model=str(model)))
    assert metrics["mean_reply_tokens"] is None and metrics["accuracy"] == 0.2
    shown = capfd.readouterr()
    assert "unknown" in shown.out and "or none, in 5 of 5 prompts" in " ".join(shown.err.split())


def test_at_most_as_many_requests_at_a_time_as_asked_for(
    server: Misbehaving, tmp_path: Path
) -> None:
    running, most = [0], [0]
    lock = threading.Lock()

    def count(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.05)
        with lock:
            running[0] -= 1
        complete(handler, body)

    server.answer = count
    evaluate(configure(tmp_path, server.url, concurrency=3))
    assert most == [3]


@pytest.mark.parametrize(
    ("reason", "text", "finished"),
    [
        *(("length", "It is 4", False), ("content_filter", "It is 4", False)),
        *(("stop", "It is 4", True), ("length", None, False)),
    ],
)
def test_a_reply_that_did_not_end_is_wrong(
    server: Misbehaving, reason: str, text: str | None, finished: bool, tmp_path: Path
) -> None:
    server.answer = lambda handler, _: send(handler, 200, completion(text, reason))
    config = configure(tmp_path, server.url, samples=1)
    metrics = evaluate(config)
    samples = read_samples(config)
    assert [s["matches"] for s in samples] == [
        text is not None and s["answer"] == "4" for s in samples
    ]
    assert [s["correct"] for s in samples] == [s["matches"] and finished for s in samples]
    assert metrics["unfinished"] == (not finished)
    assert metrics["mean_reply_tokens"] == 3 and metrics["server"]["answered_as"] == ["tiny-1"]


@pytest.mark.parametrize(("more", "place"), [(1, "line 1"), (3, None)])
def test_prompts_are_compared_with_the_tokenizers(
    model: Path,
    server: Misbehaving,
    more: int,
    place: str | None,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)

    def count(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        ids = tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True)
        length = len(ids["input_ids"])
        send(handler, 200, completion("It is 4", prompt_tokens=length + more))

    server.answer = count
    config = configure(tmp_path, server.url, model=str(model), concurrency=1)
    if place is None:
        evaluate(config)
        assert "in 5 of 5 prompts" in " ".join(capfd.readouterr().err.split())
        return
    with pytest.raises(InputError, match=f"{place}, .*seems to add a second BOS"):
        evaluate(config)
    server.asked.clear()
    evaluate(config.model_copy(update={"model": None}))
    assert len(server.asked) == 20  # the reply to a wrong prompt was not kept


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"endpoint": "localhost:8000"}, "--endpoint: 'localhost:8000' is no URL such as http"),
        ({"endpoint": "http://user:key@host/v1"}, "is no URL .*OPENAI_API_KEY"),
        ({"endpoint": "http://host:99999/v1"}, "is no URL"),
        ({"endpoint": "http://[::1/v1"}, "is no URL"),
        ({"extra_body": {"seed": 1, "n": 2}}, "extra_body: n, seed come from other options"),
        ({"served_model": None}, "--served-model: is required with --endpoint"),
        ({"dtype": "float32"}, "--dtype: the server decides it; leave it out"),
        ({"batch_size": 4}, "--batch-size: the server decides it"),
        ({"check": "choice", "max_new_tokens": 2048}, "--check: choice reads the likelihoods"),
        ({"endpoint": None, "concurrency": 3}, "--served-model: is for a server"),
        ({"endpoint": None, "served_model": None}, "--model: is required, or the --endpoint"),
    ],
)
def test_options_that_do_not_go_together(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config = configure(tmp_path, "http://127.0.0.1:1/v1", answer_pattern=None)
    with pytest.raises(InputError, match=message):
        evaluate(config.model_copy(update=options))


def test_questions_with_tools_are_refused(server: Misbehaving, tmp_path: Path) -> None:
    config = configure(tmp_path, server.url)
    tool = {"type": "function", "function": {"name": "add"}}
    assert config.data is not None
    config.data.write_text(json.dumps({**QUESTIONS[0], "tools": [tool]}))
    with pytest.raises(InputError, match="line 1: has tools, .*leave out --endpoint"):
        evaluate(config)


def test_several_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="start it without torchrun"):
        evaluate(configure(tmp_path, "http://127.0.0.1:1/v1"))


def test_without_the_client_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"install gift-tuning\[endpoint\]"):
        evaluate(configure(tmp_path, "http://127.0.0.1:1/v1"))
