"""`python -m benchmarks readme`: writes the generated sections of README.md and docs/.

Performance and studies come from folders of results, merge methods and weightings from their
registries. A test checks that the files hold what this makes.
"""

from collections.abc import Sequence
from pathlib import Path

from benchmarks import goals, report, study_tables
from gift.merge.methods import METHODS
from gift.weighting.formulas import WEIGHTINGS

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
BENCHMARKS = ROOT / "docs" / "benchmarks.md"
MERGE_METHODS = ROOT / "docs" / "merge-methods.md"
PIPELINE = ROOT / "docs" / "pipeline.md"
STUDY = ROOT / "docs" / "study.md"
BEGIN = "<!-- made by python -m benchmarks readme -->"
BEGIN_STUDY = "<!-- of a study, made by python -m benchmarks readme -->"
END = "<!-- end -->"
NOT_ON_A_GPU = """**Not measured on a GPU yet.** `python -m benchmarks.gpu_suite` measures accuracy,
times beside the peers and whole stages in one call."""
SHOWN_HEAD = "llama-3.1-8b"  # the only head in README's table
CASES = {
    "offline": "a weight tensor",
    "uniform": "no weights",
    "guide": "guide's confidence",
    "self": "own confidence",
}


def update(folders: Sequence[Path]) -> None:
    """Writes the sections of these results, or of the newest stored ones, into their files."""
    for path, made in sections(folders or newest()):
        before, rest = path.read_text(encoding="utf-8").split(made.partition("\n")[0])
        path.write_text(before + made + rest.split(END, 1)[1], encoding="utf-8")


def sections(folders: Sequence[Path]) -> list[tuple[Path, str]]:
    """Each generated section with its file, from its first marker to the last."""
    results = [report.read_results(folder) for folder in folders]
    gpu = [one for one in results if not _on_cpu(one)]
    made = {
        README: [_short(one) for one in gpu] or [NOT_ON_A_GPU],
        BENCHMARKS: [*([] if gpu else [NOT_ON_A_GPU]), *map(_device, results)],
        MERGE_METHODS: [merge_methods()],
        PIPELINE: [weightings()],
    }
    study = study_tables.newest(RESULTS)
    return [
        *((path, "\n\n".join([BEGIN, *parts, END])) for path, parts in made.items()),
        (README, "\n\n".join([BEGIN_STUDY, study_tables.short(study), END])),
        (STUDY, "\n\n".join([BEGIN_STUDY, study_tables.full(study), END])),
    ]


def weightings() -> str:
    """The table of weightings."""
    table = [
        {"`--weighting`": f"`{name}`", "weight of a token": one.formula, "known as": one.source}
        for name, one in WEIGHTINGS.items()
    ]
    return "\n".join(report.plain_table(table))


def merge_methods() -> str:
    """The table of merge methods."""
    table = [
        {
            "method": f"`{method.name}`",
            "result": method.formula,
            "settings": ", ".join(f"`--{name.replace('_', '-')}`" for name in method.settings),
            "source": method.source,
        }
        for method in METHODS.values()
    ]
    return "\n".join(report.plain_table(table))


def newest() -> list[Path]:
    """The latest results of a GPU, then those of a CPU, where there are any."""
    found: dict[bool, tuple[str, Path]] = {}
    for file in RESULTS.glob(f"*/{report.RESULTS_FILE}"):
        results = report.read_results(file.parent)
        if results.environment.get("dry_run"):
            continue
        place, date = _on_cpu(results), results.environment["date"]
        found[place] = max(found.get(place, ("", file.parent)), (date, file.parent))
    return [found[place][1] for place in sorted(found)]


def _on_cpu(results: report.Results) -> bool:
    return results.environment["device"].startswith("CPU")


def _heading(results: report.Results) -> str:
    environment = results.environment
    return (
        f"{environment['device']}, torch {environment['torch']}, {environment['date'][:10]}, "
        f"commit {environment['commit']}; what changed since has not been measured again."
    )


def _short(results: report.Results) -> str:
    """README's table of a GPU; ratios above 1 are bold."""
    table = []
    for row in sorted(_measured(results), key=_order):
        if row["head"].split()[0] == SHOWN_HEAD:
            case = _case(row["case"], results)
            ratio = case["ours / fastest other"]
            mark = "**" if ratio > 1 else ""
            shown = {name: case[name] for name in ("ours", "baseline", "fastest peer")}
            ours = {"ours / fastest other": f"{mark}{ratio:.2f}{mark}"}
            table.append({"case": _brief(row), **shown, **ours})
    slower, total = _slower(results), len(_measured(results))
    lines = [
        _heading(results),
        "",
        *report.plain_table(table),
        "",
        f"Bold: slower than the fastest other implementation, as in {len(slower)} of all {total} "
        f"cases measured{_eager(results)}.",
    ]
    return "\n".join(lines)


def _device(results: report.Results) -> str:
    """All tables of one device."""
    slower = _slower(results)
    where = f"../benchmarks/results/{results.output.name}"
    lines = [
        f"### {results.environment['device']}",
        "",
        f"{_heading(results)} [All results]({where}/results.md).",
        "",
        *report.plain_table([_case(row["case"], results) for row in _measured(results)]),
        "",
        f"Slower than the fastest other in {len(slower)} of {len(_measured(results))} cases"
        f"{_eager(results)}:",
        "",
        *(f"- {case}: {ratio:.2f} times its time" for case, ratio in slower.items()),
    ]
    if not _on_cpu(results):
        lines += ["", "Goals of the kernels:", "", *report.plain_table(goals.judge(results.rows))]
    lines += ["", f"![Every way in every case]({where}/cases.png)"]
    stages = [row for row in results.tables.get("end to end", []) if "ms" in row]
    models = {row["model"] for row in stages if row["stage"] == "annotate"}
    shown = [row for row in stages if row["model"] in models or row["stage"] == "merge"]
    if shown:
        lines += ["", "Whole stages:", "", *report.plain_table(shown)]
    return "\n".join(lines)


def _measured(results: report.Results) -> list[report.Row]:
    """The first row of every case; candidates for our own settings are left out."""
    rows = {row["case"]: row for row in reversed(results.rows)}
    order = dict.fromkeys(row["case"] for row in results.rows)
    return [rows[label] for label in order if not label.startswith(report.CANDIDATES)]


def _order(row: report.Row) -> tuple:
    """README's order: similar cases next to each other."""
    weighting = list(CASES).index(row["weighting"]) if row["weighting"] else 0
    flat = row["data"] == "flat"
    return row["op"] != "weighted_ce", row["rank"], weighting, row["trainable"], flat, row["tokens"]


def _brief(row: report.Row) -> str:
    """A case's name without its head and dtype."""
    if row["op"] == "lora_merge":
        return f"lora_merge, rank {row['rank']}, {row['factor_dtype']} factors"
    parts = [row["op"], f"{row['tokens']} tokens"]
    if row["op"] == "weighted_ce":
        parts.append(CASES[row["weighting"]])
    parts += ["trainable head"] if row["trainable"] else []
    parts += ["flat logits"] if row["data"] == "flat" else []
    again = row["case"].find(" (again")
    return ", ".join(parts) + (row["case"][again:] if again >= 0 else "")


def _case(label: str, results: report.Results) -> report.Row:
    """A case's row: ours, the baseline and the fastest exact peer; a dash: not measured."""
    timed = [row for row in results.rows if row["case"] == label and "time_ms" in row]

    def first(kind: str) -> report.Row:
        mine = [row for row in timed if row["kind"] == kind and not row.get("approximate")]
        # A merge in place beside the others in place, not beside one that may use more memory.
        in_place = [row for row in mine if row["provider"].endswith("in place")]
        return min(in_place or mine, key=lambda row: row["time_ms"], default={})

    ours, baseline, peer, bound = map(first, ("ours", "baseline", "peer", "floor"))
    fastest = min((row["time_ms"] for row in (baseline, peer) if row), default=None)
    errors = [ours[name] for name in ours if name.startswith("error_")]
    return {
        "case": label.replace(", frozen head", "").replace(", both", ""),
        "lower bound": _cell(bound, memory=False),
        "ours": f"{ours['provider'].removeprefix('gift ')} {_cell(ours)}" if ours else "-",
        "baseline": _cell(baseline),
        "fastest peer": f"{peer['provider']} {_cell(peer)}" if peer else "-",
        "ours / fastest other": ours["time_ms"] / fastest if ours and fastest else 0.0,
        "our error": f"{max(errors):.0e}" if errors else "-",
    }


def _slower(results: report.Results) -> dict[str, float]:
    """Cases in which another implementation is faster, with our time over the fastest other."""
    cases = [_case(row["case"], results) for row in _measured(results)]
    ratios = {row["case"]: row["ours / fastest other"] for row in cases}
    return {case: ratio for case, ratio in ratios.items() if ratio > 1}


def _eager(results: report.Results) -> str:
    """What `impl="eager"` costs on a GPU, as the end of a sentence."""
    ratios = [
        row["ratio_best_peer"]
        for row in results.rows
        if row["provider"].startswith("gift eager") and row.get("ratio_best_peer")
    ]
    if not ratios or _on_cpu(results):
        return ""
    least, most = min(ratios), max(ratios)
    return f'; `impl="eager"` takes {least:.0f} to {most:.0f} times as long as that on a GPU'


def _cell(row: report.Row, memory: bool = True) -> str:
    if not row:
        return "-"
    size = row["peak_mb"]
    shown = f", {size / 1000:.3g} GB" if size >= 1000 else f", {size:.3g} MB"
    return f"{row['time_ms']:.3g} ms" + shown * memory
