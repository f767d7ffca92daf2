"""Train a sweep's runs on a cluster: the `cluster` section, Slurm jobs (through submitit) and Ray actors."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import Field

from penchant.base.section import Section
from penchant.config import Places, RunConfig, place_of
from penchant.config.several import read_section
from penchant.errors import ConfigError

ORDERS = ".jobs"  # in the sweep's folder: the jobs' orders, results and logs; no run can have this name
SLURM_KEYS, RAY_KEYS = ("partition", "hours", "setup", "options"), ("address",)
ACTIVE_STATES = frozenset(
    {"PENDING", "RUNNING", "REQUEUED", "COMPLETING", "CONFIGURING", "SUSPENDED", "RESIZING", "STAGE_OUT"}
)
QUEUE_AGE = 10.0  # seconds between queries of Slurm's queue; less than `workers.LAG_SECONDS`, so that a lost job is missing from two of them
_NAMESPACE = "penchant"


class ClusterConfig(Section):
    """The `cluster` section."""

    on: Literal["local", "slurm", "ray"] = Field("local", description="who trains the runs: this machine, or a cluster")
    gpus: int | None = Field(None, ge=0, le=1024, description="GPUs of each run; 0: none")
    cpus: int | None = Field(None, ge=1, le=65536, description="cores of each run (default: the cluster's own)")
    memory: float | None = Field(
        None, gt=0, le=1e6, description="host memory of each run in GB (default: the cluster's own)"
    )
    partition: str | None = Field(None, description="Slurm's partition (default: its own)")
    hours: float | None = Field(
        None,
        gt=0,
        le=1e5,
        description="Slurm's time limit of a job (default: 24); a run that reaches it goes on in a new job",
    )
    setup: tuple[str, ...] = Field((), description="Slurm: shell lines before the run starts", strict=False)
    options: dict[str, str | int | float | bool] = Field(
        {}, description="Slurm: more options of sbatch, e.g. {account: lab, constraint: h100}"
    )
    address: str | None = Field(
        None, description="Ray's address, e.g. ray://HOST:10001, or auto (default: $RAY_ADDRESS)"
    )


def read_cluster(values: Mapping[str, Any], places: Places, source: str, runs: Sequence[RunConfig]) -> ClusterConfig:
    """Read the `cluster` section of a sweep.

    Args:
        runs: configs of the runs, or of representative ones.

    Raises:
        ConfigError: an option is malformed or not for this cluster, or the number of GPUs per run is missing or contradicts the runs.
    """
    if values.get("cluster") is None:
        return ClusterConfig()
    config = read_section(ClusterConfig, "cluster", values, places, source, "write cluster: {on: slurm, gpus: 1}")
    place = place_of(("cluster",), places, source)
    if config.on == "local":
        return config
    if config.gpus is None:
        raise ConfigError(place, "cluster.gpus is missing", "say how many GPUs each run gets, e.g. cluster.gpus=1 or 0")
    if config.gpus == 0 and any(c.model.device == "cuda" for c in runs):
        raise ConfigError(place, "cluster.gpus is 0, and model.device is cuda", "set cluster.gpus to 1")
    for name, value in {"partition": config.partition or "", **config.options}.items():
        if not name.replace("-", "").isalnum() or not str(value).isprintable():  # both go into the job's script
            what = f"cluster.options.{name}" if name in config.options else f"cluster.{name}"
            raise ConfigError(place, f"{what!r} is not a one-line option", "write it as sbatch has it, without --")
    other, names = ("Ray", SLURM_KEYS) if config.on == "ray" else ("Slurm", RAY_KEYS)
    for name in names:
        if getattr(config, name):
            what, how = f"cluster.{name} has no meaning for {other}", "leave it out"
            raise ConfigError(place_of(("cluster", name), places, place), what, how)
    return config


class Cluster(Protocol):
    """A cluster that trains runs as jobs. Jobs keep running after the sweep's process has ended."""

    name: str
    title: str  # name of a job in messages: "Slurm job"
    cancel: str  # command that ends jobs, with {} for their ids

    def submit(self, name: str, order: Path) -> str:
        """Submit a job that trains a run, and return its id."""

    def ended(self, job: str, stopped: bool = False) -> str | None:
        """How a job ended, or None if it is pending or running. May lag behind; `stopped`: its run has reported that it stopped."""

    def log(self, job: str, order: Path) -> Path:
        """Path of a job's log."""


def open_cluster(config: ClusterConfig, folder: Path) -> Cluster:
    """Connect to the cluster of a sweep in `folder`.

    Raises:
        ConfigError: the cluster or its Python package is not available.
    """
    return Slurm(config, folder / ORDERS / "slurm") if config.on == "slurm" else Ray(config)


class Slurm:
    """Slurm jobs, submitted with submitit.

    Args:
        folder: for the jobs' scripts and logs.
    """

    name, title, cancel = "slurm", "Slurm job", "scancel {}"
    executor, job_class = "slurm", "SlurmJob"  # submitit's names

    def __init__(self, config: ClusterConfig, folder: Path) -> None:
        try:
            import submitit
        except ImportError as error:
            raise ConfigError("cluster.on", "slurm needs submitit", "pip install 'penchant[slurm]'") from error
        self.folder = folder
        self.kind = getattr(submitit, self.job_class)
        self.jobs: dict[str, Any] = {}
        self.queue: dict[str, str] | None = None
        self.queue_read_at = -math.inf
        hours = 24.0 if config.hours is None else config.hours
        try:
            self.submitter = submitit.AutoExecutor(folder, cluster=self.executor)
            self.submitter.update_parameters(
                timeout_min=max(1, round(hours * 60)),
                gpus_per_node=config.gpus or None,
                cpus_per_task=config.cpus,
                mem_gb=config.memory,
                slurm_partition=config.partition,
                slurm_setup=list(config.setup) or None,
                slurm_additional_parameters={"job-name": "penchant", **config.options},
            )
        except RuntimeError as error:  # no srun
            what = "is slurm, and there is no Slurm here"
            raise ConfigError("cluster.on", what, "run it where sbatch and srun are") from error

    def submit(self, name: str, order: Path) -> str:
        try:
            job = self.submitter.submit(_in_slurm, str(order))
        except Exception as error:  # submitit wraps sbatch's errors in its own classes
            lines = str(error).strip().splitlines()
            what = f"sbatch did not take run {name}: {lines[-1] if lines else error!r}"
            raise ConfigError("cluster", what, "see its options") from error
        self.jobs[job.job_id] = job
        return str(job.job_id)

    def ended(self, job: str, stopped: bool = False) -> str | None:
        slurm_job = self._job(job)
        if stopped:
            slurm_job.get_info(mode="force")
        state = str(slurm_job.state)
        if state == "UNKNOWN" and not stopped:  # not yet in Slurm's accounting, or accounting is off
            queue = self._queue_states()
            state = "PENDING" if queue is None else queue.get(job, "gone from the queue")
        return None if state.split()[0] in ACTIVE_STATES else state

    def _queue_states(self) -> dict[str, str] | None:
        """``{job: state}`` from Slurm's controller, which forgets a job soon after its end. None if squeue fails."""
        if time.monotonic() - self.queue_read_at >= QUEUE_AGE:
            self.queue_read_at, self.queue = time.monotonic(), None
            command = ["squeue", "--me", "--noheader", "--states=all", "--format=%A %T"]
            with suppress(OSError, subprocess.SubprocessError):
                output = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
                self.queue = dict(line.split() for line in output.splitlines())
        return self.queue

    def log(self, job: str, order: Path) -> Path:
        return Path(self._job(job).paths.stderr)

    def _job(self, job: str) -> Any:
        if job not in self.jobs:
            self.jobs[job] = self.kind(self.folder, job)
        return self.jobs[job]


def _in_slurm(order: str) -> None:
    """Entry point of a Slurm job."""
    from submitit import JobEnvironment

    from penchant.sweep.worker import carry_out

    carry_out(order, JobEnvironment().job_id)


class Ray:
    """Runs as detached actors of a Ray cluster. Each lives until its run has ended, even if the sweep's process is gone."""

    name, title, cancel = "ray", "Ray actor", "ray.kill(ray.get_actor(NAME, 'penchant')) ends one of {}"

    def __init__(self, config: ClusterConfig) -> None:
        try:
            import ray
        except ImportError as error:
            raise ConfigError("cluster.on", "ray needs Ray", "pip install 'penchant[ray]'") from error
        address = config.address or os.environ.get("RAY_ADDRESS")
        if not ray.is_initialized():
            if address is None:
                raise ConfigError("cluster.address", "is missing", "give Ray's address; auto: the one on this machine")
            try:
                ray.init(address=address, namespace=_NAMESPACE, log_to_driver=False, configure_logging=False)
            except (ConnectionError, ValueError, RuntimeError) as error:
                message = str(error).splitlines()[0]
                what, how = f"{address}: {message}", "start Ray there: ray start --head"
                raise ConfigError("cluster.address", what, how) from error
        resources = {
            "num_gpus": config.gpus,
            "num_cpus": config.cpus,
            "memory": None if config.memory is None else int(config.memory * 1e9),
        }
        self.options = {k: v for k, v in resources.items() if v is not None}
        self.ray, self.actor = ray, ray.remote(_Actor)

    def submit(self, name: str, order: Path) -> str:
        job = order.stem
        options = {"name": job, "namespace": _NAMESPACE, "lifetime": "detached", "max_restarts": 0, **self.options}
        self.actor.options(**options).remote(str(order), str(self.log(job, order)))
        return job

    def ended(self, job: str, stopped: bool = False) -> str | None:
        try:
            self.ray.get_actor(job, namespace=_NAMESPACE)
        except ValueError:
            return "gone"
        return None

    def log(self, job: str, order: Path) -> Path:
        return order.with_suffix(".log")


class _Actor:
    """Ray actor that trains a run in a subprocess. The subprocess checkpoints and ends if the actor dies."""

    def __init__(self, order: str, log: str) -> None:
        import ray

        # the actor calls itself, because a call from the creator could be lost if the creator dies
        ray.get_runtime_context().current_actor.train.remote(order, log)

    def train(self, order: str, log: str) -> None:
        import ray

        with suppress(OSError), open(log, "ab") as log_file:
            subprocess.run(
                [sys.executable, "-m", "penchant.sweep.worker", "--order", order],
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=log_file,
                check=False,
            )
        ray.actor.exit_actor()
