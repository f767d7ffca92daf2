"""`--column ours=yours`, in one spelling for every command that reads rows."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any


def add(parser: argparse.ArgumentParser | Any, *also: str, nargs: str | None = None) -> None:
    """Add the option.

    Args:
        also: older spellings of it, which take several at once where `nargs` says so.
    """
    about = "a column's name: prompt=question (may be given again)"
    parser.add_argument("--column", action="append", default=[], metavar="ours=yours", dest="columns", help=about)
    if also:
        parser.add_argument(
            *also, nargs=nargs, action="extend", dest="columns", metavar="ours=yours", help="several at once"
        )


def pairs(given: Sequence[str], flag: str = "--column") -> dict[str, str]:
    """``["prompt=question"]`` as a mapping.

    Raises:
        ConfigError: one of them is no name=value, or a name is given twice with different values.
    """
    from penchant.errors import ConfigError

    found: dict[str, str] = {}
    for item in given:
        name, sign, value = item.partition("=")
        if not (name and sign and value):
            raise ConfigError(flag, f"{item!r} is no name=value", f"write {flag} name=value")
        if found.setdefault(name, value) != value:
            raise ConfigError(flag, f"{name!r} is given twice", "give each name once")
    return found
