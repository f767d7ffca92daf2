"""`penchant data show`: a file's layout and its first rows as examples."""

from __future__ import annotations

import argparse
from typing import Any

from penchant.commands import columns


def add(verbs: Any) -> None:
    """Adds `show` to the verbs of `penchant data`."""
    show = verbs.add_parser("show", help="the layout of a file, why, and its first rows as examples")
    show.add_argument("path", metavar="FILE", help="data file, or hub id (owner/name)")
    show.add_argument("-n", "--rows", type=int, default=3, metavar="N", help="rows to show (default: 3)")
    show.add_argument("--shape", default="auto", metavar="NAME", help="layout (default: found from the columns)")
    show.add_argument(
        "--set", action="append", default=[], metavar="name=value", help="an option of the layout (may be given again)"
    )
    columns.add(show)
    show.add_argument("--json", action="store_true", help="print JSON")
    show.set_defaults(handler=run)


def run(args: argparse.Namespace) -> int:
    """Print the layout and the first rows.

    Raises:
        ConfigError, DataError: a person can mend it.
    """
    import json

    from penchant.data.layouts.page import preview
    from penchant.errors import ConfigError

    if args.rows < 1:
        raise ConfigError("-n", f"is {args.rows}", "give 1 or more")
    named, options = columns.pairs(args.columns), columns.pairs(args.set, "--set")
    found = preview(args.path, args.rows, shape=args.shape, columns=named, layout_options=options)
    print(json.dumps(found.to_json(), ensure_ascii=True, indent=1) if args.json else found.to_text())
    return 0
