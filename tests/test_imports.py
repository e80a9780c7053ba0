"""Imports point one way: no circle at module level, and the ground floor stands on nothing."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "probest").rglob("*.py"))
}
GROUND_FLOOR = {
    "probest.evidence": set(),
    "probest.seeds": set(),
    "probest.diagnostics": set(),
    "probest.budget": {"probest.evidence"},
}
FLOORS = (
    ("probest.cli", "probest.testing"),
    ("probest.train",),
    ("probest.training",),
    ("probest.search", "probest.audit"),
    ("probest.estimate",),
    ("probest.adversaries",),
    ("probest.gradient",),
    ("probest.estimators",),
    ("probest.smc", "probest.lines", "probest.surrogates"),
    ("probest.guides", "probest.moments"),
    ("probest.problem",),
    ("probest.programs",),
    ("probest.backends", "probest.checkers"),
)
"""From the roof down: a module imports from its own floor and from those below it."""


def imported(tree: ast.AST) -> list[str]:
    """Modules of probest that are imported when a module is, those for types alone left out."""
    found: list[str] = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [name if name in MODULES else node.module for name in inner]
        else:
            found += imported(node)
    return [name for name in found if name in MODULES]


IMPORTS = {name: set(imported(ast.parse(path.read_text()))) for name, path in MODULES.items()}


def with_packages(name: str) -> set[str]:
    """A module and the packages that are imported before it, without the root."""
    parts = name.split(".")
    return {".".join(parts[: i + 1]) for i in range(1, len(parts))}


def test_there_is_no_circle_at_module_level() -> None:
    """Packages that an import brings along included: so every module can be the first to be imported."""
    graph = {
        name: set().union(*map(with_packages, names)) - {name} if names else set() for name, names in IMPORTS.items()
    }
    for name in set(graph) - {"probest"}:
        graph[name] -= with_packages(name)  # a package is there before its modules
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle
    assert set(order) >= set(MODULES) - {"probest"}


def test_the_ground_floor_imports_nothing_of_probest() -> None:
    assert {name: IMPORTS[name] for name in GROUND_FLOOR} == GROUND_FLOOR


def test_imports_point_down() -> None:
    floor = {name: level for level, names in enumerate(FLOORS) for name in names}

    def level(name: str) -> int | None:
        return floor.get(".".join(name.split(".")[:2]))

    upwards = [
        f"{name} imports {other}"
        for name, others in IMPORTS.items()
        for other in others
        if (mine := level(name)) is not None and (theirs := level(other)) is not None and theirs < mine
    ]
    assert upwards == []
