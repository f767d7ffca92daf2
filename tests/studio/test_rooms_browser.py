"""The run and data pages in a real browser: live updates, a phone, hostile texts, and accessibility (axe)."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
from chromium import Browser, in_a_browser
from run_folders import eval_row, lines, make_run, train_rows
from studios import studio_of
from test_arena_browser import browser, enter, serious  # noqa: F401  a fixture

from penchant.runfolder import RunLock

pytestmark = in_a_browser

FIXTURES = Path(__file__).parents[1] / "fixtures/v0_1"
EVIL = (
    '<script>document.title = "caught"</script></style><img src=x onerror="document.title = \'caught\'">\u202e\x1b[31m'
)
LOSS = (
    "[...document.querySelectorAll('#curves figure')].find((f) => f.textContent.startsWith('loss'))?.textContent || ''"
)
QUIET = "!document.querySelector('.htmx-request, .htmx-swapping, .htmx-settling')"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Runs, a sweep, and rows, in which every text from a model or a file is hostile."""
    root = tmp_path / "studio"
    root.mkdir()
    run = make_run(root / "first", 8, why=EVIL)
    turns = [{"role": "system", "content": EVIL}, {"role": "user", "content": EVIL}]
    (run / "samples.jsonl").write_text(json.dumps({"messages": turns, "before": EVIL, "after": EVIL}) + "\n")
    flags = [{"title": EVIL, "level": "warning", "sentence": EVIL, "advice": EVIL}]
    (run / "flags.json").write_text(json.dumps(flags))
    make_run(root / "second", 5, status="finished", total_steps=5)
    shutil.copytree(FIXTURES / "sweep", root / "sweep")
    rows = [
        {
            "prompt": turns,
            "chosen": [{"role": "assistant", "content": f"{EVIL} {i}"}],
            "rejected": [{"role": "assistant", "content": "no"}],
        }
        for i in range(30)
    ]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n")
    return root


PAGES = (
    *("runs", "runs/view?run=first", "runs/view?run=first&run=second", "runs/group?kind=sweep&path=sweep", "runs/new"),
    *("data", "data/view?file=rows.jsonl&show=diff", "data/view?file=rows.jsonl&only=aside"),
)


def test_a_run_is_followed_live(browser: Browser, folder: Path) -> None:  # noqa: F811
    run = folder / "first"
    with studio_of(folder) as server:
        enter(browser, server, "runs/view?run=first")
        browser.wait(f"({LOSS}).includes('step 8:')", "no curve was drawn")
        with (run / "metrics.jsonl").open("a") as file:
            file.write(lines([*train_rows(9, 12), eval_row(12)]))
        browser.wait(f"({LOSS}).includes('step 12: training 0.')", "what was added was not drawn")
        said = browser.run("document.querySelector('[data-fact=step]').textContent")
        assert said.startswith("12")
        (run / "flags.json").write_text(json.dumps([{"title": "a new flag", "level": "note"}]))
        browser.wait("document.querySelector('#flags').textContent.includes('a new flag')")
        for held, button in ((RunLock(run), "Stop it"), (nullcontext(), "Go on with it")):
            with held:
                browser.wait(f"document.querySelector('.actions').textContent.includes('{button}')")
        (run / "metrics.jsonl").write_text(lines([eval_row(0), *train_rows(1, 4)]))  # it resumed from a checkpoint
        browser.wait(f"({LOSS}).includes('step 4:')", "a log that was cut back is drawn as it was")
        assert not browser.complaints()


@pytest.mark.slow
def test_a_run_that_is_followed_says_what_became_of_the_studio(browser: Browser, folder: Path) -> None:  # noqa: F811
    said = "document.getElementById('connection').textContent"
    with studio_of(folder) as server:
        enter(browser, server, "runs/view?run=first")
        browser.wait(f"({LOSS}).includes('step 8:')")
        port = int(server.address.rpartition(":")[2].strip("/"))
    browser.wait(f"{said}.includes('trying again')")
    with studio_of(folder, port):
        browser.wait(f"{said}.includes('started anew')")


def test_pages_are_inert_for_everybody_and_fit_a_phone(browser: Browser, folder: Path) -> None:  # noqa: F811
    with studio_of(folder) as server:
        enter(browser, server, "runs")
        for page in PAGES:
            browser.open(server.address + page, width=390, height=844)
            browser.wait(f"document.readyState === 'complete' && !!window.htmx && {QUIET}")
            if "runs/view" in page:
                browser.wait("document.querySelectorAll('#curves canvas').length > 2")
            browser.run("document.querySelectorAll('details').forEach((d) => { d.open = true; }); 0")
            wide = browser.run("document.documentElement.scrollWidth")
            assert wide <= 390, f"{page} is {wide} pixels wide"
            assert "caught" not in browser.run("document.title") and not browser.run(
                "document.querySelectorAll('main img').length"
            )
            text = browser.run("document.body.innerText")
            assert "\u202e" not in text and "\x1b" not in text
            strangers = [url for url in browser.requests() if not url.startswith((server.address, "data:"))]
            assert not strangers, strangers
            assert not browser.complaints(), page
            assert serious(browser) == [], page
            browser.darken()
            assert serious(browser, "color-contrast") == [], f"{page}, dark"


def test_a_report_runs_in_a_frame_of_its_own(browser: Browser, folder: Path) -> None:  # noqa: F811
    escape = "<script>try { parent.document.title = 'caught' } catch (e) {} fetch('/runs').catch(() => 0)</script><p>kept</p>"
    (folder / "first" / "report.html").write_text(escape)
    with studio_of(folder) as server:
        enter(browser, server, "runs/view?run=first")
        browser.run("document.querySelector('details.report summary').click(); 0")
        browser.wait("!!document.querySelector('iframe').src")
        browser.wait("[...document.querySelectorAll('iframe')].every((f) => f.contentDocument === null)")
        assert browser.run("document.querySelector('iframe').sandbox.value") == "allow-scripts"
        assert "caught" not in browser.run("document.title")


def test_a_row_is_edited_and_dropped_by_hand(browser: Browser, folder: Path) -> None:  # noqa: F811
    with studio_of(folder) as server:
        enter(browser, server, "data/view?file=rows.jsonl")
        browser.run("document.querySelector('article .do button').click(); 0")
        browser.wait("!!document.querySelector('textarea[name=row]')")
        browser.run(
            """document.querySelector('textarea[name=row]').value = '{"prompt": "p", "chosen": "mine", "rejected": "r"}'; 0"""
        )
        browser.run("document.querySelector('article form .primary').click(); 0")
        browser.wait("document.querySelector('article').textContent.includes('changed in the copy')")
        browser.wait(QUIET)
        assert "mine" in browser.run("document.querySelector('article').innerText")  # as it will be in the copy
        browser.run("[...document.querySelectorAll('article')][1].querySelector('form button').click(); 0")
        browser.wait("[...document.querySelectorAll('article')][1].textContent.includes('dropped in the copy')")
        browser.wait("document.querySelector('#edits').textContent.includes('2 rows edited')")
        browser.wait(QUIET)
        browser.run("document.querySelector('form[hx-post=\"/data/copy\"] button').click(); 0")
        browser.wait("document.querySelector('#copied').textContent.includes('rows that a person dropped')")
    made = [json.loads(line) for line in (folder / "rows.fixed.jsonl").read_text().splitlines()]
    assert len(made) == 29 and made[0]["chosen"] == "mine"


def test_runs_are_chosen_in_the_list_and_drawn_over_each_other(browser: Browser, folder: Path) -> None:  # noqa: F811
    with studio_of(folder) as server:
        enter(browser, server, "runs")
        shutil.copytree(folder / "second", folder / "deep/er/second")
        browser.open(server.address + "runs")
        browser.wait("!!window.htmx")
        for name in ("first", "deep/er/second"):
            browser.run(f"document.querySelector('[name=run][value=\"{name}\"]').click(); 0")
        browser.run("document.querySelector('#lines table').dataset.old = 'yes'; 0")
        typed = "const q = document.querySelector('[name=q]'); q.value = 'run'; q.dispatchEvent(new Event('input')); 0"
        browser.run(typed)
        browser.wait("!document.querySelector('#lines table').dataset.old")  # reloaded, as it is every few seconds
        assert browser.run("document.querySelectorAll('input[name=run]:checked').length") == 2
        assert not browser.complaints()
        browser.run("document.querySelector('#lines button').click(); 0")
        browser.wait("document.querySelectorAll('#curves canvas').length > 2")
        words = browser.wait(f"({LOSS}).includes('first training') && ({LOSS})")
        assert "second training" in words
