"""`penchant export`: a run's model in the forms that others load."""

from __future__ import annotations

import argparse
import sys
from typing import Any


def add(commands: Any) -> None:
    """The command's arguments."""
    parser = commands.add_parser(
        "export", help="write a run's model as safetensors, pt, merged, adapter or gguf, checked and with a model card"
    )
    parser.add_argument("run", metavar="RUN", help="a run's folder, or a checkpoint in it")
    parser.add_argument("--to", required=True, metavar="FORMAT", help="safetensors, pt, merged, adapter or gguf")
    parser.add_argument("--step", default="last", help="last, best or a number (default: last)")
    parser.add_argument("--output", metavar="FOLDER", help="(default: RUN/export/step-N-FORMAT)")
    parser.add_argument("--dtype", default="auto", help="fp32, bf16, fp16; gguf also q8_0 (default: as it is stored)")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of a safetensors file (default: 5GB)")
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload the folder to the hub (token: HF_TOKEN or login)")
    parser.add_argument("--private", action="store_true", help="where --push makes the repository")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(handler=_export)


def _export(args: argparse.Namespace) -> int:
    from penchant import api

    def say(text: str) -> None:
        print(f"note: {text}", file=sys.stderr)

    options = {name: getattr(args, name) for name in ("step", "output", "dtype", "max_shard_size", "push", "private")}
    result = api.export(args.run, to=args.to, say=say, **options)
    if args.json:
        import json

        about = {"folder": str(result.folder), "format": result.format, "dtype": result.dtype, "step": result.step}
        print(json.dumps({**about, "check": result.check.to_json(), "notes": list(result.notes), "url": result.url}))
        return 0
    print(f"{result.folder}: step {result.step} as {result.format} in {result.dtype}")
    print(result.check.to_text())
    if result.url is not None:
        print(result.url)
    return 0
