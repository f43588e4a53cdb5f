"""Extracts the answer from a reply and compares it with the reference answer.

Two checks: `exact` compares text, ignoring differences in white space; `math` uses math-verify to
test mathematical equality. math-verify uses SymPy, which can hang or use unbounded memory on a
model's output, and its own timeout works in the main thread only (its issues 55 and 65). So `math`
runs in a worker process that is killed and restarted when an answer takes too long. Linux and
macOS.
"""

import contextlib
import importlib.util
import json
import logging
import os
import re
import selectors
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, Protocol

from gift.errors import InputError

START_SECONDS = 120.0  # for importing SymPy from a slow disk
WORKER_MEMORY = 4 << 30  # bytes of address space


@dataclass(frozen=True)
class Verdict:
    """Whether a reply is right, the answer found in it, and a problem of the check if any."""

    correct: bool
    extracted: str | None
    problem: Literal["timeout", "crash"] | None = None


class Checker(Protocol):
    """Compares replies with reference answers; a context manager, because it may own a process."""

    def check(self, reply: str, answer: str) -> Verdict: ...

    def can_read(self, answer: str) -> bool: ...

    def __enter__(self) -> "Checker": ...

    def __exit__(self, *exception: Any) -> None: ...


def normalize(text: str) -> str:
    """The text with white space collapsed to single spaces and stripped."""
    return " ".join(text.split())


def compile_pattern(pattern: str | None) -> re.Pattern[str] | None:
    """Compiles `--answer-pattern`; InputError if it is not a regular expression with a group."""
    if pattern is None:
        return None
    try:
        compiled = re.compile(pattern, re.MULTILINE)
    except re.error as error:
        raise InputError(
            f"--answer-pattern: {pattern!r} is not a regular expression ({error})"
        ) from None
    if compiled.groups == 0:
        raise InputError(
            f"--answer-pattern: {pattern!r} has no group; put the answer's part in parentheses, "
            r"for example 'answer (\S+)'"
        )
    return compiled


def extract(pattern: re.Pattern[str] | None, reply: str) -> str | None:
    """The first group of the last match, the whole reply without a pattern, None without a match.

    An unmatched group counts as no match.
    """
    if pattern is None:
        return reply
    matches = list(pattern.finditer(reply))
    return matches[-1].group(1) if matches else None


def open_checker(
    check: Literal["exact", "math"], answer_pattern: str | None, timeout_seconds: float
) -> Checker:
    """The checker for these options; InputError for a bad pattern or a missing math-verify."""
    pattern = compile_pattern(answer_pattern)
    if check == "exact":
        return ExactChecker(pattern)
    if importlib.util.find_spec("math_verify") is None:
        raise InputError(
            "--check math: math-verify is not installed; install gift-tuning[eval], "
            "or use --check exact"
        )
    return MathChecker(pattern, timeout_seconds)


class ExactChecker:
    """Text equality of the extracted answer and the reference, white space normalised."""

    def __init__(self, pattern: re.Pattern[str] | None) -> None:
        self._pattern = pattern

    def check(self, reply: str, answer: str) -> Verdict:
        extracted = extract(self._pattern, reply)
        if extracted is None:
            return Verdict(False, None)
        extracted = normalize(extracted)
        return Verdict(extracted == normalize(answer), extracted)

    def can_read(self, answer: str) -> bool:
        return True

    def __enter__(self) -> "ExactChecker":
        return self

    def __exit__(self, *exception: Any) -> None:
        pass


class MathChecker:
    """Mathematical equality by math-verify in a worker process, at most `timeout_seconds` each.

    With a pattern the extracted text is the answer; without one math-verify looks for the answer in
    the whole reply (a boxed one first, else the last expression or number).
    """

    def __init__(self, pattern: re.Pattern[str] | None, timeout_seconds: float) -> None:
        self._pattern = pattern
        self._timeout = timeout_seconds
        self._worker: _Worker | None = None

    def check(self, reply: str, answer: str) -> Verdict:
        text = extract(self._pattern, reply)
        if text is None:
            return Verdict(False, None)
        is_answer = self._pattern is not None
        result = self._ask({"answer": answer, "reply": text, "is_answer": is_answer})
        if isinstance(result, str):
            return Verdict(False, normalize(text) if is_answer else None, result)
        return Verdict(result["correct"], normalize(text) if is_answer else result["extracted"])

    def can_read(self, answer: str) -> bool:
        """Whether math-verify finds an expression in a reference answer."""
        result = self._ask({"answer": answer})
        return not isinstance(result, str) and result["readable"]

    def _ask(self, question: dict[str, Any]) -> dict[str, Any] | Literal["timeout", "crash"]:
        if self._worker is None:
            self._worker = _Worker(self._timeout)
        try:
            return self._worker.ask(question)
        except (TimeoutError, EOFError, BrokenPipeError) as error:
            self._worker.kill()
            self._worker = None
            return "timeout" if isinstance(error, TimeoutError) else "crash"

    def __enter__(self) -> "MathChecker":
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._worker is not None:
            self._worker.kill()
            self._worker = None


class _Worker:
    """A worker process that runs this module: one JSON line per question, one per answer."""

    def __init__(self, timeout_seconds: float) -> None:
        # The child must find this package even where it is not installed.
        package_root = str(Path(__file__).resolve().parents[2])
        search_path = [package_root, *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "gift.evaluation.answers", str(timeout_seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(search_path)},
        )
        self._timeout = timeout_seconds
        self._received = b""
        try:
            self._receive(START_SECONDS)
        except (TimeoutError, EOFError) as error:
            self.kill()
            raise RuntimeError(
                "the process that runs math-verify did not start; its message is above"
            ) from error
        except BaseException:
            self.kill()
            raise

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """Raises TimeoutError, or EOFError or BrokenPipeError when the process has died."""
        pipe = _pipe(self._process.stdin)
        pipe.write(json.dumps(question).encode() + b"\n")
        pipe.flush()
        return json.loads(self._receive(self._timeout))

    def _receive(self, seconds: float) -> bytes:
        deadline = time.monotonic() + seconds
        pipe = _pipe(self._process.stdout)
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            while b"\n" not in self._received:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise TimeoutError
                block = os.read(pipe.fileno(), 1 << 16)
                if not block:
                    raise EOFError
                self._received += block
        line, self._received = self._received.split(b"\n", 1)
        return line

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(BrokenPipeError):  # part of a question was not sent
                _pipe(pipe).close()


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None, "the worker was started with pipes"
    return pipe


def _parse(text: str, is_answer: bool) -> list[Any]:
    """math-verify's parse of a text: [expression, its text], [text], or [] if nothing is found.

    An answer such as `6 - 5i` is parsed as if it were boxed, because in running text math-verify
    would take only its last number. If that gives no expression, it is parsed as running text.
    """
    from math_verify import parse

    if is_answer:
        parsed = parse("\\boxed{" + text + "}", parsing_timeout=None)  # pyright: ignore[reportArgumentType]
        if len(parsed) > 1:
            return parsed
    return parse(text, parsing_timeout=None)  # pyright: ignore[reportArgumentType]


def _judge(question: dict[str, Any]) -> dict[str, Any]:
    from math_verify import verify

    answer = _parse(question["answer"], is_answer=True)
    if "reply" not in question:
        return {"readable": len(answer) > 1}
    reply = _parse(question["reply"], question["is_answer"])
    extracted = str(reply[-1]) if reply else None
    same_text = normalize(question["answer"]) in (
        normalize(question["reply"]),
        normalize(extracted or ""),
    )
    correct = same_text or verify(answer, reply, timeout_seconds=None)
    return {"correct": bool(correct), "extracted": extracted}


def _serve(timeout_seconds: float) -> None:
    """Answers questions from standard input until it closes."""
    logging.disable(logging.CRITICAL)
    _limit_memory()
    # Output of SymPy and the LaTeX parser must not mix with the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    # Warm up: imports and compiled patterns must not count toward the first answer's time limit.
    _judge({"answer": r"\frac{1}{2}", "reply": r"so $\boxed{0.5}$ or 1", "is_answer": False})
    print("ready", file=answers, flush=True)
    os.dup2(nowhere, 2)  # not earlier: messages of a failed start go there
    for line in sys.stdin:
        # If the parent has died, the default action of SIGALRM ends a hanging process.
        signal.alarm(int(timeout_seconds) + 2)
        print(json.dumps(_judge(json.loads(line))), file=answers, flush=True)
        signal.alarm(0)


def _limit_memory() -> None:
    import resource

    with contextlib.suppress(ValueError, OSError):  # macOS does not let every process set it
        resource.setrlimit(resource.RLIMIT_AS, (WORKER_MEMORY, WORKER_MEMORY))


if __name__ == "__main__":
    _serve(float(sys.argv[1]))
