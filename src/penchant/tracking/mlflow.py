"""MLflow: a run of an experiment that is called as the project, in `MLFLOW_TRACKING_URI` or a SQLite file of its own."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from penchant.tracking.protocol import Line, RunInfo, Started

STATUS = {"finished": "FINISHED", "paused": "FINISHED", "stopped": "FAILED"}  # the others were killed
METRICS, PARAMS, LONGEST = 1000, 100, 6000  # of one request, as MLflow's servers bound them; characters of a parameter


class MLflow:
    """One run of MLflow, by its client: nothing global is set."""

    def start(self, info: RunInfo) -> Started:
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        where = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path(info.dir) / 'mlflow.db'}"
        self.client = MlflowClient(tracking_uri=where)
        if info.id is not None:
            self.id = info.id
            self.client.update_run(self.id, status="RUNNING")
            return Started(self.id, where)
        known = self.client.get_experiment_by_name(info.project)
        experiment = known.experiment_id if known else self.client.create_experiment(info.project)
        tags = {"mlflow.source.name": "penchant", **dict.fromkeys(info.tags, "true")}
        if info.group:
            tags["group"] = info.group
        self.id = self.client.create_run(experiment, run_name=info.name, tags=tags).info.run_id
        params = [Param(name, str(value)[:LONGEST]) for name, value in flat(info.config)]
        for at in range(0, len(params), PARAMS):
            self.client.log_batch(self.id, params=params[at : at + PARAMS])
        return Started(self.id, where)

    def log(self, lines: Sequence[Line]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, line.step) for line in lines for name, value in line.values.items()]
        for at in range(0, len(metrics), METRICS):
            self.client.log_batch(self.id, metrics=metrics[at : at + METRICS])

    def finish(self, status: str, summary: Mapping[str, Any], samples: Sequence[Mapping[str, str]]) -> None:
        self.client.set_tag(self.id, "status", status)
        self.client.set_terminated(self.id, status=STATUS.get(status, "KILLED"))


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """``train.lr`` for every leaf: MLflow's parameters have no levels."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
