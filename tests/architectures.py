"""Access to tools/architectures.py, which makes tiny models of every architecture and checks the engine on them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def load_tool() -> ModuleType:
    """Load the tool as a module."""
    path = Path(__file__).resolve().parents[1] / "tools" / "architectures.py"
    spec = importlib.util.spec_from_file_location("architectures_tool", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules["architectures_tool"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
