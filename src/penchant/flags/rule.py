"""The parts of a trust rule: evidence, thresholds, the views that rules read, and wording."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache
from typing import Any, Literal

from pydantic import Field, model_validator

from penchant.base.section import Section
from penchant.base.stats import Z95
from penchant.metrics.names import metric
from penchant.metrics.stats import t_quantile
from penchant.runfolder.values import mapping, num, number_of, sequence

# ---- Flags: a sentence with its evidence, so that readers can check it for themselves ----

Level = Literal["warning", "note"]


@dataclass(frozen=True, slots=True)
class Evidence:
    """Numbers that a flag is based on.

    Args:
        label: what the values are, with their unit: ``"log-prob of chosen answers, nats"``.
        steps: optimizer step of each value, or () if the values are not over steps; values: one per step, or any number without steps.
    """

    label: str
    values: tuple[float, ...]
    steps: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Flag:
    """A finding about a run or a comparison that a careful reader should know before trusting it.

    Args:
        name: of the rule, in snake case: ``likelihood_displacement``; title: a few words; level: ``warning`` or ``note``.
        sentence: what was found, with figures and steps; advice: what to look at or change next.
        about: the run or setting concerned, "" if there is only one.
    """

    name: str
    title: str
    level: Level
    sentence: str
    advice: str
    evidence: tuple[Evidence, ...]
    about: str = ""

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Flag:
        """Restore a flag from the output of `to_json`."""
        evidence = tuple(Evidence(e["label"], tuple(e["values"]), tuple(e["steps"])) for e in values["evidence"])
        return Flag(**{**values, "evidence": evidence})

    def to_json(self) -> dict[str, Any]:
        """The flag as written to files."""
        return asdict(self) | {
            "evidence": [{"label": e.label, "values": list(e.values), "steps": list(e.steps)} for e in self.evidence]
        }


# ---- The `trust` section of a config: thresholds for flags. It does not change what a run computes ----


class TrustConfig(Section):
    """Thresholds of the trust flags; docs/trust.md says what each rule does with them."""

    kl: list[float] = Field(
        [0.0, 20.0],
        min_length=2,
        max_length=2,
        description="accepted range of the KL to the start, nats per completion: [low, high]",
    )
    perplexity_ratio: float = Field(
        1.5,
        gt=1,
        description="how far the perplexity of held-out chosen answers may rise, as a multiple of the start's",
    )
    chosen_fall: float = Field(
        1.0, ge=0, description="how far log-probs of chosen answers may fall, nats per completion"
    )
    length_ratio: float = Field(1.25, gt=1, description="how many times their first length completions may become")
    accuracy_gap: float = Field(
        0.2, gt=0, lt=1, description="how far the accuracy on training rows may exceed that on held-out rows"
    )
    win_rate: float = Field(
        0.6,
        gt=0.5,
        lt=1,
        description="a win rate whose interval lies below this means that the rise in margin won nothing",
    )
    first_position: float = Field(
        0.05, ge=0, lt=0.5, description="how far the share of verdicts for the answer shown first may be from one half"
    )
    judge_failures: float = Field(0.05, ge=0, lt=1, description="share of a judge's replies that may be unreadable")
    ties: float = Field(
        0.9,
        gt=0,
        le=1,
        description="share of prompts or pairs that a reward may tie before a flag says that it tells nothing",
    )
    cut_rows: float = Field(0.1, ge=0, lt=1, description="share of rows that data.max_length may cut")
    bad_rows: float = Field(0.1, ge=0, lt=1, description="share of rows that may be left out as bad")
    skipped: float = Field(0.1, ge=0, lt=1, description="share of optimizer steps that may be skipped")
    prompts: int = Field(50, ge=2, description="with fewer prompts than this, a comparison is called small")

    @model_validator(mode="after")
    def _check_kl(self) -> TrustConfig:
        if not 0 <= self.kl[0] < self.kl[1]:
            raise ValueError(f"kl is {self.kl}; give [low, high] with 0 <= low < high")
        return self


# ---- The input of rules: figures with their standard errors, over the steps of a run ----

CONFIDENCE = 0.99  # of the two-sided intervals that rules use: half a percent on each side
SMALLEST_WINDOW = 5  # minimum number of training lines to average over


@dataclass(frozen=True, slots=True)
class Point:
    """A figure at a step.

    Args:
        se: its standard error, None if unknown; n: number of prompts or lines behind it.
    """

    step: int
    value: float
    se: float | None = None
    n: int = 0

    def bounds(self, tests: int = 1) -> tuple[float, float]:
        """The 99% interval (Student's t), Bonferroni-corrected for `tests` tests; just the value without a standard error."""
        half = 0.0 if self.se is None else critical_t(self.n, tests) * self.se
        return self.value - half, self.value + half


@lru_cache(maxsize=1024)
def critical_t(n: int, tests: int = 1) -> float:
    """Student's t for a 99% interval from n clusters, Bonferroni-corrected for `tests` tests."""
    return t_quantile(1 - (1 - CONFIDENCE) / (2 * tests), max(2, n) - 1)


def difference(now: Point, before: Point, times: float = 1.0) -> Point:
    """``now - times * before``, as if they were independent. On the same rows its interval is a bit too wide, never too narrow."""
    parts = [p for p in (now.se, None if before.se is None else times * before.se) if p is not None]
    se = math.sqrt(sum(p * p for p in parts)) if parts else None
    return Point(now.step, now.value - times * before.value, se, min(now.n or before.n, before.n or now.n))


@dataclass(frozen=True)
class RunView:
    """A run as read from its files.

    Args:
        lines: of metrics.jsonl; config: from config.resolved.yaml; audit: audit.json; samples: lines of samples.jsonl; trust: thresholds.
    """

    lines: Sequence[Mapping[str, Any]]
    config: Mapping[str, Any] = field(default_factory=dict)
    audit: Mapping[str, Any] = field(default_factory=dict)
    trust: TrustConfig = field(default_factory=TrustConfig)
    samples: Sequence[Mapping[str, Any]] = ()

    def audit_count(self, name: str) -> tuple[int, int]:
        """(count, total) of the rows that an audit finding is about."""
        entry = mapping(mapping(self.audit.get("findings")).get(name))
        return int(num(entry, "count") or 0), int(num(entry, "of") or 0)

    @cached_property
    def step_lines(self) -> list[Mapping[str, Any]]:
        """Lines with a step."""
        return [m for m in self.lines if num(m, "step") is not None]

    @cached_property
    def train(self) -> list[Mapping[str, Any]]:
        return [m for m in self.step_lines if m.get("kind") == "train"]

    @cached_property
    def evals(self) -> list[Mapping[str, Any]]:
        return [m for m in self.step_lines if m.get("kind") == "eval"]

    def section(self, name: str) -> Mapping[str, Any]:
        """A section of the config; empty if it is missing."""
        return mapping(self.config.get(name))

    def held_out_points(self, name: str) -> list[Point]:
        """``eval/NAME`` at every evaluation that has it, with the standard error from its 95% interval."""
        key, share = f"eval/{name}", metric(name).share
        points = []
        for m in self.evals:
            if (value := num(m, key)) is not None:
                n = self._sample_size(m, name)
                points.append(Point(int(m["step"]), value, standard_error(value, m.get(f"{key}/ci"), n, share), n))
        return points

    def _sample_size(self, line: Mapping[str, Any], name: str) -> int:
        """Number of prompts behind a figure: the sampled prompts for a figure of completions, else the held-out rows."""
        rows = int(line.get("eval/rows") or 0)
        if not name.startswith(("completions/", "kl/", "reward", "win_rate")) or name.startswith("rewards/"):
            return rows
        sampled = line.get("eval/kl/completions")
        if sampled is not None:
            return int(sampled)
        kl_prompts = 0 if self.config.get("algorithm") else int(self.section("evaluation").get("kl_prompts") or 0)
        return min(rows, kl_prompts) if kl_prompts else rows

    def training_points(self, name: str) -> list[Point]:
        """A figure from every training line that has it.

        Rollout figures that repeat the previous line, as in a second epoch on the same rollouts, are skipped.
        """
        points: list[Point] = []
        is_rollout_figure = name in ("reward", "kl/policy_ref") or name.startswith("completions/")
        for m in self.train:
            value = num(m, name)
            if value is not None and not (is_rollout_figure and points and points[-1].value == value):
                points.append(Point(int(m["step"]), value))
        return points

    def latest(self, name: str) -> tuple[Point, list[Point]] | None:
        """(now, all) of a figure: from evaluations if there is one after the start, else means over training lines."""
        held_out = self.held_out_points(name)
        if held_out and held_out[-1].step > 0:
            return held_out[-1], held_out
        points = self.training_points(name)
        now = window(points)
        return None if now is None else (now, smooth(points))

    def first_and_last(self, name: str) -> tuple[Point, Point, list[Point]] | None:
        """(first, last, all) of a figure: from evaluations if there are at least two, else from training lines."""
        held_out = self.held_out_points(name)
        if len(held_out) > 1:
            return held_out[0], held_out[-1], held_out
        points = self.training_points(name)
        first, last = window(points, last=False), window(points)
        return None if first is None or last is None else (first, last, points)

    @cached_property
    def chosen_tokens(self) -> float | None:
        """Mean length of chosen answers (of all answers, if rows are not pairs) in tokens, from the audit."""
        lengths = self.audit.get("lengths") or {}
        mean_length = num(lengths.get("chosen") or lengths.get("completion"), "mean")
        return mean_length if mean_length is not None and mean_length > 0 else None


def window(points: Sequence[Point], last: bool = True) -> Point | None:
    """Mean over the last (or first) quarter of training lines, at least five, with its standard error; None if there are too few.

    A drift within the window increases the standard error, so a rule stays silent rather than raising a false alarm.
    """
    size = max(SMALLEST_WINDOW, len(points) // 4)
    if len(points) < 2 * size:
        return None
    part = points[-size:] if last else points[:size]
    mean = sum(p.value for p in part) / size
    variance = sum((p.value - mean) ** 2 for p in part) / (size - 1)
    return Point(part[-1].step if last else part[0].step, mean, math.sqrt(variance / size), size)


def smooth(points: Sequence[Point]) -> list[Point]:
    """Trailing means over five lines, for finding the step at which something changed."""
    size = SMALLEST_WINDOW
    return [
        Point(points[i].step, sum(p.value for p in points[i - size + 1 : i + 1]) / size)
        for i in range(size - 1, len(points))
    ]


def first_step_above(points: Sequence[Point], limit: float) -> int:
    """The first step from which all values are above `limit`; the last step if there is none."""
    step = points[-1].step
    for p in reversed(points):
        if p.value <= limit:
            break
        step = p.step
    return step


def make_evidence(label: str, points: Sequence[Point]) -> Evidence:
    """Make the evidence of a flag from points."""
    return Evidence(label, tuple(p.value for p in points), tuple(p.step for p in points))


def standard_error(value: float, interval: Any, n: int, share: bool = False) -> float | None:
    """Standard error from a 95% interval; None without one.

    A bootstrap over few prompts is too narrow, by sqrt(n / (n - 1)), and has zero width if all prompts agree. A share therefore gets at
    least the Agresti-Coull standard error.
    """
    low, high = ends if len(ends := [number_of(end) for end in sequence(interval)]) == 2 else (None, None)
    if low is None or high is None:
        return None
    se = (high - low) / (2 * Z95)
    if n > 1:
        se *= math.sqrt(n / (n - 1))
    if share and n > 0:
        p = (value * n + 2) / (n + 4)
        se = max(se, math.sqrt(p * (1 - p) / (n + 4)))
    return se


# ---- Formatting figures in sentences ----


def format_number(value: float) -> str:
    """Format a number with three significant digits, and no exponent if it is large."""
    text = f"{value:.3g}"
    return f"{value:,.0f}" if "e" in text and abs(value) >= 100 else text


def format_interval(p: Point, tests: int = 1) -> str:
    """`` (99% interval 1 to 2)``, or empty if the standard error is unknown."""
    if p.se is None:
        return ""
    low, high = p.bounds(tests)
    return f" (99% interval {format_number(low)} to {format_number(high)})"


def percent(value: float) -> str:
    return f"{100 * value:.0f}%"


def format_share(p: Point) -> str:
    """A share in percent with its 99% interval, clipped to 0 and 100%."""
    low, high = p.bounds()
    return f"{percent(p.value)} (99% interval {percent(max(0.0, low))} to {percent(min(1.0, high))})"


# ---- Trust rules ----


@dataclass(frozen=True)
class ComparisonView:
    """A comparison as read from its files.

    Args:
        figures: comparison.json; rows: lines of comparison.jsonl; trust: thresholds.
    """

    figures: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    trust: TrustConfig

    @property
    def models(self) -> Mapping[str, Mapping[str, Any]]:
        """Figures by model, starting with the first model."""
        return mapping(self.figures.get("models"))

    @property
    def judge(self) -> Mapping[str, Any]:
        """Figures of the pairwise judge: failures, position preference."""
        return mapping(self.figures.get("judge"))

    @property
    def first(self) -> str:
        """Name of the model that all others are compared with."""
        return str(self.figures.get("first") or next(iter(self.models), ""))

    @property
    def others(self) -> dict[str, Mapping[str, Any]]:
        return {name: m for name, m in self.models.items() if name != self.first}

    @property
    def prompts(self) -> int:
        return int(self.figures.get("prompts") or len({r.get("prompt") for r in self.rows}))

    def point(self, figures: Mapping[str, Any], name: str) -> Point | None:
        """A figure of a model with its standard error; None if the model does not have it."""
        value, n = num(figures, name), self.prompts
        return None if value is None else Point(0, value, standard_error(value, figures.get(f"{name}/ci"), n), n)


@dataclass(frozen=True)
class Rule:
    """One rule with its documentation.

    Args:
        name, title: as in its flags; what: when it fires, as a formula; thresholds: keys of the `trust` section; needs: figures without which
            it never fires; alarms: its rate of false alarms; advice: what to do.
        of_run, of_comparison: the check itself, for runs and for comparisons.
    """

    name: str
    title: str
    what: str
    needs: str
    alarms: str
    advice: str
    thresholds: Sequence[str] = ()
    of_run: Callable[[RunView], Finding | None] | None = None
    of_comparison: Callable[[ComparisonView], Iterable[Finding]] | None = None

    def flag(self, finding: Finding) -> Flag:
        """Make a flag of this rule."""
        advice = finding.advice or self.advice
        return Flag(self.name, self.title, finding.level, finding.sentence, advice, finding.evidence, finding.about)


@dataclass(frozen=True, slots=True)
class Finding:
    """A finding of a rule; `advice` replaces the rule's own if it does not fit."""

    sentence: str
    evidence: tuple[Evidence, ...]
    level: Level = "warning"
    about: str = ""
    advice: str = ""


def finding(
    sentence: str, label: str, *values: float, level: Level = "warning", about: str = "", advice: str = ""
) -> Finding:
    """A finding with one piece of evidence that is not over steps."""
    return Finding(sentence, (Evidence(label, tuple(map(float, values))),), level, about, advice)
