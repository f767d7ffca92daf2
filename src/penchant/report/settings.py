"""Settings side by side: their differences, full configs, and the ranking."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from penchant.base.text import counted as count
from penchant.metrics.names import METRICS, Metric, higher_is_better, metric
from penchant.report.data import ReportData, RunData, Setting
from penchant.report.html import Element, Node, el, fold, labeled, muted, note, panel, table, user_text
from penchant.report.svg import MISSING, estimate, format_value, interval, interval_plot, swatch
from penchant.runfolder.values import algorithm_of, ci_of, flatten, mapping, mappings, num, text

# ---- Configs: first the differences, then the full config of each setting ----

MOST_COLUMNS = 14
MAIN = (  # the main settings shown for a single run: key, label
    ("model.path", "model"),
    ("data.path", "data"),
    ("loss.name", "loss"),
    ("loss.beta", "beta"),
    ("algorithm.name", "algorithm"),
    ("algorithm.beta", "KL weight"),
    ("reward", "reward"),
    ("lora.r", "LoRA rank"),
    ("train.lr", "learning rate"),
    ("train.schedule", "schedule"),
    ("train.epochs", "epochs"),
    ("train.max_steps", "steps"),
    ("train.batch_size", "rows per step"),
    ("train.seed", "seed"),
    ("data.max_length", "max length, tokens"),
    ("reference.kind", "reference"),
)


def configs(data: ReportData) -> Element | None:
    """Build the section of configs; None if no run has a config."""
    runs = [r for r in data.runs if r.config_text]
    if not runs:
        return None
    if len(data.runs) == 1:
        return el(
            "div", _main_settings(runs[0].config), _full_config(runs[0].config_text, "resolved config, whole", "config")
        )
    folded: list[Node] = []
    for s in data.settings:
        first = [r for r in s.runs if r.config_text][:1]
        folded += [_full_config(r.config_text, labeled(s.key, r.name), f"config-{s.key}") for r in first]
    return el("div", differences(data), note("Whole configs, of the first run of each setting:"), folded)


def differences(data: ReportData) -> Element:
    """A table with a row per setting and a column per key that differs between any two."""
    values = {s.key: next((r.settings for r in s.runs if r.config), {}) for s in data.settings}
    if len(values) < 2:
        return muted(f"{count(len(data.runs), 'run')} of one setting: their seeds differ, and nothing else.")
    keys = differing_keys([v for v in values.values() if v])
    if not keys:
        return muted("No setting differs.")
    top = keys[:MOST_COLUMNS]
    rows: list[list[Node]] = [
        [setting_label(s), *(user_text(short(values[s.key].get(k))) for k in top)] for s in data.settings
    ]
    more = note(f"And {len(keys) - len(top)} more: {', '.join(keys[len(top) :])}.") if len(keys) > len(top) else None
    head: list[Node] = ["setting", *(user_text(k) for k in top)]
    return el("div", table(head, rows, caption="Only keys that differ", class_="keys"), more, class_="panel")


def differing_keys(settings: list[dict[str, Any]]) -> list[str]:
    """Keys whose values differ between settings, in the order of the configs."""
    keys = dict.fromkeys(k for s in settings for k in s)
    return [k for k in keys if len({text(s.get(k)) for s in settings}) > 1]


def _main_settings(config: Mapping[str, Any]) -> Element | None:
    values = flatten(config)
    if algorithm_of(config):  # the loss section is then unused
        values = {k: v for k, v in values.items() if not k.startswith("loss.")}
    rows: list[list[Node]] = [
        [label, user_text(short(values[key]))] for key, label in MAIN if values.get(key) not in (None, "")
    ]
    return panel([], rows, class_="facts") if rows else None


def short(value: Any) -> str:
    """Format a setting's value; absolute paths keep only their last two parts, so that a report can be shared."""
    if isinstance(value, str):
        parts = Path(value).parts
        return str(Path("\u2026", *parts[-2:])) if value.startswith("/") and len(parts) > 3 else value
    return "\u2013" if value is None else text(value)


def _full_config(config: str, summary: Any, key: str) -> Element:
    return fold(summary, el("pre", user_text(config, tag="code")), key=key)


# ---- Ranking of settings: one row each with its seeds pooled, best first ----

# the loss comes last: it is not comparable between methods
JUDGED_BY = sorted((m.name for m in METRICS.values() if m.main), key=lambda n: n == "loss")
Pair = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Row:
    """A setting's figure.

    Args:
        values: one for each finished run that has it; ci: if there is one run only, its interval over held-out rows; is_complete: whether all runs
            have a value; remarks: why the other runs have none.
    """

    setting: Setting
    values: tuple[float, ...]
    ci: Pair | None
    is_complete: bool
    remarks: tuple[str, ...]

    @property
    def mean(self) -> float:
        return mean(self.values)

    @property
    def range(self) -> Pair:
        """(lowest, highest) over seeds, or the interval if there is only one seed."""
        return (min(self.values), max(self.values)) if len(self.values) > 1 else self.ci or (self.mean, self.mean)


@dataclass(frozen=True, slots=True)
class Ranking:
    """Settings ranked by a figure, best first; settings without it come last."""

    figure: Metric
    up: bool
    rows: tuple[Row, ...]

    @property
    def best(self) -> tuple[Row, ...]:
        """The complete settings with the best mean; several if tied."""
        complete = [r for r in self.rows if r.is_complete and r.values]
        return tuple(r for r in complete if r.mean == complete[0].mean) if complete else ()


def ranking(data: ReportData) -> Ranking | None:
    """Rank settings by the sweep's metric, or by the first main metric that the runs have; None if there is none."""
    table_ = mapping(data.sweep.get("table"))
    logged = (m for m in JUDGED_BY if any(num(r.last, f"eval/{m}") is not None for r in data.runs))
    name = text(table_.get("metric")).removeprefix("eval/") or next(logged, "")
    if not name:
        return None
    figure = metric(name)
    up = text(table_.get("direction")) != "min" if table_ else higher_is_better(name)
    records = mapping(data.sweep.get("runs"))
    rows = [_row(s, name, records) for s in data.settings]
    sign = -1.0 if up else 1.0
    rows.sort(key=lambda r: (not r.values, not r.is_complete, sign * r.mean if r.values else 0.0))
    return Ranking(figure, up, tuple(rows)) if any(r.values for r in rows) else None


def _row(setting: Setting, figure: str, records: Mapping[str, Any]) -> Row:
    values: list[float] = []
    remarks: list[str] = []
    ci = None
    for run in setting.runs:
        record = mapping(records.get(run.name))
        state = text(record.get("state")) or run.status
        value = num(run.last, f"eval/{figure}")
        if state == "finished" and value is not None and (num(run.last, "step") or 0) > 0:
            values.append(value)
            ci = ci_of(run.last, f"eval/{figure}")
        else:
            remarks.append(_remark(run, state, record))
    return Row(setting, tuple(values), ci if len(values) == 1 else None, not remarks, tuple(remarks))


def _remark(run: RunData, state: str, record: Mapping[str, Any]) -> str:
    subject, reason = f"seed {run.seed}" if run.seed else run.name, text(record.get("why"))
    if state == "stopped":
        return f"{subject} stopped" + (f": {reason}" if reason else "")
    if state == "cut":  # successive halving: a rank at a rung is not a result
        return f"{subject} was {reason or 'stopped early'}"
    if state == "running":
        return f"{subject} is running"
    return f"{subject}: {'no figure' if state == 'finished' else state or 'not started'}"


def settings_table(data: ReportData) -> Element | None:
    """A table of settings with mean and spread; if there are no figures yet, with the status of each seed."""
    ranked = ranking(data)
    if ranked is None:
        seeds = [", ".join(f"{r.seed}: {r.status or '?'}" for r in s.runs) for s in data.settings]
        rows: list[list[Node]] = [
            [setting_label(s), s.runs[0].method, states] for s, states in zip(data.settings, seeds, strict=True)
        ]
        return panel(["setting", "method", "seeds"], rows, caption="Settings") if rows else None
    share = ranked.figure.share
    ends = [v for r in ranked.rows if r.values for v in r.range]
    ends += [ranked.figure.null] if ranked.figure.null is not None else []
    margin = (max(ends) - min(ends)) * 0.06
    scale = (min(ends) - margin, max(ends) + margin)
    best = {r.setting.key for r in ranked.best}
    body = [_ranking_row(r, ranked, share, scale, r.setting.key in best) for r in ranked.rows]
    better = "higher is better" if ranked.up else "lower is better"
    caption = f"{ranked.figure.title} ({better}) on held-out rows, at the end of each run"
    return panel(["setting", "mean", "spread", "", "seeds"], body, numeric=(1,), caption=caption, class_="ranked")


def setting_label(setting: Setting) -> Element:
    """A setting's letter, line sample and name."""
    return el(
        "span", el("b", setting.key, class_="key"), swatch(setting.place), " ", user_text(setting.name), class_="who"
    )


def _ranking_row(row: Row, ranked: Ranking, share: bool, scale: Pair, best: bool) -> list[Node]:
    runs = count(len(row.values), "seed") if row.is_complete else f"{len(row.values)} of {len(row.setting.runs)}"
    remarks = [el("small", f" {r}") for r in row.remarks]
    first = el("small", "best by validation", class_="best") if best and len(ranked.rows) > 1 else None
    label, seeds = el("span", setting_label(row.setting), first), el("span", runs, remarks)
    if not row.values:
        return [label, MISSING, "", "", seeds]
    ends = row.range if row.range[0] < row.range[1] else None
    plot = interval_plot(row.mean, ends, ranked.figure.null, *scale, place=row.setting.place)
    value = el("b", estimate(row.mean, row.ci, share))
    return [label, value, spread(row, share), el("span", plot, class_="marks"), seeds]


def spread(row: Row, share: bool) -> str:
    """Describe a mean's uncertainty: range and sd over seeds if there are several, else the interval over held-out rows."""
    if len(row.values) > 1:
        sd = f"{100 * stdev(row.values):.1f} points" if share else format_value(stdev(row.values))
        return f"{format_value(row.range[0], share)} to {format_value(row.range[1], share)} over seeds, sd {sd}"
    return f"{interval(*row.ci, share)} by prompt" if row.ci else ""


def held_out_rows(data: ReportData) -> list[float]:
    """The distinct numbers of held-out rows that the runs were evaluated on, ascending."""
    return sorted({v for r in data.runs if (v := num(r.last, "eval/rows")) is not None})


def count_tried(data: ReportData) -> int:
    """The number of settings tried, including any that are not in the report."""
    return max(len(data.settings), len(mappings(mapping(data.sweep.get("table")).get("settings"))))
