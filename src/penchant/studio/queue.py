"""What an annotator sees next, and on which side: a function of the arena's seed and of what was said so far."""

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

REPEAT_AFTER = 8  # judgements between a pair and its repetition


@dataclass(frozen=True, slots=True)
class Item:
    """One showing of a pair.

    Args:
        order: how many records of this annotator came before; left: the answer on the left; repeat_of: as in `Judgement`.
        done, to_come: pairs that this person judged, and that are still to come.
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
    """A number in [0, 1) that is always the same for the same parts."""
    text = "\0".join(map(str, parts)).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.sha256(text).digest()[:7]) / 2**56


def next_item(arena: Arena, annotator: str, taken: Collection[str] = ()) -> Item | None:
    """The next pair for an annotator; None where nothing is left.

    Checks and repetitions come by their shares, and so do pairs that everybody judges, which everybody meets in one order: a few words
    of two people already say whether they agree. Of the rest, those that nobody judged are left. First come the models that met least
    (or whose win rate is known least), then the prompts that were asked least.

    Args:
        taken: pairs that others have before them now.
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
    """Whether a showing is one of a share of them: somewhere in every ``1 / share`` there is one, so that none has to wait for its luck."""
    near = range(int(order * share), int((order + 1) * share) + 1) if share else ()
    return any(order <= (k + chance(*parts, k)) / share < order + 1 for k in near)


def item_of(arena: Arena, annotator: str, pair: str, taken: Collection[str] = ()) -> Item | None:
    """A pair as this annotator sees it now; None where there is no such pair, or where nothing is to be said of it any more.

    The side is a function of the seed, the annotator and how much was said before: whatever happens between a showing and the word
    on it, also a crash, the answers stand where they stood.

    Args:
        pair: its id; taken: pairs that others have before them now, which are not to come.
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
    """Whether every annotator judges a pair."""
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
    # counts of prompts would send everybody to another of the pairs that are to be shared
    return min(
        found,
        key=lambda one: (
            one[1] != shared,
            0 if one[1] else prompts[prompt_key(one[0].prompt)],
            chance(seed, one[0].id),
        ),
    )[0]
