"""`penchant track`: send a run's metrics to trackers afterwards."""

from __future__ import annotations

import argparse
import sys
from typing import Any


def add(commands: Any) -> None:
    """The command's arguments."""
    parser = commands.add_parser("track", help="send runs' metrics to W&B, TensorBoard, MLflow or Trackio afterwards")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders")
    parser.add_argument(
        "--to",
        required=True,
        action="append",
        metavar="TRACKER",
        help="wandb, tensorboard, mlflow or trackio; may be given again",
    )
    parser.add_argument("--new", action="store_true", help="as a new run with every line (default: what it lacks)")
    parser.add_argument("--project", help="(default: the run's logging.project)")
    parser.add_argument("--name", help="of the run there (default: the folder's name)")
    parser.add_argument("--group", help="(default: the sweep or pipeline that it belongs to)")
    parser.add_argument("--tag", action="append", dest="tags", metavar="TAG", help="may be given again")
    parser.add_argument("--dir", help="where trackers write on this machine (default: RUN/trackers)")
    parser.set_defaults(handler=_track)


def _track(args: argparse.Namespace) -> int:
    from penchant import api

    settings = {name: getattr(args, name) for name in ("project", "name", "group", "tags", "dir")}

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    whole = [api.track(run, *args.to, anew=args.new, say=say, **settings) for run in args.runs]
    return 0 if all(whole) else 2
