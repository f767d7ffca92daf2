"""The documentation site builds without a warning and asks nothing of other machines."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_every_page_is_in_the_navigation() -> None:
    """mkdocs says so too, where it is installed."""
    nav = (ROOT / "mkdocs.yml").read_text().split("\nnav:")[1]
    named = set(re.findall(r"([\w/]+\.md)", nav))
    assert named == {str(p.relative_to(ROOT / "docs")) for p in (ROOT / "docs").rglob("*.md")}


def test_the_site_builds_and_is_offline(tmp_path: Path) -> None:
    pytest.importorskip("material")
    pytest.importorskip("latex2mathml")
    # not --quiet: it keeps --strict from seeing warnings
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path / "site")]
    done = subprocess.run(
        words, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    pages = sorted((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 25
    for page in pages:
        loaded = re.findall(r'<(?:script|img|iframe|link)[^>]*?(?:src|href)="(?:https?:)?//[^"]*"', page.read_text())
        assert not loaded, f"{page.name}: {loaded}"
    assert "<math" in (tmp_path / "site/methods/dpo.html").read_text()
