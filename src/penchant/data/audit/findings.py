"""What an audit says: findings with counts, shares, intervals and places, as text and JSON."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from penchant.base.text import printable

SHOWN = 20  # places listed a finding
KEPT = 1000  # places held a finding


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was counted: how many, out of how many, where.

    Args:
        where: the first `KEPT` places; interval: 95% of the share, where the count is taken as a sample of something;
        advice: what to do about it.
    """

    title: str
    count: int
    of: int
    where: tuple[str, ...] = ()
    note: str = ""
    interval: tuple[float, float] | None = None
    advice: str = ""

    @property
    def share(self) -> float:
        return self.count / self.of if self.of else 0.0


@dataclass(frozen=True, slots=True)
class Audit:
    """All findings, and figures that are no defects: lengths in tokens and in characters."""

    summary: str
    findings: Mapping[str, Finding]
    lengths: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    characters: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    layout: str = ""

    def to_json(self) -> dict[str, Any]:
        """JSON-able: ``{"layout", "summary", "findings": {name: {title, count, of, share, where, note, interval, advice}}, "lengths", "characters"}``."""
        found = {
            name: {
                **asdict(f),
                "share": f.share,
                "where": list(f.where[:SHOWN]),
                "interval": f.interval and [*f.interval],
            }
            for name, f in self.findings.items()
        }
        return {"layout": self.layout, "summary": self.summary, **asdict(self), "findings": found}

    def to_text(self) -> str:
        """A readable table."""
        lines = [*self.layout.splitlines(), self.summary, ""]
        for f in self.findings.values():
            share = f"({f.share:.1%})" if f.of else ""
            lines.append(f"{f.title:<58} {f.count:>7,} of {f.of:>7,} {share:>8}  {f.note}".rstrip())
            if f.where:
                more = f" and {f.count - SHOWN:,} more" if f.count > SHOWN else ""
                lines.append("    " + ", ".join(f.where[:SHOWN]) + more)
            if f.count and f.advice:
                lines.append(f"    -> {f.advice}")
        for unit, table in (("tokens", self.lengths), ("characters", self.characters)):
            if table:
                names = list(next(iter(table.values())))
                lines += ["", f"{unit:<24}" + "".join(f"{n:>9}" for n in names)]
                lines += [f"{what:<24}" + "".join(f"{v:>9,.0f}" for v in q.values()) for what, q in table.items()]
        return "\n".join(printable(line) for line in lines)


def sampled(title: str, count: int, of: int, note: str = "", **more: Any) -> Finding:
    """A finding whose share is an estimate: with its 95% interval in the note."""
    if not of:
        return Finding(title, 0, 0, note=note, **more)
    low, high = wilson_interval(count, of)
    said = f"95% interval [{low:.1%}, {high:.1%}]"
    return Finding(title, count, of, note=said + (f", {note}" if note else ""), interval=(low, high), **more)


def unlike_half(title: str, count: int, of: int, note: str, advice: str) -> Finding:
    """`sampled`, with its advice only where the interval leaves one half out: else chance alone can give such a share."""
    found = sampled(title, count, of, note)
    low, high = found.interval or (0.0, 1.0)
    return replace(found, advice=advice) if not low <= 0.5 <= high else found


def wilson_interval(successes: int, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson's 95% score interval of a proportion: ``(p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)``."""
    p = successes / n
    centre = p + z * z / (2 * n)
    half = z * float(np.sqrt(p * (1 - p) / n + z * z / (4 * n * n)))
    return (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)


class Tally:
    """A count and its first places."""

    __slots__ = ("count", "where")

    def __init__(self) -> None:
        self.count = 0
        self.where: list[str] = []

    def add(self, where: str) -> None:
        self.count += 1
        if len(self.where) < KEPT:
            self.where.append(where)

    def finding(self, title: str, of: int, note: str = "", advice: str = "") -> Finding:
        """As a finding."""
        return Finding(title, self.count, of, tuple(self.where), note, advice=advice)


class Places:
    """The places of all rows, ``file:line`` each, in 12 bytes a row: the line as a number, the rest once."""

    def __init__(self) -> None:
        self._prefixes: dict[str, int] = {}
        self._names: list[str] = []
        self._prefix, self._line = array("i"), array("q")

    def __len__(self) -> int:
        return len(self._line)

    def append(self, place: str) -> None:
        prefix = place.rstrip("0123456789")
        digits = place[len(prefix) :]
        if not digits.isascii() or not digits or digits[0] == "0" or len(digits) > 18:
            prefix, digits = place, "-1"  # no number that can be written back
        at = self._prefixes.get(prefix)
        if at is None:
            at = self._prefixes[prefix] = len(self._names)
            self._names.append(prefix)
        self._prefix.append(at)
        self._line.append(int(digits))

    def __getitem__(self, at: int) -> str:
        name, line = self._names[self._prefix[at]], self._line[at]
        return name if line < 0 else f"{name}{line}"


def quantiles(histogram: Mapping[int, int]) -> dict[str, float]:
    """Mean, percentiles and maximum of whole numbers, exactly as numpy gives them for the numbers themselves."""
    values = np.array(sorted(histogram), dtype=np.int64)
    counts = np.array([histogram[int(v)] for v in values], dtype=np.int64)
    n, upto = int(counts.sum()), np.cumsum(counts)

    def at(rank: float) -> float:
        low, high = int(np.floor(rank)), int(np.ceil(rank))
        a, b = (float(values[np.searchsorted(upto, i, side="right")]) for i in (low, high))
        return a + (b - a) * (rank - low)

    return {
        "mean": float((values * counts).sum() / n),
        **{f"p{q}": at((n - 1) * q / 100) for q in (5, 50, 95, 99)},
        "max": float(values[-1]),
    }
