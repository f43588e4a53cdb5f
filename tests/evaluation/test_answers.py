"""Answers are extracted by the pattern and compared as documented, and never hang the program."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import gift.evaluation.answers
from gift.errors import InputError
from gift.evaluation.answers import MathChecker, Verdict, compile_pattern, extract, open_checker

ROOT = Path(gift.evaluation.answers.__file__).parents[2]
HANGS = r"\boxed{9^{9^{9^{9^9}}}}"


@pytest.mark.parametrize(
    ("pattern", "reply", "expected"),
    [
        (r"answer (\S+)", "answer 3 ; no , answer 8 ; done", "8"),
        (r"answer (\S+)", "no idea", None),
        (r"^answer: (.*)$", "first\nanswer: 4 apples\nlast", "4 apples"),
        (r"(yes)|no", "yes or no", None),
        (None, " the whole\nreply ", " the whole\nreply "),
    ],
    ids=["last match", "no match", "one line", "group without part", "no pattern"],
)
def test_extraction_takes_the_first_group_of_the_last_match(pattern, reply, expected):
    assert extract(compile_pattern(pattern), reply) == expected


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("answer (", "--answer-pattern: .* not a regular expression"), ("answer .*", "has no group")],
)
def test_a_pattern_that_cannot_work_is_refused(pattern, message):
    with pytest.raises(InputError, match=message):
        open_checker("exact", pattern, 1.0)


@pytest.mark.parametrize(
    ("pattern", "reply", "answer", "verdict"),
    [
        (None, " two \n words", "two  words", Verdict(True, "two words")),
        (None, "two words more", "two words", Verdict(False, "two words more")),
        (None, "Two words", "two words", Verdict(False, "Two words")),
        (r"is (.*)", "it is  4 5", "4 5", Verdict(True, "4 5")),
        (r"is (.*)", "4 5", "4 5", Verdict(False, None)),
    ],
    ids=["white space", "longer", "case", "pattern", "no match"],
)
def test_exact_compares_text_but_for_white_space(pattern, reply, answer, verdict):
    with open_checker("exact", pattern, 1.0) as checker:
        assert checker.check(reply, answer) == verdict


def test_math_compares_meaning_of_whole_replies():
    with open_checker("math", None, 10.0) as checker:
        assert checker.check(r"So it is $\boxed{\frac{1}{2}}$.", "0.5").correct
        assert checker.check(r"Hence $x=7$, and $\boxed{p - q}$.", "-q + p").correct
        assert checker.check("First 3, then 25", "025").correct
        assert not checker.check(r"So it is $\boxed{\frac{1}{3}}$.", "0.5").correct
        assert checker.check(r"$2$, no: $\boxed{\frac{1}{2}}$.", "2").extracted == r"\frac{1}{2}"
        assert checker.check("no number at all", "3") == Verdict(False, None)
        assert checker.check("", "3") == Verdict(False, None)


def test_math_reads_an_extracted_answer_as_one_expression():
    with open_checker("math", "answer is (.*)", 10.0) as checker:
        assert checker.check("answer is 6-5i", "6 - 5i") == Verdict(True, "6-5i")
        # Read as running text it would be the number 5.
        assert not checker.check("answer is 6-5i", "5").correct
        assert checker.check(r"answer is $\frac12$.", "0.5").correct
        assert checker.check("answer is **12**.", "12").correct
        assert checker.check("answer is Evelyn", r"\text{Evelyn}").correct
        assert not checker.check("answer is Ada", r"\text{Evelyn}").correct
        assert checker.check("0.5", "0.5") == Verdict(False, None)


def test_answers_that_math_verify_cannot_read_are_known_and_compared_as_text():
    with open_checker("math", "is (.*)", 10.0) as checker:
        assert checker.can_read(r"\frac{14}{3}")
        assert not checker.can_read("}")
        assert checker.check("it is }", "}").correct
        assert not checker.check("it is 3", "}").correct


def test_an_answer_that_hangs_is_given_up_and_the_next_is_checked():
    with MathChecker(None, 2.0) as checker:
        assert checker.check("1", "1").correct
        before = _worker_id(checker)
        start = time.monotonic()
        assert checker.check(HANGS, "3") == Verdict(False, None, "timeout")
        assert time.monotonic() - start < 30
        assert not _alive(before)
        assert checker.check("so 3", "3").correct


def test_a_worker_that_dies_is_a_crash_and_the_next_answer_is_checked():
    with MathChecker(None, 10.0) as checker:
        assert checker.check("1", "1").correct
        os.kill(_worker_id(checker), signal.SIGKILL)
        assert checker.check("1", "1") == Verdict(False, None, "crash")
        assert checker.check("1", "1").correct


def test_texts_of_every_kind_keep_questions_and_verdicts_in_step():
    with MathChecker(None, 10.0) as checker:
        for text in (r"\boxed{\frac{}", "\\boxed{\u2028 ¿ 3 \x00 \\foo{}}", "\n\n1\n", '"}{'):
            checker.check(text, "1")
        assert checker.check("so 3", "3") == Verdict(True, "3")


def test_what_libraries_print_does_not_mix_with_the_verdicts(tmp_path, monkeypatch):
    (tmp_path / "math_verify.py").write_text(
        "import os, sys\n"
        "def parse(text, **options):\n"
        "    print('noise')\n"
        "    os.write(1, b'noise\\n')\n"
        "    return [text, text]\n"
        "def verify(gold, target, **options):\n"
        "    print('noise', flush=True)\n"
        "    return gold == target\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with MathChecker(None, 10.0) as checker:
        assert checker.check("3", "3") == Verdict(True, "3")
        assert checker.check("4", "3") == Verdict(False, "4")


def test_a_worker_that_cannot_start_says_so(tmp_path, monkeypatch, capfd):
    (tmp_path / "math_verify.py").write_text("raise ImportError('no parser')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with (
        MathChecker(None, 10.0) as checker,
        pytest.raises(RuntimeError, match="did not start"),
    ):
        checker.check("1", "1")
    assert "no parser" in capfd.readouterr().err


def test_math_works_and_times_out_outside_the_main_thread():
    verdicts = []

    def check() -> None:
        with MathChecker(None, 2.0) as checker:
            verdicts.extend([checker.check(HANGS, "3"), checker.check("3", "3")])

    thread = threading.Thread(target=check)
    thread.start()
    thread.join()
    assert verdicts == [Verdict(False, None, "timeout"), Verdict(True, "3")]


def test_no_process_stays_behind():
    with MathChecker(None, 10.0) as checker:
        checker.check("1", "1")
        worker = _worker_id(checker)
        assert _alive(worker)
    assert not _alive(worker)


def test_a_hanging_worker_ends_by_itself_when_its_parent_is_killed():
    script = (
        "from gift.evaluation.answers import MathChecker\n"
        "checker = MathChecker(None, 2.0)\n"
        "checker.check('1', '1')\n"
        "checker._timeout = checker._worker._timeout = 1000\n"
        "print(checker._worker._process.pid, flush=True)\n"
        f"checker.check({HANGS!r}, '3')\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    time.sleep(0.5)  # for the question to arrive
    parent.kill()
    parent.wait()
    parent.stdout.close()
    try:
        for _ in range(200):
            if not _alive(worker):
                return
            time.sleep(0.1)
    finally:
        if _alive(worker):
            os.kill(worker, signal.SIGKILL)
    pytest.fail("the worker was still running 20 s after its parent's death")


def test_without_math_verify_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(InputError, match=r"--check math: .*gift-tuning\[eval\]"):
        open_checker("math", None, 1.0)
    open_checker("exact", None, 1.0)


def _worker_id(checker: MathChecker) -> int:
    assert checker._worker is not None
    return checker._worker._process.pid


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    # An orphan that nobody has reaped is dead too.
    status = Path(f"/proc/{process}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"
