"""What each run spent, from its own files: steps, rows, completions, tokens, learning rates, data; and a sentence for each that differs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from penchant.algorithms.options import OnlineConfig
from penchant.comparison.models import trained_prompts
from penchant.comparison.runs import TrainedRun
from penchant.errors import PenchantError
from penchant.run import read_jsonl

TOLERANCE = 0.05  # beyond it something differs

NUMBERS = {  # field: in words
    "steps": "Optimiser steps",
    "rows": "Rows seen in training",
    "completions": "Completions written in training",
    "tokens": "Tokens computed in training",
    "peak_lr": "Peak learning rates",
    "warmup": "Shares of the steps that warm up",
    "min_lr": "Last learning rates, as a share of the peak,",
    "trainable": "Trained parameters",
}
WORDS = {"schedule": "Learning-rate schedules", "template": "Prompt templates", "dtype": "Precisions"}


@dataclass(frozen=True, slots=True)
class Budget:
    """What a run spent in training, up to the checkpoint where one was asked for by its number, else in all.

    Args:
        steps: of the optimiser; rows: training rows (prompts of an online method) met, each time counted; completions: that an online
            method wrote; tokens: computed, a shared prompt once; peak_lr, warmup, min_lr, schedule: of the learning rate.
        trainable: parameters; finished: whether the run came to its end.
    """

    steps: float
    rows: float
    completions: float
    tokens: float
    peak_lr: float
    warmup: float
    min_lr: float
    trainable: float
    schedule: str
    template: str
    dtype: str
    finished: bool

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in (*NUMBERS, *WORDS, "finished")}


def budget_of(run: TrainedRun, up_to: int | None = None) -> Budget:
    """A run's budget; `up_to`: a step at which it would have ended."""
    lines = [line for line in read_jsonl(run.folder / "metrics.jsonl") if line["kind"] == "train"]
    lines = [line for line in lines if up_to is None or line["step"] <= up_to]
    last: Mapping[str, Any] = lines[-1] if lines else {"step": 0, "epoch": 0.0, "tokens": 0}
    data = run.manifest["data"]
    split = data["train split"]["rows"] if "train split" in data else data["train"]["accepted"]
    rows = last["epoch"] * split
    online = run.config.algorithm if isinstance(run.config.algorithm, OnlineConfig) else None
    t = run.config.train
    return Budget(
        steps=float(last["step"]),
        rows=float(round(rows)),
        completions=float(round(rows * online.samples)) if online is not None else 0.0,
        tokens=float(last["tokens"]),
        peak_lr=max((line["lr"] for line in lines if line.get("lr")), default=0.0),
        warmup=t.warmup_fraction,
        min_lr=t.min_lr_fraction,
        trainable=float(run.manifest["model"]["trainable_parameters"]),
        schedule=t.schedule,
        template=run.config.data.template,
        dtype=run.manifest["hardware"]["dtype"],
        finished=run.manifest["status"] == "finished",
    )


def budget_sentences(budgets: Mapping[str, Sequence[Budget]]) -> list[str]:
    """One sentence for each thing that differs by more than 5% between settings (their means over seeds) or within one."""
    said = []
    for field, words in NUMBERS.items():
        means = {name: float(np.mean([getattr(b, field) for b in of])) for name, of in budgets.items()}
        if _differ(list(means.values())):
            said.append(f"{words} differ: {_listed({n: _shown(v) for n, v in means.items()})}.")
        for name, of in budgets.items():
            values = [getattr(b, field) for b in of]
            if _differ(values):
                said.append(f"{words} differ among the seeds of {name}: {', '.join(map(_shown, values))}.")
    for field, words in WORDS.items():
        of_each = {name: ", ".join(dict.fromkeys(getattr(b, field) for b in of)) for name, of in budgets.items()}
        if len(set(of_each.values())) > 1:
            said.append(f"{words} differ: {_listed(of_each)}.")
    return said


def data_sentences(settings: Mapping[str, Sequence[TrainedRun]]) -> list[str]:
    """A sentence where settings were trained on other rows; the shape that a method needs makes no difference."""
    first, *others = settings
    said = []
    for name in others:
        one, other = settings[first][0], settings[name][0]
        if one.manifest["data"]["train"]["fingerprint"] == other.manifest["data"]["train"]["fingerprint"]:
            continue
        try:
            a, b = (trained_prompts(r.data) for r in (one, other))
            shapes = {r.data.datasets[0].kind for r in (one, other)}
        except PenchantError:
            said.append(f"The data of {name} is not that of {first}.")
            continue
        if a != b:
            said.append(
                f"The data differs: {first} was trained on {len(a):,} prompts, {name} on {len(b):,}, and {len(a & b):,} are the same."
            )
        elif len(shapes) == 1:
            said.append(f"The data differs: {first} and {name} were trained on the same prompts with other answers.")
    return said


def unfinished(budgets: Mapping[str, Budget]) -> list[str]:
    """A sentence for each run that did not come to its end."""
    return [
        f"{name} has not come to its end: it stopped at step {b.steps:.0f}."
        for name, b in budgets.items()
        if not b.finished
    ]


def _differ(values: Sequence[float]) -> bool:
    return max(values) > (1 + TOLERANCE) * min(values)


def _shown(value: float) -> str:
    return f"{value:,.0f}" if value == round(value) else f"{value:.3g}"


def _listed(values: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
