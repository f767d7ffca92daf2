"""`penchant report`, `penchant flags`, `penchant watch`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from penchant.cli.arguments import number_type


def add(commands: Any) -> None:
    report = commands.add_parser(
        "report", help="write the report of runs, a sweep, a pipeline or a comparison: one HTML file"
    )
    report.add_argument("paths", nargs="+", metavar="PATH", help="folder of a run, a sweep, a pipeline or a comparison")
    report.add_argument(
        "--output",
        metavar="FILE",
        help="where to write it (default: report.html in PATH, or in the current folder for several)",
    )
    report.set_defaults(handler=_report)

    flags = commands.add_parser("flags", help="list what to know before you trust a run or a comparison, with evidence")
    flags.add_argument(
        "path", metavar="RUN or COMPARISON", nargs="?", help="a run's folder, or one with a comparison.json"
    )
    flags.add_argument("--json", action="store_true", help="print JSON")
    flags.add_argument("--rules", action="store_true", help="list the rules and their thresholds, as in docs/trust.md")
    flags.set_defaults(handler=_flags)

    watch = commands.add_parser(
        "watch", help="follow runs in the terminal: progress, curves, figures, latest completions"
    )
    watch.add_argument(
        "paths", nargs="+", metavar="RUN", help="folder of a run, a sweep or a pipeline; or several runs"
    )
    watch.add_argument("--once", action="store_true", help="print one frame and exit")
    watch.add_argument(
        "--interval",
        type=number_type(float),
        default=2.0,
        metavar="SECONDS",
        help="seconds between two frames (default: 2)",
    )
    watch.set_defaults(handler=_watch)


def _report(args: argparse.Namespace) -> int:
    from penchant import api
    from penchant.runfolder import damage_notes

    page = api.report(*args.paths, output=args.output)
    for sentence in (s for path in args.paths for s in damage_notes(Path(path))):
        print(sentence, file=sys.stderr)
    print(page)
    return 0


def _flags(args: argparse.Namespace) -> int:
    from penchant import api
    from penchant.errors import ConfigError
    from penchant.flags import format_flags, markdown
    from penchant.runfolder import damage_notes

    if args.rules:
        print(markdown(), end="")
        return 0
    if args.path is None:
        raise ConfigError("flags", "no folder is given", "give a run's folder, one with a comparison.json, or --rules")
    flags = api.flags(args.path)
    for sentence in damage_notes(Path(args.path)):
        print(sentence, file=sys.stderr)
    if args.json:
        import json

        print(json.dumps([f.to_json() for f in flags], indent=1))
    else:
        print(format_flags(flags))
    return 0


def _watch(args: argparse.Namespace) -> int:
    from penchant.watch import watch

    return watch(args.paths, once=args.once, interval=args.interval)
