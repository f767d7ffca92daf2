"""`penchant import`: translates another tool's config."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from penchant.cli.arguments import add_config, number_type


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "import", help="translate a config of TRL, LLaMA-Factory, Axolotl or ms-swift; every key is accounted for"
    )
    add_config(
        parser,
        "the other tool's file: YAML, JSON (args.json), or a shell script with its command",
        "FILE",
        "settings of Penchant to add or to change",
    )
    parser.add_argument(
        "--from",
        dest="source",
        default="auto",
        metavar="TOOL",
        help="trl, llama-factory, axolotl, ms-swift, flat or auto (default)",
    )
    parser.add_argument(
        "--method", default="auto", help="which trainer the file is for, if it does not say: sft, dpo, grpo ..."
    )
    parser.add_argument(
        "--devices",
        type=number_type(int, low=1),
        default=1,
        metavar="N",
        help="number of GPUs that its run used (default: 1)",
    )
    parser.add_argument("--output", metavar="FILE.yaml", help="where to write the config (default: print it)")
    parser.add_argument("--force", action="store_true", help="overwrite an existing file")
    parser.add_argument("--strict", action="store_true", help="write nothing if a key is not supported")
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace) -> int:
    """Translate the config, write it, and report on every key (on stderr if the config is printed)."""
    from pathlib import Path

    from penchant.base.files import check_output, write_output
    from penchant.errors import ConfigError
    from penchant.importers import import_config

    translation = import_config(args.config, args.source, args.method, args.devices, args.overrides)
    if args.strict and translation.unsupported:
        print(translation.text, file=sys.stderr)
        what = f"{translation.unsupported} key(s) are not supported"
        raise ConfigError(args.config, what, "fix them, or leave out --strict")
    if args.output is None:
        print(translation.text, file=sys.stderr)
        print(translation.yaml, end="")
        return 0
    check_output(args.output, "[\\s\\S]", [args.config])
    if Path(args.output).exists() and not args.force:
        raise ConfigError(args.output, "already exists", "give another name, or --force")
    path = write_output(args.output, translation.yaml)
    print(translation.text)
    print(f"\nwritten to {path}; look through it, then: penchant train {path}")
    return 0
