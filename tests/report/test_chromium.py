"""The report in a browser: no hostile script runs, no request is sent, and interactions work, also by keyboard."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chromium import Browser, in_a_browser
from report_folders import make_comparison, make_run, make_sweep
from test_build import hostile

from penchant.report import write_report

pytestmark = in_a_browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as opened:
        yield opened


def page(target: Path, *paths: Path) -> Path:
    return write_report(paths, target / "page.html", strict=True)


def settle(browser: Browser, script: str, seconds: float = 60.0) -> Any:
    """Wait until a script's value is truthy and return it. Retries while the page reloads."""
    end = time.monotonic() + seconds
    while True:
        try:
            value = browser.run(script)
        except RuntimeError:
            value = None
        if value or time.monotonic() > end:
            return value
        time.sleep(0.05)


SHOWN = "[...document.querySelectorAll('.sample')].filter((e) => !e.hidden).length"


def choose(browser: Browser, name: str, value: str) -> None:
    script = f"(() => {{ const e = document.querySelector('[data-f={name}]'); e.value = {value!r}; e.dispatchEvent(new Event('input')); }})()"
    browser.run(script)
    later = 121 if name == "text" else 5  # after the page's own timer, which was set earlier
    browser.run(f"new Promise((done) => setTimeout(done, {later}))")


def test_hostile_text_runs_nothing_and_asks_for_nothing(browser: Browser, tmp_path: Path) -> None:
    target = page(tmp_path, *hostile(tmp_path))
    browser.open(target)
    browser.run("new Promise((done) => setTimeout(done, 300))")
    assert browser.run("document.title").endswith("\u00b7 Penchant report") and "owned" not in browser.run(
        "document.title"
    )
    assert browser.complaints() == [] and browser.requests() == [target.resolve().as_uri()]
    assert browser.run("document.querySelectorAll('script').length") == 2
    assert browser.run("document.querySelectorAll('main *').length") > 500
    browser.run("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert browser.complaints() == [] and len(browser.requests()) == 1


def test_the_policy_holds_and_these_tests_would_see_a_breach(browser: Browser, tmp_path: Path) -> None:
    browser.open(page(tmp_path, make_run(tmp_path / "r")))
    browser.run(
        "(() => { const s = document.createElement('script'); s.textContent = \"document.title = 'owned'\"; document.body.append(s);"
        " const i = document.createElement('img'); i.src = 'http://127.0.0.1:9/x.png'; document.body.append(i);"
        " document.body.setAttribute('style', 'color: red'); })()"
    )
    browser.run("new Promise((done) => setTimeout(done, 300))")
    assert browser.run("document.title") != "owned"
    assert len([c for c in browser.complaints() if "Content Security Policy" in c]) >= 3
    open_page = tmp_path / "open.html"
    open_page.write_text("<img src='http://127.0.0.1:9/x.png'><script>document.title = 'owned'</script>")
    browser.open(open_page)
    assert browser.run("document.title") == "owned" and "http://127.0.0.1:9/x.png" in browser.requests()


def test_completions_are_searched_filtered_and_ordered(browser: Browser, tmp_path: Path) -> None:
    browser.open(page(tmp_path, make_comparison(tmp_path / "c", prompts=30)))
    assert browser.run(SHOWN) == 30 and browser.run("document.querySelectorAll('.sample[open]').length") == 20
    choose(browser, "text", "FINE 7")
    assert browser.run(SHOWN) == 1 and browser.run("document.querySelector('.count').textContent") == "1 of 30 prompts."
    choose(browser, "text", "ours 12")  # in a completion
    assert browser.run(SHOWN) == 1
    choose(browser, "text", "no such words")
    assert browser.run(SHOWN) == 0
    choose(browser, "text", "")
    counts = []
    for winner in ("right", "left", "tie"):
        choose(browser, "won", winner)
        counts.append(browser.run(SHOWN))
    # rewards are (7i + 3j) % 5: in 0 vs 3, 2 vs 0, 4 vs 2, 1 vs 4 and 3 vs 1 the right one wins twice
    assert counts == [12, 18, 0]
    choose(browser, "won", "")
    choose(browser, "sort", "gain")
    gains = browser.run(
        "[...document.querySelectorAll('.diff')].map((e) => parseFloat(e.textContent.replace('\u2212', '-')))"
    )
    assert gains == sorted(gains, reverse=True) and gains[0] == 3 and gains[-1] == -2
    choose(browser, "sort", "loss")
    gains = browser.run(
        "[...document.querySelectorAll('.diff')].map((e) => parseFloat(e.textContent.replace('\u2212', '-')))"
    )
    assert gains == sorted(gains)
    choose(browser, "length", "right")
    assert browser.run(SHOWN) == 30  # 6 tokens versus 5
    choose(browser, "length", "left")
    assert browser.run(SHOWN) == 0
    choose(browser, "length", "")
    columns = "[...document.querySelectorAll('.sample')][0].querySelectorAll('[data-m]:not([hidden])').length"
    assert browser.run(columns) == 2
    choose(browser, "right", "all")
    assert browser.run(columns) == 3


def test_a_large_gain_keeps_its_zeros(browser: Browser, tmp_path: Path) -> None:
    folder = make_comparison(tmp_path / "c", prompts=30)
    rows = [json.loads(line) for line in (folder / "comparison.jsonl").read_text().splitlines()]
    for completion in (c for row in rows for c in row["completions"].values()):
        completion["reward"] *= 100
    (folder / "comparison.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    browser.open(page(tmp_path, folder))
    gains = browser.run("[...new Set([...document.querySelectorAll('.diff')].map((e) => e.textContent))]")
    assert set(gains) == {"+300", "\u2212200"}


def test_it_works_from_the_keyboard(browser: Browser, tmp_path: Path) -> None:
    browser.open(page(tmp_path, make_comparison(tmp_path / "c", prompts=30)))
    browser.run("document.querySelector('[data-f=text]').focus()")
    for key in "fine 21":
        browser.send("Input.insertText", text=key)
    assert settle(browser, f"{SHOWN} === 1")
    order = []
    for _ in range(7):
        browser.press("Tab")
        order.append(browser.run("document.activeElement.dataset.f || document.activeElement.tagName"))
    assert order[:6] == ["left", "right", "won", "length", "sort", "open"] and order[6] == "SUMMARY"
    assert browser.run("document.activeElement.closest('.sample').open") is False  # the 22nd is collapsed
    browser.press("Enter")
    assert browser.run("document.activeElement.closest('.sample').open") is True


def test_plots_are_read_by_pointer_and_by_keys(browser: Browser, tmp_path: Path) -> None:
    browser.open(page(tmp_path, make_run(tmp_path / "r")))
    svg = "document.querySelector('figure[data-axis] svg.chart')"
    tip = "document.querySelector('figure[data-axis] .tip')"
    assert browser.run(f"{tip}.hidden")
    browser.run(f"{svg}.focus()")
    browser.press("ArrowRight")
    assert settle(browser, f"{tip}.textContent.startsWith('step 0') && {tip}.textContent.includes('held out0.693')")
    browser.press("ArrowRight")
    assert settle(browser, f"{tip}.textContent.startsWith('step 1')")
    box = browser.run(
        f"(() => {{ {svg}.scrollIntoView(); const b = {svg}.getBoundingClientRect(); return [b.left, b.top, b.width, b.height]; }})()"
    )
    browser.send("Input.dispatchMouseEvent", type="mouseMoved", x=box[0] + box[2] * 0.84, y=box[1] + box[3] / 2)
    assert (
        settle(browser, f"{tip}.textContent.startsWith('step 40')")
        and browser.run(f"{svg}.querySelectorAll('.cross line').length") == 1
    )
    browser.press("Escape")
    assert settle(browser, f"{tip}.hidden") and browser.complaints() == []


def test_settings_can_be_left_out_of_all_plots(browser: Browser, tmp_path: Path) -> None:
    browser.open(page(tmp_path, make_sweep(tmp_path / "s")))
    drawn = "[...document.querySelectorAll('svg .s[data-g=A]')].filter((e) => getComputedStyle(e).display !== 'none').length"
    before = browser.run(drawn)
    browser.run("document.querySelector('[data-show=A]').click()")
    assert before > 5 and browser.run(drawn) == 0
    browser.run("document.querySelector('[data-show=A]').click()")
    assert browser.run(drawn) == before


def test_without_script_everything_is_there(browser: Browser, tmp_path: Path) -> None:
    target = page(tmp_path, make_comparison(tmp_path / "c", prompts=30), make_run(tmp_path / "r"))
    browser.send("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(target)
        assert browser.run(SHOWN) == 30 and browser.run("document.querySelectorAll('.answers > [hidden]').length") == 0
        assert browser.run("getComputedStyle(document.querySelector('.controls')).display") == "none"
        assert browser.run("document.querySelectorAll('svg.chart path').length") > 5
    finally:
        browser.send("Emulation.setScriptExecutionDisabled", value=False)


def test_a_page_that_loads_itself_anew_keeps_the_readers_place(browser: Browser, tmp_path: Path) -> None:
    browser.open(page(tmp_path, make_run(tmp_path / "r", status="running", samples=30)))
    choose(browser, "sort", "gain")
    place = browser.run(
        "document.querySelectorAll('figure details')[1].open = true; document.querySelector('#completions').scrollIntoView();"
        " window.same = true; scrollY"
    )
    assert place > 500
    browser.run("Date.now = ((now) => () => now() + 31000)(Date.now)")  # half a minute later
    assert settle(browser, "window.same !== true && document.readyState === 'complete'")
    assert settle(browser, "document.querySelector('[data-f=sort]').value === 'gain'")
    assert browser.run("document.querySelectorAll('figure details')[1].open")
    assert settle(browser, f"Math.abs(scrollY - {place}) < 5")
    assert "ago" in browser.run("document.querySelector('#written').textContent") and browser.complaints() == []


def test_a_finished_page_stays(browser: Browser, tmp_path: Path) -> None:
    browser.open(page(tmp_path, make_run(tmp_path / "r")))
    browser.run("window.same = true; Date.now = ((now) => () => now() + 999000)(Date.now)")
    browser.run("new Promise((done) => setTimeout(done, 1100))")
    assert browser.run("window.same") is True


def test_nothing_is_wider_than_the_screen(browser: Browser, tmp_path: Path) -> None:
    made = (
        make_run(tmp_path / "r"),
        make_sweep(tmp_path / "s"),
        make_comparison(tmp_path / "c", word="a-rather-long-name-of-a-run"),
    )
    for path in made:
        target = page(path, path)
        for width in (320, 390, 1280):
            browser.open(target, width=width, height=800)
            assert browser.run("document.documentElement.scrollWidth <= document.documentElement.clientWidth"), (
                path.name,
                width,
            )


def test_light_dark_and_print(browser: Browser, tmp_path: Path) -> None:
    target = page(tmp_path, make_run(tmp_path / "r"))
    color = "getComputedStyle(document.body).backgroundColor"
    found = []
    for options in ({}, {"dark": True}, {"dark": True, "media": "print"}):
        browser.open(target, **options)  # type: ignore[arg-type]
        found.append(browser.run(color))
    assert found[0] != found[1] and found[2] == "rgb(255, 255, 255)"
    assert browser.run("getComputedStyle(document.querySelector('nav')).display") == "none"
    browser.open(target)
    browser.pdf(tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")


CONTRAST = """(() => {
  const light = (c) => { const v = c.map((x) => x / 255).map((x) => x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4); return 0.2126 * v[0] + 0.7152 * v[1] + 0.0722 * v[2]; };
  const parse = (s) => s.match(/[\\d.]+/g).map(Number);
  const ground = (e) => { for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor); if (c.length === 3 || c[3] === 1) return c.slice(0, 3); } return [255, 255, 255]; };
  const bad = [];
  for (const e of document.querySelectorAll('main p, main td, main th, main small, main summary, main a, main label, main h4, main figcaption')) {
    if (!e.textContent.trim() || !e.checkVisibility()) continue;
    const [a, b] = [light(parse(getComputedStyle(e).color).slice(0, 3)), light(ground(e))].sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < 4.5) bad.push(e.tagName + ' ' + e.className + ' ' + ((a + 0.05) / (b + 0.05)).toFixed(2) + ' ' + e.textContent.slice(0, 30));
  }
  return bad;
})()"""


@pytest.mark.parametrize("dark", [False, True])
def test_text_can_be_read(browser: Browser, tmp_path: Path, dark: bool) -> None:
    """Contrast is at least 4.5:1, as WCAG AA requires for text."""
    from report_folders import make_flags

    run = make_run(tmp_path / "r")
    make_flags(run)
    browser.open(page(tmp_path, run, make_comparison(tmp_path / "c")), dark=dark)
    assert browser.run(CONTRAST) == []
