"""`penchant compare`."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from penchant.cli.arguments import add_arguments, options_of
from penchant.requests import HUMANS, CompareRequest


def add(commands: Any) -> None:
    compare = commands.add_parser(
        "compare", help="compare runs with their start and with each other: figures, paired tests, a written verdict"
    )
    compare.add_argument(
        "runs",
        nargs="*",
        default=[],
        metavar="RUN",
        help="run folders; runs that differ only in train.seed count as one setting (none with --judge humans:FILE)",
    )
    add_arguments(compare, CompareRequest)
    compare.add_argument("--json", action="store_true", help="print JSON")
    compare.add_argument("--quiet", action="store_true", help="do not show progress")
    compare.set_defaults(handler=_compare, allocator=True)


def _compare(args: argparse.Namespace) -> int:
    from penchant import api

    if (args.judge or "").startswith(HUMANS):
        return _compare_by_humans(args)
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


def _compare_by_humans(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from penchant.compare.humans import check_no_other_options, judge_by_humans

    options, defaults = options_of(args, CompareRequest), asdict(CompareRequest())
    check_no_other_options(args.judge, {name: value for name, value in options.items() if value != defaults[name]})
    comparison = judge_by_humans(args.judge, args.runs)
    if args.json:
        import json

        print(json.dumps(comparison.to_json(), indent=1, ensure_ascii=False))
    else:
        print(comparison.to_text())
    return 0
