"""What a person may want of a run, and what each goal needs of the data and writes into a config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Lines = Mapping[str, tuple[Any, str]]  # key: (value, why)


@dataclass(frozen=True, slots=True)
class Goal:
    """One goal.

    Args:
        name: what `--goal` says; about: one line; kinds: of data that it learns from, the first fits best.
        lr: (whole model, adapter); batch_size: rows a step; section: of the config that names the method.
        online: whether the model writes its own answers, which a reward judges.
    """

    name: str
    about: str
    kinds: tuple[str, ...]
    lr: tuple[float, float]
    batch_size: int
    section: Mapping[str, Lines]
    online: bool = False
    reads_answers: bool = True
    notes: tuple[str, ...] = field(default=())


PAIRS = ("pairs",)
LABELS = ("unpaired", "pairs", "scored")
PREFERENCE_LR = (5e-6, 5e-5)


def _loss(name: str, beta: float | None = None, why: str = "", **more: tuple[Any, str]) -> Mapping[str, Lines]:
    keys: dict[str, tuple[Any, str]] = {"name": (name, f"`penchant losses {name}` explains it")}
    if beta is not None:
        keys["beta"] = (beta, why or "how firmly it is held to the model it starts from: more is firmer")
    return {"loss": {**keys, **more}}


def _online(name: str, **keys: tuple[Any, str]) -> Mapping[str, Lines]:
    common: dict[str, tuple[Any, str]] = {
        "name": (name, "the model writes answers, the reward judges them"),
        "max_new_tokens": (64, "tokens of an answer at most"),
    }
    return {"algorithm": {**common, **keys}}


GROUP_OF_4 = (4, "answers to each prompt, judged against each other")
KL = "weight of the divergence from the start: more holds it closer"

GOALS = {
    goal.name: goal
    for goal in (
        Goal("dpo", "prefer the chosen answer of each pair (the usual first choice)", ("pairs", "scored"), PREFERENCE_LR, 32,
             _loss("dpo", 0.1)),
        Goal("simpo", "the same without a reference model, by mean log-prob", ("pairs", "scored"), PREFERENCE_LR, 32,
             _loss("simpo", 2.0, "scale of the reward: 2 to 10 are usual")),
        Goal("orpo", "learn the chosen answers and prefer them, in one run from a base model", ("pairs", "scored"),
             (8e-6, 5e-5), 32, _loss("orpo", 0.1, "weight of the preference beside the likelihood")),
        Goal("reward", "a reward model: which of two answers is better", ("pairs", "scored"), (1e-5, 1e-4), 32,
             {"algorithm": {"name": ("reward_model", "learns one number for an answer"),
                            "centring": (0.01, "keeps rewards around zero")}}, reads_answers=False),
        Goal("kto", "learn from single answers labelled good or bad", LABELS, PREFERENCE_LR, 32, _loss("kto", 0.1)),
        Goal("pmpo", "the same, each side by its own mean, held by an exact divergence", LABELS, PREFERENCE_LR, 32,
             _loss("pmpo", 1.0, "weight of the divergence that holds it", alpha=(0.5, "share of good answers in the loss"))),
        Goal("sft", "write answers like those of the data", ("sft", "text", "pairs", "unpaired", "scored"), (2e-5, 2e-4), 32,
             _loss("sft")),
        Goal("ppo", "raise a reward with PPO", ("prompts", "pairs", "sft", "unpaired", "scored"), (1e-6, 5e-5), 32,
             _online("ppo", beta=(0.05, KL)), online=True),
        Goal("rloo", "raise a reward, several answers a prompt against their mean", ("prompts", "pairs", "sft", "unpaired", "scored"),
             (1e-6, 5e-5), 16, _online("rloo", samples=GROUP_OF_4, beta=(0.05, KL)), online=True),
        Goal("grpo", "the same, divided by the group's spread", ("prompts", "pairs", "sft", "unpaired", "scored"),
             (1e-6, 5e-5), 16, _online("grpo", samples=GROUP_OF_4, beta=(0.04, KL)), online=True),
    )
}  # fmt: skip


def fitting(kind: str) -> list[Goal]:
    """The goals that data of this kind can serve, the best fit first."""
    order = list(GOALS.values())
    able = [g for g in order if kind in g.kinds]
    return sorted(able, key=lambda g: (g.kinds.index(kind) > 0, order.index(g)))
