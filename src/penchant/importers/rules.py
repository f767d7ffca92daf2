"""What becomes of another tool's keys: a table of rules a source, and the one engine that applies them. Nothing is dropped silently."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from penchant.errors import ConfigError

Status = Literal["translated", "same", "unsupported"]
OFF: tuple[Any, ...] = (None, False, "", "none", "no", "None", [], {})  # a key with such a value asks for nothing


@dataclass(frozen=True, slots=True)
class Line:
    """What became of one key, or of several that make one thing together.

    Args:
        theirs: their keys and values, as ``(key, value)``; empty for what their tool does without being asked.
        status: translated (`ours` holds our keys), same (nothing to write: it is so here, or changes nothing), unsupported.
        ours: our keys and values.
        note: why, or what to do.
        given: whether their file says it, or it is their default.
    """

    theirs: tuple[tuple[str, Any], ...]
    status: Status
    ours: tuple[tuple[str, Any], ...] = ()
    note: str = ""
    given: bool = True


class Given:
    """Their settings: what the file says over what their tool takes where it says nothing."""

    def __init__(
        self, values: Mapping[str, Any], defaults: Mapping[str, Any], devices: int = 1, folder: str = "."
    ) -> None:
        self.values, self.defaults, self.devices, self.folder = values, defaults, devices, folder

    def __getitem__(self, key: str) -> Any:
        return self.values[key] if key in self.values else self.defaults.get(key)

    def says(self, *keys: str) -> bool:
        """Whether the file itself has one of the keys."""
        return any(k in self.values for k in keys)

    def theirs(self, *keys: str) -> tuple[tuple[str, Any], ...]:
        """The keys with the values that hold, those left out that nobody sets."""
        return tuple((k, self[k]) for k in keys if k in self.values or k in self.defaults)

    def line(self, keys: Iterable[str], status: Status, ours: Mapping[str, Any] | None = None, note: str = "") -> Line:
        """A line about some of these keys."""
        names = tuple(keys)
        return Line(self.theirs(*names), status, tuple((ours or {}).items()), note, self.says(*names))


Convert = Callable[[Any], Any]
Rule = Callable[[str, Given], Line]
Derive = Callable[[Given], Iterator[Line]]


class NotHere(ValueError):
    """A value that has no counterpart; its text says what to do."""


def to(ours: str, convert: Convert = lambda v: v, note: str = "", also: Mapping[str, Any] | None = None) -> Rule:
    """The key is `ours`, its value converted; `also` is set with it."""

    def rule(key: str, given: Given) -> Line:
        if given[key] is None:
            return given.line([key], "same", note="not set")
        try:
            value = convert(given[key])
        except NotHere as problem:
            return given.line([key], "unsupported", note=str(problem))
        return given.line([key], "translated", {ours: value, **(also or {})}, note)

    return rule


def same(note: str, *values: Any, otherwise: str = "") -> Rule:
    """Nothing to write: with one of `values` (with any, where none is named) it is so here already."""

    def rule(key: str, given: Given) -> Line:
        asks = bool(values) and given[key] not in values and given[key] is not None
        return given.line([key], "unsupported" if asks else "same", note=otherwise if asks else note)

    return rule


def unsupported(how: str, *off: Any) -> Rule:
    """Not here: `how` says what to do instead. A value in `off` (or false, none, empty) asks for nothing."""

    def rule(key: str, given: Given) -> Line:
        asks = not any(type(given[key]) is type(v) and given[key] == v for v in (*OFF, *off))
        return given.line([key], "unsupported" if asks else "same", note=how if asks else "off, as here")

    return rule


def number(value: Any) -> float:
    """A number, also where YAML 1.1 has left ``1e-5`` a text."""
    if isinstance(value, bool):
        raise NotHere(f"{value!r} is not a number; set the key by hand")
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise NotHere(f"{value!r} is not a number; set the key by hand") from error


def whole(value: Any) -> int:
    """A whole number."""
    found = number(value)
    if found != int(found):
        raise NotHere(f"{value!r} is not a whole number; set the key by hand")
    return int(found)


def flag(value: Any) -> bool:
    """true or false, also in YAML 1.1's words."""
    words = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    found = words.get(str(value).strip().lower())
    if found is None:
        raise NotHere(f"{value!r} is neither true nor false; set the key by hand")
    return found


def one_of(names: Mapping[Any, Any], how: str) -> Convert:
    """The value's name here; `how` says what to do with one that has none."""

    def convert(value: Any) -> Any:
        try:
            return names[value]
        except (KeyError, TypeError) as error:
            raise NotHere(f"{value!r} has no counterpart; {how}") from error

    return convert


@dataclass(frozen=True)
class Method:
    """One of their trainers.

    Args:
        title: as a person calls it; base: our keys that say which method it is.
        defaults: their defaults that a run's meaning rests on.
        rules: key -> rule, over the source's own.
        derive: what several keys make together; the keys that a derivation looks at are in `parts`.
        remarks: what differs whatever the file says.
    """

    title: str
    base: Mapping[str, Any]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    rules: Mapping[str, Rule] = field(default_factory=dict)
    derive: tuple[Derive, ...] = ()
    parts: frozenset[str] = frozenset()
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Source:
    """A tool whose files are read: its trainers, its keys, and how to tell them.

    Args:
        marks: keys that only this tool's files have; guess: which method a file is for, or None.
    """

    name: str
    title: str
    methods: Mapping[str, Method]
    rules: Mapping[str, Rule]
    marks: frozenset[str]
    guess: Callable[[Mapping[str, Any], str], str | None]


@dataclass(frozen=True)
class Translation:
    """A file in our terms: our keys with a comment each, and a line for everything that theirs (`values`) said."""

    source: Source
    method: Method
    values: Mapping[str, Any]
    lines: tuple[Line, ...]
    remarks: tuple[str, ...]

    def count(self, status: Status) -> int:
        """Keys of their file of which a line of this status speaks."""
        return len(
            {
                k
                for line in self.lines
                if line.status == status
                for k, _ in line.theirs
                if k.split(".")[0] in self.values
            }
        )

    @property
    def settings(self) -> dict[str, tuple[Any, str]]:
        """Our key -> (value, where it comes from)."""
        found: dict[str, tuple[Any, str]] = {k: (v, "") for k, v in self.method.base.items()}
        for line in self.lines:
            origin = ", ".join(f"{k}: {v}" for k, v in line.theirs)
            comment = origin if line.given else f"{self.source.title}'s default ({origin})" if origin else line.note
            for key, value in line.ours:
                found[key] = (value, comment)
        return found


def translate(
    values: Mapping[str, Any], source: Source, method: Method, devices: int = 1, folder: str = "."
) -> Translation:
    """Every key of `values` by the source's rules, then what their defaults make.

    Args:
        devices: GPUs that their run used: an optimizer step there holds so many batches.
        folder: where their file stands; files that it names are looked for there.
    """
    given = Given(values, method.defaults, devices, folder)
    rules = {**source.rules, **method.rules}
    single = [k for k in values if k not in method.parts]
    lines = [rules[k](k, given) if k in rules else _unknown(k, given, [*rules, *method.parts]) for k in single]
    lines += [rules[k](k, given) for k in method.defaults if k not in values and k not in method.parts and k in rules]
    for derive in method.derive:
        lines += derive(given)
    seen = {k for line in lines for k, _ in line.theirs}
    lines += [
        given.line([k], "same", note="without effect there: nothing that uses it is on")
        for k in values
        if k not in seen
    ]
    return Translation(source, method, values, tuple(lines), method.remarks)


def _unknown(key: str, given: Given, known: Iterable[str]) -> Line:
    near = difflib.get_close_matches(key, list(known), 1)
    how = f"did you mean {near[0]}?" if near else "see `penchant config` for what there is"
    return given.line([key], "unsupported", note=f"not a key that the importer knows; {how}")


def choose(name: str, there: Mapping[str, Any], where: str, what: str) -> Any:
    """``there[name]``, or an error that lists what there is."""
    if name not in there:
        near = difflib.get_close_matches(name, list(there), 1)
        how = f"did you mean {near[0]}?" if near else f"there are {', '.join(there)}"
        raise ConfigError(where, f"{name!r} is no {what}", how)
    return there[name]
