"""Rows of questions are read, and unusable ones are named."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny

from gift.data.rows import json_lines
from gift.errors import InputError
from gift.evaluation.questions import read_questions, render_prompts


def write_data(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


CHOICES = {"choices": True}


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("{", {}, "line 2: not valid JSON"),
        ("[1]", {}, "line 2: expected a JSON object"),
        ('{"text": "a", "answer": 1}', {}, "line 2: no question; expected `instruction`.*text"),
        ('{"question": "a"}', {}, "line 2: `answer` must be a string or a number, got None"),
        ('{"question": "a", "answer": true}', {}, "line 2: `answer` must be .*True"),
        ('{"question": "a", "answer": NaN}', {}, "line 2: `answer` must be finite"),
        ('{"question": "a", "answer": " "}', {}, "line 2: `answer` is empty"),
        ('{"question": " ", "answer": 1}', {}, "line 2: `question` must be a text"),
        ('{"prompt": ["a"], "answer": 1}', {}, "line 2: `prompt` must be a text"),
        ('{"prompt": "a", "problem": "b", "answer": 1}', {}, "problem and prompt differ"),
        ('{"q": "a", "answer": 1}', {"question_field": "body"}, "expected `body`, got q"),
        ('{"messages": [], "answer": 1}', {}, "line 2: messages: expected a non-empty list"),
        (
            '{"messages": [{"role": "user"}], "answer": 1}',
            {},
            "line 2: messages, message 1: content: expected a text",
        ),
        (
            '{"messages": [{"role": "assistant", "content": "a"}], "answer": 1}',
            {},
            "line 2: `messages` must end with the user turn",
        ),
        (
            '{"messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}],'
            ' "answer": 1}',
            {"system_prompt": "c"},
            "line 2: has a system turn",
        ),
        ('{"question": "a", "answer": 1}', {"group_by": "level"}, "line 2: --group-by level"),
        ('{"question": "a", "answer": 0}', CHOICES, "`choices` must be a list of 2 to 26 texts"),
        ('{"question": "a", "choices": ["b"], "answer": 0}', CHOICES, "2 to 26 texts, got .'b'."),
        (
            '{"question": "a", "choices": ["b", "c"], "answer": 2}',
            CHOICES,
            "line 2: `answer` must be a letter of AB or a place from 0 to 1, got 2",
        ),
        ('{"question": "a", "choices": ["b", "c"], "answer": "C"}', CHOICES, "letter of AB.*'C'"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.startswith(("{", "[")) else "",
)
def test_a_row_that_cannot_be_used_is_named(tmp_path, text, options, message):
    path = tmp_path / "data.jsonl"
    path.write_text("\n" + text + "\n")
    with pytest.raises(InputError, match=message):
        read_questions(json_lines(path), **options)


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(InputError, match=r"nothing\.jsonl: no such file"):
        read_questions(json_lines(tmp_path / "nothing.jsonl"))
    (tmp_path / "latin.jsonl").write_bytes(b'{"question": "\xe9", "answer": 1}')
    with pytest.raises(InputError, match=r"latin\.jsonl, line 1: not UTF-8"):
        read_questions(json_lines(tmp_path / "latin.jsonl"))


def test_questions_are_found_and_limited(tmp_path):
    rows = [
        {"problem": "same", "question": "same", "answer": 27.0},
        {"prompt": "a", "body": "b", "answer": "025"},
        {"prompt": "broken"},
    ]
    path = write_data(tmp_path / "d.jsonl", rows)
    first, second = read_questions(json_lines(path), limit=2)
    assert (first.turns[0]["content"], first.answer) == ("same", "27")
    assert (second.turns[0]["content"], second.answer, second.place) == (
        "a",
        "025",
        f"{path}, line 2",
    )
    path = write_data(tmp_path / "d.jsonl", rows[1:2])
    assert read_questions(json_lines(path), question_field="body")[0].turns[0]["content"] == "b"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"question": "a \\ud83d", "answer": 1}', "'question': holds '.ud83d'"),
        ('{"question": "a", "history": [["b", "c"]], "answer": 1}', "unsupported history"),
    ],
)
def test_what_no_model_could_read_is_refused(tmp_path, row, message):
    path = tmp_path / "d.jsonl"
    path.write_text(row)
    with pytest.raises(InputError, match=f"line 1.*{message}"):
        read_questions(json_lines(path))


def test_system_tools_and_input_of_a_question_are_asked(tmp_path):
    tools = [{"name": "add"}]
    row = {"system": "S", "instruction": "Add.", "input": "2 3", "tools": tools, "answer": 5}
    (question,) = read_questions(json_lines(write_data(tmp_path / "d.jsonl", [row])))
    assert [turn["content"] for turn in question.turns] == ["S", "Add.\n\n2 3"]
    assert question.tools == tools
    with pytest.raises(InputError, match="does not render the tools"):
        render_prompts(tiny.make_tokenizer(), [question])


def test_keys_named_in_ignore_keys_are_left_out_of_questions(tmp_path):
    row = {"instruction": "Add.", "history": [["a", "b"]], "answer": 5}
    path = write_data(tmp_path / "d.jsonl", [row])
    with pytest.raises(InputError, match="--ignore-keys history"):
        read_questions(json_lines(path))
    (question,) = read_questions(json_lines(path), ignore={"history"})
    assert [turn["content"] for turn in question.turns] == ["Add."]
