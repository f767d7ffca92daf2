"""Verdicts on which of several settings is better: paired tests on the same prompts, corrected for multiple comparisons, and seeds."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, Literal, TypeVar

import numpy as np

from penchant.base.text import columns
from penchant.metrics.stats import (
    Interval,
    holm,
    interval_from_sources,
    length_controlled_win_rate,
    p_value_from_sources,
    paired_bootstrap,
    seeds_difference,
    share_ci,
    sign_flip_test,
)
from penchant.runfolder.values import FEW_ROWS, format_decimals, format_interval, format_p

T = TypeVar("T")

ALPHA = 0.05
MAX_UNJUDGED = 0.1  # no winner is named if more than this share of pairs has no verdict
WIN_RATE = "judged win rate"
NOTABLE = 0.05  # distance from one half: a smaller position preference is called slight, even if significant
MANY_PROMPTS = 100  # with fewer prompts, a sentence without a winner adds that they are few


@dataclass(frozen=True, slots=True)
class Candidate:
    """A setting's results on the prompts that all settings share.

    Args:
        outcome: what is compared, (seeds, prompts): mean rewards, or preference accuracy; None if a judge decides pair by pair.
        rewards, lengths: rewards and token counts of its completions, (seeds, prompts, samples); rewards None without a reward.
        fixed: a model that does not depend on a seed (the model that training starts from).
    """

    name: str
    outcome: np.ndarray | None
    rewards: np.ndarray | None
    lengths: np.ndarray
    fixed: bool = False

    @property
    def seeds(self) -> int:
        return len(self.lengths)

    @property
    def prompts(self) -> int:
        return int(self.lengths.shape[1])


@dataclass(frozen=True, slots=True)
class Pair:
    """Two settings compared: `name` minus `other`.

    Args:
        difference: of the mean outcome; p_prompts: of the sign-flip test by prompt; p_seeds: with seeds as a second source of variance,
            None if a side has only one seed; corrected: the larger of the two after Holm's correction over all comparisons.
        win_rate, equal_length: of `name` over `other`, raw and at equal length; None without a reward.
        unjudged: share of pairs of completions without a verdict if a judge decides pair by pair; `difference` is then win rate minus
            one half. Otherwise None.
        ties: share of pairs of completions with equal rewards; None without a reward.
        chance: name of the second source of variance besides prompts.
    """

    name: str
    other: str
    difference: Interval
    p_prompts: float
    p_seeds: float | None
    win_rate: Interval | None
    equal_length: Interval | None
    corrected: float = 1.0
    unjudged: float | None = None
    ties: float | None = None
    chance: str = "seeds"

    @property
    def p(self) -> float:
        """The larger p-value, because both have to be small."""
        return self.p_prompts if self.p_seeds is None else max(self.p_prompts, self.p_seeds)

    def to_json(self) -> dict[str, Any]:
        """The comparison as written to comparison.json."""
        intervals = {"difference": self.difference, "win_rate": self.win_rate, "equal_length": self.equal_length}
        return {
            "name": self.name,
            "other": self.other,
            **{k: None if v is None else v.to_dict() for k, v in intervals.items()},
            "p_prompts": self.p_prompts,
            "p_seeds": self.p_seeds,
            "p": self.p,
            "p_corrected": self.corrected,
            **({} if self.unjudged is None else {"unjudged": self.unjudged}),
            **({} if self.ties is None else {"ties": self.ties}),
        }


def compare_all(candidates: Sequence[Candidate]) -> list[Pair]:
    """Compare every candidate with the first, then all others with each other, corrected for the number of comparisons."""
    return correct_p_values(compare_uncorrected(candidates))


def compare_uncorrected(candidates: Sequence[Candidate]) -> list[Pair]:
    """`compare_all` without the correction."""
    return [compare_two(a, b) for a, b in pairings(candidates)]


def pairings(settings: Sequence[T]) -> Iterator[tuple[T, T]]:
    """Yield every setting paired with the first, then all pairs of the others."""
    first, *others = settings
    yield from ((setting, first) for setting in others)
    yield from combinations(others, 2)


def correct_p_values(pairs: Sequence[Pair]) -> list[Pair]:
    """Add p-values corrected for the number of comparisons."""
    return [replace(p, corrected=c) for p, c in zip(pairs, holm([p.p for p in pairs]), strict=True)]


def compare_two(a: Candidate, b: Candidate) -> Pair:
    """Compare two candidates by their outcomes, without correction."""
    assert a.outcome is not None and b.outcome is not None
    over_seeds = _has_seed_variance(a, b)
    a_means, b_means = a.outcome.mean(0), b.outcome.mean(0)
    p_seeds, difference = None, None
    if over_seeds:
        seeds = [o.mean(1) for c, o in ((a, a.outcome), (b, b.outcome)) if not c.fixed]
        sources = [*seeds, a_means - b_means]
        p_seeds = p_value_from_sources(float(a_means.mean() - b_means.mean()), sources)
        difference = interval_from_sources(float(a_means.mean() - b_means.mean()), sources)
        if not (a.fixed or b.fixed):
            difference = seeds_difference(b.outcome, a.outcome)
    difference = difference or paired_bootstrap(b_means, a_means)
    raw, controlled, ties = _win_rates(a, b, over_seeds)
    return Pair(a.name, b.name, difference, sign_flip_test(b_means, a_means), p_seeds, raw, controlled, ties=ties)


def _win_rates(a: Candidate, b: Candidate, over_seeds: bool) -> tuple[Interval | None, Interval | None, float | None]:
    """Win rate of a's completions over b's by reward, ties half: raw, at equal length, and the share of ties."""
    if a.rewards is None or b.rewards is None:
        return None, None, None
    # (seeds of a, seeds of b, prompts, samples of a, samples of b)
    x, y = a.rewards[:, None, :, :, None], b.rewards[None, :, :, None, :]
    wins = (x > y) + 0.5 * (x == y)
    raw = _win_rate(wins, _variance_sources(a, b, wins) if over_seeds else None)
    controlled = _win_rate_at_equal_length(wins, a.lengths[:, None, :, :, None], b.lengths[None, :, :, None, :])
    return raw, controlled, float((x == y).mean())


def compare_judged(a: Candidate, b: Candidate, wins: np.ndarray, chance: str = "seeds") -> Pair | None:
    """Compare two candidates by a judge's pairwise verdicts, without correction; None if there are no verdicts.

    Tests whether the mean over prompts of their mean wins is one half.

    Args:
        wins: of a, (seeds of a, seeds of b, prompts, samples), sample by sample: 1, 0 or between, NaN without a verdict.
        chance: name of what the seed axes stand for.
    """
    judged = ~np.isnan(wins)
    unjudged = 1.0 - float(judged.mean())
    if not judged.any():
        return None
    wins = wins[:, :, judged.any((0, 1, 3))]
    by_prompt = np.nanmean(wins, (0, 1, 3))
    sources = _variance_sources(a, b, wins) if _has_seed_variance(a, b) and len(by_prompt) > 1 else None
    if sources is not None and any(np.isnan(s).any() for s in sources):
        sources = None  # a seed without any verdict
    raw = _win_rate(wins, sources)
    gain = Interval(*(v - 0.5 for v in (raw.estimate, raw.low, raw.high)))
    a_lengths, b_lengths = (x[:, :, judged.any((0, 1, 3))] for x in (a.lengths[:, None], b.lengths[None, :]))
    return Pair(
        a.name,
        b.name,
        gain,
        sign_flip_test(np.full(len(by_prompt), 0.5), by_prompt),
        None if sources is None else p_value_from_sources(gain.estimate, sources),
        raw,
        _win_rate_at_equal_length(wins, a_lengths, b_lengths),
        unjudged=unjudged,
        chance=chance,
    )


def _has_seed_variance(a: Candidate, b: Candidate) -> bool:
    """Whether the variance between seeds can be estimated."""
    return all(c.fixed or c.seeds > 1 for c in (a, b)) and not (a.fixed and b.fixed) and a.prompts > 1


def _variance_sources(a: Candidate, b: Candidate, wins: np.ndarray) -> list[np.ndarray]:
    """A win rate's sources of variance: seeds of either side, prompts. wins: (seeds of a, seeds of b, prompts, ...)."""
    axes = tuple(range(3, wins.ndim))
    with warnings.catch_warnings():  # the mean of an empty slice is NaN, which the caller checks
        warnings.simplefilter("ignore", RuntimeWarning)
        a_means, b_means = np.nanmean(wins, (1, 2, *axes)), np.nanmean(wins, (0, 2, *axes))
    seeds = [means for c, means in ((a, a_means), (b, b_means)) if not c.fixed]
    return [*seeds, np.nanmean(wins, (0, 1, *axes))]


def _win_rate(wins: np.ndarray, sources: Sequence[np.ndarray] | None) -> Interval:
    """The win rate with its interval: by prompt, or over several sources of variance."""
    by_prompt = np.nanmean(wins, (0, 1, *range(3, wins.ndim)))
    if sources is None:
        return share_ci(by_prompt)
    return interval_from_sources(float(by_prompt.mean()), sources, share=True)


def _win_rate_at_equal_length(wins: np.ndarray, a_lengths: np.ndarray, b_lengths: np.ndarray) -> Interval:
    """The win rate at equal length. a_lengths, b_lengths: tokens, broadcastable to (seeds of a, seeds of b, prompts, ...)."""
    prompts = np.arange(wins.shape[2]).reshape(-1, *[1] * (wins.ndim - 3))
    judged = ~np.isnan(wins)
    lengths, other_lengths, clusters = (np.broadcast_to(x, wins.shape)[judged] for x in (a_lengths, b_lengths, prompts))
    draws = max(200, min(1000, 4_000_000 // wins.size))  # bounds the memory of the drawn weights
    return length_controlled_win_rate(wins[judged], lengths, other_lengths, clusters=clusters, draws=draws)


# ---- in words ----


@dataclass(frozen=True, slots=True)
class Sentence:
    """A sentence of the verdict.

    Args:
        tone: ``good``: a winner is named; ``open``: none is; ``plain``: other information.
        by: the other reward or judge that it refers to, "" for the comparison's own outcome.
    """

    text: str
    tone: Literal["good", "open", "plain"] = "plain"
    by: str = ""


@dataclass(frozen=True, slots=True)
class ComparisonGroup:
    """Comparisons by one judge, reported after those by the reward.

    Args:
        by: the judge's name; pairs: corrected; what: as for `verdict`; comparisons: the number they were corrected for.
        doubt: if set, the reason why no winner is named regardless of the pairs.
    """

    by: str
    pairs: Sequence[Pair]
    what: str
    comparisons: int
    doubt: str = ""

    def sentences(self, prompts: int) -> list[Sentence]:
        """One sentence per comparison, or a single one with the doubt."""
        if self.doubt:
            return [Sentence(f"By {self.by}: no winner is named: {self.doubt}.", "open", self.by)]
        sentences = (_sentence(p, self.comparisons, prompts, self.what) for p in self.pairs)
        return [Sentence(f"By {self.by}: {s.text}", s.tone, self.by) for s in sentences]


def verdict(
    candidates: Sequence[Candidate], pairs: Sequence[Pair], what: str, others: Sequence[ComparisonGroup] = ()
) -> list[Sentence]:
    """State for each comparison which setting is better, or why there is no clear winner, then list settings with only one seed.

    Args:
        what: the outcome in words (``mean reward``, ``held-out preference accuracy``).
        others: the same comparisons by other judges.
    """
    prompts = candidates[0].prompts
    if prompts < FEW_ROWS:
        reason = f"{prompts} prompts are too few for an interval (at least {FEW_ROWS})"
        return [Sentence(f"No winner is named: {reason}.", "open")]
    sentences = [_sentence(pair, len(pairs), prompts, what) for pair in pairs]
    sentences += [s for group in others for s in group.sentences(prompts)]
    single = [c.name for c in candidates if c.seeds == 1 and not c.fixed]
    if single:
        clause = "has one seed" if len(single) == 1 else "have one seed each"
        sentences.append(
            Sentence(f"{_join_names(single)} {clause}: another seed of the same setting could change this verdict.")
        )
    return sentences


def _sentence(pair: Pair, comparisons: int, prompts: int, what: str) -> Sentence:
    ahead = pair.difference.estimate >= 0
    best, worst = (pair.name, pair.other) if ahead else (pair.other, pair.name)
    intervals = ((pair.difference, 0.0), (pair.win_rate, 0.5), (pair.equal_length, 0.5))
    gap, rate, level = (i if i is None or ahead else i.mirrored(about) for i, about in intervals)
    assert gap is not None
    opening = f"Between {pair.name} and {pair.other} there is no clear winner:"
    if pair.ties == 1.0:
        return Sentence(f"{opening} tied on {prompts} of {prompts} prompts, so {what} cannot tell them apart.", "open")
    if gap.estimate == 0.0:
        brackets = _format_brackets(gap) if gap.low < gap.high and pair.unjudged is None else ""
        return Sentence(f"{opening} neither is ahead in {what}{brackets}.", "open")
    lead = f"{what} is {_format_estimate(gap)} higher"
    if pair.unjudged is not None and rate is not None:
        lead = f"win rate is {_format_estimate(rate, '.0%')}"
    elif rate is not None:
        lead += f", its win rate {_format_estimate(rate, '.0%')}"
    lead += f", p {_p_clause(pair.corrected)} (corrected for {_count_comparisons(comparisons)})"
    reason = _reason_for_doubt(pair, gap, rate, level, what)
    if reason is None:
        return Sentence(f"{best} is better than {worst}: its {lead}.{_length_caveat(rate, level)}", "good")
    if pair.corrected >= ALPHA and prompts < MANY_PROMPTS:
        reason += f"; with {prompts} prompts only a large difference shows"
    return Sentence(f"{opening} {best}'s {lead}; {reason}.", "open")


def _reason_for_doubt(
    pair: Pair, gap: Interval, rate: Interval | None, equal_length: Interval | None, what: str
) -> str | None:
    """Why the leading setting is not called better; None if it is."""
    if pair.unjudged is not None and pair.unjudged > MAX_UNJUDGED:
        return f"{pair.unjudged:.0%} of their pairs could not be judged"
    if pair.corrected < ALPHA:
        if rate is not None and rate.estimate <= 0.5:
            return f"the figures contradict each other: the higher {what}, and no more wins than losses"
        if equal_length is not None and equal_length.high < 0.5:
            return f"the figures contradict each other: at equal length its win rate is {_format_estimate(equal_length, '.0%')}"
        return None if gap.low > 0.0 else _includes_chance(pair)
    if pair.p < ALPHA:
        return f"p {_p_clause(pair.p)} by itself is not small enough among so many comparisons"
    if pair.p_prompts < ALPHA and pair.p_seeds is not None:
        return f"its {pair.chance} differ too much from each other: on these prompts alone it would be one"
    if gap.low <= 0.0:
        return _includes_chance(pair)
    return f"the interval is near {'0' if pair.unjudged is None else '50%'} and the test by prompt does not tell them apart"


def _includes_chance(pair: Pair) -> str:
    return f"the interval of the {'difference includes 0' if pair.unjudged is None else 'win rate includes 50%'}"


def _length_caveat(rate: Interval | None, equal_length: Interval | None) -> str:
    if rate is None or equal_length is None or equal_length.low > 0.5:
        return ""
    return f" At equal length its win rate is {_format_estimate(equal_length, '.0%')}: length may be why it wins."


def comparisons_table(pairs: Sequence[Pair], what: str, comparisons: int | None = None) -> str:
    """Format comparisons as a plain text table with raw and corrected p-values; `comparisons`: their number (default: these)."""
    by_pairs = any(p.unjudged is not None for p in pairs)  # the win rate already shows the difference
    rows = [["comparison", *([] if by_pairs else [f"difference of {what}"])]]
    has_win_rates = any(p.win_rate is not None for p in pairs)
    rows[0] += ["win rate", "at equal length"] if has_win_rates else []
    rows[0] += ["p", f"p corrected for {_count_comparisons(len(pairs) if comparisons is None else comparisons)}"]
    for p in pairs:
        row = [f"{p.name} - {p.other}"]
        row += [] if by_pairs else [_format_estimate(p.difference)]
        if has_win_rates and p.ties == 1.0:
            row += ["all tied", "-"]
        elif has_win_rates:
            row += [_format_estimate(i) if i else "-" for i in (p.win_rate, p.equal_length)]
        rows.append([*row, format_p(p.p), format_p(p.corrected)])
    return columns(rows)


def _format_estimate(interval: Interval, format_spec: str = ".3f") -> str:
    return format_decimals(interval.estimate, format_spec) + _format_brackets(interval, format_spec)


def _format_brackets(interval: Interval, format_spec: str = ".3f") -> str:
    """The interval in brackets after a space; empty if it has no width."""
    brackets = format_interval((interval.low, interval.high), format_spec)
    return f" {brackets}" if brackets else ""


def _p_clause(p: float) -> str:
    return "< 0.0001" if p < 1e-4 else f"= {format_p(p)}"


def _count_comparisons(n: int) -> str:
    return "1 comparison" if n == 1 else f"{n} comparisons"


def _join_names(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
