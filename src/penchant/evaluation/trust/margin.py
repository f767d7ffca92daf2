"""A margin that rises while nobody wins by it."""

from __future__ import annotations

from penchant.evaluation.trust.figures import Point, RunView, change, evidence
from penchant.evaluation.trust.rule import Rule, Seen
from penchant.evaluation.trust.words import number, percent, share_interval

UNKNOWN = (
    "Raise evaluation.kl_prompts: a win rate over n prompts is known to about 1.3 / sqrt(n) on either side, so 16 prompts "
    "tell little and 400 tell 60% from 50%."
)


def _of_run(run: RunView) -> Seen | None:
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


RULE = Rule(
    name="margin_without_wins",
    title="margin rises, win rate does not",
    what="the held-out reward margin rose (99% interval of its change above 0), and the win rate of sampled completions against the start's has a "
    "99% interval that includes or lies below 50% and ends below `win_rate`; or it fell from its best evaluation by more than noise (Bonferroni "
    "over evaluations) while the margin rose on. A note where the interval includes 50% but is too wide to tell. Paper: arXiv 2406.02900.",
    needs="`eval/rewards/margins` and `eval/win_rate`: set `evaluation.reward`",
    alarms="at most 0.5% where completions win in `win_rate` of prompts or more; the fall from the best is tested at 0.5%",
    advice="The margin is the loss's own figure. Stop at the step with the best win rate, raise loss.beta or lower train.lr, and look at whether the "
    "data prefer what evaluation.reward prefers.",
    thresholds=("win_rate",),
    of_run=_of_run,
)
