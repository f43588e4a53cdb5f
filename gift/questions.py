"""Questions with known answers: rows of a JSONL file, and the prompts they become."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from gift.errors import InputError

QUESTION_FIELDS = ("instruction", "problem", "question", "prompt")


@dataclass(frozen=True)
class Question:
    """One row: `line` counts from 1, `answer` is text also where the file has a number."""

    line: int
    turns: list[dict[str, str]]
    answer: str
    group: str | None = None


def read_questions(
    path: Path,
    *,
    limit: int | None = None,
    question_field: str | None = None,
    group_by: str | None = None,
    system_prompt: str | None = None,
    prompt_suffix: str | None = None,
) -> list[Question]:
    """Reads the rows with what the options add to each prompt; the options are EvaluateOptions'.

    Raises:
        InputError: names file and line of the first row that cannot be used.
    """
    questions = []
    try:
        with path.open(encoding="utf-8") as file:
            for line, text in enumerate(file, start=1):
                if len(questions) == limit:
                    break
                if not text.strip():
                    continue
                place = f"{path}, line {line}"
                row = _parse(text, place)
                turns = _turns(row, question_field, place)
                _extend(turns, system_prompt, prompt_suffix, place)
                group = None if group_by is None else _group(row, group_by, place)
                questions.append(Question(line, turns, _answer(row, place), group))
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error})") from None
    except OSError as error:
        raise InputError(f"--data: cannot read {path} ({error.strerror})") from None
    if not questions:
        raise InputError(f"--data: {path} has no rows")
    return questions


def _parse(text: str, place: str) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{place}: not valid JSON ({error})") from None
    if not isinstance(row, dict):
        raise InputError(f"{place}: expected an object with a question and an `answer`")
    return row


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


def _turns(row: dict[str, Any], question_field: str | None, place: str) -> list[dict[str, str]]:
    """The turns of the prompt as the row has them."""
    fields = QUESTION_FIELDS if question_field is None else (question_field,)
    found = {name: row[name] for name in fields if row.get(name) is not None}
    if not found and question_field is None and "messages" in row:
        return _checked_messages(row["messages"], place)
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
    return [{"role": "user", "content": question}]


def _checked_messages(messages: Any, place: str) -> list[dict[str, str]]:
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{place}: `messages` must be a list of turns, got {messages!r}")
    for turn in messages:
        if not isinstance(turn, dict) or not all(
            isinstance(turn.get(key), str) for key in ("role", "content")
        ):
            raise InputError(f"{place}: a turn needs the texts `role` and `content`, got {turn!r}")
    if messages[-1]["role"] != "user":
        raise InputError(
            f"{place}: `messages` must end with the user turn that the model is to answer, "
            f"the last is of {messages[-1]['role']!r}"
        )
    return [{"role": turn["role"], "content": turn["content"]} for turn in messages]


def _extend(
    turns: list[dict[str, str]], system_prompt: str | None, prompt_suffix: str | None, place: str
) -> None:
    """Puts the system turn before `turns` and the suffix on a line after the last of them."""
    if prompt_suffix is not None:
        turns[-1]["content"] += "\n" + prompt_suffix
    if system_prompt is not None:
        if turns[0]["role"] == "system":
            raise InputError(f"{place}: has a system turn of its own; leave out --system-prompt")
        turns.insert(0, {"role": "system", "content": system_prompt})


def render_prompts(
    tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question], path: Path
) -> list[str]:
    """The prompts as the tokenizer's chat template writes them, up to the header of the reply.

    They hold every special token the model wants: tokenise them without adding any. InputError
    names the line of `path` whose prompt the template refuses.
    """
    texts = []
    for question in questions:
        try:
            text = tokenizer.apply_chat_template(
                question.turns, tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:
            raise InputError(
                f"{path}, line {question.line}: the model's chat template refuses the prompt "
                f"({error})"
            ) from None
        texts.append(str(text))
    return texts
