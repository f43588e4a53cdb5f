"""A server that fails: requests are repeated, finished questions kept, one clear error each."""

import contextlib
import socket
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
import tiny
from endpoints import QUESTIONS, configure, free_port
from misbehaving_server import (
    Answer,
    Misbehaving,
    complete,
    completion,
    cut_off,
    cut_off_earlier_than_said,
    drop,
    send,
    status,
    wait,
)
from transformers import AutoTokenizer

import gift.evaluation.endpoint
from gift.config import EvaluateConfig
from gift.errors import InputError
from gift.evaluate import evaluate


@pytest.mark.parametrize(
    "failure",
    [
        drop,
        cut_off,
        cut_off_earlier_than_said,
        wait,
        status(500),
        status(429),
        status(200, "{}"),
        status(200, '{"choices": []}'),
        status(200, '{"choices": [{"message": null}]}'),
        status(200, "[1]"),
        status(200, "null"),
    ],
    ids=[
        *("drop", "cut-off", "cut-off-earlier", "slow", "500", "429"),
        *("no-choices", "empty-choices", "no-message", "list", "null"),
    ],
)
def test_a_request_that_fails_is_repeated(
    server: Misbehaving, failure: Answer, tmp_path: Path
) -> None:
    failed: list[int] = []

    def fail_twice(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        if len(failed) < 2:
            failed.append(1)
            failure(handler, body)
        else:
            complete(handler, body)

    server.answer = fail_twice
    config = configure(tmp_path, server.url, request_timeout=0.5, samples=2)
    assert evaluate(config)["accuracy"] == 1
    assert len(server.asked) == 12 and len(failed) == 2


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (drop, r"cannot be reached \(.*\); is the server running\?"),
        (cut_off, "answers .*line 1 with no completion"),
        (wait, r"gave no reply in --request-timeout 0.2 s, asked 2 times"),
        (status(500), "fails at .*line 1, asked 2 times .*500.*no luck"),
        (status(400), "refuses .*line 1 .*400.*no luck"),
        (status(401), "refuses the key in OPENAI_API_KEY"),
        (status(404), "does not have the model 'tiny', or is not the URL .* ends in /v1"),
        (status(200, '{"error": "busy"}'), "answers .*line 1 with no completion .*busy"),
    ],
    ids=["drop", "cut-off", "slow", "500", "400", "401", "404", "error-in-200"],
)
def test_what_stays_broken_is_one_error_and_keeps_finished_questions(
    server: Misbehaving, failure: Answer, message: str, tmp_path: Path
) -> None:
    def break_at_third_question(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        (complete if len(server.asked) <= 4 else failure)(handler, body)

    server.answer = break_at_third_question
    options: dict[str, Any] = {"retries": 1, "request_timeout": 0.2, "samples": 2}
    config = configure(tmp_path, server.url, concurrency=1, **options)
    with pytest.raises(InputError, match=message.replace("line 1", "line 3")) as caught:
        evaluate(config)
    assert str(caught.value).startswith(f"--endpoint: {server.url} ")
    assert "finished questions are kept" in str(caught.value) and "\n" not in str(caught.value)
    assert not config.output.exists()
    server.answer = complete
    server.asked.clear()
    assert evaluate(config)["accuracy"] == 1
    assert len(server.asked) == 6


def interrupt(server: Misbehaving, config: EvaluateConfig) -> None:
    """Has a call keep two questions; the server gives no more failures."""
    server.asked.clear()
    failing = status(400)
    server.answer = lambda *request: (complete if len(server.asked) <= 4 else failing)(*request)
    with pytest.raises(InputError, match="refuses"):
        evaluate(config)
    server.answer = complete
    server.asked.clear()


@pytest.mark.parametrize(
    "change",
    [
        *({"seed": 1}, {"temperature": 0.5}, {"top_p": 0.5}, {"max_new_tokens": 13}),
        *({"served_model": "other"}, {"extra_body": {"top_k": 5}}, {"system_prompt": "Hm."}),
        {"model": "given"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_other_settings_gave_is_not_kept(
    server: Misbehaving, model: Path, change: dict[str, Any], tmp_path: Path
) -> None:
    options: dict[str, Any] = {"concurrency": 1, "samples": 2}
    interrupt(server, configure(tmp_path, server.url, **options))
    change = {"model": str(model)} if "model" in change else change
    evaluate(configure(tmp_path, server.url, **options, **change))
    assert len(server.asked) == 10


def test_kept_replies_are_of_one_model(
    server: Misbehaving, model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = configure(tmp_path, server.url, model=str(model), concurrency=1, samples=2)
    interrupt(server, config)
    other = tiny.make_model(tmp_path / "other", seed=1)
    evaluate(config.model_copy(update={"model": str(other)}))
    assert len(server.asked) == 10
    interrupt(server, again := config.model_copy(update={"output": tmp_path / "again"}))
    evaluate(again)
    assert len(server.asked) == 6
    shown = " ".join(capfd.readouterr().err.split())
    assert f"2 of 5 questions are kept from an interrupted call; {server.url} must have" in shown


def test_a_second_bos_in_kept_replies_is_found(
    server: Misbehaving, model: Path, tmp_path: Path
) -> None:
    """They were kept without `--model`, so nothing was compared then."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    options: dict[str, Any] = {"concurrency": 1, "samples": 2}
    interrupt(server, configure(tmp_path, server.url, **options))

    def count(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        ids = tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True)
        more = body["messages"][0]["content"] == QUESTIONS[0]["question"]
        length = len(ids["input_ids"]) + more
        send(handler, 200, completion("It is 4", prompt_tokens=length))

    server.answer = count
    with pytest.raises(InputError, match="line 1.* second BOS"):
        evaluate(configure(tmp_path, server.url, model=str(model), **options))


def test_a_server_that_is_not_there_is_named(tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}/v1"
    with pytest.raises(InputError, match=rf"{url} cannot be reached .*is the server running"):
        evaluate(configure(tmp_path, url, retries=0))
    assert not (tmp_path / "out.partial").exists()


def test_a_host_that_takes_no_connection_is_named_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gift.evaluation.endpoint, "CONNECT_TIMEOUT", 0.2)
    with socket.socket() as listener, contextlib.ExitStack() as waiting:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(3):  # its queue is full
            client = waiting.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(listener.getsockname())
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        with pytest.raises(InputError, match=rf"{url} cannot be reached .*is the server running"):
            evaluate(configure(tmp_path, url, retries=0))
