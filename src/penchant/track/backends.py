"""The trackers: W&B, TensorBoard, MLflow and Trackio."""

from __future__ import annotations

import json
import os
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from penchant.runfolder.values import flatten
from penchant.track.tracker import STEP, Line, RunInfo, Started

# ---- W&B: one history row per line, plotted over the optimizer step. `WANDB_MODE=offline` works as usual ----

EXIT_CODES = {"finished": 0, "paused": 0}  # any other status is a failed run


class WeightsAndBiases:
    """A W&B run. It receives metrics, settings and sampled answers, but no code, console output or system metrics."""

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
        # the steps of a resumed run may be out of order, so each row carries its own
        self.run.define_metric(STEP)
        for pattern in ("train/*", "eval/*", "perf/*"):
            self.run.define_metric(pattern, step_metric=STEP)
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


# ---- TensorBoard: event files, written without torch ----


class TensorBoard:
    """A folder of event files; a resumed run adds another file to it."""

    def start(self, info: RunInfo) -> Started:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        folder = Path(info.dir) / "tensorboard" / info.id if info.id else self._unused_folder(info)
        self.writer = EventFileWriter(str(folder))
        if info.id is None:
            self._text("config", json.dumps(info.config, indent=1), 0)
        self.writer.flush()
        return Started(os.path.relpath(folder, Path(info.dir) / "tensorboard"), str(folder))  # a name may have slashes

    def _unused_folder(self, info: RunInfo) -> Path:
        """Return a folder that no earlier run has used, since curves of two runs in one folder would mix."""
        root = Path(info.dir) / "tensorboard"
        names = (info.name if i == 1 else f"{info.name}-{i}" for i in range(1, 10_000))
        return next(root / name for name in names if not (root / name).exists())

    def log(self, lines: Sequence[Line]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        for line in lines:
            values = [Summary.Value(tag=name, simple_value=value) for name, value in line.values.items()]
            self.writer.add_event(Event(wall_time=time.time(), step=line.step, summary=Summary(value=values)))
        self.writer.flush()

    def finish(self, status: str, summary: Mapping[str, Any], samples: Sequence[Mapping[str, str]]) -> None:
        self._text("status", status, int(summary.get("step", 0)))
        self.writer.close()

    def _text(self, tag: str, text: str, step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.plugins.text.summary_v2 import text_pb

        # indented by four spaces: the text plugin renders Markdown, and a user's names must not become markup
        indented = "\n".join(f"    {line}" for line in text.split("\n"))
        self.writer.add_event(Event(wall_time=time.time(), step=step, summary=text_pb(tag, indented)))


# ---- MLflow: a run of the experiment named like the project, in `MLFLOW_TRACKING_URI` or in a SQLite file of its own ----

STATUS = {"finished": "FINISHED", "paused": "FINISHED", "stopped": "FAILED"}  # any other status becomes KILLED
# MLflow's limits: metrics and parameters per request, characters of a value and of a name
METRICS, PARAMS, LONGEST, LONGEST_NAME = 1000, 100, 6000, 250


def mlflow_name(name: str) -> str:
    """The name of a parameter, metric or tag as MLflow accepts it: a reward is named by its expression, such as ``matches:^[0-9]+$``."""
    parts = re.sub(r"[^\w./ :-]", "_", name).split("/")
    return "/".join(part if part.strip(".") else "_" for part in parts)[:LONGEST_NAME].rstrip("/")


class MLflow:
    """An MLflow run, through a client of its own, so that no global state is set."""

    def start(self, info: RunInfo) -> Started:
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path(info.dir) / 'mlflow.db'}"
        self.client = MlflowClient(tracking_uri=uri)
        if info.id is not None:
            self.id = info.id
            self.client.update_run(self.id, status="RUNNING")
            return Started(self.id, uri)
        existing = self.client.get_experiment_by_name(info.project)
        experiment = existing.experiment_id if existing else self.client.create_experiment(info.project)
        tags = {"mlflow.source.name": "penchant", **dict.fromkeys(map(mlflow_name, info.tags), "true")}
        if info.group:
            tags["group"] = info.group
        self.id = self.client.create_run(experiment, run_name=info.name, tags=tags).info.run_id
        settings = {mlflow_name(name): str(value)[:LONGEST] for name, value in flatten(info.config).items()}
        params = [Param(*setting) for setting in settings.items()]
        for start in range(0, len(params), PARAMS):
            self.client.log_batch(self.id, params=params[start : start + PARAMS])
        return Started(self.id, uri)

    def log(self, lines: Sequence[Line]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [
            Metric(mlflow_name(name), value, now, line.step) for line in lines for name, value in line.values.items()
        ]
        for start in range(0, len(metrics), METRICS):
            self.client.log_batch(self.id, metrics=metrics[start : start + METRICS])

    def finish(self, status: str, summary: Mapping[str, Any], samples: Sequence[Mapping[str, str]]) -> None:
        self.client.set_tag(self.id, "status", status)
        self.client.set_terminated(self.id, status=STATUS.get(status, "KILLED"))


# ---- Trackio: a local database for `trackio show`, or the Space or server that trackio's own variables name ----


class Trackio:
    """A Trackio run. A random suffix makes its name unique, since a project may have many runs of one name."""

    def start(self, info: RunInfo) -> Started:
        if info.own_dir:  # otherwise the default place, where `trackio show` looks
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
