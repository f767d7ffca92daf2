"""Short trials to choose the best TRL settings for the benchmarks; prints the table of trl_settings.md.

.venv/bin/python benchmarks/trl_trials.py [--model FOLDER] [--batch 8] [--trials 'PART OF A NAME']
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from dpo_vs_trl import MAX_LENGTH, OURS, Case, Size, spec_of
from harness import DATA, HERE, WorkerFailed, model_folder, peer_python, run_worker, stop_with_workers
from report import markdown

BASE: dict[str, Any] = {"micro": 4, "bf16": "autocast", "attention": "sdpa", "compile": False, "sort_in_step": False}
BF16, FP32 = Case("bf16", "full", False), Case("fp32", "full", False)

TRIALS: list[tuple[str, Case, dict[str, Any]]] = [
    *[(f"bf16 autocast, batch {m}", BF16, {"micro": m}) for m in (1, 2, 4, 8)],
    *[(f"bf16 autocast, batch {m}, sorted", BF16, {"micro": m, "sort_in_step": True}) for m in (2, 4)],
    *[
        (f"bf16 weights, batch {m}, sorted", BF16, {"micro": m, "sort_in_step": True, "bf16": "weights"})
        for m in (1, 2, 4)
    ],
    ("bf16 autocast, batch 2, sorted, eager attention", BF16, {"micro": 2, "sort_in_step": True, "attention": "eager"}),
    *[(f"fp32, batch {m}, sorted", FP32, {"micro": m, "sort_in_step": True}) for m in (1, 2, 4)],
    (
        "bf16 autocast, batch 2, sorted, reference cached",
        Case("bf16", "full", True),
        {"micro": 2, "sort_in_step": True},
    ),
    ("bf16 autocast, LoRA, batch 2, sorted", Case("bf16", "lora", False), {"micro": 2, "sort_in_step": True}),
    ("bf16 autocast, batch 2, torch.compile", BF16, {"micro": 2, "sort_in_step": True, "compile": True}),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--batch", type=int, default=8, help="pairs per step; one warm-up step and one timed step")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--trials", default="", help="only run trials whose name contains this")
    args = parser.parse_args()
    stop_with_workers()
    model, python, logs = model_folder(args.model), peer_python(), HERE / "results" / "logs"
    size = Size(args.batch, 1, {"bf16": 1, "fp32": 1})
    table = []
    with tempfile.TemporaryDirectory(prefix="penchant-bench-rows-") as folder:
        rows = Path(folder) / "rows.json"
        request = {
            "data": str(args.data.resolve()),
            "model": str(model),
            "count": 2 * args.batch,
            "max_length": MAX_LENGTH,
            "out": str(rows),
        }
        run_worker(sys.executable, "rows.py", request, threads=args.threads, log=logs / "rows.log")
        for number, (name, case, change) in enumerate(TRIALS):
            if args.trials not in name:
                continue
            spec = spec_of(case, size, model, args.data.resolve(), rows, BASE | change, OURS)
            try:
                r = run_worker(
                    python, "worker_trl.py", spec, threads=args.threads, log=logs / f"trial-{number}.log", timeout=600
                )
            except WorkerFailed as error:
                table.append([name, "failed", "", "", str(error)[:80]])
            else:
                losses = " ".join(f"{v:.4f}" for v in r["losses"])
                table.append(
                    [
                        name,
                        f"{r['pairs'] / r['seconds']:.3f}",
                        f"{r['cpu_seconds'] / r['pairs']:.2f}",
                        f"{r['peak_bytes'] / 1e9:.1f}",
                        losses,
                    ]
                )
            print(json.dumps(table[-1]), flush=True)
    print(markdown(["trial", "pairs/s", "CPU s/pair", "peak GB", "losses"], table))
    return 0


if __name__ == "__main__":
    sys.exit(main())
