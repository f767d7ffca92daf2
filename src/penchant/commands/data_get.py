"""`penchant data get`: its arguments and its handler."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from penchant.commands import columns


def add(verbs: Any) -> None:
    """Put the command on the parser of `penchant data`."""
    get = verbs.add_parser(
        "get", help="fetch a published data set, or read a copy of it, as train, validation and test rows"
    )
    get.add_argument(
        "name", nargs="?", metavar="NAME", help="of the catalogue, or a hub id (owner/name); none: list it"
    )
    get.add_argument("--from", dest="source", metavar="PATH", help="a copy on this machine: a file or a folder")
    get.add_argument("--subset", action="append", default=[], metavar="NAME", help="may be given again, or all")
    get.add_argument("--revision", metavar="NAME", help="branch, tag or commit (default: the published one)")
    get.add_argument("--output", metavar="FOLDER", help="where to write (default: data/NAME)")
    get.add_argument(
        "--first", type=int, metavar="N", help="read the first N rows only, and fetch no more than they need"
    )
    get.add_argument("--redo", action="store_true", help="make it anew where the folder holds another result")
    get.add_argument("--quiet", action="store_true", help="no progress")
    split = get.add_argument_group("split, by groups of prompts that are equal or nearly so")
    split.add_argument("--split", default="0.9,0.05,0.05", metavar="A,B,C", help="shares (default: 0.9,0.05,0.05)")
    split.add_argument("--seed", type=int, default=0, help="of the split (default: 0)")
    split.add_argument("--published-splits", action="store_true", help="keep them; draw only those that are missing")
    rows = get.add_argument_group("which rows")
    rows.add_argument("--language", action="append", default=[], metavar="NAME", help="as the data has it: English, en")
    rows.add_argument("--redacted", default="keep", help="rows with redacted names: keep, only or drop (default: keep)")
    rows.add_argument(
        "--moderation",
        default="keep",
        metavar="RULE",
        help="keep, drop-flagged, or a score from which rows are dropped",
    )
    turn = get.add_argument_group("what they become")
    turn.add_argument("--as", dest="as_", metavar="KIND", help="sft, prompts or unpaired (default: what the rows are)")
    turn.add_argument(
        "--reward", metavar="REWARD", help="labels answers for --as unpaired: sentiment, a run, path.py:function"
    )
    turn.add_argument("--threshold", type=float, metavar="X", help="an answer is good from this reward on")
    turn.add_argument(
        "--label-with", metavar="PATH.py:FUNCTION", help="labels answers: True, False, or None to leave out"
    )
    turn.add_argument("--layout", metavar="NAME", help="of the rows, as `penchant data formats` lists them")
    columns.add(turn, "--columns", nargs="+")
    turn.add_argument("--set", action="append", default=[], metavar="OPTION=VALUE", help="an option of the layout")
    get.set_defaults(handler=_get)


def _get(args: argparse.Namespace) -> int:
    if args.name is None:
        from penchant.download.catalogue import table

        print(table())
        return 0
    from penchant import api
    from penchant.download import summary
    from penchant.printable import printable

    result = api.get_data(
        args.name,
        output=args.output,
        source=args.source,
        subsets=args.subset,
        revision=args.revision,
        first=args.first,
        split=_numbers(args.split),
        seed=args.seed,
        published_splits=args.published_splits,
        language=args.language,
        redacted=args.redacted,
        moderation=_rule(args.moderation),
        as_=args.as_,
        reward=args.reward,
        threshold=args.threshold,
        label_with=args.label_with,
        layout=args.layout,
        columns=columns.pairs(args.columns),
        options={k: _value(v) for k, v in columns.pairs(args.set, "--set").items()},
        redo=args.redo,
        quiet=args.quiet,
    )
    if not result.fresh:
        print(f"penchant: {result.folder} holds this already; nothing was done", file=sys.stderr)
    for line in summary(result).split("\n"):  # control characters of names and reasons are shown, not obeyed
        print(printable(line))
    return 0


def _numbers(text: str) -> tuple[float, ...]:
    from penchant.errors import ConfigError

    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError("--split", f"is {text!r}", "give three numbers, such as 0.9,0.05,0.05") from error


def _rule(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text


def _value(text: str) -> Any:
    import yaml

    return yaml.safe_load(text)
