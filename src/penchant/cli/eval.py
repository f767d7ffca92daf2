"""`penchant eval`."""

from __future__ import annotations

import argparse
from typing import Any

from penchant.cli.arguments import add_arguments, add_config, options_of
from penchant.requests import EvalRequest


def add(commands: Any) -> None:
    evaluate = commands.add_parser(
        "eval", help="evaluate a run, a checkpoint, an adapter or any model; docs/eval.md defines every figure"
    )
    add_config(
        evaluate, "a run, a CONFIG.yaml, the folder of a checkpoint, an adapter or a model, or a hub id", "MODEL"
    )
    add_arguments(evaluate, EvalRequest)
    evaluate.add_argument("--json", action="store_true", help="print JSON")
    evaluate.add_argument("--all", action="store_true", help="print every figure, not the main ones alone")
    evaluate.add_argument("--explain", action="store_true", help="explain each figure")
    evaluate.set_defaults(handler=_evaluate, allocator=True, reads="run")


def _evaluate(args: argparse.Namespace) -> int:
    from penchant import api

    metrics = api.evaluate(args.config, *args.overrides, quiet=args.json, **options_of(args, EvalRequest))
    if args.json:
        import json

        from penchant.runfolder import nan_to_none

        print(json.dumps(nan_to_none(metrics), indent=1))
        return 0
    from penchant.evaluate.output import explain, format_table

    parts = [format_table(metrics, args.all or args.explain), "\n".join(metrics.get("notes", []))]
    if "tables" in metrics:
        from penchant.metrics.heldout import format_quality

        parts.append(format_quality(metrics["tables"]))
    if args.explain:
        parts.append(explain(metrics))
    print("\n\n".join(p for p in parts if p))
    return 0
