"""What a warning about a run is: a sentence with its evidence, so that nobody has to take our word for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Level = Literal["warning", "note"]


@dataclass(frozen=True, slots=True)
class Evidence:
    """Numbers that a flag rests on.

    Args:
        label: what the values are, with their unit: ``"log-prob of chosen answers, nats"``.
        steps: optimiser steps of the values, or () where they are not over steps; values: as many, or any number without steps.
    """

    label: str
    values: tuple[float, ...]
    steps: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Flag:
    """Something in a run or a comparison that a careful reader would want to know before trusting it.

    Args:
        name: of the rule, in snake case: ``likelihood_displacement``; title: a few words; level: ``warning`` or ``note``.
        sentence: what was seen, with its figures and steps; advice: what to look at or change next.
        about: the run or setting that it is about, "" for the only one.
    """

    name: str
    title: str
    level: Level
    sentence: str
    advice: str
    evidence: tuple[Evidence, ...]
    about: str = ""

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Flag:
        """What `to_json` wrote."""
        evidence = tuple(Evidence(e["label"], tuple(e["values"]), tuple(e["steps"])) for e in values["evidence"])
        return Flag(**{**values, "evidence": evidence})

    def to_json(self) -> dict[str, Any]:
        """As it stands in files."""
        return {
            "name": self.name,
            "title": self.title,
            "level": self.level,
            "sentence": self.sentence,
            "advice": self.advice,
            "about": self.about,
            "evidence": [{"label": e.label, "values": list(e.values), "steps": list(e.steps)} for e in self.evidence],
        }
