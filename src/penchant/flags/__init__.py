"""Trust flags: findings, each with its evidence, that a careful reader should know before believing a run or a comparison.

A rule is a pure function of the lines of metrics.jsonl (with config and audit), or of comparison.json and its rows. Its documentation is in
rules.yaml. `RULES` is the registry used by the command, the docs page and the tests.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from penchant.base.files import optional_write, packaged_yaml
from penchant.base.text import printable
from penchant.errors import CheckpointError
from penchant.flags import of_comparison, of_data, of_training
from penchant.flags.rule import (
    ComparisonView,
    Evidence,
    Finding,
    Flag,
    Rule,
    RunView,
    TrustConfig,
    format_number,
)
from penchant.runfolder import COMPARISON, FLAGS, METRICS, check_intact, write_summed
from penchant.runfolder.read import read_folder

__all__ = ["RULES", "TrustConfig", "comparison_flags", "run_flags"]


OF_RUN = of_training.OF_RUN | of_comparison.OF_RUN | of_data.OF_RUN
OF_COMPARISON = of_training.OF_COMPARISON | of_comparison.OF_COMPARISON
LIMITS = of_training.LIMITS | of_comparison.LIMITS  # constants filled into the texts of rules.yaml


def _make_rule(name: str, entry: dict[str, Any]) -> Rule:
    what = entry["what"].format(**LIMITS)
    return Rule(name, **entry | {"what": what}, of_run=OF_RUN.get(name), of_comparison=OF_COMPARISON.get(name))


RULES = {name: _make_rule(name, entry) for name, entry in packaged_yaml(__package__, "rules.yaml").items()}


def run_flags(
    lines: Sequence[Mapping[str, Any]],
    config: Mapping[str, Any] | None = None,
    audit: Mapping[str, Any] | None = None,
    *,
    trust: TrustConfig | None = None,
    samples: Sequence[Mapping[str, Any]] = (),
) -> list[Flag]:
    """Return the flags of a run, warnings first. A run without lines yet can only get flags about its rows.

    Args:
        lines: of metrics.jsonl; config: from config.resolved.yaml (its `trust` section is used if `trust` is None); audit: audit.json;
        samples: lines of samples.jsonl.
    """
    if trust is None:
        section = (config or {}).get("trust")
        trust = TrustConfig.model_validate(section) if isinstance(section, Mapping) else TrustConfig()
    view = RunView(lines, config or {}, audit or {}, trust, samples)
    return _sorted_flags((rule, finding) for rule in RULES.values() if rule.of_run and (finding := rule.of_run(view)))


def comparison_flags(figures: Mapping[str, Any], rows: Sequence[Mapping[str, Any]] = ()) -> list[Flag]:
    """Return the flags of a comparison, warnings first.

    Args:
        figures: comparison.json; rows: of comparison.jsonl, needed for the win rate at equal length if `figures` lacks it.
    """
    view = ComparisonView(figures, rows, TrustConfig())
    return _sorted_flags((r, finding) for r in RULES.values() if r.of_comparison for finding in r.of_comparison(view))


def _sorted_flags(findings: Iterable[tuple[Rule, Finding]]) -> list[Flag]:
    return sorted((rule.flag(finding) for rule, finding in findings), key=lambda f: f.level != "warning")


# ---- Flags of folders: read a run or a comparison, write flags.json, print flags ----

SHOWN = 8  # values of a piece of evidence shown in its line


def compute_flags(path: Path | str) -> list[Flag]:
    """Return the flags of a run folder, or of a comparison.json or the folder with it.

    Raises:
        CheckpointError: no such folder, neither a run nor a comparison in it, or files not in Penchant's format.
    """
    try:
        return _compute_flags(Path(path))
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        what = f"its files are not as Penchant writes them ({type(error).__name__}: {error})"
        raise CheckpointError(str(path), what, "restore them") from error


def _compute_flags(path: Path) -> list[Flag]:
    folder = path.parent if path.name == COMPARISON else path
    if not folder.is_dir():
        raise CheckpointError(str(path), "no such folder", f"give a run's folder, or one with a {COMPARISON}")
    if (folder / METRICS).exists():
        return _run_folder_flags(folder)
    if (folder / COMPARISON).exists():
        check_intact(folder / COMPARISON, "compare again")
        contents = read_folder(folder)
        if not contents.comparison:
            raise CheckpointError(str(folder / COMPARISON), "cannot be read", "compare again")
        return comparison_flags(contents.comparison, contents.comparison_rows)
    how = "give a run's folder, or that of a comparison"
    raise CheckpointError(str(folder), f"holds neither {METRICS} nor {COMPARISON}", how)


def write_flags(run: Path, say: Callable[[str], None] = lambda _: None) -> list[Flag]:
    """Return the flags of a run, warnings first, and write them to RUN/flags.json; `say` gets a note if that cannot be written."""
    flags = _run_folder_flags(run)
    with optional_write(run / FLAGS, say):
        write_summed(run / FLAGS, json.dumps([f.to_json() for f in flags], indent=1, ensure_ascii=False))
    return flags


def _run_folder_flags(path: Path) -> list[Flag]:
    run = read_folder(path)
    try:
        trust = TrustConfig.model_validate(run.config.get("trust") or {})
    except ValueError:  # written by another version
        trust = TrustConfig()
    return run_flags(run.metrics, run.config, run.audit, trust=trust, samples=run.samples)


# ---- printing ----


def summary(flags: Sequence[Flag]) -> str:
    """One line per flag, printed at the end of a run."""
    return "\n".join(f"{_mark(f)}: {_subject_prefix(f)}{printable(f.sentence)} ({f.name})" for f in flags)


def format_flags(flags: Sequence[Flag]) -> str:
    """Format every flag with its evidence and advice."""
    if not flags:
        return "no flags: no rule of docs/trust.md fired, which does not prove that nothing is wrong"
    parts = []
    for f in flags:
        lines = [f"{_mark(f)}: {_subject_prefix(f)}{f.title} ({f.name})", *_wrap(f.sentence)]
        lines += [f"    {printable(e.label)}: {_format_values(e)}" for e in f.evidence]
        lines += _wrap(f"What to do: {f.advice}")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _mark(flag: Flag) -> str:
    return "! warning" if flag.level == "warning" else "  note"


def _subject_prefix(flag: Flag) -> str:
    return f"{printable(flag.about)}: " if flag.about else ""


def _wrap(text: str) -> list[str]:
    return textwrap.wrap(printable(text), 110, initial_indent="    ", subsequent_indent="    ", break_long_words=False)


def _format_values(e: Evidence) -> str:
    """Format values with their steps; only the first and last ones if there are many."""
    texts = [
        format_number(v) + (f" (step {s:,})" if s is not None else "")
        for v, s in zip(e.values, e.steps or (None,) * len(e.values), strict=False)
    ]
    if len(texts) > SHOWN:
        half = SHOWN // 2
        texts = [*texts[:half], f"... {len(texts) - SHOWN} more ...", *texts[-half:]]
    return ", ".join(texts)


def markdown() -> str:
    """The thresholds and rules in Markdown, for docs/trust.md."""
    fields = TrustConfig.model_fields
    lines = ["| key | default | |", "|---|---|---|"]
    lines += [f"| `trust.{name}` | `{info.default}` | {info.description} |" for name, info in fields.items()]
    for rule in RULES.values():
        of = [kind for kind, check in (("runs", rule.of_run), ("comparisons", rule.of_comparison)) if check]
        keys = ", ".join(f"`trust.{t}` = {fields[t].default}" for t in rule.thresholds)
        lines += ["", f"### {rule.name}", "", f"*{rule.title[0].upper()}{rule.title[1:]}.* For {' and '.join(of)}.", ""]
        lines += [f"- **When:** {rule.what}", f"- **Needs:** {rule.needs}."]
        lines += [f"- **Threshold:** {keys}."] if keys else []
        lines += [f"- **False alarms:** {rule.alarms}.", f"- **What to do:** {rule.advice}"]
    return "\n".join(lines) + "\n"
