"""Where their figures are sent: `report_to` as our `logging.trackers`."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

from penchant.importing.rules import Given, Line, NotHere, Rule, flag, to
from penchant.tracking.registry import TRACKERS

PARTS = frozenset({"report_to", "use_wandb"})


def _one_word(value: Any) -> str:
    if not isinstance(value, (str, int, float)) or not str(value).strip():
        raise NotHere(f"{value!r} is no name; set the key by hand")
    return str(value)


NAMES: dict[str, Rule] = {
    "run_name": to("logging.name", _one_word),
    "project": to("logging.project", _one_word),
    "wandb_project": to("logging.project", _one_word),
}


def report_to(given: Given) -> Iterator[Line]:
    """A name, several, `none` or `all`; those that there are none of here are reported."""
    names: list[str] = []
    if given.says("report_to"):
        asked = _names(given["report_to"])
        names = list(dict.fromkeys(n for a in asked for n in (_installed() if a == "all" else [a]) if n in TRACKERS))
        strangers = [a for a in asked if a not in TRACKERS and a not in ("all", "none")]
        if strangers:
            how = f"there is no tracker {', '.join(strangers)}: logging.trackers takes {', '.join(TRACKERS)}"
            yield Line((("report_to", ", ".join(strangers)),), "unsupported", (), how)
        if names:
            note = "those that are installed here" if "all" in asked else ""
            yield given.line(["report_to"], "translated", {"logging.trackers": names}, note)
        elif not strangers:
            none = f"none of {', '.join(TRACKERS)} is installed here" if "all" in asked else "no tracker, as here"
            yield given.line(["report_to"], "same", note=none)
    if given.says("use_wandb"):
        yield _wandb(given, names)


def _wandb(given: Given, names: list[str]) -> Line:
    try:
        wanted = given["use_wandb"] is not None and flag(given["use_wandb"])
    except NotHere as problem:
        return given.line(["use_wandb"], "unsupported", note=str(problem))
    if not wanted:
        return given.line(["use_wandb"], "same", note="off, as here")
    return given.line(["use_wandb"], "translated", {"logging.trackers": list(dict.fromkeys([*names, "wandb"]))})


def _names(value: Any) -> list[str]:
    """Their names, as a list or as a text with commas."""
    listed = value if isinstance(value, list) else [] if value is None or value is False else str(value).split(",")
    return [name for name in (str(v).strip().lower() for v in listed) if name]


def _installed() -> list[str]:
    """A folder of that name in the current one (W&B makes one) is no package."""
    found = {name: importlib.util.find_spec(spec.module) for name, spec in TRACKERS.items()}
    return [name for name, spec in found.items() if spec is not None and spec.origin is not None]
