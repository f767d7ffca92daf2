"""`penchant data get, formats, show, audit, fix`."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from penchant.cli.arguments import add_arguments, add_columns, column_pairs, flags_given, number_type, options_of
from penchant.requests import FixRequest, GetRequest, workers_in


def add(commands: Any) -> None:
    """Declare the verbs of `penchant data`."""
    data = commands.add_parser("data", help="get data, and inspect it before you train on it")
    verbs = data.add_subparsers(dest="verb", metavar="VERB", required=True)
    for add_verb in (_add_get, _add_formats, _add_show, _add_audit, _add_fix):
        add_verb(verbs)


# ---- `penchant data get`: its arguments and its handler ----


def _add_get(subparsers: Any) -> None:
    get = subparsers.add_parser(
        "get", help="fetch a published data set, or read a copy of it, and write train, validation and test rows"
    )
    add_arguments(get, GetRequest)
    get.set_defaults(handler=_get, parser=get)


def _get(args: argparse.Namespace) -> int:
    if not args.name:
        from penchant.download.catalogue import table
        from penchant.errors import ConfigError

        if given := flags_given(args, args.parser):
            how = "add one, such as owner/name; without any option, the catalog is listed"
            raise ConfigError(", ".join(given.values()), "goes with a NAME, and the NAME is missing", how)
        print(table())
        return 0
    from penchant import api
    from penchant.download import summary

    result = api.get_data(**options_of(args, GetRequest))
    if not result.fresh:
        print(f"penchant: {result.folder} holds this already; nothing was done", file=sys.stderr)
    print(summary(result))
    return 0


# ---- `penchant data formats`: the layouts that can be read ----


def _add_formats(subparsers: Any) -> None:
    formats = subparsers.add_parser("formats", help="list the row layouts that can be read, or describe one")
    formats.add_argument("name", nargs="?", metavar="NAME", help="describe one layout: columns, options, an example")
    formats.add_argument("--json", action="store_true", help="print JSON")
    formats.add_argument("--markdown", action="store_true", help="print docs/data_formats.md")
    formats.set_defaults(handler=_formats)


def _formats(args: argparse.Namespace) -> int:
    import json

    from penchant.data.layouts import LAYOUTS, layout_named
    from penchant.data.layouts.page import as_json, describe, markdown, text

    if args.markdown:
        print(markdown(), end="")
    elif args.json:
        layouts = [layout_named(args.name, "data formats")] if args.name else LAYOUTS.values()
        print(json.dumps([as_json(layout) for layout in layouts], ensure_ascii=False, indent=1))
    else:
        print(describe(args.name) if args.name else text())
    return 0


# ---- `penchant data show`: a file's layout and its first rows as examples ----


def _add_show(subparsers: Any) -> None:
    show = subparsers.add_parser(
        "show", help="show how a file's rows are read: the layout, why it was chosen, and the first examples"
    )
    show.add_argument("path", metavar="FILE", help="data file, or hub id (owner/name)")
    show.add_argument("-n", "--rows", type=number_type(int), default=3, metavar="N", help="rows to show (default: 3)")
    show.add_argument(
        "--shape", default="auto", metavar="NAME", help="layout of the rows (default: detected from the columns)"
    )
    show.add_argument(
        "--set", action="append", default=[], metavar="name=value", help="an option of the layout (repeatable)"
    )
    add_columns(show)
    show.add_argument("--json", action="store_true", help="print JSON")
    show.set_defaults(handler=_show, parser=show)


def _show(args: argparse.Namespace) -> int:
    import json

    from penchant.data.layouts.page import preview
    from penchant.errors import ConfigError

    if args.rows < 1:
        raise ConfigError("-n", f"is {args.rows}", "give 1 or more")
    columns, options = column_pairs(args.columns), column_pairs(args.set, "--set")
    sample = preview(args.path, args.rows, shape=args.shape, columns=columns, layout_options=options)
    print(json.dumps(sample.to_json(), ensure_ascii=True, indent=1) if args.json else sample.to_text())
    return 0


# ---- `penchant data audit`: the rows of a config, or files in one pass ----

YAML = (".yaml", ".yml")


def _add_audit(subparsers: Any) -> None:
    audit = subparsers.add_parser(
        "audit", help="count duplicates, contradictions, leakage, truncation, bias, personal data"
    )
    audit.add_argument("paths", nargs="*", metavar="PATH", help="a CONFIG.yaml (and key.path=value), or data files")
    audit.add_argument(
        "--split",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="a file and the name of its split (repeatable); prompts found in two splits are counted",
    )
    audit.add_argument(
        "--reward", metavar="REWARD", help="estimate label noise: sentiment, path.py:function, a reward model's run"
    )
    audit.add_argument(
        "--check",
        metavar="FILE.py:FUNCTION",
        help="your own check, for example for toxicity: takes a list of texts, returns bools or numbers",
    )
    audit.add_argument("--shape", default="auto", help="layout of the rows (default: detected from the columns)")
    add_columns(audit)
    audit.add_argument("--limit", type=number_type(int), metavar="N", help="read only the first N rows of each split")
    audit.add_argument(
        "--workers",
        metavar="N",
        help="processes that share large files, or ray: those of a cluster (default: one per core)",
    )
    audit.add_argument("--no-languages", action="store_true", help="do not guess languages")
    audit.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="write JSON to a file, or to the terminal if none is given"
    )
    audit.add_argument(
        "--places",
        type=number_type(int, low=0, high=1000),
        default=20,
        metavar="N",
        help="places listed per finding in the JSON, up to 1000 (default: 20)",
    )
    audit.add_argument(
        "--all", action="store_true", help="show every count, with those that found nothing, and lengths"
    )
    audit.add_argument("--html", metavar="FILE", help="also write an HTML page")
    audit.set_defaults(handler=_audit, parser=audit)


def _audit(args: argparse.Namespace) -> int:
    import json

    from penchant import api
    from penchant.base.files import AUDITED, PAGE, check_output, write_output
    from penchant.errors import OPTIONS, ConfigError

    paths = list(args.paths)
    if args.json not in (None, "-") and ("=" in args.json or args.json.endswith((*YAML, ".jsonl", ".parquet"))):
        paths, args.json = [*paths, args.json], "-"  # the path came after a bare --json
    if not paths and not args.split:
        raise ConfigError("data audit", "no file is given", "give a CONFIG.yaml, data files or --split NAME=FILE")
    inputs = (*paths, *_parse_splits(args.split).values(), args.reward, args.check)
    for path, own_start in ((args.json, AUDITED), (args.html, PAGE)):
        if path not in (None, "-"):
            check_output(path, own_start, inputs)
    if paths and paths[0].endswith(YAML):
        for name, flag in flags_given(args, args.parser).items():
            if name in ("split", "limit", "columns", "shape", "workers"):
                key = {"split": "eval_path"}.get(name, name)
                raise ConfigError(flag, "goes with data files, not with a config", f"set data.{key} there")
        OPTIONS.set(None)  # the settings are the config's
        result = api.audit(paths[0], *paths[1:], reward=args.reward, check=args.check, languages=not args.no_languages)
    else:
        result = api.audit_files(
            *paths,
            splits=_parse_splits(args.split),
            shape=args.shape,
            columns=column_pairs(args.columns),
            limit=args.limit,
            reward=args.reward,
            check=args.check,
            languages=not args.no_languages,
            workers=workers_in(args.workers) if args.workers else None,
        )
    if args.html:
        print(f"written: {api.audit_page(result, args.html)}", file=sys.stderr)
    json_text = json.dumps(result.to_json(args.places), indent=1) + "\n" if args.json else ""
    if args.json == "-":
        print(json_text, end="")
        return 0
    if args.json:
        print(f"written: {write_output(args.json, json_text)}", file=sys.stderr)
    print(result.to_text(whole=args.all))
    return 0


def _parse_splits(items: list[str]) -> dict[str, str]:
    from penchant.errors import ConfigError

    splits: dict[str, str] = {}
    for item in items:
        name, equals, path = item.partition("=")
        if not (name and equals and path) or name in splits:
            what = f"{item!r} names no split" if name not in splits else f"{name!r} is given twice"
            how = "give each file a name: --split train=train.jsonl --split test=test.jsonl"
            raise ConfigError("--split", what, how)
        splits[name] = path
    return splits


# ---- `penchant data fix`: a cleaned copy of a file ----


def _add_fix(subparsers: Any) -> None:
    fix = subparsers.add_parser("fix", help="write a cleaned copy of a data file, and a list of every row it touched")
    add_arguments(fix, FixRequest)
    fix.add_argument("--json", action="store_true", help="print JSON")
    fix.set_defaults(handler=_fix, parser=fix)


def _fix(args: argparse.Namespace) -> int:
    import json

    from penchant import api

    result = api.fix(**options_of(args, FixRequest))
    print(json.dumps(result.to_json(), indent=1) if args.json else result.to_text())
    return 0
