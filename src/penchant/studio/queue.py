"""Picks the pair an annotator sees next and its sides, as a function of the arena's seed and the judgments so far."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from penchant.base.stats import wilson_interval
from penchant.judges.humans import WINS, Judgement, prompt_key
from penchant.studio.pairs import Arena, Pair

REPEAT_AFTER = 8  # minimum number of judgments between a pair and its repetition


@dataclass(frozen=True, slots=True)
class Item:
    """One showing of a pair.

    Args:
        order: number of earlier records of this annotator; left: the answer on the left; repeat_of: as in `Judgement`.
        done, to_come: number of pairs this annotator has judged, and number still to come.
    """

    pair: Pair
    order: int
    left: Literal["a", "b"]
    repeat_of: str | None
    done: int
    to_come: int

    @property
    def sides(self) -> tuple[str, str]:
        """The answers, left first."""
        assert self.pair.answers is not None
        a, b = self.pair.answers
        return (a, b) if self.left == "a" else (b, a)


@lru_cache(maxsize=1 << 18)
def chance(*parts: object) -> float:
    """Return a pseudo-random number in [0, 1) that depends only on the parts."""
    text = "\0".join(map(str, parts)).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.sha256(text).digest()[:7]) / 2**56


def next_item(arena: Arena, annotator: str, taken: Collection[str] = ()) -> Item | None:
    """Return the next pair for an annotator, or None if nothing is left.

    Checks and repetitions come at their configured shares, and so do the pairs that everyone judges. Those come in the same order for all
    annotators, so agreement can be measured after few judgments. The remaining pairs are those not judged by anyone yet. Models that met
    least often (or whose win rate is least certain) come first, then the prompts judged least often.

    Args:
        taken: pairs that other annotators are looking at now.
    """
    settings, judged = arena.settings, arena.preferences.refresh()
    mine = judged.of(annotator)
    seen = {j.pair for j in mine}
    everyone = list(judged.judgements.values())
    open_ = _open(arena, everyone, seen, taken)
    if not open_:
        return None
    order = judged.records.get(annotator, 0)
    shares = "checks", "repeats", "overlap"
    check, again, shared = (_due(getattr(settings, of), order, settings.seed, of, annotator) for of in shares)
    golds = [p for p in arena.pairs.values() if p.gold is not None and p.id not in seen]
    repeated = {j.repeat_of for j in mine}
    old = [j for j in mine[:-REPEAT_AFTER] if j.counts and j.id not in repeated and j.pair in arena.pairs]
    if golds and mine and check:
        pair = min(golds, key=lambda p: chance(settings.seed, annotator, p.id))
    elif old and again:
        pair = arena.pairs[min(old, key=lambda j: chance(settings.seed, annotator, order, j.id)).pair]
    else:
        pair = _first(arena, everyone, open_, shared)
    return item_of(arena, annotator, pair.id, taken)


def _due(share: float, order: int, *parts: object) -> bool:
    """Return True if a showing falls into a share of all: one at a random position in every ``1 / share``, so gaps stay short."""
    near = range(int(order * share), int((order + 1) * share) + 1) if share else ()
    return any(order <= (k + chance(*parts, k)) / share < order + 1 for k in near)


def item_of(arena: Arena, annotator: str, pair: str, taken: Collection[str] = ()) -> Item | None:
    """Return a pair as this annotator sees it now, or None if there is no such pair or the annotator is done with it.

    The side is a function of the seed, the annotator and the number of earlier records, so the answers keep their sides until the verdict,
    even after a crash.

    Args:
        pair: its id; taken: pairs that other annotators are looking at now, which do not count as still to come.
    """
    judged = arena.preferences.refresh()
    mine, found, order = judged.of(annotator), arena.pairs.get(pair), judged.records.get(annotator, 0)
    earlier = [j for j in mine if j.pair == pair]
    if found is None or len(earlier) > 1 or any(not j.counts for j in earlier):
        return None
    left: Literal["a", "b"] = "a" if chance(arena.settings.seed, "side", annotator, order) < 0.5 else "b"
    open_ = _open(arena, list(judged.judgements.values()), {j.pair for j in mine}, taken)
    done = len([j for j in mine if j.repeat_of is None])
    return Item(found, order, left, earlier[0].id if earlier else None, done, len(open_))


def overlaps(arena: Arena, pair: Pair) -> bool:
    """Return True if every annotator judges a pair."""
    return chance(arena.settings.seed, "overlap", pair.id) < arena.settings.overlap


def _open(arena: Arena, everyone: list[Judgement], seen: set[str], taken: Collection[str]) -> list[Pair]:
    judged = {j.pair for j in everyone if j.verdict in WINS and j.repeat_of is None}
    ordinary = [p for p in arena.pairs.values() if p.gold is None and p.id not in seen]
    return [p for p in ordinary if overlaps(arena, p) or (p.id not in judged and p.id not in taken)]


def _first(arena: Arena, everyone: list[Judgement], open_: list[Pair], shared: bool) -> Pair:
    wins: dict[tuple[str, str], list[float]] = {}
    prompts: Counter[str] = Counter()
    for j in everyone:
        if j.counts:
            wins.setdefault(j.models, []).append(WINS[j.verdict])
            prompts[prompt_key(j.prompt)] += 1

    def urgency(models: tuple[str, str]) -> float:
        had = wins.get(models, [])
        if arena.settings.first == "widest":
            low, high = wilson_interval(sum(had), len(had)) if had else (0.0, 1.0)
            return low - high
        return len(had)

    contests = {m: urgency(m) for m in {p.models for p in open_}}
    seed = arena.settings.seed
    best = min(contests, key=lambda m: (contests[m], chance(seed, *m)))
    found = [(p, overlaps(arena, p)) for p in open_ if p.models == best]
    # prompt counts would send annotators to different pairs among those meant to be shared
    return min(
        found,
        key=lambda one: (
            one[1] != shared,
            0 if one[1] else prompts[prompt_key(one[0].prompt)],
            chance(seed, one[0].id),
        ),
    )[0]
