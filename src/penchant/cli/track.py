"""`penchant track`: sends the metrics of finished runs to trackers."""

from __future__ import annotations

import argparse
import sys
from typing import Any


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "track", help="send the metrics of finished runs to W&B, TensorBoard, MLflow or Trackio"
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders")
    parser.add_argument(
        "--to",
        required=True,
        action="append",
        metavar="TRACKER",
        help="wandb, tensorboard, mlflow or trackio (repeatable)",
    )
    parser.add_argument(
        "--new", action="store_true", help="send every line to a new run (default: only the missing lines)"
    )
    parser.add_argument("--project", help="project (default: the run's logging.project)")
    parser.add_argument("--name", help="the run's name there (default: the folder's name)")
    parser.add_argument("--group", help="the run's group (default: the sweep or pipeline it belongs to)")
    parser.add_argument("--tag", action="append", dest="tags", metavar="TAG", help="a tag (repeatable)")
    parser.add_argument("--dir", help="where trackers write on this machine (default: RUN/trackers)")
    parser.set_defaults(handler=_track)


def _track(args: argparse.Namespace) -> int:
    from penchant import api

    settings = {name: getattr(args, name) for name in ("project", "name", "group", "tags", "dir")}

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    completed = [api.track(run, *args.to, anew=args.new, say=say, **settings) for run in args.runs]
    return 0 if all(completed) else 2
