"""Too few prompts or seeds to say much."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from penchant.evaluation.flags import Evidence
from penchant.evaluation.trust.figures import RunView
from penchant.evaluation.trust.rule import ComparisonView, Rule, Seen


def _prompts_of_run(run: RunView) -> Seen | None:
    if not run.evals:
        return None
    last = run.evals[-1]
    rows = int(last.get("eval/rows") or 0)
    wins = run.held_out("win_rate")
    few = []
    if 0 < rows < run.trust.prompts:
        few.append(("held-out rows", rows, "hold more rows out (data.validation_rows)"))
    elif wins and 0 < wins[-1].n < run.trust.prompts:
        few.append(("prompts whose completions are judged", wins[-1].n, "raise evaluation.kl_prompts"))
    if not few:
        return None
    what, count, how = few[0]
    sentence = (
        f"Held-out figures rest on {count:,} {what}: their intervals are wide, and only large effects can be seen."
    )
    return Seen(sentence, (Evidence(what, (float(count),)),), "note", advice=f"To see more, {how}.")


def _prompts_of_comparison(view: ComparisonView) -> Sequence[Seen]:
    if not 0 < view.prompts < view.trust.prompts:
        return []
    sentence = f"The comparison rests on {view.prompts:,} prompts: only large differences can be seen."
    return [Seen(sentence, (Evidence("prompts", (float(view.prompts),)),), "note", advice="Compare on more prompts.")]


FEW_PROMPTS = Rule(
    name="few_prompts",
    title="few prompts",
    what="fewer than `prompts` held-out rows, judged prompts or prompts of a comparison. A note.",
    needs="an evaluation, or a comparison",
    alarms="none: it is a count",
    advice="Hold more rows out, or compare on more prompts.",
    thresholds=("prompts",),
    of_run=_prompts_of_run,
    of_comparison=_prompts_of_comparison,
)


def _one_seed(view: ComparisonView) -> Sequence[Seen]:
    if not view.models:
        return []
    seeds = view.figures.get("seeds")
    given: Mapping[str, object] = seeds if isinstance(seeds, Mapping) else {}
    counts = {name: len(runs) if isinstance(runs := given.get(name), (Mapping, list)) else 1 for name in view.others}
    one = [name for name, n in counts.items() if n < 2]
    if not one:
        return []
    sentence = f"{', '.join(one)}: trained with one seed, so nothing says what another seed would have given."
    return [Seen(sentence, (Evidence("seeds of each setting", tuple(float(n) for n in counts.values())),), "note")]


ONE_SEED = Rule(
    name="one_seed",
    title="one seed",
    what="a compared setting has one seed. A note.",
    needs="a comparison",
    alarms="none: it is a count",
    advice="Train again with train.seed=1 and 2, and compare all of them.",
    of_comparison=_one_seed,
)
