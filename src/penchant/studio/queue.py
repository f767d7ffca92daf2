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
def hashed_uniform(*parts: object) -> float:
    """Return a pseudo-random number in [0, 1) that depends only on the parts."""
    text = "\0".join(map(str, parts)).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.sha256(text).digest()[:7]) / 2**56


def next_item(arena: Arena, annotator: str, taken_pairs: Collection[str] = ()) -> Item | None:
    """Return the next pair for an annotator, or None if nothing is left.

    Checks and repetitions come at their configured shares, and so do the pairs that everyone judges. Those come in the same order for all
    annotators, so agreement can be measured after few judgments. The remaining pairs are those not judged by anyone yet. Models that met
    least often (or whose win rate is least certain) come first, then the prompts judged least often.

    Args:
        taken_pairs: pairs that other annotators are looking at now.
    """
    settings, preferences = arena.settings, arena.preferences.refresh()
    own_judgements = preferences.of(annotator)
    seen_pairs = {j.pair for j in own_judgements}
    all_judgements = list(preferences.judgements.values())
    open_pairs = _open_pairs(arena, all_judgements, seen_pairs, taken_pairs)
    if not open_pairs:
        return None
    order = preferences.records.get(annotator, 0)
    shares = "checks", "repeats", "overlap"
    check_due, repeat_due, shared = (
        _is_due(getattr(settings, name), order, settings.seed, name, annotator) for name in shares
    )
    golds = [p for p in arena.pairs.values() if p.gold is not None and p.id not in seen_pairs]
    repeated = {j.repeat_of for j in own_judgements}
    repeatable = [
        j for j in own_judgements[:-REPEAT_AFTER] if j.counts and j.id not in repeated and j.pair in arena.pairs
    ]
    if golds and own_judgements and check_due:
        pair = min(golds, key=lambda p: hashed_uniform(settings.seed, annotator, p.id))
    elif repeatable and repeat_due:
        pair = arena.pairs[min(repeatable, key=lambda j: hashed_uniform(settings.seed, annotator, order, j.id)).pair]
    else:
        pair = _most_urgent(arena, all_judgements, open_pairs, shared)
    return item_of(arena, annotator, pair.id, taken_pairs)


def _is_due(share: float, order: int, *parts: object) -> bool:
    """Return True if a showing falls into a share of all: one at a random position in every ``1 / share``, so gaps stay short."""
    positions = range(int(order * share), int((order + 1) * share) + 1) if share else ()
    return any(order <= (k + hashed_uniform(*parts, k)) / share < order + 1 for k in positions)


def item_of(arena: Arena, annotator: str, pair_id: str, taken_pairs: Collection[str] = ()) -> Item | None:
    """Return a pair as this annotator sees it now, or None if there is no such pair or the annotator is done with it.

    The side is a function of the seed, the annotator and the number of earlier records, so the answers keep their sides until the verdict,
    even after a crash.

    Args:
        pair_id: which pair; taken_pairs: pairs that other annotators are looking at now, which do not count as still to come.
    """
    preferences = arena.preferences.refresh()
    own_judgements, target, order = (
        preferences.of(annotator),
        arena.pairs.get(pair_id),
        preferences.records.get(annotator, 0),
    )
    earlier = [j for j in own_judgements if j.pair == pair_id]
    if target is None or len(earlier) > 1 or any(not j.counts for j in earlier):
        return None
    left: Literal["a", "b"] = "a" if hashed_uniform(arena.settings.seed, "side", annotator, order) < 0.5 else "b"
    open_pairs = _open_pairs(
        arena, list(preferences.judgements.values()), {j.pair for j in own_judgements}, taken_pairs
    )
    done = len([j for j in own_judgements if j.repeat_of is None])
    return Item(target, order, left, earlier[0].id if earlier else None, done, len(open_pairs))


def is_shared(arena: Arena, pair: Pair) -> bool:
    """Return True if every annotator judges a pair."""
    return hashed_uniform(arena.settings.seed, "overlap", pair.id) < arena.settings.overlap


def _open_pairs(
    arena: Arena, all_judgements: list[Judgement], seen_pairs: set[str], taken_pairs: Collection[str]
) -> list[Pair]:
    judged_pairs = {j.pair for j in all_judgements if j.verdict in WINS and j.repeat_of is None}
    ordinary = [p for p in arena.pairs.values() if p.gold is None and p.id not in seen_pairs]
    return [p for p in ordinary if is_shared(arena, p) or (p.id not in judged_pairs and p.id not in taken_pairs)]


def _most_urgent(arena: Arena, all_judgements: list[Judgement], open_pairs: list[Pair], shared: bool) -> Pair:
    wins: dict[tuple[str, str], list[float]] = {}
    prompts: Counter[str] = Counter()
    for j in all_judgements:
        if j.counts:
            wins.setdefault(j.models, []).append(WINS[j.verdict])
            prompts[prompt_key(j.prompt)] += 1

    def urgency(models: tuple[str, str]) -> float:
        results = wins.get(models, [])
        if arena.settings.first == "widest":
            low, high = wilson_interval(sum(results), len(results)) if results else (0.0, 1.0)
            return low - high
        return len(results)

    contests = {m: urgency(m) for m in {p.models for p in open_pairs}}
    seed = arena.settings.seed
    best = min(contests, key=lambda m: (contests[m], hashed_uniform(seed, *m)))
    candidates = [(p, is_shared(arena, p)) for p in open_pairs if p.models == best]
    # prompt counts would send annotators to different pairs among those meant to be shared
    return min(
        candidates,
        key=lambda candidate: (
            candidate[1] != shared,
            0 if candidate[1] else prompts[prompt_key(candidate[0].prompt)],
            hashed_uniform(seed, candidate[0].id),
        ),
    )[0]
