"""Sweeps on a cluster: the same table as locally, jobs that outlive the sweep, failing runs, and the calls to Slurm and Ray."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_sweep import base, left, names, plan, run, trained, whole, written

from penchant.cli import main
from penchant.errors import CheckpointError, ConfigError
from penchant.runfolder import RunLock
from penchant.sweep import cluster as cluster_module
from penchant.sweep import conduct, load_sweep, worker, workers
from penchant.sweep.cluster import ORDERS, Slurm
from penchant.sweep.worker import carry_out, result_path
from penchant.training.loop import Interrupted, Loop

__all__ = ["base", "whole"]  # fixtures

AWAY = ("cluster.on=slurm", "cluster.gpus=0")


class Pretended:
    """A fake cluster whose jobs run in this process when released."""

    name, title, cancel = "slurm", "Slurm job", "scancel {}"

    def __init__(self) -> None:
        self.held: set[str] = set()  # runs whose jobs stay pending
        self.orders: dict[str, Path] = {}
        self.how: dict[str, str] = {}  # how each finished job ended
        self.log_file = Path("job.err")

    def submit(self, name: str, order: Path) -> str:
        job = str(len(self.orders) + 1)
        self.orders[job] = order
        if name not in self.held:
            self.work(job)
        return job

    def work(self, job: str) -> None:
        carry_out(str(self.orders[job]), job)
        self.how.setdefault(job, "COMPLETED")

    def ended(self, job: str, stopped: bool = False) -> str | None:
        return self.how.get(job)

    def log(self, job: str, order: Path) -> Path:
        return self.log_file

    def sent(self) -> list[str]:
        return [order.stem.rpartition("-")[0] for order in self.orders.values()]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Any:
    made = Pretended()
    monkeypatch.setattr(conduct, "open_cluster", lambda config, folder: made)
    monkeypatch.setattr(workers, "POLL_SECONDS", 0.0)
    monkeypatch.setattr(workers, "LAG_SECONDS", 0.0)
    before = signal.getsignal(signal.SIGUSR2)
    yield made
    signal.signal(signal.SIGUSR2, before)


@pytest.fixture
def short(base: dict[str, Any]) -> dict[str, Any]:
    base["base"]["train"]["max_steps"] = 1
    return base


# ---- the config -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings,expected",
    [
        (["cluster.on=slurm"], r"cluster.gpus is missing; say how many GPUs each run gets"),
        (["cluster.on=slurm", "cluster.gpus=0", "model.device=cuda"], "cluster.gpus is 0, and model.device is cuda"),
        (["cluster.on=ray", "cluster.gpus=1", "cluster.partition=gpu"], "cluster.partition has no meaning for Ray"),
        (["cluster.on=slurm", "cluster.gpus=1", 'cluster.partition="a\\nrm x"'], "not a one-line option"),
        (["cluster.on=slurm", "cluster.gpus=1", "cluster.options={'--wrap x': y}"], "not a one-line option"),
        (["cluster.on=ray", "cluster.gpus=1", "cluster.memory=1e20"], "cluster.memory"),
        (["cluster.on=slurm", "cluster.gpus=1", "cluster.address=auto"], "cluster.address has no meaning for Slurm"),
        (["cluster.on=slrum", "cluster.gpus=1"], "cluster.on"),
        (["cluster.gpu=1"], 'unknown key "gpu" in cluster; did you mean "gpus"'),
    ],
)
def test_a_cluster_is_checked_before_anything_is_read(tmp_path: Path, settings: list[str], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        load_sweep(written(tmp_path), settings)


def test_a_cluster_that_is_not_here(
    short: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(json.dumps(short))
    for module, on in (("submitit", "slurm"), ("ray", "ray")):
        monkeypatch.setitem(sys.modules, module, None)
        assert main(["sweep", str(path), "--on", on, "cluster.gpus=0", "--quiet"]) == 2
        assert f"pip install 'penchant[{on}]'" in capsys.readouterr().err
    assert not (tmp_path / "sweep/sweep.json").exists() or not json.loads(
        (tmp_path / "sweep/sweep.json").read_text()
    ).get("runs")


# ---- running --------------------------------------------------------------------------------------------------------


def test_the_table_and_the_runs_are_those_of_this_machine(
    base: dict[str, Any], whole: Path, cluster: Pretended, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    away = run(base, *AWAY, "train.epochs=1.5")
    assert cluster.sent() == names(load_sweep(base))  # all at once
    here = json.loads((whole / "sweep.json").read_text())
    assert json.loads((tmp_path / "sweep/sweep.json").read_text())["table"] == here["table"]
    for name, record in here["runs"].items():
        assert left(tmp_path / "sweep" / name) == left(whole / name)
        assert {**away.runs[name], "seconds": 0, "inputs": {}} == {**record, "seconds": 0, "inputs": {}}
    assert not list((tmp_path / "sweep" / ORDERS).iterdir())  # orders are deleted when their jobs have ended
    entered = trained(monkeypatch)
    assert run(base, *AWAY, "train.epochs=1.5").to_text() == away.to_text() and entered == []


def test_jobs_outlive_the_sweep_and_are_waited_for_again(
    short: dict[str, Any], cluster: Pretended, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cluster.held = {"beta-0.5"}
    looked: list[str] = []

    def ended(job: str, stopped: bool = False) -> str | None:
        if job == "2" and not looked:
            looked.append(job)
            os.kill(os.getpid(), signal.SIGINT)  # Ctrl-C while the second job runs
        return cluster.how.get(job)

    with monkeypatch.context() as patched:
        patched.setattr(cluster, "ended", ended)
        with pytest.raises(Interrupted, match=r"1 of the runs go on .* as Slurm job 2; run the same .*: scancel 2"):
            run(short, *AWAY)
    records = json.loads((tmp_path / "sweep/sweep.json").read_text())["runs"]
    assert [r["state"] for r in records.values()] == ["finished", "running"]
    assert plan(short, *AWAY)[1] == "beta-0.5  to wait for: Slurm job 2 has it"
    with pytest.raises(CheckpointError, match=r"run beta-0.5: Slurm job 2 has it, and this call trains on local"):
        run(short)
    entered = trained(monkeypatch)
    cluster.work("2")  # while no sweep is running
    result = run(short, *AWAY)
    assert entered == ["beta-0.5"] and cluster.sent() == ["beta-0.1", "beta-0.5"]  # neither was resubmitted
    assert {r["state"] for r in result.runs.values()} == {"finished"} and len(result.table.best) >= 1


def test_a_signal_between_two_jobs_sends_no_more(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Done(Pretended):
        def work(self, job: str) -> None:
            result_path(self.orders[job]).write_text('{"state": "done", "seconds": 0.0}')

    def end(run: Any, made: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(workers, "order_json", lambda run, pause_at: "")
    made = Done()
    jobs = workers.Jobs(made, 1, tmp_path, lambda run: None, lambda run: None, lambda run, job: None, lambda line: None)
    runs: list[Any] = [SimpleNamespace(name=name, folder=tmp_path / name) for name in ("first", "second")]
    with pytest.raises(Interrupted, match="stopped by SIGINT; no job is left"):
        jobs.run(iter(runs), lambda run: None, end)
    assert made.sent() == ["first"]


def test_a_job_that_ended_with_the_sweep_away_is_sent_again(
    short: dict[str, Any], cluster: Pretended, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.held = {"beta-0.5"}

    def killed(seconds: float) -> None:
        raise MemoryError  # like a kill -9 of the sweep while it waits

    with monkeypatch.context() as patched:
        patched.setattr(workers.time, "sleep", killed)
        with pytest.raises(MemoryError):
            run(short, *AWAY)
    cluster.held, cluster.how["2"] = set(), "NODE_FAIL"
    result = run(short, *AWAY)
    assert cluster.sent() == ["beta-0.1", "beta-0.5", "beta-0.5"]
    assert {r["state"] for r in result.runs.values()} == {"finished"}


@pytest.mark.parametrize("begun", [False, True])
def test_a_job_that_was_sent_and_not_noted_trains_nothing_twice(
    short: dict[str, Any], cluster: Pretended, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, begun: bool
) -> None:
    real = cluster.submit

    def killed(name: str, order: Path) -> str:
        real(name, order)
        if name == "beta-0.5":
            raise MemoryError  # like a kill -9 when Slurm has the job but its id is not recorded
        return "1"

    cluster.held = {"beta-0.5"}
    with monkeypatch.context() as patched:
        patched.setattr(cluster, "submit", killed)
        with pytest.raises(MemoryError):
            run(short, *AWAY)
    assert plan(short, *AWAY)[1].startswith("beta-0.5  to ")
    cluster.held = set()
    entered = trained(monkeypatch)
    if begun:
        cluster.work("2")
        assert "Slurm job 2 has it" in plan(short, *AWAY)[1]
    result = run(short, *AWAY)
    if not begun:
        cluster.work("2")  # it finally starts, but its order is gone
    assert entered == ["beta-0.5"] and len(cluster.orders) == (2 if begun else 3)
    assert {r["state"] for r in result.runs.values()} == {"finished"}
    assert not list((tmp_path / "sweep" / ORDERS).iterdir())


def test_a_job_that_slurm_starts_once_more_goes_on(
    short: dict[str, Any], cluster: Pretended, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, tries = worker.train_order, []

    def preempted(line: str, shared: Any) -> dict[str, Any]:
        tries.append(line)
        if len(tries) == 1:
            carry_out(str(cluster.orders["1"]), "1")  # the job started, its node failed, and it was requeued
        return real(line, shared)

    monkeypatch.setattr(worker, "train_order", preempted)
    result = run(short, *AWAY, "loss.beta=0.5")
    assert len(tries) == 2 and {r["state"] for r in result.runs.values()} == {"finished"}


def test_a_job_at_its_limit_goes_on_in_a_new_one(
    base: dict[str, Any], whole: Path, cluster: Pretended, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real, sent = Loop._after_step, []

    def limit(self: Loop, *args: Any) -> None:
        if self.state.step == 2 and not sent:
            sent.append(True)
            os.kill(os.getpid(), signal.SIGUSR2)  # Slurm sends it before a job's time limit
        real(self, *args)

    monkeypatch.setattr(Loop, "_after_step", limit)
    run(base, *AWAY, "train.epochs=1.5", "loss.beta=0.5,0.9", jobs=1)
    assert cluster.sent() == ["beta-0.5", "beta-0.5", "beta-0.9"]
    assert left(tmp_path / "sweep/beta-0.5") == left(whole / "beta-0.5")


@pytest.mark.parametrize("how", ["OUT_OF_MEMORY", "CANCELLED by 1000"])
def test_a_job_that_came_nowhere_or_was_canceled_is_named(
    short: dict[str, Any], cluster: Pretended, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, how: str
) -> None:
    cluster.held = {"beta-0.1"}
    real = Pretended.submit

    def submit(name: str, order: Path) -> str:
        job = real(cluster, name, order)
        if name == "beta-0.1":
            cluster.how[job] = how
            if how.startswith("CANCELLED"):  # it had made progress
                monkeypatch.setattr(workers, "_latest_checkpoint_name", lambda run: f"step-{time.monotonic()}")
        return job

    monkeypatch.setattr(cluster, "submit", submit)
    said = rf"run beta-0.1: its Slurm job 1 ended \({how}\) before the run did; its messages are in job.err"
    with pytest.raises(CheckpointError, match=said):
        run(short, *AWAY)
    records = json.loads((tmp_path / "sweep/sweep.json").read_text())["runs"]
    assert {n: r["state"] for n, r in records.items()} == {"beta-0.1": "interrupted", "beta-0.5": "finished"}
    cluster.held = set()
    monkeypatch.setattr(cluster, "submit", lambda name, order: real(cluster, name, order))
    entered = trained(monkeypatch)
    assert run(short, *AWAY).table.best and entered == ["beta-0.1"]


def test_runs_that_meet_errors_are_named_and_the_others_end(
    short: dict[str, Any], cluster: Pretended, tmp_path: Path
) -> None:
    short["grid"]["train.seed"] = [0, 1]
    folders = [tmp_path / "sweep" / f"beta-{b}-seed-0" for b in ("0.1", "0.5")]
    said = r"holds this folder .*\(beta-0.5-seed-0 failed too\)"
    with RunLock(folders[0]), RunLock(folders[1]), pytest.raises(CheckpointError, match=said):
        run(short, *AWAY)
    states = [r["state"] for r in json.loads((tmp_path / "sweep/sweep.json").read_text())["runs"].values()]
    assert states == ["interrupted", "interrupted", "finished", "finished"]
    short["output"] = str(tmp_path / "two")
    with RunLock(tmp_path / "two/beta-0.1-seed-0"), pytest.raises(CheckpointError):
        run(short, *AWAY, jobs=1)
    assert cluster.sent()[4:] == ["beta-0.1-seed-0"]  # one at a time: after a failure no more are submitted


def test_halving_and_a_search_with_jobs(
    base: dict[str, Any], whole: Path, cluster: Pretended, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    base["halving"] = {"rungs": 2, "factor": 2, "metric": "eval/logps/chosen"}
    result = run(base, *AWAY, "train.epochs=1.5")
    assert len(cluster.orders) == 3  # both to the rung, one of them to the end
    (best,) = [name for name, record in result.runs.items() if record["state"] == "finished"]
    assert left(tmp_path / "sweep" / best) == left(whole / best)
    del base["halving"], base["grid"]
    base["base"]["train"]["max_steps"] = 1
    base["search"] = {"trials": 2, "sampler": "random", "space": {"beta": {"from": 0.01, "to": 1.0}}}
    ended: list[int] = []
    submit = cluster.submit
    monkeypatch.setattr(cluster, "submit", lambda *a: (ended.append(len(cluster.how)), submit(*a))[1])
    run(base, *AWAY, f"output={tmp_path}/search")
    assert cluster.sent()[3:] == ["trial-0", "trial-1"] and ended == [3, 4]  # one after another


# ---- calls to Slurm and Ray -----------------------------------------------------------------------------------------

SBATCH = """\
#!/bin/bash
cp "$1" {folder}/script.sh
echo $(($(cat {folder}/last) + 1)) > {folder}/last
id=$(cat {folder}/last)
if [ -e {folder}/runs ]; then
  SLURM_JOB_ID=$id SLURM_NTASKS=1 SLURM_JOB_NUM_NODES=1 SLURM_NODEID=0 SLURM_PROCID=0 SLURM_LOCALID=0 \\
    setsid bash "$1" > /dev/null 2> {folder}/errors.$id &
  echo $! > {folder}/pid.$id
fi
echo "Submitted batch job $id"
"""
SRUN = """\
#!/bin/bash
while [[ $1 == -* ]]; do [[ $1 == --unbuffered ]] || shift; shift; done
exec "$@"
"""
SACCT = """\
#!/bin/bash
echo "JobID|State|NodeList"
for id in "$@"; do
  [ -e {folder}/pid.$id ] || continue
  if kill -0 $(cat {folder}/pid.$id) 2> /dev/null; then echo "$id|RUNNING|here"; else echo "$id|FAILED|here"; fi
done
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with fake Slurm commands, first in PATH, and the files they leave. They run jobs once it contains `runs`."""
    pytest.importorskip("submitit")
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "last").write_text("100")
    for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("sacct", SACCT)):
        path = folder / name
        path.write_text(text.replace("{folder}", str(folder)))
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def test_what_slurm_is_told_and_no_secret_is_in_it(
    tmp_path: Path, slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_nobody_may_read_this")
    asked = {
        "gpus": 2,
        "cpus": 8,
        "memory": 64,
        "partition": "fast",
        "hours": 1.5,
        "setup": ["module load cuda"],
        "options": {"account": "lab", "requeue": True},
    }
    sweep = load_sweep(written(tmp_path), ["cluster=" + json.dumps({"on": "slurm", **asked})])
    folder = tmp_path / "sweep" / ORDERS / "slurm"
    jobs = Slurm(sweep.cluster, folder)
    assert jobs.submit("beta-0.1", tmp_path / "order.json") == "101"
    script = (slurm / "script.sh").read_text()
    wanted = ["gpus-per-node=2", "cpus-per-task=8", "mem=64GB", "partition=fast", "time=90", "account=lab", "requeue"]
    for line in [*wanted, "job-name=penchant", "signal=USR2@90"]:
        assert f"#SBATCH --{line}\n" in script
    assert script.index("module load cuda") < script.index("srun ")
    assert jobs.ended("101") is None  # not yet in Slurm's accounting
    assert str(jobs.log("101", tmp_path / "order.json")).endswith("101_0_log.err")
    for path in [slurm / "script.sh", *folder.rglob("*")]:
        assert path.is_dir() or b"nobody_may_read_this" not in path.read_bytes(), path
    (slurm / "sbatch").write_text("#!/bin/bash\necho 'sbatch: error: invalid partition specified: fast' >&2\nexit 1\n")
    with pytest.raises(ConfigError, match=r"sbatch did not take run beta-0.1: .*invalid partition"):
        jobs.submit("beta-0.1", tmp_path / "order.json")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match="there is no Slurm here"):
        Slurm(sweep.cluster, folder)


def test_without_accounting_the_queue_says_which_jobs_are_gone(
    tmp_path: Path, slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_module, "QUEUE_AGE", 0.0)
    sweep = load_sweep(written(tmp_path), [*AWAY])
    jobs = Slurm(sweep.cluster, tmp_path / "sweep" / ORDERS / "slurm")
    assert jobs.submit("beta-0.1", tmp_path / "order.json") == "101"
    (slurm / "sacct").write_text("#!/bin/bash\necho 'Slurm accounting storage is disabled' >&2\nexit 1\n")
    queue, found = slurm / "squeue", []
    for said in ("echo 101 RUNNING", "echo 101 FAILED", "echo 7 RUNNING", "echo 'no contact' >&2; exit 1"):
        queue.write_text(f"#!/bin/bash\n{said}\n")
        queue.chmod(0o755)
        found.append(jobs.ended("101"))
    assert found == [None, "FAILED", "gone from the queue", None]


def sweeping(base: dict[str, Any], folder: Path, *more: str) -> subprocess.Popen[bytes]:
    path = folder / "sweep.yaml"
    path.write_text(json.dumps(base))
    return subprocess.Popen([sys.executable, "-m", "penchant", "sweep", str(path), *more], start_new_session=True)


def states(folder: Path) -> dict[str, str]:
    path = folder / "sweep.json"
    records = json.loads(path.read_text())["runs"] if path.exists() else {}
    return {name: record["state"] for name, record in records.items()}


@pytest.mark.slow
def test_a_sweep_killed_in_the_middle_finds_its_slurm_jobs_again(
    base: dict[str, Any], tmp_path: Path, slurm: Path
) -> None:
    base["base"]["train"]["epochs"] = 12.0
    base["base"]["checkpoint"]["every"] = 4
    here = run(base, f"output={tmp_path}/here")
    (slurm / "runs").touch()
    options = ("--on", "slurm", "cluster.gpus=0", "--quiet")
    process = sweeping(base, tmp_path, *options)
    folders = [tmp_path / "sweep" / n for n in here.runs]
    while not all((f / "perf.jsonl").exists() for f in folders):
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert states(tmp_path / "sweep") == dict.fromkeys(here.runs, "running")
    os.killpg(int((slurm / "pid.102").read_text()), signal.SIGKILL)
    again = sweeping(base, tmp_path, *options)
    assert again.wait() == 0
    assert int((slurm / "last").read_text()) == 103  # the killed one was resubmitted, the other awaited
    result = run(base)
    assert result.to_text() == here.to_text()
    for name in here.runs:
        assert left(tmp_path / "sweep" / name) == left(tmp_path / "here" / name)


@pytest.mark.slow
def test_submitit_s_own_executor_for_one_machine(
    short: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("submitit")
    here = run(short, f"output={tmp_path}/here")
    monkeypatch.setattr(Slurm, "executor", "local")
    monkeypatch.setattr(Slurm, "job_class", "LocalJob")
    assert run(short, *AWAY).to_text() == here.to_text()
    for name in here.runs:
        assert left(tmp_path / "sweep" / name) == left(tmp_path / "here" / name)


@pytest.mark.slow
def test_ray_trains_the_same_runs(short: dict[str, Any], tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    here = run(short, f"output={tmp_path}/here")
    with pytest.raises(ConfigError, match=r"cluster.address: is missing"):
        run(short, "cluster.on=ray", "cluster.gpus=0")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        assert run(short, "cluster.on=ray", "cluster.gpus=0", "cluster.cpus=1").to_text() == here.to_text()
    finally:
        ray.shutdown()
    for name in here.runs:
        assert left(tmp_path / "sweep" / name) == left(tmp_path / "here" / name)
