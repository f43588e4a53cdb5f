"""`python -m benchmarks readme`: the performance section of README.md, from folders of results.

Nothing in that section is written by hand; a test compares it with the stored results.
"""

from collections.abc import Sequence
from pathlib import Path

from benchmarks import goals, report

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
BEGIN = "<!-- made by python -m benchmarks readme -->"
END = "<!-- end -->"
NOT_ON_A_GPU = """**Not measured on a GPU yet.** `python -m benchmarks.gpu_suite` does it in one
call: tests, accuracy, times beside the peers, whole stages."""
MOST_CASES = 4


def update(folders: Sequence[Path]) -> None:
    """Puts the section of these results, or of the newest stored ones, in README.md."""
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    README.write_text(before + section(folders or newest()) + after, encoding="utf-8")


def newest() -> list[Path]:
    """The latest results of a GPU, then those of a CPU, as far as there are any."""
    found: dict[bool, tuple[str, Path]] = {}
    for file in RESULTS.glob(f"*/{report.RESULTS_FILE}"):
        environment = report.read_results(file.parent).environment
        place = environment["device"].startswith("CPU")
        found[place] = max(found.get(place, ("", file.parent)), (environment["date"], file.parent))
    return [found[place][1] for place in sorted(found)]


def section(folders: Sequence[Path]) -> str:
    """The section, markers included."""
    results = [report.read_results(folder) for folder in folders]
    parts = [BEGIN]
    if all(result.environment["device"].startswith("CPU") for result in results):
        parts.append(NOT_ON_A_GPU)
    for result in results:
        parts.append(_device(result))
    return "\n\n".join([*parts, END])


def _device(results: report.Results) -> str:
    environment = results.environment
    where = f"benchmarks/results/{results.output.name}"
    lines = [
        f"{environment['device']}, torch {environment['torch']}, {environment['date'][:10]} "
        f"([all results]({where}/results.md)); in turns in one process, correct before timed:"
    ]
    if not environment["device"].startswith("CPU"):
        lines += ["", *report.plain_table(goals.judge(results.rows))]
    for label in list(dict.fromkeys(row["case"] for row in results.rows))[:MOST_CASES]:
        timed = [row for row in results.rows if row["case"] == label and "time_ms" in row]
        lines += ["", f"{label}:", "", *report.plain_table([_short_row(row) for row in timed])]
    stages = [row for row in results.tables.get("end to end", []) if "ms" in row]
    models = {row["model"] for row in stages if row["stage"] == "annotate"}
    shown = [row for row in stages if row["model"] in models or row["stage"] == "merge"]
    if shown:
        lines += ["", "Whole stages:", "", *report.plain_table(shown)]
    return "\n".join(lines)


def _short_row(row: report.Row) -> report.Row:
    return {
        "": row["provider"],
        "ms": row["time_ms"],
        "× floor": row.get("ratio_floor"),
        "extra MB": row["peak_mb"],
        "error": max((row[name] for name in row if name.startswith("error_")), default=None),
    }
