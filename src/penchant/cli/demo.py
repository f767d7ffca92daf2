"""`penchant demo`."""

from __future__ import annotations

import argparse
from typing import Any

from penchant.cli.arguments import number_type


def add(commands: Any) -> None:
    demo = commands.add_parser(
        "demo", help="see Penchant work: align the bundled small model offline in about two minutes"
    )
    demo.add_argument("--output", default="runs/demo", help="run folder (default: runs/demo)")
    demo.add_argument("--reviews", help="film reviews (JSONL with a text field) on which perplexity is also measured")
    demo.add_argument(
        "--seed", type=number_type(int, low=0), default=0, help="seed of sampling and training (default: 0)"
    )
    demo.set_defaults(handler=_demo, allocator=True)


def _demo(args: argparse.Namespace) -> int:
    from penchant.demo import run_demo

    return run_demo(args.output, reviews=args.reviews, seed=args.seed)
