"""The keys that vary in a sweep: short ones written out, their values, and how those stand in a folder's name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from penchant.algorithms.options import OnlineConfig, PPOConfig, RewardModelConfig
from penchant.config import SYNONYMS, Places, RunConfig, place_of
from penchant.errors import ConfigError
from penchant.losses import LOSSES
from penchant.pipeline import did_you_mean

LONGEST_LABEL = 40  # characters of a value in a folder's name

_SECTIONS = {
    name: {f for a in (i.annotation, *getattr(i.annotation, "__args__", ())) for f in getattr(a, "model_fields", ())}
    for name, i in RunConfig.model_fields.items()
    if name not in ("loss", "algorithm", "reward")
}
_OF_A_LOSS = {i.alias or n for s in LOSSES.values() for n, i in s.params.model_fields.items()}
_OF_AN_ALGORITHM = {
    i.alias or n for c in (OnlineConfig, PPOConfig, RewardModelConfig) for n, i in c.model_fields.items()
}


@dataclass(frozen=True)
class Axis:
    """A key that varies, and its values with their place and the way they stand in a folder's name."""

    key: str
    values: tuple[Any, ...]
    labels: tuple[str, ...]
    places: tuple[str, ...]

    def __iter__(self) -> Iterator[tuple[str, Any, str, str]]:
        return ((self.key, v, label, p) for v, label, p in zip(self.values, self.labels, self.places, strict=True))


def long_key(key: str, base: Mapping[str, Any], where: str) -> str:
    """The key path that a short key stands for: ``seed`` is ``train.seed``, ``beta`` is ``loss.beta``.

    Raises:
        ConfigError: there is none such, or several.
    """
    if "." in key or key in RunConfig.model_fields:
        return key
    if key in SYNONYMS:
        raise ConfigError(where, f'unknown key "{key}"', f'did you mean "{SYNONYMS[key]}"?')
    method = "algorithm" if base.get("algorithm") is not None else "loss"
    found = [name for name, keys in _SECTIONS.items() if key in keys]
    if key in (_OF_AN_ALGORITHM if method == "algorithm" else _OF_A_LOSS) or key == "name":
        found.append(method)
    if len(found) == 1:
        return f"{found[0]}.{key}"
    if found:
        raise ConfigError(where, f'"{key}" may be {" or ".join(f"{f}.{key}" for f in found)}', "write it out")
    every = sorted({f for keys in _SECTIONS.values() for f in keys} | _OF_A_LOSS | _OF_AN_ALGORITHM)
    near = difflib.get_close_matches(key, every, 1)
    raise ConfigError(where, f'unknown key "{key}"', did_you_mean(key, near) if near else "write it out: section.key")


def grid(section: Any, places: Places, source: str, base: Mapping[str, Any]) -> dict[str, Axis]:
    """The axes of a sweep's `grid` section, by key.

    Raises:
        ConfigError: with the file's line.
    """
    place = place_of(("grid",), places, source)
    if section is None:
        return {}
    if not isinstance(section, dict):
        raise ConfigError(place, f"grid is {section!r}", "indent keys with lists below it: loss.beta: [0.1, 0.3]")
    axes: dict[str, Axis] = {}
    for path, values in _leaves(section, ("grid",)):
        at = place_of(path, places, source)
        key = long_key(".".join(path[1:]), base, at)
        if not isinstance(values, list) or not values:
            raise ConfigError(at, f"grid.{key} is {values!r}", "give a list of values")
        if key in axes:
            raise ConfigError(at, f"{key} stands twice in the grid", "keep one")
        axes[key] = axis(key, values, [place_of((*path, str(i)), places, at) for i in range(len(values))])
    return axes


def _leaves(values: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, (*path, key))
        else:
            yield (*path, key), value


def axis(key: str, values: Sequence[Any], places: Sequence[str]) -> Axis:
    """A key with its values, each once."""
    for i, value in enumerate(values):
        if any(value == other and type(value) is type(other) for other in values[:i]):
            raise ConfigError(places[i], f"{key}: {value!r} stands there twice", "keep one")
    labels: list[str] = []
    for value in values:
        made = label(value)
        labels.append(made if made not in labels else f"{made}_{len(labels) + 1}")
    return Axis(key, tuple(values), tuple(labels), tuple(places))


def label(value: Any) -> str:
    """A value as part of a folder's name."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    if isinstance(value, dict):
        return "_".join(label(v) for v in value.values())[:LONGEST_LABEL] or "none"
    if isinstance(value, list):
        return "_".join(label(v) for v in value)[:LONGEST_LABEL] or "none"
    return re.sub(r"[^A-Za-z0-9_.+-]+", "_", str(value)).strip("_.")[-LONGEST_LABEL:] or "none"


def short_keys(keys: Sequence[str]) -> dict[str, str]:
    """The last part of each key, or the whole of it where two end alike."""
    last = [k.split(".")[-1] for k in keys]
    return {k: end if last.count(end) == 1 else k for k, end in zip(keys, last, strict=True)}
