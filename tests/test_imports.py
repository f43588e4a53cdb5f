"""No module imports itself by way of others, not even inside functions."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in ("gift", "gift_kernels", "benchmarks")
    for path in (ROOT / package).rglob("*.py")
}


def imported(path: Path) -> set[str]:
    """Modules of ours that a file imports, but for type checkers."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            members = {f"{node.module}.{alias.name}" for alias in node.names} & FILES.keys()
            names |= members or {node.module or ""}
    return names & FILES.keys()


def test_imports_have_no_circles() -> None:
    order = TopologicalSorter({name: imported(path) for name, path in FILES.items()})
    assert len(list(order.static_order())) == len(FILES)  # CycleError names a circle
