"""Options that several commands share."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import Any

# ---- `--column ours=yours`, in one spelling for every command that reads rows ----


def add_columns(parser: argparse.ArgumentParser | Any, *also: str, nargs: str | None = None) -> None:
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


def column_pairs(given: Sequence[str], flag: str = "--column") -> dict[str, str]:
    """``["prompt=question"]`` as a mapping.

    Raises:
        ConfigError: one of them is not name=value, or a name is given twice with different values.
    """
    from penchant.errors import ConfigError

    found: dict[str, str] = {}
    for item in given:
        name, sign, value = item.partition("=")
        if not (name and sign and value):
            raise ConfigError(flag, f"{item!r} is not name=value", f"write {flag} name=value")
        if found.setdefault(name, value) != value:
            raise ConfigError(flag, f"{name!r} is given twice", "give each name once")
    return found


# ---- Arguments that `penchant chat` and `penchant serve` share ----


def add_model(parser: argparse.ArgumentParser) -> None:
    """The model and how it is held."""
    parser.add_argument(
        "model", metavar="RUN", help="a run, a config, a checkpoint's, an adapter's or a model's folder, or a hub id"
    )
    parser.add_argument(
        "--step", default="last", help="of a run: last, best, 0 (the start) or a number (default: last)"
    )
    parser.add_argument("--base", metavar="MODEL", help="of an adapter (default: what the adapter names)")
    parser.add_argument(
        "--template",
        choices=("auto", "chat", "transcript", "plain"),
        default="auto",
        help="how messages are written for the model (default: its chat template where it has one)",
    )
    parser.add_argument("--dtype", choices=("auto", "fp32", "bf16"), help="default: as the run has it, else auto")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="default: as the run has it, else auto")


def within(low: float, high: float = math.inf, *, open_low: bool = False) -> type:
    """An argparse type: a finite number within bounds."""

    def number(text: str) -> float:
        value = float(text)
        if not (low <= value <= high) or not math.isfinite(value) or (open_low and value == low):
            raise argparse.ArgumentTypeError(f"{text} is not within {low:g} and {high:g}")
        return value

    return number  # type: ignore[return-value]


def whole(low: int, high: int | None = None) -> type:
    """An argparse type: a whole number within bounds."""

    def number(text: str) -> int:
        value = int(text)
        if value < low or (high is not None and value > high):
            raise argparse.ArgumentTypeError(
                f"{text} is not {'at least' if high is None else 'within'} {low}"
                + ("" if high is None else f" and {high}")
            )
        return value

    return number  # type: ignore[return-value]


def add_config(parser: argparse.ArgumentParser, what: str, metavar: str = "CONFIG") -> None:
    """The config that a command reads, and settings that override its own."""
    parser.add_argument("config", metavar=metavar, help=what)
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],  # without one, argparse calls them required
        metavar="key.path=value",
        help="settings that override the config's",
    )
