"""Import only downward; packages of one layer never import each other. Lazy imports count, type-checking ones do not."""

from __future__ import annotations

import ast
from pathlib import Path

import penchant

# lowest first; entries of one set are peers
LAYERS = [
    {"penchant", "errors", "redact", "printable", "files", "machine"},
    {"types", "schema", "sharing", "base"},
    {"losses", "data", "models", "tracking"},
    {"head"},
    {"logprobs"},
    {"packing_check", "reference", "rollout"},
    {"training"},
    {"rewards"},  # a reward model runs on the engine and is found in its run's folder
    {"judges"},  # a person's own judge is loaded as rewards are
    {"download"},  # labels answers with rewards
    {"algorithms", "evaluation", "report", "watch"},
    {"config", "manifest"},
    {"pipeline", "track", "importing", "config_page"},
    {"sweep_search", "sweep_axes", "sweep_halving"},
    {"pipeline_state", "sweep"},
    {"sweep_state", "sweep_table", "sweep_rungs"},
    {"run"},
    {"comparison", "evaluate", "planning"},
    {"starting"},  # a first config: sizes and memory as planning knows them
    {"pipeline_compare", "sweep_worker", "export"},
    {"sweep_jobs", "serve"},
    {"pipeline_run", "sweep_run"},
    {"api"},
    {"demo"},
    {"commands"},  # one module a command; cli.py puts them together
    {"cli"},
    {"__main__"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
ROOT = Path(penchant.__file__).parent


def _unit(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return "penchant" if parts == ("__init__",) else parts[0]


def _imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
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
    assert "training" in _imports(ROOT / "run.py")
    assert RANK["training"] < RANK["run"]
