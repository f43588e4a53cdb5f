"""The summary of a run of the GPU suite, and its failures."""

import re

from benchmarks import report

SUMMARY_CHARACTERS = 10_000
OURS = "gift"  # the way of `end_to_end` that is ours
REQUIRED = ("tests", "accuracy")  # parts without which a run proves nothing


def summary(results: report.Results) -> str:
    """The results in at most SUMMARY_CHARACTERS characters."""
    lines = [f"# {results.environment['device']}, {results.environment['date']}"]
    for title in ("tests", "goals", "host time", "compute-sanitizer", "not run", "end to end"):
        if results.tables.get(title):
            lines += ["", f"## {title}", *report.plain_table(results.tables[title])]
    wrong = [row for row in results.tables.get("accuracy against float64", []) if is_bad(row)]
    count = len(results.tables.get("accuracy against float64", []))
    lines += ["", f"## accuracy: {count - len(wrong)} of {count} within budget"]
    lines += report.plain_table(wrong) if wrong else []
    lines += ["", "## times: ms (× lower bound)"]
    for label in dict.fromkeys(row["case"] for row in results.rows):
        timed = [row for row in results.rows if row["case"] == label]
        cells = [
            f"{row['provider']} {row['time_ms']:.3g} ({row.get('ratio_floor') or 0:.2f})"
            for row in sorted(timed, key=lambda row: row.get("time_ms", float("inf")))
            if "time_ms" in row
        ]
        cells += [f"{row['provider']} {row['status'][:40]}" for row in timed if is_bad(row)]
        lines.append(f"- {label}: {'; '.join(cells)}")
    text = "\n".join(lines)
    end = f"\n... the rest is in {results.output}/results.md"
    return text if len(text) <= SUMMARY_CHARACTERS else text[: SUMMARY_CHARACTERS - len(end)] + end


def failures(results: report.Results, measured: bool = True) -> list[report.Row]:
    """Rows of wrong results of ours, or of parts that could not run.

    With `measured`, it is also a failure if none of our providers was measured.
    """
    tables = results.tables
    broken = [row for row in tables.get("tests", []) if row["status"] != "ok" or not row["passed"]]
    broken += [row for row in tables.get("accuracy against float64", []) if is_bad(row)]
    broken += [
        row
        for row in tables.get("compute-sanitizer", [])
        if not re.search(r"\b0 errors", row["found"])
    ]
    broken += [row for row in tables.get("end to end", []) if _ours_bad(row) and row["way"] == OURS]
    broken += [row for row in results.rows if row["kind"] == "ours" and _ours_bad(row)]
    broken += [
        row
        for row in tables.get("not run", [])
        if row["reason"].startswith(("failed", "not installed")) or row["part"] in REQUIRED
    ]
    broken += [row for row in tables.get("compiled", []) if is_bad(row)]
    if measured and not any(
        row["kind"] == "ours" and row["status"] == "ok" for row in results.rows
    ):
        broken.append({"part": "benchmarks", "reason": "nothing of ours was measured"})
    return broken


def told(row: report.Row) -> str:
    """A failure in a line: what failed, and how."""
    names = (*report.NAMES, "status", "verdict", "found", "reason")
    return ", ".join(str(row[name]) for name in names if row.get(name))


def is_bad(row: report.Row) -> bool:
    return row.get("verdict", row.get("status", "")).startswith(("wrong", "failed"))


def _ours_bad(row: report.Row) -> bool:
    """A bad row of ours; "not installed" counts too, because our code is always installed."""
    return is_bad(row) or row["status"].startswith("not installed")
