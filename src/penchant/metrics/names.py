"""Every metric once: what it is, its formula, its unit, what it is over, which way is better, and its value where nothing was learned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from penchant.base.files import packaged_yaml

# a cost is what a gain is paid with: less of it is better, but only at the same gain
Better = Literal["higher", "lower", "cost"]


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric.

    Args:
        name: as logged, without ``eval/``; meaning: a sentence; formula: with pi the policy, ref the reference, y_w and y_l the chosen and the
            rejected answer; over: what its ``/n`` counts where `penchant eval` measures it, "" elsewhere.
        label: in words, for the held-out table of the report, "" where it does not stand there; picture, row: the same for `penchant watch`, as
            the title of a picture and as a line of its table; unit: "" where it has none.
        better: which way, None where that cannot be said; null: its value where nothing was learned (one half, zero), None where there is none.
        share: a share of rows, shown in percent; main: what a run is judged by; logged: whether runs log it; else only `penchant eval` has it.
    """

    name: str
    meaning: str
    formula: str = ""
    over: str = ""
    label: str = ""
    picture: str = ""
    row: str = ""
    unit: str = ""
    better: Better | None = None
    null: float | None = None
    share: bool = False
    main: bool = False
    logged: bool = True

    @property
    def title(self) -> str:
        """What it is called beside its figures."""
        return self.label or self.name


METRICS: Mapping[str, Metric] = {
    name: Metric(name, **facts) for name, facts in packaged_yaml(__package__, "metrics.yaml").items()
}
OTHER_REWARD = Metric(
    "generated/reward[NAME]",
    "mean of another reward (--also) of the same completions",
    "mean r(x, y)",
    "completions",
    logged=False,
)
SPEED = (
    Metric("seconds", "wall time of the optimizer step"),
    Metric("tokens_per_second", "tokens computed in the step, a shared prompt once, over its seconds"),
    Metric("trees_per_second", "rows (prompts with their completions) of the step over its seconds"),
    Metric("peak_memory_gb", "the most memory that the process, or on a GPU its tensors there, has had so far, GiB"),
)


def metric(name: str) -> Metric:
    """A metric by its name, with or without ``eval/``; of a part of a mixed loss, ``PART/NAME``, it is NAME's.

    One that nobody knows (of a person's own loss) has a name and no meaning.
    """
    short = name.removeprefix("eval/")
    if short in METRICS:
        return METRICS[short]
    if short.startswith("generated/reward["):
        return replace(OTHER_REWARD, name=short)
    part, _, rest = short.partition("/")
    found = METRICS["loss/sft"] if part == "loss" else METRICS.get(rest, Metric("", ""))
    return replace(found, name=short, label="")


def higher_is_better(name: str) -> bool:
    """Which way a figure is sorted; higher where nothing is known of it."""
    return metric(name).better in ("higher", None)


def of_evaluation(line: Mapping[str, Any]) -> dict[str, Any]:
    """A line of evaluations.jsonl under today's names.

    An evaluation on asked rows (whose settings say its beta) used to call ``implicit_reward/*`` ``rewards/*``, the name of the loss's own reward.
    """
    what = line.get("what")
    if not isinstance(what, Mapping) or "beta" not in what:
        return dict(line)
    named = {
        part: {str(k).replace("eval/rewards/", "eval/implicit_reward/"): v for k, v in values.items()}
        for part in ("metrics", "n")
        if isinstance(values := line.get(part), Mapping)
    }
    return {**line, **named}
