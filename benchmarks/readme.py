"""`python -m benchmarks readme`: the sections of README.md that are made, not written.

Performance comes from folders of results, merge methods from their registry; tests compare both.
"""

from collections.abc import Sequence
from pathlib import Path

from benchmarks import goals, report
from gift.merge.methods import METHODS

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
BEGIN = "<!-- made by python -m benchmarks readme -->"
BEGIN_METHODS = "<!-- merge methods, made by python -m benchmarks readme -->"
END = "<!-- end -->"
NOT_ON_A_GPU = """**Not measured on a GPU yet.** `python -m benchmarks.gpu_suite` does it in one
call: tests, accuracy, times beside the peers, whole stages."""


def update(folders: Sequence[Path]) -> None:
    """Puts the section of these results, or of the newest stored ones, and the methods' table in
    README.md."""
    text = README.read_text(encoding="utf-8")
    for made in (section(folders or newest()), merge_methods()):
        before, rest = text.split(made.splitlines()[0])
        text = before + made + rest.split(END, 1)[1]
    README.write_text(text, encoding="utf-8")


def merge_methods() -> str:
    """The table of merge methods, markers included."""
    table = [
        {
            "method": f"`{method.name}`",
            "result": method.formula,
            "settings": ", ".join(f"`--{name.replace('_', '-')}`" for name in method.settings),
            "source": method.source,
        }
        for method in METHODS.values()
    ]
    return "\n\n".join([BEGIN_METHODS, "\n".join(report.plain_table(table)), END])


def newest() -> list[Path]:
    """The latest results of a GPU, then those of a CPU, as far as there are any."""
    found: dict[bool, tuple[str, Path]] = {}
    for file in RESULTS.glob(f"*/{report.RESULTS_FILE}"):
        environment = report.read_results(file.parent).environment
        if environment.get("dry_run"):
            continue
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
        f"{environment['device']}, torch {environment['torch']}, {environment['date'][:10]}, "
        f"measured on commit {environment['commit']} ([all results]({where}/results.md)); what "
        "changed since has not been measured again.",
        "In turns in one process; correct before timed; medians; memory beyond the inputs. The",
        "floor is the bare products, or a copy; the usual way is full logits, or",
        "`W += scale * (B @ A)`; with a frozen head, forward and backward, if not said:",
    ]
    if not environment["device"].startswith("CPU"):
        lines += ["", *report.plain_table(goals.judge(results.rows))]
    table = []
    for label in dict.fromkeys(row["case"] for row in results.rows):
        if not label.startswith(report.CANDIDATES):
            table.append(_case(label, [row for row in results.rows if row["case"] == label]))
    lines += ["", *report.plain_table(table)]
    behind = [row["case"] for row in table if row["ours / fastest other"] > 1]
    lines += ["", f"Slower than the fastest other way in {len(behind)} of {len(table)} cases:", ""]
    lines += [f"- {case}" for case in behind]
    lines += ["", f"![Every way in every case]({where}/cases.png)"]
    stages = [row for row in results.tables.get("end to end", []) if "ms" in row]
    models = {row["model"] for row in stages if row["stage"] == "annotate"}
    shown = [row for row in stages if row["model"] in models or row["stage"] == "merge"]
    if shown:
        lines += ["", "Whole stages:", "", *report.plain_table(shown)]
    return "\n".join(lines)


def _case(label: str, rows: Sequence[report.Row]) -> report.Row:
    """Ours, the usual way and the fastest exact peer of a case in one row; a dash: not measured."""
    timed = [row for row in rows if "time_ms" in row]

    def first(kind: str) -> report.Row:
        mine = [row for row in timed if row["kind"] == kind and not row.get("approximate")]
        return min(mine, key=lambda row: row["time_ms"], default={})

    ours, usual, peer, floor = map(first, ("ours", "baseline", "peer", "floor"))
    fastest = min((row["time_ms"] for row in (usual, peer) if row), default=None)
    errors = [ours[name] for name in ours if name.startswith("error_")]
    return {
        "case": label.replace(", frozen head", "").replace(", both", ""),
        "floor": _cell(floor, memory=False),
        "ours": f"{ours['provider'].removeprefix('gift ')} {_cell(ours)}" if ours else "-",
        "usual way": _cell(usual),
        "fastest peer": f"{peer['provider']} {_cell(peer)}" if peer else "-",
        "ours / fastest other": ours["time_ms"] / fastest if ours and fastest else 0.0,
        "our error": f"{max(errors):.0e}" if errors else "-",
    }


def _cell(row: report.Row, memory: bool = True) -> str:
    if not row:
        return "-"
    return f"{row['time_ms']:.3g}" + (f" ms, {row['peak_mb']:.3g} MB" if memory else " ms")
