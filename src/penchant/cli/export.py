"""`penchant export`."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from penchant.cli.arguments import add_arguments, options_of
from penchant.requests import ExportRequest


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "export", help="export a run's model as safetensors, pt, merged, adapter or gguf, checked, with a model card"
    )
    add_arguments(parser, ExportRequest)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(handler=_export)


def _export(args: argparse.Namespace) -> int:
    from penchant import api

    def say(text: str) -> None:
        print(f"note: {text}", file=sys.stderr)

    result = api.export(say=say, **options_of(args, ExportRequest))
    if args.json:
        import json

        facts = {"folder": str(result.folder), "format": result.format, "dtype": result.dtype, "step": result.step}
        print(json.dumps({**facts, "check": result.check.to_json(), "notes": list(result.notes), "url": result.url}))
        return 0
    print(f"{result.folder}: step {result.step} as {result.format} in {result.dtype}")
    print(result.check.to_text())
    if result.url is not None:
        print(result.url)
    return 0
