"""`penchant pipeline`, `penchant sweep`."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from penchant.cli.arguments import add_config, number_type


def add(commands: Any) -> None:
    pipeline = commands.add_parser(
        "pipeline", help="train several stages from one file and compare them; run it again to resume"
    )
    add_config(pipeline, "PIPELINE.yaml")
    pipeline.add_argument("--plan", action="store_true", help="print what would be done, without doing it")
    pipeline.add_argument("--only", metavar="STAGE", help="train only this stage; the stages it uses must be done")
    pipeline.add_argument(
        "--redo",
        metavar="STAGE",
        action="append",
        default=[],
        help="retrain this stage and every stage that uses it; the old folders are moved aside (repeatable)",
    )
    pipeline.add_argument("--quiet", action="store_true", help="do not show progress")
    pipeline.set_defaults(handler=_pipeline, allocator=True, reads="pipeline")

    sweep = commands.add_parser(
        "sweep", help="train one config with many settings and compare them; run it again to resume"
    )
    overrides_help = "settings for every run; key.path=a,b,c varies the key"
    add_config(sweep, "SWEEP.yaml, or a run's CONFIG.yaml", overrides=overrides_help)
    sweep.add_argument(
        "--jobs",
        type=number_type(int, low=1),
        metavar="N",
        help="how many runs to train at a time, each on its share of the cores (default: 1; on a cluster all of them)",
    )
    sweep.add_argument(
        "--on",
        choices=("local", "slurm", "ray"),
        help="who trains the runs: this machine, or a cluster (cluster.on=...)",
    )
    sweep.add_argument("--plan", action="store_true", help="print what would be done, without doing it")
    sweep.add_argument("--quiet", action="store_true", help="do not show progress")
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

    overrides = args.overrides if args.on is None else [*args.overrides, f"cluster.on={args.on}"]
    if args.plan:
        print(api.sweep_plan(args.config, *overrides))
        return 0
    result = api.sweep(args.config, *overrides, jobs=args.jobs, quiet=args.quiet)
    print(result.to_text())
    print(f"report: {result.folder / 'report.html'}", file=sys.stderr)
    return 0
