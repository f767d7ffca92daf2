"""Imports only go downward, and packages of one layer never import each other. Lazy imports count, type-checking ones do not."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from pathlib import Path

import penchant

# lowest first; entries of one set are peers
LAYERS = [
    {"penchant", "errors"},
    {"base"},
    {"requests", "types"},
    {"distributed"},
    {"data", "losses", "models", "runfolder"},
    {"judges", "logprobs", "training"},
    {"rollout"},
    {"metrics", "rewards"},
    {"algorithms", "download", "flags", "report", "watch"},
    {"config"},
    {"track"},
    {"importers", "runs"},
    {"compare", "evaluate", "export", "plan", "serve", "sweep"},
    {"given", "init", "pipeline"},
    {"api"},
    {"demo", "studio"},
    {"cli"},
    {"__main__"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
ROOT = Path(penchant.__file__).parent


def _unit(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return "penchant" if parts == ("__init__",) else parts[0]


def _statements(body: Sequence[ast.AST]) -> Iterator[ast.AST]:
    """Every nested statement except those for type checkers. Expressions are skipped, because imports are statements."""
    for node in body:
        yield node
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from _statements(node.orelse)
        else:
            for part in ("body", "handlers", "cases", "orelse", "finalbody"):
                inner = getattr(node, part, [])
                yield from _statements(inner if isinstance(inner, list) else [])


def _imports(path: Path) -> set[str]:
    found = set()
    for node in _statements(ast.parse(path.read_text()).body):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "penchant":
            inside = node.module.split(".")[1:]
            found |= {inside[0]} if inside else {a.name if a.name in RANK else "penchant" for a in node.names}
        elif isinstance(node, ast.Import):
            found |= {[*a.name.split("."), "penchant"][1] for a in node.names if a.name.split(".")[0] == "penchant"}
    return found


def test_imports_go_downward_only() -> None:
    wrong = []
    for path in sorted(ROOT.rglob("*.py")):
        unit = _unit(path)
        assert unit in RANK, f"{unit} is in no layer; add it to LAYERS"
        for other in _imports(path) - {unit}:
            if RANK[other] >= RANK[unit]:
                wrong.append(f"{path.relative_to(ROOT)} imports {other}")
    assert not wrong, "\n".join(wrong)


def test_the_rule_can_fail() -> None:
    assert "training" in _imports(ROOT / "runs/__init__.py")
    assert RANK["training"] < RANK["runs"]
