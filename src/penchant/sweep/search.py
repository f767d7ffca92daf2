"""Hyperparameter search: draw values for one trial after another, at random or with Optuna's TPE sampler."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import ConfigDict, Field, model_validator

from penchant.base.section import Section
from penchant.errors import ConfigError

DIGITS = 4  # significant digits of a drawn number: more would mean nothing and be hard to type


class Range(Section):
    """A range of numbers to draw from. Draws integers if both ends are integers."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", populate_by_name=True)

    low: int | float = Field(alias="from", description="the lowest number")
    high: int | float = Field(alias="to", description="the highest number")
    log: bool = Field(False, description="draw evenly in the logarithm")

    @model_validator(mode="after")
    def _in_order(self) -> Range:
        if not self.low < self.high:
            raise ValueError(f"from is {self.low:g} and to is {self.high:g}; give a lower and a higher number")
        if self.log and self.low <= 0:
            raise ValueError(f"from is {self.low:g}; with log: true give a number above 0")
        return self

    @property
    def whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)


class SearchConfig(Section):
    """The `search` section."""

    trials: int = Field(description="runs", ge=1)
    space: dict[str, Range | list[Any]] = Field(description="key: {from, to, log} or a list of choices")
    seed: int = Field(0, ge=0, lt=2**31, description="of what is drawn")
    sampler: Literal["tpe", "random"] = Field("tpe", description="tpe learns from earlier trials (Optuna), or random")

    @model_validator(mode="after")
    def _something_to_search(self) -> SearchConfig:
        if not self.space:
            raise ValueError("space is empty; add keys, e.g. space: {loss.beta: {from: 0.01, to: 1.0, log: true}}")
        too_short = [key for key, values in self.space.items() if isinstance(values, list) and len(values) < 2]
        if too_short:
            raise ValueError(f"space.{too_short[0]} has no two choices; give a list of at least two, or {{from, to}}")
        return self


def draw(
    search: SearchConfig, number: int, earlier_trials: Sequence[tuple[Mapping[str, Any], float | None]], higher: bool
) -> dict[str, Any]:
    """Draw the values of trial `number`. The result depends only on the arguments, so it can be reproduced.

    Args:
        earlier_trials: (values, result) of earlier trials, in order; the result is None for a trial that stopped itself.
        higher: whether higher results are better.

    Raises:
        ConfigError: the sampler is tpe and Optuna is not installed.
    """
    if search.sampler == "random":
        rng = random.Random(f"{search.seed}:{number}")
        return {key: _at_random(rng, values) for key, values in search.space.items()}
    try:
        import optuna
    except ImportError as error:
        how = "pip install 'penchant[search]', or set search.sampler=random"
        raise ConfigError("search.sampler", "tpe needs Optuna", how) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    distributions = {key: _distribution(values) for key, values in search.space.items()}
    # one seed per trial, so that draws do not depend on how often the search was interrupted
    sampler = optuna.samplers.TPESampler(seed=(search.seed * 1_000_003 + number) % 2**32)
    study = optuna.create_study(direction="maximize" if higher else "minimize", sampler=sampler)
    values = [v for _, v in earlier_trials if v is not None]
    worst = (min(values) if higher else max(values)) if values else 0.0
    for (
        params,
        value,
    ) in earlier_trials:  # a trial that stopped itself counts as the worst, so that its neighborhood is avoided
        # choices are passed by index, because Optuna accepts no mappings as choices
        indices = {k: s.index(v) for k, v in params.items() if isinstance(s := search.space[k], list)}
        trial_params = {**params, **{k: str(index) for k, index in indices.items()}}
        study.add_trial(
            optuna.trial.create_trial(
                params=trial_params, distributions=distributions, value=worst if value is None else value
            )
        )
    suggested = study.ask(distributions).params
    return {
        k: values[int(suggested[k])] if isinstance(values, list) else _rounded(values, suggested[k])
        for k, values in search.space.items()
    }


def _at_random(rng: random.Random, values: Range | list[Any]) -> Any:
    if isinstance(values, list):
        return rng.choice(values)
    if values.whole and not values.log:
        return rng.randint(int(values.low), int(values.high))
    low, high = (math.log(values.low), math.log(values.high)) if values.log else (values.low, values.high)
    sample = rng.uniform(low, high)
    return _rounded(values, math.exp(sample) if values.log else sample)


def _rounded(values: Range, number: float) -> int | float:
    rounded = round(number) if values.whole else float(f"{number:.{DIGITS}g}")
    return min(max(rounded, values.low), values.high)


def _distribution(values: Range | list[Any]) -> Any:
    from optuna import distributions

    if isinstance(values, list):
        return distributions.CategoricalDistribution([str(i) for i in range(len(values))])
    if values.whole:
        return distributions.IntDistribution(int(values.low), int(values.high), log=values.log)
    return distributions.FloatDistribution(float(values.low), float(values.high), log=values.log)
