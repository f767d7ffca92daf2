"""Translate another tool's keys with a table of rules for each tool (NAME.yaml). No key is dropped silently.

A table may hold, each optional:
  defaults     the tool's defaults that affect the meaning of a run; null removes one
  translated   key: {to: our key, as: how to read its value (`CONVERSIONS`), values: {theirs: ours}, note: ...}; with `otherwise`, a
               value that is not in `values` is unsupported, and `otherwise` says what to do; values in `idle` leave our key to others
  ignored      key: why no key is needed; or {why, when: values for which that holds, otherwise: what to do about other values}
  unsupported  key: what to do instead; or {how: the same, idle: values that change nothing, besides none and false}
Keys with the same rule may share an entry, separated by commas. `vllm_*` matches every key with that prefix and no rule of its own.
A tool's table also holds its `methods`, and `groups` of keys that methods share (`like`), as tables of the same form, and under
`derived` the keys that each function combines. A tool that wraps another one maps its keys to the other's names: `names` (theirs: the
other's) and `inner` (sections whose keys already have the other's names). It `shares` whole tables and `borrows` groups and functions.
`sections` lists mappings whose keys are translated one by one. `devices` is the key with the number of processes of a run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any, Literal

from pydantic import ValidationError

from penchant.algorithms import ALGORITHMS
from penchant.base.files import packaged_yaml
from penchant.base.section import recorded
from penchant.base.text import closest
from penchant.errors import ConfigError

Status = Literal["translated", "same", "unsupported"]
OFF: tuple[Any, ...] = (None, False, "", "none", "no", "None", [], {})  # values that leave a feature off


@dataclass(frozen=True, slots=True)
class Line:
    """The translation of one key, or of several that are combined.

    Args:
        theirs: their keys and values, as ``(key, value)``; empty for built-in behavior of their tool.
        status: translated (`ours` holds our keys), same (no key needed: the behavior is the same here, or it has no effect), or
            unsupported.
        ours: our keys and values.
        note: the reason, or what to do.
        is_set: True if the file sets it, False if it is their default.
    """

    theirs: tuple[tuple[str, Any], ...]
    status: Status
    ours: tuple[tuple[str, Any], ...] = ()
    note: str = ""
    is_set: bool = True


@dataclass
class ToolConfig:
    """Their settings: the file's values over their tool's defaults.

    Args:
        read: ends with the last key read, which an error about its value names; shared with copies.
    """

    values: Mapping[str, Any]
    defaults: Mapping[str, Any]
    devices: int = 1
    folder: str = "."
    read: list[str] = field(default_factory=lambda: [""])

    def __getitem__(self, key: str) -> Any:
        self.read[:] = [key]
        return self.values[key] if key in self.values else self.defaults.get(key)

    def sets(self, *keys: str) -> bool:
        """Whether the file itself sets one of the keys."""
        return any(k in self.values for k in keys)

    def theirs(self, *keys: str) -> tuple[tuple[str, Any], ...]:
        """``(key, value)`` for the keys that the file or a default sets."""
        return tuple((k, self[k]) for k in keys if k in self.values or k in self.defaults)

    def line(self, keys: Iterable[str], status: Status, ours: Mapping[str, Any] | None = None, note: str = "") -> Line:
        """Make a line about some of their keys."""
        names = tuple(keys)
        return Line(self.theirs(*names), status, tuple((ours or {}).items()), note, self.sets(*names))


Convert = Callable[[Any], Any]
Rule = Callable[[str, ToolConfig], Line]
Derive = Callable[[ToolConfig], Iterator[Line]]
Guess = Callable[[Mapping[str, Any], str], str | None]


class Untranslatable(ValueError):
    """A value has no counterpart. The message says what to do."""


def number(value: Any) -> float:
    """Convert to float, including strings such as ``1e-5``, which YAML 1.1 does not parse as a number."""
    if isinstance(value, bool):
        raise Untranslatable(f"{value!r} is not a number; set the key by hand")
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise Untranslatable(f"{repr(value)[:60]} is not a number; set the key by hand") from error


def integer(value: Any) -> int:
    """Convert to int."""
    converted = number(value)
    if not converted.is_integer():
        raise Untranslatable(f"{repr(value)[:60]} is not a whole number; set the key by hand")
    return int(converted)


def flag(value: Any) -> bool:
    """Convert to bool, including YAML 1.1's yes, no, on and off."""
    words = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    converted = words.get(str(value).strip().lower())
    if converted is None:
        raise Untranslatable(f"{value!r} is neither true nor false; set the key by hand")
    return converted


def name(value: Any) -> str:
    """Convert to a non-empty string."""
    if not isinstance(value, (str, int, float)) or not str(value).strip():
        raise Untranslatable(f"{value!r} is not a name; set the key by hand")
    return str(value)


def layers(value: Any) -> str | list[str]:
    """Convert an adapter's target layers: a list, a comma-separated string, a regular expression, or all of them."""
    if isinstance(value, str) and re.search(r"[\\()|*^$\[]", value):
        return value
    names = [v.strip() for v in value.split(",")] if isinstance(value, str) else [str(v) for v in value]
    if names in (["all"], ["all-linear"]):
        return "all-linear"
    if not all(names):
        raise Untranslatable(f"{value!r} names no layer")
    return names


CONVERSIONS: dict[str, Convert] = {
    "as it is": lambda v: v,
    "text": lambda v: name(v),
    "number": number,
    "whole": integer,
    "flag": flag,
    "name": name,
    "layers": layers,
    "steps": lambda v: integer(v) if integer(v) > 0 else None,
    "whole_or_zero": lambda v: integer(v or 0),
    "single_number": lambda v: number(v[0] if isinstance(v, list) and len(v) == 1 else v),
    "enable_thinking": lambda v: {"enable_thinking": flag(v)},
    "text_column": lambda v: {} if v == "text" else {"text": str(v)},
}


def _translated(rule: Mapping[str, Any], key: str, config: ToolConfig) -> Line:
    """Translate a key to `to`, mapping its converted value through `values`. With `otherwise`, unmapped values are unsupported."""
    if config[key] is None:
        return config.line([key], "same", note="not set")
    values, otherwise = rule.get("values", {}), rule.get("otherwise")
    try:
        value = CONVERSIONS[rule.get("as", "as it is")](config[key])
        if value in rule.get("idle", ()):
            return config.line([key], "same", note="off, as here")
        known = isinstance(value, Hashable) and value in values
        if otherwise and not known:
            raise Untranslatable(f"{value!r} has no counterpart; {otherwise}")
    except Untranslatable as problem:
        return config.line([key], "unsupported", note=str(problem))
    return config.line([key], "translated", {rule["to"]: values[value] if known else value}, rule.get("note", ""))


def _ignored(rule: Mapping[str, Any], key: str, config: ToolConfig) -> Line:
    """A key that needs no counterpart for the values in `when`, or for any value if there is no `when`."""
    is_unsupported = "when" in rule and config[key] not in rule["when"] and config[key] is not None
    return config.line(
        [key], "unsupported" if is_unsupported else "same", note=rule["otherwise" if is_unsupported else "why"]
    )


def _unsupported(rule: Mapping[str, Any], key: str, config: ToolConfig) -> Line:
    """A key without a counterpart; `how` says what to do instead. Values in `idle`, false, none and empty have no effect."""
    is_unsupported = not any(type(config[key]) is type(v) and config[key] == v for v in (*OFF, *rule.get("idle", ())))
    return config.line(
        [key], "unsupported" if is_unsupported else "same", note=rule["how"] if is_unsupported else "off, as here"
    )


# (part of a table, function that applies its rules, field that a plain string stands for)
KINDS = (("translated", _translated, "to"), ("ignored", _ignored, "why"), ("unsupported", _unsupported, "how"))


@dataclass(frozen=True)
class Method:
    """One of their trainers.

    Args:
        title: display name; base: our keys that select the method.
        defaults: their defaults that affect the meaning of a run.
        rules: ``{key: rule}``, which take precedence over the source's.
        derive: functions that combine several keys; `parts` holds all keys that they read.
        remarks: differences that hold for any file.
    """

    title: str
    base: Mapping[str, Any]
    defaults: Mapping[str, Any]
    rules: Mapping[str, Rule]
    derive: tuple[Derive, ...]
    parts: frozenset[str]
    remarks: tuple[str, ...]


@dataclass(frozen=True)
class Source:
    """A tool whose files can be imported: its trainers, its keys, and how to recognize its files.

    Args:
        marks: keys that only this tool's files have; guess: returns the method that a file is for, or None.
        names: ``{its key: name in the rules}``; sections: mappings whose keys are translated one by one.
        inner: sections whose keys already have the rules' names; devices: the key with the number of processes.
    """

    name: str
    title: str
    methods: Mapping[str, Method]
    rules: Mapping[str, Rule]
    marks: frozenset[str]
    guess: Guess
    names: dict[str, str] = field(default_factory=dict)
    sections: frozenset[str] = frozenset()
    inner: frozenset[str] = frozenset()
    devices: str = ""

    def read(self, values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str], list[Line]]:
        """(values by the rules' key names, the file's name of each, lines about keys that have no effect).

        For a tool with its own names, a null value means that the key is not set.
        """
        flat = {
            f"{k}.{inner}" if inner else k: v
            for k, value in values.items()
            for inner, v in (value.items() if k in self.sections and isinstance(value, Mapping) else [("", value)])
        }
        if not self.names:
            return flat, {}, []
        names = self.names | {k: k.partition(".")[2] for k in flat if k.partition(".")[0] in self.inner}
        order = [*(k for k in self.names if k in flat), *(k for k in flat if k not in self.names)]
        lines, renamed, original_names = [], {}, {ours: theirs for theirs, ours in reversed(self.names.items())}
        for k in order:
            ours = names.get(k, k)
            if flat[k] is None:
                lines.append(Line(((k, None),), "same", note="not set"))
            elif ours in renamed:
                lines.append(
                    Line(
                        ((k, flat[k]),), "same", note=f"without effect there: {original_names.get(ours, ours)} says it"
                    )
                )
            else:
                renamed[ours], original_names[ours] = flat[k], k
        return renamed, original_names, lines


@cache
def table(name: str) -> dict[str, Any]:
    """Load NAME.yaml from this package."""
    return packaged_yaml(__package__, f"{name}.yaml")


def rules_of(part: Mapping[str, Any]) -> dict[str, Rule]:
    """``{key: rule}`` of one table."""
    rules: dict[str, Rule] = {}
    for kind, apply, default_field in KINDS:
        for keys, rule in part.get(kind, {}).items():
            options = rule if isinstance(rule, dict) else {default_field: rule}
            rules |= dict.fromkeys(keys.split(", "), partial(apply, options))
    return rules


def _merge_tables(parts: Iterable[Mapping[str, Any]], what: str) -> dict[str, Any]:
    """Merge one part of several tables. Later tables take precedence."""
    return {key: value for part in parts for key, value in part.get(what, {}).items()}


def source(name: str, derivations: Iterable[Derive], guess: Guess) -> Source:
    """Build the `Source` described by NAME.yaml, looking up the functions that it names in `derivations`."""
    tool = table(name.replace("-", "_"))
    tables = [*map(table, tool.get("shares", ())), tool]
    borrowed = [*map(table, tool.get("borrows", ())), *tables]
    functions = {f.__name__: f for f in derivations}
    keys = _merge_tables(borrowed, "derived")
    groups = {**_merge_tables(borrowed[: -len(tables)], "methods"), **_merge_tables(borrowed, "groups")}

    def build_method(spec: Mapping[str, Any]) -> Method:
        parts = [*(groups[group] for group in spec.get("like", ())), spec]
        defaults = _merge_tables([*tables, *parts], "defaults")
        return Method(
            spec["title"],
            spec.get("base", {}),
            {key: value for key, value in defaults.items() if value is not None},
            {key: rule for part in parts for key, rule in rules_of(part).items()},
            tuple(functions[f] for f in spec["derived"]),
            frozenset(key for f in spec["derived"] for key in keys[f]),
            tuple(spec.get("remarks", ())),
        )

    rules = {key: rule for part in tables for key, rule in rules_of(part).items()}
    methods = {key: build_method(spec) for key, spec in tool["methods"].items()}
    sections = (frozenset(tool.get(part, ())) for part in ("sections", "inner"))
    tool_options = (tool.get("names", {}), *sections, tool.get("devices", ""))
    return Source(name, tool["title"], methods, rules, frozenset(tool["marks"]), guess, *tool_options)


@dataclass(frozen=True)
class Translation:
    """A translated file: our keys with a comment each, and a line for every key of the original (`values`)."""

    source: Source
    method: Method
    values: Mapping[str, Any]
    lines: tuple[Line, ...]
    remarks: tuple[str, ...]

    def count(self, status: Status) -> int:
        """Number of keys in their file that have a line of this status."""
        keys = {k for line in self.lines if line.status == status for k, _ in line.theirs}
        return sum(re.split(r"[.\[]", k)[0] in self.values for k in keys)

    @property
    def settings(self) -> dict[str, tuple[Any, str]]:
        """``{our key: (value, its origin)}``."""
        settings: dict[str, tuple[Any, str]] = {k: (v, "") for k, v in self.method.base.items()}
        for line in self.lines:
            origin = ", ".join(f"{k}: {v}" for k, v in line.theirs)
            comment = origin if line.is_set else f"{self.source.title}'s default ({origin})" if origin else line.note
            for key, value in line.ours:
                settings[key] = (value, comment)
        return settings


def translate(
    values: Mapping[str, Any], source: Source, method: Method, devices: int = 1, folder: str = "."
) -> Translation:
    """Translate every key of `values` by the source's rules, and the tool's defaults.

    Args:
        devices: number of GPUs of their run, which multiplies the batch size.
        folder: the file's folder, where files that it names are looked up.

    Raises:
        Untranslatable: a value cannot be understood; the message names the key.
    """
    renamed_values, original_names, unset_lines = source.read(values)
    config = ToolConfig(renamed_values, method.defaults, devices, folder)
    try:
        if source.devices:
            config.devices = max(devices, integer(config[source.devices] or 1))
        lines = _lines(renamed_values, original_names, source, method, config)
    except (ValueError, TypeError, AttributeError, LookupError, ZeroDivisionError) as error:
        key = config.read[-1]
        reason = str(error) if isinstance(error, Untranslatable) else f"{repr(config[key])[:60]} cannot be understood"
        raise Untranslatable(f"{original_names.get(key, key)}: {reason}") from error
    restored = [replace(line, theirs=tuple((original_names.get(k, k), v) for k, v in line.theirs)) for line in lines]
    effective = _without_idle(restored, method)
    # `unset_lines` already has the file's key names
    return Translation(source, method, values, (*unset_lines, *effective), method.remarks)


def _without_idle(lines: list[Line], method: Method) -> list[Line]:
    """Drop our keys that have no effect with the resulting algorithm, because a config that sets them is rejected."""
    settings = dict(method.base) | {k: v for line in lines for k, v in line.ours}
    name = settings.get("algorithm.name")
    if name not in ALGORITHMS:
        return lines
    algorithm, algorithm_settings = (
        ALGORITHMS[name],
        {k.partition(".")[2]: v for k, v in settings.items() if k.startswith("algorithm.")},
    )
    try:
        with recorded():  # which refuses none of them
            idle = algorithm.model_validate(algorithm_settings).idle
    except ValidationError:
        return lines  # building the config reports the error
    idle_keys = {
        f"algorithm.{k}"
        for k in idle
        if k in algorithm_settings and algorithm_settings[k] != algorithm.model_fields[k].default
    }

    def drop_idle(line: Line) -> Line:
        ours = tuple((k, v) for k, v in line.ours if k not in idle_keys)
        if ours == line.ours:
            return line
        if ours:
            return replace(line, ours=ours)
        return replace(line, status="same", ours=(), note=f"without effect on {name}")

    return [drop_idle(line) for line in lines]


def _lines(
    set_keys: Mapping[str, Any], original_names: Mapping[str, str], source: Source, method: Method, config: ToolConfig
) -> list[Line]:
    """A line for every key that is set (`set_keys`, by the rules' names), and for the tool's defaults."""
    lines: list[Line] = []
    rules = {**source.rules, **method.rules}
    for k in (k for k in set_keys if k not in method.parts):
        rule = rules.get(k) or next((r for n, r in rules.items() if n.endswith("*") and k.startswith(n[:-1])), None)
        lines.append(rule(k, config) if rule else _unknown(k, config, source, method, original_names))
    lines += [
        rules[k](k, config) for k in method.defaults if k not in set_keys and k not in method.parts and k in rules
    ]
    for derive in method.derive:
        lines += derive(config)
    seen = {k for line in lines for k, _ in line.theirs}
    note = "without effect there: nothing that uses it is on"
    lines += [
        config.line([k], "same", note=note) for k in set_keys if k not in seen and original_names.get(k, k) not in seen
    ]
    return lines


def _unknown(key: str, config: ToolConfig, source: Source, method: Method, original_names: Mapping[str, str]) -> Line:
    """A line about a key without a rule: it belongs to another method, or is unknown."""
    others = [m.title for m in source.methods.values() if key in m.rules or key in m.parts]
    if others and source.names:
        return config.line([key], "same", note=f"without effect on {method.title}: it is of {others[0]}")
    if config[key] in OFF:
        return config.line([key], "same", note="not a key that the importer knows; it is off there")
    known = [*source.rules, *method.rules, *method.parts]
    suggestion = closest(original_names.get(key, key), [original_names.get(k, k) for k in known])
    how = f"did you mean {suggestion}?" if suggestion else "see `penchant config` for what there is"
    return config.line([key], "unsupported", note=f"not a key that the importer knows; {how}")


def choose(name: str, choices: Mapping[str, Any], where: str, what: str) -> Any:
    """Return ``choices[name]``, or raise ConfigError with the closest name or all names."""
    if name not in choices:
        suggestion = closest(name, choices)
        how = f"did you mean {suggestion}?" if suggestion else f"there are {', '.join(choices)}"
        raise ConfigError(where, f"{name!r} is not a {what}", how)
    return choices[name]
