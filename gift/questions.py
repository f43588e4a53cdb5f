"""Questions with known answers: rows of a JSONL file, and the prompts they become."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from gift.errors import InputError
from gift.rows import (
    Conversation,
    Message,
    add_system,
    json_lines,
    read_messages,
    read_question,
    read_tools,
    refuse_surrogates,
    refuse_unread,
)
from gift.targets import check_rendered, render

QUESTION_FIELDS = ("instruction", "problem", "question", "prompt")


@dataclass(frozen=True)
class Question:
    """One row: `line` counts from 1, `answer` is text even if the file has a number."""

    line: int
    turns: list[Message]
    answer: str
    group: str | None = None
    tools: list[dict[str, Any]] | None = None


def read_questions(
    path: Path,
    *,
    limit: int | None = None,
    question_field: str | None = None,
    group_by: str | None = None,
    system_prompt: str | None = None,
    prompt_suffix: str | None = None,
    ignore: Collection[str] = (),
) -> list[Question]:
    """Reads the rows with what the options add to each prompt; the options are EvaluateOptions'.

    Raises:
        InputError: names file and line of the first row that cannot be used.
    """
    for option, text in (("system-prompt", system_prompt), ("prompt-suffix", prompt_suffix)):
        refuse_surrogates(text, f"--{option}")
    questions = []
    for place, line, row in json_lines(path):
        if len(questions) == limit:
            break
        row = {key: value for key, value in row.items() if key not in ignore}
        refuse_unread(row, place)
        turns = add_system(_turns(row, question_field, place, ignore), row, place)
        tools = read_tools(row, place)
        turns = _extend(turns, system_prompt, prompt_suffix, place)
        group = None if group_by is None else _group(row, group_by, place)
        questions.append(Question(line, turns, _answer(row, place), group, tools))
    if not questions:
        raise InputError(f"--data: {path} has no rows")
    return questions


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


def render_prompts(
    tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question], path: Path
) -> list[str]:
    """The prompts as the tokenizer's chat template writes them, up to the header of the reply.

    They hold every special token the model wants: tokenise them without adding any. InputError
    names the line of `path` whose prompt the template rejects or renders incompletely.
    """
    texts = []
    for question in questions:
        conversation = Conversation(question.turns, question.tools)
        place = f"{path}, line {question.line}"
        texts.append(render(conversation, tokenizer, place, prompt=True))
        check_rendered(place, conversation, texts[-1], tokenizer, prompt=True)
    return texts
