"""The data sets that have a name (catalogue.yaml): where each is published, in which files, and in which layout."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from penchant.base.files import packaged_yaml
from penchant.base.text import closest
from penchant.errors import ConfigError

HUB = "https://huggingface.co/datasets/"


@dataclass(frozen=True, slots=True)
class Files:
    """A subset's files.

    Args:
        splits: published split (train, validation or test) to a pattern of paths, as `fnmatch` has them.
        layout: of these rows, where it is not the data set's; prompts_only: these rows are for prompts alone (`--as prompts`).
    """

    splits: Mapping[str, str]
    layout: str | None = None
    prompts_only: bool = False


@dataclass(frozen=True, slots=True)
class Spec:
    """A data set of the catalogue.

    Args:
        name: what a person types; aliases: other names for it; hub: its id there; revision: a branch other than main.
        subsets: name to files; default: the subsets that are read where nobody chooses.
        layout: of its rows (`penchant data formats`); gated: whether its terms must be accepted first.
        terms: licence, in a few words; summary: one line; filters: which of language, redacted and moderation apply.
    """

    name: str
    hub: str
    subsets: Mapping[str, Files]
    default: tuple[str, ...]
    layout: str
    terms: str
    summary: str
    aliases: tuple[str, ...] = ()
    revision: str = "main"
    gated: bool = False
    filters: tuple[str, ...] = ()

    @property
    def page(self) -> str:
        """Its page, where its terms are."""
        return HUB + self.hub


def _files(part: Mapping[str, Any]) -> Files:
    splits = {key: value for key, value in part.items() if key not in ("layout", "prompts_only")}
    return Files(splits, part.get("layout"), part.get("prompts_only", False))


def _spec(name: str, held: Mapping[str, Any]) -> Spec:
    subsets = {subset: _files(part) for subset, part in held["subsets"].items()}
    default = held.get("default", ["default"])
    chosen = tuple(subsets if default == "all" else default)
    lists = {key: tuple(held.get(key, ())) for key in ("aliases", "filters")}
    others: Any = {**held, **lists, "subsets": subsets, "default": chosen}
    return Spec(name, **others)


_HELD = packaged_yaml(__package__, "catalogue.yaml")
SPECS = tuple(_spec(name, held) for name, held in _HELD.items())
CATALOGUE: dict[str, Spec] = {spec.name: spec for spec in SPECS}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def _plain(name: str) -> str:
    return name.lower().replace("_", "-")


_NAMES: dict[str, Spec] = {
    _plain(n): spec for spec in SPECS for n in (spec.name, *spec.aliases, spec.hub, spec.hub.partition("/")[2])
}


def find(name: str) -> Spec | None:
    """The data set that a name, an alias or a hub id stands for; None where the catalogue has none."""
    return _NAMES.get(_plain(name))


def is_hub_id(name: str) -> bool:
    """Whether a name has the form ``owner/name``."""
    return _HUB_ID.fullmatch(name) is not None and ".." not in name


def unknown(name: str) -> ConfigError:
    """What to say of a name that is neither in the catalogue nor a hub id."""
    near = closest(_plain(name), _NAMES)
    guess = f"did you mean {_NAMES[near].name}? " if near else ""
    how = f"{guess}there are {', '.join(CATALOGUE)}, or any owner/name"
    return ConfigError(name, "is no data set of the catalogue", how)


def chosen_subsets(spec: Spec, asked: tuple[str, ...]) -> tuple[str, ...]:
    """The subsets to read, in the catalogue's order.

    Raises:
        ConfigError: one of them is not there.
    """
    wanted = spec.subsets if asked == ("all",) else asked or spec.default
    for name in wanted:
        if name not in spec.subsets:
            near = closest(name, spec.subsets)
            how = (f"did you mean {near}? " if near else "") + f"it has {', '.join(spec.subsets)}"
            raise ConfigError("--subset", f"{spec.name} has no subset {name!r}", how)
    return tuple(s for s in spec.subsets if s in wanted)


def table() -> str:
    """The catalogue as text, a line a data set."""
    wide = max(len(s.name) for s in SPECS)
    return "\n".join(f"{s.name:<{wide}}  {'gated  ' if s.gated else '       '}{s.summary} ({s.terms})" for s in SPECS)


def markdown() -> str:
    """The catalogue as the table of docs/data_get.md."""
    lines = [
        "| name | published as | subsets (read by default in bold) | splits | layout | terms |",
        "|---|---|---|---|---|---|",
    ]
    for s in SPECS:
        names = list(s.subsets)
        subsets = ", ".join(f"**{n}**" if n in s.default else n for n in names)
        subsets = "" if names == ["default"] else subsets if len(names) <= 8 else f"**{len(names)} domains**"
        splits = ", ".join(dict.fromkeys(x for n in s.default for x in s.subsets[n].splits))
        cells = [s.name, f"[{s.hub}]({s.page})", subsets, splits, s.layout, s.terms + (", gated" if s.gated else "")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
