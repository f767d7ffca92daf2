"""`penchant data show`: a file's layout and its first rows as examples."""

from __future__ import annotations

import argparse
from typing import Any


def add(verbs: Any) -> None:
    """Adds `show` to the verbs of `penchant data`."""
    show = verbs.add_parser("show", help="the layout of a file, why, and its first rows as examples")
    show.add_argument("path", metavar="FILE", help="data file, or hub id (owner/name)")
    show.add_argument("-n", "--rows", type=int, default=3, metavar="N", help="rows to show (default: 3)")
    show.add_argument("--shape", default="auto", metavar="NAME", help="layout (default: found from the columns)")
    show.add_argument(
        "--set", action="append", default=[], metavar="name=value", help="an option of the layout (may be given again)"
    )
    show.add_argument(
        "--column", action="append", default=[], metavar="ours=yours", help="a column's name (may be given again)"
    )
    show.add_argument("--json", action="store_true", help="print JSON")
    show.set_defaults(handler=run)


def run(args: argparse.Namespace) -> int:
    """Print the layout and the first rows.

    Raises:
        ConfigError, DataError: a person can mend it.
    """
    import json

    from penchant.data.preview import preview
    from penchant.errors import ConfigError

    if args.rows < 1:
        raise ConfigError("-n", f"is {args.rows}", "give 1 or more")
    columns, options = _pairs(args.column, "--column"), _pairs(args.set, "--set")
    found = preview(args.path, args.rows, shape=args.shape, columns=columns, layout_options=options)
    print(json.dumps(found.to_json(), ensure_ascii=True, indent=1) if args.json else found.to_text())
    return 0


def _pairs(given: list[str], flag: str) -> dict[str, str]:
    from penchant.errors import ConfigError

    for item in given:
        if "=" not in item or item.startswith("="):
            raise ConfigError(flag, f"{item!r} is no name=value", f"write {flag} name=value")
    return {name: value for name, _, value in (item.partition("=") for item in given)}
