"""Settings compared by a pairwise judge: win rates, position bias, and pairs that could not be judged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from penchant.base.text import counted
from penchant.compare.measured import Measurement, Metrics, Setting
from penchant.compare.verdict import (
    MAX_UNJUDGED,
    NOTABLE,
    WIN_RATE,
    Candidate,
    ComparisonGroup,
    Pair,
    compare_judged,
    correct_p_values,
    pairings,
)
from penchant.judges.judge import BothOrders, PairJudge, Question, ask_both_orders
from penchant.metrics.stats import Interval, share_ci
from penchant.runfolder import nan_to_none


@dataclass(frozen=True, slots=True)
class Matchup:
    """Two models compared sample by sample: settings and models of both sides, and the index of their first pair."""

    settings: tuple[str, str]
    models: tuple[str, str]
    start: int


@dataclass(frozen=True, slots=True)
class Judgement:
    """A pairwise judge's verdicts on a comparison.

    Args:
        described: what the verdicts depend on; pairs: all comparisons, corrected; contests: in the order of their pairs in `both`.
        shape: (prompts, samples) of a contest; first_position: mean preference for the first position with its interval by prompt (0.5
            is no bias), None if nothing was judged.
    """

    name: str
    described: Mapping[str, Any]
    pairs: list[Pair]
    contests: Sequence[Matchup]
    both: BothOrders
    shape: tuple[int, int]
    first_position: Interval | None

    @property
    def judged(self) -> int:
        """Number of pairs of texts that differ, the only ones that are judged."""
        return int((~self.both.identical).sum())

    @property
    def left_out(self) -> int:
        """Number of those pairs without a verdict."""
        return int(np.isnan(self.both.wins).sum())

    @property
    def disagreed(self) -> int:
        """Number of those pairs whose verdicts in the two orders do not agree, so that position decided."""
        return int((~self.both.agreed & ~self.both.identical & ~np.isnan(self.both.wins)).sum())

    @property
    def comparison_group(self) -> ComparisonGroup:
        """Its comparisons as a family for the verdict."""
        doubt, share = "", self.left_out / max(1, self.judged)
        if share > MAX_UNJUDGED:
            doubt = f"{self.left_out:,} of {counted(self.judged, 'pair')} ({share:.0%}) could not be judged"
        return ComparisonGroup(self.name, self.pairs, WIN_RATE, len(self.pairs), doubt)

    def win_rates_against(self, name: str, first: str) -> Metrics:
        """A setting's win rates over the first setting; empty if there are none."""
        return next((win_rates(p) for p in self.pairs if (p.name, p.other) == (name, first)), {})

    def verdicts_for(self, prompt: int, sample: int) -> list[dict[str, Any]]:
        """Every verdict on one prompt's completions: `win` of a, and the preference for the first position with a, then b, in it."""
        verdicts = []
        for contest in self.contests:
            index = contest.start + prompt * self.shape[1] + sample
            values = nan_to_none([float(v) for v in (self.both.wins[index], *self.both.values[index])])
            a, b = contest.models
            verdicts.append({"a": a, "b": b, "win": values[0], "first": values[1:]})
        return verdicts

    def to_json(self) -> dict[str, Any]:
        """The judgment as written to comparison.json."""
        position = {} if self.first_position is None else self.first_position.named("first_position")
        return {
            "name": self.name,
            **self.described,
            **position,
            "pairs": self.judged,
            "disagreed": self.disagreed,
            "identical": int(self.both.identical.sum()),
            "left_out": self.left_out,
            "asked": self.both.asked,
            "cached": self.both.cached,
            "failures": self.both.failures,
            "comparisons": [p.to_json() for p in self.pairs],
        }

    def sentences(self) -> list[str]:
        """Caveats to its verdicts: position bias and unreadable replies."""
        judge, sentences = f"The judge {self.name}", []
        if self.first_position is not None:
            p = self.first_position
            share = f"{p.estimate:.0%} [{p.low:.0%}, {p.high:.0%}]"
            decided = self.judged - self.left_out
            biased = p.low > 0.5 or p.high < 0.5
            in_words = bool(np.isin(self.both.values[~np.isnan(self.both.values)], (0.0, 0.5, 1.0)).all())
            degree = "slightly " if abs(p.estimate - 0.5) < NOTABLE else ""
            preference = f"{degree}favors the {'first' if p.estimate > 0.5 else 'second'} position"
            sentences.append(
                f"{judge} {preference if biased else 'shows no clear preference for a position'}: {share} of its verdicts are for the first "
                f"one (each pair was asked in both orders, so 50% means no bias). In {self.disagreed:,} of {counted(decided, 'pair')} its two "
                f"verdicts disagree{'; those count as ties' if in_words else ''}."
            )
        if self.left_out:
            example = f"; for instance '{self.both.unread[0]}'" if self.both.unread else ""
            sentences.append(
                f"{judge} gave no verdict that can be read on {self.both.failures:,} questions{example}. {self.left_out:,} of "
                f"{counted(self.judged, 'pair')} are left out."
            )
        return sentences


def judge_pairs(
    judge: PairJudge, settings: Mapping[str, Sequence[Measurement]], setting: Setting, first_is_fixed: bool
) -> Judgement:
    """Judge every two settings: each seed of one against each seed of the other, sample by sample, each pair in both orders.

    Args:
        settings: models by setting, starting with the first setting; first_is_fixed: whether the first does not depend on a seed.

    Raises:
        RewardError: the judge failed or cannot be reached.
    """
    candidates = judged_candidates(settings, first_is_fixed)
    shape = len(setting.prompts), setting.samples
    size, contests = shape[0] * shape[1], []
    questions: list[Question] = []
    prompt_texts = [prompt for prompt in setting.prompt_texts for _ in range(setting.samples)]
    for a, b in pairings(list(settings)):
        for first in settings[a]:
            for second in settings[b]:
                contests.append(Matchup((a, b), (first.name, second.name), len(questions)))
                texts = zip(prompt_texts, first.written.texts, second.written.texts, strict=True)
                questions += [Question(*triple) for triple in texts]
    progress = setting.progress(f"{judge.name} judges, questions") if setting.progress else None
    verdicts = ask_both_orders(judge, questions, progress)
    by_name = {c.name: c for c in candidates}
    pairs = []
    for a, b in pairings(list(settings)):
        starts = [c.start for c in contests if c.settings == (a, b)]
        wins = np.stack([verdicts.wins[s : s + size] for s in starts])
        pair = compare_judged(by_name[a], by_name[b], wins.reshape(by_name[a].seeds, by_name[b].seeds, *shape))
        pairs += [pair] if pair is not None else []
    prompts = np.tile(np.repeat(np.arange(shape[0]), shape[1]), len(contests))
    return Judgement(
        judge.name,
        judge.describe(),
        correct_p_values(pairs),
        contests,
        verdicts,
        shape,
        _first_position(verdicts.first_position, prompts),
    )


def _first_position(values: np.ndarray, prompts: np.ndarray) -> Interval | None:
    judged = ~np.isnan(values)
    return share_ci(values[judged], clusters=prompts[judged]) if judged.any() else None


def judged_candidates(settings: Mapping[str, Sequence[Measurement]], first_is_fixed: bool) -> list[Candidate]:
    """Candidates without an outcome of their own, for pairwise judging."""
    first = next(iter(settings))
    return [
        Candidate(n, None, None, stack_lengths(seeds), first_is_fixed and n == first) for n, seeds in settings.items()
    ]


def stack_lengths(seeds: Sequence[Measurement]) -> np.ndarray:
    """Tokens of each completion, (seeds, prompts, samples)."""
    return np.stack([m.lengths for m in seeds])


def win_rates(pair: Pair) -> Metrics:
    """Win rates of a pair as named figures; empty if there are none."""
    if pair.win_rate is None or pair.equal_length is None:
        return {}
    ties = {} if pair.ties is None else {"win_rate/ties": pair.ties}
    return pair.win_rate.named("win_rate") | ties | pair.equal_length.named("win_rate_equal_length")
