"""W&B: a history row for each line, drawn over the optimiser step. `WANDB_MODE=offline` works as wandb has it."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from penchant.tracking.lines import STEP
from penchant.tracking.protocol import Line, RunInfo, Started

EXIT_CODES = {"finished": 0, "paused": 0}  # any other end is a failed run


class WeightsAndBiases:
    """One run of W&B. It gets figures, settings and the sampled answers: no code, no console, no machine's figures."""

    def start(self, info: RunInfo) -> Started:
        import wandb

        settings = wandb.Settings(
            console="off", disable_code=True, disable_git=True, disable_job_creation=True, x_disable_stats=True
        )
        self.run = wandb.init(
            id=info.id or secrets.token_hex(6),
            resume="allow",
            project=info.project,
            name=info.name,
            group=info.group,
            tags=list(info.tags) or None,
            config=dict(info.config),
            dir=info.dir,
            settings=settings,
        )
        # steps of a resumed run need not come in order: each row carries its own
        self.run.define_metric(STEP)
        for names in ("train/*", "eval/*", "perf/*"):
            self.run.define_metric(names, step_metric=STEP)
        url = (self.run.url or "").split("?")[0]
        return Started(str(self.run.id), url or str(self.run.dir).removesuffix("/files"))

    def log(self, lines: Sequence[Line]) -> None:
        for line in lines:
            self.run.log({**line.values, STEP: line.step})

    def finish(self, status: str, summary: Mapping[str, Any], samples: Sequence[Mapping[str, str]]) -> None:
        import wandb

        if samples:
            names: list[str | int] = list(samples[0])
            table = wandb.Table(columns=names, data=[[row.get(str(n)) for n in names] for row in samples])
            self.run.log({"samples": table})
        self.run.summary.update({**summary, "status": status})
        self.run.finish(exit_code=EXIT_CODES.get(status, 1))
