"""Effect of oneDNN's primitive cache capacity on peak memory, time and final weights of a bf16 run on the CPU.

    python benchmarks/product_cache.py --data FILE [--model DIR] [--capacities 1024,64,128,256] [--rounds 2] [--steps 24]

oneDNN compiles a matrix product for every new size and caches it (1,024 by default), but micro-batches of a run rarely have the same
size twice. The capacities alternate for `--rounds` rounds, each run in its own process through the command line. CPU seconds are the
process's user time, which a shared machine affects less than wall time; step times are wall time. The final weights of all runs must
be bit-identical, otherwise no table is printed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ASSETS = Path(__file__).resolve().parents[1] / "src" / "penchant" / "assets" / "model"
VARIABLE = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run: peak bytes, user CPU seconds of the whole process, seconds of each step but the first, SHA-256 of the weights."""

    peak: int
    cpu: float
    steps: tuple[float, ...]
    weights: str


def config_of(args: argparse.Namespace, folder: Path) -> str:
    data = {"path": str(args.data), "limit": args.rows, "max_length": args.max_length, "on_bad_row": "skip"}
    train = {"batch_size": args.batch, "max_steps": args.steps, "tokens_per_step": args.tokens, "lr": 1e-5}
    config = {"model": {"path": str(args.model), "dtype": "bf16"}, "data": data, "train": train, "output": str(folder)}
    return json.dumps({**config, "loss": "dpo", "evaluation": {"samples": 0, "kl_prompts": 0}})  # JSON is YAML


def run_with(capacity: int, args: argparse.Namespace) -> Outcome:
    with tempfile.TemporaryDirectory(prefix="product-cache-") as name:
        folder = Path(name)
        (folder / "run.yaml").write_text(config_of(args, folder / "run"))
        environment = {**os.environ, "PENCHANT_CACHE": str(folder / "cache"), VARIABLE: str(capacity)}
        environment.pop("PENCHANT_REEXECUTED", None)
        command = [sys.executable, "-m", "penchant", "train", str(folder / "run.yaml"), "--quiet"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} failed with exit code {process.returncode}")
        lines = [json.loads(line) for line in (folder / "run" / "perf.jsonl").read_text().splitlines()]
        (weights,) = (folder / "run" / "checkpoints").glob("*/model/*.safetensors")
        digest = hashlib.sha256(weights.read_bytes()).hexdigest()
        peak = usage.ru_maxrss * (1024 if sys.platform == "linux" else 1)
        return Outcome(peak, usage.ru_utime, tuple(line["seconds"] for line in lines[1:]), digest)


def table(results: dict[int, list[Outcome]]) -> str:
    first = next(iter(results.values()))
    rows = ["| capacity | peak MB | vs. first | user CPU s | vs. first (lowest, highest) | median ms per step |"]
    rows.append("| --- | --- | --- | --- | --- | --- |")
    for capacity, outcomes in results.items():
        peak = max(o.peak for o in outcomes)
        pairs = [o.cpu / b.cpu for o, b in zip(outcomes, first, strict=True)]
        cpu = statistics.median(o.cpu for o in outcomes)
        step = statistics.median(s for o in outcomes for s in o.steps)
        rows.append(
            f"| {capacity} | {peak / 2**20:,.0f} | {peak / max(o.peak for o in first):.3f} | {cpu:.1f} | "
            f"{statistics.median(pairs):.3f} ({min(pairs):.3f}, {max(pairs):.3f}) | {step * 1000:,.0f} |"
        )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=ASSETS, help="a model folder (default: the bundled model)")
    parser.add_argument("--data", type=Path, required=True, help="a file of preference pairs")
    parser.add_argument(
        "--capacities", default="1024,64,128,256", help="comma-separated; the others are compared with the first"
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=2048, help="train.tokens_per_step")
    parser.add_argument("--max-length", type=int, default=512)
    args = parser.parse_args()
    capacities = [int(c) for c in args.capacities.split(",")]
    results: dict[int, list[Outcome]] = {c: [] for c in capacities}
    for turn in range(args.rounds):
        for capacity in capacities if turn % 2 == 0 else reversed(capacities):
            outcome = run_with(capacity, args)
            results[capacity].append(outcome)
            print(
                f"{capacity}: {outcome.peak / 2**20:,.0f} MB, {outcome.cpu:.1f} s of CPU time",
                file=sys.stderr,
                flush=True,
            )
    if len({o.weights for outcomes in results.values() for o in outcomes}) > 1:
        raise SystemExit("the final weights of the runs differ")
    print(table(results))


if __name__ == "__main__":
    main()
