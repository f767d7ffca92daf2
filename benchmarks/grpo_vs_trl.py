"""GRPO tokens per second over whole steps: Penchant against TRL's GRPOTrainer, with the same prompts and reward.

    .venv/bin/python benchmarks/grpo_vs_trl.py [--quick] [--only bundled,...] [--model FOLDER] [--data FILE]

Standard library only; it uses the driver of ppo_vs_trl.py. A step samples 8 completions per prompt, scores them and trains on them.
On both sides its tokens are those of prompts and completions, with a prompt counted once for each completion.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from harness import WorkerFailed, peer_python, stop_with_workers
from ppo_vs_trl import Case, Size, compare, parsed

TARGET = 3.0
SCRIPTS = {"penchant": "worker_grpo_penchant.py", "trl": "worker_grpo_trl.py"}
CASES = [Case(m, p, "natural") for m in ("bundled", "smollm2") for p in ("fp32", "bf16")]
FULL = {"bundled": Size(8, 1, 3, 64), "smollm2": Size(4, 1, 1, 64)}  # prompts, not completions
QUICK = {"bundled": Size(2, 1, 1, 32), "smollm2": Size(2, 1, 1, 32)}

METHOD: dict[str, Any] = {
    "response_length": 32,
    "samples": 8,
    "temperature": 1.0,
    "beta": 0.04,
    "clip": 0.2,
    "lr": 1e-6,
    "seed": 0,
}


def main() -> int:
    parser = argparse.ArgumentParser(description="GRPO: Penchant against TRL", allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="a few tokens, to check that everything runs")
    parser.add_argument("--only", default="", help="comma-separated parts of case names (bundled-fp32-natural, ...)")
    parser.add_argument(
        "--trl-batch", type=int, default=0, help="completions per forward pass in TRL; 0: all of a step"
    )
    args = parsed(parser)
    chosen = [c for c in CASES if any(part in c.name for part in args.only.split(","))]
    stop_with_workers()
    sides = {"penchant": sys.executable, "trl": str(peer_python("trl"))}
    ours, peer = {"tokens_per_step": args.tokens_per_step, "kernels": "auto"}, {"batch": args.trl_batch}
    sizes, method = QUICK if args.quick else FULL, METHOD | {"ours": ours, "peer": peer}
    return compare(args, chosen, sides, sizes.__getitem__, method, SCRIPTS, "tokens", TARGET)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except WorkerFailed as error:
        sys.exit(f"benchmark: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
