"""The report: whole, inert, and honest about what is missing."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from penchant.errors import CheckpointError
from penchant.report import write_report
from penchant.report.build import visible
from penchant.report.curves import Series, line_chart, number, ticks

EVIL = "<script>alert(1)</script></style></title>\u202e\"'><img src=x onerror=alert(2)>&#x3c;"


class _Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def _run(folder: Path, word: str = "fine") -> Path:
    folder.mkdir(exist_ok=True)
    lines = [
        {
            "kind": "eval",
            "step": 0,
            "eval/loss": 0.693,
            "eval/rewards/accuracies": 0.5,
            "eval/rewards/margins": 0.0,
            "eval/rows": 9,
        }
    ]
    lines += [
        {"kind": "train", "step": i, "loss": 0.7 - i / 100, "lr": 1e-5, "grad_norm": None if i == 2 else 1.0}
        for i in range(1, 9)
    ]
    lines += [
        {
            **lines[0],
            "step": 8,
            "eval/rewards/accuracies": 0.8,
            "eval/rewards/accuracies/ci": [0.7, 0.9],
            "eval/loss": 0.5,
        }
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines) + '{"half')
    (folder / "samples.jsonl").write_text(
        json.dumps({"prompt": word, "before": word, "after": word, "reward_before": 0.1, "reward_after": None})
    )
    (folder / "manifest.json").write_text(
        json.dumps(
            {"status": "finished", "steps": 8, "loss": word, "model": {"path": word, "parameters": 5}, "started": word}
        )
    )
    (folder / "config.resolved.yaml").write_text(f"output: {word}")
    finding = {"title": word, "count": 1, "of": 2, "share": 0.5, "where": [word], "note": word}
    (folder / "audit.json").write_text(
        json.dumps({"summary": word, "findings": {"x": finding}, "lengths": {word: {"mean": 3.0}}})
    )
    (folder / "results.json").write_text(
        json.dumps(
            {"verdict": word, "headline": [{"name": word, "before": 1.0, "after": 2.0, "goal": word, "met": True}]}
        )
    )
    return folder


def test_nothing_that_a_run_says_can_run(tmp_path: Path) -> None:
    text = write_report(_run(tmp_path / "run", EVIL)).read_text()
    page = _Page(text)
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "img", "iframe", "link", "object", "form", "a"}
    assert not [a for _, attrs in page.tags for a in attrs if a.startswith("on")]
    assert page.text.count("<script>alert(1)</script>") >= 8  # shown as text wherever it was put
    assert "\u202e" not in text and "U+202E" in page.text
    assert len(re.findall("<style>", text)) == 1


def test_it_loads_nothing_from_anywhere(tmp_path: Path) -> None:
    text = write_report(_run(tmp_path / "run")).read_text()
    assert "default-src 'none'" in text
    assert not re.search(r"""(src|href|url\(|@import)\s*=?\s*["']?\s*(https?:)?//""", text)
    assert len(text) < 200_000


def test_unicode_line_ends_inside_a_sample_are_text(tmp_path: Path) -> None:
    folder = _run(tmp_path / "run")
    row = {"prompt": "p", "before": "one\u2028two\x85three", "after": "found"}
    (folder / "samples.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert "found" in write_report(folder).read_text()


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    text = _Page(write_report(folder).read_text()).text
    for said in ("No metrics yet", "No samples", "No audit.json", "No config.resolved.yaml", "Nothing was held out"):
        assert said in text, said


def test_a_reward_models_page_has_its_own_sentence_and_no_samples(tmp_path: Path) -> None:
    folder = _run(tmp_path / "run")
    (folder / "results.json").unlink()
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "loss": "reward_model"}))
    (folder / "samples.jsonl").write_text("")
    text = _Page(write_report(folder).read_text()).text
    assert "the reward model scores the chosen answer higher in 80.0% of 9 held-out pairs" in text
    assert "Samples, before and after" not in text


def test_folders_without_a_run_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such run folder"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="holds no run"):
        write_report(tmp_path)


def test_verdict_says_when_nothing_was_shown(tmp_path: Path) -> None:
    folder = _run(tmp_path / "run")
    (folder / "results.json").unlink()
    assert (
        "prefers the chosen answer of 80.0% of 9 held-out pairs (95% interval 70.0% to 90.0%)"
        in write_report(folder).read_text()
    )
    lines = (folder / "metrics.jsonl").read_text().replace("[0.7, 0.9]", "[0.4, 0.9]")
    (folder / "metrics.jsonl").write_text(lines)
    assert "no preference was shown to be learned" in write_report(folder).read_text()


def test_charts_survive_odd_series() -> None:
    assert line_chart("t", [Series("a", ((1, math.nan),))]) is None
    for points in (
        ((1, 2.0),),
        ((1, 2.0), (2, 2.0)),
        ((1, 0.0), (2, 0.0)),
        tuple((i, math.sin(i)) for i in range(5000)),
    ):
        chart = line_chart("t", [Series("a", points)])
        assert chart is not None
        assert "nan" not in chart.svg and "inf" not in chart.svg
        assert len(chart.svg) < 20_000
        assert chart.rows


@pytest.mark.parametrize(
    "value,shown",
    [
        (0, "0"),
        (0.693147, "0.693"),
        (12345.6, "12,346"),
        (1e-5, "1.00e-5"),
        (None, "-"),
        (math.nan, "-"),
        (99.95, "100.0"),
        (-0.5, "-0.500"),
        (2.5e7, "2.50e7"),
    ],
)
def test_numbers(value: float | None, shown: str) -> None:
    assert number(value) == shown


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0.03, 0.97) == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert ticks(0, 100) == [0, 20, 40, 60, 80, 100]


def test_control_marks_are_named_and_line_breaks_kept() -> None:
    assert visible("a\u200fb\nc\x1b") == "a\u27e8U+200F\u27e9b\nc\u27e8U+001B\u27e9"
