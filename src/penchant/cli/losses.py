"""`penchant losses`."""

from __future__ import annotations

import argparse
from typing import Any


def add(commands: Any) -> None:
    losses = commands.add_parser("losses", help="list the losses with their formulas and hyperparameters")
    losses.add_argument("name", nargs="?", help="describe one loss in full")
    losses.add_argument("--markdown", action="store_true", help="print docs/losses.md")
    losses.set_defaults(handler=_losses)


def _losses(args: argparse.Namespace) -> int:
    from penchant.losses import page

    if args.markdown:
        print(page.markdown(), end="")
    else:
        print(page.text() if args.name is None else page.describe(args.name))
    return 0
