"""A run's metrics sent to trackers after it was trained: what they do not have yet, or all of it to a new run of theirs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from penchant.config import load_config
from penchant.errors import CheckpointError, ConfigError
from penchant.tracking import TRACKERS, Mirrors, check_installed
from penchant.training.options import LoggingConfig
from penchant.training.runfolder import RunLock

CONFIG, METRICS = "config.resolved.yaml", "metrics.jsonl"


def track_run(
    run: str | Path,
    to: Sequence[str],
    *,
    anew: bool = False,
    say: Callable[[str], None] = lambda _: None,
    **settings: Any,
) -> bool:
    """Send a run's `metrics.jsonl` and `perf.jsonl` to trackers.

    Args:
        run: its folder; to: names of trackers; anew: to a new run of theirs, with every line, rather than what theirs lacks.
        say: where a person reads; settings: of the `logging` section, in place of the run's own (None: its own).

    Returns:
        Whether every line was sent.

    Raises:
        CheckpointError: no run there, or one that goes on. ConfigError: no such tracker, or it is not installed.
    """
    folder = Path(run).expanduser()
    if not (folder / CONFIG).exists() or not (folder / METRICS).exists():
        raise CheckpointError(str(run), "is no run that has begun", f"give a folder with {CONFIG} and {METRICS}")
    unknown = [name for name in to if name not in TRACKERS]
    if unknown or not to:
        raise ConfigError("--to", f"{(unknown or ['nothing'])[0]} is no tracker", f"there are {', '.join(TRACKERS)}")
    check_installed(to, "--to")
    config = load_config(folder / CONFIG)
    given = {name: value for name, value in settings.items() if value is not None}
    logging = LoggingConfig.model_validate({**config.logging.model_dump(), **given, "trackers": list(to)})
    with RunLock(folder):
        mirrors = Mirrors(folder, logging, config.model_dump(mode="json"), say)
        mirrors.begin(anew=anew)
        return mirrors.finish(_status(folder), _last_eval(folder), patient=True)


def _status(folder: Path) -> str:
    try:
        found = str(json.loads((folder / "manifest.json").read_text())["status"])
    except (OSError, ValueError, KeyError, TypeError):
        return "killed"
    return "killed" if found == "running" else found  # it says so and holds no lock: its process is gone


def _last_eval(folder: Path) -> Mapping[str, Any]:
    last: Mapping[str, Any] = {}
    for text in (folder / METRICS).read_bytes().split(b"\n"):
        try:
            row = json.loads(text)
        except ValueError:
            continue
        if isinstance(row, dict) and row.get("kind") == "eval":
            last = row
    return last
