"""What people said of pairs of answers, in figures: win rates, agreement, the biases of each person, and the verdict as `compare` gives it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from penchant.base.text import counted
from penchant.errors import ConfigError, DataError
from penchant.judges.humans import WINS, Judgement, Preferences, prompt_key, read_preferences
from penchant.metrics.stats import Interval, share_ci, wilson
from penchant.metrics.verdict import (
    NOTABLE,
    WIN_RATE,
    Candidate,
    Family,
    Pair,
    Sentence,
    compare_judged,
    comparisons_table,
    corrected,
)
from penchant.requests import HUMANS
from penchant.runfolder.values import FEW_ROWS

FEWEST_PEOPLE = 3  # from which on people count as a source of chance of their own
FEWEST_WORDS = 10  # judgements of a pair of models by a person who counts as one
READING = 25.0  # words a second that nobody reads
BLINK = 0.5  # seconds in which nobody decides
SLOW = 3.5  # robust standard deviations of log seconds above the median
ALPHA_DRAWS = 1000
ORDER = (0.0, 0.5, 1.0)  # what agreement is about: b better, neither, a better


@dataclass(frozen=True, slots=True)
class Person:
    """One annotator.

    Args:
        judged: judgements that count; wins: win rate of the first model over the second, where there are only two.
        left: share of verdicts for the left answer; longer: for the longer one, and the median of that among the others.
        ties: share of ties and both bad; again: share of repeated pairs with the same verdict; with_others: agreement with the others'
            mean word on shared pairs; checks: (failed, judged). fast: judged faster than anybody reads; slow: far slower than usual.
    """

    name: str
    judged: int
    skipped: int
    wins: Interval | None
    left: Interval | None
    longer: Interval | None
    longer_of_others: float | None
    ties: float | None
    again: Interval | None
    with_others: Interval | None
    checks: tuple[int, int]
    seconds: float | None
    fast: int
    slow: int

    def warnings(self) -> list[str]:
        """What to know before this person's word is believed."""
        said = []
        if self.left is not None and not self.left.low <= 0.5 <= self.left.high:
            strong = abs(self.left.estimate - 0.5) >= NOTABLE
            side = "left" if self.left.estimate > 0.5 else "right"
            said.append(f"{'' if strong else 'slightly '}favors the {side} side ({_percent(self.left)} for the left)")
        others = self.longer_of_others
        if (
            self.longer is not None
            and others is not None
            and not any(self.longer.low <= share <= self.longer.high for share in (others, 0.5))
        ):
            which = "longer" if self.longer.estimate > others else "shorter"
            said.append(f"favors {which} answers ({_percent(self.longer)} for the longer, the others {others:.0%})")
        failed, checks = self.checks
        if failed:
            said.append(f"failed {failed} of {counted(checks, 'check')}")
        if self.again is not None and self.again.high < 0.7:
            said.append(f"repeats the same verdict in only {_percent(self.again)} of repeated pairs")
        if self.fast:
            said.append(f"judged {counted(self.fast, 'pair')} faster than anybody reads")
        if self.slow:
            said.append(f"took far longer than usual over {counted(self.slow, 'pair')}")
        return said

    def to_json(self) -> dict[str, Any]:
        shares = {"win_rate": self.wins, "left": self.left, "longer": self.longer, "again": self.again}
        return {
            "name": self.name,
            "judged": self.judged,
            "skipped": self.skipped,
            **{k: None if v is None else v.to_dict() for k, v in shares.items()},
            "longer_of_others": self.longer_of_others,
            "ties": self.ties,
            "with_others": None if self.with_others is None else self.with_others.to_dict(),
            "checks": {"failed": self.checks[0], "judged": self.checks[1]},
            "median_seconds": self.seconds,
            "fast": self.fast,
            "slow": self.slow,
            "warnings": self.warnings(),
        }


@dataclass(frozen=True, slots=True)
class HumanVerdict:
    """What an arena says.

    Args:
        pairs: every two models that met, corrected; prompts: of each; people: annotators.
        alpha: Krippendorff's, ordinal; shared: pairs that several people judged.
        tally: how many verdicts there were of each kind; unknown: what could not be computed, in words.
    """

    file: str
    pairs: list[Pair]
    prompts: dict[tuple[str, str], int]
    people: list[Person]
    alpha: Interval | None
    shared: int
    tally: Mapping[str, int]
    over_people: bool
    unknown: tuple[str, ...] = ()

    @property
    def judged(self) -> int:
        """Judgements that count."""
        return sum(p.judged for p in self.people)

    @property
    def by(self) -> str:
        return counted(len(self.people), "person", "people")

    def verdict(self) -> list[Sentence]:
        """A sentence for every two models, as `penchant compare` says it."""
        said = []
        for pair in self.pairs:
            prompts = self.prompts[pair.name, pair.other]
            met = f"{pair.name} and {pair.other} met on {counted(prompts, 'prompt')}"
            doubt = f"{met}, too few for an interval (at least {FEW_ROWS})" if prompts < FEW_ROWS else ""
            said += Family(self.by, [pair], WIN_RATE, len(self.pairs), doubt).sentences(prompts)
        return said

    def notes(self) -> list[str]:
        """What to know before the verdict is believed."""
        said = []
        if self.alpha is not None:
            a = self.alpha
            word = "weak" if a.estimate < 0.4 else "moderate" if a.estimate < 0.667 else "good"
            said.append(
                f"Agreement is {word}: Krippendorff's alpha {a.estimate:z.2f} [{a.low:z.2f}, {a.high:z.2f}] on "
                f"{counted(self.shared, 'pair')} that several people judged (1 is perfect, 0 is chance)."
            )
        said += [f"{person.name} {what}." for person in self.people for what in person.warnings()]
        if self.tally["both_bad"] > 0.2 * max(1, self.judged):
            said.append(
                f"Both answers were bad in {self.tally['both_bad']:,} of {self.judged:,} judgments; they count as ties."
            )
        if self.over_people:
            said.append("Intervals are over prompts and people: other people could have said otherwise.")
        elif self.judged:
            said.append(
                f"Intervals are over prompts alone, since judgments by {self.by} do not show what others would have said "
                f"(that takes at least {FEWEST_PEOPLE}, each with {FEWEST_WORDS} pairs of every two models)."
            )
        return [*said, *self.unknown]

    def to_text(self) -> str:
        """As it is printed."""
        parts = ["\n".join(s.text for s in self.verdict()) or "Nothing was judged yet."]
        parts += ["\n".join(self.notes())]
        if self.pairs:
            parts.append(comparisons_table(self.pairs, WIN_RATE))
        return "\n\n".join(p for p in parts if p)

    def to_json(self) -> dict[str, Any]:
        """As `--json` prints it."""
        return {
            "file": self.file,
            "verdict": [s.text for s in self.verdict()],
            "notes": self.notes(),
            "comparisons": [{**p.to_json(), "prompts": self.prompts[p.name, p.other]} for p in self.pairs],
            "alpha": None if self.alpha is None else self.alpha.to_dict(),
            "shared_pairs": self.shared,
            "judgements": self.judged,
            "tally": dict(self.tally),
            "annotators": [p.to_json() for p in self.people],
        }


def judge_by_humans(judge: str, models: Sequence[str] = ()) -> HumanVerdict:
    """The verdict of ``humans:preferences.jsonl``.

    Args:
        models: those whose meetings are looked at, of one alone all of its own; empty: all.

    Raises:
        DataError: no such file, or nothing in it. ConfigError: a model that nobody judged.
    """
    found = read_preferences(judge.removeprefix(HUMANS))
    there = sorted({m for j in found.judgements.values() if j.gold is None for m in j.models})
    for name in models:
        if name not in there:
            what = f"{name!r} is not a model of {found.path}"
            raise ConfigError("compare", what, f"there are {', '.join(there)}; leave the names out for all")
    return human_verdict(found, models)


def human_verdict(found: Preferences, models: Sequence[str] = ()) -> HumanVerdict:
    """What a file says; see `judge_by_humans`."""
    every = list(found.judgements.values())
    if models:
        asked = set(models)
        every = [j for j in every if j.gold is not None or len(asked & set(j.models)) == min(2, len(asked))]
    counting = [j for j in every if j.counts]
    contests: dict[tuple[str, str], list[Judgement]] = {}
    for j in counting:
        a, b = j.models
        contests.setdefault((b, a) if (b, a) in contests else (a, b), []).append(j)
    made: list[Pair] = []
    over_people = bool(contests)
    for (a, b), judged in contests.items():
        pair, people_too = _contest(a, b, judged)
        over_people = over_people and people_too
        made += [pair] if pair is not None else []
    prompts = {m: len({prompt_key(j.prompt) for j in judged}) for m, judged in contests.items()}
    alpha, shared, unknown = _agreement(counting)
    tally = {kind: sum(j.verdict == kind and j.gold is None for j in every) for kind in (*WINS, "skip")}
    tally |= {"undone": found.undone}
    two = next(iter(contests), None) if len(contests) == 1 else None
    people = [_person(name, every, counting, two) for name in dict.fromkeys(j.annotator for j in every)]
    why = (unknown,) if unknown else ()
    return HumanVerdict(str(found.path), corrected(made), prompts, people, alpha, shared, tally, over_people, why)


def win_of(judgement: Judgement, model: str) -> float:
    """How much a model won: 1, 0, or one half."""
    value = WINS[judgement.verdict]
    return value if judgement.models[0] == model else 1.0 - value


def _words(text: str) -> int:
    return len(text.split())


def _lengths(j: Judgement, model: str) -> tuple[int, int]:
    a, b = map(_words, j.answers)
    return (a, b) if j.models[0] == model else (b, a)


def _contest(a: str, b: str, judged: Sequence[Judgement]) -> tuple[Pair | None, bool]:
    """Two models compared as two settings are, people in the place of seeds where there are enough; whether there were."""
    by: dict[str, list[Judgement]] = defaultdict(list)
    for j in judged:
        by[j.annotator].append(j)
    people_too = len(by) >= FEWEST_PEOPLE and min(map(len, by.values())) >= FEWEST_WORDS
    people = list(by) if people_too else [""]
    prompts: dict[
        str, dict[str, int]
    ] = {}  # of each, the place of every pair; where people are one, of every judgement
    place = {}
    for j in judged:
        slots = prompts.setdefault(prompt_key(j.prompt), {})
        place[j.id] = slots.setdefault(j.pair if people_too else j.id, len(slots))
    shape = len(prompts), max(map(len, prompts.values()))
    wins = np.full((len(people), 1, *shape), np.nan)
    lengths = np.zeros((2, 1, *shape))
    at = {prompt: i for i, prompt in enumerate(prompts)}
    for j in judged:
        person = people.index(j.annotator) if people_too else 0
        where = at[prompt_key(j.prompt)], place[j.id]
        wins[(person, 0, *where)] = win_of(j, a)
        lengths[(slice(None), 0, *where)] = _lengths(j, a)
    mine = Candidate(a, None, None, np.repeat(lengths[0], len(people), 0))
    pair = compare_judged(mine, Candidate(b, None, None, lengths[1], fixed=True), wins, chance="people")
    # only some pairs of completions were asked about, and all of those were judged
    return (None if pair is None else replace(pair, unjudged=0.0)), people_too


def _agreement(counting: Sequence[Judgement]) -> tuple[Interval | None, int, str]:
    """Krippendorff's alpha over pairs that several people judged, with a bootstrap over pairs; or why there is none."""
    units: dict[str, dict[str, float]] = defaultdict(dict)
    for j in counting:
        units[j.pair].setdefault(j.annotator, WINS[j.verdict])
    shared = [list(words.values()) for words in units.values() if len(words) > 1]
    if not shared:
        return None, 0, "No pair was judged by two people, so nothing says whether people agree."
    try:
        import krippendorff
    except ImportError:
        return None, len(shared), "Agreement needs krippendorff: pip install 'penchant[studio]'."
    counts = np.array([[words.count(v) for v in ORDER] for words in shared], dtype=np.int64)

    def alpha(of: np.ndarray) -> float:
        if (of.sum(0) > 0).sum() < 2:
            return float("nan")  # one verdict throughout: there is nothing to agree on
        return float(krippendorff.alpha(value_counts=of, value_domain=list(ORDER), level_of_measurement="ordinal"))

    estimate = alpha(counts)
    if estimate != estimate:
        return None, len(shared), "Everybody gave the same verdict on every shared pair, so alpha is not defined."
    rng = np.random.default_rng(0)
    # equal draws of kinds of units: few kinds there are, however many units
    kinds, which = np.unique(counts, axis=0, return_inverse=True)
    share = np.bincount(which.ravel(), minlength=len(kinds)) / len(counts)
    drawn = [alpha(np.repeat(kinds, n, axis=0)) for n in rng.multinomial(len(counts), share, ALPHA_DRAWS)]
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return Interval(estimate, float(low), float(high)), len(shared), ""


def _person(
    name: str, every: Sequence[Judgement], counting: Sequence[Judgement], two: tuple[str, str] | None
) -> Person:
    all_mine = [j for j in every if j.annotator == name]
    mine, others = ([j for j in counting if (j.annotator == name) == own] for own in (True, False))
    decided = [j for j in mine if j.side is not None]
    lefts = sum(j.side == "left" for j in decided)
    long_mine = _for_the_longer(mine)
    golds = [j for j in all_mine if j.gold is not None and j.verdict in WINS]
    by_id = {j.id: j for j in all_mine}
    again = [j for j in all_mine if j.repeat_of in by_id and j.verdict in WINS]
    same = sum(WINS[j.verdict] == WINS.get(by_id[str(j.repeat_of)].verdict) for j in again)
    theirs: dict[str, list[float]] = defaultdict(list)
    for j in others:
        theirs[j.pair].append(WINS[j.verdict])
    with_others = [1.0 - abs(WINS[j.verdict] - float(np.mean(theirs[j.pair]))) for j in mine if j.pair in theirs]
    seconds = np.array([j.seconds for j in mine if j.seconds > 0])
    prompts = [prompt_key(j.prompt) for j in mine]
    return Person(
        name=name,
        judged=len(mine),
        skipped=sum(j.verdict == "skip" for j in all_mine),
        wins=share_ci([win_of(j, two[0]) for j in mine], clusters=prompts, draws=2000) if mine and two else None,
        left=wilson(lefts, len(decided)) if decided else None,
        longer=wilson(sum(long_mine), len(long_mine)) if long_mine else None,
        longer_of_others=_median_share(others),
        ties=1.0 - len(decided) / len(mine) if mine else None,
        again=wilson(same, len(again)) if again else None,
        with_others=share_ci(with_others, draws=2000) if with_others else None,
        checks=(sum(j.verdict != j.gold for j in golds), len(golds)),
        seconds=float(np.median(seconds)) if len(seconds) else None,
        # the shorter of both: a glance at one may be enough where the other is plainly bad
        fast=sum(0 < j.seconds < max(BLINK, min(map(_words, j.answers)) / READING) for j in mine),
        slow=_slow(seconds),
    )


def _for_the_longer(judged: Sequence[Judgement]) -> list[bool]:
    """Of verdicts for one of two answers of different length, whether it is the longer one."""
    sizes = [(j, _words(j.answers[0]), _words(j.answers[1])) for j in judged if j.verdict in ("a", "b")]
    return [(a > b) == (j.verdict == "a") for j, a, b in sizes if a != b]


def _median_share(others: Sequence[Judgement]) -> float | None:
    """Of other people, each with enough judgements, the median share for the longer answer: one with a bias does not move it."""
    by: dict[str, list[Judgement]] = defaultdict(list)
    for j in others:
        by[j.annotator].append(j)
    shares = [float(np.mean(s)) for s in map(_for_the_longer, by.values()) if len(s) >= FEW_ROWS]
    return float(np.median(shares)) if shares else None


def _slow(seconds: np.ndarray) -> int:
    if len(seconds) < FEW_ROWS:
        return 0
    logs = np.log(seconds)
    middle = np.median(logs)
    spread = 1.4826 * np.median(np.abs(logs - middle))
    return int((logs - middle > SLOW * spread).sum()) if spread > 0 else 0


def _percent(share: Interval) -> str:
    return f"{share.estimate:.0%} [{share.low:.0%}, {share.high:.0%}]"


def check_alone(judge: str, asked: Mapping[str, Any]) -> None:
    """Refuse what cannot be asked of people who have judged already.

    Raises:
        ConfigError: an option of it was given.
    """
    given = next((name for name, value in asked.items() if value and name != "judge"), None)
    if given is not None:
        flag = f"--{given.replace('_', '-')}"
        raise ConfigError(flag, f"cannot be asked of {judge}: people judged answers that stand there", "leave it out")
    if not Path(judge.removeprefix(HUMANS)).expanduser().exists():
        raise DataError(judge.removeprefix(HUMANS), "no such file", "give the preferences.jsonl of an arena")
