"""Every metric once: what it is, its formula, its unit, what it is over, which way is better, and its value where nothing was learned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from penchant.base.files import packaged_yaml
from penchant.runfolder.values import FEW_ROWS, ci_of, interval_of, num, rows_behind, span

# a cost is what a gain is paid with: less of it is better, but only at the same gain
Better = Literal["higher", "lower", "cost"]

# what is said of the best of several settings
CHOSEN = "It was chosen by these held-out rows, so its figure is optimistic and its lead proves nothing: measure it on rows that no run has seen."


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric.

    Args:
        name: as logged, without ``eval/``; meaning: a sentence; formula: with pi the policy, ref the reference, y_w and y_l the chosen and the
            rejected answer; over: what its ``/n`` counts where `penchant eval` measures it, "" elsewhere.
        label: in words, for the held-out table of the report, "" where it does not stand there; picture, row: the same for `penchant watch`, as
            the title of a picture and as a line of its table; unit: "" where it has none.
        better: which way, None where that cannot be said; null: its value where nothing was learned (one half, zero), None where there is none.
        word: what it is, for the short table of `penchant eval`; "" where its label says so already, or where it is not in that table.
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
    word: str = ""
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
# of each reward by its name, in a sum of several
REWARDS = {
    "mean": Metric(
        "rewards/NAME/mean", "mean of one reward of the sum, over the completions of which it says something"
    ),
    "std": Metric("rewards/NAME/std", "its standard deviation over them"),
    "none": Metric("rewards/NAME/none", "share of completions of which it says nothing", share=True),
}
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
    if short.startswith("rewards/") and (of_reward := REWARDS.get(short.rpartition("/")[2])):
        return replace(of_reward, name=short)
    part, _, rest = short.partition("/")
    found = METRICS["loss/sft"] if part == "loss" else METRICS.get(rest, Metric("", ""))
    return replace(found, name=short, label="")


TIES = {"rewards/accuracies": "rewards/ties", "win_rate": "win_rate/ties"}


def with_k3(line: Any) -> Mapping[str, Any]:
    """A metrics line, or a compared model's figures, with the KL that is shown (k3): older versions have k1 alone, which is taken unless it is negative."""
    if not isinstance(line, Mapping):
        return {}
    for k1, k3 in (("eval/kl/policy_ref", "eval/kl/k3"), ("kl/policy_ref", "kl/k3"), ("kl", "kl_k3")):
        if k1 in line and k3 not in line and (value := num(line, k1)) is not None and value >= 0:
            line = {**line, k3: line[k1], f"{k3}/ci": line.get(f"{k1}/ci")}
    return line


def all_tied(line: Mapping[str, Any], name: str) -> bool:
    """Whether every row of an accuracy or a win rate is a tie."""
    prefix = "eval/" if name.startswith("eval/") else ""
    ties = num(line, prefix + TIES.get(name.removeprefix(prefix), ""))
    tied_interval = metric(name).null == 0.5 and interval_of(line, name) == (0.5, 0.5)  # of an older version
    return tied_interval if ties is None else ties == 1.0


def figure_text(line: Mapping[str, Any], name: str, digits: int = 4) -> str:
    """A figure of a metrics line as it may be shown: with its interval; ties, and shares of a few rows, as counts."""
    value, n, share = num(line, name), rows_behind(line, name), metric(name).share
    if value is None:
        return "not a number"
    if all_tied(line, name):
        return f"{value:.{digits}f} (tied on {n} of {n})" if n else f"{value:.{digits}f} (all tied)"
    if share and n and n < FEW_ROWS and metric(name).null is not None:
        return f"{value * n:g} of {n}, too few to tell"
    return f"{value:.{digits}f} {span(ci_of(line, name), f'.{digits}f')}".rstrip()


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
