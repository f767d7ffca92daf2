"""Trust flags about how much the figures rest on: few prompts, one seed, ties."""

from __future__ import annotations

from collections.abc import Iterator

from penchant.base.text import counted
from penchant.flags.rule import (
    ComparisonView,
    Finding,
    RunView,
    finding,
    percent,
)
from penchant.metrics.names import TIES
from penchant.runfolder.values import algorithm_of, mapping, num, sample_size


def _prompts_of_run(run: RunView) -> Finding | None:
    rows = int(run.evals[-1].get("eval/rows") or 0) if run.evals else 0
    wins = run.held_out_points("win_rate")
    if 0 < rows < run.trust.prompts:
        label, count, advice = "held-out rows", rows, "hold more rows out (data.validation_rows)"
    elif wins and 0 < wins[-1].n < run.trust.prompts:
        label, count, advice = "prompts whose completions are judged", wins[-1].n, "raise evaluation.kl_prompts"
    else:
        return None
    sentence = (
        f"Held-out figures rest on {count:,} {label}: their intervals are wide, and only large effects can be seen."
    )
    return finding(sentence, label, count, level="note", advice=f"To see more, {advice}.")


def _prompts_of_comparison(view: ComparisonView) -> Iterator[Finding]:
    if 0 < view.prompts < view.trust.prompts:
        sentence = f"The comparison rests on {counted(view.prompts, 'prompt')}: only large differences can be seen."
        yield finding(sentence, "prompts", view.prompts, level="note", advice="Compare on more prompts.")


def _one_seed(view: ComparisonView) -> Iterator[Finding]:
    seeds = mapping(view.figures.get("seeds"))
    counts = {name: len(runs) if isinstance(runs := seeds.get(name), (dict, list)) else 1 for name in view.others}
    single = [name for name, n in counts.items() if n < 2]
    if single:
        sentence = f"{', '.join(single)}: trained with one seed, so it is unknown what another seed would give."
        yield finding(sentence, "seeds of each setting", *counts.values(), level="note")


def _ties_of_run(run: RunView) -> Finding | None:
    last = run.evals[-1] if run.evals else {}
    if not num(last, "step"):  # before training most losses tie every pair
        return None
    cannot_tell = "This reward cannot tell them apart."
    pairs_explanation = cannot_tell if algorithm_of(run.config) else "The policy has hardly moved from its reference."
    for name, unit, subject, reason in (
        ("win_rate", "prompts", "the run's completion and its start's", cannot_tell),
        ("rewards/accuracies", "pairs", "both answers", pairs_explanation),
    ):
        ties, n = num(last, f"eval/{TIES[name]}"), sample_size(last, f"eval/{name}")
        if ties is not None and ties >= run.trust.ties and n:
            sentence = f"Tied on {round(ties * n):,} of {n:,} held-out {unit}: {subject} have the same reward. {reason}"
            return finding(sentence, "share of ties", ties, level="warning" if reason == cannot_tell else "note")
    return None


def _ties_of_comparison(view: ComparisonView) -> Iterator[Finding]:
    for name, figures in view.others.items():
        ties = num(figures, "win_rate/ties")
        if ties is not None and ties >= view.trust.ties:
            sentence = f"{percent(ties)} of the pairs of completions of {name} and {view.first} have the same reward: it cannot tell them apart."
            yield finding(sentence, "share of ties", ties, about=name)


OF_RUN = {"few_prompts": _prompts_of_run, "tied": _ties_of_run}
OF_COMPARISON = {"few_prompts": _prompts_of_comparison, "one_seed": _one_seed, "tied": _ties_of_comparison}
