"""Which of several settings is better, as far as paired tests on the same prompts, corrected for their number, and seeds say so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from penchant.evaluation.length_control import length_controlled_win_rate
from penchant.evaluation.significance import (
    holm,
    seeds_difference,
    several_sources,
    several_sources_p,
    sign_flip_test,
)
from penchant.evaluation.stats import Interval, bootstrap_ci, paired_bootstrap

FEW_PROMPTS = 10  # below it a percentile bootstrap is too narrow to name a winner
ALPHA = 0.05
MANY_PROMPTS = 100  # below it a sentence without a winner says that prompts are few


@dataclass(frozen=True, slots=True)
class Candidate:
    """A setting on the prompts that all met.

    Args:
        outcome: what is compared, (seeds, prompts): mean rewards, or the share of preferences that it got right.
        rewards, lengths: of its completions and their tokens, (seeds, prompts, samples); rewards None where nobody judged.
        fixed: a model that no other seed could have made otherwise (what training starts from).
    """

    name: str
    outcome: np.ndarray
    rewards: np.ndarray | None
    lengths: np.ndarray
    fixed: bool = False

    @property
    def seeds(self) -> int:
        return len(self.outcome)


@dataclass(frozen=True, slots=True)
class Pair:
    """Two settings compared: `name` minus `other`.

    Args:
        difference: of the mean outcome; p_prompts: of the sign-flip test by prompt; p_seeds: with seeds as a second source of chance,
            None where a side has one seed; corrected: Holm's, of the larger of the two, over all comparisons made together.
        win_rate, equal_length: of `name` over `other`, raw and at equal length; None without a reward.
    """

    name: str
    other: str
    difference: Interval
    p_prompts: float
    p_seeds: float | None
    win_rate: Interval | None
    equal_length: Interval | None
    corrected: float = 1.0

    @property
    def p(self) -> float:
        """The larger p-value: both have to be small."""
        return self.p_prompts if self.p_seeds is None else max(self.p_prompts, self.p_seeds)

    def to_json(self) -> dict[str, Any]:
        """As it stands in comparison.json."""
        intervals = {"difference": self.difference, "win_rate": self.win_rate, "equal_length": self.equal_length}
        return {
            "name": self.name,
            "other": self.other,
            **{k: None if v is None else v.to_dict() for k, v in intervals.items()},
            "p_prompts": self.p_prompts,
            "p_seeds": self.p_seeds,
            "p": self.p,
            "p_corrected": self.corrected,
        }


def compare_all(candidates: Sequence[Candidate]) -> list[Pair]:
    """Every candidate with the first, then all others with each other; corrected for all of them."""
    return corrected(compare_each(candidates))


def compare_each(candidates: Sequence[Candidate]) -> list[Pair]:
    """The same, not yet corrected."""
    first, *others = candidates
    pairs = [compare_two(c, first) for c in others]
    return pairs + [compare_two(a, b) for i, a in enumerate(others) for b in others[i + 1 :]]


def corrected(pairs: Sequence[Pair]) -> list[Pair]:
    """Comparisons corrected for their number."""
    return [replace(p, corrected=c) for p, c in zip(pairs, holm([p.p for p in pairs]), strict=True)]


def compare_two(a: Candidate, b: Candidate) -> Pair:
    """One comparison, not yet corrected."""
    over_seeds = all(c.fixed or c.seeds > 1 for c in (a, b)) and not (a.fixed and b.fixed)
    mine, theirs = a.outcome.mean(0), b.outcome.mean(0)
    over_seeds = over_seeds and len(mine) > 1
    p_seeds, difference = None, None
    if over_seeds:
        sources = [c.outcome.mean(1) for c in (a, b) if not c.fixed] + [mine - theirs]
        p_seeds = several_sources_p(float(mine.mean() - theirs.mean()), sources)
        difference = several_sources(float(mine.mean() - theirs.mean()), sources)
        if not (a.fixed or b.fixed):
            difference = seeds_difference(b.outcome, a.outcome)
    difference = difference or paired_bootstrap(theirs, mine)
    raw, controlled = _win_rates(a, b, over_seeds)
    return Pair(a.name, b.name, difference, sign_flip_test(theirs, mine), p_seeds, raw, controlled)


def _win_rates(a: Candidate, b: Candidate, over_seeds: bool) -> tuple[Interval | None, Interval | None]:
    """Per prompt, the share of pairs of completions in which a's has the higher reward, ties half; raw and at equal length."""
    if a.rewards is None or b.rewards is None:
        return None, None
    # (seeds of a, seeds of b, prompts, samples of a, samples of b)
    x, y = a.rewards[:, None, :, :, None], b.rewards[None, :, :, None, :]
    wins = (x > y) + 0.5 * (x == y)
    by_prompt = wins.mean((0, 1, 3, 4))
    if over_seeds:
        sides = [(c, wins.mean(axes)) for c, axes in ((a, (1, 2, 3, 4)), (b, (0, 2, 3, 4)))]
        raw = several_sources(float(wins.mean()), [w for c, w in sides if not c.fixed] + [by_prompt])
        raw = Interval(raw.estimate, max(0.0, raw.low), min(1.0, raw.high))
    else:
        raw = bootstrap_ci(by_prompt)
    mine = np.broadcast_to(a.lengths[:, None, :, :, None], wins.shape)
    theirs = np.broadcast_to(b.lengths[None, :, :, None, :], wins.shape)
    prompts = np.broadcast_to(np.arange(wins.shape[2])[:, None, None], wins.shape)
    controlled = length_controlled_win_rate(
        wins.reshape(-1),
        mine.reshape(-1),
        theirs.reshape(-1),
        clusters=prompts.reshape(-1),
        draws=max(200, min(1000, 4_000_000 // wins.size)),  # bounds the memory of the drawn weights
    )
    return raw, controlled


# ---------------------------------------------------------------------------------------------------------------------
# in words


def verdict(
    candidates: Sequence[Candidate], pairs: Sequence[Pair], what: str, also: Mapping[str, Sequence[Pair]] | None = None
) -> list[str]:
    """Who is better, or that there is no clear winner, and why; a sentence a comparison, then what one seed cannot say.

    Args:
        what: the outcome in words (``mean reward``, ``held-out preference accuracy``).
        also: the same comparisons by other rewards, by name, corrected for all of theirs.
    """
    prompts = candidates[0].outcome.shape[1]
    if prompts < FEW_PROMPTS:
        return [f"No winner is named: {prompts} prompts are too few for an interval (at least {FEW_PROMPTS})."]
    said = [_sentence(pair, len(pairs), prompts, what) for pair in pairs]
    others = sum(map(len, (also or {}).values()))
    for judge, by_it in (also or {}).items():
        said += [f"By {judge}: {_sentence(pair, others, prompts, 'mean reward')}" for pair in by_it]
    single = [c.name for c in candidates if c.seeds == 1 and not c.fixed]
    if single:
        have = "has one seed" if len(single) == 1 else "have one seed each"
        said.append(f"{_listed(single)} {have}: another seed of the same setting could turn what is said of it.")
    return said


def _sentence(pair: Pair, comparisons: int, prompts: int, what: str) -> str:
    ahead = pair.difference.estimate >= 0
    best, worst = (pair.name, pair.other) if ahead else (pair.other, pair.name)
    gap, rate, level = (_seen_from(ahead, i, c) for i, c in _intervals(pair))
    assert gap is not None
    shown = f"{what} is {_number(gap.estimate)} {_brackets(gap)} higher"
    if rate is not None:
        shown += f", its win rate {rate.estimate:.0%} {_brackets(rate, '.0%')}"
    shown += f", p {_p_is(pair.corrected)} (corrected for {_comparisons(comparisons)})"
    why = _doubt(pair, gap, rate, level, what)
    if why is None:
        return f"{best} is better than {worst}: its {shown}." + _about_length(rate, level)
    if pair.corrected >= ALPHA and prompts < MANY_PROMPTS:
        why += f"; with {prompts} prompts only a large difference shows"
    return f"Between {pair.name} and {pair.other} there is no clear winner: {best}'s {shown}; {why}."


def _doubt(pair: Pair, gap: Interval, rate: Interval | None, level: Interval | None, what: str) -> str | None:
    """Why the one that is ahead is not called better; None where it is."""
    if pair.corrected < ALPHA:
        if rate is not None and rate.estimate <= 0.5:
            return f"the figures contradict each other: the higher {what}, and no more wins than losses"
        if level is not None and level.high < 0.5:
            return f"the figures contradict each other: at equal length its win rate is {level.estimate:.0%} {_brackets(level, '.0%')}"
        return None if gap.low > 0.0 else "the interval of the difference includes 0"
    if pair.p < ALPHA:
        return f"p {_p_is(pair.p)} by itself is not small enough among so many comparisons"
    if pair.p_prompts < ALPHA and pair.p_seeds is not None:
        return "its seeds differ too much from each other: on these prompts alone it would be one"
    if gap.low <= 0.0:
        return "the interval of the difference includes 0"
    return "the interval is near 0 and the test by prompt does not tell them apart"


def _about_length(rate: Interval | None, level: Interval | None) -> str:
    if rate is None or level is None or level.low > 0.5:
        return ""
    return (
        f" At equal length its win rate is {level.estimate:.0%} {_brackets(level, '.0%')}: length may be why it wins."
    )


def _intervals(pair: Pair) -> list[tuple[Interval | None, float]]:
    """The pair's intervals, and what each one is mirrored at."""
    return [(pair.difference, 0.0), (pair.win_rate, 0.5), (pair.equal_length, 0.5)]


def _seen_from(ahead: bool, interval: Interval | None, centre: float) -> Interval | None:
    """The same interval of the other one of a pair."""
    if interval is None or ahead:
        return interval
    mirror = 2 * centre
    return Interval(mirror - interval.estimate, mirror - interval.high, mirror - interval.low)


def comparisons_table(pairs: Sequence[Pair], what: str, comparisons: int | None = None) -> str:
    """Comparisons as a plain table, with raw and corrected p-values, and how many there were (default: these)."""
    lines = [["comparison", f"difference of {what}"]]
    judged = any(p.win_rate is not None for p in pairs)
    lines[0] += ["win rate", "at equal length"] if judged else []
    lines[0] += ["p", f"p corrected for {_comparisons(len(pairs) if comparisons is None else comparisons)}"]
    for p in pairs:
        line = [f"{p.name} - {p.other}", f"{_number(p.difference.estimate)} {_brackets(p.difference)}"]
        if judged:
            line += [f"{i.estimate:.3f} {_brackets(i)}" if i else "-" for i in (p.win_rate, p.equal_length)]
        lines.append([*line, _p(p.p), _p(p.corrected)])
    return columns(lines)


def columns(lines: Sequence[Sequence[str]]) -> str:
    """Cells as a plain table."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def _brackets(interval: Interval, form: str = ".3f") -> str:
    return f"[{interval.low:{form}}, {interval.high:{form}}]"


def _number(value: float) -> str:
    return f"{value:.3f}"


def _p(p: float) -> str:
    return "<0.0001" if p < 1e-4 else f"{p:.4f}" if p < 0.1 else f"{p:.2f}"


def _p_is(p: float) -> str:
    return "< 0.0001" if p < 1e-4 else f"= {_p(p)}"


def _comparisons(n: int) -> str:
    return "1 comparison" if n == 1 else f"{n} comparisons"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
