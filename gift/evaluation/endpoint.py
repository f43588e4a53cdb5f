"""Questions asked of an OpenAI-compatible server: vLLM, SGLang, llama.cpp, `transformers serve`.

Every reply is a separate chat completion (so the server applies its chat template) with its own
seed, because not every server supports `n`. The `openai` client repeats requests without a
connection, with a timeout or with status 408, 409, 429 or 5xx; truncated or empty responses are
repeated here. A question is saved once it has all its replies.
"""

import asyncio
import importlib.util
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import urlsplit

import numpy

from gift.config import EvaluateConfig
from gift.console import progress
from gift.errors import InputError
from gift.evaluation.generation import refuse_equal_samples
from gift.evaluation.questions import Question
from gift.storage.files import hash_json, read_json_lines, sealed_files, write_json_lines
from gift.storage.publish import Output, warn

FIRST_WAIT, LONGEST_WAIT = 0.5, 8.0  # seconds, as the client's own
CONNECT_TIMEOUT = 10.0  # seconds; a busy server still accepts connections
OUR_FIELDS = {
    *("model", "messages", "temperature", "top_p", "max_tokens", "seed"),
    *("n", "stream"),  # a request is one reply
}
KEPT = "finished questions are kept, and the same command resumes"


@dataclass(frozen=True)
class ServedReply:
    """One reply of a server; counts of tokens are the server's, None where it gives none."""

    text: str
    finish_reason: str | None
    length: int | None
    prompt_tokens: int | None
    model: str | None
    reasoning: str | None = None  # reasoning that the server's parser separated from the text

    @property
    def finished(self) -> bool:
        """Whether the model ended the reply, rather than a limit, a filter or a failure."""
        return self.finish_reason in ("stop", "tool_calls")


def require_client(config: EvaluateConfig) -> None:
    """InputError for bad options or a bad key, a missing client, or several processes."""
    if not _is_url(config.endpoint or ""):
        raise InputError(
            f"--endpoint: {config.endpoint!r} is no URL such as http://localhost:8000/v1 (a key "
            "belongs into OPENAI_API_KEY)"
        )
    if ours := sorted(config.extra_body.keys() & OUR_FIELDS):
        raise InputError(f"extra_body: {', '.join(ours)} come from other options; leave them out")
    if not (_key().isascii() and _key().isprintable()):
        raise InputError(
            "OPENAI_API_KEY: holds characters that no key has, such as a line break or a letter "
            "beyond ASCII; set it again"
        )
    refuse_equal_samples(config.samples, config.temperature)
    if importlib.util.find_spec("openai") is None:
        raise InputError(
            "--endpoint: the package openai is not installed; install gift-tuning[endpoint]"
        )
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise InputError(
            "--endpoint: one process asks a server; start it without torchrun, and raise "
            "--concurrency"
        )


def _key() -> str:
    return os.environ.get("OPENAI_API_KEY", "").strip()


def _is_url(text: str) -> bool:
    try:
        url = urlsplit(text)
        _ = url.port  # ValueError where it is no number of a port
    except ValueError:
        return False
    further = url.query or url.fragment or url.username or url.password
    return url.scheme in ("http", "https") and bool(url.hostname) and not further


def ask_server(
    config: EvaluateConfig,
    questions: Sequence[Question],
    output: Output,
    lengths: Sequence[int] | None = None,
    weights: str | None = None,
) -> list[list[ServedReply]]:
    """All replies [row][sample]: loads those in the work folder, requests and saves the rest.

    Args:
        lengths: how many tokens each prompt should have, to compare with the server's count.
        weights: hash of the model that the server should have. Replies in the work folder are
        reused only with equal lengths and weights; the server's weights cannot be checked.

    Raises:
        InputError: a question has tools, the server cannot be reached or refuses a request, or its
            prompts have a token too many.
    """
    for question in questions:
        if question.tools or any(m["role"] == "tool" or "tool_calls" in m for m in question.turns):
            raise InputError(
                f"{question.place}: has tools, whose calls servers take out of a reply in ways of "
                "their own; leave out --endpoint and give --model"
            )
    output.begin(
        {
            "endpoint": config.endpoint,
            "served model": config.served_model,
            "model": weights,
            "tokens of prompts": hash_json(lengths),
            "questions": hash_json([question.turns for question in questions]),
            "samples": config.samples,
            "temperature": config.temperature,
            "top_p": config.top_p,
            "max_new_tokens": config.max_new_tokens,
            "seed": config.seed,
            "extra_body": config.extra_body,
        }
    )
    replies: dict[int, list[ServedReply]] = defaultdict(list)
    for line in read_json_lines(sealed_files(output.work).values()):
        replies[line.pop("row")].append(ServedReply(**line))
    if replies:
        warn(
            f"{len(replies)} of {len(questions)} questions are kept from an interrupted call; "
            f"{config.endpoint} must have the weights that it had then"
        )
    with progress("asking", len(questions), done=len(replies)) as bar:

        def keep(row: int, finished: list[ServedReply]) -> None:
            if lengths is not None:
                _refuse_second_bos(config, finished[0], lengths[row], questions[row].place)
            lines = [{"row": row} | asdict(reply) for reply in finished]
            write_json_lines(output.work / f"{row:06d}.jsonl", lines, sealed=True)
            replies[row] = finished
            bar.advance()

        pending = {row: q for row, q in enumerate(questions) if row not in replies}
        asyncio.run(_ask(config, pending, keep))
    if lengths is not None:
        counted = [replies[row][0].prompt_tokens for row in range(len(questions))]
        differing = sum(ours != its for ours, its in zip(lengths, counted, strict=True))
        if differing:
            warn(
                f"{config.endpoint} counts another number of tokens, or none, in {differing} of "
                f"{len(questions)} prompts than the tokenizer and chat template of {config.model}"
            )
    return [replies[row] for row in range(len(questions))]


def summarize_server(
    config: EvaluateConfig, replies: Sequence[Sequence[ServedReply]]
) -> dict[str, Any]:
    """The server's metadata for metrics.json; warns if it does not seem to sample."""
    flat = [reply for of_question in replies for reply in of_question]
    alike = all(len({reply.text for reply in of_question}) == 1 for of_question in replies)
    if alike and config.samples > 1 and any(reply.text for reply in flat):
        warn(
            f"{config.endpoint} gave every question {config.samples} equal replies at temperature "
            f"{config.temperature:g}: it may not sample, or heed no seeds"
        )
    return {
        "endpoint": config.endpoint,
        "served_model": config.served_model,
        "answered_as": sorted({str(reply.model) for reply in flat}),
        "finish_reasons": Counter(str(reply.finish_reason) for reply in flat),
        "prompt_tokens": sum(reply.prompt_tokens or 0 for reply in flat),
        "reply_tokens": sum(reply.length or 0 for reply in flat),
    }


def _refuse_second_bos(config: EvaluateConfig, reply: ServedReply, length: int, place: str) -> None:
    if reply.prompt_tokens == length + 1:
        raise InputError(
            f"--endpoint: {config.endpoint} counts {length + 1} tokens in the prompt of {place}, "
            f"the chat template of {config.model} gives {length}: the server seems to add a second "
            "BOS; start it so that it adds none, or leave out --model to evaluate all the same"
        )


async def _ask(
    config: EvaluateConfig,
    questions: dict[int, Question],
    on_question: Callable[[int, list[ServedReply]], None],
) -> None:
    """Requests replies by row, `concurrency` at a time; the first failure ends all."""
    from openai import AsyncOpenAI, Timeout

    seconds = config.request_timeout
    client = AsyncOpenAI(
        base_url=config.endpoint,
        api_key=_key() or "EMPTY",
        max_retries=config.retries,
        timeout=Timeout(seconds, connect=min(seconds, CONNECT_TIMEOUT)),
    )
    gate = asyncio.Semaphore(config.concurrency)

    async def ask(row: int, sample: int) -> tuple[int, int, ServedReply]:
        async with gate:
            return row, sample, await _request(client, config, questions[row], row, sample)

    async with client:
        tasks = [
            asyncio.create_task(ask(row, sample))
            for row in questions
            for sample in range(config.samples)
        ]
        found: dict[int, dict[int, ServedReply]] = defaultdict(dict)
        try:
            for task in asyncio.as_completed(tasks):
                row, sample, reply = await task
                found[row][sample] = reply
                if len(found[row]) == config.samples:
                    on_question(row, [found[row][n] for n in range(config.samples)])
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _request(
    client: Any, config: EvaluateConfig, question: Question, row: int, sample: int
) -> ServedReply:
    from openai import OpenAIError

    for attempt in range(config.retries + 1):
        try:
            return _read(
                await client.chat.completions.create(
                    model=config.served_model,
                    messages=question.turns,
                    temperature=config.temperature,
                    top_p=config.top_p,
                    max_tokens=config.max_new_tokens,
                    seed=request_seed(config.seed, row, sample),
                    extra_body=config.extra_body,
                )
            )
        except OpenAIError as error:
            raise _named(error, config, question.place) from error
        except ValueError as error:  # no JSON, or not that of a completion
            if attempt == config.retries:
                raise InputError(
                    f"--endpoint: {config.endpoint} answers {question.place} with no completion "
                    f"({_said(error)}); {KEPT}"
                ) from error
            await asyncio.sleep(min(FIRST_WAIT * 2**attempt, LONGEST_WAIT))
    raise AssertionError("the last attempt returns or raises")


def request_seed(seed: int, row: int, sample: int) -> int:
    """The seed of one request, from 0 to 2^31 - 1, which every server accepts."""
    return int(numpy.random.SeedSequence((seed, row, sample)).generate_state(1)[0]) >> 1


def _read(completion: Any) -> ServedReply:
    """The first choice; ValueError where there is none (the client checks no fields)."""
    choices = getattr(completion, "choices", None)
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = getattr(choice, "message", None)
    text = getattr(message, "content", ...)
    if not isinstance(text, str | None):
        raise ValueError(f"no message in {str(completion)[:200]!r}")
    usage = getattr(completion, "usage", None)
    return ServedReply(
        text or "",
        getattr(choice, "finish_reason", None),
        _count(usage, "completion_tokens"),
        _count(usage, "prompt_tokens"),
        getattr(completion, "model", None),
        getattr(message, "reasoning_content", None) or getattr(message, "reasoning", None),
    )


def _count(usage: Any, name: str) -> int | None:
    count = getattr(usage, name, None)
    return count if isinstance(count, int) else None


def _named(error: Exception, config: EvaluateConfig, place: str) -> InputError:
    """The client's error as one line with a remedy."""
    import openai

    said, cause = _said(error), type(error.__cause__).__name__
    times = f"asked {config.retries + 1} times"
    match error:
        case openai.APITimeoutError() if cause != "ConnectTimeout":
            problem = f"gave no reply in --request-timeout {config.request_timeout:g} s, {times}"
        case openai.APIConnectionError():
            # Other messages may contain the headers, and with them the key.
            reason = error.__cause__ if cause == "ConnectError" else cause
            problem = f"cannot be reached ({reason}); is the server running?"
        case openai.AuthenticationError() | openai.PermissionDeniedError():
            problem = f"refuses the key in OPENAI_API_KEY ({said})"
        case openai.NotFoundError():
            problem = (
                f"does not have the model {config.served_model!r}, or is not the URL that "
                f"chat completions are under, which mostly ends in /v1 ({said})"
            )
        case openai.InternalServerError():
            problem = f"fails at {place}, {times} ({said})"
        case _:
            problem = f"refuses {place} ({said})"
    return InputError(f"--endpoint: {config.endpoint} {problem}; {KEPT}")


def _said(error: Exception) -> str:
    """The error's text and the response body as one line without the key."""
    said, body = str(error), getattr(error, "body", None)
    if body and not (isinstance(body, dict) and "message" in body):
        said += f": {body}"
    said = " ".join(said.split())
    return (said.replace(_key(), "***") if _key() else said)[:300]
