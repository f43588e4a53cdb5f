"""`python -m benchmarks.gpu_suite`: everything that needs a GPU, in one call, most important first.

Our kernels compiled by parallel processes, tests natively, stored results, accuracy against
float64, benchmarks against all peers, whole stages on real architectures, candidates for our tile
sizes, compute-sanitizer; then more benchmarks until the budget ends, and torch.compile's ways.
Results are written after every step, so a killed run loses nothing. The summary comes
last. If a provider makes the device unusable, or does not end, the suite continues without it in a
new process.
`--dry-run` runs all of it on a CPU at toy sizes; its times are meaningless.
"""

import argparse
import importlib.util
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks import figures, goals, report
from benchmarks.cases import Case, CECase, accuracy_cases, gpu_cases, toy_cases
from benchmarks.data import make_inputs
from benchmarks.gpu_summary import failures, summary, told
from benchmarks.measure import add_case, check, gate_truth, measure_case, outputs_of
from benchmarks.native_tests import pytest_row, run_limited
from benchmarks.providers import floors, own_providers, providers_of
from benchmarks.suite import GRACE_SECONDS, Suite
from benchmarks.turns import LOST, Settings, device_works, failure, free

GOLDEN_TESTS = ("tests/linear_ce/test_ce_golden.py", "tests/lora_merge/test_lora_merge.py")
KERNEL_TESTS = (
    "tests/linear_ce/test_triton_ce.py",
    "tests/linear_ce/test_triton_ce_large.py",
    "tests/linear_ce/test_triton_ce_numbers.py",
    "tests/lora_merge/test_lora_merge_kernel.py",
    "tests/lora_merge/test_lora_merge_rounding.py",
    "tests/linear_ce/test_matmul.py",
    "tests/linear_ce/test_weighted_ce.py",
    "tests/linear_ce/test_token_confidence.py",
    "tests/linear_ce/test_ce_compile.py",
    "tests/linear_ce/test_ce_costs.py",
    "tests/linear_ce/test_ce_properties.py",
)
END_TO_END_SECONDS = 90  # reserved for whole stages
SANITIZER_SECONDS = 20  # at least, per tool
CANDIDATES_SECONDS = 60  # per case, mostly spent in the compiler
COMPILED = "torch.compile"  # in the names of providers that it makes
WARM_SECONDS = 60
# After which a step is given up: it hangs, or takes more than it is worth.
CASE_SECONDS, STEP_SECONDS = 90, 45
SANITIZED = "bfloat16-triton or float32-triton"


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_suite", description=__doc__)
    parser.add_argument("--budget-minutes", type=float, default=6.0)
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/<device>-<date>")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, at toy sizes")
    parser.add_argument("--compile", metavar="I/N", help="only compile each N-th case, from I")
    parser.add_argument("--commit", help="what is measured, where git does not know it")
    parser.add_argument("--resume", action="store_true", help="continue the results in --output")
    arguments = parser.parse_args()
    parts = [part for part in arguments.parts.split(",") if part]
    if unknown := sorted(set(parts) - set(PARTS)):
        parser.error(f"--parts: unknown {', '.join(unknown)}; choose from {', '.join(PARTS)}")
    if arguments.resume and arguments.output is None:
        parser.error("--resume: give the folder of the results as --output")
    if arguments.dry_run:
        if os.environ.get("TRITON_INTERPRET") != "1":
            # Triton asks when it is imported, which torch may have done by now.
            os.environ["TRITON_INTERPRET"] = "1"
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    elif not torch.cuda.is_available():
        parser.error("no CUDA device; --dry-run walks through the suite on a CPU")
    device = torch.device("cpu" if arguments.dry_run else "cuda")
    if arguments.compile:
        first, count = map(int, arguments.compile.split("/"))
        compile_cases(cases_to_warm(parts, arguments.dry_run)[first::count], device)
        return
    # Whoever ends this process gets a summary, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    suite = new_suite(arguments, parts, device)
    try:
        for name in parts:
            run_part(suite, name)
    finally:
        finish(suite)
    if broken := failures(suite.results, measured="benchmarks" in parts):
        print(f"{len(broken)} failures", *map(told, broken[:5]), sep="\n- ")
        sys.exit(1)


def new_suite(arguments: argparse.Namespace, parts: list[str], device: torch.device) -> Suite:
    """The results, new or resumed, and what the parts need."""
    environment = report.environment(device)
    environment["commit"] = arguments.commit or environment["commit"]
    output = arguments.output
    if arguments.dry_run:
        # Its times mean nothing: never among the stored results, nor in README.
        environment["dry_run"] = True
        output = output or Path(tempfile.mkdtemp(prefix="gpu_suite_"))
    if arguments.resume:
        results = report.read_results(output)
    else:
        results = report.Results(report.new_folder(output, environment), environment)
    settings = Settings(device, seconds=4.0, rounds=(5, 60))
    if arguments.dry_run:
        settings = Settings(device, seconds=0.0, rounds=(1, 1))
    budget = 60 * arguments.budget_minutes
    return Suite(results, settings, time.monotonic(), budget, arguments.dry_run, parts)


def finish(suite: Suite) -> None:
    """Judges the goals, prints the summary and draws the figures."""
    results = suite.results
    results.tables["goals"] = [
        *goals.judge(results.rows),
        *goals.judge_host(results.tables.get("host time", [])),
        *goals.judge_stages(results.tables.get("end to end", [])),
    ]
    results.save()
    print(summary(results), flush=True)
    try:
        figures.plot(results.output, results.rows)
    except Exception as error:  # nobody should lose a run's exit status for want of a font
        print(f"figures not made: {failure(error)}")


def run_part(suite: Suite, name: str) -> None:
    """Runs a part unless the budget has ended; an exception becomes a row in the results."""
    suite.part = name
    if suite.left() <= 0:
        suite.add("not run", {"part": name, "reason": "the budget ended"})
        return
    print(f"== {name}, {suite.left():.0f} s left", flush=True)
    try:
        PARTS[name](suite)
    except Exception as error:  # GPU time is short: a failing part must not stop the others
        suite.add("not run", {"part": name, "reason": failure(error)})
    if not device_works(suite.settings.device):
        suite.go_on_in_a_new_process()


def run_warm(suite: Suite) -> None:
    """Fills Triton's cache from several processes, because one process compiles on one core."""
    cases = cases_to_warm(suite.parts, suite.dry_run)
    count = min(len(cases), 1 if suite.dry_run else 12, os.cpu_count() or 1)
    options = ["--dry-run"] if suite.dry_run else []
    command = [sys.executable, "-m", "benchmarks.gpu_suite", *options]
    command += ["--parts", ",".join(suite.parts), "--compile"]
    begun, limit = time.monotonic(), min(WARM_SECONDS, suite.left())
    with ThreadPoolExecutor(count) as pool:
        calls = [[*command, f"{first}/{count}"] for first in range(count)]
        found = list(pool.map(lambda call: run_limited(call, limit), calls))
    failed = [f"failed: rc {code}: {text[-200:]}" for code, text in found if code]
    # What did not get ready compiles later.
    stopped = [f"stopped after {limit:.0f} s" for code, _ in found if code is None]
    status = [*failed, *stopped, "ok"][0]
    seconds = round(time.monotonic() - begun, 1)
    suite.add("compiled", {"processes": count, "status": status, "seconds": seconds})


def compile_cases(cases: Sequence[Case], device: torch.device) -> None:
    """Our kernels once for each case, at its own size."""
    for case in cases:
        try:
            inputs = make_inputs(case, device)
            for provider in providers_of(case):
                if provider.name.startswith("gift triton"):
                    outputs_of(provider, case, inputs)
            del inputs
        except torch.OutOfMemoryError:  # the other processes hold it; this case compiles later
            free(device)


def cases_to_warm(parts: Sequence[str], dry_run: bool) -> list[Case]:
    """What the first parts will run."""
    if dry_run:
        return _toy()[:1]
    cases: list[Case] = gpu_cases(quick=True) if "benchmarks" in parts else []
    return [*cases, *(accuracy_cases(dry_run) if "accuracy" in parts else [])] or gpu_cases(True)


def run_tests(suite: Suite) -> None:
    """Stored results, then the kernels' tests, natively where there is a GPU."""
    if suite.dry_run:
        selected = [GOLDEN_TESTS[0], "-k", "ce_weights and float32 and confidence"]
        suite.add("tests", pytest_row("stored results", selected, 60, suite.results.output))
        return
    alone = "benchmarks" not in suite.parts  # `make test-gpu`: the tests get the whole budget
    workers = ["-n", str(min(14, os.cpu_count() or 1))] if _has("xdist") else []
    for name, files, share in (
        ("stored results", GOLDEN_TESTS, 0.1),
        ("kernels", KERNEL_TESTS, 0.25),
    ):
        limit = suite.left() if alone else min(share * suite.seconds, suite.left())
        row = pytest_row(name, [*workers, *files], limit, suite.results.output)
        suite.add("tests", row)


def run_accuracy(suite: Suite) -> None:
    """Errors of the Triton kernels and of full logits in the same dtype, against float64."""
    ours = next(provider for provider in own_providers() if provider.name == "gift triton")
    cases = accuracy_cases(suite.dry_run)
    for number, case in enumerate(cases):
        if suite.left() <= 0:
            _not_begun(suite, len(cases) - number)
            return
        with suite.limited(STEP_SECONDS):
            inputs, truth, baseline_errors = gate_truth(case, suite.settings)
            status, errors = check(ours, case, inputs, truth, baseline_errors)
        del inputs, truth
        suite.add(
            "accuracy against float64",
            *(
                {
                    "case": case.label,
                    "of": name,
                    "gift triton": error,
                    "full logits": baseline_errors[name],
                    "verdict": status,
                }
                for name, error in (errors or dict.fromkeys(baseline_errors, float("nan"))).items()
            ),
        )
        if not device_works(suite.settings.device):
            return


def run_benchmarks(suite: Suite) -> None:
    """The most important cases, against all peers and the lower bounds."""
    keep = END_TO_END_SECONDS if "end_to_end" in suite.parts and not suite.dry_run else 0
    _run_cases(suite, _toy() if suite.dry_run else gpu_cases(quick=True), keep)


def run_more(suite: Suite) -> None:
    """All other cases."""
    if not suite.dry_run:
        _run_cases(suite, gpu_cases()[len(gpu_cases(quick=True)) :])


def _run_cases(suite: Suite, cases: Sequence[Case], keep: float = 0) -> None:
    """Measures the cases not done before a device was lost, while over `keep` seconds are left."""
    results = suite.results
    lost = {row["provider"] for row in results.rows if LOST in row["status"]}
    done = {row["case"] for row in results.rows if LOST not in row["status"]}
    done |= {row["part"] for row in results.tables.get("not run", [])}
    for number, case in enumerate(cases):
        if case.label in done:
            continue
        if suite.left() <= keep:
            _not_begun(suite, len(cases) - number)
            return
        print(f"  [{number + 1}/{len(cases)}] {case.label}", flush=True)
        providers = [one for one in providers_of(case) if one.name not in lost]
        providers = [one for one in providers if COMPILED not in one.name]
        if suite.dry_run:
            # Peers' kernels take seconds in the interpreter; tests/test_benchmarks.py runs them.
            providers = [one for one in providers if one.package in (None, "peft")]
        with suite.limited(CASE_SECONDS, case):
            works = add_case(results, case, suite.settings, providers)
        if not works:
            return


def _not_begun(suite: Suite, count: int) -> None:
    reason = f"the budget ended; {count} cases were not begun"
    suite.add("not run", {"part": suite.part, "reason": reason})


def _toy() -> list[Case]:
    wanted = ("offline weights, frozen", "token_confidence", "float32 factors")
    return [next(case for case in toy_cases() if text in case.label) for text in wanted]


def run_host(suite: Suite) -> None:
    """Time until calls return, the device working meanwhile."""
    from benchmarks import host_time

    with suite.limited(STEP_SECONDS):
        suite.add("host time", *host_time.on_device(suite.settings.device, suite.dry_run))


def run_end_to_end(suite: Suite) -> None:
    """Whole stages on real architectures, in a process of their own: they may take long to end."""
    size = "toy" if suite.dry_run else "gpu"
    seconds = min(suite.left(), max(0.35 * suite.left(), END_TO_END_SECONDS))
    command = [sys.executable, "-m", "benchmarks.end_to_end", "--size", size]
    with tempfile.TemporaryDirectory() as folder:
        command += ["--seconds", f"{seconds:.0f}", "--output", folder]
        limit = min(seconds + STEP_SECONDS, suite.left() + GRACE_SECONDS)
        code, text = run_limited(command, limit)
        if (Path(folder) / report.RESULTS_FILE).exists():
            suite.add("end to end", *report.read_results(Path(folder)).tables["end to end"])
    if code != 0:
        last = " ".join(text.split())[-200:]
        reason = f"stopped after {limit:.0f} s" if code is None else f"failed: rc {code}: {last}"
        suite.add("not run", {"part": "end_to_end", "reason": reason})


def run_candidates(suite: Suite) -> None:
    """Other settings of our kernels, in one interleaved run each for a few cases."""
    from benchmarks.candidates import candidates

    cases = [
        CECase("llama-3.1-8b", 8192),
        CECase("llama-3.1-8b", 8192, weighting="uniform", trainable=True),
        CECase("qwen2.5-0.5b", 8192),
        CECase("llama-3.1-8b", 512),
        CECase("gemma-2-9b", 8192),
    ]
    for case in [CECase("toy", 40)] if suite.dry_run else cases:
        if suite.left() <= CANDIDATES_SECONDS:
            reason = f"less than {CANDIDATES_SECONDS} s left for {case.label}"
            suite.add("not run", {"part": "candidates", "reason": reason})
            return
        providers = candidates(case, make_inputs(case, suite.settings.device))
        providers = providers[:2] if suite.dry_run else providers
        bare = [provider for provider in floors() if case.op in provider.ops]
        label = report.CANDIDATES + case.label
        with suite.limited(2 * CANDIDATES_SECONDS):
            rows = measure_case(case, suite.settings, [*providers, *bare])
        suite.results.rows += [{"case": label, **row} for row in rows]
        suite.results.save()
        if not device_works(suite.settings.device):
            return


def run_compiled(suite: Suite) -> None:
    """torch.compile's ways beside ours: last, because compiling takes a minute a case."""
    for case in [] if suite.dry_run else gpu_cases(quick=True)[:3]:
        if suite.left() <= CANDIDATES_SECONDS:
            reason = f"less than {CANDIDATES_SECONDS} s left for {case.label}"
            suite.add("not run", {"part": "compiled", "reason": reason})
            return
        providers = [
            one
            for one in providers_of(case)
            if COMPILED in one.name or one.name == "gift triton" or one.kind == "floor"
        ]
        with suite.limited(2 * CANDIDATES_SECONDS):
            rows = measure_case(case, suite.settings, providers)
        label = f"{case.label} ({COMPILED})"
        suite.results.rows += [{"case": label, **row} for row in rows]
        suite.results.save()
        if not device_works(suite.settings.device):
            return


def run_sanitizer(suite: Suite) -> None:
    """compute-sanitizer's memcheck and racecheck on the small stored cases."""
    tool = shutil.which("compute-sanitizer")
    if suite.dry_run or tool is None:
        reason = "dry run" if suite.dry_run else "compute-sanitizer is not installed"
        suite.add("not run", {"part": "sanitizer", "reason": reason})
        return
    for check_name in ("memcheck", "racecheck"):
        limit = min(60.0, suite.left())
        if limit < SANITIZER_SECONDS:
            reason = f"less than {SANITIZER_SECONDS} s left"
            suite.add("not run", {"part": check_name, "reason": reason})
            continue
        tests = ["-m", "pytest", "-p", "no:cacheprovider", GOLDEN_TESTS[0], "-k", SANITIZED]
        command = [tool, "--tool", check_name, "--error-exitcode", "9", sys.executable, *tests]
        # PyTorch's cache of memory would hide reads past the end of a tensor.
        code, text = run_limited(command, limit, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
        if code is None:
            reason = f"stopped after {limit:.0f} s"
            suite.add("not run", {"part": check_name, "reason": reason})
            continue
        last = [line for line in text.splitlines() if "SUMMARY" in line][-1:] or [f"rc {code}"]
        suite.add("compute-sanitizer", {"tool": check_name, "found": last[0].strip("= ")})


PARTS: dict[str, Callable[[Suite], None]] = {
    "warm": run_warm,
    "tests": run_tests,
    "accuracy": run_accuracy,
    "benchmarks": run_benchmarks,
    "host": run_host,
    "end_to_end": run_end_to_end,
    "candidates": run_candidates,
    "sanitizer": run_sanitizer,
    "more": run_more,
    "compiled": run_compiled,
}


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


if __name__ == "__main__":
    main()
