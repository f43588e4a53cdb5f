"""Which characters of a rendered conversation are targets; the rule is in `gift.data.encoding`.

The row is rendered twice: unchanged, and with a mark (a placeholder) in place of each piece of the
assistant's text. The positions of the marks give the positions of the text, whatever the template
writes around it; a missing mark means that the template drops this piece.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from gift.data.rows import REASONING_KEYS, Conversation, Message
from gift.errors import InputError
from gift.storage.files import hash_bytes

TAG = re.compile(r"(</?[^<>\s]+>)")
END_OF_REASONING = "</think>"


class Target(NamedTuple):
    """One assistant turn in the text: its prompt ends at `prompt`, its targets are [start, end)."""

    prompt: int
    start: int
    end: int


class Rendering(NamedTuple):
    """A conversation's text, its targets in order, and notes for the user."""

    text: str
    targets: list[Target]
    notes: list[str]


@dataclass(frozen=True)
class _Span:
    """A piece of an assistant turn that has a mark; `lead` is the text before it in its field."""

    turn: int
    kind: str  # reply, reasoning, or call: the name of a tool
    text: str
    lead: str | None = None  # None: the template determines the text before it


@dataclass(frozen=True)
class _LocatedSpan:
    """The position of a span in the text, and the template's text after it."""

    mark: str
    span: _Span
    start: int
    end: int
    following: str


def find_targets(
    row: int, conversation: Conversation, tokenizer: PreTrainedTokenizerBase
) -> Rendering:
    """Renders a row and finds the target characters of its assistant turns.

    Raises:
        InputError: names the row where the template refuses it, leaves out or changes what the
            assistant or the user says, or renders the prompt of a turn otherwise than inference.
    """
    name = f"row {row}"
    text = render(conversation, tokenizer, name)
    nonce = hash_bytes(text.encode())[:16]
    turns, spans = _marked(conversation.turns, nonce)
    marked = Conversation(turns, conversation.tools)
    pieces = re.split(f"({nonce}-[0-9]+-)", render(marked, tokenizer, name))
    notes = _missing_spans(name, conversation.turns, spans, set(pieces[1::2]))
    notes += check_rendered(name, conversation, text, tokenizer)
    located = _locate(name, text, pieces, spans)
    ends = _end_tokens(tokenizer)
    if any(ends.search(turn["content"] or "") for turn in conversation.turns):
        notes.append("a turn holds the text of a special token and is read as that token")
    targets = []
    for turn, message in enumerate(conversation.turns):
        own = [one for one in located if one.span.turn == turn]
        if message["role"] != "assistant" or not own:
            continue
        before = Conversation(conversation.turns[:turn], conversation.tools)
        prompt = render(before, tokenizer, name, prompt=True)
        if not text.startswith(prompt):
            common = _common_length(text, prompt)
            raise InputError(
                f"{name}: the chat template renders the prompt of turn {turn + 1} differently once "
                f"the reply is there: {prompt[common : common + 40]!r} alone, "
                f"{text[common : common + 40]!r} in the row; split the row so that it ends with "
                "this turn, or fix the template"
            )
        start = _start(own[0], text, prompt, before, tokenizer)
        if start > len(prompt):
            notes.append(
                f"the chat template itself writes {text[len(prompt) : start][:60]!r} between "
                "prompt and reply, which is no target"
            )
        following = own[-1].following
        if turn + 1 < len(turns):
            alone = render(Conversation(turns[: turn + 1], conversation.tools), tokenizer, name)
            # Templates write a call's name again in the header of its result.
            own = own[: sum(alone.count(mark) for mark in {one.mark for one in own})]
            tail = alone.rpartition(own[-1].mark)[2]
            following = _until_difference(own[-1].following, tail, ends)
            if ends.search(tail) and not ends.search(following):
                notes.append(
                    "the chat template ends an earlier turn otherwise than generation does, so its "
                    "end is no target"
                )
        end = own[-1].end + _ending(following, ends, bool(message.get("tool_calls")))
        targets.append(Target(len(prompt), start, end))
    return Rendering(text, targets, notes)


def render(
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    prompt: bool = False,
) -> str:
    """The conversation as the chat template writes it; InputError begins with `name`."""
    if not conversation.turns:
        raise InputError(f"{name}: the conversation begins with the assistant's turn")
    try:
        return tokenizer.apply_chat_template(  # pyright: ignore
            conversation.turns,
            tools=conversation.tools,  # pyright: ignore[reportArgumentType]
            tokenize=False,
            add_generation_prompt=prompt,
        )
    except Exception as error:
        raise InputError(f"{name}: the chat template refuses the conversation ({error})") from error


def check_rendered(
    name: str,
    conversation: Conversation,
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    prompt: bool = False,
) -> list[str]:
    """Notes of what the text leaves out of a system turn or a tool's result.

    Raises:
        InputError: what a user says, a name, the tools or a call's arguments are left out.
    """
    notes = []
    for number, turn in enumerate(conversation.turns, 1):
        content = turn["content"] or ""
        if turn["role"] != "assistant" and not _is_in(content, text):
            if turn["role"] == "user":
                raise InputError(
                    f"{name}: the chat template does not render the text of turn {number}"
                )
            notes.append(f"the chat template leaves out or changes a {turn['role']} turn")
        for call in turn.get("tool_calls", []):
            arguments = call.get("function", call).get("arguments")
            for value in _texts(arguments):
                if value not in text if isinstance(arguments, str) else not _is_in(value, text):
                    raise InputError(
                        f"{name}: the chat template does not render the arguments {value!r} of a "
                        f"tool call in turn {number} as they stand; templates want an object "
                        "there, or a JSON text, not both"
                    )
    if conversation.tools:
        without = render(conversation._replace(tools=None), tokenizer, name, prompt)
        names = [tool.get("function", tool)["name"] for tool in conversation.tools]
        if text == without or not all(_is_in(tool, text) for tool in names):
            raise InputError(
                f"{name}: the chat template does not render the tools; use a template that does, "
                "or leave them out with --ignore-keys tools"
            )
    # A tool result may lack its name: its call, whose name is rendered, identifies it.
    for number, turn in enumerate(conversation.turns):
        if "name" in turn and turn["role"] != "tool":
            turns = [*conversation.turns]
            turns[number] = {key: value for key, value in turn.items() if key != "name"}
            if render(conversation._replace(turns=turns), tokenizer, name, prompt) == text:
                raise InputError(
                    f"{name}: the chat template does not render the name of turn {number + 1}; "
                    "leave it out with --ignore-keys name"
                )
    return notes


def _marked(turns: Sequence[Message], nonce: str) -> tuple[list[Message], dict[str, _Span]]:
    """The turns with a mark in place of each piece of what the assistant says."""
    spans: dict[str, _Span] = {}
    marked = []
    for number, turn in enumerate(turns):
        turn = dict(turn)
        if turn["role"] == "assistant":
            for key in REASONING_KEYS:
                if key in turn:
                    turn[key] = _mark_text(turn[key], number, spans, nonce, is_reasoning=True)
            if turn["content"]:
                turn["content"] = _mark_text(turn["content"], number, spans, nonce)
            if "tool_calls" in turn:
                turn["tool_calls"] = [
                    _mark_call(call, number, spans, nonce) for call in turn["tool_calls"]
                ]
        marked.append(turn)
    return marked, spans


def _mark_text(
    text: str, turn: int, spans: dict[str, _Span], nonce: str, is_reasoning: bool = False
) -> str:
    """The text with marks for its spans; tags stay, since templates search for `</think>`."""
    pieces, position = [], 0
    lead = None if is_reasoning else ""
    # A reply that consists of tags only is one span.
    has_text = bool(TAG.sub("", text).strip())
    for piece in TAG.split(text) if has_text else [text]:
        position += len(piece)
        if piece.strip() and not (has_text and TAG.fullmatch(piece)):
            thought = is_reasoning or END_OF_REASONING in text[position:]
            spans[mark := f"{nonce}-{len(spans)}-"] = _Span(
                turn, "reasoning" if thought else "reply", piece, lead
            )
            pieces.append(mark)
        else:
            pieces.append(piece)
            lead = None if lead is None else lead + piece
    return "".join(pieces)


def _mark_call(
    call: dict[str, Any], turn: int, spans: dict[str, _Span], nonce: str
) -> dict[str, Any]:
    """A tool call with a mark for its function's name."""
    function = call.get("function", call)
    spans[mark := f"{nonce}-{len(spans)}-"] = _Span(turn, "call", function["name"])
    named = {**function, "name": mark}
    return {**call, "function": named} if "function" in call else named


def _missing_spans(
    name: str, turns: Sequence[Message], spans: Mapping[str, _Span], found: set[str]
) -> list[str]:
    """A note if reasoning of an earlier exchange is dropped; InputError for anything else."""
    last_question = max((n for n, turn in enumerate(turns) if turn["role"] == "user"), default=-1)
    notes = []
    for span in (span for mark, span in spans.items() if mark not in found):
        if span.kind != "reasoning" or span.turn > last_question:
            raise InputError(
                f"{name}: the chat template does not render the {span.kind} of turn "
                f"{span.turn + 1} ({span.text.strip()[:40]!r}); use a template that does"
            )
        notes.append("the chat template leaves out the reasoning of earlier turns")
    return notes


def _locate(
    name: str, text: str, pieces: Sequence[str], spans: Mapping[str, _Span]
) -> list[_LocatedSpan]:
    """The positions of the spans in the text, which equals `pieces` except for the marks."""
    position = len(pieces[0])
    located = []
    for mark, following in zip(pieces[1::2], pieces[2::2], strict=True):
        span = spans[mark]
        end = _end_of(span.text, text, position, following)
        if end is None or not text.startswith(pieces[0]):
            raise InputError(
                f"{name}: the chat template changes the {span.kind} of turn {span.turn + 1}, or "
                "writes something else for it, so its targets cannot be found"
            )
        located.append(_LocatedSpan(mark, span, position, end, following))
        position = end + len(following)
    return located


def _end_of(span: str, text: str, start: int, following: str) -> int | None:
    """The end of a span that starts at `start`; the template may strip its white space."""
    core = span.strip()
    leading = len(span) - len(span.lstrip())
    at = text.find(core, start, start + leading + len(core))
    if at < 0 or text[start:at].strip():
        return None
    trailing = len(span) - len(span.rstrip())
    for end in range(at + len(core) + trailing, at + len(core) - 1, -1):
        if not text[at + len(core) : end].strip() and text.startswith(following, end):
            return end
    return None


def _start(
    first: _LocatedSpan,
    text: str,
    prompt: str,
    before: Conversation,
    tokenizer: PreTrainedTokenizerBase,
) -> int:
    """The start of a turn's targets: after everything that the template adds by itself."""
    gap = text[len(prompt) : first.start]
    lead = first.span.lead
    if lead is not None:
        # Tags that the data has before its first span, such as `<think>`, are targets.
        added = gap.rstrip().removesuffix(lead.strip()) if lead.strip() else gap
        if not added.strip():
            return len(prompt)
        return len(prompt) + len(added)
    if not gap.strip():
        return len(prompt)
    # Text that the template writes before every reply is no target.
    reply = hash_bytes(text.encode())[:16]
    bare = before._replace(turns=[*before.turns, {"role": "assistant", "content": reply}])
    header = render(bare, tokenizer, "").partition(reply)[0]
    if prompt == render(before, tokenizer, ""):  # it ignores add_generation_prompt
        return max(len(prompt), _common_length(header, text))
    is_added = first.span.kind == "call" and text.startswith(header)
    return max(len(prompt), len(header)) if is_added else len(prompt)


def _until_difference(following: str, other: str, ends: re.Pattern[str]) -> str:
    """The common beginning of two texts, without a partial special token."""
    common = _common_length(following, other)
    torn = (match.start() for match in ends.finditer(following) if match.end() > common)
    return following[: min(common, next(torn, common))]


def _ending(following: str, ends: re.Pattern[str], has_calls: bool) -> int:
    """Length of the turn's own end in the text that follows its last span."""
    found = [match.end() for match in ends.finditer(following)]
    if not found:
        return len(following.rstrip())
    # Special tokens may close a call before the one that ends the turn.
    return found[-1] if has_calls else found[0]


def _end_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Special tokens that can end a turn: all but those that begin a text."""
    added = tokenizer.added_tokens_decoder.values()
    tokens = {str(token) for token in added if token.special} | set(tokenizer.all_special_tokens)
    tokens -= {str(tokenizer.bos_token), str(tokenizer.unk_token)}
    tokens |= {str(tokenizer.eos_token)} if tokenizer.eos_token else set()
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or r"(?!)")


def _is_in(value: str, text: str) -> bool:
    """Whether the text contains the value, stripped of white space, plain or JSON-escaped."""
    value = value.strip()
    return value in text or json.dumps(value, ensure_ascii=False)[1:-1] in text


def _texts(value: Any) -> list[str]:
    """All strings in a JSON value."""
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [text for part in inner for text in _texts(part)]


def _common_length(one: str, other: str) -> int:
    """The length of the common prefix of two texts."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(one), len(other)))
