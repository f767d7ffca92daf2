"""Successive halving: compare settings at rungs before the end, and continue only the best ones (arXiv:1502.07943)."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import mean
from typing import Any

from pydantic import Field

from penchant.base.section import Section
from penchant.config import Places, RunConfig, place_of
from penchant.config.several import read_section
from penchant.errors import ConfigError
from penchant.metrics.names import higher_is_better

# in units of the loss
LOSS_UNIT_METRICS = ("eval/loss", "eval/rewards/margins", "eval/rewards/chosen", "eval/rewards/rejected")


class HalvingConfig(Section):
    """The `halving` section."""

    rungs: int = Field(3, ge=2, le=8, description="places where settings are compared, the end among them")
    factor: int = Field(
        3, ge=2, description="one in so many settings goes on, and rungs lie so many times further apart"
    )
    metric: str | None = Field(None, description="what settings are compared by at a rung; default: the sweep's metric")


@dataclass(frozen=True, slots=True)
class Halving:
    """The rule of successive halving.

    Args:
        rungs: number of rungs, including the end; factor: ratio of steps between rungs, and of settings that are kept.
        metric, higher: the metric that ranks settings, and whether higher is better; place: of the metric in the file.
    """

    rungs: int
    factor: int
    metric: str
    higher: bool
    place: str

    def steps(self, total: int) -> list[int]:
        """Optimizer steps of a run's rungs: ``total / factor^(rungs - k)``, rounded, for rung k = 1 to rungs."""
        return [max(1, round(total / self.factor ** (self.rungs - k))) for k in range(1, self.rungs + 1)]

    def survivors(self, settings: int) -> int:
        """How many of `settings` settings continue: one in `factor`, rounded up."""
        return -(-settings // self.factor)

    def to_json(self) -> dict[str, Any]:
        direction = "max" if self.higher else "min"
        return {"rungs": self.rungs, "factor": self.factor, "metric": self.metric, "direction": direction}

    def to_text(self) -> str:
        """Describe the rule in a sentence."""
        shares = [f"1/{self.factor ** (self.rungs - k)}" for k in range(1, self.rungs)]
        return (
            f"successive halving: after {' and '.join(shares)} of its steps, a setting continues if it is among the best 1 "
            f"in {self.factor} by {self.metric}"
        )


@dataclass(frozen=True, slots=True)
class Standing:
    """A setting at a rung: its mean over seeds (None if a seed has no value), its rank, and whether it continues."""

    setting: str
    mean: float | None
    rank: int
    kept: bool

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def standings(values: Mapping[str, Sequence[float | None]], halving: Halving) -> list[Standing]:
    """Rank the settings at a rung, best first. All seeds of a setting continue or stop together.

    The best ``ceil(n / factor)`` of n settings continue, and so does every setting tied with the last of those, so that file order never
    breaks a tie. A setting with a seed that stopped itself ranks last and does not continue, because the mean of the remaining seeds
    would flatter it.

    Args:
        values: ``{setting: metric of each of its runs at the rung}``.
    """
    means = {s: mean(v) if v and None not in v else None for s, v in values.items()}  # type: ignore[type-var]
    sign = -1.0 if halving.higher else 1.0
    signed_means = sorted(sign * m for m in means.values() if m is not None)
    cutoff = signed_means[min(len(signed_means), halving.survivors(len(values))) - 1] if signed_means else None
    ranked = []
    for setting, m in means.items():
        rank = len(signed_means) + 1 if m is None else 1 + sum(other < sign * m for other in signed_means)
        ranked.append(Standing(setting, m, rank, m is not None and cutoff is not None and sign * m <= cutoff))
    return sorted(ranked, key=lambda s: s.rank)


def read_halving(
    values: Mapping[str, Any],
    places: Places,
    source: str,
    settings: Mapping[str, RunConfig],
    metric: str,
    higher: bool,
) -> Halving | None:
    """Read the `halving` section of a sweep; None if there is none.

    Args:
        settings: one config per setting; metric, higher: the sweep's.

    Raises:
        ConfigError: there is only one setting, or the metric is unknown or not comparable across the settings' losses.
    """
    if values.get("halving") is None:
        return None
    place = place_of(("halving",), places, source)
    config = read_section(HalvingConfig, "halving", values, places, source, "write halving: {rungs: 3, factor: 3}")
    halving_metric = config.metric or metric
    place = place_of(("halving", "metric"), places, place) if config.metric else place
    check_metric(halving_metric, "halving.metric", place, settings.values())
    if len(settings) < 2:
        raise ConfigError(place, "there is one setting only, so nothing can be halved", "leave halving out")
    losses = {json.dumps(c.loss.to_mapping(), sort_keys=True) for c in settings.values()}
    if halving_metric in LOSS_UNIT_METRICS and len(losses) > 1:
        what = f"settings would be halved by {halving_metric}, but the loss varies, so it is not on one scale"
        how = "set halving.metric to a figure that means the same for all, e.g. eval/rewards/accuracies"
        raise ConfigError(place, what, how)
    higher_wins = higher if halving_metric == metric else higher_is_better(halving_metric)
    return Halving(config.rungs, config.factor, halving_metric, higher_wins, place)


def check_metric(metric: Any, key: str, place: str, configs: Collection[RunConfig]) -> None:
    """Raise ConfigError unless `metric` is a held-out metric that one of the runs may have."""
    if not isinstance(metric, str) or not metric.startswith("eval/") or metric.endswith("/ci"):
        raise ConfigError(place, f"{key} is {metric!r}", "give a held-out figure, e.g. eval/rewards/accuracies")
    advice = [how for c in configs if (how := c.unknown_metric(metric))]
    if len(advice) == len(configs):
        raise ConfigError(place, f"{key} is {metric}, which no run has", advice[0])
