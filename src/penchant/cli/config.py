"""`penchant config`: lists the keys of a config."""

from __future__ import annotations

import argparse
from typing import Any


def add(commands: Any) -> None:
    parser = commands.add_parser("config", help="list every config key with its type, default and meaning")
    parser.add_argument("key", nargs="?", help="a section (train) or one key (train.lr)")
    parser.add_argument("--markdown", action="store_true", help="print docs/config.md")
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace) -> int:
    """Print the keys."""
    from penchant.config import page as config_page

    if args.markdown:
        print(config_page.markdown(), end="")
    else:
        print(config_page.text(args.key))
    return 0
