"""Cost of each loss: step time relative to DPO's in the same process, and peak memory of PMPO's exact divergences.

    .venv/bin/python benchmarks/loss_cost.py                # every loss, bf16, about ten minutes on two quiet cores
    .venv/bin/python benchmarks/loss_cost.py --only pmpo    # comma-separated parts of loss names

SmolLM2-135M's shape with random weights (vocabulary 49,152), random pairs with hh-rlhf's lengths in one pass, a live reference,
AdamW with fp32 master weights. DPO steps alternate with steps of the other losses. A ratio is the median over rounds of a
loss's step time divided by the mean of the two DPO steps around it. Peak memory is that of a process that takes two steps only.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from typing import Any

from engine_share import ALLOCATOR, build_model, made_up_pairs

DIVERGENCES = {
    "pmpo": {},
    "pmpo policy_ref": {"direction": "policy_ref"},
    "pmpo js": {"divergence": "js"},
    "pmpo renyi": {"divergence": "renyi"},
    "pmpo renyi policy_ref": {"divergence": "renyi", "direction": "policy_ref"},
}
BETWEEN = 3  # losses between two steps of DPO


def cases() -> dict[str, tuple[str, dict[str, Any]]]:
    """Map each label to a loss name and hyperparameters, for every loss except DPO and token-level ones."""
    from penchant.losses import LOSSES

    plain = {name: (name, {}) for name, s in LOSSES.items() if s.signal != "tokens" and name not in ("dpo", "pmpo")}
    return plain | {label: ("pmpo", params) for label, params in DIVERGENCES.items()}


class Bench:
    """One policy, one frozen reference and one batch, shared by all losses."""

    def __init__(self, pairs: int, dtype_name: str) -> None:
        import torch

        from penchant.data.adapt import mismatched_rows
        from penchant.data.packing import pack
        from penchant.logprobs import Scorer
        from penchant.logprobs.reference import LiveReference
        from penchant.training.optim import MasterAdamW
        from penchant.types import TokenTree

        self.dtype = torch.bfloat16 if dtype_name == "bf16" else torch.float32
        model, frozen = build_model(torch.float32), build_model(torch.float32)
        self.optimizer = MasterAdamW(model.named_parameters(), dtype=self.dtype)
        model.to(self.dtype)
        frozen.to(self.dtype).requires_grad_(False).eval()
        self.scorer = Scorer(model, "shared", "auto")
        self.reference = LiveReference(Scorer(frozen, "shared", "auto"))
        self.trees = [replace(t, labels=(True, False), scores=(1.0, 0.0)) for t in made_up_pairs(pairs)]
        self.batch = pack(self.trees)
        partners = mismatched_rows([t.prompt_ids.tobytes() for t in self.trees]) or []
        self.mismatched = {
            t.row: TokenTree(t.row, t.prompt_ids, self.trees[p].completion_ids[:1], (False,))
            for t, p in zip(self.trees, partners, strict=True)
        }

    def step(self, name: str, params: dict[str, Any]) -> float:
        """Seconds of one optimizer step."""
        from penchant.algorithms.offline import Component, Offline
        from penchant.losses import LOSSES
        from penchant.training.steps import reduced

        spec = LOSSES[name]
        algorithm = Offline(
            self.scorer, [Component(spec, spec.params(**params))], self.reference, mismatched=self.mismatched
        )
        started = time.perf_counter()
        algorithm.begin_step(0, 0.0, self.trees)
        out = algorithm.loss(algorithm.score(self.batch))
        reduced(out, algorithm.weights(self.batch)).backward()
        self.optimizer.clip(1.0)
        self.optimizer.step(1e-7)
        return time.perf_counter() - started


def peak_gb() -> float:
    """Peak resident memory of this process, GiB."""
    with open("/proc/self/status") as status:
        (line,) = (x for x in status if x.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20


def memory_of(label: str, args: argparse.Namespace) -> float:
    """Peak memory, GiB, of a new process that takes two steps with one loss."""
    command = [sys.executable, __file__, "--memory-of", label, "--pairs", str(args.pairs), "--dtype", args.dtype]
    process = subprocess.run([*command, "--threads", str(args.threads)], capture_output=True, text=True, check=True)
    return float(process.stdout)


def main() -> None:
    """Print a table of step-time ratios, with peak memory for DPO and PMPO."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="comma-separated parts of loss names")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not ALLOCATOR.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ALLOCATOR})
    import torch

    torch.set_num_threads(args.threads)
    chosen = cases()
    if args.memory_of:
        bench = Bench(args.pairs, args.dtype)
        for _ in range(2):
            bench.step(*chosen.get(args.memory_of, ("dpo", {})))
        print(peak_gb())
        return
    if args.only:
        chosen = {k: v for k, v in chosen.items() if any(part in k for part in args.only.split(","))}
    bench = Bench(args.pairs, args.dtype)
    ratios: dict[str, list[float]] = {label: [] for label in chosen}
    base: list[float] = []
    for label in ("dpo", *chosen):
        bench.step(*chosen.get(label, ("dpo", {})))  # warm up
    labels = list(chosen)
    for _ in range(args.rounds):
        before = bench.step("dpo", {})
        for at in range(0, len(labels), BETWEEN):
            seconds = {label: bench.step(*chosen[label]) for label in labels[at : at + BETWEEN]}
            after = bench.step("dpo", {})
            base.append(after)
            for label, s in seconds.items():
                ratios[label].append(2 * s / (before + after))
            before = after
    print(f"{args.dtype}, {args.threads} thread(s), {args.pairs} pairs, {bench.batch.tokens} tokens per step")
    spread = statistics.quantiles(base, n=20) if len(base) > 1 else [base[0]] * 19
    print(f"dpo: {statistics.median(base):.3f} s per step (5% to 95% of steps: {spread[0]:.3f} to {spread[-1]:.3f})\n")
    memory = {label: memory_of(label, args) for label in ("dpo", *(x for x in labels if x.startswith("pmpo")))}
    print("| loss                  | time vs. DPO | target  | peak GB | vs. DPO  |\n|---|---|---|---|---|")
    print(f"| {'dpo':<21} | 1            |         | {memory['dpo']:.2f}    | 1        |")
    for label in labels:
        ratio = statistics.median(ratios[label])
        limit = goal_of(label)
        goal = "" if limit is None else f"<= {limit:g}"
        verdict = "" if limit is None or ratio <= limit else " MISSED"
        extra = f"{memory[label]:.2f}    | {memory[label] / memory['dpo']:.3f}" if label in memory else " | "
        print(f"| {label:<21} | {ratio:<12.3f} | {goal:<7}{verdict} | {extra} |")


def goal_of(label: str) -> float | None:
    """Largest allowed ratio to DPO's step time: 1.03 for a pairwise loss, 1.6 for PMPO, None (no target) for all others."""
    from penchant.losses import LOSSES

    name = label.split()[0]
    if name == "pmpo":
        return 1.6
    return 1.03 if LOSSES[name].signal == "pairs" else None


if __name__ == "__main__":
    main()
