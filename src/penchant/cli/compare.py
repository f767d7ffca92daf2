"""`penchant compare`."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from penchant.cli.arguments import add_arguments, options_of
from penchant.requests import CompareRequest


def add(commands: Any) -> None:
    """The command's arguments."""
    compare = commands.add_parser(
        "compare", help="compare runs with their start and with each other: figures, paired tests, a written verdict"
    )
    compare.add_argument(
        "runs", nargs="+", metavar="RUN", help="run folders; runs that differ only in train.seed count as one setting"
    )
    add_arguments(compare, CompareRequest)
    compare.add_argument("--json", action="store_true", help="print JSON")
    compare.add_argument("--quiet", action="store_true", help="do not show progress")
    compare.set_defaults(handler=_compare, allocator=True)


def _compare(args: argparse.Namespace) -> int:
    from penchant import api

    result = api.compare(*args.runs, quiet=args.quiet or args.json, **options_of(args, CompareRequest))
    if args.json:
        import json

        print(json.dumps(result.figures, indent=1, ensure_ascii=False))
        return 0
    if not args.quiet:
        print(f"penchant: written to {result.folder}", file=sys.stderr)
    print(result.to_text())
    print(f"report: {api.report(result.folder)}", file=sys.stderr)
    return 0
