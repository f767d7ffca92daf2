"""The registry of layouts and `Layout`: its columns, converter, options and example, and where it is published."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from penchant.base.files import packaged_yaml
from penchant.data.layouts import fields
from penchant.errors import ConfigError
from penchant.types import PromptTree

Fields = Mapping[str, Any]
Converter = TypeVar("Converter", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Option:
    """An option of a layout (`data.layout_options`).

    Args:
        default: its value if it is not set; summary: one line.
        choices: all allowed values; empty for a number between `low` and `high` (both inclusive).
        kinds: choice -> the kind of data it yields, if not the layout's own.
    """

    default: Any
    summary: str
    choices: tuple[str, ...] = ()
    low: float = -math.inf
    high: float = math.inf
    kinds: Mapping[str, str] = field(default_factory=dict)

    def check(self, value: Any, where: str) -> Any:
        """Validate a value; a number is converted to float.

        Raises:
            ConfigError: it is not allowed.
        """
        if self.choices:
            if value not in self.choices:
                raise ConfigError(where, f"is {value!r}", f"choose one of {', '.join(self.choices)}")
            return value
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not self.low <= number <= self.high:
            raise ConfigError(where, f"is {value!r}", f"give a number {self.allowed()}")
        return number

    def allowed(self) -> str:
        """The allowed values, in words."""
        if self.choices:
            return ", ".join(self.choices)
        low = "" if self.low == -math.inf else f"from {self.low:g}"
        high = "" if self.high == math.inf else f"to {self.high:g}"
        return " ".join(filter(None, (low, high))) or "(any)"


class _TrackedRow(dict[str, Any]):
    """A row that records which of its columns are read."""

    def __init__(self, row: Fields) -> None:
        super().__init__(row)
        self.used: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.used.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.used.add(name)
        return super().get(name, default)


Turn = tuple[str, str, _TrackedRow]  # its place, its role, and the turn, which records what is read of it


def _track(value: Any, path: str, turns: list[Turn]) -> Any:
    """Wrap a value's turns and their content parts, in lists of any depth, in `_TrackedRow` rows and add them to `turns`."""
    if isinstance(value, (list, tuple)):
        return [_track(v, f"{path}[]", turns) for v in value]
    role = next((r for n in ("role", "from") if isinstance(value, Mapping) and isinstance(r := value.get(n), str)), "")
    if not role and not (isinstance(value, Mapping) and path.endswith(".content[]")):
        return value
    turn = _TrackedRow({n: _track(v, f"{path}.{n}", turns) if n == "content" else v for n, v in value.items()})
    turns.append((path, role, turn))
    return turn


def _unused_of_turns(turns: Iterable[Turn]) -> list[str]:
    """Non-empty keys read in no turn of a role, as ``messages[].name``; the role is named if other roles' keys were read."""
    used: dict[tuple[str, str], set[str]] = {}
    present: dict[tuple[str, str], dict[str, None]] = {}
    for place, role, turn in turns:
        if not turn.used & ({"content", "value"} if role else {"text"}):
            continue  # its column is not used
        used.setdefault((place, role), set()).update(turn.used)
        for name, value in dict.items(turn):
            if fields.is_nonempty(value):
                present.setdefault((place, name), {})[role] = None
    unused = []
    for (place, name), roles in present.items():
        unread = [role for role in roles if name not in used[place, role]]
        if unread:
            unused.append(f"{place}.{name}" + (f" ({', '.join(unread)})" if len(unread) < len(roles) else ""))
    return unused


class UserRow(_TrackedRow):
    """A `_TrackedRow` row for a user's own converter; iterating over it or copying it counts as reading every column."""

    def _all(self) -> None:
        self.used.update(dict.keys(self))

    def __iter__(self) -> Iterator[str]:
        self._all()
        return super().__iter__()

    def keys(self) -> Any:
        self._all()
        return super().keys()

    def values(self) -> Any:
        self._all()
        return super().values()

    def items(self) -> Any:
        self._all()
        return super().items()

    def copy(self) -> dict[str, Any]:
        return dict(self.items())

    def pop(self, name: str, *default: Any) -> Any:
        self.used.add(name)
        return super().pop(name, *default)


@dataclass(frozen=True, slots=True)
class Group:
    """How to fold rows that belong together into one.

    Args:
        key: returns the key that a group's rows share, or raises `RowError`; fold: merges a group into one row to convert.
        reads: further columns that are used.
    """

    key: Callable[[Fields], str]
    fold: Callable[[Sequence[Fields]], Fields]
    reads: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Layout:
    """A published layout of rows.

    Args:
        name: its name in `data.shape`; kind: ``pairs``, ``unpaired``, ``scored``, ``sft``, ``prompts`` or ``text``.
        columns: the columns that detection looks for; check: a further condition on a row; shows: that condition in words.
        turn: converts a row, given all options, to a tree or trees, or raises `RowError`; call `convert` instead.
        summary: one line; example: a row in this layout; source: where it is published.
        options: by name; group: how rows are folded before they are converted; rest: further rows of the example's group.
    """

    name: str
    kind: str
    columns: tuple[str, ...]
    turn: Callable[[Fields, Fields], PromptTree | tuple[PromptTree, ...]]
    summary: str
    example: Fields
    source: str
    options: Mapping[str, Option] = field(default_factory=dict)
    check: Callable[[Fields], bool] | None = None
    shows: str = ""
    group: Group | None = None
    rest: tuple[Fields, ...] = ()

    def convert(self, row: Fields, options: Fields) -> tuple[PromptTree, ...]:
        """Convert a row (a folded group, if there is `group`) to prompt trees; omitted options take their defaults.

        What all published layouts share is done here: a system prompt column goes in front of the prompt, and tools and chat
        template options are attached. Rows with images, audio, video or unparsable messages are rejected, as are demonstrations
        that a column rates; a last answer of weight 0 is left out.

        Raises:
            RowError: the row does not fit, or is kept aside by an option.
        """
        is_builtin = self.name in LAYOUTS
        if is_builtin:
            fields.reject_media(row)
            fields.reject_unparsed_messages(row)
            if self.kind == "sft":
                fields.reject_rated(row)
            if options.get("turns", "last") not in ("every", "all"):
                fields.leave_out_untrained(row)
        result = self.turn(row, {n: options.get(n, o.default) for n, o in self.options.items()})
        trees = result if isinstance(result, tuple) else (result,)
        if not is_builtin:
            return trees
        tools, template_options = fields.tools(row), fields.template_options(row)
        if self.kind == "text":
            if tools or template_options:
                raise fields.RowError(
                    '"tools" or "chat_template_kwargs" is set, but plain text has no chat template', "take them out"
                )
            return trees
        prompts = [fields.prompt_with_system(row, t.prompt) for t in trees]
        if not tools and not template_options and all(p is t.prompt for p, t in zip(prompts, trees, strict=True)):
            return trees
        return tuple(
            replace(t, prompt=p, tools=tools, template_options=template_options)
            for p, t in zip(prompts, trees, strict=True)
        )

    def unused(self, rows: Iterable[Fields], options: Fields) -> list[str]:
        """Non-empty columns of these rows that conversion does not read, followed by such keys of turns, in order."""
        present: dict[str, None] = {}
        turns: list[Turn] = []
        used = {*self.columns, *(self.group.reads if self.group else ())}
        is_builtin = self.name in LAYOUTS
        for raw_row in rows:
            row_turns: list[Turn] = []
            row = (
                _TrackedRow({n: _track(v, str(n), row_turns) for n, v in raw_row.items()})
                if is_builtin
                else UserRow(raw_row)
            )
            try:
                if self.group is None:
                    self.convert(row, options)
            except fields.RowError:  # conversion stopped halfway, so nothing is known of the rest
                continue
            used |= row.used
            turns += row_turns
            present |= dict.fromkeys(name for name, value in raw_row.items() if fields.is_nonempty(value))
        return [c for c in present if c not in used] + _unused_of_turns(turns)

    def fits(self, row: Fields) -> bool:
        """Whether a row looks like this layout."""
        return all(c in row for c in self.columns) and (self.check is None or self.check(row))

    @property
    def why(self) -> str:
        """What detection goes by: the columns, and the further condition in words."""
        if not self.columns:
            return self.shows
        names = f"column{'s' if len(self.columns) > 1 else ''} {', '.join(self.columns)}"
        return f"{names} {self.shows}" if self.shows else names

    @property
    def example_trees(self) -> tuple[PromptTree, ...]:
        """The example, converted with the default options."""
        return self.convert(self.example if self.group is None else self.group.fold((self.example, *self.rest)), {})

    def settings(self, values: Fields, where: str = "data.layout_options") -> dict[str, Any]:
        """All options: the user's values, and defaults for the rest.

        Raises:
            ConfigError: an option that this layout does not have, or a value that it does not allow.
        """
        for name in values:
            if name not in self.options:
                advice = f"it has {', '.join(self.options)}" if self.options else "it has no options"
                raise ConfigError(f"{where}.{name}", f"is not an option of the layout {self.name}", advice)
        return {n: o.check(values[n], f"{where}.{n}") if n in values else o.default for n, o in self.options.items()}

    def kind_of(self, options: Fields) -> str:
        """The kind of data that these options yield."""
        for name, option in self.options.items():
            choice = options.get(name, option.default)
            if choice in option.kinds:
                return option.kinds[choice]
        return self.kind


_TABLE: dict[str, Any] = packaged_yaml(__package__, "layouts.yaml")
LAYOUTS: dict[str, Layout] = dict.fromkeys(_TABLE)  # type: ignore[arg-type,assignment]  # filled by `layout`, in the table's order


def layout(
    name: str, *, check: Callable[[Fields], bool] | None = None, group: Group | None = None
) -> Callable[[Converter], Converter]:
    """Register a function as the converter of a layout in layouts.yaml.

    The function takes a row, or a row and the options, and returns a tree or a tuple of trees.

    Args:
        check, group: see `Layout`.
    """

    def register(convert: Converter) -> Converter:
        entry = {"options": {}, **_TABLE[name]}
        options = {n: Option(**{**o, "choices": tuple(o.get("choices", ()))}) for n, o in entry["options"].items()}
        arity = len(inspect.signature(convert).parameters)
        entry |= {"options": options, "turn": convert if arity == 2 else lambda row, _: convert(row)}
        entry |= {"columns": tuple(entry.get("columns", ())), "rest": tuple(entry.get("rest", ()))}
        LAYOUTS[name] = Layout(name, **entry, check=check, group=group)
        return convert

    return register


@dataclass(frozen=True, slots=True)
class Detection:
    """The result of detecting a layout.

    Args:
        layout: its name, None if none fits; why: what was found; others: further layouts that these rows fit.
        how: what to do if no layout fits.
    """

    layout: str | None
    why: str
    others: tuple[str, ...] = ()
    how: str = ""

    def sentence(self, name: str, override: str) -> str:
        """The line shown on loading: the layout, why it was chosen, what else fits, and how to choose another."""
        others = f"; other fits: {', '.join(self.others)}" if self.others else ""
        return f"{name}: layout {self.layout} ({self.why}){others}; override with {override}"
