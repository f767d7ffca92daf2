"""The whole report page: one small, inert file that says what is missing, and never makes a run fail."""

from __future__ import annotations

import json
import random
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from report_folders import evaluation, make_comparison, make_flags, make_run, make_sweep, write_json, write_lines

from penchant.errors import CheckpointError
from penchant.report import LiveReport, write_report
from penchant.report.data import read_report
from penchant.report.html import asset, content_security_policy, csp_hash
from penchant.report.page import SECTIONS, Section, render

EVIL = "<script>document.title='owned'</script></style></script></title><!--\u202e\x00\"'><img src=x onerror=alert(2)>&#x3c;javascript:alert(3)"
VOID = {"br", "hr", "input", "meta"}


class Page(HTMLParser):
    """Parses a page's tags, attributes and text. Fails on a tag that does not close the last open one."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open += [] if tag in VOID else [tag]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["script"] and self.open[-1:] != ["style"]:
            self.text += data


def written(*paths: Path, **options: Any) -> str:
    target = paths[0].parent / "out.html"
    return write_report(paths, target, strict=True, **options).read_text(encoding="utf-8")


def hostile(folder: Path) -> list[Path]:
    """A run and a comparison in which every text is hostile, including the names of the run and of figures."""
    run = make_run(folder / "r<script>alert(1)<", word=EVIL)
    make_flags(run, EVIL)
    write_json(
        run / "results.json", {"verdict": EVIL, "headline": [{"name": EVIL, "after": 1.0, "goal": EVIL, "met": True}]}
    )
    (run / "config.resolved.yaml").write_text(json.dumps({"loss": {"name": EVIL}, EVIL: EVIL}), encoding="utf-8")
    lines = [evaluation(0), evaluation(5, 0.7, 0.1, **{f"eval/{EVIL}": 1.0})]
    with (run / "metrics.jsonl").open("a") as out:
        out.writelines(json.dumps(line) + "\n" for line in lines)
    write_lines(
        run / "evaluations.jsonl",
        [{"time": EVIL, "step": EVIL, "what": {EVIL: EVIL}, "metrics": {EVIL: 1.0, f"{EVIL}/ci": [0, 2]}}],
    )
    return [run, make_comparison(folder / "c", word=EVIL)]


def test_every_tag_is_closed(tmp_path: Path) -> None:
    for i, paths in enumerate(
        ([make_run(tmp_path / "r")], [make_sweep(tmp_path / "s")], [make_comparison(tmp_path / "c")])
    ):
        text = written(*paths)
        page = Page(text)
        assert not page.open, (i, page.open)
        ids = [a["id"] for _, a in page.tags if "id" in a]
        assert len(ids) == len(set(ids))
        links = [str(a["href"]) for t, a in page.tags if t == "a"]
        assert links and all(link.startswith("#") and link[1:] in ids for link in links)


def test_nothing_that_a_run_says_can_run(tmp_path: Path) -> None:
    text = written(*hostile(tmp_path))
    page = Page(text)
    names = [tag for tag, _ in page.tags]
    assert names.count("script") == 2 and names.count("style") == 1
    assert not {"img", "iframe", "link", "object", "form", "base", "embed"} & set(names)
    attributes = [(k, v) for _, attrs in page.tags for k, v in attrs.items()]
    assert not [k for k, _ in attributes if k.startswith("on") or k in ("style", "src", "action", "formaction")]
    assert page.text.count("<script>document.title='owned'</script>") >= 20  # shown as text wherever it occurs
    assert "\u202e" not in text and "\x00" not in text and "U+202E" in page.text and "U+0000" in page.text


def test_hostile_text_changes_nothing_but_text(tmp_path: Path) -> None:
    """The same folders with harmless words give the same tags."""
    tame = make_run(tmp_path / "tame/r")
    make_flags(tame)
    evil = make_run(tmp_path / "evil/r", word=EVIL.replace("\x00", "").replace("\u202e", ""))
    make_flags(evil, EVIL.replace("\x00", "").replace("\u202e", ""))
    tags = [[t for t, _ in Page(written(p)).tags] for p in (tame, evil)]
    assert tags[0] == tags[1]


def test_the_policy_lets_in_one_stylesheet_and_one_script(tmp_path: Path) -> None:
    text = written(make_run(tmp_path / "r"))
    given = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    assert given is not None and given[1] == content_security_policy()
    for part in ("default-src 'none'", "base-uri 'none'", "form-action 'none'", "img-src data:"):
        assert part in content_security_policy()
    assert "unsafe" not in content_security_policy()
    style, script = re.search(r"<style>(.*?)</style>", text, re.S), re.search(r"<script>(.*?)</script>", text, re.S)
    assert (
        style is not None
        and csp_hash(style[1]) in content_security_policy()
        and script is not None
        and csp_hash(script[1]) in content_security_policy()
    )


def test_it_loads_nothing_from_anywhere(tmp_path: Path) -> None:
    text = written(make_sweep(tmp_path / "s"))
    assert not re.search(
        r"""(?:src|href|url\(|@import|fetch\(|XMLHttp|WebSocket)\s*[=(]?\s*["']?\s*(?:https?:)?//""", text
    )
    for name in ("page.js", "page.css", "shared.css"):
        assert "://" not in asset(name).replace("http://www.w3.org/2000/svg", "") and "</" not in asset(name)


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/manifest.json").write_text("{}")
    text = Page(written(tmp_path / "bare")).text
    for said in (
        "no metrics yet",
        "no samples",
        "no audit.json",
        "no config.resolved.yaml",
        "nothing was held out",
        "no flags.json",
        "none to draw",
    ):
        assert said in text, said
    assert "Nothing can be said yet" in text or "nothing was held out" in text


def test_a_reward_models_page_has_no_samples(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r")
    manifest = json.loads((run / "manifest.json").read_text())
    write_json(run / "manifest.json", {**manifest, "loss": "reward_model"})
    quartile = {"from": -5, "to": 3, "rows": 25, "accuracy": 0.6}
    bins = [{"confidence": 0.6, "right": 0.55}, {"confidence": 0.9, "right": 0.8}]
    write_json(
        run / "calibration.json",
        {"calibration": {"bins": bins}, "length": {"quartiles": [quartile], "longer_wins": 0.58}},
    )
    text = Page(written(run)).text
    assert "Completions side by side" not in text and "\u22125.00 to 3.00" in text and "58.0%" in text
    assert "Reliability on held-out pairs" in text


def test_a_running_run_loads_itself_anew(tmp_path: Path) -> None:
    text = written(make_run(tmp_path / "r", status="running"))
    assert '"running":true' in text and '<noscript><meta http-equiv="refresh"' in text and "still running" in text
    text = written(make_run(tmp_path / "r"))
    assert '"running":false' in text and 'http-equiv="refresh"' not in text and "still running</span>" not in text


JUNK: list[Any] = [
    None,
    True,
    "x",
    3,
    -1e999,
    [],
    [1],
    [[]],
    {},
    {"a": {"b": []}},
    [{"label": 3, "values": ["x", None, 1e308]}],
    "\ud800",
    10**400,
]
FILES = (
    "manifest.json",
    "audit.json",
    "results.json",
    "calibration.json",
    "flags.json",
    "sweep.json",
    "pipeline.json",
    "comparison.json",
)


def _spoilt(value: Any, rng: random.Random) -> Any:
    """A value with random parts replaced by junk."""
    if rng.random() < 0.12:
        return rng.choice(JUNK)
    if isinstance(value, dict):
        return {k: _spoilt(v, rng) for k, v in value.items()}
    return [_spoilt(v, rng) for v in value] if isinstance(value, list) else value


@pytest.mark.parametrize("seed", range(12))
def test_folders_with_junk_in_them_never_break_it(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    folder = (
        make_sweep(tmp_path / "s", betas=(0.1,), steps=5)
        if seed % 2
        else make_comparison(make_run(tmp_path / "r", steps=5))
    )
    make_flags(folder)
    write_json(
        folder / "calibration.json",
        {"calibration": {"bins": [{"confidence": 0.6, "right": 0.5}]}, "length": {"quartiles": [{}]}},
    )
    write_json(
        folder / "results.json",
        {"verdict": "x", "headline": [{"name": "n", "before": 1, "after": 2, "ci": [1, 2], "goal": "g"}]},
    )
    for path in [*folder.rglob("*.json")]:
        write_json(
            path,
            {**value, "keep": 1} if isinstance(value := _spoilt(json.loads(path.read_text()), rng), dict) else value,
        )
    for path in [*folder.rglob("*.jsonl")]:
        rows = [_spoilt(json.loads(line), rng) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"half')
    for path in folder.rglob("config.resolved.yaml"):
        path.write_text(rng.choice(["a: [", "- 1", "a: !!python/object:x {}", "\x00", "1: {2: 3}", "a: 2020-01-01"]))
    try:
        Page(written(folder))
    except CheckpointError:
        assert not any((folder / n).exists() for n in FILES)  # only an empty folder may be refused


def test_a_part_that_cannot_be_made_does_not_take_the_page_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: Any) -> None:
        raise RuntimeError("<b>why</b>")

    monkeypatch.setattr("penchant.report.page.SECTIONS", (Section("x", "X", "Broken", broken), *SECTIONS))
    data = read_report([make_run(tmp_path / "r")], 0.0)
    text = render(data)
    assert (
        "This section could not be built from these files (RuntimeError: " in text
        and "<b>why" not in text
        and "Curves" in text
    )
    with pytest.raises(RuntimeError):
        render(data, strict=True)


@pytest.mark.slow
def test_twenty_long_runs_stay_under_two_megabytes(tmp_path: Path) -> None:
    rng = random.Random(0)
    words = ["reward", "policy", "margin", "the", "of", "film", "never", "always", "quite", "good"]
    line = lambda n: " ".join(rng.choice(words) for _ in range(n))  # noqa: E731
    prompts = [line(12) for _ in range(200)]
    evals = [
        evaluation(s, 0.5 + s / 9000, 0.03, **{"eval/kl/policy_ref": s / 300, "eval/rewards/margins": s / 999})
        for s in range(0, 801, 100)
    ]
    # all have the same lines, since the page does not merge equal ones
    long = make_run(tmp_path / "long", steps=800, evals=evals)
    for i in range(20):
        beta, seed = i // 2 / 10, i % 2
        run = make_run(tmp_path / "runs" / f"beta-{beta}-seed-{seed}", beta=beta, seed=seed, steps=1, samples=0)
        for name in ("metrics.jsonl", "perf.jsonl"):
            shutil.copyfile(long / name, run / name)
        write_lines(
            run / "samples.jsonl",
            [{"prompt": p, "before": p[::-1], "after": line(40), "reward_after": 1.0} for p in prompts],
        )
    target = write_report(tmp_path / "runs", tmp_path / "out.html", strict=True)
    text = target.read_text()
    assert target.stat().st_size < 2_000_000
    assert text.count('data-g="J"') > 10 and Page(text).text.count(" more are in samples.jsonl") <= 1


# ---- the output path ------------------------------------------------------------------------------------------------


def test_where_it_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", beta=0.2)
    assert write_report(a) == a / "report.html" and write_report(str(a), b) == b / "report.html"
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    assert write_report([a, b]) == here / "report.html" == write_report([a, b])  # its own file may be overwritten
    (here / "report.html").write_text("mine")
    with pytest.raises(CheckpointError, match="not a report that Penchant wrote"):
        write_report([a, b])
    assert not list(here.glob(".tmp-*"))
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_report(a, tmp_path / "no/such/folder.html")
    with pytest.raises(CheckpointError, match="no path"):
        write_report([])


@pytest.mark.usefixtures("live_reports")
def test_a_live_report_is_written_now_and_then(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", status="running")
    clock = [0.0]
    live = LiveReport(run, clock=lambda: clock[0])
    stamp = lambda: live.path.exists() and (live.path.unlink() or True)  # noqa: E731
    live.on_event("step")
    assert stamp()
    for second in range(1, 30):
        clock[0] = float(second)
        live.on_event("step")
    assert not stamp()
    clock[0] = 31.0
    live.on_event("step")
    assert stamp()
    live.on_event("eval")
    assert stamp()


@pytest.mark.usefixtures("live_reports")
def test_a_report_that_takes_long_is_written_seldom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, calls = [0.0], []

    def slow(folder: Path) -> None:
        calls.append(folder)
        clock[0] += 2.0

    monkeypatch.setattr("penchant.report.write_report", slow)
    live = LiveReport(tmp_path, clock=lambda: clock[0])
    for _ in range(300):
        live.on_event("eval")
        clock[0] += 1.0
    assert len(calls) == 3  # two seconds each, and at most 1/50 of the time
    live.now()
    assert len(calls) == 4


@pytest.mark.usefixtures("live_reports")
def test_a_report_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    said: list[str] = []
    clock = [0.0]
    live = LiveReport(tmp_path / "nowhere", said.append, clock=lambda: clock[0])
    for _ in range(3):
        live.on_event("eval")
        clock[0] += 100.0
    assert len(said) == 1 and "could not be written" in said[0] and "no such run folder" in said[0]
