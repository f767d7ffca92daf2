"""KL and perplexity that leave their bands."""

from __future__ import annotations

import math
from collections.abc import Sequence

from penchant.evaluation.flags import Evidence
from penchant.evaluation.trust.figures import Point, RunView, evidence, since, smooth, standard_error, window
from penchant.evaluation.trust.rule import ComparisonView, Rule, Seen
from penchant.evaluation.trust.words import interval, number


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
        value = figures.get("kl")
        if not isinstance(value, (int, float)):
            continue
        now = Point(0, float(value), standard_error(float(value), figures.get("kl/ci"), view.prompts), view.prompts)
        if now.bounds()[0] > high:
            sentence = f"{name} is {number(now.value)} nats per completion away from {view.first}{interval(now)}, above trust.kl's {number(high)}."
            found.append(
                Seen(sentence, (Evidence("KL to the first model, nats per completion", (now.value,)),), about=name)
            )
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
            found.append(
                Seen(
                    sentence,
                    (Evidence("perplexity, first model and this one", (float(base), float(mine))),),
                    about=name,
                )
            )
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
