"""Synthetic data for tiny models: running-digit programs, puzzles, and noisy references.

A program starts from one digit and adds to it, `calc a 7 b -1 c -8`; the worked answer is
`b 7 -1 = 6 ; c 6 -8 = 8 ; answer 8`. A result outside 0…9 has two conventions: wrap around
(modulo 10) or stop at the border. The task wants wrap-around. Documents use it in fewer programs
than post-training conversations do, so the instruct model knows more of the task than the base.
There are also list puzzles and key-value look-ups, both with format constraints after `|`; they
measure whether the model still follows instructions.

All randomness comes from the `random.Random` that the caller passes.
"""

import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any, Literal, get_args

from gift.storage.files import replacing

Convention = Literal["wrap", "stop"]
Row = dict[str, Any]
Constraint = Literal["brackets", "upper", "twice", "end with done", "begin with sure"]
PuzzleKind = Literal["copy", "reverse", "first", "last", "find"]
CONSTRAINTS: tuple[Constraint, ...] = get_args(Constraint)
# The constraints that can be applied to a worked program, which consists of digits and steps.
PROGRAM_CONSTRAINTS: tuple[Constraint, ...] = ("brackets", "end with done", "begin with sure")
MARKS = {"brackets": "[", "end with done": "done", "begin with sure": "sure"}
PUZZLES: tuple[PuzzleKind, ...] = get_args(PuzzleKind)

NAMES = ("a", "b", "c", "d", "e")
DIGITS = tuple(str(digit) for digit in range(10))
NEGATIVES = tuple(str(-digit) for digit in range(1, 10))
FILLERS = ("well", "so", "ok", "now", "hmm", "right", "let", "see")
ITEMS = (
    *("ant", "bee", "cat", "dog", "elk", "fox", "gnu", "hen"),
    *("ibis", "jay", "koi", "lark", "mole", "newt", "owl", "pig"),
)
# What the constraint `upper` makes of the words that puzzles answer with.
UPPER_WORDS = tuple(word.upper() for word in (*NAMES, *ITEMS))
SEPARATOR = ":"
_STEP = r"\d -?\d = \d"
# Patterns for `gift evaluate`: a program's answer; the name of the last of its worked steps, where
# they are all there and nothing else; the mark of the constraint that the reply keeps.
ANSWER = r"answer (\d)$"
WORKED = rf"^b {_STEP} ; c {_STEP} ; (?:d {_STEP} ; (?=e))?(d|e) {_STEP} ; answer \d$"
MARK = r"(^\[(?= .* \]$)|^sure(?= )|(?<= )done$)"
VOCABULARY = (
    *("user", "assistant", "calc", "answer", "=", ";", SEPARATOR, "|", "in"),
    *(*NAMES, *DIGITS, *NEGATIVES, *PUZZLES),
    *("brackets", "upper", "twice", "end", "begin", "with", "done", "sure", "[", "]"),
    *(*FILLERS, *ITEMS, *UPPER_WORDS),
)


@dataclass(frozen=True)
class Noise:
    """Noise of references compared with clean worked steps; every field is a probability.

    `full_steps` and `some_steps` are shares of replies, the rest are answers only. `filler` is per
    piece (a step or the answer), `wrong_convention` per step that leaves 0…9, `slip` per step.
    """

    full_steps: float = 1.0
    some_steps: float = 0.0
    filler: float = 0.0
    wrong_convention: float = 0.0
    slip: float = 0.0


CLEAN = Noise()
DOCUMENT_NOISE = Noise(full_steps=0.70, some_steps=0.15, filler=0.20, slip=0.03)
TASK_NOISE = Noise(
    full_steps=1 / 3, some_steps=1 / 3, filler=0.50, wrong_convention=0.25, slip=0.10
)


@dataclass(frozen=True)
class Mixture:
    """The composition of documents and conversations; every field is a probability or a noise."""

    document_programs: float = 0.55
    document_wrap: float = 0.30
    document_chat: float = 0.30
    document_constraints: float = 0.30
    document_noise: Noise = DOCUMENT_NOISE
    conversation_programs: float = 0.40
    conversation_wrap: float = 0.60
    puzzle_constraints: float = 0.60
    program_constraints: float = 0.25
    replay: float = 0.10


@dataclass(frozen=True)
class Sample:
    """A prompt and its reply; `chat` says whether it is written as a conversation."""

    prompt: str
    reply: str
    chat: bool = True

    def messages(self) -> list[dict[str, str]]:
        """The sample as chat messages."""
        return [
            {"role": "user", "content": self.prompt},
            {"role": "assistant", "content": self.reply},
        ]


@dataclass(frozen=True)
class Program:
    """A starting digit and the changes made to it, each in -9…9."""

    start: int
    changes: tuple[int, ...]

    def prompt(self) -> str:
        """The program as text."""
        values = (self.start, *self.changes)
        return " ".join(
            ["calc", *(f"{name} {value}" for name, value in zip(NAMES, values, strict=False))]
        )

    def result(self, convention: Convention = "wrap") -> int:
        """The last digit under one convention."""
        digit = self.start
        for change in self.changes:
            digit = _within(digit + change, convention)
        return digit


def _within(value: int, convention: Convention) -> int:
    return value % 10 if convention == "wrap" else min(max(value, 0), 9)


def draw_program(rng: Random, values: tuple[int, int]) -> Program:
    """A program with a number of values between the two given, inclusive."""
    length = rng.randint(*values)
    return Program(rng.randint(0, 9), tuple(rng.randint(-9, 9) for _ in range(length - 1)))


def write_steps(
    program: Program, convention: Convention, rng: Random, noise: Noise = CLEAN
) -> tuple[str, ...]:
    """The pieces of a reply, steps then answer, as an annotator with this noise writes them.

    A wrong step is not corrected later, so the answer follows from the steps.
    """
    other: Convention = "stop" if convention == "wrap" else "wrap"
    digit, pieces = program.start, []
    for name, change in zip(NAMES[1:], program.changes, strict=False):
        total = digit + change
        wrong = not 0 <= total <= 9 and rng.random() < noise.wrong_convention
        result = _within(total, other if wrong else convention)
        if rng.random() < noise.slip:
            result = (result + rng.randint(1, 9)) % 10
        pieces.append(f"{name} {digit} {change} = {result}")
        digit = result
    style = rng.random()
    if style >= noise.full_steps + noise.some_steps:
        pieces = []
    elif style >= noise.full_steps:
        kept = sorted(rng.sample(range(len(pieces)), rng.randint(0, len(pieces) - 1)))
        pieces = [pieces[index] for index in kept]
    pieces.append(f"answer {digit}")
    return tuple(
        f"{rng.choice(FILLERS)} {piece}" if rng.random() < noise.filler else piece
        for piece in pieces
    )


def apply_constraint(reply: str, constraint: Constraint | None) -> str:
    """The reply in the wanted format."""
    if constraint == "brackets":
        return f"[ {reply} ]"
    if constraint == "upper":
        return reply.upper()
    if constraint == "twice":
        return f"{reply} {reply}"
    if constraint == "end with done":
        return f"{reply} done"
    if constraint == "begin with sure":
        return f"sure {reply}"
    return reply


def _with_constraint(prompt: str, constraint: Constraint | None) -> str:
    return prompt if constraint is None else f"{prompt} | {constraint}"


def draw_puzzle(rng: Random, constraint: Constraint | None) -> Sample:
    """A list puzzle or look-up with its exact answer in the wanted format."""
    kind = rng.choice(PUZZLES)
    if kind == "find":
        count = rng.randint(2, 3)
        keys, values = rng.sample(NAMES, count), rng.sample(ITEMS, count)
        wanted = rng.randrange(count)
        pairs = " ".join(f"{key} {value}" for key, value in zip(keys, values, strict=True))
        prompt, reply = f"find {keys[wanted]} in {pairs}", f"{keys[wanted]} = {values[wanted]}"
    else:
        items = rng.sample(ITEMS, rng.randint(2, 3))
        answers = {"copy": items, "reverse": items[::-1], "first": items[:1], "last": items[-1:]}
        prompt, reply = f"{kind} {' '.join(items)}", " ".join(answers[kind])
    return Sample(_with_constraint(prompt, constraint), apply_constraint(reply, constraint))


def _draw_constraint(
    rng: Random, share: float, choices: tuple[Constraint, ...] = CONSTRAINTS
) -> Constraint | None:
    return rng.choice(choices) if rng.random() < share else None


def draw_copy_drill(rng: Random) -> Sample:
    """A list of words and its copy, to train induction heads."""
    words = rng.sample((*ITEMS, *DIGITS, *NEGATIVES, *NAMES), rng.randint(4, 10))
    return Sample(" ".join(words), " ".join(words), chat=False)


def draw_primer(rng: Random, mixture: Mixture) -> Sample:
    """A copying drill or a clean program: the base model's first training data."""
    if rng.random() < 0.5:
        return draw_copy_drill(rng)
    program, convention = draw_program(rng, (2, 5)), _draw_convention(rng, mixture.document_wrap)
    reply = " ; ".join(write_steps(program, convention, rng))
    return Sample(program.prompt(), reply, chat=rng.random() < mixture.document_chat)


def _draw_convention(rng: Random, wrap: float) -> Convention:
    return "wrap" if rng.random() < wrap else "stop"


def draw_document(rng: Random, mixture: Mixture) -> Sample:
    """A document: a noisy program, or a puzzle."""
    chat = rng.random() < mixture.document_chat
    if rng.random() < mixture.document_programs:
        program = draw_program(rng, (2, 5))
        convention = _draw_convention(rng, mixture.document_wrap)
        steps = write_steps(program, convention, rng, mixture.document_noise)
        return Sample(program.prompt(), " ; ".join(steps), chat)
    puzzle = draw_puzzle(rng, _draw_constraint(rng, mixture.document_constraints))
    return replace(puzzle, chat=chat)


def draw_conversation(rng: Random, mixture: Mixture) -> Sample:
    """A post-training sample: a clean program or a puzzle, sometimes a document."""
    if rng.random() < mixture.replay:
        return draw_document(rng, mixture)
    if rng.random() < mixture.conversation_programs:
        program = draw_program(rng, (2, 5))
        convention = _draw_convention(rng, mixture.conversation_wrap)
        constraint = _draw_constraint(rng, mixture.program_constraints, PROGRAM_CONSTRAINTS)
        reply = " ; ".join(write_steps(program, convention, rng))
        return Sample(
            _with_constraint(program.prompt(), constraint), apply_constraint(reply, constraint)
        )
    return draw_puzzle(rng, _draw_constraint(rng, mixture.puzzle_constraints))


def task_rows(rng: Random, count: int, noise: Noise = TASK_NOISE) -> list[Row]:
    """The task set: programs of four or five values with reference answers of the given noise.

    `correct` says whether a reference's answer is right.
    """
    rows: list[Row] = []
    for program in distinct_programs(rng, count):
        pieces = write_steps(program, "wrap", rng, noise)
        correct = pieces[-1].endswith(f"answer {program.result()}")
        row = {"instruction": program.prompt(), "response": " ; ".join(pieces), "correct": correct}
        rows.append(row)
    return rows


def distinct_programs(rng: Random, count: int, taken: Collection[str] = ()) -> list[Program]:
    """Programs of four or five values, none of whose prompts is in `taken`."""
    found: dict[str, Program] = {}
    while len(found) < count:
        program = draw_program(rng, (4, 5))
        if program.prompt() not in taken:
            found.setdefault(program.prompt(), program)
    return list(found.values())


def task_questions(programs: Iterable[Program]) -> list[Row]:
    """Questions for the programs' results; `ANSWER` finds them in a reply."""
    return [{"instruction": p.prompt(), "answer": str(p.result())} for p in programs]


def style_questions(programs: Iterable[Program]) -> list[Row]:
    """Questions that test worked steps, right or wrong; `WORKED` finds the last step."""
    return [{"instruction": p.prompt(), "answer": NAMES[len(p.changes)]} for p in programs]


def constraint_questions(rng: Random, programs: Iterable[Program]) -> list[Row]:
    """Questions that test the format, whatever the answer; `MARK` finds a reply's format."""
    rows = []
    for program in programs:
        constraint = rng.choice(PROGRAM_CONSTRAINTS)
        prompt = _with_constraint(program.prompt(), constraint)
        rows.append({"instruction": prompt, "answer": MARKS[constraint]})
    return rows


def puzzle_questions(rng: Random, count: int, constrained: float = 0.6) -> list[Row]:
    """Questions of the other tasks with exact replies, a share of them with a constraint."""
    puzzles = (draw_puzzle(rng, _draw_constraint(rng, constrained)) for _ in range(count))
    return [{"instruction": puzzle.prompt, "answer": puzzle.reply} for puzzle in puzzles]


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Writes a task set or questions as JSON lines, atomically."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
