"""The result of an audit: findings with counts, shares, intervals and places, as text and JSON."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from penchant.base.stats import wilson_interval
from penchant.base.text import printable

SHOWN = 20  # places listed per finding
FEW_SHOWN = 5  # the same in the short report
FAR = 0.05  # distance from one half: with many rows, much smaller ones are significant and do not matter
KEPT = 1000  # places kept per finding


@dataclass(frozen=True, slots=True)
class Finding:
    """One count of an audit: how many, out of how many, where.

    Args:
        where: the first `KEPT` places; interval: 95% interval of the share, if the count is an estimate from a sample;
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

    @property
    def is_notable(self) -> bool:
        """Whether there is something to look at: rows that should not exist, or a share with advice."""
        return bool(self.count and (self.advice or self.where))

    def lines(self, max_places: int) -> list[str]:
        """The finding as text, with at most `max_places` places."""
        share = f"({self.share:.1%})" if self.of else ""
        lines = [f"{self.title:<58} {self.count:>7,} of {self.of:>7,} {share:>8}  {self.note}".rstrip()]
        if self.where:
            more = f" and {self.count - max_places:,} more" if self.count > max_places else ""
            lines.append("    " + ", ".join(self.where[:max_places]) + more)
        return lines + ([f"    -> {self.advice}"] if self.count and self.advice else [])


@dataclass(frozen=True, slots=True)
class Audit:
    """All findings, and figures that are not defects: lengths in tokens and in characters."""

    summary: str
    findings: Mapping[str, Finding]
    lengths: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    characters: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    layout: str = ""

    def to_json(self, places: int = SHOWN) -> dict[str, Any]:
        """JSON-able: ``{"layout", "summary", "findings": {name: {title, count, of, share, where, note, interval, advice}}, "lengths", "characters"}``.

        Args:
            places: most places listed per finding (`KEPT` are kept).
        """
        findings = {
            name: {
                **asdict(f),
                "share": f.share,
                "where": list(f.where[:places]),
                "interval": f.interval and [*f.interval],
            }
            for name, f in self.findings.items()
        }
        return {"layout": self.layout, "summary": self.summary, **asdict(self), "findings": findings}

    def to_text(self, whole: bool = False) -> str:
        """The findings by share, largest first, then a line of checks that found nothing; `whole`: every count."""
        lines = [*self.layout.splitlines(), self.summary, ""]
        if whole:
            for f in self.findings.values():
                lines += f.lines(SHOWN)
            return "\n".join(printable(line) for line in [*lines, *self._lengths()])
        notable = {name: f for name, f in self.findings.items() if f.is_notable}
        for f in sorted(notable.values(), key=lambda f: -f.share):
            lines += f.lines(FEW_SHOWN)
        clean = [name.replace("_", " ") for name, f in self.findings.items() if f.of and name not in notable]
        clean = [words.replace("tokenising", "tokenizing") for words in clean]  # an old name in audit.json
        lines += [""] * bool(notable) + [
            f"{'Also checked, nothing found' if notable else 'Checked, nothing found'}: {', '.join(clean)}."
        ]
        return "\n".join(printable(line) for line in [*lines, "Every count, with lengths and more places: --all"])

    def _lengths(self) -> list[str]:
        lines: list[str] = []
        for unit, table in (("tokens", self.lengths), ("characters", self.characters)):
            if table:
                names = list(next(iter(table.values())))
                lines += ["", f"{unit:<24}" + "".join(f"{n:>9}" for n in names)]
                lines += [
                    f"{name:<24}" + "".join(f"{v:>9,.0f}" for v in figures.values()) for name, figures in table.items()
                ]
        return lines


def estimated_finding(title: str, count: int, total: int, note: str = "", **more: Any) -> Finding:
    """A finding whose share is an estimate, with its 95% interval in the note."""
    if not total:
        return Finding(title, 0, 0, note=note, **more)
    low, high = wilson_interval(count, total)
    interval = f"95% interval [{low:.1%}, {high:.1%}]"
    return Finding(title, count, total, note=interval + (f", {note}" if note else ""), interval=(low, high), **more)


def balance_finding(title: str, count: int, total: int, note: str, advice: str) -> Finding:
    """`estimated_finding`, with advice only if the share is at least `FAR` from one half and its interval excludes one half."""
    finding = estimated_finding(title, count, total, note)
    low, high = finding.interval or (0.0, 1.0)
    far = not low <= 0.5 <= high and abs(finding.share - 0.5) >= FAR
    return replace(finding, advice=advice) if far else finding


class Tally:
    """A count and the first places counted."""

    __slots__ = ("count", "where")

    def __init__(self) -> None:
        self.count = 0
        self.where: list[str] = []

    def add(self, where: str) -> None:
        self.count += 1
        if len(self.where) < KEPT:
            self.where.append(where)

    def merge(self, other: Tally) -> None:
        """Add the count and places of later rows."""
        self.count += other.count
        self.where += other.where[: KEPT - len(self.where)]

    def finding(self, title: str, total: int, note: str = "", advice: str = "") -> Finding:
        """The tally as a finding."""
        return Finding(title, self.count, total, tuple(self.where), note, advice=advice)


class Places:
    """The places of all rows, ``file:line`` each, in 12 bytes a row: the line as a number, the rest stored once."""

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
            prefix, digits = place, "-1"  # not a number that can be written back the same
        index = self._prefixes.get(prefix)
        if index is None:
            index = self._prefixes[prefix] = len(self._names)
            self._names.append(prefix)
        self._prefix.append(index)
        self._line.append(int(digits))

    def merge(self, other: Places) -> None:
        """Append the places of later rows."""
        indices = [self._prefixes.setdefault(name, len(self._prefixes)) for name in other._names]
        self._names = list(self._prefixes)
        self._prefix.frombytes(np.array(indices, np.int32)[np.array(other._prefix)].tobytes() if indices else b"")
        self._line.extend(other._line)

    def __getitem__(self, index: int) -> str:
        name, line = self._names[self._prefix[index]], self._line[index]
        return name if line < 0 else f"{name}{line}"


def quantiles(histogram: Mapping[int, int]) -> dict[str, float]:
    """Mean, percentiles and maximum of whole numbers, exactly as numpy gives them for the numbers themselves."""
    values = np.array(sorted(histogram), dtype=np.int64)
    counts = np.array([histogram[int(v)] for v in values], dtype=np.int64)
    n, cumulative = int(counts.sum()), np.cumsum(counts)

    def value_at(rank: float) -> float:
        low, high = int(np.floor(rank)), int(np.ceil(rank))
        a, b = (float(values[np.searchsorted(cumulative, i, side="right")]) for i in (low, high))
        return a + (b - a) * (rank - low)

    return {
        "mean": float((values * counts).sum() / n),
        **{f"p{q}": value_at((n - 1) * q / 100) for q in (5, 50, 95, 99)},
        "max": float(values[-1]),
    }
