"""Trust flags: what a careful reader would want to know before believing a run or a comparison, each with its evidence.

A rule is one small file: a pure function of the lines of metrics.jsonl (and config and audit), or of comparison.json and its rows. `RULES` is the
registry that the command, the docs page and the tests go through.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from penchant.evaluation.flags import Flag
from penchant.evaluation.trust import bands, by_length, displacement, judge, length, margin, overfitting, small, steps
from penchant.evaluation.trust.figures import RunView
from penchant.evaluation.trust.options import TrustConfig
from penchant.evaluation.trust.rule import ComparisonView, Rule

__all__ = ["RULES", "TrustConfig", "comparison_flags", "run_flags"]

RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        margin.RULE,
        displacement.RULE,
        overfitting.RULE,
        length.RULE,
        bands.KL,
        bands.PERPLEXITY,
        by_length.RULE,
        judge.POSITION,
        judge.FAILURES,
        judge.DISAGREE,
        steps.NOT_FINITE,
        steps.SKIPPED,
        steps.DRIFTED,
        small.FEW_PROMPTS,
        small.ONE_SEED,
    )
}


def run_flags(
    lines: Sequence[Mapping[str, Any]],
    config: Mapping[str, Any] | None = None,
    audit: Mapping[str, Any] | None = None,
    *,
    trust: TrustConfig | None = None,
) -> list[Flag]:
    """The flags of a run, warnings first.

    Args:
        lines: of metrics.jsonl; config: of config.resolved.yaml (its `trust` section is read where `trust` is None); audit: audit.json.
    """
    if trust is None:
        section = (config or {}).get("trust")
        trust = TrustConfig.model_validate(section) if isinstance(section, Mapping) else TrustConfig()
    view = RunView(lines, config or {}, audit or {}, trust)
    seen = [(rule, rule.of_run(view)) for rule in RULES.values() if rule.of_run is not None]
    return _sorted([rule.flag(s) for rule, s in seen if s is not None])


def comparison_flags(
    figures: Mapping[str, Any], rows: Sequence[Mapping[str, Any]] = (), *, trust: TrustConfig | None = None
) -> list[Flag]:
    """The flags of a comparison, warnings first.

    Args:
        figures: comparison.json; rows: of comparison.jsonl, needed for the win rate at equal length where `figures` does not have it.
    """
    view = ComparisonView(figures, rows, trust or TrustConfig())
    found = [
        rule.flag(seen)
        for rule in RULES.values()
        if rule.of_comparison is not None
        for seen in rule.of_comparison(view)
    ]
    return _sorted(found)


def _sorted(flags: list[Flag]) -> list[Flag]:
    return sorted(flags, key=lambda f: f.level != "warning")
