"""`penchant pipeline`, `penchant sweep`."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from penchant.cli.arguments import add_config


def add(commands: Any) -> None:
    """The command's arguments."""
    pipeline = commands.add_parser(
        "pipeline", help="train several stages from one file and compare them; run it again to continue"
    )
    add_config(pipeline, "PIPELINE.yaml")
    pipeline.add_argument("--plan", action="store_true", help="print what would be done, and do nothing")
    pipeline.add_argument("--only", metavar="STAGE", help="one stage, whose inputs must be done")
    pipeline.add_argument(
        "--redo",
        metavar="STAGE",
        action="append",
        default=[],
        help="train it anew, and every stage that uses it; their folders are moved aside (may be given again)",
    )
    pipeline.add_argument("--quiet", action="store_true", help="no progress")
    pipeline.set_defaults(handler=_pipeline, allocator=True, reads="pipeline")

    sweep = commands.add_parser(
        "sweep", help="train one config with many settings and compare them; run it again to continue"
    )
    sweep.add_argument("config", metavar="CONFIG", help="SWEEP.yaml, or a run's CONFIG.yaml")
    sweep.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key.path=value",
        help="settings of every run; key.path=a,b,c makes the key vary",
    )
    sweep.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="runs at a time, each with its share of the cores"
    )
    sweep.add_argument("--plan", action="store_true", help="print what would be done, and do nothing")
    sweep.add_argument("--quiet", action="store_true", help="no progress")
    sweep.set_defaults(handler=_sweep, allocator=True, reads="sweep")


def _pipeline(args: argparse.Namespace) -> int:
    from penchant import api

    if args.plan:
        print(api.pipeline_plan(args.config, *args.overrides, redo=args.redo))
        return 0
    result = api.pipeline(args.config, *args.overrides, only=args.only, redo=args.redo, quiet=args.quiet)
    print(result.to_text())
    print(f"report: {api.report(result.folder)}", file=sys.stderr)
    return 0


def _sweep(args: argparse.Namespace) -> int:
    from penchant import api

    if args.plan:
        print(api.sweep_plan(args.config, *args.overrides))
        return 0
    result = api.sweep(args.config, *args.overrides, jobs=args.jobs, quiet=args.quiet)
    print(result.to_text())
    print(f"report: {result.folder / 'report.html'}", file=sys.stderr)
    return 0
