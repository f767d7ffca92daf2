"""The documentation site builds without warnings, loads nothing from other hosts, and fits a phone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from chromium import Browser, in_a_browser

ROOT = Path(__file__).parents[2]
ARTICLE = re.compile(r"<article class=\"md-content__inner.*?</article>", re.S)
SCRIPT = re.compile(r"<script.*?</script>", re.S)
BLOCK, COLOR = re.compile(r"<pre>.*?</pre>", re.S), re.compile(r"</?(?:span|a)\b[^>]*>")
PHONE = 390  # pixels


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("material")
    pytest.importorskip("latex2mathml")
    target = tmp_path_factory.mktemp("docs") / "site"
    # without --quiet, which hides warnings from --strict
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(target)]
    done = subprocess.run(
        words, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    return target


def test_every_page_is_in_the_navigation() -> None:
    """mkdocs checks this too, if it is installed."""
    nav = (ROOT / "mkdocs.yml").read_text().split("\nnav:")[1]
    named = set(re.findall(r"([\w/]+\.md)", nav))
    assert named == {str(p.relative_to(ROOT / "docs")) for p in (ROOT / "docs").rglob("*.md")}


def test_the_site_is_offline_and_draws_formulas(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 25
    for page in pages:
        loaded = re.findall(r'<(?:script|img|iframe|link)[^>]*?(?:src|href)="(?:https?:)?//[^"]*"', page.read_text())
        assert not loaded, f"{page.name}: {loaded}"
    assert (site / "methods/dpo.html").read_text().count("<math") == 3


def test_an_option_is_not_broken_at_its_hyphens(site: Path) -> None:
    text = (site / "eval.html").read_text()
    assert '<code><span class="option">--max-new-tokens</span></code>' in text
    assert not re.search(r"<pre>.*?class=\"option\".*?</pre>", text)


def test_a_bar_in_a_table_is_shown_without_its_backslash(site: Path) -> None:
    """GitHub needs `\\|` in a cell; Python-Markdown keeps the backslash of one in code."""
    pages = {p.name: "".join(re.findall(r"<td\b.*?</td>", p.read_text(), re.S)) for p in site.rglob("*.html")}
    assert [name for name, cells in pages.items() if "\\|" in cells] == []
    assert "|y_w|" in pages["losses.html"]


def test_a_link_into_the_repository_names_its_file_once(site: Path) -> None:
    text = re.sub(r"</?code>", "", (site / "performance.html").read_text())
    assert text.count("benchmarks/trl_settings.md") == 1


@in_a_browser
def test_no_page_is_wider_than_a_phone(site: Path) -> None:
    """All pages in one, without scripts and highlighting, since loading sixty takes a minute. Wide content scrolls in its own box."""
    articles = []
    for page in sorted(site.rglob("*.html")):
        plain = BLOCK.sub(lambda m: COLOR.sub("", m[0]), page.read_text())
        name = str(page.relative_to(site))
        articles += [f'<section data-page="{name}">{a}</section>' for a in ARTICLE.findall(plain)]
    assert len(articles) > 25
    whole = site / "all.html"
    wide = '<section data-page="wide"><div style="width: 400px">seen</div></section>'
    frame = SCRIPT.sub("", (site / "index.html").read_text())
    whole.write_text(ARTICLE.sub(lambda _: "".join([*articles, wide]), frame))
    too_wide = f"""[...document.querySelectorAll('section *')].filter((e) => e.getBoundingClientRect().right > {PHONE} + 1)
        .filter((e) => {{ while ((e = e.parentElement).tagName !== 'SECTION') if (/auto|scroll/.test(getComputedStyle(e).overflowX)) return false;
            return true; }}).map((e) => e.closest('section').dataset.page + ': ' + e.textContent.slice(0, 60))"""
    with Browser() as browser:
        browser.open(whole, width=PHONE, height=844)
        assert browser.run(too_wide) == ["wide: seen"]
        browser.run("document.querySelector('[data-page=wide]').remove()")
        assert browser.run("document.scrollingElement.scrollWidth") == PHONE
        lost = "[...document.querySelectorAll('section img')].filter((i) => !i.naturalWidth).map((i) => i.src)"
        assert browser.run(lost) == []
