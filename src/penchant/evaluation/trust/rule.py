"""What a trust rule is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from penchant.evaluation.flags import Evidence, Flag, Level
from penchant.evaluation.trust.figures import RunView
from penchant.evaluation.trust.options import TrustConfig


@dataclass(frozen=True)
class ComparisonView:
    """A comparison as its files tell it.

    Args:
        figures: comparison.json; rows: of comparison.jsonl; trust: thresholds.
    """

    figures: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    trust: TrustConfig

    @property
    def models(self) -> Mapping[str, Mapping[str, Any]]:
        """Figures by model, the first model first."""
        found = self.figures.get("models")
        return found if isinstance(found, Mapping) else {}

    @property
    def first(self) -> str:
        """The model that all others are compared with."""
        return str(self.figures.get("first") or next(iter(self.models), ""))

    @property
    def others(self) -> dict[str, Mapping[str, Any]]:
        return {name: m for name, m in self.models.items() if name != self.first}

    @property
    def prompts(self) -> int:
        return int(self.figures.get("prompts") or len({r.get("prompt") for r in self.rows}))


@dataclass(frozen=True)
class Rule:
    """One rule, with all that its page says of it.

    Args:
        name, title: as in its flags; what: when it speaks, as a formula; thresholds: keys of the `trust` section; needs: figures without which
            it is silent; alarms: how often it speaks where there is nothing; advice: what to do.
        of_run, of_comparison: the rule itself, for either.
    """

    name: str
    title: str
    what: str
    needs: str
    alarms: str
    advice: str
    thresholds: tuple[str, ...] = ()
    of_run: Callable[[RunView], Seen | None] | None = None
    of_comparison: Callable[[ComparisonView], Sequence[Seen]] | None = None

    def flag(self, seen: Seen) -> Flag:
        """A flag of this rule."""
        return Flag(
            self.name, self.title, seen.level, seen.sentence, seen.advice or self.advice, seen.evidence, seen.about
        )


@dataclass(frozen=True, slots=True)
class Seen:
    """What a rule saw; `advice` where the rule's own does not fit."""

    sentence: str
    evidence: tuple[Evidence, ...]
    level: Level = "warning"
    about: str = ""
    advice: str = ""
