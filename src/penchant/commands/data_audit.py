"""`penchant data audit`: the rows of a config, or files in one pass."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from penchant.commands import columns

YAML = (".yaml", ".yml")


def add(verbs: Any) -> None:
    """Add the command."""
    audit = verbs.add_parser("audit", help="count duplicates, contradictions, leakage, truncation, bias, personal data")
    audit.add_argument("paths", nargs="*", metavar="PATH", help="a CONFIG.yaml (and key.path=value), or data files")
    audit.add_argument(
        "--split",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="a file and the name of its split (may be given again): counts prompts that stand in two",
    )
    audit.add_argument(
        "--reward", metavar="REWARD", help="estimate label noise: sentiment, path.py:function, a reward model's run"
    )
    audit.add_argument(
        "--check",
        metavar="FILE.py:FUNCTION",
        help="your own test of texts, e.g. for toxicity: a list of texts in, bools or numbers out",
    )
    audit.add_argument("--shape", default="auto", help="layout of a row (default: told by the columns)")
    columns.add(audit)
    audit.add_argument("--limit", type=int, metavar="N", help="read the first N rows of each split only")
    audit.add_argument("--no-languages", action="store_true", help="do not guess languages")
    audit.add_argument("--json", nargs="?", const="-", metavar="FILE", help="write JSON (default: to the terminal)")
    audit.add_argument("--html", metavar="FILE", help="write a page of its own")
    audit.set_defaults(handler=run)


def run(args: argparse.Namespace) -> int:
    """Audit and print."""
    from penchant import api
    from penchant.errors import ConfigError

    paths = list(args.paths)
    if args.json not in (None, "-") and ("=" in args.json or args.json.endswith((*YAML, ".jsonl", ".parquet"))):
        paths, args.json = [*paths, args.json], "-"  # it stood behind a bare --json
    if not paths and not args.split:
        raise ConfigError("data audit", "no file is given", "give a CONFIG.yaml, data files or --split NAME=FILE")
    if paths and paths[0].endswith(YAML):
        for name, key in (("split", "eval_path"), ("limit", "limit"), ("columns", "columns")):
            if getattr(args, name):
                flag = "--column" if name == "columns" else f"--{name}"
                raise ConfigError(flag, "goes with data files, not with a config", f"set data.{key} there")
        result = api.audit(paths[0], *paths[1:], reward=args.reward, check=args.check, languages=not args.no_languages)
    else:
        result = api.audit_files(
            *paths,
            splits=_splits(args.split),
            shape=args.shape,
            columns=columns.pairs(args.columns),
            limit=args.limit,
            reward=args.reward,
            check=args.check,
            languages=not args.no_languages,
        )
    if args.html:
        print(f"written: {api.audit_page(result, args.html)}", file=sys.stderr)
    if args.json:
        _json(result, args.json)
    if args.json != "-":
        print(result.to_text())
    return 0


def _json(result: Any, where: str) -> None:
    import json
    from pathlib import Path

    text = json.dumps(result.to_json(), indent=1)
    if where == "-":
        print(text)
    else:
        Path(where).write_text(text + "\n", encoding="utf-8")
        print(f"written: {where}", file=sys.stderr)


def _splits(given: list[str]) -> dict[str, str]:
    from penchant.errors import ConfigError

    splits: dict[str, str] = {}
    for one in given:
        name, equals, path = one.partition("=")
        if not (name and equals and path) or name in splits:
            what = f"{one!r} names no split" if name not in splits else f"{name!r} is given twice"
            raise ConfigError("--split", what, "write --split train=train.jsonl --split test=test.jsonl")
        splits[name] = path
    return splits
