"""Questions with known answers: rows of a JSONL file, and the prompts they become."""

import math
import string
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from gift.data.rows import (
    Conversation,
    Message,
    add_system,
    read_messages,
    read_question,
    read_tools,
    refuse_surrogates,
    refuse_unread,
)
from gift.data.targets import check_rendered, render
from gift.errors import InputError

LETTERS = string.ascii_uppercase
QUESTION_FIELDS = ("instruction", "problem", "question", "prompt")


@dataclass(frozen=True)
class Question:
    """One row: `place` is for messages, `answer` is text even if the file has a number."""

    place: str
    turns: list[Message]
    answer: str  # of a multiple choice the letter
    group: str | None = None
    tools: list[dict[str, Any]] | None = None
    choices: list[str] | None = None


def read_questions(
    rows: Iterable[tuple[str, int, dict[str, Any]]],
    *,
    choices: bool = False,
    limit: int | None = None,
    question_field: str | None = None,
    group_by: str | None = None,
    system_prompt: str | None = None,
    prompt_suffix: str | None = None,
    ignore: Collection[str] = (),
) -> list[Question]:
    """The rows as questions, with system prompt and suffix; see EvaluateOptions.

    Args:
        rows: each with its place and number, as `json_lines` reads them.
        choices: whether each is a multiple choice, with its options in `choices`.

    Raises:
        InputError: names the place of the first row that cannot be used.
    """
    for option, text in (("system-prompt", system_prompt), ("prompt-suffix", prompt_suffix)):
        refuse_surrogates(text, f"--{option}")
    questions = []
    for place, _, row in rows:
        if len(questions) == limit:
            break
        row = {key: value for key, value in row.items() if key not in ignore}
        refuse_unread(row, place)
        turns = add_system(_turns(row, question_field, place, ignore), row, place)
        tools = read_tools(row, place)
        options = _choices(row, place) if choices else None
        if options is not None:
            lettered = map(". ".join, zip(LETTERS, options, strict=False))
            turns = _extend(turns, None, "\n" + "\n".join(lettered) + "\n", place)
        turns = _extend(turns, system_prompt, prompt_suffix, place)
        group = None if group_by is None else _group(row, group_by, place)
        answer = _answer(row, place) if options is None else _letter(row, options, place)
        questions.append(Question(place, turns, answer, group, tools, options))
    return questions


def _choices(row: dict[str, Any], place: str) -> list[str]:
    choices: Any = row.get("choices")
    texts = isinstance(choices, list) and all(isinstance(c, str) and c.strip() for c in choices)
    if not texts or not 2 <= len(choices) <= len(LETTERS):
        raise InputError(
            f"{place}: `choices` must be a list of 2 to {len(LETTERS)} texts, got {choices!r}"
        )
    return choices


def _letter(row: dict[str, Any], choices: list[str], place: str) -> str:
    """The letter of the right option; the row has it, or its index from 0."""
    answer, letters = row.get("answer"), LETTERS[: len(choices)]
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return letters[answer]
    if isinstance(answer, str) and answer.strip() in [*letters]:
        return answer.strip()
    raise InputError(
        f"{place}: `answer` must be a letter of {letters} or a place from 0 to {len(choices) - 1}, "
        f"got {answer!r}"
    )


def _answer(row: dict[str, Any], place: str) -> str:
    answer = row.get("answer")
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise InputError(f"{place}: `answer` must be a string or a number, got {answer!r}")
    if isinstance(answer, float):
        if not math.isfinite(answer):
            raise InputError(f"{place}: `answer` must be finite, got {answer!r}")
        # Tables saved by other programs turn 27 into 27.0.
        answer = int(answer) if answer.is_integer() else answer
    if not str(answer).strip():
        raise InputError(f"{place}: `answer` is empty")
    return str(answer)


def _group(row: dict[str, Any], group_by: str, place: str) -> str:
    group = row.get(group_by)
    if not isinstance(group, str | int | float):
        raise InputError(
            f"{place}: --group-by {group_by}: expected a string or a number in that field, "
            f"got {group!r}"
        )
    return str(group)


def _turns(
    row: dict[str, Any], question_field: str | None, place: str, ignore: Collection[str]
) -> list[Message]:
    """The turns of the prompt as the row has them."""
    fields = QUESTION_FIELDS if question_field is None else (question_field,)
    found = {name: row[name] for name in fields if row.get(name) is not None}
    if not found and question_field is None and "messages" in row:
        turns = read_messages(row["messages"], place, "messages", ignore)
        if turns[-1]["role"] != "user":
            raise InputError(
                f"{place}: `messages` must end with the user turn that the model is to answer, "
                f"the last is of {turns[-1]['role']!r}"
            )
        return turns
    if not found:
        expected = ", ".join(f"`{name}`" for name in fields)
        more = " or `messages`" if question_field is None else ""
        raise InputError(
            f"{place}: no question; expected {expected}{more}, got {', '.join(row) or 'nothing'}"
        )
    name, question = next(iter(found.items()))
    if any(other != question for other in found.values()):
        raise InputError(
            f"{place}: {' and '.join(found)} differ; say which to ask with --question-field"
        )
    if not isinstance(question, str) or not question.strip():
        raise InputError(f"{place}: `{name}` must be a text that is not empty, got {question!r}")
    if name == "instruction":
        question = read_question(row, place)
    return [{"role": "user", "content": question}]


def _extend(
    turns: list[Message], system_prompt: str | None, prompt_suffix: str | None, place: str
) -> list[Message]:
    """The turns with the system prompt before them and the suffix on a line after the last."""
    if prompt_suffix is not None:
        last = turns[-1]
        turns = [*turns[:-1], {**last, "content": last["content"] + "\n" + prompt_suffix}]
    if system_prompt is None:
        return turns
    if turns[0]["role"] == "system":
        raise InputError(f"{place}: has a system turn of its own; leave out --system-prompt")
    return [{"role": "system", "content": system_prompt}, *turns]


def render_prompts(tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question]) -> list[str]:
    """The prompts as the tokenizer's chat template writes them, up to the header of the reply.

    They contain all special tokens: tokenise them without adding any. InputError
    names the row whose prompt the template rejects or renders incompletely.
    """
    texts = []
    for question in questions:
        conversation = Conversation(question.turns, question.tools)
        texts.append(render(conversation, tokenizer, question.place, prompt=True))
        check_rendered(question.place, conversation, texts[-1], tokenizer, prompt=True)
    return texts
