"""Human preferences in figures: win rates, agreement, each annotator's biases, and a verdict like that of `penchant compare`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from penchant.base.text import counted
from penchant.compare.verdict import (
    NOTABLE,
    WIN_RATE,
    Candidate,
    ComparisonGroup,
    Pair,
    Sentence,
    compare_judged,
    comparisons_table,
    correct_p_values,
)
from penchant.errors import ConfigError, DataError
from penchant.judges.humans import WINS, Judgement, Preferences, prompt_key, read_preferences
from penchant.metrics.stats import Interval, share_ci, wilson
from penchant.requests import HUMANS
from penchant.runfolder.values import FEW_ROWS

MIN_PEOPLE = 3  # annotators needed to treat people as a source of variance
MIN_JUDGMENTS = 10  # judgments of a pair of models that each of them needs
MAX_READING_SPEED = 25.0  # words per second, faster than anyone reads
MIN_SECONDS = 0.5  # seconds, less than anyone needs to decide
SLOW_DEVIATIONS = 3.5  # robust standard deviations of log seconds above the median
ALPHA_DRAWS = 1000
ORDINAL_SCORES = (0.0, 0.5, 1.0)  # ordinal categories for agreement: b better, neither, a better


@dataclass(frozen=True, slots=True)
class Annotator:
    """One annotator.

    Args:
        judged: judgments that count; wins: win rate of the first model over the second, if there are only two.
        left: share of verdicts for the left answer; longer: for the longer one; longer_of_others: median of that over other annotators.
        ties: share of ties and both bad; again: share of repeated pairs with the same verdict; with_others: agreement with the others'
            mean verdict on shared pairs; checks: (failed, judged); seconds: median per judgment; fast: judgments faster than anyone
            reads; slow: far slower than usual.
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
        """Reasons to doubt this person's judgments."""
        sentences = []
        if self.left is not None and not self.left.low <= 0.5 <= self.left.high:
            strong = abs(self.left.estimate - 0.5) >= NOTABLE
            side = "left" if self.left.estimate > 0.5 else "right"
            sentences.append(
                f"{'' if strong else 'slightly '}favors the {side} side ({_percent(self.left)} for the left)"
            )
        others_share = self.longer_of_others
        if (
            self.longer is not None
            and others_share is not None
            and not any(self.longer.low <= share <= self.longer.high for share in (others_share, 0.5))
        ):
            preferred = "longer" if self.longer.estimate > others_share else "shorter"
            sentences.append(
                f"favors {preferred} answers ({_percent(self.longer)} for the longer, the others {others_share:.0%})"
            )
        failed, checks = self.checks
        if failed:
            sentences.append(f"failed {failed} of {counted(checks, 'check')}")
        if self.again is not None and self.again.high < 0.7:
            sentences.append(f"repeats the same verdict in only {_percent(self.again)} of repeated pairs")
        if self.fast:
            sentences.append(f"judged {counted(self.fast, 'pair')} faster than anybody reads")
        if self.slow:
            sentences.append(f"took far longer than usual over {counted(self.slow, 'pair')}")
        return sentences

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
    """The verdict of human judgments.

    Args:
        pairs: every two models that were compared, corrected; prompts: the number for each; people: annotators.
        alpha: Krippendorff's, ordinal; shared: number of pairs that several people judged.
        tally: number of verdicts of each kind; over_people: whether intervals are over people too; unknown: sentences on what could not be
            computed.
    """

    file: str
    pairs: list[Pair]
    prompts: dict[tuple[str, str], int]
    people: list[Annotator]
    alpha: Interval | None
    shared: int
    tally: Mapping[str, int]
    over_people: bool
    unknown: tuple[str, ...] = ()

    @property
    def judged(self) -> int:
        """Number of judgments that count."""
        return sum(p.judged for p in self.people)

    @property
    def by(self) -> str:
        return counted(len(self.people), "person", "people")

    def verdict(self) -> list[Sentence]:
        """One sentence for every two models, worded as in `penchant compare`."""
        sentences = []
        for pair in self.pairs:
            prompts = self.prompts[pair.name, pair.other]
            meeting = f"{pair.name} and {pair.other} met on {counted(prompts, 'prompt')}"
            doubt = f"{meeting}, too few for an interval (at least {FEW_ROWS})" if prompts < FEW_ROWS else ""
            sentences += ComparisonGroup(self.by, [pair], WIN_RATE, len(self.pairs), doubt).sentences(prompts)
        return sentences

    def notes(self) -> list[str]:
        """Caveats to the verdict."""
        sentences = []
        if self.alpha is not None:
            a = self.alpha
            strength = "weak" if a.estimate < 0.4 else "moderate" if a.estimate < 0.667 else "good"
            sentences.append(
                f"Agreement is {strength}: Krippendorff's alpha {a.estimate:z.2f} [{a.low:z.2f}, {a.high:z.2f}] on "
                f"{counted(self.shared, 'pair')} that several people judged (1 is perfect, 0 is chance)."
            )
        sentences += [f"{person.name} {warning}." for person in self.people for warning in person.warnings()]
        if self.tally["both_bad"] > 0.2 * max(1, self.judged):
            sentences.append(
                f"Both answers were bad in {self.tally['both_bad']:,} of {self.judged:,} judgments; they count as ties."
            )
        if self.over_people:
            sentences.append("Intervals are over prompts and people: other people could have said otherwise.")
        elif self.judged:
            sentences.append(
                f"Intervals are over prompts alone, since judgments by {self.by} do not show what others would have said "
                f"(that takes at least {MIN_PEOPLE}, each with {MIN_JUDGMENTS} pairs of every two models)."
            )
        return [*sentences, *self.unknown]

    def to_text(self) -> str:
        """The verdict as it is printed."""
        parts = ["\n".join(s.text for s in self.verdict()) or "Nothing was judged yet."]
        parts += ["\n".join(self.notes())]
        if self.pairs:
            parts.append(comparisons_table(self.pairs, WIN_RATE))
        return "\n\n".join(p for p in parts if p)

    def to_json(self) -> dict[str, Any]:
        """The verdict as `--json` prints it."""
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
    """Return the verdict of ``humans:preferences.jsonl``.

    Args:
        models: models to limit the comparisons to; a single one keeps all of its comparisons; empty: all.

    Raises:
        DataError: no such file, or nothing in it. ConfigError: a model without judgments.
    """
    preferences = read_preferences(judge.removeprefix(HUMANS))
    available = sorted({m for j in preferences.judgements.values() if j.gold is None for m in j.models})
    for name in models:
        if name not in available:
            what = f"{name!r} is not a model of {preferences.path}"
            raise ConfigError("compare", what, f"there are {', '.join(available)}; leave the names out for all")
    return human_verdict(preferences, models)


def human_verdict(preferences: Preferences, models: Sequence[str] = ()) -> HumanVerdict:
    """Return the verdict of preferences already read; see `judge_by_humans`."""
    judgments = list(preferences.judgements.values())
    if models:
        wanted = set(models)
        judgments = [j for j in judgments if j.gold is not None or len(wanted & set(j.models)) == min(2, len(wanted))]
    counting = [j for j in judgments if j.counts]
    contests: dict[tuple[str, str], list[Judgement]] = {}
    for j in counting:
        a, b = j.models
        contests.setdefault((b, a) if (b, a) in contests else (a, b), []).append(j)
    pairs: list[Pair] = []
    over_people = bool(contests)
    for (a, b), judged in contests.items():
        pair, pair_over_people = _compare_models(a, b, judged)
        over_people = over_people and pair_over_people
        pairs += [pair] if pair is not None else []
    prompts = {m: len({prompt_key(j.prompt) for j in judged}) for m, judged in contests.items()}
    alpha, shared, reason = _krippendorff_alpha(counting)
    tally = {kind: sum(j.verdict == kind and j.gold is None for j in judgments) for kind in (*WINS, "skip")}
    tally |= {"undone": preferences.undone}
    only_models = next(iter(contests), None) if len(contests) == 1 else None
    people = [
        _annotator(name, judgments, counting, only_models) for name in dict.fromkeys(j.annotator for j in judgments)
    ]
    unknown_reasons = [reason] if reason else []
    if preferences.damaged:
        lines = counted(preferences.damaged, "line")
        unknown_reasons.append(f"Left out: {lines} of {preferences.path.name} without a judgment that can be read.")
    return HumanVerdict(
        str(preferences.path),
        correct_p_values(pairs),
        prompts,
        people,
        alpha,
        shared,
        tally,
        over_people,
        tuple(unknown_reasons),
    )


def score_of(judgement: Judgement, model: str) -> float:
    """A model's score in a judgment: 1 for a win, 0 for a loss, else one half."""
    value = WINS[judgement.verdict]
    return value if judgement.models[0] == model else 1.0 - value


def _word_count(text: str) -> int:
    return len(text.split())


def _lengths(j: Judgement, model: str) -> tuple[int, int]:
    a, b = map(_word_count, j.answers)
    return (a, b) if j.models[0] == model else (b, a)


def _compare_models(a: str, b: str, judgments: Sequence[Judgement]) -> tuple[Pair | None, bool]:
    """Compare two models with `compare_judged`, people taking the place of seeds if there are enough; also return whether they did."""
    by_annotator: dict[str, list[Judgement]] = defaultdict(list)
    for j in judgments:
        by_annotator[j.annotator].append(j)
    over_people = len(by_annotator) >= MIN_PEOPLE and min(map(len, by_annotator.values())) >= MIN_JUDGMENTS
    people = list(by_annotator) if over_people else [""]
    prompts: dict[
        str, dict[str, int]
    ] = {}  # prompt -> sample index of every pair, or of every judgment if people are pooled
    slot_of = {}
    for j in judgments:
        slots = prompts.setdefault(prompt_key(j.prompt), {})
        slot_of[j.id] = slots.setdefault(j.pair if over_people else j.id, len(slots))
    shape = len(prompts), max(map(len, prompts.values()))
    wins = np.full((len(people), 1, *shape), np.nan)
    lengths = np.zeros((2, 1, *shape))
    prompt_number = {prompt: i for i, prompt in enumerate(prompts)}
    for j in judgments:
        person = people.index(j.annotator) if over_people else 0
        index = prompt_number[prompt_key(j.prompt)], slot_of[j.id]
        wins[(person, 0, *index)] = score_of(j, a)
        lengths[(slice(None), 0, *index)] = _lengths(j, a)
    candidate = Candidate(a, None, None, np.repeat(lengths[0], len(people), 0))
    pair = compare_judged(candidate, Candidate(b, None, None, lengths[1], fixed=True), wins, chance="people")
    # people saw only some of the pairs and judged all of those, so none counts as unjudged
    return (None if pair is None else replace(pair, unjudged=0.0)), over_people


def _krippendorff_alpha(judgments: Sequence[Judgement]) -> tuple[Interval | None, int, str]:
    """Krippendorff's alpha with a bootstrap over pairs, the number of pairs that several people judged, and why alpha is None."""
    units: dict[str, dict[str, float]] = defaultdict(dict)
    for j in judgments:
        units[j.pair].setdefault(j.annotator, WINS[j.verdict])
    shared = [list(scores.values()) for scores in units.values() if len(scores) > 1]
    if not shared:
        return None, 0, "No pair was judged by two people, so nothing says whether people agree."
    try:
        import krippendorff
    except ImportError:
        return None, len(shared), "Agreement needs krippendorff: pip install 'penchant[studio]'."
    counts = np.array([[scores.count(v) for v in ORDINAL_SCORES] for scores in shared], dtype=np.int64)

    def alpha(value_counts: np.ndarray) -> float:
        if (value_counts.sum(0) > 0).sum() < 2:
            return float("nan")  # one verdict throughout: alpha is not defined
        return float(
            krippendorff.alpha(
                value_counts=value_counts, value_domain=list(ORDINAL_SCORES), level_of_measurement="ordinal"
            )
        )

    estimate = alpha(counts)
    if estimate != estimate:
        return None, len(shared), "Everybody gave the same verdict on every shared pair, so alpha is not defined."
    rng = np.random.default_rng(0)
    # draw counts of distinct units rather than units: there are few distinct ones, however many units
    kinds, inverse = np.unique(counts, axis=0, return_inverse=True)
    share = np.bincount(inverse.ravel(), minlength=len(kinds)) / len(counts)
    drawn = [alpha(np.repeat(kinds, n, axis=0)) for n in rng.multinomial(len(counts), share, ALPHA_DRAWS)]
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return Interval(estimate, float(low), float(high)), len(shared), ""


def _annotator(
    name: str, judgments: Sequence[Judgement], included: Sequence[Judgement], models: tuple[str, str] | None
) -> Annotator:
    all_own = [j for j in judgments if j.annotator == name]
    own_judgments, others = ([j for j in included if (j.annotator == name) == is_own] for is_own in (True, False))
    decided = [j for j in own_judgments if j.side is not None]
    left_votes = sum(j.side == "left" for j in decided)
    prefers_longer = _prefers_longer(own_judgments)
    checks = [j for j in all_own if j.gold is not None and j.verdict in WINS]
    by_id = {j.id: j for j in all_own}
    repeated = [j for j in all_own if j.repeat_of in by_id and j.verdict in WINS]
    consistent = sum(WINS[j.verdict] == WINS.get(by_id[str(j.repeat_of)].verdict) for j in repeated)
    others_by_pair: dict[str, list[float]] = defaultdict(list)
    for j in others:
        others_by_pair[j.pair].append(WINS[j.verdict])
    agreements = [
        1.0 - abs(WINS[j.verdict] - float(np.mean(others_by_pair[j.pair])))
        for j in own_judgments
        if j.pair in others_by_pair
    ]
    seconds = np.array([j.seconds for j in own_judgments if j.seconds > 0])
    prompts = [prompt_key(j.prompt) for j in own_judgments]
    return Annotator(
        name=name,
        judged=len(own_judgments),
        skipped=sum(j.verdict == "skip" for j in all_own),
        wins=share_ci([score_of(j, models[0]) for j in own_judgments], clusters=prompts, draws=2000)
        if own_judgments and models
        else None,
        left=wilson(left_votes, len(decided)) if decided else None,
        longer=wilson(sum(prefers_longer), len(prefers_longer)) if prefers_longer else None,
        longer_of_others=_median_longer_share(others),
        ties=1.0 - len(decided) / len(own_judgments) if own_judgments else None,
        again=wilson(consistent, len(repeated)) if repeated else None,
        with_others=share_ci(agreements, draws=2000) if agreements else None,
        checks=(sum(j.verdict != j.gold for j in checks), len(checks)),
        seconds=float(np.median(seconds)) if len(seconds) else None,
        # the shorter of the two: a glance may be enough to reject the other one
        fast=sum(
            0 < j.seconds < max(MIN_SECONDS, min(map(_word_count, j.answers)) / MAX_READING_SPEED)
            for j in own_judgments
        ),
        slow=_count_slow(seconds),
    )


def _prefers_longer(judgments: Sequence[Judgement]) -> list[bool]:
    """For each verdict between two answers of different length, whether it favors the longer one."""
    sizes = [(j, _word_count(j.answers[0]), _word_count(j.answers[1])) for j in judgments if j.verdict in ("a", "b")]
    return [(a > b) == (j.verdict == "a") for j, a, b in sizes if a != b]


def _median_longer_share(others: Sequence[Judgement]) -> float | None:
    """Median share for the longer answer over other people with enough judgments. One biased annotator does not move a median."""
    by_annotator: dict[str, list[Judgement]] = defaultdict(list)
    for j in others:
        by_annotator[j.annotator].append(j)
    shares = [float(np.mean(s)) for s in map(_prefers_longer, by_annotator.values()) if len(s) >= FEW_ROWS]
    return float(np.median(shares)) if shares else None


def _count_slow(seconds: np.ndarray) -> int:
    if len(seconds) < FEW_ROWS:
        return 0
    logs = np.log(seconds)
    middle = np.median(logs)
    spread = 1.4826 * np.median(np.abs(logs - middle))
    return int((logs - middle > SLOW_DEVIATIONS * spread).sum()) if spread > 0 else 0


def _percent(share: Interval) -> str:
    return f"{share.estimate:.0%} [{share.low:.0%}, {share.high:.0%}]"


def check_no_other_options(judge: str, option_values: Mapping[str, Any]) -> None:
    """Refuse options that do not apply to human judgments that already exist.

    Raises:
        ConfigError: such an option was given.
        DataError: there is no such file.
    """
    option = next((name for name, value in option_values.items() if value and name != "judge"), None)
    if option is not None:
        flag = f"--{option.replace('_', '-')}"
        raise ConfigError(
            flag, f"cannot be used with {judge}: its answers are already written and judged", "leave it out"
        )
    if not Path(judge.removeprefix(HUMANS)).expanduser().exists():
        raise DataError(judge.removeprefix(HUMANS), "no such file", "give the preferences.jsonl of an arena")
