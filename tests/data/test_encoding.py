"""Rows, chat templates and target masks."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny

from gift.data.encoding import Example, encode, prompt_ids, read_rows
from gift.data.rows import Conversation
from gift.errors import InputError

LLAMA_STYLE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} "
    "[/INST]{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
GENERATION_BLOCKS = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ m['content'] }}{% endgeneration %}<|im_end|>\n{% else %}<|im_start|>"
    "{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Like Qwen3: the last reply gets an empty reasoning block, earlier ones do not.
REASONING_IN_LAST = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_END = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
TWO_TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is two plus three?"},
    {"role": "assistant", "content": "Five."},
    {"role": "user", "content": "And eight?"},
    {"role": "assistant", "content": "Thirteen, of course."},
]


def encode_one(conversation, tokenizer, tools=None) -> Example:
    return encode([Conversation(conversation, tools)], tokenizer, max_length=4096).kept[0]


def target_texts(template: str, conversation: list[dict[str, str]], **options: bool) -> list[str]:
    """The decoded target runs of a conversation."""
    tokenizer = tiny.make_tokenizer(template, **options)
    example = encode_one(conversation, tokenizer)
    runs, current = [], []
    for token, is_target in zip(example.input_ids, example.is_target, strict=True):
        if is_target:
            current.append(int(token))
        elif current:
            runs.append(tokenizer.decode(current))
            current = []
    return [*runs, tokenizer.decode(current)] if current else runs


@pytest.mark.parametrize("pad_is_eos", [False, True], ids=["own-pad", "pad-is-eos"])
@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (tiny.CHATML, ["Five.<|im_end|>", "Thirteen, of course.<|im_end|>"]),
        (GENERATION_BLOCKS, ["Five.<|im_end|>", "Thirteen, of course.<|im_end|>"]),
        (
            REASONING_IN_LAST,
            ["Five.<|im_end|>", "Thirteen, of course.<|im_end|>"],
        ),
    ],
    ids=["chatml", "generation-blocks", "reasoning-in-last"],
)
def test_targets_are_every_assistant_turn_with_its_end(template, expected, pad_is_eos):
    assert target_texts(template, TWO_TURNS, pad_is_eos=pad_is_eos) == expected


def test_template_without_header_targets_reply_and_eos():
    assert target_texts(LLAMA_STYLE, TWO_TURNS[1:]) == [
        " Five.<|im_end|>",
        " Thirteen, of course.<|im_end|>",
    ]


def test_prompt_tokens_in_training_are_those_of_inference():
    """Also where reply and header would merge into one token if tokenised together."""
    tokenizer = tiny.make_tokenizer()
    tokenizer.add_tokens(["\n\nThe"])
    conversation = [
        {"role": "user", "content": "Hello?"},
        {"role": "assistant", "content": "\nThe answer"},
    ]
    example = encode_one(conversation, tokenizer)
    asked = prompt_ids(conversation[:1], tokenizer)
    assert example.input_ids[: len(asked)].tolist() == asked
    assert not example.is_target[: len(asked)].any()
    assert example.is_target[len(asked)]


def test_first_token_is_never_a_target():
    tokenizer = tiny.make_tokenizer(
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] }}{{ eos_token }}"
        "{% endif %}{% endfor %}"
    )
    example = encode_one([{"role": "user", "content": ""}, TWO_TURNS[2]], tokenizer)
    assert not example.is_target[0] and example.is_target[1:].all()


def test_template_that_hides_the_reply_is_an_error():
    tokenizer = tiny.make_tokenizer(
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}"
        "{% endfor %}"
    )
    with pytest.raises(InputError, match=r"row 0: .* turn 2"):
        encode([Conversation(TWO_TURNS[1:3])], tokenizer, max_length=64)


def test_template_that_rewrites_the_prompt_is_an_error():
    tokenizer = tiny.make_tokenizer(
        "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    with pytest.raises(InputError, match="row 0: .* differently once the reply is there"):
        encode_one(TWO_TURNS[1:3], tokenizer)


def test_template_without_end_of_turn_is_noted():
    data = encode([Conversation(TWO_TURNS[1:3])], tiny.make_tokenizer(NO_END), max_length=64)
    assert any("may not learn to stop" in note for note in data.notes)


def test_lost_rows_are_listed_with_their_reason():
    long = [
        {"role": "user", "content": "Add."},
        {"role": "assistant", "content": "The answer is five. " * 30},
    ]
    empty = [{"role": "user", "content": "Add."}, {"role": "assistant", "content": " "}]
    rows = [Conversation(turns) for turns in (TWO_TURNS, long, empty)]
    tokenizer = tiny.make_tokenizer()
    dropped = encode(rows, tokenizer, max_length=100, max_dropped=1.0)
    assert [example is None for example in dropped.examples] == [False, True, True]
    assert [(one.row, one.action) for one in dropped.lost] == [(1, "dropped"), (2, "dropped")]
    assert "--max-length is 100" in dropped.lost[0].reason
    cut = encode(rows, tokenizer, max_length=100, max_dropped=1.0, overlong="truncate")
    assert len(cut.kept[1].input_ids) == 100 and cut.lost[0].action == "truncated"
    with pytest.raises(InputError, match="2 of 3 rows are lost .* --max-dropped 0.5"):
        encode(rows, tokenizer, max_length=100, max_dropped=0.5)
    with pytest.raises(InputError, match="every row is dropped"):
        encode(rows[2:], tokenizer, max_length=100, max_dropped=1.0)


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Add.", "response": "Five."},
        {"prompt": "Add.", "completion": "Five."},
        {
            "prompt": [{"role": "user", "content": "Add."}],
            "completion": [{"role": "assistant", "content": "Five."}],
        },
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Add."}]},
                {"role": "assistant", "content": "Five."},
            ]
        },
    ],
    ids=["instruction", "prompt", "prompt-messages", "messages"],
)
def test_every_row_format_gives_the_same_conversation(tmp_path, row):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n\n")
    turns = [{"role": "user", "content": "Add."}, {"role": "assistant", "content": "Five."}]
    assert read_rows(path) == [Conversation(turns)]


def test_input_and_system_fields_are_not_lost(tmp_path):
    path = tmp_path / "rows.jsonl"
    row = {"system": "S", "instruction": "Add.", "input": "2 3", "response": "Five."}
    path.write_text(json.dumps(row))
    assert [turn["content"] for turn in read_rows(path)[0].turns] == ["S", "Add.\n\n2 3", "Five."]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no rows"),
        (b'{"instruction": "a", "response": "b"}\n{"instruction": \n', "line 2: not valid JSON"),
        (b'{"instruction": "a"}\n', "line 1: expected the keys .* got instruction"),
        (b"[1]\n", "line 1: expected a JSON object, got list"),
        (b'{"instruction": "a", "response": 3}\n', "line 1: response: expected a text, got int"),
        (b'{"messages": []}\n', "line 1: messages: expected a non-empty list"),
        (b'{"messages": [{"role": "robot", "content": "a"}]}\n', "message 1: .* role out of"),
        (b'{"instruction": "\xff", "response": "b"}\n', "line 1: not UTF-8"),
    ],
    ids=["empty", "json", "keys", "list", "type", "no-messages", "role", "utf8"],
)
def test_bad_files_are_named_with_their_line(tmp_path: Path, content: bytes, message: str):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_rows(path)


def test_digest_changes_with_tokens_and_with_mask():
    tokenizer = tiny.make_tokenizer()
    example = encode_one(TWO_TURNS, tokenizer)
    other_mask = type(example)(0, example.input_ids, np.roll(example.is_target, 1))
    other_ids = type(example)(0, np.roll(example.input_ids, 1), example.is_target)
    assert len({example.digest, other_mask.digest, other_ids.digest}) == 3
