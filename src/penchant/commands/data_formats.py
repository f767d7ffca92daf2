"""`penchant data formats`: the layouts that can be read."""

from __future__ import annotations

import argparse
from typing import Any


def add(verbs: Any) -> None:
    """Adds `formats` to the verbs of `penchant data`."""
    formats = verbs.add_parser("formats", help="list the layouts of rows that can be read, or describe one")
    formats.add_argument("name", nargs="?", metavar="NAME", help="one layout: columns, options, an example")
    formats.add_argument("--json", action="store_true", help="print JSON")
    formats.add_argument("--markdown", action="store_true", help="the page docs/data_formats.md")
    formats.set_defaults(handler=run)


def run(args: argparse.Namespace) -> int:
    """Print what was asked for.

    Raises:
        ConfigError: there is no such layout.
    """
    import json

    from penchant.data.layouts import LAYOUTS
    from penchant.data.layouts.page import as_json, describe, find, markdown, text

    if args.markdown:
        print(markdown(), end="")
    elif args.json:
        found = [find(args.name)] if args.name else LAYOUTS.values()
        print(json.dumps([as_json(layout) for layout in found], ensure_ascii=False, indent=1))
    else:
        print(describe(args.name) if args.name else text())
    return 0
