"""Trust rules over the lines of a training run."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from penchant.metrics.flags.rule import (
    SMALLEST_WINDOW,
    ComparisonView,
    Evidence,
    Point,
    Rule,
    RunView,
    Seen,
    change,
    evidence,
    interval,
    number,
    percent,
    seen,
    share_interval,
    since,
    smooth,
    standard_error,
    window,
)
from penchant.metrics.stats import wilson

# ---- KL and perplexity that leave their bands ----


def _kl_of_run(run: RunView) -> Seen | None:
    held = run.held_out("kl/policy_ref")
    if held and held[-1].step > 0:
        now, series = held[-1], held
    else:
        lines = run.training("kl/policy_ref")
        mean = window(lines)
        if mean is None:
            return None
        now, series = mean, smooth(lines)
    low, high = run.trust.kl
    shown = (evidence("KL to the start, nats per completion", series),)
    if now.bounds()[0] > high:
        sentence = (
            f"The KL to the start is {number(now.value)} nats per completion at step {now.step:,}{interval(now)}, above trust.kl's {number(high)} "
            f"since step {since(series, high):,}."
        )
        return Seen(sentence, shown)
    if low > 0 and now.bounds()[1] < low:
        sentence = f"The KL to the start is {number(now.value)} nats per completion at step {now.step:,}{interval(now)}, below trust.kl's {number(low)}."
        return Seen(
            sentence,
            shown,
            "note",
            advice="The policy hardly moved: raise train.lr, train longer, or lower the pull towards the reference.",
        )
    return None


def _kl_of_comparison(view: ComparisonView) -> Sequence[Seen]:
    found = []
    high = view.trust.kl[1]
    for name, figures in view.others.items():
        now = view.point(figures, "kl")
        if now is not None and now.bounds()[0] > high:
            sentence = f"{name} is {number(now.value)} nats per completion away from {view.first}{interval(now)}, above trust.kl's {number(high)}."
            found.append(seen(sentence, "KL to the first model, nats per completion", now.value, about=name))
    return found


KL = Rule(
    name="kl_band",
    title="the policy is far from its start",
    what="the 99% interval of the KL to the start (nats per completion, on the policy's own completions) lies above `kl[1]`, or, as a note, below `kl[0]`.",
    needs="`eval/kl/policy_ref` (`evaluation.kl_prompts`), or training lines of an online method",
    alarms="at most 0.5% where the KL is within the band",
    advice="Far from the start a reward is easily won without being earned, and a language is forgotten: read completions, look at perplexity and at other "
    "rewards. Raise beta, lower train.lr, or take an earlier checkpoint. KL adds up over tokens: set trust.kl for your lengths.",
    thresholds=("kl",),
    of_run=_kl_of_run,
    of_comparison=_kl_of_comparison,
)


def _log(points: Sequence[Point], run: RunView, name: str) -> list[Point]:
    """A ratio at every evaluation, as a logarithm, with the standard error of that."""
    intervals = {int(m["step"]): m.get(f"eval/{name}/ci") for m in run.evals}
    made = []
    for p in points:
        if p.value <= 0:
            continue
        ci = intervals.get(p.step)
        logs = [math.log(x) for x in ci] if ci and min(ci) > 0 else None
        made.append(Point(p.step, math.log(p.value), standard_error(math.log(p.value), logs, p.n), p.n))
    return made


def _perplexity_series(run: RunView) -> tuple[Point, list[Point], str] | None:
    """(last, all, against what): logarithms of the perplexity's ratio."""
    ratios = run.held_out("perplexity_ratio/chosen")
    if ratios and ratios[-1].step > 0 and ratios[-1].value > 0:
        series = _log(ratios, run, "perplexity_ratio/chosen")
        return series[-1], series, "the reference's"
    for name in ("perplexity/chosen", "perplexity"):
        held = [p for p in run.held_out(name) if p.value > 0]
        if len(held) > 1:
            # the same rows: without a change there is no difference at all
            series = [Point(p.step, math.log(p.value / held[0].value)) for p in held]
            return series[-1], series, f"that of step {held[0].step:,}"
    lines, tokens = run.training("logratios/chosen"), run.chosen_tokens
    now = window(lines)
    if now is None or tokens is None or now.se is None:
        return None
    series = smooth([Point(p.step, -p.value / tokens) for p in lines])
    return Point(now.step, -now.value / tokens, now.se / tokens, now.n), series, "the reference's"


def _perplexity_of_run(run: RunView) -> Seen | None:
    found = _perplexity_series(run)
    if found is None:
        return None
    now, series, against = found
    limit = math.log(run.trust.perplexity_ratio)
    if now.bounds()[0] <= limit:
        return None
    ratio = math.exp(min(700.0, now.value))
    sentence = (
        f"At step {now.step:,} the perplexity of {'chosen answers' if against == 'the reference' + chr(39) + 's' else 'held-out answers'} is "
        f"{number(ratio)} times {against}, above trust.perplexity_ratio's {number(run.trust.perplexity_ratio)} since step {since(series, limit):,}."
    )
    return Seen(sentence, (evidence("logarithm of the perplexity ratio, nats per token", series),))


def _perplexity_of_comparison(view: ComparisonView) -> Sequence[Seen]:
    base = view.models.get(view.first, {}).get("perplexity")
    found = []
    for name, figures in view.others.items():
        mine = figures.get("perplexity")
        if not isinstance(base, (int, float)) or not isinstance(mine, (int, float)) or base <= 0:
            continue
        if mine / base > view.trust.perplexity_ratio:
            sentence = f"Held-out chosen answers have a perplexity of {number(mine)} under {name}, {number(base)} under {view.first}: {number(mine / base)} times."
            found.append(seen(sentence, "perplexity, first model and this one", base, mine, about=name))
    return found


PERPLEXITY = Rule(
    name="perplexity_band",
    title="perplexity leaves its band",
    what="the perplexity of (chosen) answers is more than `perplexity_ratio` times the reference's, with the whole 99% interval; against the first "
    "evaluation of the same rows where there is no reference.",
    needs="`eval/perplexity_ratio/chosen`, else `eval/perplexity/chosen` or `eval/perplexity` at two evaluations, else training lines and the audit's lengths",
    alarms="at most 0.5% where the ratio is within the band; against the first evaluation of the same rows an unchanged policy never",
    advice="The model forgets what likely answers look like. Lower train.lr, train for fewer steps, raise loss.beta, or add loss.nll_weight.",
    thresholds=("perplexity_ratio",),
    of_run=_perplexity_of_run,
    of_comparison=_perplexity_of_comparison,
)


# ---- Likelihood displacement: the answers that were chosen become less likely too ----

LARGE = 0.1  # nats per token: each token of a chosen answer about 10% less likely


@dataclass(frozen=True, slots=True)
class _Change:
    """How log-probs changed, nats per completion: now, and over the run; `since` what."""

    chosen: Point
    rejected: Point | None
    series: list[Point]
    since: str


def _against_reference(run: RunView) -> _Change | None:
    held = run.held_out("logratios/chosen")
    if held and held[-1].step > 0:
        others = run.held_out("logratios/rejected")
        return _Change(held[-1], others[-1] if others else None, held, "under the reference")
    lines = run.training("logratios/chosen")
    now = window(lines)
    if now is None:
        return None
    return _Change(now, window(run.training("logratios/rejected")), smooth(lines), "under the reference")


def _against_start(run: RunView) -> _Change | None:
    """For losses without a reference: the same held-out rows before and after, or training rows early and late."""
    held, others = run.held_out("logps/chosen"), run.held_out("logps/rejected")
    if len(held) > 1:
        series = [Point(p.step, p.value - held[0].value) for p in held]
        rejected = Point(others[-1].step, others[-1].value - others[0].value) if len(others) > 1 else None
        return _Change(series[-1], rejected, series, f"at step {held[0].step:,}")
    lines, rest = run.training("logps/chosen"), run.training("logps/rejected")
    first, last = window(lines, last=False), window(lines)
    if first is None or last is None:
        return None
    r_first, r_last = window(rest, last=False), window(rest)
    rejected = None if r_first is None or r_last is None else change(r_last, r_first)
    series = smooth([Point(p.step, p.value - first.value) for p in lines])
    return _Change(change(last, first), rejected, series, "in the first training lines")


def _per_token(run: RunView, chosen: Point) -> float | None:
    ratio = run.held_out("perplexity_ratio/chosen")
    if ratio and ratio[-1].step == chosen.step:
        return -math.log(ratio[-1].value)
    return None if run.chosen_tokens is None else chosen.value / run.chosen_tokens


def _of_run(run: RunView) -> Seen | None:
    found = _against_reference(run) or _against_start(run)
    limit = run.trust.chosen_fall
    if found is None or not found.chosen.bounds()[1] < -limit:
        return None
    chosen, rejected = found.chosen, found.rejected
    per_token = _per_token(run, chosen)
    start = since([Point(p.step, -p.value) for p in found.series], limit)
    sentence = (
        f"From step {start:,} on chosen answers are less likely than {found.since}: by {number(-chosen.value)} nats per completion at step "
        f"{chosen.step:,}{interval(Point(0, -chosen.value, chosen.se, chosen.n))}"
        + (f", {number(-per_token)} per token" if per_token is not None else "")
        + "."
    )
    spared = rejected is not None and rejected.value >= chosen.value
    shown = [evidence("change of the log-prob of chosen answers, nats per completion", found.series)]
    if rejected is not None:
        moved = f"fell by {number(-rejected.value)}" if rejected.value < 0 else f"rose by {number(rejected.value)}"
        ending = (
            ", no more than the chosen ones: what both lose goes to answers that nobody has seen." if spared else "."
        )
        sentence += f" Rejected answers {moved}{ending}"
        shown.append(evidence("the same of rejected answers, last", [rejected]))
    strong = spared or rejected is None or (per_token is not None and per_token < -LARGE)
    return Seen(sentence, tuple(shown), "warning" if strong else "note")


DISPLACEMENT = Rule(
    name="likelihood_displacement",
    title="chosen answers become less likely",
    what="the 99% interval of the change of `log pi(y_w)` against the reference (against the start for a loss without one) lies below minus "
    "`chosen_fall` nats per completion. A warning where the rejected answer does not fall more, or the fall is above "
    f"{LARGE:g} nats per token, else a note. Papers: arXiv 2410.08847, 2402.13228.",
    needs="`eval/logratios/chosen` (else `eval/logps/chosen`, else training lines: at least ten)",
    alarms="at most 0.5% where chosen answers fall by `chosen_fall` or less",
    advice="Read what the policy writes now (samples.jsonl) and look at its win rate: set evaluation.reward. A lower train.lr or fewer steps, a "
    "higher loss.beta, loss.nll_weight, or the losses dpo_shift and dpop keep chosen answers likely; pairs whose answers are nearly alike cause "
    "the most of it.",
    thresholds=("chosen_fall",),
    of_run=_of_run,
)


# ---- Completions that become longer, and data that teach it ----

FEWER_ENDED = 0.2  # by so much the share of completions that end by themselves may fall
LONGER_CHOSEN = 0.6  # data in which the chosen answer is longer more often than this teach length
Z99 = 2.5758293035489004


def _of_run_length(run: RunView) -> Seen | None:
    bias = _bias(run.audit)
    grown = _grown(run)
    if grown is not None:
        sentence, shown = grown
        return Seen(sentence + (f" {bias[0]}" if bias else ""), (*shown, *([bias[1]] if bias else [])))
    if bias is None:
        return None
    return Seen(
        bias[0], (bias[1],), "note", advice="Watch eval/completions/length, and compare at equal length. "
        "Balance the lengths of the pairs, or use a loss that takes length out (r_dpo, simpo, ld_dpo)."
    )  # fmt: skip


def _grown(run: RunView) -> tuple[str, list[Evidence]] | None:
    lengths, ended = _ends(run, "completions/length"), _ends(run, "completions/ended")
    if lengths is None:
        return None
    first, last, series = lengths
    longer = change(last, first, run.trust.length_ratio).bounds()[0] > 0
    cut = ended is not None and change(ended[0], ended[1]).bounds()[0] > FEWER_ENDED
    if not longer and not cut:
        return None
    sentence = (
        f"Completions went from {number(first.value)} tokens at step {first.step:,} to {number(last.value)} at step {last.step:,}"
        f"{interval(last)}"
    )
    shown = [evidence("tokens of a completion", series)]
    if ended is not None:
        sentence += f", and {percent(ended[1].value)} of them end by themselves, {percent(ended[0].value)} before"
        shown.append(evidence("share of completions that end by themselves", ended[2]))
    return sentence + ".", shown


def _ends(run: RunView, name: str) -> tuple[Point, Point, list[Point]] | None:
    """(first, last, all) of a figure of completions: at evaluations, else over training lines."""
    held = run.held_out(name)
    if len(held) > 1:
        return held[0], held[-1], held
    lines = run.training(name)
    first, last = window(lines, last=False), window(lines)
    return None if first is None or last is None else (first, last, lines)


def _bias(audit: Mapping[str, Any]) -> tuple[str, Evidence] | None:
    """Where the chosen answer of the data is the longer one more often than by `LONGER_CHOSEN`."""
    found = (audit.get("findings") or {}).get("length_bias") or {}
    count, of = found.get("count"), found.get("of")
    if not isinstance(count, int) or not isinstance(of, int) or of <= 0:
        return None
    known = wilson(count, of, Z99)
    if known.low <= LONGER_CHOSEN:
        return None
    sentence = f"In the data the chosen answer is the longer one in {percent(known.estimate)} of {of:,} pairs of unequal length."
    return sentence, Evidence("share of pairs whose chosen answer is longer", (known.estimate,))


def _of_comparison(view: ComparisonView) -> Sequence[Seen]:
    base = view.point(view.models.get(view.first, {}), "tokens")
    found = []
    for name, figures in view.others.items():
        mine = view.point(figures, "tokens")
        if base is None or mine is None or change(mine, base, view.trust.length_ratio).bounds()[0] <= 0:
            continue
        sentence = f"{name} writes {number(mine.value)} tokens per completion, {view.first} {number(base.value)}."
        label, advice = "tokens per completion, first model and this one", "Look at the win rate at equal length."
        found.append(seen(sentence, label, base.value, mine.value, about=name, advice=advice))
    return found


LENGTH = Rule(
    name="length_growth",
    title="completions become longer",
    what="`tokens_now - length_ratio * tokens_at_first` has a 99% interval above 0, or the share of completions that end by themselves fell by more than "
    f"{percent(FEWER_ENDED)} beyond noise. A note where only the data give reason: the chosen answer is the longer one in more than {percent(LONGER_CHOSEN)} of "
    "pairs (99% Wilson interval).",
    needs="`eval/completions/length` at two evaluations (`evaluation.kl_prompts`), or training lines of an online method; `audit.json`",
    alarms="at most 0.5% for length and 0.5% for ends where neither passed its threshold",
    advice="Read the long completions, and compare with the start at equal length before believing a win rate or a reward. Balance the lengths of the "
    "pairs, use a loss that takes length out (r_dpo, simpo, ld_dpo), or price words in an online reward.",
    thresholds=("length_ratio",),
    of_run=_of_run_length,
    of_comparison=_of_comparison,
)


# ---- A margin that rises while nobody wins by it ----

UNKNOWN = (
    "Raise evaluation.kl_prompts: a win rate over n prompts is known to about 1.3 / sqrt(n) on either side, so 16 prompts "
    "tell little and 400 tell 60% from 50%."
)


def _of_run_margin(run: RunView) -> Seen | None:
    margins, wins = run.held_out("rewards/margins"), run.held_out("win_rate")
    if len(margins) < 2 or not wins or wins[-1].step == 0 or change(margins[-1], margins[0]).bounds()[0] <= 0:
        return None
    last = wins[-1]
    low, high = last.bounds()
    shown = (evidence("held-out reward margin", margins), evidence("win rate against the start", wins))
    rose = (
        f"Between steps {margins[0].step:,} and {margins[-1].step:,} the held-out reward margin rose from {number(margins[0].value)} to "
        f"{number(margins[-1].value)}"
    )
    if low <= 0.5 and high < run.trust.win_rate:
        return Seen(f"{rose}, but completions win against the start's in {share_interval(last)} of prompts.", shown)
    fallen = _fallen(margins, wins)
    if fallen is not None:
        return Seen(
            f"{rose}, but the win rate against the start fell from {percent(fallen.value)} at step {fallen.step:,} to "
            f"{percent(last.value)} at step {last.step:,}.",
            shown,
        )
    if low <= 0.5:
        sentence = f"{rose}. Whether completions win by it cannot be told: {share_interval(last)} of {last.n} prompts."
        return Seen(sentence, shown, "note", advice=UNKNOWN)
    return None


def _fallen(margins: list[Point], wins: list[Point]) -> Point | None:
    """The best win rate, where the last one is below it by more than noise and the margin has risen since."""
    best = max(wins, key=lambda p: p.value)
    at_best = [m for m in margins if m.step <= best.step]
    if best.step == wins[-1].step or not at_best or margins[-1].value <= at_best[-1].value:
        return None
    return best if change(best, wins[-1]).bounds(tests=len(wins) - 1)[0] > 0 else None


MARGIN = Rule(
    name="margin_without_wins",
    title="margin rises, win rate does not",
    what="the held-out reward margin rose (99% interval of its change above 0), and the win rate of sampled completions against the start's has a "
    "99% interval that includes or lies below 50% and ends below `win_rate`; or it fell from its best evaluation by more than noise (Bonferroni "
    "over evaluations) while the margin rose on. A note where the interval includes 50% but is too wide to tell. Paper: arXiv 2406.02900.",
    needs="`eval/rewards/margins` (by the loss's own reward) and `eval/win_rate`: set `evaluation.reward`",
    alarms="at most 0.5% where completions win in `win_rate` of prompts or more; the fall from the best is tested at 0.5%",
    advice="The margin is the loss's own figure. Stop at the step with the best win rate, raise loss.beta or lower train.lr, and look at whether the "
    "data prefer what evaluation.reward prefers.",
    thresholds=("win_rate",),
    of_run=_of_run_margin,
)


# ---- Training goes on getting better, held-out rows get worse ----

DIVERGES = (
    "Training itself gets worse: lower train.lr, lengthen the warm-up, or look at the rows of the steps where it turns."
)


@dataclass(frozen=True, slots=True)
class _Watched:
    """A figure that stands in training and evaluation lines; `sign` makes lower better."""

    name: str
    label: str
    sign: float


LOSS = _Watched("loss", "loss", 1.0)
ACCURACY = _Watched("rewards/accuracies", "accuracy", -1.0)
REWARD = _Watched("reward", "reward of fresh completions", -1.0)


def _watched(run: RunView) -> list[_Watched]:
    algorithm = run.config.get("algorithm")
    if isinstance(algorithm, Mapping) and algorithm.get("name") != "reward_model":
        return [REWARD]
    # a loss whose settings follow the steps is another loss at every evaluation
    return [ACCURACY] if _scheduled(run.section("loss")) else [LOSS, ACCURACY]


def _scheduled(loss: Any) -> bool:
    if isinstance(loss, Mapping):
        return (
            loss.get("schedule", "fixed") != "fixed"
            or any(map(_scheduled, loss.values()))
            or {"start", "end"} <= set(loss)
        )
    return isinstance(loss, list) and any(map(_scheduled, loss))


def _of_run_overfitting(run: RunView) -> Seen | None:
    return next((seen for w in _watched(run) if (seen := _turned(run, w)) is not None), None) or _gap(run)


def _gap(run: RunView) -> Seen | None:
    """Rows that were trained on are got right, held-out ones are not."""
    held, lines = run.held_out(ACCURACY.name), run.training(ACCURACY.name)
    train = window(lines)
    if not held or train is None or held[-1].se is None or held[-1].step < train.step:
        return None
    limit = run.trust.accuracy_gap
    if change(train, held[-1]).bounds()[0] <= limit:
        return None
    gaps = [Point(p.step, near - p.value) for p in held if (near := _near(lines, p.step)) is not None]
    sentence = (
        f"At step {train.step:,} {percent(train.value)} of training's pairs are got right, of held-out ones {share_interval(held[-1])}; the gap is above "
        f"{percent(limit)} since step {since(gaps, limit):,}."
    )
    return Seen(sentence, (evidence("training minus held-out accuracy", gaps), evidence("held-out accuracy", held)))


def _turned(run: RunView, watched: _Watched) -> Seen | None:
    held = [Point(p.step, watched.sign * p.value, p.se, p.n) for p in run.held_out(watched.name)]
    if len(held) < 3 or held[-1].se is None:
        return None
    best = min(held, key=lambda p: p.value)
    last = held[-1]
    if best.step == last.step or change(last, best).bounds(tests=len(held) - 1)[0] <= 0:
        return None
    train = run.training(watched.name)
    early, late = _near(train, best.step), _near(train, last.step)
    shown = (
        evidence(f"held-out {watched.label}", [Point(p.step, watched.sign * p.value) for p in held]),
        evidence(f"training {watched.label}", train),
    )
    values = f"from {number(watched.sign * best.value)} at step {best.step:,} to {number(watched.sign * last.value)} at step {last.step:,}"
    if early is None or late is None or watched.sign * (late - early) < 0:
        trained = (
            f", while training's went on from {number(early)} to {number(late)}"
            if early is not None and late is not None
            else ""
        )
        return Seen(
            f"Overfitting starts at step {best.step:,}: held-out {watched.label} got worse {values}{trained}.", shown
        )
    return Seen(
        f"Held-out {watched.label} got worse {values}, and so did training's, from {number(early)} to {number(late)}: training diverges.",
        shown,
        advice=DIVERGES,
    )


def _near(train: list[Point], step: int) -> float | None:
    """Mean of the five training lines up to a step, or of the first five."""
    upto = [p.value for p in train if p.step <= step][-SMALLEST_WINDOW:]
    values = upto if len(upto) == SMALLEST_WINDOW else [p.value for p in train[:SMALLEST_WINDOW]]
    return sum(values) / len(values) if values else None


OVERFITTING = Rule(
    name="overfitting",
    title="overfitting",
    what="n = the step of the best held-out loss; `loss_last - loss_n` is above 0 with its whole 99% interval, Bonferroni over all evaluations (since n was "
    "searched for). Both intervals are treated as independent, which on the same rows is too wide. Overfitting where training's loss went on falling, else "
    "divergence. Accuracy by the loss's own reward is watched likewise; alone where the loss has a schedule; an online method's held-out reward. Also where accuracy over the last quarter "
    "of training lines is above held-out accuracy by more than `accuracy_gap` with the whole 99% interval.",
    needs="three evaluations with `eval/loss/ci` (or `eval/rewards/accuracies/ci`, `eval/reward/ci`); for the gap one evaluation, after training",
    alarms="at most 0.5% where held-out loss does not rise; 1% with accuracy; 0.5% where the gap is `accuracy_gap`",
    advice="Take the best checkpoint (checkpoint.keep_best), train for fewer epochs, lower train.lr, or get more data.",
    thresholds=("accuracy_gap",),
    of_run=_of_run_overfitting,
)


# ---- What training lines say of the run's mechanics: skipped steps, numbers that are none, a reference that is not the start ----

DRIFT = 0.5  # nats per completion: what rounding in bf16 may leave in a mean over rows


def _skipped(run: RunView) -> Seen | None:
    skipped = [m for m in run.train if m.get("skipped")]
    if not run.train or len(skipped) / len(run.train) <= run.trust.skipped:
        return None
    (why, _), *_ = Counter(str(m["skipped"]) for m in skipped).most_common(1)
    share = len(skipped) / len(run.train)
    sentence = f"{len(skipped):,} of {len(run.train):,} optimizer steps ({percent(share)}) were not taken, most of them because: {why}."
    return Seen(sentence, (evidence("steps not taken", [Point(int(m["step"]), 1.0) for m in skipped]),))


SKIPPED = Rule(
    name="skipped_steps",
    title="steps were skipped",
    what="more than `skipped` of the training lines are of steps that were not taken.",
    needs="training lines",
    alarms="none: it is a count",
    advice="An online method learns nothing where all completions of a prompt have one reward: raise algorithm.samples or train.batch_size, choose a finer "
    "reward, or other prompts. Where PPO refuses steps (algorithm.ratio_limit), lower train.lr.",
    thresholds=("skipped",),
    of_run=_skipped,
)


def _not_finite(run: RunView) -> Seen | None:
    places = [(int(m["step"]), name) for m in run.whole for name, value in m.items() if value is None]
    if not places:
        return None
    step, name = places[0]
    names = sorted({n for _, n in places})
    shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
    more = f", and {len(places) - 1:,} more figures after it ({shown})" if len(places) > 1 else ""
    counts = [Point(s, float(n)) for s, n in sorted(Counter(s for s, _ in places).items())]
    sentence = f"{name} was NaN or infinite at step {step:,}{more}."
    return Seen(sentence, (evidence("figures that are no numbers, by step", counts),))


NOT_FINITE = Rule(
    name="not_finite",
    title="a figure is NaN or infinite",
    what="a figure in metrics.jsonl is null, which stands for NaN or infinity.",
    needs="metrics.jsonl",
    alarms="none: it is a count",
    advice="Lower train.lr, set train.max_grad_norm, and look at the rows of that step.",
    of_run=_not_finite,
)


def _drift(run: RunView) -> Seen | None:
    if run.section("reference").get("path") or not run.whole:
        return None
    first = next((m for m in run.whole if m.get("step") in (0, 1)), None)
    if first is None or (first.get("kind") == "train" and first.get("step") != 1):
        return None
    prefix = "eval/" if first.get("kind") == "eval" else ""
    for side in ("chosen", "rejected"):
        value = first.get(f"{prefix}logratios/{side}")
        if isinstance(value, (int, float)) and abs(value) > DRIFT:
            sentence = (
                f"Before the first step {side} answers already differ from the reference by {number(value)} nats per completion, though the reference "
                "should be the model that training starts from."
            )
            label = f"log-ratio of {side} answers before the first step, nats"
            return Seen(sentence, (Evidence(label, (float(value),), (int(first["step"]),)),))
    return None


DRIFTED = Rule(
    name="reference_drift",
    title="the reference is not the start",
    what=f"without `reference.path`, the mean log-ratio of held-out (or the first step's) answers before training is further from 0 than {DRIFT:g} nats per "
    "completion.",
    needs="`eval/logratios/*` at step 0, or the first training line",
    alarms="none where reference and policy are one model; rounding in bf16 stays below it",
    advice="Delete the reference cache or set reference.kind=frozen, and check that model.path is what you think it is.",
    of_run=_drift,
)
