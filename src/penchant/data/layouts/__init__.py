"""Rows of every published layout to prompt trees: small pure functions in one registry, chosen by the columns that are there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from penchant.data.layouts import compared, factory, oasst, rated
from penchant.data.layouts.fields import ROLES, LeftOut, RowError, label_field, messages_field, score_field, text_field
from penchant.data.layouts.layout import Detection, Group, Layout, Option
from penchant.data.layouts.plain import (
    HH,
    IMPLICIT_PAIRS,
    MESSAGES,
    PAIRS,
    PROMPTS,
    SCORED,
    SFT,
    TEXT,
    UNPAIRED,
    from_alpaca_pairs,
    from_hh,
    from_implicit_pairs,
    from_messages,
    from_pairs,
    from_prompts,
    from_scored,
    from_sft,
    from_text,
    from_unpaired,
)
from penchant.types import PromptTree

__all__ = [
    "KINDS",
    "LAYOUTS",
    "ROLES",
    "SHAPES",
    "Detection",
    "Group",
    "Layout",
    "LeftOut",
    "Option",
    "RowError",
    "detect",
    "detect_shape",
    "from_alpaca_pairs",
    "from_hh",
    "from_implicit_pairs",
    "from_messages",
    "from_pairs",
    "from_prompts",
    "from_scored",
    "from_sft",
    "from_text",
    "from_unpaired",
    "label_field",
    "messages_field",
    "score_field",
    "text_field",
]

# the most specific first: of several layouts that a row fits, detection takes the first and names the others
LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        rated.ULTRAFEEDBACK,
        rated.BINARIZED,
        rated.HELPSTEER,
        rated.HELPSTEER2_PAIRS,
        rated.HELPSTEER3_PAIRS,
        compared.SHP,
        compared.PKU,
        compared.TLDR,
        compared.ARENA,
        compared.ARENA_55K,
        compared.LMSYS,
        oasst.OASST,
        oasst.OASST_FLAT,
        rated.ARGILLA_RATINGS,
        rated.ARGILLA_PAIRS,
        rated.DISTILABEL,
        factory.SHAREGPT_PAIRS,
        factory.SHAREGPT_KTO,
        factory.SHAREGPT,
        factory.ALPACA_PAIRS,
        factory.ALPACA_KTO,
        factory.ALPACA_SCORED,
        factory.ALPACA,
        HH,
        rated.ORCA_PAIRS,
        PAIRS,
        IMPLICIT_PAIRS,
        UNPAIRED,
        SCORED,
        SFT,
        MESSAGES,
        PROMPTS,
        TEXT,
    )
}
KINDS: dict[str, str] = {name: layout.kind for name, layout in LAYOUTS.items()}
SHAPES: dict[str, Callable[[Mapping[str, Any]], PromptTree]] = {
    "pairs": from_pairs,
    "hh": from_hh,
    "alpaca_pairs": from_alpaca_pairs,
    "unpaired": from_unpaired,
    "scored": from_scored,
    "sft": from_sft,
    "messages": from_messages,
    "prompts": from_prompts,
    "text": from_text,
}


STEPWISE = (
    "this is stepwise supervision (a list of completions with a list of labels), which no method here learns from"
)


def _stepwise(row: Mapping[str, Any]) -> bool:
    """TRL's stepwise supervision: the steps of one answer, each with a label."""
    return "prompt" in row and isinstance(row.get("completions"), list) and isinstance(row.get("labels"), list)


def detect(rows: Iterable[Mapping[str, Any]]) -> Detection:
    """The layout that most of the rows have, by their columns and what stands in them; nothing is converted."""
    votes: Counter[str] = Counter()
    fits: Counter[str] = Counter()
    for row in rows:
        if _stepwise(row):
            votes["stepwise"] += 1
            continue
        found = [name for name, layout in LAYOUTS.items() if layout.fits(row)]
        fits.update(found)
        votes.update(found[:1])
    if not votes:
        return Detection(None, "the columns are of no known layout")
    name = max(votes, key=lambda n: votes[n])  # the earlier one of equals: a Counter keeps the order of what it met
    if name == "stepwise":
        return Detection(
            None, STEPWISE, how="there are no process rewards here; make one completion and one label of it"
        )
    others = tuple(n for n in LAYOUTS if n != name and 2 * fits[n] >= votes[name])
    return Detection(name, LAYOUTS[name].why, others)


def detect_shape(rows: Iterable[Mapping[str, Any]]) -> str | None:
    """The name of the layout alone; None when none fits."""
    return detect(rows).layout
