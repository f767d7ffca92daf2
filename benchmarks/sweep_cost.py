"""Wall time of 8 DPO runs in one sweep, relative to 8 calls of `penchant train`.

    .venv/bin/python benchmarks/sweep_cost.py                      # the bundled model, 400 random pairs: a few minutes
    .venv/bin/python benchmarks/sweep_cost.py --model PATH --rows 1000 --runs 8

The 8 runs differ only in beta. The separate runs are 8 processes, one after another, measured in two ways: each with its own reference
cache (independent runs, used for the target), and all with one cache on disk (the default of `penchant train`). Each way starts with an
empty cache. The ways alternate over rounds; a ratio is the median over rounds. The sweep's runs must end with the same weights as the
separate ones, otherwise no ratio is printed. Standard library only: everything runs in subprocesses.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from harness import BUNDLED, environment

GOAL = 0.72  # largest ratio to 8 separate runs with their own caches
WORDS = [
    "the",
    "film",
    "is",
    "was",
    "a",
    "story",
    "of",
    "great",
    "poor",
    "slow",
    "warm",
    "cast",
    "plot",
    "scene",
    "end",
    "music",
    "long",
    "light",
    "dark",
    "and",
    "but",
]


def made_up_pairs(path: Path, rows: int) -> None:
    """Write meaningless pairs in the bundled model's vocabulary: prompts of about 12 tokens, completions of about 32."""
    rng = random.Random(0)

    def words(n: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(n))

    lines = [
        {
            "prompt": f"{i} {words(12)}",
            "chosen": f" {words(rng.randint(16, 48))}",
            "rejected": f" {words(rng.randint(16, 48))}",
        }
        for i in range(rows)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def config(folder: Path, args: argparse.Namespace) -> Path:
    """Write the run's config, with defaults for all other settings, and return its path."""
    path = folder / "run.yaml"
    settings = {
        "model": {"path": str(args.model)},
        "data": {"path": str(folder / "pairs.jsonl"), "validation_fraction": 0.1, "max_length": 256, "split_seed": 0},
        "train": {"lr": 1e-5},
        "loss": {"name": "dpo"},
        "output": str(folder / "run"),
    }
    path.write_text(json.dumps(settings))
    return path


def timed(commands: list[list[str]], args: argparse.Namespace, caches: list[Path]) -> float:
    """Total wall seconds of `penchant` calls, one after another."""
    started = time.perf_counter()
    for command, cache in zip(commands, caches, strict=True):
        env = environment(args.threads) | {"PENCHANT_CACHE": str(cache)}
        process = subprocess.run([sys.executable, "-m", "penchant", *command], env=env, capture_output=True, text=True)
        if process.returncode:
            sys.exit(f"penchant {' '.join(command)} failed:\n{process.stderr[-2000:]}")
    return time.perf_counter() - started


def weights(folder: Path) -> str:
    """SHA-256 of the model in a run's last checkpoint."""
    last = max(folder.glob("checkpoints/step-*"), key=lambda p: int(p.name.removeprefix("step-")))
    digest = hashlib.sha256()
    for path in sorted(last.glob("model/*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def one_round(folder: Path, args: argparse.Namespace, betas: list[str]) -> dict[str, float]:
    """Run each way once and return its wall seconds."""
    run = config(folder, args)
    options = ["--quiet"]
    seconds = {}
    for way in ("own caches", "one cache"):
        calls = [["train", str(run), f"loss.beta={b}", f"output={folder / way / b}", *options] for b in betas]
        caches = [folder / f"cache {way}" / (b if way == "own caches" else "all") for b in betas]
        seconds[way] = timed(calls, args, caches)
    sweep = ["sweep", str(run), f"loss.beta={','.join(betas)}", f"output={folder / 'sweep'}", *options]
    if args.jobs > 1:
        sweep += ["--jobs", str(args.jobs)]
    seconds["sweep"] = timed([sweep], args, [folder / "cache sweep"])
    for b in betas:
        if (
            len({weights(folder / way / name) for way, name in (("own caches", b), ("sweep", f"beta-{float(b):g}"))})
            > 1
        ):
            sys.exit(
                f"beta {b}: the final weights of the sweep's run and of the separate run differ, so no ratio is printed"
            )
    return seconds


def main() -> None:
    """Run all rounds, and print the seconds of each way and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=BUNDLED, help="a model folder (default: the bundled model)")
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="--jobs of the sweep")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    betas = [f"{0.05 * (i + 1):.2f}" for i in range(args.runs)]
    rounds = []
    for n in range(args.rounds):
        with tempfile.TemporaryDirectory() as name:
            made_up_pairs(Path(name) / "pairs.jsonl", args.rows)
            rounds.append(one_round(Path(name), args, betas))
        print(f"round {n + 1}: " + ", ".join(f"{way} {s:.1f} s" for way, s in rounds[-1].items()), flush=True)
    print(f"\n{args.runs} DPO runs, {args.rows} pairs, {args.threads} thread(s), --jobs {args.jobs}")
    for way in ("own caches", "one cache"):
        ratio = statistics.median(r["sweep"] / r[way] for r in rounds)
        goal = f"  (target: at most {GOAL}, {'met' if ratio <= GOAL else 'MISSED'})" if way == "own caches" else ""
        print(f"sweep / {args.runs} separate runs with {way}: {ratio:.3f}{goal}")


if __name__ == "__main__":
    main()
