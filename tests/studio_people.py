"""Simulated annotators with known biases who judge an arena, and the true values computed from the same parameters."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from penchant.judges.humans import Judgement, Preferences
from penchant.studio.pairs import Answers, Arena
from penchant.studio.queue import Item, next_item

MEAN, SPREAD = 0.6, 1.2  # of the first model's advantage, in logits
LONG = 0.5  # share of pairs whose first answer is the longer one


@dataclass(frozen=True)
class Simulated:
    """An annotator: logits for the left side and for the longer answer, noise that divides logits, or random judging."""

    name: str
    position: float = 0.0
    length: float = 0.0
    noise: float = 1.0
    careless: bool = False

    def hashed_uniform(self, quality: Any, left: Any, longer: Any) -> Any:
        """P(a is called better). left, longer: 1 if a is on the left or longer, else -1."""
        logit = quality / self.noise + self.position * left + self.length * longer
        return 0.5 + 0 * logit if self.careless else 1 / (1 + np.exp(-logit))


PEOPLE = (
    Simulated("Ada"),
    Simulated("Ben", position=0.9),
    Simulated("Cleo", length=1.1),
    Simulated("Dan", noise=4.0),
    Simulated("Eve", careless=True),
)


@dataclass(frozen=True)
class Truth:
    """The results of an infinitely long arena."""

    win_rate: float
    alpha: float
    left: dict[str, float]
    longer: dict[str, float]


@cache
def truth(draws: int = 200_000, seed: int = 99) -> Truth:
    """The limit by the law of large numbers, from the annotators' model alone."""
    import krippendorff

    rng = np.random.default_rng(seed)
    quality = rng.normal(MEAN, SPREAD, draws)
    longer = np.where(rng.random(draws) < LONG, 1, -1)
    lefts, p = {}, {}
    votes = []
    for person in PEOPLE:
        left = np.where(rng.random(draws) < 0.5, 1, -1)
        p[person.name] = person.hashed_uniform(quality, left, longer)
        won = rng.random(draws) < p[person.name]
        votes.append(won[:20_000])
        lefts[person.name] = float(np.where(left > 0, p[person.name], 1 - p[person.name]).mean())
    longs = {n: float(np.where(longer > 0, v, 1 - v).mean()) for n, v in p.items()}
    alpha = krippendorff.alpha(np.array(votes, dtype=float), level_of_measurement="nominal")
    return Truth(float(np.mean([v.mean() for v in p.values()])), float(alpha), lefts, longs)


def texts(pairs: int, seed: int) -> tuple[Answers, dict[str, float]]:
    """Answers whose length is independent of their quality, and the first model's advantage by prompt."""
    rng = np.random.default_rng(seed)
    rows, quality = [], {}
    for i in range(pairs):
        long = rng.random() < LONG
        short_text, long_text = f"Answer {i}.", f"Answer {i}, and " + "more words " * 8
        rows.append(
            (f"Prompt {i}?", {"dpo": long_text if long else short_text, "start": short_text if long else long_text})
        )
        quality[f"Prompt {i}?"] = float(rng.normal(MEAN, SPREAD))
    return Answers(rows, {key: {"source": "simulated", "sha256": ""} for key in ("dpo", "start")}), quality


class InMemory(Preferences):
    """Preferences kept in memory instead of a file."""

    def refresh(self) -> Preferences:
        return self

    def append(self, row: Any) -> None:
        self._apply(row)


def in_memory(arena: Arena) -> Arena:
    """An arena whose judgments are not saved."""
    arena.__dict__["preferences"] = InMemory(Path("nowhere.jsonl"))
    return arena


def say(arena: Arena, item: Item, annotator: str, verdict: str, seconds: float = 3.0) -> None:
    """Record a judgment as the studio would."""
    word = Judgement(
        id=f"{annotator}-{item.order}",
        pair=item.pair.id,
        annotator=annotator,
        order=item.order,
        prompt=item.pair.prompt,
        answers=item.pair.answers or ("", ""),
        models=item.pair.models,
        hashes=("", ""),
        verdict=verdict,
        left=item.left,
        seconds=seconds,
        gold=item.pair.gold,
        repeat_of=item.repeat_of,
    )
    arena.preferences.append(word.to_json())


def judged(arena: Arena, quality: dict[str, float], seed: int, *, file: bool = False) -> Preferences:
    """Let every annotator judge everything that the arena shows."""
    found = (arena if file else in_memory(arena)).preferences
    rng = np.random.default_rng([seed, 1])
    for person in PEOPLE:
        while (item := next_item(arena, person.name)) is not None:
            a, b = item.pair.answers or ("", "")
            sides = 1 if item.left == "a" else -1
            # a check is as obvious as possible
            good = 6.0 if item.pair.gold else quality[item.pair.prompt]
            won = rng.random() < person.hashed_uniform(good, sides, 1 if len(a) > len(b) else -1)
            say(arena, item, person.name, "a" if won else "b", float(rng.lognormal(1.5, 0.4)))
    return found


def word(number: int, who: str = "ada", **more: Any) -> Judgement:
    """A judgment made by hand."""
    about: dict[str, Any] = {
        "id": f"{who}-{number}",
        "pair": f"p{number}",
        "annotator": who,
        "order": number,
        "prompt": "Why?",
        "answers": ("Because.", "\u202eNo </style> \u2028 reason."),
        "models": ("dpo", "start"),
        "hashes": ("aa", "bb"),
        "verdict": "a",
        "left": "b",
        "seconds": 1.25,
    }
    return Judgement(**{**about, **more})
