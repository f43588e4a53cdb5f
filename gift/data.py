"""From JSONL rows to token ids and target masks, through the instruct model's own chat template.

A row is `{"instruction", "response"}` (with optional `input` and `system`), `{"prompt",
"completion"}` (texts or message lists) or `{"messages"}`. Targets are exactly the tokens an
assistant would have to produce: each assistant turn's content and its end-of-turn token.
"""

import itertools
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from gift.config import DataOptions
from gift.errors import InputError
from gift.files import hash_bytes
from gift.models import require_embeddings

Message = dict[str, str]
ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Example:
    """One row as tokens: `input_ids` int32 [T], `is_target` bool [T], and a digest of both."""

    row: int
    input_ids: np.ndarray
    is_target: np.ndarray

    @property
    def targets(self) -> int:
        return int(self.is_target.sum())

    @property
    def digest(self) -> str:
        return hash_bytes(self.input_ids.tobytes() + self.is_target.tobytes())[:16]


@dataclass(frozen=True)
class Loss:
    """A row that was dropped or truncated, and why."""

    row: int
    action: str
    reason: str


@dataclass(frozen=True)
class EncodedData:
    """All rows in file order (None where dropped), what was lost, and notes for the user."""

    examples: tuple[Example | None, ...]
    losses: tuple[Loss, ...]
    notes: tuple[str, ...]

    @property
    def kept(self) -> list[Example]:
        return [example for example in self.examples if example is not None]

    def manifest(self) -> dict[str, Any]:
        """Counts, length statistics and every loss, for the stage's manifest."""
        return {
            "rows": len(self.examples),
            "rows_kept": len(self.kept),
            "tokens": sum(len(example.input_ids) for example in self.kept),
            "target_tokens": sum(example.targets for example in self.kept),
            "length": _length_statistics([len(example.input_ids) for example in self.kept]),
            "target_length": _length_statistics([example.targets for example in self.kept]),
            "lost": [vars(loss) for loss in self.losses],
            "notes": list(self.notes),
            "row_digests": [example.digest if example else "" for example in self.examples],
        }


def read_rows(path: Path, limit: int | None = None) -> list[list[Message]]:
    """Conversations of a JSONL file; InputError names the file and the line that is wrong."""
    if not path.is_file():
        raise InputError(f"--data: {path}: no such file")
    conversations = []
    with path.open("rb") as lines:
        for number, raw in enumerate(lines, 1):
            if limit is not None and len(conversations) == limit:
                break
            if not raw.strip():
                continue
            place = f"{path}, line {number}"
            try:
                row = json.loads(raw.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise InputError(f"{place}: not UTF-8 ({error.reason})") from None
            except json.JSONDecodeError as error:
                raise InputError(f"{place}: not valid JSON ({error})") from None
            conversations.append(_conversation(row, place))
    if not conversations:
        raise InputError(f"--data: {path} has no rows")
    return conversations


def encode(
    conversations: Sequence[list[Message]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    overlong: str = "drop",
    max_dropped: float = 0.01,
) -> EncodedData:
    """Tokens and targets of every conversation.

    Rows without target tokens are dropped; rows longer than `max_length` are dropped or, with
    `overlong="truncate"`, cut. InputError where the share of lost rows exceeds `max_dropped`, or
    where the template gives no stable mask.
    """
    examples: list[Example | None] = []
    losses: list[Loss] = []
    without_end = 0
    special_ids = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    for row, conversation in enumerate(conversations):
        replies = [turn["content"] for turn in conversation if turn["role"] == "assistant"]
        if not any(reply.strip() for reply in replies):
            examples.append(None)
            losses.append(Loss(row, "dropped", "no assistant text"))
            continue
        example = encode_conversation(row, conversation, tokenizer)
        if int(example.input_ids[np.flatnonzero(example.is_target)[-1]]) not in special_ids:
            without_end += 1
        length = len(example.input_ids)
        if length > max_length and overlong == "drop":
            losses.append(Loss(row, "dropped", f"{length} tokens, --max-length is {max_length}"))
            examples.append(None)
            continue
        if length > max_length:
            losses.append(Loss(row, "truncated", f"{length} tokens, --max-length is {max_length}"))
            example = Example(row, example.input_ids[:max_length], example.is_target[:max_length])
            if example.targets == 0:
                losses[-1] = Loss(row, "dropped", f"no target in the first {max_length} tokens")
                examples.append(None)
                continue
        examples.append(example)
    _refuse_losses(losses, len(conversations), max_dropped)
    notes = []
    if without_end:
        notes.append(
            f"{without_end} rows end without an end-of-turn token: the chat template renders none, "
            "so a model trained on them may not learn to stop"
        )
    return EncodedData(tuple(examples), tuple(losses), tuple(notes))


def encode_file(
    path: Path, tokenizer: PreTrainedTokenizerBase, options: DataOptions
) -> EncodedData:
    """Reads and encodes a data file as the options say."""
    return encode(
        read_rows(path, options.limit),
        tokenizer,
        max_length=options.max_length,
        overlong=options.overlong,
        max_dropped=options.max_dropped,
    )


def data_summary(data: EncodedData) -> dict[str, Any]:
    """Counts of rows and tokens for the summary table."""
    actions = [loss.action for loss in data.losses]
    return {
        "rows": len(data.examples),
        "rows_dropped": actions.count("dropped"),
        "rows_truncated": actions.count("truncated"),
        "target_tokens": sum(example.targets for example in data.kept),
    }


def require_vocabulary(model: Any, data: EncodedData, name: str) -> None:
    """InputError where the data has token ids that the model has no embedding for."""
    largest = max(int(example.input_ids.max()) for example in data.kept)
    require_embeddings(model, largest, name)


def encode_conversation(
    row: int, conversation: list[Message], tokenizer: PreTrainedTokenizerBase
) -> Example:
    """Tokens and targets of one conversation; InputError names the row where they are unstable.

    The text is tokenised as a whole if its tokens break at the borders of every assistant turn as
    they do at inference, where the prompt stands alone; else piece by piece.
    """
    text, spans = assistant_spans(row, conversation, tokenizer)
    borders = sorted({0, len(text), *(border for span in spans for border in span)})

    def ids(part: str) -> list[int]:
        return tokenizer(part, add_special_tokens=False)["input_ids"]  # pyright: ignore

    whole = ids(text)
    prefixes = [ids(text[:border]) for border in borders]
    if all(whole[: len(prefix)] == prefix for prefix in prefixes):
        positions = [len(prefix) for prefix in prefixes]
        tokens = whole
    else:
        pieces = [ids(text[start:end]) for start, end in itertools.pairwise(borders)]
        positions = [sum(map(len, pieces[:number])) for number in range(len(borders))]
        tokens = [token for piece in pieces for token in piece]
        if tokenizer.decode(tokens) != tokenizer.decode(whole):
            raise InputError(
                f"row {row}: the tokenizer gives other text when the assistant turns are tokenised "
                "apart from the prompt, so the target mask would be unstable"
            )
    position = dict(zip(borders, positions, strict=True))
    is_target = np.zeros(len(tokens), dtype=bool)
    for start, end in spans:
        is_target[position[start] : position[end]] = True
    # The first token of a sequence has nothing before it that could predict it.
    is_target[:1] = False
    if not is_target.any():
        raise InputError(f"row {row}: the chat template renders no assistant token to learn from")
    return Example(row, np.array(tokens, dtype=np.int32), is_target)


def assistant_spans(
    row: int, conversation: list[Message], tokenizer: PreTrainedTokenizerBase
) -> tuple[str, list[tuple[int, int]]]:
    """The rendered text and the character spans of its assistant turns, end-of-turn included."""
    template = tokenizer.get_chat_template()
    full = _render(row, conversation, tokenizer)
    if re.search(r"\{%-?\s*generation\s*-?%\}", template):
        render: Any = render_jinja_template
        _, marked = render(
            conversations=[conversation],
            chat_template=template,
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
        spans = [(start, end) for start, end in marked[0] if end > start]
    else:
        spans = [
            _turn_span(row, conversation, turn, full, tokenizer)
            for turn, message in enumerate(conversation)
            if message["role"] == "assistant"
        ]
    ends = _end_tokens(tokenizer)
    return full, [(start, _close_turn(full, start, end, ends)) for start, end in spans]


def prompt_ids(conversation: list[Message], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids that ask for the next assistant turn; special tokens come from the template."""
    text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]  # pyright: ignore


def _turn_span(
    row: int,
    conversation: list[Message],
    turn: int,
    full: str,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[int, int]:
    """Span of one assistant turn, by rendering what comes before it and what ends with it."""
    before = _render(row, conversation[:turn], tokenizer, prompt=True)
    if not full.startswith(before):
        raise InputError(
            f"row {row}: the chat template renders the prompt of turn {turn + 1} differently once "
            "the reply is there, so the targets cannot be told from the prompt"
        )
    through = _render(row, conversation[: turn + 1], tokenizer)
    if full.startswith(through) and len(through) > len(before):
        return len(before), len(through)
    # Some templates write an earlier turn otherwise than the last one (reasoning is left out).
    content = conversation[turn]["content"].strip()
    found = full.find(content, len(before))
    if found < 0:
        raise InputError(
            f"row {row}: the chat template does not render the text of turn {turn + 1} as it "
            "stands, so its targets cannot be found"
        )
    return len(before), found + len(content)


def _close_turn(text: str, start: int, end: int, ends: Sequence[str]) -> int:
    """The span's end moved to just behind its end-of-turn token."""
    stripped = start + len(text[start:end].rstrip())
    if any(text.endswith(token, start, stripped) for token in ends):
        return stripped
    rest = text[end:]
    following = [token for token in ends if rest.lstrip().startswith(token)]
    if following:
        return end + len(rest) - len(rest.lstrip()) + max(map(len, following))
    return end


def _end_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Special tokens that can end a turn: all but those that begin a text or fill it up."""
    added = tokenizer.added_tokens_decoder.values()
    tokens = {str(token) for token in added if token.special} | set(tokenizer.all_special_tokens)
    tokens -= {str(tokenizer.bos_token), str(tokenizer.unk_token)}
    return sorted(tokens | ({str(tokenizer.eos_token)} if tokenizer.eos_token else set()))


def _render(
    row: int, conversation: list[Message], tokenizer: PreTrainedTokenizerBase, prompt: bool = False
) -> str:
    if not conversation:
        raise InputError(f"row {row}: the conversation begins with the assistant's turn")
    try:
        return tokenizer.apply_chat_template(  # pyright: ignore
            conversation, tokenize=False, add_generation_prompt=prompt
        )
    except Exception as error:
        raise InputError(
            f"row {row}: the chat template refuses the conversation ({error})"
        ) from error


def _conversation(row: Any, place: str) -> list[Message]:
    if not isinstance(row, dict):
        raise InputError(f"{place}: expected a JSON object, got {type(row).__name__}")
    system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    if "messages" in row:
        return _messages(row["messages"], place, "messages")
    if "instruction" in row and "response" in row:
        question = "\n\n".join(
            _text(row[key], place, key) for key in ("instruction", "input") if row.get(key)
        )
        reply = _text(row["response"], place, "response")
    elif "prompt" in row and "completion" in row:
        if isinstance(row["prompt"], list) and isinstance(row["completion"], list):
            prompt = _messages(row["prompt"], place, "prompt")
            return prompt + _messages(row["completion"], place, "completion")
        question = _text(row["prompt"], place, "prompt")
        reply = _text(row["completion"], place, "completion")
    else:
        raise InputError(
            f"{place}: expected the keys instruction and response, prompt and completion, or "
            f"messages; got {', '.join(sorted(row)) or 'no keys'}"
        )
    for turn in system:
        _text(turn["content"], place, "system")
    return [
        *system,
        {"role": "user", "content": question},
        {"role": "assistant", "content": reply},
    ]


def _messages(messages: Any, place: str, key: str) -> list[Message]:
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{place}: {key}: expected a non-empty list of messages")
    turns = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise InputError(
                f"{place}: {key}, message {number}: expected an object with a role out of "
                f"{', '.join(ROLES)} and a content"
            )
        content = message.get("content")
        if isinstance(content, list) and all(
            isinstance(part, dict) and part.get("type") == "text" for part in content
        ):
            content = "".join(part["text"] for part in content)
        text = _text(content, place, f"{key}, message {number}, content")
        turns.append({"role": message["role"], "content": text})
    return turns


def _text(value: Any, place: str, key: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{place}: {key}: expected a text, got {type(value).__name__}")
    return value


def _refuse_losses(losses: Sequence[Loss], rows: int, max_dropped: float) -> None:
    if len(losses) == rows and all(loss.action == "dropped" for loss in losses):
        raise InputError(f"--data: every row is dropped; the first: {losses[0].reason}")
    if len(losses) <= max_dropped * rows:
        return
    shown = "; ".join(f"row {loss.row} {loss.action}: {loss.reason}" for loss in losses[:3])
    raise InputError(
        f"--data: {len(losses)} of {rows} rows are lost ({shown}{', …' if len(losses) > 3 else ''})"
        f", more than --max-dropped {max_dropped:g} allows; raise --max-length or --max-dropped, "
        "or mend the rows"
    )


def _length_statistics(lengths: Iterable[int]) -> dict[str, float]:
    values = np.array(list(lengths))
    return {
        "min": int(values.min()),
        "median": float(np.median(values)),
        "p95": float(np.percentile(values, 95)),
        "max": int(values.max()),
        "mean": float(values.mean()),
    }
