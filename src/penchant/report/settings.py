"""Settings side by side: one line each, its seeds together, the best first, and what may be said of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from penchant.report.data import ReportData, RunData, Setting
from penchant.report.html import Element, Node, el, said, table
from penchant.report.metrics import BY_NAME, Figure
from penchant.report.numbers import MISSING, count, estimate, interval, shown
from penchant.report.plot import strip, swatch
from penchant.report.safe import ci_of, mapping, mappings, num, text

JUDGED_BY = ("win_rate", "reward", "rewards/accuracies", "perplexity", "loss")
Pair = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Row:
    """A setting's figure.

    Args:
        values: of each of its runs that has one; ci: of its only run, over held-out rows; whole: whether all its runs came to their end.
        remarks: runs that stopped themselves or are still to come.
    """

    setting: Setting
    values: tuple[float, ...]
    ci: Pair | None
    whole: bool
    remarks: tuple[str, ...]

    @property
    def mean(self) -> float:
        return mean(self.values)

    @property
    def range(self) -> Pair:
        """From the lowest to the highest seed, or the interval of the only one."""
        return (min(self.values), max(self.values)) if len(self.values) > 1 else self.ci or (self.mean, self.mean)


@dataclass(frozen=True, slots=True)
class Ranking:
    """Settings by a figure, best first; those without one last."""

    figure: Figure
    up: bool
    rows: tuple[Row, ...]

    @property
    def best(self) -> tuple[Row, ...]:
        """Whole settings with the best mean."""
        whole = [r for r in self.rows if r.whole and r.values]
        return tuple(r for r in whole if r.mean == whole[0].mean) if whole else ()


def ranking(data: ReportData) -> Ranking | None:
    """Settings by what the sweep is judged by, or else by the first figure that the runs have; None where they have none."""
    table_ = mapping(data.sweep.get("table"))
    metric = text(table_.get("metric")).removeprefix("eval/") or next(
        (m for m in JUDGED_BY if any(num(r.evals[-1], f"eval/{m}") is not None for r in data.runs if r.evals)), ""
    )
    if not metric:
        return None
    figure = BY_NAME.get(metric, Figure(metric, metric))
    up = text(table_.get("direction")) != "min" if table_ else figure.up is not False
    records = mapping(data.sweep.get("runs"))
    rows = [_row(s, metric, records) for s in data.settings]
    sign = -1.0 if up else 1.0
    rows.sort(key=lambda r: (not r.values, not r.whole, sign * r.mean if r.values else 0.0))
    return Ranking(figure, up, tuple(rows)) if any(r.values for r in rows) else None


def _row(setting: Setting, metric: str, records: Mapping[str, Any]) -> Row:
    values: list[float] = []
    remarks: list[str] = []
    ci = None
    for run in setting.runs:
        record = mapping(records.get(run.name))
        state = text(record.get("state")) or run.status
        last = run.evals[-1] if run.evals else {}
        value = num(last, f"eval/{metric}")
        if state == "finished" and value is not None and (num(last, "step") or 0) > 0:
            values.append(value)
            ci = ci_of(last, f"eval/{metric}")
        else:
            remarks.append(_remark(run, state, record))
    return Row(setting, tuple(values), ci if len(values) == 1 else None, not remarks, tuple(remarks))


def _remark(run: RunData, state: str, record: Mapping[str, Any]) -> str:
    who = f"seed {run.seed}" if run.seed else run.name
    if state == "stopped":
        why = text(record.get("why"))
        return f"{who} stopped" + (f": {why}" if why else "")
    if state == "cut":  # successive halving: a rank at a rung is no result
        return f"{who} was {text(record.get('why')) or 'stopped early'}"
    if state == "running":
        return f"{who} is running"
    return f"{who}: {'no figure' if state == 'finished' else state or 'not started'}"


def settings_table(data: ReportData) -> Element | None:
    """One line a setting with its mean and spread; without any figure, the settings and how far they are."""
    ranked = ranking(data)
    if ranked is None:
        rows: list[Sequence[Node]] = [
            [
                name(s),
                ", ".join(r.method for r in s.runs[:1]),
                ", ".join(f"{r.seed}: {r.status or '?'}" for r in s.runs),
            ]
            for s in data.settings
        ]
        return (
            el("div", table(["setting", "method", "seeds"], rows, caption="Settings"), class_="panel") if rows else None
        )
    share = ranked.figure.share
    ends = [v for r in ranked.rows if r.values for v in r.range] + (
        [ranked.figure.null] if ranked.figure.null is not None else []
    )
    room = (max(ends) - min(ends)) * 0.06
    scale = (min(ends) - room, max(ends) + room)
    best = {r.setting.key for r in ranked.best}
    body = [_line(r, ranked, share, scale, r.setting.key in best) for r in ranked.rows]
    better = "higher is better" if ranked.up else "lower is better"
    caption = f"{ranked.figure.label} ({better}) on held-out rows, at the end of each run"
    return el(
        "div",
        table(["setting", "mean", "spread", "", "seeds"], body, numeric=(1,), caption=caption, class_="ranked"),
        class_="panel",
    )


def name(setting: Setting) -> Element:
    """A setting's letter, line and name."""
    return el("span", el("b", setting.key, class_="key"), swatch(setting.place), " ", said(setting.name), class_="who")


def _line(row: Row, ranked: Ranking, share: bool, scale: Pair, best: bool) -> list[Node]:
    runs = count(len(row.values), "seed") if row.whole else f"{len(row.values)} of {len(row.setting.runs)}"
    remarks = [el("small", f" {r}") for r in row.remarks]
    label: list[Node] = [
        name(row.setting),
        el("small", "best by validation", class_="best") if best and len(ranked.rows) > 1 else None,
    ]
    if not row.values:
        return [el("span", label), MISSING, "", "", el("span", runs, remarks)]
    picture = el(
        "span",
        strip(
            row.mean,
            row.range if row.range[0] < row.range[1] else None,
            ranked.figure.null,
            *scale,
            place=row.setting.place,
        ),
        class_="marks",
    )
    return [
        el("span", label),
        el("b", estimate(row.mean, row.ci, share)),
        spread(row, share),
        picture,
        el("span", runs, remarks),
    ]


def spread(row: Row, share: bool) -> str:
    """How sure a setting's mean is: over seeds where there are several, else over held-out rows."""
    if len(row.values) > 1:
        sd = f"sd {shown(stdev(row.values), False)}" if not share else f"sd {100 * stdev(row.values):.1f} points"
        return f"{shown(row.range[0], share)} to {shown(row.range[1], share)} over seeds, {sd}"
    return f"{interval(*row.ci, share)} by prompt" if row.ci else ""


def held_out_rows(data: ReportData) -> list[float]:
    """How many held-out rows the runs were evaluated on."""
    found = {v for r in data.runs if r.evals and (v := num(r.evals[-1], "eval/rows")) is not None}
    return sorted(found)


def tried(data: ReportData) -> int:
    """Settings that were tried, those that are not in the report too."""
    return max(len(data.settings), len(mappings(mapping(data.sweep.get("table")).get("settings"))))
