"""A sweep's results: one row per setting over its seeds, and the best setting by held-out metric."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from penchant.base.text import columns
from penchant.metrics.names import SELECTION_CAVEAT
from penchant.runfolder.values import ci_of, format_decimals, format_interval
from penchant.sweep import SEED, SweepRun
from penchant.sweep.halving import LOSS_UNIT_METRICS

Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Row:
    """One setting of the table.

    Args:
        values: metric of each finished run; interval: of the only run, over held-out rows; seeds: of all its runs.
        stopped: ``{run: why it stopped itself}``; varied: what distinguishes it from other settings; unfinished: number of unfinished runs.
        cut: where and why successive halving stopped its runs, or None.
    """

    setting: str
    varied: Mapping[str, Any]
    seeds: tuple[int, ...]
    values: tuple[float, ...]
    interval: tuple[float, float] | None
    stopped: Mapping[str, str]
    unfinished: int
    cut: Mapping[str, Any] | None = None

    @property
    def mean(self) -> float | None:
        return mean(self.values) if self.values else None

    @property
    def whole(self) -> bool:
        """Whether every run finished with a value. A mean over the surviving runs alone would flatter the setting."""
        return bool(self.values) and len(self.values) == len(self.seeds)

    def to_json(self) -> dict[str, Any]:
        return {
            "setting": self.setting,
            "varied": dict(self.varied),
            "seeds": list(self.seeds),
            "values": list(self.values),
            "mean": self.mean,
            "sd": stdev(self.values) if len(self.values) > 1 else None,
            "interval": self.interval,
            "stopped": dict(self.stopped),
            "cut": None if self.cut is None else dict(self.cut),
        }


@dataclass(frozen=True, slots=True)
class Table:
    """A sweep's settings, best first."""

    metric: str
    higher: bool
    rows: tuple[Row, ...]
    held_out: tuple[int, ...]

    @property
    def best(self) -> tuple[Row, ...]:
        """The setting with the best mean, or all that tie for it. Only whole settings qualify."""
        complete = [r for r in self.rows if r.whole]
        if not complete:
            return ()
        means = [r.mean or 0.0 for r in complete]
        best_mean = max(means) if self.higher else min(means)
        return tuple(r for r in complete if r.mean == best_mean)

    def to_json(self) -> dict[str, Any]:
        return {
            "metric": self.metric,
            "direction": "max" if self.higher else "min",
            "held_out_rows": list(self.held_out),
            "settings": [r.to_json() for r in self.rows],
            "best": [r.setting for r in self.best],
            "tried": len(self.rows),
        }

    def to_text(self) -> str:
        """Format the table for the terminal."""
        body = [(r.setting, _format_value(r.mean), _spread(r), _runs(r)) for r in self.rows]
        table = columns([("setting", "mean", "spread", "runs"), *body])
        extremes = dict.fromkeys(self.held_out[i] for i in (0, -1)) if self.held_out else ()
        rows = f"{' to '.join(f'{n:,}' for n in extremes) or 'no'} held-out {'row' if [*extremes] == [1] else 'rows'}"
        title = f"{self.metric} ({'higher' if self.higher else 'lower'} is better) at the end of each run, {rows}"
        return "\n".join([title, "", table, "", *self._conclusions()])

    def _conclusions(self) -> list[str]:
        lines = []
        cuts = [r.cut for r in self.rows if r.cut is not None]
        if self.best:
            names, n = ", ".join(r.setting for r in self.best), len(self.rows)
            lines.append(
                f"best by validation: {names} ({_format_value(self.best[0].mean)}); {n} setting{'s were' if n > 1 else ' was'} tried"
                + (f", {len(cuts)} of them only in part" if cuts else "")
            )
            if n > 1:
                lines.append(SELECTION_CAVEAT)
        else:
            lines.append("no setting has finished with all its seeds, so none is called best")
        if any(not r.whole and r.values for r in self.rows):
            lines.append("A setting with a run that stopped or has yet to finish is not called best.")
        if cuts:
            were, have = ("setting was", "it has") if len(cuts) == 1 else ("settings were", "they have")
            lines.append(
                f"{len(cuts)} {were} stopped early by successive halving: {have} no result, only a rank by {cuts[0]['metric']} at a "
                "rung, and what is cut early might have won later."
            )
        varied = {key for r in self.rows for key in r.varied}
        if self.metric in LOSS_UNIT_METRICS and any(k == "run" or k.split(".")[0] == "loss" for k in varied):
            lines.append(f"The loss varies, and {self.metric} is in its own units: these figures are not on one scale.")
        return lines


def make_table(runs: Sequence[SweepRun], records: Mapping[str, Record], metric: str, higher: bool) -> Table:
    """Build the table from the records of a sweep's runs, finished or not."""
    by_setting: dict[str, list[SweepRun]] = {}
    for run in runs:
        by_setting.setdefault(run.setting, []).append(run)
    rows = [_row(name, members, records, metric) for name, members in by_setting.items()]
    sign = -1.0 if higher else 1.0
    # whole settings first, best first, ties in file order; then those that were cut, last rung first; then the rest
    rows.sort(key=lambda r: (not r.whole, _cut_rank(r), sign * (r.mean if r.mean is not None else math.inf * sign)))
    held_out = [m["eval/rows"] for r in runs if (m := records.get(r.name, {}).get("metrics")) and "eval/rows" in m]
    return Table(metric, higher, tuple(rows), tuple(sorted(set(held_out))))


def _row(setting: str, runs: Sequence[SweepRun], records: Mapping[str, Record], metric: str) -> Row:
    values, stopped, unfinished = [], {}, 0
    interval = cut = None
    for run in runs:
        record = records.get(run.name, {})
        state = record.get("state")
        value = record.get("metrics", {}).get(metric) if state == "finished" else None
        if state == "stopped":
            stopped[run.name] = record["why"]
        elif state == "cut":
            cut = {**record["cut"], "why": record["why"]}
        elif state != "finished":
            unfinished += 1
        elif value is None:
            stopped[run.name] = f"{metric} is not a number"
        else:
            values.append(float(value))
            interval = ci_of(record["metrics"], metric)
    varied = {k: v for k, v in runs[0].varied.items() if k != SEED}
    single_interval = interval if len(runs) == 1 else None
    return Row(setting, varied, tuple(r.seed for r in runs), tuple(values), single_interval, stopped, unfinished, cut)


def _cut_rank(row: Row) -> tuple[int, int]:
    """(rung, rank) of a setting that was cut: the later the rung, the further up."""
    return (0, 0) if row.cut is None else (-row.cut["rung"], row.cut["rank"])


def _format_value(value: float | None) -> str:
    return "-" if value is None else format_decimals(value, ".4f")


def _spread(row: Row) -> str:
    if len(row.values) > 1:
        figures = map(_format_value, (stdev(row.values), min(row.values), max(row.values)))
        return "sd {} over seeds, {} to {}".format(*figures)
    interval = format_interval(row.interval, ".4f")
    return f"95% by prompt {interval}" if interval else "-"


def _runs(row: Row) -> str:
    parts = [f"{len(row.values)} of {len(row.seeds)}" if not row.whole else str(len(row.seeds))]
    if row.cut is not None:
        mean = row.cut["mean"]
        parts.append(row.cut["why"] + (f" ({_format_value(mean)} there)" if mean is not None else ""))
    if row.unfinished:
        parts.append(f"{row.unfinished} to come")
    parts += [f"stopped: {why}" for why in dict.fromkeys(row.stopped.values())]
    return ", ".join(parts)
