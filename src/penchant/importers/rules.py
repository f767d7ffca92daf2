"""What becomes of another tool's keys: a table of rules for each source (NAME.yaml), and the one engine that applies them.

A table may hold, each optional:
  defaults     their defaults that a run's meaning rests on; null takes one of the tool's away
  translated   key: {to: our key, as: how its value is read (`CONVERSIONS`), values: {theirs: ours}, note: ...}; with `otherwise`, a
               value that is not among `values` has no counterpart, and `otherwise` says what to do
  ignored      key: why there is nothing to write; or {why, when: values for which that holds, otherwise: what to do about another}
  unsupported  key: what to do instead; or {how: the same, idle: values, beside none and false, that ask for nothing}
Keys with one rule may stand together, with commas; `vllm_*` is every key that begins so and has no rule of its own. A tool's table has its `methods` and `groups` of keys that methods share (`like`) as
tables too, and under `derived` the keys of every function that makes something of several. A tool that wraps another one says its keys in
the other's names: `names` (theirs: the other's) and `inner` (sections whose keys are the other's own); it `shares` whole tables and
`borrows` groups and functions. `sections` lists mappings whose keys count one by one. Nothing is dropped silently.
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
        self.last = ""  # the key that was looked at last: the one to name where its value cannot be understood

    def __getitem__(self, key: str) -> Any:
        self.last = key
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
Guess = Callable[[Mapping[str, Any], str], str | None]


class NotHere(ValueError):
    """A value that has no counterpart; its text says what to do."""


def number(value: Any) -> float:
    """A number, also where YAML 1.1 has left ``1e-5`` a text."""
    if isinstance(value, bool):
        raise NotHere(f"{value!r} is not a number; set the key by hand")
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise NotHere(f"{repr(value)[:60]} is not a number; set the key by hand") from error


def whole(value: Any) -> int:
    """A whole number."""
    found = number(value)
    if not found.is_integer():
        raise NotHere(f"{repr(value)[:60]} is not a whole number; set the key by hand")
    return int(found)


def flag(value: Any) -> bool:
    """true or false, also in YAML 1.1's words."""
    words = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    found = words.get(str(value).strip().lower())
    if found is None:
        raise NotHere(f"{value!r} is neither true nor false; set the key by hand")
    return found


def name(value: Any) -> str:
    """One word or several, as a text."""
    if not isinstance(value, (str, int, float)) or not str(value).strip():
        raise NotHere(f"{value!r} is not a name; set the key by hand")
    return str(value)


def layers(value: Any) -> str | list[str]:
    """Layers of an adapter: a list, a text with commas, a regular expression, or all of them."""
    if isinstance(value, str) and re.search(r"[\\()|*^$\[]", value):
        return value
    names = [v.strip() for v in value.split(",")] if isinstance(value, str) else [str(v) for v in value]
    if names in (["all"], ["all-linear"]):
        return "all-linear"
    if not all(names):
        raise NotHere(f"{value!r} names no layer")
    return names


CONVERSIONS: dict[str, Convert] = {
    "as it is": lambda v: v,
    "text": lambda v: name(v),
    "number": number,
    "whole": whole,
    "flag": flag,
    "name": name,
    "layers": layers,
    "steps": lambda v: whole(v) if whole(v) > 0 else None,
    "whole_or_zero": lambda v: whole(v or 0),
    "single_number": lambda v: number(v[0] if isinstance(v, list) and len(v) == 1 else v),
    "enable_thinking": lambda v: {"enable_thinking": flag(v)},
    "text_column": lambda v: {} if v == "text" else {"text": str(v)},
}


def _translated(rule: Mapping[str, Any], key: str, given: Given) -> Line:
    """The key is `to`, its value read and then looked up in `values`; `otherwise` refuses one that is not there."""
    if given[key] is None:
        return given.line([key], "same", note="not set")
    values, otherwise = rule.get("values", {}), rule.get("otherwise")
    try:
        value = CONVERSIONS[rule.get("as", "as it is")](given[key])
        known = isinstance(value, Hashable) and value in values
        if otherwise and not known:
            raise NotHere(f"{value!r} has no counterpart; {otherwise}")
    except NotHere as problem:
        return given.line([key], "unsupported", note=str(problem))
    return given.line([key], "translated", {rule["to"]: values[value] if known else value}, rule.get("note", ""))


def _ignored(rule: Mapping[str, Any], key: str, given: Given) -> Line:
    """Nothing to write: with one of `when` (with any, where none is named) it is so here already."""
    asks = "when" in rule and given[key] not in rule["when"] and given[key] is not None
    return given.line([key], "unsupported" if asks else "same", note=rule["otherwise" if asks else "why"])


def _unsupported(rule: Mapping[str, Any], key: str, given: Given) -> Line:
    """Not here: `how` says what to do instead. A value in `idle` (or false, none, empty) asks for nothing."""
    asks = not any(type(given[key]) is type(v) and given[key] == v for v in (*OFF, *rule.get("idle", ())))
    return given.line([key], "unsupported" if asks else "same", note=rule["how"] if asks else "off, as here")


# the parts of a table: what applies their rules, and what a rule that is only a text says
KINDS = (("translated", _translated, "to"), ("ignored", _ignored, "why"), ("unsupported", _unsupported, "how"))


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
    defaults: Mapping[str, Any]
    rules: Mapping[str, Rule]
    derive: tuple[Derive, ...]
    parts: frozenset[str]
    remarks: tuple[str, ...]


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
    guess: Guess
    names: dict[str, str] = field(default_factory=dict)
    sections: frozenset[str] = frozenset()
    inner: frozenset[str] = frozenset()

    def read(self, values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str], list[Line]]:
        """The file's keys in the names that the rules have, what the file calls them, and lines of keys that say nothing more.

        A tool with names of its own leaves a key empty to mean that it is not set.
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
        lines, found, called = [], {}, {ours: theirs for theirs, ours in reversed(self.names.items())}
        for k in order:
            ours = names.get(k, k)
            if flat[k] is None:
                lines.append(Line(((k, None),), "same", note="not set"))
            elif ours in found:
                lines.append(
                    Line(((k, flat[k]),), "same", note=f"without effect there: {called.get(ours, ours)} says it")
                )
            else:
                found[ours], called[ours] = flat[k], k
        return found, called, lines


@cache
def table(name: str) -> dict[str, Any]:
    """NAME.yaml beside this file."""
    return packaged_yaml(__package__, f"{name}.yaml")


def rules_of(part: Mapping[str, Any]) -> dict[str, Rule]:
    """The rules of one table."""
    made: dict[str, Rule] = {}
    for kind, apply, text in KINDS:
        for keys, rule in part.get(kind, {}).items():
            said = rule if isinstance(rule, dict) else {text: rule}
            made |= dict.fromkeys(keys.split(", "), partial(apply, said))
    return made


def _together(parts: Iterable[Mapping[str, Any]], what: str) -> dict[str, Any]:
    """One part of several tables, the later ones over the earlier."""
    return {key: value for part in parts for key, value in part.get(what, {}).items()}


def source(name: str, derivations: Iterable[Derive], guess: Guess) -> Source:
    """The tool that NAME.yaml describes; the functions that it derives things with are among `derivations`."""
    tool = table(name.replace("-", "_"))
    tables = [*map(table, tool.get("shares", ())), tool]
    lent = [*map(table, tool.get("borrows", ())), *tables]
    functions = {f.__name__: f for f in derivations}
    keys = _together(lent, "derived")
    groups = {**_together(lent[: -len(tables)], "methods"), **_together(lent, "groups")}

    def method(own: Mapping[str, Any]) -> Method:
        parts = [*(groups[group] for group in own.get("like", ())), own]
        defaults = _together([*tables, *parts], "defaults")
        return Method(
            own["title"],
            own.get("base", {}),
            {key: value for key, value in defaults.items() if value is not None},
            {key: rule for part in parts for key, rule in rules_of(part).items()},
            tuple(functions[f] for f in own["derived"]),
            frozenset(key for f in own["derived"] for key in keys[f]),
            tuple(own.get("remarks", ())),
        )

    rules = {key: rule for part in tables for key, rule in rules_of(part).items()}
    methods = {key: method(own) for key, own in tool["methods"].items()}
    more = (tool.get("names", {}), frozenset(tool.get("sections", ())), frozenset(tool.get("inner", ())))
    return Source(name, tool["title"], methods, rules, frozenset(tool["marks"]), guess, *more)


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
        keys = {k for line in self.lines if line.status == status for k, _ in line.theirs}
        return sum(re.split(r"[.\[]", k)[0] in self.values for k in keys)

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

    Raises:
        NotHere: a value cannot be understood; its text names the key.
    """
    found, called, said = source.read(values)
    given = Given(found, method.defaults, devices, folder)
    try:
        lines = _lines(found, called, source, method, given)
    except (ValueError, TypeError, AttributeError, LookupError, ZeroDivisionError) as error:
        why = str(error) if isinstance(error, NotHere) else f"{repr(given[given.last])[:60]} cannot be understood"
        raise NotHere(f"{called.get(given.last, given.last)}: {why}") from error
    named = [replace(line, theirs=tuple((called.get(k, k), v) for k, v in line.theirs)) for line in lines]
    kept = _without_idle(named, method)
    return Translation(source, method, values, (*said, *kept), method.remarks)  # `said` has the file's own words


def _without_idle(lines: list[Line], method: Method) -> list[Line]:
    """The same without keys that change nothing with the algorithm which the lines make, and which a config may not have."""
    made = dict(method.base) | {k: v for line in lines for k, v in line.ours}
    name = made.get("algorithm.name")
    if name not in ALGORITHMS:
        return lines
    kind, own = ALGORITHMS[name], {k.partition(".")[2]: v for k, v in made.items() if k.startswith("algorithm.")}
    try:
        with recorded():  # which refuses none of them
            idle = kind.model_validate(own).idle
    except ValidationError:
        return lines  # the config says so
    gone = {f"algorithm.{k}" for k in idle if k in own and own[k] != kind.model_fields[k].default}

    def left(line: Line) -> Line:
        ours = tuple((k, v) for k, v in line.ours if k not in gone)
        if ours == line.ours:
            return line
        if ours:
            return replace(line, ours=ours)
        return replace(line, status="same", ours=(), note=f"without effect on {name}")

    return [left(line) for line in lines]


def _lines(
    found: Mapping[str, Any], called: Mapping[str, str], source: Source, method: Method, given: Given
) -> list[Line]:
    """A line for every key that is set (`found`), in the rules' names, and for their defaults."""
    lines: list[Line] = []
    rules = {**source.rules, **method.rules}
    for k in (k for k in found if k not in method.parts):
        rule = rules.get(k) or next((r for n, r in rules.items() if n.endswith("*") and k.startswith(n[:-1])), None)
        lines.append(rule(k, given) if rule else _unknown(k, given, source, method, called))
    lines += [rules[k](k, given) for k in method.defaults if k not in found and k not in method.parts and k in rules]
    for derive in method.derive:
        lines += derive(given)
    seen = {k for line in lines for k, _ in line.theirs}
    idle = "without effect there: nothing that uses it is on"
    lines += [given.line([k], "same", note=idle) for k in found if k not in seen and called.get(k, k) not in seen]
    return lines


def _unknown(key: str, given: Given, source: Source, method: Method, called: Mapping[str, str]) -> Line:
    """A key without a rule: another method's, or one that nobody knows."""
    others = [m.title for m in source.methods.values() if key in m.rules or key in m.parts]
    if others and source.names:
        return given.line([key], "same", note=f"without effect on {method.title}: it is of {others[0]}")
    if given[key] in OFF:
        return given.line([key], "same", note="not a key that the importer knows; it is off there")
    known = [*source.rules, *method.rules, *method.parts]
    near = closest(called.get(key, key), [called.get(k, k) for k in known])
    how = f"did you mean {near}?" if near else "see `penchant config` for what there is"
    return given.line([key], "unsupported", note=f"not a key that the importer knows; {how}")


def choose(name: str, there: Mapping[str, Any], where: str, what: str) -> Any:
    """``there[name]``, or an error that lists what there is."""
    if name not in there:
        near = closest(name, there)
        how = f"did you mean {near}?" if near else f"there are {', '.join(there)}"
        raise ConfigError(where, f"{name!r} is not a {what}", how)
    return there[name]
