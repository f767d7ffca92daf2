"""The catalog of known data sets (catalogue.yaml): hub id, files and layout of each."""

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
        splits: ``{published split (train, validation or test): fnmatch pattern of paths}``.
        layout: of these rows, if it differs from the data set's; prompts_only: the rows may only be used as prompts (`--as prompts`).
    """

    splits: Mapping[str, str]
    layout: str | None = None
    prompts_only: bool = False


@dataclass(frozen=True, slots=True)
class Spec:
    """A data set of the catalog.

    Args:
        name: name on the command line; aliases: other names for it; hub: its hub id; revision: branch to read.
        subsets: ``{name: files}``; default: subsets read by default.
        layout: of its rows (`penchant data formats`); gated: whether its terms must be accepted first.
        terms: license, in a few words; summary: one line.
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


def _files(part: Mapping[str, Any]) -> Files:
    splits = {key: value for key, value in part.items() if key not in ("layout", "prompts_only")}
    return Files(splits, part.get("layout"), part.get("prompts_only", False))


def _spec(name: str, entry: Mapping[str, Any]) -> Spec:
    subsets = {subset: _files(part) for subset, part in entry["subsets"].items()}
    default = entry.get("default", ["default"])
    chosen = tuple(subsets if default == "all" else default)
    settings: Any = {**entry, "aliases": tuple(entry.get("aliases", ())), "subsets": subsets, "default": chosen}
    return Spec(name, **settings)


CATALOGUE = {name: _spec(name, held) for name, held in packaged_yaml(__package__, "catalogue.yaml").items()}
SPECS = tuple(CATALOGUE.values())
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def _normalized(name: str) -> str:
    return name.lower().replace("_", "-")


_NAMES: dict[str, Spec] = {
    _normalized(n): spec for spec in SPECS for n in (spec.name, *spec.aliases, spec.hub, spec.hub.partition("/")[2])
}


def find_spec(name: str) -> Spec | None:
    """Look up a data set by name, alias or hub id; None if it is not in the catalog."""
    return _NAMES.get(_normalized(name))


def is_hub_id(name: str) -> bool:
    """Whether a name has the form ``owner/name``."""
    return _HUB_ID.fullmatch(name) is not None and ".." not in name


def unknown_name_error(name: str) -> ConfigError:
    """The error for a name that is neither in the catalog nor a hub id."""
    suggestion = closest(_normalized(name), _NAMES)
    guess = f"did you mean {_NAMES[suggestion].name}? " if suggestion else ""
    how = f"{guess}there are {', '.join(CATALOGUE)}, or any owner/name"
    return ConfigError(name, "is not a data set of the catalog", how)


def chosen_subsets(spec: Spec, requested: tuple[str, ...]) -> tuple[str, ...]:
    """The subsets to read, in the catalog's order.

    Raises:
        ConfigError: the data set has no such subset.
    """
    selected = spec.subsets if requested == ("all",) else requested or spec.default
    for name in selected:
        if name not in spec.subsets:
            suggestion = closest(name, spec.subsets)
            how = (f"did you mean {suggestion}? " if suggestion else "") + f"it has {', '.join(spec.subsets)}"
            raise ConfigError("--subset", f"{spec.name} has no subset {name!r}", how)
    return tuple(s for s in spec.subsets if s in selected)


def table() -> str:
    """Format the catalog, one line per data set."""
    width = max(len(s.name) for s in SPECS)
    return "\n".join(f"{s.name:<{width}}  {'gated  ' if s.gated else '       '}{s.summary} ({s.terms})" for s in SPECS)
