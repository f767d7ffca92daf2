"""Options that several commands share."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, fields
from typing import Any, get_args, get_type_hints

from penchant.errors import OPTIONS
from penchant.requests import MOST, broken_bound

# ---- `--column ours=yours`, spelled the same in every command that reads rows ----


def add_columns(parser: argparse.ArgumentParser | Any, *aliases: str, nargs: str | None = None) -> None:
    """Add the options `--column` and `--bound`.

    Args:
        aliases: older spellings of `--column`; `nargs` says whether they take several values at once.
    """
    column_help = "which of your columns holds a field, as in prompt=question (repeatable)"
    bound_help = "a bound on the size of rows: row_mb, nesting or unpacked (see data.bounds in docs/config.md)"
    parser.add_argument("--bound", action="append", default=[], metavar="NAME=N", dest="bounds", help=bound_help)
    parser.add_argument("--column", action="append", default=[], metavar="ours=yours", dest="columns", help=column_help)
    if aliases:
        parser.add_argument(
            *aliases,
            nargs=nargs,
            action="extend",
            dest="columns",
            metavar="ours=yours",
            help="several of these at once",
        )


def column_pairs(items: Sequence[str], flag: str = "--column") -> dict[str, str]:
    """Parse ``["prompt=question"]`` into a mapping.

    Raises:
        ConfigError: an item is not name=value, or a name is given twice with different values.
    """
    from penchant.errors import ConfigError

    values: dict[str, str] = {}
    for item in items:
        name, sign, value = item.partition("=")
        if not (name and sign and value):
            raise ConfigError(flag, f"{item!r} is not name=value", f"write {flag} name=value")
        if values.setdefault(name, value) != value:
            raise ConfigError(flag, f"{name!r} is given twice", "give each name once")
    return values


@contextmanager
def apply_bounds(args: argparse.Namespace) -> Iterator[None]:
    """Apply the bounds of a command's `--bound` options to all rows read within the block.

    Raises:
        ConfigError: a bound is unknown, or its value is not a number in its range.
    """
    values = column_pairs(getattr(args, "bounds", None) or (), "--bound")
    if not values:
        yield
        return
    from pydantic import ValidationError

    from penchant.data.read import BOUNDS, Bounds
    from penchant.errors import ConfigError

    try:
        bounds = Bounds.model_validate_strings(values, strict=False)
    except ValidationError as error:
        first = error.errors()[0]
        flag = "--bound " + ".".join(map(str, first["loc"]))
        raise ConfigError(flag, first["msg"], f"there are {', '.join(Bounds.model_fields)}") from error
    token = BOUNDS.set(bounds)
    try:
        yield
    finally:
        BOUNDS.reset(token)


OPTION_KEYS = {"shape": "data.shape", "layout": "data.shape", "columns": "data.columns"}


@contextmanager
def options_in_errors(parser: argparse.ArgumentParser | None) -> Iterator[None]:
    """Within the block, errors name the command's own options in place of the keys of a config."""
    actions = () if parser is None else parser._actions
    token = OPTIONS.set({OPTION_KEYS[a.dest]: a.option_strings[0] for a in reversed(actions) if a.dest in OPTION_KEYS})
    try:
        yield
    finally:
        OPTIONS.reset(token)


# ---- options from the fields of a request ----


def add_arguments(parser: argparse.ArgumentParser, request: type) -> None:
    """Add the options described by the fields of a command's request; see `penchant.requests.option`."""
    kinds, groups = get_type_hints(request), {"": parser}
    for option in fields(request):
        metadata, required = dict(option.metadata), option.default is MISSING and option.default_factory is MISSING
        heading = metadata.get("group", "")
        if heading not in groups:
            groups[heading] = parser.add_argument_group(heading)  # type: ignore[assignment]
        if option.name == "columns":
            add_columns(groups[heading], *metadata.get("also", ()), nargs="+")
            continue
        type_args = get_args(kinds[option.name])
        kind = type_args[0] if type(None) in type_args else kinds[option.name]
        settings: dict[str, Any] = {"help": metadata["help"], "default": None if required else option.default}
        if metadata.get("either"):
            settings["action"] = argparse.BooleanOptionalAction
        elif kind is bool:
            settings["action"] = "store_true"
        else:
            settings |= {"metavar": metadata["metavar"], "choices": metadata.get("choices")}
        if option.default in ((), MISSING) and not required:
            settings |= {"action": "append", "default": []}
        elif kind in (int, float):
            settings["type"] = number_type(kind, metadata.get("low"), metadata.get("high"), metadata.get("above"))
        if metadata.get("positional"):
            groups[heading].add_argument(option.name, nargs=None if required else "?", **settings)
        else:
            flag = metadata.get("flag", "--" + option.name.strip("_").replace("_", "-"))
            groups[heading].add_argument(flag, dest=option.name, required=required, **settings)


def options_of(args: argparse.Namespace, request: type) -> dict[str, Any]:
    """Return the values given for a request, by field name.

    Raises:
        ConfigError: an option cannot be parsed.
    """
    options: dict[str, Any] = {}
    for option in fields(request):
        value, parse = getattr(args, option.name), option.metadata.get("read", lambda text: text)
        if option.default_factory is not MISSING:
            pairs = column_pairs(value, option.metadata.get("flag", "--column"))
            value = {name: parse(text) for name, text in pairs.items()}
        options[option.name] = parse(value) if isinstance(value, str) else value
    return options


def flags_given(args: argparse.Namespace, parser: argparse.ArgumentParser) -> dict[str, str]:
    """The options that have another value than by default, and the flag of each."""
    flags: dict[str, str] = {}
    for action in parser._actions:
        if action.option_strings and getattr(args, action.dest, action.default) != parser.get_default(action.dest):
            flags.setdefault(action.dest, action.option_strings[0])  # of two spellings, the first
    return flags


def number_type(kind: type, low: float | None = None, high: float | None = None, above: float | None = None) -> Any:
    """Return an argparse type for finite numbers within bounds, and within what any machine can count or hold."""
    least, most = (-MOST[kind] if low is None else low), (MOST[kind] if high is None else high)

    def number(text: str) -> float:
        from penchant.base.text import short

        value: float = kind(text) if len(text) <= 400 else math.inf
        if bound := broken_bound(value, least, most, above):
            raise argparse.ArgumentTypeError(f"{short(text)} is not {bound}")
        return value

    number.__name__ = kind.__name__  # argparse says "invalid int value"
    return number


def add_config(
    parser: argparse.ArgumentParser,
    what: str,
    metavar: str = "CONFIG",
    overrides: str = "settings that override the config's",
) -> None:
    """Add the config argument, and the settings that override it."""
    parser.add_argument("config", metavar=metavar, help=what)
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],  # without a default, argparse calls the argument required
        metavar="key.path=value",
        help=overrides,
    )
