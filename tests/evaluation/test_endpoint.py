"""An evaluation through a server: the same answers as locally, and one clear error each."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
import tiny
import yaml
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
from gift import cli
from gift.config import EvaluateConfig
from gift.errors import InputError
from gift.evaluate import evaluate
from gift.evaluation.endpoint import request_seed

pytestmark = pytest.mark.xdist_group("a server")

QUESTIONS = [{"question": f"What is {n} plus {n % 3}?", "answer": n + n % 3} for n in range(5)]


def configure(folder: Path, endpoint: str | None, **options: Any) -> EvaluateConfig:
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    settings: dict[str, Any] = {
        "endpoint": endpoint,
        "data": data,
        "output": folder / "out",
        "check": "exact",
        "answer_pattern": r"(\d+)",
        "max_new_tokens": 12,
        **({"served_model": "tiny"} if endpoint else {}),
    }
    return EvaluateConfig(**settings | options)


def read_samples(config: EvaluateConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (config.output / "samples.jsonl").open()]


# A real server.


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_model(tmp_path_factory.mktemp("model"))


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


def free_port() -> int:
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        return server.server_address[1]


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


# One that misbehaves.


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
