"""`python -m benchmarks` measures, `compare A B` compares, `readme` updates README and docs."""

import argparse
import time
from pathlib import Path

import torch

from benchmarks import figures, readme, report
from benchmarks.cases import cpu_cases, gpu_cases
from benchmarks.measure import add_case
from benchmarks.turns import LOST, Settings


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/<device>-<date>")
    parser.add_argument("--overwrite", action="store_true", help="replace results in --output")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="few cases; toy sizes on a CPU")
    parser.add_argument("--seconds", type=float, default=4.0, help="of timing per case")
    parser.add_argument("--stage-seconds", type=float, default=30.0, help="for all whole stages")
    parser.add_argument("--budget-minutes", type=float, help="start no new case after this")
    commands = parser.add_subparsers(dest="command")
    comparison = commands.add_parser("compare", help="what changed between two results")
    comparison.add_argument("before", type=Path)
    comparison.add_argument("after", type=Path)
    section = commands.add_parser("readme", help="make README's and docs' tables from results")
    section.add_argument("folders", type=Path, nargs="*", help="default: the newest stored ones")
    arguments = parser.parse_args()
    if arguments.command == "compare":
        print(report.compare(arguments.before, arguments.after))
        return
    if arguments.command == "readme":
        readme.update(arguments.folders)
        return
    run(arguments)


def add_stages(results: report.Results, device: torch.device, seconds: float) -> None:
    """Annotation, training steps and merge, on real architectures."""
    from benchmarks import end_to_end  # needs gift's packages, unlike the rest

    table = results.tables.setdefault("end to end", [])
    for row in end_to_end.measure_all("gpu" if device.type == "cuda" else "cpu", device, seconds):
        table.append(row)
        results.save()


def run(arguments: argparse.Namespace) -> None:
    """Measures the cases one by one and writes all results after each."""
    device = torch.device(arguments.device)
    cases = cpu_cases(arguments.quick) if device.type == "cpu" else gpu_cases(arguments.quick)
    rounds = (1, 3) if arguments.quick else (5, 60)
    if device.type == "cpu" and not arguments.quick:
        rounds = (3, 60)
    settings = Settings(device, seconds=arguments.seconds, rounds=rounds)
    environment = report.environment(device)
    if arguments.quick and device.type == "cpu":
        environment["dry_run"] = True  # toy sizes are not shown in README
    output = report.new_folder(arguments.output, environment, arguments.overwrite)
    results = report.Results(output, environment)
    start = time.monotonic()
    for number, case in enumerate(cases):
        minutes = (time.monotonic() - start) / 60
        if arguments.budget_minutes is not None and minutes > arguments.budget_minutes:
            print(f"the budget ended; {len(cases) - number} of {len(cases)} cases were not begun")
            break
        print(f"[{number + 1}/{len(cases)}] {case.label}", flush=True)
        if not add_case(results, case, settings):
            raise SystemExit(f"{case.label} {LOST}: the results so far are in {output}")
    if not arguments.quick:
        print("whole stages", flush=True)
        add_stages(results, device, arguments.stage_seconds)
    figures.plot(output, results.rows)
    print((output / "results.md").read_text())


if __name__ == "__main__":
    main()
