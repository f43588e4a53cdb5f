"""An OpenAI-compatible server with scripted answers; a helper for tests."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[BaseHTTPRequestHandler, dict[str, Any]], None]


class Misbehaving(ThreadingHTTPServer):
    """A server whose `answer` is called with each request and its body."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.answer: Answer = complete
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, *arguments: Any) -> None:
        pass  # clients that gave up


class _Handler(BaseHTTPRequestHandler):
    server: Misbehaving

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body)
        self.server.keys.append(self.headers["Authorization"])
        self.server.answer(self, body)

    def log_message(self, *arguments: Any) -> None:
        pass


def send(handler: BaseHTTPRequestHandler, status: int, text: str) -> None:
    handler.send_response(status)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(text.encode())))
    handler.end_headers()
    handler.wfile.write(text.encode())


def completion(text: str | None, finish_reason: str = "stop", prompt_tokens: int = 7) -> str:
    return json.dumps(
        {
            "id": "1",
            "object": "chat.completion",
            "created": 0,
            "model": "tiny-1",
            "choices": [
                {
                    "index": 0,
                    "finish_reason": finish_reason,
                    "message": {"role": "assistant", "content": text},
                }
            ],
            "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": 3, "total_tokens": 10},
        }
    )


def complete(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
    """The right answer: the sum in the question."""
    words = body["messages"][-1]["content"].rstrip("?").split()
    send(handler, 200, completion(f"It is {int(words[2]) + int(words[4])}"))


def drop(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
    handler.connection.close()


def cut_off(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
    send(handler, 200, completion("It is 4")[:40])


def cut_off_earlier_than_said(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", "9999")
    handler.end_headers()
    handler.wfile.write(completion("It is 4").encode())
    handler.connection.close()


def wait(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
    time.sleep(3)
    complete(handler, body)


def status(code: int, text: str = "") -> Answer:
    return lambda handler, _: send(handler, code, text or json.dumps({"detail": "no luck"}))
