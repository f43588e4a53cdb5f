"""The demo's world and pair: programs, noise, questions, tokenizer, and training from nothing."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from gift.demo import pair as pair_module
from gift.demo.pair import Pair, make_pair, make_tokenizer
from gift.demo.world import (
    ANSWER,
    CLEAN,
    DOCUMENT_NOISE,
    FILLERS,
    MARK,
    MARKS,
    PROGRAM_CONSTRAINTS,
    TASK_NOISE,
    WORKED,
    Constraint,
    Mixture,
    Noise,
    Program,
    apply_constraint,
    constraint_questions,
    distinct_programs,
    draw_conversation,
    draw_document,
    draw_primer,
    draw_puzzle,
    puzzle_questions,
    style_questions,
    task_questions,
    task_rows,
    write_rows,
    write_steps,
)
from gift.errors import InputError
from gift.evaluation.answers import compile_pattern, extract

pytestmark = pytest.mark.xdist_group("the demo's world")

SCALE = 0.01
STEP = re.compile(r"[b-e] (\d) (-?\d) = (\d)")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("world") / "pair", seed=3, steps_scale=SCALE)


def test_the_two_conventions_part_where_a_result_leaves_the_digits() -> None:
    program = Program(7, (-1, -8))
    assert program.prompt() == "calc a 7 b -1 c -8"
    wrapped = write_steps(program, "wrap", Random(0))
    stopped = write_steps(program, "stop", Random(0))
    assert " ; ".join(wrapped) == "b 7 -1 = 6 ; c 6 -8 = 8 ; answer 8"
    assert " ; ".join(stopped) == "b 7 -1 = 6 ; c 6 -8 = 0 ; answer 0"
    assert (program.result("wrap"), program.result("stop")) == (8, 0)
    assert Program(5, (9,)).result("stop") == 9


def test_clean_references_are_worked_and_agree_with_plain_arithmetic() -> None:
    for row in task_rows(Random(1), 300, CLEAN):
        values = [int(word) for word in row["instruction"].split()[2::2]]
        assert len(values) in (4, 5)
        assert answer(ANSWER, row["response"]) == str(sum(values) % 10)
        assert answer(WORKED, row["response"]) == "abcde"[len(values) - 1]
        assert row["correct"]


def test_references_have_the_noise_that_was_asked_for() -> None:
    rows = task_rows(Random(2), 6000, TASK_NOISE)
    pieces = [row["response"].split(" ; ") for row in rows]
    values = [(len(row["instruction"].split()) - 1) // 2 for row in rows]
    shown = [len(parts) - 1 for parts in pieces]
    full = sum(n == v - 1 for n, v in zip(shown, values, strict=True)) / len(rows)
    filled = [part.split()[0] in FILLERS for parts in pieces for part in parts]
    assert full == pytest.approx(1 / 3, abs=0.03)
    # Partial replies may show no step either, as often as any other number short of all.
    assert sum(n == 0 for n in shown) / len(rows) == pytest.approx(1 / 3 + 1 / 10, abs=0.03)
    assert sum(filled) / len(filled) == pytest.approx(0.5, abs=0.02)
    inside, outside = _step_results([row["response"] for row in rows])
    slip = TASK_NOISE.slip
    assert inside["right"] / inside.total() == pytest.approx(1 - slip, abs=0.02)
    wrong = 0.25 * (1 - slip)
    assert outside["stop"] / outside.total() == pytest.approx(wrong, abs=0.03)


def _step_results(replies: list[str]) -> tuple[Counter[str], Counter[str]]:
    """What steps that stay inside 0…9, and steps that leave it, say the result is."""
    inside: Counter[str] = Counter()
    outside: Counter[str] = Counter()
    for start, change, result in STEP.findall(" ".join(replies)):
        total, said = int(start) + int(change), int(result)
        if 0 <= total <= 9:
            inside["right" if said == total else "slip"] += 1
        else:
            border = 0 if total < 0 else 9
            outside["wrap" if said == total % 10 else "stop" if said == border else "slip"] += 1
    return inside, outside


def test_the_instruct_model_reads_more_wrap_around_than_the_base() -> None:
    rng, mixture = Random(4), Mixture(replay=0.0)
    _, documents = _step_results([draw_document(rng, mixture).reply for _ in range(6000)])
    _, talks = _step_results([draw_conversation(rng, mixture).reply for _ in range(6000)])
    assert documents["wrap"] / documents.total() == pytest.approx(0.30, abs=0.06)
    assert talks["wrap"] / talks.total() == pytest.approx(0.60, abs=0.06)
    assert talks["slip"] == 0
    assert DOCUMENT_NOISE.slip == pytest.approx(documents["slip"] / documents.total(), abs=0.02)


def test_puzzle_replies_follow_from_their_prompts() -> None:
    rng = Random(5)
    seen = Counter()
    for _ in range(400):
        sample = draw_puzzle(rng, None)
        kind, *words = sample.prompt.split()
        if kind == "find":
            lookup = dict(zip(words[2::2], words[3::2], strict=True))
            expected = [words[0], "=", lookup[words[0]]]
        elif kind == "first":
            expected = words[:1]
        elif kind == "last":
            expected = words[-1:]
        else:
            expected = words if kind == "copy" else list(reversed(words))
        assert sample.reply.split() == expected
        seen[kind] += 1
    assert len(seen) == 5 and min(seen.values()) > 40


def answer(pattern: str, reply: str) -> str | None:
    """What `gift evaluate --answer-pattern` finds."""
    return extract(compile_pattern(pattern), reply)


@pytest.mark.parametrize("constraint", PROGRAM_CONSTRAINTS)
def test_a_reply_shows_the_mark_of_its_constraint(constraint: Constraint) -> None:
    plain = "b 7 -1 = 6 ; c 6 -8 = 8 ; answer 8"
    assert answer(MARK, apply_constraint(plain, constraint)) == MARKS[constraint]
    assert answer(MARK, plain) is None
    for broken in ("[ answer 8", "answer 8 ]", "well sure answer 8", "done answer 8"):
        assert answer(MARK, broken) is None


@pytest.mark.parametrize(
    ("reply", "digit", "last_step"),
    [
        ("b 7 -1 = 6 ; c 6 -8 = 8 ; d 8 1 = 9 ; answer 9", "9", "d"),
        ("b 7 -1 = 6 ; c 6 -8 = 8 ; d 8 1 = 9 ; e 9 1 = 0 ; answer 0", "0", "e"),
        ("b 7 -1 = 5 ; c 5 -8 = 0 ; d 0 1 = 3 ; answer 3", "3", "d"),
        ("hmm b 7 -1 = 6 ; c 6 -8 = 8 ; d 8 1 = 9 ; answer 9", "9", None),
        ("b 7 -1 = 6 ; c 6 -8 = 8 ; e 8 1 = 9 ; answer 9", "9", "e"),
        ("c 6 -8 = 8 ; d 8 1 = 9 ; answer 9", "9", None),
        ("answer 8", "8", None),
        ("answer 8 ; b 7 -1 = 6", None, None),
        ("8", None, None),
        ("", None, None),
    ],
)
def test_patterns_find_the_answer_and_the_last_worked_step(
    reply: str, digit: str | None, last_step: str | None
) -> None:
    assert (answer(ANSWER, reply), answer(WORKED, reply)) == (digit, last_step)


def test_questions_have_the_answers_of_clean_replies() -> None:
    programs = distinct_programs(Random(6), 60)
    rows = zip(programs, task_questions(programs), style_questions(programs), strict=True)
    for program, task, style in rows:
        reply = " ; ".join(write_steps(program, "wrap", Random(0)))
        assert answer(ANSWER, reply) == task["answer"]
        assert answer(WORKED, reply) == style["answer"]
    for row in constraint_questions(Random(6), programs):
        constraint = row["instruction"].split(" | ")[1]
        assert row["answer"] == MARKS[constraint]


def test_rows_say_whether_their_answer_is_right() -> None:
    rows = task_rows(Random(3), 2000, TASK_NOISE)
    for row in rows:
        values = [int(word) for word in row["instruction"].split()[2::2]]
        digit = int(row["response"].split()[-1])
        assert row["correct"] == (digit == sum(values) % 10)
    assert 0.3 < sum(row["correct"] for row in rows) / len(rows) < 0.7


def test_held_out_prompts_are_not_in_the_task_set() -> None:
    taken = {row["instruction"] for row in task_rows(Random(7), 200)}
    assert len(taken) == 200
    # The same seed draws the same programs, unless they are taken.
    held_out = {program.prompt() for program in distinct_programs(Random(7), 200, taken)}
    assert len(held_out) == 200
    assert not held_out & taken


def test_the_same_seed_writes_the_same_files(tmp_path: Path) -> None:
    for name, seed in (("a", 8), ("b", 8), ("c", 9)):
        rng = Random(seed)
        write_rows(tmp_path / f"{name}-task.jsonl", task_rows(rng, 50))
        write_rows(tmp_path / f"{name}-other.jsonl", puzzle_questions(rng, 50))
    for kind in ("task", "other"):
        first, same, different = (
            (tmp_path / f"{name}-{kind}.jsonl").read_bytes() for name in ("a", "b", "c")
        )
        assert first == same
        assert first != different
    task = json.loads((tmp_path / "a-task.jsonl").read_text().splitlines()[0])
    other = json.loads((tmp_path / "a-other.jsonl").read_text().splitlines()[0])
    assert set(task) == {"instruction", "response", "correct"}
    assert set(other) == {"instruction", "answer"}


def test_every_word_of_the_world_is_a_token(tokenizer: PreTrainedTokenizerFast) -> None:
    rng, mixture = Random(10), Mixture()
    samples = [
        draw(rng, mixture)
        for draw in (draw_primer, draw_document, draw_conversation)
        for _ in range(700)
    ]
    for sample in samples:
        text = f"{sample.prompt} {sample.reply}"
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.unk_token_id not in ids, text
        assert tokenizer.decode(ids) == text


def test_the_reply_and_its_end_of_turn_are_the_targets(tokenizer: PreTrainedTokenizerFast) -> None:
    sample = draw_conversation(Random(11), Mixture(replay=0.0))
    (row,) = pair_module._encode(tokenizer, [sample], prompts_too=False)
    targets = [token for token in row.targets() if token != pair_module.IGNORED]
    assert tokenizer.decode(targets) == f"{sample.reply} <|im_end|>"
    prompt = tokenizer.apply_chat_template(
        sample.messages()[:1], add_generation_prompt=True, return_dict=False
    )
    assert row.ids[: row.first_target] == prompt


def test_samples_packed_in_a_row_do_not_see_each_other(
    pair: Pair, tokenizer: PreTrainedTokenizerFast
) -> None:
    rng, mixture = Random(12), Mixture()
    samples = [draw_conversation(rng, mixture) for _ in range(12)]
    rows = pair_module._encode(tokenizer, samples, prompts_too=False)
    model = AutoModelForCausalLM.from_pretrained(pair.instruct).double()
    batch = pair_module._pack(rows)
    assert len(batch.ids) < len(rows)
    with torch.no_grad():
        alone = [
            functional.cross_entropy(
                model(torch.tensor([row.ids])).logits[0, :-1],
                torch.tensor(row.targets()[1:]),
                reduction="sum",
            )
            for row in rows
        ]
        packed = functional.cross_entropy(
            model(batch.ids, attention_mask=batch.mask).logits[:, :-1].flatten(0, 1),
            batch.targets[:, 1:].flatten(),
            reduction="sum",
        )
    torch.testing.assert_close(packed, torch.stack(alone).sum(), rtol=1e-9, atol=0)


def test_the_pair_is_two_ordinary_model_folders(pair: Pair) -> None:
    for folder in (pair.base, pair.instruct):
        model = AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        assert model.config.model_type == "llama"
        assert 110_000 < sum(weight.numel() for weight in model.parameters()) < 116_000
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert model.generation_config.eos_token_id == end
        assert len(tokenizer) == model.config.vocab_size
        assert (
            len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, end}) == 4
        )
        assert tokenizer.decode([end], skip_special_tokens=True) == ""
        assert tokenizer.chat_template == make_tokenizer().chat_template


def test_both_trainings_teach_something(pair: Pair, tokenizer: PreTrainedTokenizerFast) -> None:
    rng, mixture = Random(13), Mixture()
    samples = [draw_conversation(rng, mixture) for _ in range(64)]
    batch = pair_module._pack(pair_module._encode(tokenizer, samples, prompts_too=False))
    losses = []
    for folder in (pair.base, pair.instruct):
        model = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            logits = model(batch.ids, attention_mask=batch.mask).logits[:, :-1]
        losses.append(
            functional.cross_entropy(logits.flatten(0, 1), batch.targets[:, 1:].flatten())
        )
    blind = torch.log(torch.tensor(float(len(tokenizer))))
    assert losses[0] < 0.9 * blind
    assert losses[1] < 0.95 * losses[0]


def test_padding_on_the_left_does_not_change_greedy_replies(pair: Pair) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pair.instruct, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(pair.instruct)
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        for prompt in (
            "calc a 7 b -1 c -8 d 3 e 0",
            "last ant bee",
            "find a in a owl b pig | upper",
        )
    ]
    options = {"max_new_tokens": 12, "do_sample": False}
    together = tokenizer(texts, padding=True, return_tensors="pt")
    batched = model.generate(**together, **options)[:, together["input_ids"].shape[1] :]
    for text, reply in zip(texts, batched, strict=True):
        single = tokenizer(text, return_tensors="pt")
        alone = model.generate(**single, **options)[0, single["input_ids"].shape[1] :]
        assert tokenizer.decode(reply, skip_special_tokens=True) == tokenizer.decode(
            alone, skip_special_tokens=True
        )


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_the_same_seed_makes_the_same_models_also_when_killed(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(*_: object) -> None:
        raise KeyboardInterrupt

    folder = tmp_path / "again"
    with monkeypatch.context() as patch:
        patch.setattr(pair_module, "_make_instruct", kill)
        with pytest.raises(KeyboardInterrupt):
            make_pair(folder, seed=3, steps_scale=SCALE)
    assert not folder.exists()
    with monkeypatch.context() as patch:
        patch.setattr(pair_module, "_make_base", kill)
        again = make_pair(folder, seed=3, steps_scale=SCALE)
    for first, second in ((pair.base, again.base), (pair.instruct, again.instruct)):
        for path in first.iterdir():
            assert path.read_bytes() == (second / path.name).read_bytes(), path.name
    assert torch.get_num_threads() == 2


def test_another_seed_does_not_go_on_with_an_interrupted_pair(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(*_: object) -> None:
        raise KeyboardInterrupt

    folder = tmp_path / "pair"
    with monkeypatch.context() as patch:
        patch.setattr(pair_module, "_make_instruct", kill)
        with pytest.raises(KeyboardInterrupt):
            make_pair(folder, seed=4, steps_scale=SCALE)
    other = make_pair(folder, seed=3, steps_scale=SCALE)
    ours, theirs = (load_file(made.base / "model.safetensors") for made in (pair, other))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_pair_that_is_there_is_kept_and_another_is_not_replaced(pair: Pair) -> None:
    before = {path: path.stat().st_mtime_ns for path in pair.base.iterdir()}
    assert make_pair(pair.base.parent, seed=3, steps_scale=SCALE) == pair
    assert before == {path: path.stat().st_mtime_ns for path in pair.base.iterdir()}
    with pytest.raises(InputError, match="already exists"):
        make_pair(pair.base.parent, seed=4, steps_scale=SCALE)


def test_noise_can_be_set_field_by_field() -> None:
    rows = task_rows(Random(14), 50, Noise(full_steps=0.0))
    assert all(re.fullmatch(r"answer \d", row["response"]) for row in rows)
