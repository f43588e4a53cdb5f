"""From rows to token ids and target masks, through the instruct model's own chat template.

Targets, in every stage, are the tokens that the model would have to generate at inference after the
prompt (the earlier turns rendered with `add_generation_prompt`), as far as they come from the data:

- An assistant turn's reasoning, content and tool calls, with what the template writes between them
  and to open and close them (`<think>`, `</think>`, `<tool_call>`), and white space after the
  prompt, which belongs to the reply's first token.
- Its end-of-turn token: the first special token that the template writes after the words (after
  tool calls, which may close with special tokens of their own, the last). A note says where a
  template ends earlier turns with another token than the last, which is then no target.
- Not what the template adds by itself between prompt and words: an empty think block, or the
  header of a template that ignores `add_generation_prompt`. A note says what was left out.
- Not the first token of a sequence: nothing before it could predict it.

`{% generation %}` blocks of a template do not change this. It is an error if the rendered row does
not begin with the rendered prompt, because the reply would be trained after a different prompt than
at inference (a template whose prompt ends with `<think>` but which renders replies without it;
reasoning that is dropped only if a later turn follows). It is also an error if the template drops
or changes what the user or the assistant says. White space at the ends may be stripped. Dropped
reasoning before a later user turn gives a note, and so does a dropped system turn or tool result.
The keys of a row that are read are listed in `gift.data.rows`.
"""

import itertools
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from gift.config import DataOptions
from gift.console import error_console
from gift.data.rows import Conversation, Message, read_conversations
from gift.data.targets import Rendering, find_targets
from gift.errors import InputError
from gift.models.loading import require_embeddings
from gift.storage.files import hash_bytes

IGNORE_INDEX = -100


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
class LostRow:
    """A row that was dropped or truncated, and why."""

    row: int
    action: str
    reason: str


@dataclass(frozen=True)
class EncodedData:
    """All rows in file order (None where dropped), what was lost, and notes for the user.

    `context` is the model's context length in tokens, None without a limit.
    """

    examples: tuple[Example | None, ...]
    lost: tuple[LostRow, ...]
    notes: tuple[str, ...]
    context: int | None = None

    @property
    def kept(self) -> list[Example]:
        return [example for example in self.examples if example is not None]

    def manifest(self) -> dict[str, Any]:
        """Counts, length statistics and every lost row, for the stage's manifest."""
        return {
            "rows": len(self.examples),
            "context": self.context,
            "rows_kept": len(self.kept),
            "tokens": sum(len(example.input_ids) for example in self.kept),
            "target_tokens": sum(example.targets for example in self.kept),
            "length": _length_statistics([len(example.input_ids) for example in self.kept]),
            "target_length": _length_statistics([example.targets for example in self.kept]),
            "lost": [vars(lost_row) for lost_row in self.lost],
            "notes": list(self.notes),
            "row_digests": [example.digest if example else "" for example in self.examples],
        }


def read_rows(path: Path, options: DataOptions | None = None) -> list[Conversation]:
    """Conversations of a JSONL file; InputError names the file and the line that is wrong."""
    options = options or DataOptions()
    ignore = options.ignored_keys()
    return read_conversations(path, limit=options.limit, ignore=ignore)[0]


def encode(
    conversations: Sequence[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    context: int | None = None,
    overlong: str = "drop",
    max_dropped: float = 0.01,
) -> EncodedData:
    """`encode_rows`; InputError where more than a share of `max_dropped` of the rows is lost."""
    data = encode_rows(
        conversations, tokenizer, max_length=max_length, context=context, overlong=overlong
    )
    _refuse_lost(data.lost, len(conversations), max_dropped)
    return data


def encode_rows(
    conversations: Sequence[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    context: int | None = None,
    overlong: str = "drop",
) -> EncodedData:
    """Tokens and targets of every conversation.

    Rows without any assistant text are dropped; rows longer than `max_length` or
    the model's `context`, in tokens, are dropped or, with `overlong="truncate"`, cut.

    Raises:
        InputError: an assistant turn among others is empty, which would teach an empty reply; or
            see the rules at the top of this file.
    """
    examples: list[Example | None] = []
    lost: list[LostRow] = []
    notes: Counter[str] = Counter()
    special_ids = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    for row, conversation in enumerate(conversations):
        replies = [
            (number, _says_nothing(turn))
            for number, turn in enumerate(conversation.turns, 1)
            if turn["role"] == "assistant"
        ]
        if all(is_empty for _, is_empty in replies):
            examples.append(None)
            lost.append(LostRow(row, "dropped", "no assistant text"))
            continue
        for number, is_empty in replies:
            if is_empty:
                raise InputError(
                    f"row {row}: turn {number} of the assistant is empty, which would teach an "
                    "empty reply; remove the turn or the row"
                )
        rendering = find_targets(row, conversation, tokenizer)
        example = _tokenise(row, rendering, tokenizer)
        notes.update(set(rendering.notes))
        if int(example.input_ids[np.flatnonzero(example.is_target)[-1]]) not in special_ids:
            notes["no end-of-turn token is rendered: a model may not learn to stop"] += 1
        example, lost_row = _fit_length(example, max_length, context, overlong)
        examples.append(example)
        lost += [lost_row] if lost_row else []
    texts = tuple(f"{note} ({rows} rows)" for note, rows in notes.most_common())
    return EncodedData(tuple(examples), tuple(lost), texts, context)


def encode_file(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    options: DataOptions,
    context: int | None = None,
    also_read: Collection[str] = (),
) -> EncodedData:
    """Reads and encodes a data file as the options say, and prints the notes.

    `context` is the model's context length in tokens; `also_read` are keys that the caller reads.
    """
    conversations, unread = read_conversations(
        path, limit=options.limit, ignore={*options.ignored_keys(), *also_read}
    )
    data = encode(
        conversations,
        tokenizer,
        max_length=options.max_length,
        context=context,
        overlong=options.overlong,
        max_dropped=options.max_dropped,
    )
    if unread:
        keys = ", ".join(f"{key} ({rows} rows)" for key, rows in unread.most_common())
        data = replace(data, notes=(*data.notes, f"keys that nothing reads: {keys}"))
    for note in data.notes:
        error_console.print(f"note: {path}: {note}", markup=False, highlight=False, soft_wrap=True)
    return data


def token_columns(
    example: Example, confidence: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`input_ids`, `labels` and `token_weight` of a row, all of one length, as trainers read them.

    Tokens that are not targets have the label -100 and the weight 0.
    """
    weight = np.zeros(len(example.input_ids), np.float32)
    weight[example.is_target] = confidence
    labels = np.where(example.is_target, example.input_ids, IGNORE_INDEX)
    return example.input_ids, labels, weight


def data_summary(data: EncodedData) -> dict[str, Any]:
    """Counts of rows and tokens for the summary table."""
    actions = [lost_row.action for lost_row in data.lost]
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


def prompt_ids(turns: list[Message], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a prompt for the next assistant turn; special tokens come from the template."""
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]  # pyright: ignore


def _tokenise(row: int, rendering: Rendering, tokenizer: PreTrainedTokenizerBase) -> Example:
    """Tokens and targets of a rendered row; InputError where tokenisation is ambiguous.

    The text is tokenised in one piece if every prompt and target boundary is a token boundary, as
    at inference, where the prompt is tokenised alone; otherwise piece by piece.
    """
    text = rendering.text
    borders = sorted({0, len(text), *(border for target in rendering.targets for border in target)})

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
    for target in rendering.targets:
        is_target[position[target.start] : position[target.end]] = True
    # Nothing precedes the first token of a sequence that could predict it.
    is_target[:1] = False
    if not is_target.any():
        raise InputError(f"row {row}: the chat template renders no assistant token to learn from")
    return Example(row, np.array(tokens, dtype=np.int32), is_target)


def _fit_length(
    example: Example, max_length: int, context: int | None, overlong: str
) -> tuple[Example | None, LostRow | None]:
    """Cuts or drops an example to fit both limits; returns it (None if dropped) and the reason."""
    length = len(example.input_ids)
    limit, name = max_length, "--max-length"
    if context is not None and context < max_length:
        limit, name = context, "the model's context"
    if length <= limit:
        return example, None
    reason = f"{length} tokens, {name} is {limit}"
    if overlong == "drop":
        return None, LostRow(example.row, "dropped", reason)
    cut = Example(example.row, example.input_ids[:limit], example.is_target[:limit])
    if cut.targets == 0:
        return None, LostRow(example.row, "dropped", f"no target in the first {limit} tokens")
    return cut, LostRow(example.row, "truncated", reason)


def _says_nothing(turn: Message) -> bool:
    return not (turn["content"] or "").strip() and "tool_calls" not in turn


def _refuse_lost(lost: Sequence[LostRow], rows: int, max_dropped: float) -> None:
    if len(lost) == rows and all(lost_row.action == "dropped" for lost_row in lost):
        raise InputError(f"--data: every row is dropped; the first: {lost[0].reason}")
    if len(lost) <= max_dropped * rows:
        return
    shown = "; ".join(
        f"row {lost_row.row} {lost_row.action}: {lost_row.reason}" for lost_row in lost[:3]
    )
    raise InputError(
        f"--data: {len(lost)} of {rows} rows are lost ({shown}{', …' if len(lost) > 3 else ''})"
        f", more than --max-dropped {max_dropped:g} allows; raise --max-length (up to the "
        "model's context) or --max-dropped, or fix the rows"
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
