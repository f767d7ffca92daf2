"""Method pages cover every loss, and agree with the registry, the schema and docs/results.md."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from penchant.losses import LOSSES

ROOT = Path(__file__).parents[2]


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


refresh = _module(ROOT / "docs/tools/refresh.py")
PAGES = refresh.pages()


def _named(page: Path, kind: str) -> set[str]:
    return {n for m in refresh.PART.finditer(page.read_text()) if m[2] == kind for n in m[3].split()}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_the_generated_parts_are_up_to_date(page: Path) -> None:
    assert page.read_text() == refresh.refreshed(page.read_text()), "run: python docs/tools/refresh.py"


def test_every_loss_has_its_formula_and_settings_on_a_page() -> None:
    for kind in ("formula", "settings"):
        assert set().union(*(_named(p, kind) for p in PAGES)) == set(LOSSES)


def test_every_algorithm_has_its_settings_on_a_page() -> None:
    from penchant.config.page import parts

    quoted = {m[3].strip() for p in PAGES for m in refresh.PART.finditer(p.read_text()) if m[2] == "algorithm"}
    assert quoted == {p.title.removeprefix("algorithm: ") for p in parts() if p.title.startswith("algorithm: ")}


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_what_a_loss_logs_is_defined_on_its_page(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tests/losses"))
    registry = _module(ROOT / "tests/losses/test_registry.py")
    page = next(p for p in PAGES if name in _named(p, "settings"))
    logged = registry.call(name, registry.inputs(LOSSES[name])).metrics
    assert set(logged) <= _named(page, "metrics") | _named(ROOT / "docs/methods/index.md", "metrics")


def test_a_changed_figure_is_noticed() -> None:
    page = ROOT / "docs/methods/dpo.md"
    assert refresh.refreshed(page.read_text().replace("0.660", "0.999")) == page.read_text()


def test_every_page_has_the_same_parts() -> None:
    for page in PAGES:
        if page.stem not in ("index", "other"):
            heads = re.findall(r"^## (.*)$", page.read_text(), flags=re.M)
            assert heads == ["Formula", "When to use it", "Settings", "What is logged", "A measured result"], page
