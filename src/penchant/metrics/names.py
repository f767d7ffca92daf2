"""The table of metrics: meaning, formula, unit, what it is averaged over, which way is better, and its value if nothing was learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from penchant.base.files import packaged_yaml
from penchant.base.text import closest
from penchant.runfolder.values import FEW_ROWS, ci_of, format_decimals, format_interval, interval_of, num, sample_size

# a cost is the price of a gain (the KL of a reward): lower is better, but only at the same gain
Better = Literal["higher", "lower", "cost"]

# caveat shown with the best of several settings
SELECTION_CAVEAT = "It was chosen by these held-out rows, so its figure is optimistic and its lead proves nothing: measure it on rows that no run has seen."


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric.

    Args:
        name: as logged, without ``eval/``; meaning: a sentence; formula: with pi the policy, ref the reference, y_w and y_l the chosen and the
            rejected answer; over: what its ``/n`` counts in `penchant eval`, "" if that does not measure it.
        label: its label in the report's held-out table, "" if it is not shown there; picture, row: the same for `penchant watch`, as the title
            of a plot and as a row of its table; unit: "" if it has none.
        better: which way is better, None if neither; null: its value if nothing was learned (one half, zero), None if there is no such value.
        word: its description in the short table of `penchant eval`; "" if the label is enough, or if it is not in that table.
        share: whether it is a share of rows, shown in percent; main: whether runs are judged by it; logged: whether runs log it, or only
            `penchant eval` has it; only: which lines have it, if not all may: those of training steps, or evaluations of runs with a reward of
            completions, or with completions at all.
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
    only: Literal["", "training", "reward", "completions"] = ""

    @property
    def title(self) -> str:
        """The name shown next to its figures."""
        return self.label or self.name


METRICS: Mapping[str, Metric] = {
    name: Metric(name, **facts) for name, facts in packaged_yaml(__package__, "metrics.yaml").items()
}
OTHER_REWARD = Metric(
    "generated/reward[NAME]",
    "mean of another reward (--also) of the same completions",
    "mean r(x, y)",
    "completions",
    word="mean of another reward of its completions",
    logged=False,
)
# metrics of each named reward in a weighted sum
REWARDS = {
    "mean": Metric(
        "rewards/NAME/mean", "mean of one reward of the sum, over the completions that it applies to", only="reward"
    ),
    "std": Metric("rewards/NAME/std", "its standard deviation over them", only="reward"),
    "none": Metric("rewards/NAME/none", "share of completions that it does not apply to", share=True, only="reward"),
}
SPEED = (
    Metric("seconds", "wall time of the optimizer step"),
    Metric("tokens_per_second", "tokens computed in the step, a shared prompt once, over its seconds"),
    Metric("trees_per_second", "rows (prompts with their completions) of the step over its seconds"),
    Metric("peak_memory_gb", "the most memory that the process, or on a GPU its tensors there, has had so far, GiB"),
)


def metric(name: str) -> Metric:
    """Look up a metric by its name, with or without ``eval/``. ``PART/NAME`` (a part of a mixed loss) has the entry of NAME.

    An unknown metric (of a user's own loss) gets an entry with only a name.
    """
    short = name.removeprefix("eval/")
    if short in METRICS:
        return METRICS[short]
    if short.startswith("generated/reward["):
        return replace(OTHER_REWARD, name=short)
    if short.startswith("rewards/") and (reward_metric := REWARDS.get(short.rpartition("/")[2])):
        return replace(reward_metric, name=short)
    part, _, rest = short.partition("/")
    entry = METRICS["loss/sft"] if part == "loss" else METRICS.get(rest, Metric("", ""))
    return replace(entry, name=short, label="")


def unknown_metric(name: str, terms: Sequence[str], lacking: Mapping[str, str]) -> str | None:
    """What to do about a held-out metric (``eval/NAME``, ``eval/SET/NAME``) that runs never log; None if they may log it.

    Args:
        terms: of their loss, as in ``eval/loss/TERM``; lacking: the kinds of metrics (`Metric.only`) that they do not log, each with advice.
    """
    parts = name.split("/") if name.startswith("eval/") else []
    if "loss" in parts[1:3] and parts[-1] != "loss":
        term = "/".join(parts[parts.index("loss") + 1 :])
        known = " or ".join(f"loss/{t}" for t in terms)
        return None if term in terms else f"its parts are {known}" if terms else "it has one part: give eval/loss"
    entries = [metric("/".join(parts[i:])) for i in range(1, len(parts))]
    entry = next((e for e in entries if e.meaning and e.logged), None)
    if entry is not None:
        return lacking.get(entry.only)
    if match := closest(name, [f"eval/{n}" for n, e in METRICS.items() if e.logged and e.only not in lacking]):
        return f'did you mean "{match}"?'
    return "give a held-out figure, e.g. eval/rewards/accuracies"


TIES = {"rewards/accuracies": "rewards/ties", "win_rate": "win_rate/ties"}


def with_k3(line: Any) -> Mapping[str, Any]:
    """Add the KL that is shown (k3) to a metrics line or a model's figures if only k1 is there (older versions) and not negative."""
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
    tied_interval = metric(name).null == 0.5 and interval_of(line, name) == (0.5, 0.5)  # older versions wrote no ties
    return tied_interval if ties is None else ties == 1.0


def format_figure(line: Mapping[str, Any], name: str, digits: int = 4) -> str:
    """Format a figure of a metrics line with its interval; all ties, and shares of only a few rows, become counts."""
    value, n, share = num(line, name), sample_size(line, name), metric(name).share
    if value is None:
        return "not a number"
    spec = f".{digits}f"
    if all_tied(line, name):
        return f"{value:{spec}} (tied on {n} of {n})" if n else f"{value:{spec}} (all tied)"
    if share and n and n < FEW_ROWS and metric(name).null is not None:
        return f"{value * n:g} of {n}, too few to tell"
    return f"{format_decimals(value, spec)} {format_interval(ci_of(line, name), spec)}".rstrip()


def higher_is_better(name: str) -> bool:
    """Whether a figure sorts from high to low; True for unknown figures."""
    return metric(name).better in ("higher", None)


def with_current_names(line: Mapping[str, Any]) -> dict[str, Any]:
    """Return a line of evaluations.jsonl with the current metric names.

    Evaluations of given answers (their settings have a beta) used to write ``implicit_reward/*`` as ``rewards/*``, the loss's own reward.
    """
    settings = line.get("what")
    if not isinstance(settings, Mapping) or "beta" not in settings:
        return dict(line)
    renamed = {
        part: {str(k).replace("eval/rewards/", "eval/implicit_reward/"): v for k, v in values.items()}
        for part in ("metrics", "n")
        if isinstance(values := line.get(part), Mapping)
    }
    return {**line, **renamed}
