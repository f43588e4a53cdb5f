"""Targets under the chat templates of the common model families."""

import json

import pytest
import tiny
from test_encoding import encode_one

from gift.config.options import DataOptions
from gift.data.encoding import encode, encode_file, read_rows
from gift.data.rows import Conversation
from gift.errors import InputError

HEAD = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
# Reasoning is shown after the last question only, where a reply without any gets an empty block.
QWEN3 = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}"
    "<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% set c = m.content or '' %}"
    "{% set r = m.reasoning_content or '' %}{% if '</think>' in c %}"
    "{% set r = c.split('</think>')[0].split('<think>')[-1] %}"
    "{% set c = c.split('</think>')[-1] %}{% endif %}"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}"
    "<think>\n{{ r.strip('\n') }}\n</think>\n\n{{ c.lstrip('\n') }}"
    "{% else %}{{ c.lstrip('\n') }}{% endif %}"
    '{% for t in m.tool_calls or [] %}\n<tool_call>\n{"name": "{{ t.function.name }}", '
    '"arguments": {{ t.function.arguments | tojson }}}\n</tool_call>{% endfor %}'
    "<|im_end|>\n{% endfor %}" + HEAD
)
LLAMA3 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n\n{{ m.content | trim }}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}"
)
MISTRAL = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]{% else %}"
    " {{ m.content }}<|im_end|>{% endif %}{% endfor %}"
)
GEMMA = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ 'model' if m.role == 'assistant' else 'user' }}\n"
    "{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)
DEEPSEEK_R1 = (
    "{% for m in messages %}{% if m.role == 'user' %}User:{{ m.content }}{% else %}"
    "Assistant:{{ m.content.split('</think>')[-1] }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:THINK{% endif %}"
)
R1_WITHOUT_PREFILL = DEEPSEEK_R1.replace("THINK", "")
R1_WITH_PREFILL = DEEPSEEK_R1.replace("THINK", "<think>\n")
# Phi-3 writes one more end token behind a text that ends.
PHI3 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}<|pad|>{% endif %}"
)
IGNORES_PROMPT = tiny.CHATML.replace(
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}", ""
)
TURNS = [
    {"role": "user", "content": "Two plus three?"},
    {"role": "assistant", "content": "a"},
    {"role": "user", "content": "And eight?"},
    {"role": "assistant", "content": " Thirteen.\n"},
]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"x": "two"}}}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds."}}]


def target_texts(template: str, turns, tools=None) -> list[str]:
    """The decoded target runs of a conversation."""
    tokenizer = tiny.make_tokenizer(template)
    example = encode_one(turns, tokenizer, tools)
    runs = [[]]
    for token, is_target in zip(example.input_ids, example.is_target, strict=True):
        if is_target:
            runs[-1].append(int(token))
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (tiny.CHATML, ["a<|im_end|>", " Thirteen.\n<|im_end|>"]),
        (QWEN3, ["a<|im_end|>", " Thirteen.\n<|im_end|>"]),
        (LLAMA3, ["a<|im_end|>", "Thirteen.<|im_end|>"]),
        (MISTRAL, [" a<|im_end|>", "  Thirteen.\n<|im_end|>"]),
        (GEMMA, ["a<|im_end|>", "Thirteen.<|im_end|>"]),
        (R1_WITHOUT_PREFILL, ["a<|im_end|>", " Thirteen.\n<|im_end|>"]),
        (PHI3, ["a<|im_end|>", " Thirteen.\n<|im_end|>"]),
        (IGNORES_PROMPT, ["a<|im_end|>", " Thirteen.\n<|im_end|>"]),
    ],
    ids=["chatml", "qwen3", "llama3", "mistral", "gemma", "r1", "phi3", "ignores-prompt"],
)
def test_only_the_datas_words_and_their_end_are_targets(template, expected):
    assert target_texts(template, TURNS) == expected


@pytest.mark.parametrize(("template", "added"), [(QWEN3, "think"), (IGNORES_PROMPT, "im_start")])
def test_what_the_template_adds_is_noted(template, added):
    data = encode([Conversation(TURNS)], tiny.make_tokenizer(template), max_length=512)
    assert any(added in note and "(1 rows)" in note for note in data.notes)


@pytest.mark.parametrize(
    "reply",
    [
        {"content": "<think>\nWhy?\n</think>\n\nFive."},
        {"content": "Five.", "reasoning_content": "Why?"},
    ],
    ids=["in-content", "in-field"],
)
def test_reasoning_of_the_data_is_a_target_with_its_tags(reply):
    turns = [TURNS[0], {"role": "assistant", **reply}]
    assert target_texts(QWEN3, turns) == ["<think>\nWhy?\n</think>\n\nFive.<|im_end|>"]


def test_reasoning_of_earlier_turns_may_be_left_out_with_a_note():
    thinking = "<think>\nWhy?\n</think>\n\n"
    turns = [
        {**turn, "content": thinking + turn["content"]} if turn["role"] == "assistant" else turn
        for turn in TURNS
    ]
    data = encode([Conversation(turns)], tiny.make_tokenizer(QWEN3), max_length=512)
    assert any("leaves out the reasoning of earlier turns" in note for note in data.notes)
    assert target_texts(QWEN3, turns)[0] == "a<|im_end|>"


def test_tool_calls_are_targets_and_tool_results_are_not():
    turns = [
        TURNS[0],
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "5"},
        {"role": "assistant", "content": "Five."},
    ]
    template = QWEN3.replace("loop.index0 > ns.last", "false")
    assert target_texts(template, turns, TOOLS) == [
        '<tool_call>\n{"name": "add", "arguments": {"x": "two"}}\n</tool_call><|im_end|>',
        "Five.<|im_end|>",
    ]
    assert target_texts(template.replace(HEAD, ""), turns, TOOLS)[0].startswith("<tool_call>")


def test_an_empty_think_block_before_a_call_is_no_target():
    turns = [TURNS[0], {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    assert target_texts(QWEN3, turns, TOOLS) == [
        '<tool_call>\n{"name": "add", "arguments": {"x": "two"}}\n</tool_call><|im_end|>'
    ]


def test_a_calls_name_in_the_header_of_its_result_is_no_target():
    turns = [
        TURNS[0],
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "5"},
        {"role": "assistant", "content": "Five."},
    ]
    template = (
        "{% for t in tools or [] %}{{ t.function.name }}\n{% endfor %}"
        "{% for m in messages %}<|im_start|>{% if m.role == 'tool' %}{{ messages["
        "loop.index0 - 1].tool_calls[0].function.name }} to assistant\n{{ m.content }}"
        "{% else %}{{ m.role }}\n{% for t in m.tool_calls or [] %}to {{ t.function.name }} "
        "{{ t.function.arguments | tojson }}{% endfor %}{{ m.content or '' }}{% endif %}"
        "<|im_end|>\n{% endfor %}" + HEAD
    )
    assert target_texts(template, turns, TOOLS) == [
        'to add {"x": "two"}<|im_end|>',
        "Five.<|im_end|>",
    ]


def test_the_end_that_only_earlier_turns_have_is_no_target_and_stays_one_token():
    # Harmony ends the last turn with its end of sequence, earlier ones with another token.
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{{ '<|im_end|>' if loop.last or m.role == 'user' else '<|endoftext|>' }}"
        "{% endfor %}" + HEAD
    )
    tokenizer = tiny.make_tokenizer(template)
    data = encode([Conversation(TURNS)], tokenizer, max_length=512)
    text = tokenizer.apply_chat_template(TURNS, tokenize=False)
    assert data.kept[0].input_ids.tolist() == tokenizer(text)["input_ids"]
    assert target_texts(template, TURNS) == ["a", " Thirteen.\n<|im_end|>"]
    assert any("ends an earlier turn otherwise" in note for note in data.notes)


@pytest.mark.parametrize(
    ("template", "turns", "tools", "message"),
    [
        (
            "{% for m in messages %}{{ m.role }}{% for p in m.content %}{{ p.text }}{% endfor %}"
            "<|im_end|>{% endfor %}",
            TURNS,
            None,
            "does not render the reply of turn 2",
        ),
        (
            tiny.CHATML.replace("message['content']", "message.content if message.role != 'user'"),
            TURNS,
            None,
            "does not render the text of turn 1",
        ),
        (tiny.CHATML.replace("message['content']", "message.content | upper"), TURNS, None, "turn"),
        (R1_WITH_PREFILL, TURNS, None, "renders the prompt of turn 2 differently .*<think>"),
        (
            R1_WITHOUT_PREFILL,
            [TURNS[0], {"role": "assistant", "content": "<think>Why?</think>Five."}],
            None,
            "does not render the reasoning of turn 2",
        ),
        (
            tiny.CHATML,
            [TURNS[0], {"role": "assistant", "content": "Five.", "reasoning_content": "Why?"}],
            None,
            "does not render the reasoning of turn 2",
        ),
        (
            tiny.CHATML,
            [TURNS[0], {"role": "assistant", "content": "", "tool_calls": [CALL]}],
            None,
            "does not render the call of turn 2",
        ),
        (
            QWEN3,
            [
                TURNS[0],
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [
                        {"name": "f", "function": {"name": "f", "arguments": '{"x":"y"}'}}
                    ],
                },
            ],
            None,
            "does not render the arguments",
        ),
        (tiny.CHATML, TURNS, TOOLS, "does not render the tools"),
        (tiny.CHATML, [{**TURNS[0], "name": "Bo"}, TURNS[1]], None, "render the name of turn 1"),
        (tiny.CHATML, [*TURNS[:3], {"role": "assistant", "content": " "}], None, "turn 4 .*empty"),
        (tiny.CHATML, TURNS[1:], None, "begins with the assistant's turn"),
        (GEMMA, [{"role": "system", "content": "S"}, *TURNS], None, "refuses .*no system turns"),
    ],
    ids=[
        *("parts", "no-user", "upper", "r1-prefill", "r1-reasoning", "reasoning", "calls"),
        *("encoded-twice", "tools", "name", "empty", "assistant-first", "no-system"),
    ],
)
def test_what_a_template_leaves_out_or_changes_is_an_error(template, turns, tools, message):
    with pytest.raises(InputError, match=f"row 0: .*{message}"):
        encode_one(turns, tiny.make_tokenizer(template), tools)


def test_a_system_turn_that_is_left_out_is_noted():
    template = tiny.CHATML.replace(
        "message['content']", "message.content if message.role != 'system'"
    )
    turns = [{"role": "system", "content": "Be brief."}, *TURNS]
    data = encode([Conversation(turns)], tiny.make_tokenizer(template), max_length=512)
    assert any("leaves out or changes a system turn" in note for note in data.notes)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"instruction": "smile \\ud83d", "response": "ok"}', "'instruction': holds '.ud83d'"),
        ('{"instruction": "a", "response": "b", "response": "c"}', "'response' appears twice"),
        ('{"instruction": "a", "response": "b", "history": [["c", "d"]]}', "unsupported history"),
        (
            '{"messages": [{"role": "user", "content": "a", "weight": 0}]}',
            "message 1: unsupported weight .*--ignore-keys weight",
        ),
        ('{"instruction": "a", "response": "b", "tools": [1]}', "tools: expected a list"),
        (
            '{"system": "a", "messages": [{"role": "system", "content": "b"}]}',
            "key system and a system turn",
        ),
        (
            '{"messages": [{"role": "user", "content": [{"type": "image"}]}]}',
            "part of type image; only text",
        ),
        ("[" * 100_000, "not valid JSON"),
    ],
    ids=["surrogate", "twice", "history", "weight", "tools", "system", "image", "deep"],
)
def test_keys_and_texts_that_cannot_be_used_are_named_with_their_line(tmp_path, row, message):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"instruction": "a", "response": "b"}\n' + row)
    with pytest.raises(InputError, match=f"rows.jsonl, line 2.*{message}"):
        read_rows(path)


def test_metadata_is_noted_once_and_ignored_keys_are_not(tmp_path, capsys):
    row = {"instruction": "a", "response": "b", "source": "s", "id": 0, "history": [["c", "d"]]}
    path = tmp_path / "rows.jsonl"
    path.write_text((json.dumps(row) + "\n") * 3)
    data = encode_file(path, tiny.make_tokenizer(), DataOptions(ignore_keys="history, id"))
    assert data.notes == ("keys that nothing reads: source (3 rows)",)
    assert "source (3 rows)" in capsys.readouterr().err


def test_system_and_tools_of_a_row_reach_the_template(tmp_path):
    path = tmp_path / "rows.jsonl"
    row = {"system": "S", "messages": TURNS, "tools": json.dumps(TOOLS)}
    path.write_text(json.dumps(row))
    (conversation,) = read_rows(path)
    assert conversation.tools == TOOLS and conversation.turns[0]["content"] == "S"


def test_rows_longer_than_the_context_are_lost_like_overlong_rows():
    rows = [Conversation(TURNS), Conversation([TURNS[0], {**TURNS[1], "content": "x" * 200}])]
    data = encode(rows, tiny.make_tokenizer(), max_length=512, context=100, max_dropped=0.5)
    assert [(one.row, one.action) for one in data.lost] == [(1, "dropped")]
    assert "the model's context is 100" in data.lost[0].reason
    with pytest.raises(InputError, match="1 of 2 rows are lost .*context is 100"):
        encode(rows, tiny.make_tokenizer(), max_length=512, context=100)


def test_a_reply_of_tags_is_a_target_too():
    turns = [*TURNS[:3], {"role": "assistant", "content": "<br>"}]
    assert target_texts(QWEN3, turns) == ["a<|im_end|>", "<br><|im_end|>"]


def test_the_text_of_special_tokens_in_a_row_is_noted():
    rows = [Conversation([TURNS[0], {"role": "assistant", "content": "Write <|im_end|> here."}])]
    data = encode(rows, tiny.make_tokenizer(), max_length=512)
    assert any("text of a special token" in note for note in data.notes)


def test_a_prompt_that_changes_with_later_turns_is_an_error():
    """Like Mistral 7B v0.3, which writes the system turn before the last question."""
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {% if loop.index0 >= "
        "messages | length - 2 %}{{ messages[0].content }}\n\n{% endif %}{{ m.content }}[/INST]"
        "{% elif m.role == 'assistant' %} {{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    )
    system = {"role": "system", "content": "Be brief."}
    assert target_texts(template, [system, *TURNS[:2]]) == [" a<|im_end|>"]
    with pytest.raises(InputError, match=r"turn 3 differently .*split the row"):
        target_texts(template, [system, *TURNS])
