"""`penchant data fix`: a cleaned copy of a file."""

from __future__ import annotations

import argparse
from typing import Any

from penchant.commands import columns


def add(verbs: Any) -> None:
    """Add the command."""
    fix = verbs.add_parser("fix", help="write a cleaned copy of a data file, and a list of every row it touched")
    fix.add_argument("source", metavar="IN", help="a data file; it is never written to")
    fix.add_argument("output", metavar="OUT", help="the copy: JSONL, or Parquet where IN is Parquet")
    fix.add_argument(
        "--drop",
        metavar="RULES",
        default="",
        help="beyond the safe ones (bad_rows, empty, identical, duplicates): near_duplicates, contradictions, "
        "near_contradictions, cycles, secrets, pii, leakage; separated by commas",
    )
    fix.add_argument("--keep", metavar="RULES", default="", help="safe rules that are not to be used")
    fix.add_argument("--redact", metavar="KINDS", default="", help="mask values of rows that stay: pii, secrets")
    fix.add_argument(
        "--against",
        metavar="FILE",
        action="append",
        default=[],
        help="for --drop leakage: a split whose prompts go (again for more)",
    )
    fix.add_argument("--shape", default="auto", help="layout of a row (default: told by the columns)")
    columns.add(fix)
    fix.add_argument("--overwrite", action="store_true", help="OUT may be there already")
    fix.add_argument("--json", action="store_true", help="print JSON")
    fix.set_defaults(handler=run)


def run(args: argparse.Namespace) -> int:
    """Fix and print."""
    import json

    from penchant import api

    result = api.fix(
        args.source,
        args.output,
        drop=_names(args.drop),
        keep=_names(args.keep),
        redact=_names(args.redact),
        against=args.against,
        shape=args.shape,
        columns=columns.pairs(args.columns),
        overwrite=args.overwrite,
    )
    print(json.dumps(result.to_json(), indent=1) if args.json else result.to_text())
    return 0


def _names(given: str) -> list[str]:
    return [name for name in given.replace(" ", "").split(",") if name]
