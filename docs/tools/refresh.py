"""Regenerate parts of docs/methods/*.md from the loss registry, the config schema, the metrics table and docs/results.md.

    python docs/tools/refresh.py

A generated part is between `<!-- generated: KIND NAMES -->` and `<!-- end of generated -->`. tests/docs/test_methods.py checks
that the pages are up to date. `eval_page` and `trackers_page` return the tables of docs/eval.md and docs/trackers.md for their tests.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from penchant.config.page import Key, parts
from penchant.losses import LOSSES
from penchant.losses.page import parameters
from penchant.losses.registry import NEEDS
from penchant.metrics.names import METRICS, SPEED

DOCS = Path(__file__).resolve().parents[1]
PART = re.compile(r"(<!-- generated: (\S+) ?(.*?) -->\n)(.*?)(<!-- end of generated -->)", re.S)


def _piped(text: str) -> str:
    return text.replace("|", "\\|")


def _cell(text: str) -> str:
    return _piped(text).replace("<", "&lt;")


def _paper(number: str) -> str:
    return f"[arXiv {number}](https://arxiv.org/abs/{number})" if number else ""


def formula(names: list[str]) -> list[str]:
    """Formula, needs and paper of each loss, as in `penchant losses`."""
    lines = []
    for spec in (LOSSES[n] for n in names):
        lines += ["```text", f"{spec.name}: {spec.formula}", "```", ""]
        needs = [NEEDS[n] for n in sorted(spec.needs)]
        notes = [f"Needs {', '.join(needs)}." if needs else "", f"Paper: {_paper(spec.paper)}." if spec.paper else ""]
        lines += [" ".join(t for t in notes if t), ""] if any(notes) else []
    return lines


def settings(names: list[str]) -> list[str]:
    """Table of the losses' hyperparameters with their defaults and ranges."""
    lines = ["| setting | default | meaning and range |", "|---|---|---|"]
    for name in names:
        suffix = f" ({name})" if len(names) > 1 else ""
        rows = [(f"loss.{key}", default, meaning) for key, default, meaning in parameters(LOSSES[name])]
        lines += [f"| `{key}`{suffix} | {default} | {_cell(meaning)} |" for key, default, meaning in rows]
    return [*lines, ""] if len(lines) > 2 else ["It has no hyperparameters of its own.", ""]


def algorithm(names: list[str]) -> list[str]:
    """Table of an algorithm's settings."""
    name = " ".join(names)
    keys: tuple[Key, ...] = next(p.keys for p in parts() if p.title == f"algorithm: {name}")
    lines = ["| setting | default | meaning | takes |", "|---|---|---|---|"]
    return [*lines, *(f"| `{k.path}` | {k.default} | {_cell(k.meaning)} | {_cell(k.takes)} |" for k in keys), ""]


def metrics(names: list[str]) -> list[str]:
    """Table of metrics and their meaning."""
    return ["| metric | meaning |", "|---|---|", *(f"| `{n}` | {_cell(METRICS[n].meaning)} |" for n in names), ""]


def measured(names: list[str]) -> list[str]:
    """Rows of these losses from the first table in docs/results.md that has them all (printed by `recipes/loss_table.py`)."""
    row_names = ["(before training)", *names]
    for table in re.findall(r"^\| loss .*?(?=^```)", (DOCS / "results.md").read_text(), re.M | re.S):
        rows = table.strip().splitlines()
        row_of = {row.split("|")[1].strip(): row for row in rows[2:]}
        if row_of.keys() >= set(row_names):
            return ["", *rows[:2], *(row_of[n] for n in row_names), ""]
    raise KeyError(f"no table of docs/results.md has {', '.join(row_names)}")


def eval_page() -> str:
    """The table of docs/eval.md: every metric that `penchant eval` computes."""
    rows = [
        f"| `eval/{m.name}` | {_piped(m.meaning)} | `{_piped(m.formula)}` | {m.over} |"
        for m in METRICS.values()
        if m.over
    ]
    return "\n".join(["| figure | what it is | formula | n counts |", "|---|---|---|---|", *rows])


def trackers_page() -> str:
    """The table of docs/trackers.md: every logged metric, its name in trackers and its meaning."""
    logged = [m for m in METRICS.values() if m.logged]
    rows = [f"| `{m.name}` | `train/{m.name}`, `eval/{m.name}` | {_piped(m.meaning)} |" for m in logged]
    rows += [f"| `{m.name}` (perf.jsonl) | `perf/{m.name}` | {m.meaning} |" for m in SPEED]
    return "\n".join(["| logged as | in trackers | what it is |", "|---|---|---|", *rows])


KINDS: dict[str, Callable[[list[str]], list[str]]] = {
    "formula": formula,
    "settings": settings,
    "algorithm": algorithm,
    "metrics": metrics,
    "measured": measured,
}


def refreshed(text: str) -> str:
    """Return a page with its generated parts rewritten."""

    def part(match: re.Match[str]) -> str:
        names = (
            [n for n in re.split(r",?\s+", match[3].strip()) if n] if match[2] != "algorithm" else [match[3].strip()]
        )
        return match[1] + "\n".join(["", *KINDS[match[2]](names)]).replace("\n\n\n", "\n\n") + "\n" + match[5]

    return PART.sub(part, text)


def pages() -> list[Path]:
    """The pages that have generated parts."""
    return sorted((DOCS / "methods").glob("*.md"))


if __name__ == "__main__":
    for page in pages():
        page.write_text(refreshed(page.read_text()))
