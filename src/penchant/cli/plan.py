"""`penchant plan`."""

from __future__ import annotations

import argparse
from typing import Any

from penchant.cli.arguments import add_config


def add(commands: Any) -> None:
    plan = commands.add_parser(
        "plan", help="predict a run without training: settings and their sources, steps, memory, disk, time"
    )
    add_config(plan, "CONFIG.yaml")
    plan.add_argument(
        "--gpus",
        metavar="N[,N...]",
        type=_parse_counts,
        default=(),
        help="estimate the memory per GPU with N GPUs, e.g. 8 or 8,16,32",
    )
    plan.add_argument("--no-probe", action="store_true", help="skip the trial steps, and so the estimate of time")
    plan.add_argument("--all", action="store_true", help="show every setting, and everything in parts")
    plan.add_argument("--json", action="store_true", help="print JSON")
    plan.set_defaults(handler=run, allocator=True, reads="run")


def _parse_counts(text: str) -> tuple[int, ...]:
    counts = tuple(int(n) for n in text.split(",") if n.strip().isdigit())
    if not counts or len(counts) != len(text.split(",")) or not all(1 <= n <= 65536 for n in counts):
        raise argparse.ArgumentTypeError(f"{text}: give a number of GPUs, or several: 8,16,32")
    return counts


def run(args: argparse.Namespace) -> int:
    """Print the plan; the exit code is 0 even if the run does not fit."""
    from penchant import api

    plan = api.plan(args.config, *args.overrides, probe=not args.no_probe, gpus=args.gpus)
    if args.json:
        import json

        from penchant.runfolder import nan_to_none

        print(json.dumps(nan_to_none(plan.to_json()), indent=1, ensure_ascii=False))
        return 0
    from penchant.plan import plan_text

    print(plan_text(plan, whole=args.all))
    return 0
