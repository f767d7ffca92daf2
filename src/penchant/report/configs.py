"""Settings: first what differs, then every config whole."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from penchant.report.data import ReportData
from penchant.report.html import Element, Node, el, fold, said, table
from penchant.report.numbers import count
from penchant.report.safe import flat, text
from penchant.report.settings import name

MOST_COLUMNS = 14
MAIN = (  # what a person asks first of one run: key, label
    ("model.path", "model"),
    ("data.path", "data"),
    ("loss.name", "loss"),
    ("loss.beta", "beta"),
    ("algorithm.name", "algorithm"),
    ("algorithm.beta", "KL weight"),
    ("reward", "reward"),
    ("lora.r", "LoRA rank"),
    ("train.lr", "learning rate"),
    ("train.schedule", "schedule"),
    ("train.epochs", "epochs"),
    ("train.max_steps", "steps"),
    ("train.batch_size", "rows per step"),
    ("train.seed", "seed"),
    ("data.max_length", "max length, tokens"),
    ("reference.kind", "reference"),
)


def configs(data: ReportData) -> Element | None:
    """None where no run has a config."""
    runs = [r for r in data.runs if r.config_text]
    if not runs:
        return None
    if len(data.runs) == 1:
        return el("div", _main(runs[0].config), _whole(runs[0].config_text, "resolved config, whole", "config"))
    firsts = [next((r for r in s.runs if r.config_text), None) for s in data.settings]
    folded = [
        _whole(r.config_text, [el("b", s.key, class_="key"), " ", said(r.name)], f"config-{s.key}")
        for s, r in zip(data.settings, firsts, strict=True)
        if r is not None
    ]
    return el(
        "div",
        differences(data),
        el("p", "Whole configs, of the first run of each setting:", class_="soft small"),
        folded,
    )


def differences(data: ReportData) -> Element:
    """One line a setting, one column a key that differs between any two."""
    of = {s.key: next((r.settings for r in s.runs if r.config), {}) for s in data.settings}
    if len(of) < 2:
        return el(
            "p", f"{count(len(data.runs), 'run')} of one setting: their seeds differ, and nothing else.", class_="soft"
        )
    keys = differing([v for v in of.values() if v])
    if not keys:
        return el("p", "No setting differs.", class_="soft")
    kept = keys[:MOST_COLUMNS]
    rows: list[list[Node]] = [[name(s), *(said(short(of[s.key].get(k))) for k in kept)] for s in data.settings]
    more = (
        el("p", f"And {len(keys) - len(kept)} more: {', '.join(keys[len(kept) :])}.", class_="soft small")
        if len(keys) > len(kept)
        else None
    )
    head: list[Node] = ["setting", *(said(k) for k in kept)]
    return el("div", table(head, rows, caption="Only keys that differ", class_="keys"), more, class_="panel")


def differing(settings: list[dict[str, Any]]) -> list[str]:
    """Keys whose values are not the same everywhere, in written order."""
    keys = dict.fromkeys(k for s in settings for k in s)
    return [k for k in keys if len({text(s.get(k)) for s in settings}) > 1]


def _main(config: Mapping[str, Any]) -> Element | None:
    values = flat(config)
    if isinstance(config.get("algorithm"), Mapping):  # then the loss section says nothing
        values = {k: v for k, v in values.items() if not k.startswith("loss.")}
    rows: list[list[Node]] = [
        [label, said(short(values[key]))] for key, label in MAIN if values.get(key) not in (None, "")
    ]
    return el("div", table([], rows, class_="facts"), class_="panel") if rows else None


def short(value: Any) -> str:
    """A setting's value; an absolute path by its last two parts, so that a report can be shown around."""
    if isinstance(value, str):
        parts = Path(value).parts
        return str(Path("\u2026", *parts[-2:])) if value.startswith("/") and len(parts) > 3 else value
    return "\u2013" if value is None else text(value)


def _whole(config: str, summary: Any, key: str) -> Element:
    return fold(summary, el("pre", said(config, tag="code")), key=key)
