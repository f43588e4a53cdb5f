"""Evaluations through a server, and their results."""

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from gift.config import EvaluateConfig

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


def free_port() -> int:
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        return server.server_address[1]
