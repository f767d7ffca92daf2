"""DPO of SmolLM2-135M with one process and with several on one CPU, one thread each: step time, and memory of each process.

    python benchmarks/scaling.py                                 # one process, two processes: five steps of 16 pairs each
    python benchmarks/scaling.py --model FOLDER                  # a folder that prepare_smollm2.py made
    python benchmarks/scaling.py --pairs 8 --tokens-per-step 512 --checkpointing off     # small passes, where sharding costs most
    python benchmarks/scaling.py --kernels                       # also one process with the fast kernels (unavailable for several)
    python benchmarks/scaling.py --beside                        # also the same number of independent single-process runs at once
    python benchmarks/scaling.py --sending                       # only the cost of exchanging a layer between two processes

Efficiency is ``T_1 / (n T_n)`` of the median step after the first, both with transformers' own layers. The first steps are slower,
because their memory is new to the process. Memory is a process's peak resident size (VmHWM), including loading. Targets for two
processes: an efficiency of 0.85, and at most 0.65 of a single process's memory in each. The machine must be quiet and have a core for
each process. A step has the same rows for any number of processes. Independent runs communicate nothing, so their slowdown (``T_1 / T``)
shows contention for memory bandwidth, caches and clock speed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

from harness import DATA, HERE, model_folder

WANTED = {"efficiency": 0.85, "memory": 0.65}


def config(model: Path, folder: Path, args: argparse.Namespace, name: str, kernels: str) -> Path:
    """Write the run's config as JSON, which is valid YAML, and return its path."""
    values = {
        "model": {"path": str(model), "dtype": args.dtype, "device": "cpu", "kernels": kernels},
        "data": {"path": str(folder / "pairs.jsonl"), "template": "plain", "max_length": args.max_length},
        "loss": {"name": "dpo"},
        "reference": {"cache_dir": str(folder / f"cache-{name}")},
        "train": {
            "batch_size": args.pairs,
            "tokens_per_step": args.tokens_per_step,
            "epochs": 1.0,
            "max_steps": args.steps,
            "threads": 1,
            "lr": 1e-6,
            "gradient_checkpointing": args.checkpointing,
        },
        "evaluation": {"kl_prompts": 0, "samples": 0},
        "checkpoint": {"every": None, "keep_last": 1, "keep_best": False},
        "output": str(folder / name),
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(values))
    return path


def start_run(command: list[str]) -> subprocess.Popen[bytes]:
    """Start a run in the background."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PENCHANT_")}
    environment |= {"PYTHONPATH": str(HERE.parent / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)


def peak_memory(running: subprocess.Popen[bytes], seconds: float) -> dict[int, int]:
    """Wait for a run and return the peak resident bytes of each rank (-1: the process started here).

    Raises:
        SystemExit: the run failed or took longer than `seconds`.
    """
    peaks: dict[int, int] = {}
    deadline = time.monotonic() + seconds
    while running.poll() is None and time.monotonic() < deadline:
        for rank, size in residents(running.pid):
            peaks[rank] = max(size, peaks.get(rank, 0))
        time.sleep(1.0)  # looking takes a core's time, and a peak is not lost between two looks
    if running.poll() is None:
        running.kill()
        raise SystemExit(f"not finished after {seconds:g} s: {running.args!r}")
    if running.returncode:
        raise SystemExit(f"failed with exit code {running.returncode}: {running.args!r}")
    return peaks


def residents(launcher: int) -> list[tuple[int, int]]:
    """(rank, VmHWM in bytes) of a launcher's ranks, and of the launcher itself as rank -1."""
    sizes = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if launcher not in (parent, int(entry.name)):
                continue
            peak = re.search(r"VmHWM:\s+(\d+) kB", (entry / "status").read_text())
            variables = dict(v.split("=", 1) for v in (entry / "environ").read_text().split("\0") if "=" in v)
        except (OSError, ValueError):
            continue
        if peak is not None and (int(entry.name) == launcher or "RANK" in variables):
            sizes.append((-1 if int(entry.name) == launcher else int(variables["RANK"]), 1024 * int(peak[1])))
    return sizes


def one_run(
    model: Path, folder: Path, args: argparse.Namespace, processes: int, kernels: str, beside: int = 1
) -> dict[str, Any]:
    """Measure the median step after the first, and each process's memory, with `beside` runs at the same time."""
    names = [f"{processes}-{kernels}-{beside}-{i}" for i in range(beside)]
    extra = ["--processes", str(processes)] if processes > 1 else []
    paths = [config(model, folder, args, name, kernels) for name in names]
    runs = [start_run([sys.executable, "-m", "penchant", "train", str(path), "--quiet", *extra]) for path in paths]
    peaks = [peak_memory(run, args.limit) for run in runs]
    ranks = [size for run in peaks for rank, size in sorted(run.items()) if (rank >= 0) == (processes > 1)]
    steps = []
    for name in names:
        lines = [json.loads(line)["seconds"] for line in (folder / name / "perf.jsonl").read_text().splitlines()]
        steps.append(statistics.median(lines[1:] or lines))
    result = {"seconds": statistics.mean(steps), "memory": ranks}
    sizes = ", ".join(f"{size / 2**30:.2f} GB" for size in ranks)
    label = f"{beside} independent runs" if beside > 1 else f"{processes} process(es)"
    print(f"{label}, kernels {kernels}: {result['seconds']:.2f} s per step, {sizes}", flush=True)
    return result


def sending(rank: int, port: int) -> None:
    """One of the two processes of `--sending`: repeat forward and backward of one row through a sharded layer."""
    import torch
    from torch import nn

    from penchant.distributed import shard
    from penchant.distributed.world import join

    class Layer(nn.ModuleList):
        def forward(self) -> torch.Tensor:
            return torch.stack([part(torch.ones(1, part.in_features)).sum() for part in self]).sum()

    torch.set_num_threads(1)
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ.update(rendezvous)
    sizes = [(576, 576), (576, 192), (576, 192), (576, 576), (576, 1536), (576, 1536), (1536, 576)]
    with join(60.0) as world:
        for transport in ("gloo's sockets", "shared memory"):
            model = nn.Module()
            model.layers = nn.ModuleList([Layer(nn.Linear(*size, bias=False) for size in sizes)])
            exchange = shard.Exchange if "memory" in transport else argparse.Namespace(of=lambda _: None)
            with mock.patch.object(shard, "Exchange", exchange):
                root = shard.Sharding(world, torch.device("cpu"), torch.float32)(model, model)
            times = []
            for _ in range(30):
                began = time.process_time()
                root(model.layers[0]).backward()
                times.append(time.process_time() - began)
            if world.leads:
                print(
                    f"one layer, forward and backward, over {transport}: {1e3 * statistics.median(times):.1f} ms of CPU time"
                )


def main() -> None:
    """Print a line for each run, then efficiency and memory and whether they reach their targets."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a model folder (default: made by prepare_smollm2.py)")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--tokens-per-step", type=int, default=2048)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--checkpointing", choices=["off", "layers"], default="layers")
    parser.add_argument(
        "--beside", action="store_true", help="also time as many independent single-process runs at once"
    )
    parser.add_argument("--sending", action="store_true", help="only measure the cost of exchanging a layer")
    parser.add_argument("--kernels", action="store_true", help="also time one process with the fast kernels")
    parser.add_argument("--limit", type=float, default=1200.0, help="time limit of a run in seconds")
    args = parser.parse_args()
    if args.sending:
        from torch.multiprocessing import spawn

        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        spawn(sending, (port,), nprocs=2)
        return
    if len(os.sched_getaffinity(0)) < args.processes:
        raise SystemExit(f"--processes {args.processes} needs as many cores")
    model = model_folder(args.model)
    with tempfile.TemporaryDirectory(prefix="penchant-scaling-") as temporary:
        folder = Path(temporary)
        with args.data.open(encoding="utf-8") as lines:
            (folder / "pairs.jsonl").write_text("".join(itertools.islice(lines, args.steps * args.pairs)))
        alone = one_run(model, folder, args, 1, "off")
        several = one_run(model, folder, args, args.processes, "off")
        fast = one_run(model, folder, args, 1, "auto") if args.kernels else None
        independent = one_run(model, folder, args, 1, "off", beside=args.processes) if args.beside else None
    efficiency = alone["seconds"] / (args.processes * several["seconds"])
    share = max(several["memory"]) / alone["memory"][0]
    for name, value, reached in (
        ("efficiency", efficiency, efficiency >= WANTED["efficiency"]),
        ("memory", share, share <= WANTED["memory"]),
    ):
        print(f"{name}: {value:.2f} (target: {WANTED[name]}){'' if reached else '  MISSED'}")
    if independent is not None:
        print(f"efficiency of independent runs: {alone['seconds'] / independent['seconds']:.2f}")
    if fast is not None:
        print(f"speed compared with one process on the fast kernels: {fast['seconds'] / several['seconds']:.2f}x")


if __name__ == "__main__":
    main()
