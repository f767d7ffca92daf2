"""The arena in a real browser: keyboard, phone, a crash, two judges, hostile texts, and accessibility (axe)."""

from __future__ import annotations

import asyncio
import gzip
import os
import re
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from chromium import Browser, in_a_browser
from processes import forked
from studios import Person, arena_of, judgements, lines, studio_of

from penchant.judges.humans import read_preferences
from penchant.studio import pairs
from penchant.studio.pairs import Answers, Arena

pytestmark = in_a_browser

AXE = gzip.decompress((Path(__file__).parent / "axe/axe.min.js.gz").read_bytes()).decode()
READY = "document.readyState === 'complete' && !!window.htmx"
ORDER = "document.querySelector('#undo [name=order]')?.value"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as opened:
        yield opened


def enter(browser: Browser, server: Any, path: str = "arena", **how: Any) -> None:
    """Open a page with the printed address."""
    browser.send("Network.clearBrowserCookies")
    browser.open(server.open, **how)
    browser.wait(READY)
    browser.open(server.address + path, **how)
    browser.wait(READY)


def sign_in(browser: Browser, name: str) -> None:
    """Enter a name by keyboard."""
    browser.wait("document.activeElement?.name === 'annotator'")
    browser.send("Input.insertText", text=name)
    browser.press("Enter")
    browser.wait("!!document.querySelector('#judge')")
    browser.wait(READY)


def say(browser: Browser, key: str) -> None:
    """Press a key, and wait for the next pair."""
    before = browser.run(ORDER)
    browser.press(key)
    browser.wait(f"{ORDER} !== '{before}'", f"{key} did nothing")
    browser.wait("!document.querySelector('.htmx-request, .htmx-swapping, .htmx-settling')")


def serious(browser: Browser, *rules: str) -> list[str]:
    """Serious and critical findings of axe-core, by some or all of its rules."""
    browser.run("if (!window.axe) {" + AXE + "}; 0")
    only = f"runOnly: {list(rules)}, " if rules else ""
    script = (
        "axe.run({"
        + only
        + """resultTypes: ['violations']}).then((r) => r.violations
        .filter((v) => ['serious', 'critical'].includes(v.impact)).map((v) => v.id + ': ' + v.nodes.map((n) => n.html).join(' | ').slice(0, 300)))"""
    )
    return list(browser.run(script))


@contextmanager
def arena_in(browser: Browser, folder: Path, name: str = "Ada", width: int = 1280, **settings: Any) -> Iterator[Arena]:
    """A new arena with a judge at its first pair."""
    arena = arena_of(folder, **settings)
    with studio_of(folder) as server:
        enter(browser, server, "arena/test", width=width)
        sign_in(browser, name)
        yield arena


def test_an_arena_is_judged_by_keyboard_alone(browser: Browser, tmp_path: Path) -> None:
    with arena_in(browser, tmp_path, pairs=8, checks=0.0, repeats=0.0) as arena:
        for key in ("ArrowLeft", "ArrowRight", "t", "b", "s", "u", "2"):
            say(browser, key)
        made = [r["verdict"] for r in lines(arena)]
        sides = [j.side for j in judgements(arena)]
        assert made[2:6] == ["tie", "both_bad", "skip", "undo"]
        assert sides == ["left", "right", None, None, "right"]
        # reasons by Tab and space, the judge's own answer by E
        browser.run("document.querySelector('.tag input').focus()")
        browser.press(" ")
        browser.press("e")
        browser.wait("document.activeElement?.name === 'edited'")
        for key in "tbsu12":  # here letters are only text
            browser.press(key)
        browser.wait("document.activeElement.value === 'tbsu12'")
        assert len(lines(arena)) == 7
        browser.press("Escape")
        say(browser, "ArrowLeft")
        row = lines(arena)[-1]
        assert row["reasons"] == ["correct"] and row["edited"] == "tbsu12" and row["seconds"] > 0
        while browser.run("!!document.querySelector('#judge')"):
            say(browser, "ArrowRight")
        assert "That was the last pair" in browser.run("document.body.innerText")
        assert len(judgements(arena)) == 8 and browser.complaints() == []


def test_sides_are_where_the_file_says(browser: Browser, tmp_path: Path) -> None:
    with arena_in(browser, tmp_path, pairs=6, checks=0.0, repeats=0.0) as arena:
        for _ in range(6):
            shown = browser.run(
                "[document.getElementById('left').innerText, document.getElementById('right').innerText]"
            )
            say(browser, "ArrowLeft")
            row = lines(arena)[-1]
            assert shown[0] == row[f"answer_{row['left']}"] and shown[1] != shown[0]
            assert row["verdict"] == row["left"]


def test_a_phone_can_do_it(browser: Browser, tmp_path: Path) -> None:
    long = {"dpo": "A long answer. " * 300, "start": "Short."}
    answers = Answers(
        [(f"P{i}", {k: f"{v} {i}" for k, v in long.items()}) for i in range(3)], {key: {} for key in long}
    )
    with arena_in(browser, tmp_path, width=390, answers=answers) as arena:
        assert browser.run("document.documentElement.scrollWidth") <= 390
        tall = browser.run("[...document.querySelectorAll('.side')].map((e) => e.getBoundingClientRect().width)")
        assert all(300 < w <= 390 for w in tall)
        heights = browser.run("[...document.querySelectorAll('.side .text')].map((e) => e.clientHeight)")
        assert max(heights) <= 320, "the long answer is folded"
        buttons = "[...document.querySelectorAll('.say')].map((e) => { const r = e.getBoundingClientRect(); return [r.height, r.bottom, r.left, r.right]; })"
        for height, bottom, left, right in browser.run(buttons):
            assert height >= 44 and bottom <= 900 and left >= 0 and right <= 390, "large enough, and on the screen"
        browser.run("document.querySelector('[data-fold]').click()")
        assert browser.run("document.documentElement.scrollHeight") > 1500
        assert all(bottom <= 900 for _, bottom, _, _ in browser.run(buttons)), "the keys stay on the screen"
        before = browser.run(ORDER)
        browser.run("document.querySelector('.say.left').click()")
        browser.wait(f"{ORDER} !== '{before}'")
        assert len(judgements(arena)) == 1 and serious(browser) == []


def test_a_crash_in_the_middle_loses_nothing_that_was_said(browser: Browser, tmp_path: Path) -> None:
    arena_of(tmp_path, pairs=12, checks=0.0, repeats=0.0)
    (tmp_path / "port").write_text("0")

    def serve() -> None:
        os.environ["PENCHANT_API_KEY"] = "a-key-that-stays-the-same"
        from penchant.cli import main

        sys.stdout = sys.stderr = (tmp_path / "said").open("w", buffering=1)
        main(["studio", str(tmp_path), "--port", (tmp_path / "port").read_text()])

    def started() -> tuple[Any, str]:
        (tmp_path / "said").write_text("")
        process = forked(serve)
        end = time.monotonic() + 60
        while not (found := re.search(r"http://127\.0\.0\.1:(\d+)/", (tmp_path / "said").read_text())):
            assert time.monotonic() < end, (tmp_path / "said").read_text()
            time.sleep(0.02)
        (tmp_path / "port").write_text(found[1])
        return process, found[0]

    process, address = started()
    try:
        browser.send("Network.clearBrowserCookies")
        browser.open(address)
        browser.wait("document.activeElement?.name === 'token'")
        browser.send("Input.insertText", text="a-key-that-stays-the-same")
        browser.press("Enter")
        browser.wait("location.pathname === '/arena'")
        browser.open(address + "arena/test")
        sign_in(browser, "Ada")
        for _ in range(3):
            say(browser, "ArrowLeft")
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        browser.press("ArrowRight")
        browser.wait("!document.getElementById('toast').hidden", "a failure is told")
        process, _ = started()
        say(browser, "ArrowRight")
        file = read_preferences(tmp_path / "arenas/test")
        assert [j.side for j in file.judgements.values()] == ["left"] * 3 + ["right"] and file.damaged == 0
    finally:
        process.kill()
        process.join()


def test_two_people_at_once(browser: Browser, tmp_path: Path) -> None:
    arena = arena_of(tmp_path, pairs=10, overlap=0.0, checks=0.0, repeats=0.0)
    with studio_of(tmp_path) as server:
        enter(browser, server, "arena/test")
        sign_in(browser, "Ada")
        ben = Person(server, "Ben")
        while "That was the last pair" not in (page := ben.get("/arena/test").text):
            mine = browser.run("document.querySelector('[name=pair]')?.value")
            assert f'value="{mine}"' not in page, "nobody else gets the pair that somebody has before them"
            ben.judge("test", "left")
            if mine is not None:
                say(browser, "ArrowRight")
        while browser.run("!!document.querySelector('#judge')"):
            say(browser, "ArrowRight")
        said = judgements(arena)
        assert {j.annotator for j in said} == {"Ada", "Ben"}
        assert sorted(j.pair for j in said) == sorted(arena.pairs)


PAYLOADS = (
    "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">",
    "</textarea></style></script><svg onload=\"document.title='owned'\">",
    "[click](javascript:document.title='owned') <http://evil.example/a> ![i](http://evil.example/i.png)",
    "\u202egnp.exe \u2066\u200bhidden\u2069 \x1b]0;owned\x07\x1b[2J",
    "{{ 7*7 }} ${7*7} <%= 7*7 %> hx-get=\"http://evil.example\" <div hx-get='http://evil.example' hx-trigger='load'>",
    "```html\n<script>document.title='owned'</script>\n```\n\n| <b>a</b> | b |\n|---|---|\n| <img src=x> | 2 |",
)


def test_answers_that_are_written_are_seen_and_then_judged(
    browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()

    async def write(self: Any, studio: Any, writers: Any, prompt: Any) -> AsyncIterator[tuple[int, str]]:
        yield 0, "<b>Half "
        yield 1, "The other"
        while not go_on.is_set():
            await asyncio.sleep(0.01)
        yield 0, "an answer**"

    monkeypatch.setattr("penchant.studio.writers.Writers.write", write)
    two = {"one": {"run": "a"}, "two": {"run": "b"}}
    arena = arena_of(tmp_path, answers=pairs.answers_to_generate(["Why?"], two), writers=two)
    with studio_of(tmp_path) as server:
        enter(browser, server, "arena/test")
        sign_in(browser, "Ada")
        browser.wait("document.querySelector('.sides').innerText.includes('The other')")
        assert "<b>Half" in browser.run("document.querySelector('.sides').innerText")
        assert browser.run("document.querySelector('.say.left').disabled")
        browser.press("ArrowLeft")
        go_on.set()
        browser.wait(
            "document.querySelector('.say.left')?.disabled === false && !document.querySelector('.htmx-request, .htmx-swapping, .htmx-settling')"
        )
        say(browser, "ArrowLeft")
        (row,) = lines(arena)
        assert {row["answer_a"], row["answer_b"]} == {"<b>Half an answer**", "The other"}
        assert browser.complaints() == []


def test_payloads_do_nothing_and_ask_for_nothing(browser: Browser, tmp_path: Path) -> None:
    rows = [(text, {text[:30]: f"{text} 1", "start": f"{text} 2"}) for text in PAYLOADS]
    models = {name: {} for _, answers in rows for name in answers}
    made = arena_of(tmp_path, answers=Answers(rows, models), reasons=(PAYLOADS[0][:40],), question=PAYLOADS[1])
    assert {p.prompt for p in made.pairs.values()} == set(PAYLOADS)
    with studio_of(tmp_path) as server:
        enter(browser, server, "arena/test")
        sign_in(browser, PAYLOADS[0][:55])
        asked, seen = [], set()
        while browser.run("!!document.querySelector('#judge')"):
            seen.add(browser.run("document.querySelector('[name=pair]').value"))
            assert (
                browser.run(
                    "document.querySelectorAll('main img, main script, main svg, main [hx-get], main a[href^=java]').length"
                )
                == 0
            )
            say(browser, "ArrowLeft")
        asked += browser.requests()
        for path in ("arena", "arena/test/results", "arena/new"):
            browser.open(server.address + path)
            browser.wait(READY)
            asked += browser.requests()
            assert browser.complaints() == [] and "owned" not in browser.run("document.title")
        hosts = {u.split("/")[2] for u in asked if u.startswith("http")}
        assert hosts == {server.address.split("/")[2]} and len(seen) >= 4
        (tmp_path / "offline.html").write_text(Person(server).get("/arena/test/report").text)
    browser.open(tmp_path / "offline.html")
    assert browser.complaints() == [] and len(browser.requests()) == 1 and "owned" not in browser.run("document.title")


def test_nothing_serious_for_axe_and_every_page_fits(browser: Browser, tmp_path: Path) -> None:
    def fits(page: str) -> None:
        """Check for no serious findings, in light and dark mode, on wide and phone screens, with everything expanded."""
        browser.wait(READY)
        browser.run("document.querySelectorAll('details').forEach((d) => { d.open = true; }); 0")
        assert serious(browser) == [], page
        browser.darken()
        browser.send("Emulation.setDeviceMetricsOverride", width=390, height=900, deviceScaleFactor=1, mobile=True)
        assert browser.run("document.documentElement.scrollWidth") <= 390, page
        assert serious(browser, "color-contrast", "target-size") == [], f"{page}, dark, on a phone"

    arena_of(tmp_path, pairs=4)
    long = Answers([("P", {"a": "# Title\n\n- long " * 200, "b": "`x`"})], {"a": {}, "b": {}})
    arena_of(tmp_path, "long", answers=long)
    with studio_of(tmp_path) as server:
        browser.send("Network.clearBrowserCookies")
        browser.open(server.address + "login")
        browser.run("document.querySelector('[name=token]').value = 'wrong'; document.forms[0].submit()")
        browser.wait("!!document.querySelector('[role=alert]')")
        assert serious(browser) == [], "a wrong token"
        enter(browser, server, "arena/test")
        fits("who")
        enter(browser, server, "arena/test")
        sign_in(browser, "Ada")
        for path in ("arena/test", "arena/test/results", "arena/long", "arena", "arena/new", "arena/nothing"):
            browser.open(server.address + path)
            fits(path)
            if path == "arena/test":
                say(browser, "ArrowLeft")


def test_axe_can_find_something(browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(
        "<!doctype html><title>t</title><p style='color:#eee;background:#fff'>pale</p><img src=x>"
    )
    browser.open(tmp_path / "page.html")
    found = serious(browser)
    assert any(f.startswith("image-alt") for f in found) and any(f.startswith("color-contrast") for f in found)


def test_a_new_arena_is_made_in_the_browser(browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "Q", "chosen": "good", "rejected": "bad"}\n')
    with studio_of(tmp_path) as server:
        enter(browser, server, "arena/new")
        browser.run("document.querySelector('[name=source][value=pairs]').click()")
        browser.wait("!document.querySelector('[data-part=pairs]').hidden")
        assert browser.run("document.querySelector('[data-part=runs]').hidden")
        browser.run("document.querySelector('[name=name]').focus()")
        browser.send("Input.insertText", text="bad/name")
        browser.run("document.querySelector('[name=name]').removeAttribute('pattern')")
        browser.press("Enter")
        browser.wait("document.getElementById('toast').innerText.includes('is not a name')")
        browser.run("document.querySelector('[name=name]').value = 'mine'")
        browser.press("Enter")
        browser.wait("location.pathname === '/arena/mine'")
        assert [a.name for a in pairs.arenas(tmp_path)] == ["mine"]
