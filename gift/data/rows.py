"""JSONL files as rows, and rows as conversations; no key of a row is dropped silently.

A row is `{"instruction", "response"}` (with optional `input`), `{"prompt", "completion"}` (texts
or message lists) or `{"messages"}`; each may have `system`, a text that becomes the first turn,
and `tools`, a list of schemas or its JSON text, for the chat template.

A message has a `role` and a `content` (a text, or parts of type text); an assistant's may have
`tool_calls` and reasoning, any message a `name`, a tool's result a `tool_call_id`. All of these
go to the chat template. Other keys with a value:

- in a message, or of a row and in `UNREAD_KEYS` (unsupported input for a model): an error;
- any other key of a row, such as `id` or `source`: metadata, counted and noted once a file;
- named in `--ignore-keys`: left out.
"""

import json
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from gift.errors import InputError

Message = dict[str, Any]
ROLES = ("system", "user", "assistant", "tool")
FORMATS = (("instruction", "response"), ("prompt", "completion"))
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
MESSAGE_KEYS = ("role", "content", "tool_calls", "tool_call_id", "name", *REASONING_KEYS)
UNREAD_KEYS = {
    *("history", "documents", "functions", "function_call", "chat_template_kwargs"),
    *("image", "images", "video", "videos", "audio", "audios", "chosen", "rejected"),
}


class Conversation(NamedTuple):
    """The turns of a row, and the tools for its chat template."""

    turns: list[Message]
    tools: list[dict[str, Any]] | None = None


def json_lines(path: Path, option: str = "--data") -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Each row of a JSONL file with its place, "FILE, line N", and N; blank lines are skipped.

    Raises:
        InputError: a file that cannot be read, or a line that is no JSON object of valid texts.
    """
    try:
        with path.open("rb") as lines:
            for number, raw in enumerate(lines, 1):
                if raw.strip():
                    place = f"{path}, line {number}"
                    yield place, number, _json_object(raw, place)
    except FileNotFoundError:
        raise InputError(f"{option}: {path}: no such file") from None
    except OSError as error:
        raise InputError(f"{option}: cannot read {path} ({error.strerror})") from None


def read_conversations(
    path: Path,
    *,
    limit: int | None = None,
    ignore: Collection[str] = (),
    option: str = "--data",
) -> tuple[list[Conversation], Counter[str]]:
    """The conversations of a JSONL file, and the number of rows with each metadata key.

    Raises:
        InputError: names the file and the line that is wrong.
    """
    conversations: list[Conversation] = []
    unread: Counter[str] = Counter()
    for place, _, row in json_lines(path, option):
        if len(conversations) == limit:
            break
        conversation, keys = read_conversation(row, place, ignore)
        conversations.append(conversation)
        unread.update(keys)
    if not conversations:
        raise InputError(f"{option}: {path} has no rows")
    return conversations, unread


def read_conversation(
    row: dict[str, Any], place: str, ignore: Collection[str] = ()
) -> tuple[Conversation, list[str]]:
    """One row's conversation, and the keys with a value that are ignored.

    InputError begins with `place` where the row cannot be used.
    """
    row = {key: value for key, value in row.items() if key not in ignore}
    refuse_unread(row, place)
    question, reply = next((keys for keys in FORMATS if all(key in row for key in keys)), ("", ""))
    read = {"system", "tools", question, reply}
    if "messages" in row:
        read = {"system", "tools", "messages"}
        turns = read_messages(row["messages"], place, "messages", ignore)
    elif question == "instruction":
        read.add("input")
        asked = [
            read_text(row[key], place, key) for key in ("instruction", "input") if row.get(key)
        ]
        turns = _exchange("\n\n".join(asked), read_text(row[reply], place, reply))
    elif question and isinstance(row[question], list) and isinstance(row[reply], list):
        turns = read_messages(row[question], place, question, ignore)
        turns += read_messages(row[reply], place, reply, ignore)
    elif question:
        turns = _exchange(*(read_text(row[key], place, key) for key in (question, reply)))
    else:
        raise InputError(
            f"{place}: expected the keys instruction and response, prompt and completion, or "
            f"messages; got {', '.join(sorted(row)) or 'no keys'}"
        )
    unread = [key for key in row if key not in read and _has_value(row[key])]
    return Conversation(add_system(turns, row, place), read_tools(row, place)), unread


def read_messages(
    messages: Any, place: str, key: str, ignore: Collection[str] = ()
) -> list[Message]:
    """A list of messages as turns; InputError names the message that cannot be used."""
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{place}: {key}: expected a non-empty list of messages")
    return [
        _message(message, f"{place}: {key}, message {number}", ignore)
        for number, message in enumerate(messages, 1)
    ]


def read_tools(row: dict[str, Any], place: str) -> list[dict[str, Any]] | None:
    """The tool schemas of a row, None where it has none."""
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise InputError(f"{place}: tools: not valid JSON ({error})") from None
    if not _has_value(tools):
        return None
    if not isinstance(tools, list) or not all(_function_name(tool) for tool in tools):
        raise InputError(f"{place}: tools: expected a list of objects that name a function")
    return tools


def add_system(turns: list[Message], row: dict[str, Any], place: str) -> list[Message]:
    """The turns with the row's `system` before them; InputError where they begin with one."""
    if not _has_value(row.get("system")):
        return turns
    text = read_text(row["system"], place, "system")
    if turns[0]["role"] == "system":
        raise InputError(
            f"{place}: has the key system and a system turn of its own; keep one of them"
        )
    return [{"role": "system", "content": text}, *turns]


def refuse_unread(row: dict[str, Any], place: str, ignore: Collection[str] = ()) -> None:
    """InputError if a row has a key that holds input for a model and is not supported."""
    keys = [key for key in row if key in UNREAD_KEYS and _has_value(row[key]) and key not in ignore]
    if keys:
        raise InputError(
            f"{place}: unsupported {', '.join(keys)}; put the content into messages, or leave it "
            f"out with --ignore-keys {','.join(keys)}"
        )


def read_question(row: dict[str, Any], place: str) -> str:
    """A row's `instruction`, and its `input` below it if it has one."""
    keys = [key for key in ("instruction", "input") if row.get(key)]
    return "\n\n".join(read_text(row[key], place, key) for key in keys)


def read_text(value: Any, place: str, key: str) -> str:
    """The value, if it is a text."""
    if not isinstance(value, str):
        raise InputError(f"{place}: {key}: expected a text, got {type(value).__name__}")
    return value


def without_none(value: Any) -> Any:
    """The value without keys that are None, at any depth.

    Arrow gives the objects of a column one set of keys, and None where a row had none.
    """
    if isinstance(value, list):
        return [without_none(item) for item in value]
    if isinstance(value, dict):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    return value


def refuse_surrogates(value: Any, place: str) -> None:
    """InputError where a text inside `value` holds half of a surrogate pair."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{place}: holds {error.object[error.start]!a}, half of a surrogate pair, which is no "
            "character and no tokenizer takes; fix or remove the text"
        ) from None


def _json_object(raw: bytes, place: str) -> dict[str, Any]:
    try:
        # A byte-order mark may stand before the first row.
        text = raw.decode("utf-8-sig")
        row = json.loads(text, object_pairs_hook=_unique_keys)
    except UnicodeDecodeError as error:
        raise InputError(
            f"{place}: not UTF-8 ({error.reason}); unpack a compressed file, or convert the text"
        ) from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place}: not valid JSON ({error})") from None
    if not isinstance(row, dict):
        raise InputError(f"{place}: expected a JSON object, got {type(row).__name__}")
    if "\\u" in text:
        for key, value in row.items():
            refuse_surrogates([key, value], f"{place}: {key!a}")
    return row


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice!a} appears twice")
    return values


def _exchange(question: str, reply: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]


def _message(message: Any, place: str, ignore: Collection[str]) -> Message:
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise InputError(
            f"{place}: expected an object with a role out of {', '.join(ROLES)} and a content"
        )
    values = {key: v for key, v in message.items() if key not in ignore and _has_value(v)}
    words = ["tool_calls", *REASONING_KEYS] if message["role"] != "assistant" else []
    unread = [key for key in values if key not in MESSAGE_KEYS or key in words]
    if unread:
        raise InputError(
            f"{place}: unsupported {', '.join(unread)} in a message of the {message['role']}; "
            f"leave it out with --ignore-keys {','.join(unread)}"
        )
    for key in ("name", "tool_call_id", *REASONING_KEYS):
        if key in values:
            read_text(values[key], place, key)
    calls = values.get("tool_calls", [])
    if not isinstance(calls, list) or not all(_function_name(call) for call in calls):
        raise InputError(
            f"{place}: tool_calls: expected a list of objects with a function that has a name"
        )
    content = message.get("content")
    # Templates recognise a call without text by its null content.
    if content is not None or not calls:
        content = _content(content, place)
    return {**values, "content": content}


def _content(content: Any, place: str) -> str:
    """The text of a message's content: itself, or its parts one after the other."""
    if not isinstance(content, list):
        return read_text(content, place, "content")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if not isinstance(part, dict) or kind != "text":
            raise InputError(f"{place}: content has a part of type {kind}; only text can be read")
        texts.append(read_text(part.get("text"), place, "content, text of a part"))
    return "".join(texts)


def _function_name(call: Any) -> str | None:
    """The name in a tool call or a tool's schema: its own, or that of the function in it."""
    function = call.get("function", call) if isinstance(call, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else None


def _has_value(value: Any) -> bool:
    return value is not None and value not in ("", [], {})
