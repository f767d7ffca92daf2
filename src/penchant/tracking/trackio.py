"""Trackio: a local database that `trackio show` draws; a Space or a server where trackio's own variables name one."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from penchant.tracking.protocol import Line, RunInfo, Started


class Trackio:
    """One run of Trackio; its name there ends with an id of its own, for a project may have many runs of one name."""

    def start(self, info: RunInfo) -> Started:
        if info.own_dir:  # else where `trackio show` looks by itself
            os.environ.setdefault("TRACKIO_DIR", str(Path(info.dir) / "trackio"))
        import trackio

        name = info.id or f"{info.name}-{secrets.token_hex(3)}"
        config = {k: v for k, v in info.config.items() if not k.startswith("_")}
        self.run = trackio.init(
            project=info.project, name=name, group=info.group, config=config, resume="allow", embed=False
        )
        return Started(name, f"trackio show --project {info.project}")

    def log(self, lines: Sequence[Line]) -> None:
        for line in lines:
            self.run.log(dict(line.values), step=line.step)

    def finish(self, status: str, summary: Mapping[str, Any], samples: Sequence[Mapping[str, str]]) -> None:
        self.run.finish()
