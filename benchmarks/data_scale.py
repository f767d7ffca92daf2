"""Data at scale: rows/s and peak memory of `data audit` and tokenization on synthetic rows, and planted defects found.

    python benchmarks/data_scale.py                      # lmsys layout: 10k, 100k and 1M rows
    python benchmarks/data_scale.py --rows 10000 100000 --no-tokens
    python benchmarks/data_scale.py --layout pairs       # pairs, including contradictions
    python benchmarks/data_scale.py --no-tokens --workers 2 --rows 100000   # in two processes
    python benchmarks/data_scale.py --no-tokens --layout small --rows 10000000   # memory per row, on short rows
    python benchmarks/data_scale.py --no-audit --scale 0.1 --rows 1000000   # training startup on short rows, cold and warm
    python benchmarks/data_scale.py --whole --workers 2 --rows 10000 100000 1000000   # whole commands, on short pairs
    python benchmarks/data_scale.py --whole --only audit --workers 1 2 --rows 1000000   # speedup from a second process

`data_rows.py` generates the rows. Each size is measured in its own process; peak memory is that process's VmHWM, including Python and
its libraries. `--whole` runs `penchant data audit`, `penchant train`, and `penchant train` on two mixed sources from the command line,
and counts all processes of each command together.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from data_rows import KINDS, generate

LINEAR = 1.25  # largest ratio of the cost per row between two sizes that still counts as linear
MEMORY = 2048.0  # MB, limit on peak memory at the largest size
COMMANDS = ["audit", "train", "mixed"]
FEW = 1000  # rows; the cost at this size counts as startup, and is subtracted to get the cost per row
AGAIN = 10_000  # rows; up to this size startup dominates, so each command runs three times
WHOLE_MEMORY = 4096.0  # MB, limit for a whole command, all its processes together


def main() -> None:
    """Generate the rows, measure each size and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layout", choices=[*KINDS, "small", "short"], default="lmsys")
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--scale",
        type=float,
        default=1.0,
        help="text length factor; 1 means questions of about 30 words and answers of about 100",
    )
    parser.add_argument("--folder", type=Path, help="where to keep rows and cache (default: a temporary folder)")
    parser.add_argument("--no-tokens", action="store_true", help="skip tokenizing and the start of training")
    parser.add_argument("--no-audit", action="store_true", help="skip the audit")
    parser.add_argument(
        "--workers",
        type=int,
        nargs="+",
        default=[1],
        help="number of processes for the audit, or for each command with --whole",
    )
    parser.add_argument("--whole", action="store_true", help="measure whole commands, on short pairs")
    parser.add_argument(
        "--only", choices=COMMANDS, nargs="+", default=COMMANDS, help="the commands to measure with --whole"
    )
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps of each training run with --whole")
    parser.add_argument("--no-threads", action="store_true", help="skip tokenizing with one and two threads")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--worker", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(WORKERS[args.worker[0]](*args.worker[1:])))
        return
    if args.whole and min(args.rows) <= FEW:
        parser.error(f"--rows: --whole subtracts the cost of {FEW:,} rows, so give more")
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        figures = whole_commands(folder, args) if args.whole else [measure(folder, n, args) for n in args.rows]
    if not args.no_audit and not args.whole:
        print(table(figures))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))


def measure(folder: Path, n: int, args: argparse.Namespace) -> dict[str, Any]:
    """Measure one size, printing each figure when it is ready."""
    path = folder / f"{args.layout}-{args.seed}-{args.scale:g}-{n}.jsonl"
    planted_at = path.with_suffix(".planted.json")
    if not planted_at.exists():
        planted_at.write_text(json.dumps(generate(path, n, args.seed, args.layout, args.scale)))
    planted = json.loads(planted_at.read_text())
    print(f"\n{n:,} rows ({args.layout}), {path.stat().st_size / 1e6:,.0f} MB", flush=True)
    figures: dict[str, Any] = {"rows": n, "bytes": path.stat().st_size, "planted": planted}
    if not args.no_audit:
        figures["audit"] = audit = worker("audit", str(path), str(args.workers[0]))
        for name, count in planted.items():
            print(f"    {name:<18} planted {count:>7,}  found {audit['found'].get(name, 0):>7,}", flush=True)
    if not args.no_tokens:
        figures["tokens"] = tokens(path, n, folder, args)
    return figures


def table(figures: list[dict[str, Any]]) -> str:
    """Markdown table of the audit at every size, followed by the verdicts."""
    lines = ["", "| rows | file | audit | rows/s | CPU per row | vs. first | peak memory | all defects found |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    costs = [f["audit"]["cpu"] / f["rows"] for f in figures]  # CPU time is insensitive to other load
    for f, cost in zip(figures, costs, strict=True):
        audit, all_found = f["audit"], all(f["audit"]["found"].get(k, 0) == v for k, v in f["planted"].items())
        lines.append(
            f"| {f['rows']:,} | {f['bytes'] / 1e6:,.0f} MB | {audit['seconds']:.1f} s | {f['rows'] / audit['seconds']:,.0f} | {1e6 * cost:.0f} us "
            f"| {cost / costs[0]:.2f} | {audit['peak_mb']:,.0f} MB | {'yes' if all_found else 'no'} |"
        )
    ratio, peak = max(costs) / min(costs), max(f["audit"]["peak_mb"] for f in figures)
    linear = "linear" if ratio <= LINEAR else "not linear"
    lines += ["", f"time: {linear} (CPU per row varies by a factor of {ratio:.2f})"]
    if len(figures) > 1:
        low, high = figures[0], figures[-1]
        per_row = 1e6 * (high["audit"]["peak_mb"] - low["audit"]["peak_mb"]) / (high["rows"] - low["rows"])
        lines.append(f"memory: {per_row:,.0f} bytes per row")
    lines.append(f"peak memory: {'below' if peak < MEMORY else 'ABOVE'} the limit of {MEMORY:,.0f} MB")
    return "\n".join(lines)


def whole_commands(folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure each command at each size, printing a line per measurement, then the verdicts."""
    head = f"| rows | command | workers | wall | CPU | {'CPU per row':>11} | peak memory | mapped files |"
    print(head + "\n" + "|---" * 8 + "|", flush=True)
    figures: list[dict[str, Any]] = []
    for n in [FEW, *args.rows]:
        rows = folder / f"short-{n}"
        rows.mkdir(exist_ok=True)
        parts = enumerate(("a.jsonl", "b.jsonl"))
        planted = sum(generate(rows / part, n // 2, args.seed + i, "short")["duplicates"] for i, part in parts)
        for command in args.only:
            for workers in args.workers:
                result = {
                    "rows": n,
                    "command": command,
                    "workers": workers,
                    "planted": planted,
                    **least(_command(rows, command, workers, args.steps) for _ in range(1 if n > AGAIN else 3)),
                }
                start = next((f["cpu"] for f in figures if f["rows"] == FEW and _same(f, result)), result["cpu"])
                result["cpu_a_row"] = (result["cpu"] - start) / max(1, n - FEW)
                figures.append(result)
                print(
                    f"| {n:,} | {command} | {workers} | {result['seconds']:.1f} s | {result['cpu']:.1f} s | {1e6 * result['cpu_a_row']:.0f} us "
                    f"| {result['peak_mb']:,.0f} MB | {result['file_mb']:,.0f} MB |",
                    flush=True,
                )
        shutil.rmtree(rows)
    print()
    for command in args.only:
        for workers in args.workers:
            costs = [
                f["cpu_a_row"]
                for f in figures
                if _same(f, {"command": command, "workers": workers}) and f["rows"] > FEW
            ]
            ratio = max(costs) / min(costs)
            print(
                f"{command}, {workers} worker(s): {'linear' if ratio <= LINEAR else 'not linear'} (CPU per row varies by a factor of {ratio:.2f})"
            )
        baseline, *others = (f for f in figures if f["command"] == command and f["rows"] == max(args.rows))
        for other in others:
            gain = baseline["seconds"] / other["seconds"]
            print(f"{command}, {other['workers']} workers: {gain:.2f} times as fast as {baseline['workers']}")
    for result in figures:
        if result["command"] == "audit" and result["found"] != result["planted"]:
            print(
                f"audit of {result['rows']:,} rows: {result['found']:,} duplicates found, but {result['planted']:,} planted"
            )
    peak, unmapped = max(f["peak_mb"] for f in figures), max(f["peak_mb"] - f["file_mb"] for f in figures)
    print(
        f"highest peak: {peak:,.0f} MB, or {unmapped:,.0f} MB without mapped files, which the system can drop at any time"
    )
    print(
        f"without mapped files: {'below' if unmapped < WHOLE_MEMORY else 'ABOVE'} the limit of {WHOLE_MEMORY:,.0f} MB"
    )
    return figures


def least(results: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The run with the least CPU time. Other load on the machine can only increase it."""
    return min(results, key=lambda run: run["cpu"])


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(one[k] == other[k] for k in ("command", "workers"))


def _command(rows: Path, command: str, workers: int, steps: int) -> dict[str, Any]:
    """Run one command on the files of a folder, with an empty cache, and measure it."""
    with tempfile.TemporaryDirectory(dir=rows.parent) as temporary:
        config = {
            "model": {"path": _model()},
            "data": {"path": str(rows), "max_length": 64, "validation_rows": 50, "workers": workers},
            "loss": {"name": "dpo"},
            "reference": {"kind": "frozen"},  # do not score every row up front for a few steps
            "train": {"max_steps": steps, "batch_size": 16},
            "output": f"{temporary}/run",
        }
        arguments = ["data", "audit", str(rows), "--workers", str(workers), "--json", f"{temporary}/audit.json"]
        if command != "audit":
            if command == "mixed":
                parts = [{"path": str(rows / part), "weight": w} for part, w in (("a.jsonl", 3), ("b.jsonl", 1))]
                config["data"] = {k: v for k, v in config["data"].items() if k != "path"} | {"sources": parts}
            Path(temporary, "run.yaml").write_text(json.dumps(config))  # JSON is YAML
            arguments = ["train", f"{temporary}/run.yaml"]
        environment = {**os.environ, "PENCHANT_CACHE": f"{temporary}/cache", "TMPDIR": temporary}
        with Path(temporary, "log").open("w+") as log:
            began = time.perf_counter()
            process = subprocess.Popen(
                [sys.executable, "-m", "penchant", *arguments], env=environment, stdout=log, stderr=log
            )
            peak = {"peak_mb": 0.0, "file_mb": 0.0}
            while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
                memory = _memory(process.pid)
                if memory["peak_mb"] > peak["peak_mb"]:
                    peak = memory
                time.sleep(0.1)
            seconds, (_, status, usage) = time.perf_counter() - began, ended
            if status:
                log.seek(0)
                raise SystemExit(f"{' '.join(arguments)}\n{log.read()}")
        extra = {}
        if command == "audit":
            report = json.loads(Path(temporary, "audit.json").read_text())
            extra["found"] = report["findings"]["duplicates"]["count"]
    return {"seconds": seconds, "cpu": usage.ru_utime + usage.ru_stime, **peak, **extra}


def _memory(root: int) -> dict[str, float]:
    """Memory of a process and its descendants, MB (PSS): shared pages count once, mapped files are included."""
    pids, pss = {root}, {"Pss": 0, "Pss_File": 0}
    for stat in sorted(Path("/proc").glob("[0-9]*/stat"), key=lambda path: int(path.parent.name)):
        with suppress(OSError):  # the process has exited
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            if parent in pids:
                pids.add(int(stat.parent.name))
    for pid in pids:
        with suppress(OSError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                name, _, value = line.partition(":")
                if name in pss:
                    pss[name] += int(value.split()[0])
    return {"peak_mb": pss["Pss"] / 1024, "file_mb": pss["Pss_File"] / 1024}


def tokens(path: Path, n: int, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Measure tokenization, and the start of training with a cold and a warm cache."""
    figures: dict[str, Any] = {}
    if not args.no_threads:
        for threads in (1, 2):
            figures[f"threads_{threads}"] = result = worker("tokenize", str(path), RAYON_NUM_THREADS=str(threads))
            print(
                f"  tokenize, {threads} thread(s): {n / result['seconds']:,.0f} rows/s, {result['tokens'] / n:.0f} tokens per row, "
                f"{result['cpu']:.1f} s of CPU time in {result['seconds']:.1f} s, {result['main']:.1f} s of it outside the tokenizer's threads "
                f"(rows loaded in {result['load']:.1f} s)",
                flush=True,
            )
    cache = folder / f"cache-{path.stem}"
    for start in ("cold", "warm"):
        figures[start] = result = worker("start", str(path), args.layout, str(n), PENCHANT_CACHE=str(cache))
        print(
            f"  {start} start: {result['seconds']:.1f} s to the first batch ({result['cpu']:.1f} s of CPU time), peak memory {result['peak_mb']:,.0f} MB"
        )
        print("    " + ", ".join(f"{part} {seconds:.2f} s" for part, seconds in result["parts"].items()), flush=True)
    if figures["cold"]["batch"] != figures["warm"]["batch"]:
        raise SystemExit("the first batches of the cold and the warm start differ")
    return figures


def worker(task: str, *arguments: str, **environment: str) -> dict[str, Any]:
    """Run one measurement in a separate process and return its result."""
    command = [sys.executable, __file__, "--worker", task, *arguments]
    process = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    if process.returncode:
        raise SystemExit(process.stderr)
    return json.loads(process.stdout.splitlines()[-1])


def _model() -> str:
    """Path of the bundled model, used for its tokenizer."""
    import penchant

    return str(Path(penchant.__file__).parent / "assets" / "model")


def _peak() -> float:
    """Peak memory of this process, MB. (ru_maxrss would include the parent's memory at the fork.)"""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return float(line.split()[1]) / 1024
    return float("nan")


def _audit(path: str, workers: str) -> dict[str, Any]:
    from penchant.data.audit import audit_files

    before, start, cpu = _peak(), time.perf_counter(), _cpu()
    result = audit_files({"rows": path}, workers=int(workers))
    seconds, cpu = time.perf_counter() - start, _cpu() - cpu
    counts = {name: f.count for name, f in result.findings.items()}
    # RUSAGE_CHILDREN reports the peak of the largest worker, so the total is an upper bound
    others = int(workers) * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024 if workers != "1" else 0.0
    return {"seconds": seconds, "cpu": cpu, "peak_mb": _peak() + others, "start_mb": before, "found": counts}


def _cpu() -> float:
    """CPU seconds of this process and of the children it has waited for."""
    return time.process_time() + sum(os.times()[2:4])


def _tokenize(path: str) -> dict[str, Any]:
    from penchant.data.load import load_preferences
    from penchant.data.tokenize import tokenize
    from penchant.models.load import load_tokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    start = time.perf_counter()
    rows = load_preferences(path, on_bad_row="skip")
    load = time.perf_counter() - start
    tokenizer = load_tokenizer(_model())
    start, cpu, main = time.perf_counter(), time.process_time(), time.thread_time()
    tokenized = tokenize(rows, tokenizer, max_length=512, on_bad_row="skip")
    seconds, cpu, main = time.perf_counter() - start, time.process_time() - cpu, time.thread_time() - main
    count = sum(t.shared_tokens for t in tokenized.trees)
    return {"seconds": seconds, "cpu": cpu, "main": main, "load": load, "tokens": count, "peak_mb": _peak()}


LOSS = {
    "lmsys": "sft",
    "small": "sft",
    "pairs": "simpo",
    "short": "simpo",
}  # reference-free, so startup includes no reference pass


def _start(path: str, layout: str, n: str) -> dict[str, Any]:
    """Time what `penchant train` does before its first optimizer step, with the bundled model and without evaluation."""
    from penchant.config import RunConfig
    from penchant.logprobs.reference import cache_key
    from penchant.runs import Run

    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    held_out = max(1, min(500, int(n) // 10))
    data = {"path": path, "max_length": 512, "validation_rows": held_out, "on_bad_row": "skip", "cache": "auto"}
    with tempfile.TemporaryDirectory() as output:
        config = {
            "model": {"path": _model()},
            "data": data,
            "loss": {"name": LOSS[layout]},
            "train": {"epochs": 1},
            "output": output,
        }
        parts: dict[str, float] = {}
        start = last = time.perf_counter()
        run = Run(RunConfig.model_validate(config), quiet=True)

        def record(part: str) -> None:
            nonlocal last
            parts[part], last = time.perf_counter() - last, time.perf_counter()

        _ = run.rows.tokenizer
        record("libraries and tokenizer")  # independent of the number of rows
        _ = run.rows.loaded
        record("load")
        _ = run.rows.datasets
        record("split")
        for tokenized in run.rows.tokenized:
            assert tokenized is not None
            tokenized.summary()
        record("tokenize")
        json.dumps(run.rows.audit().to_json())
        record("audit")
        train, _ = run.rows.trees
        loop = run.make_loop()
        record("model and loop")
        batch = [train[i] for i in loop.schedule.batch(0)]
        loop._micro_batches(batch)
        record("first batch")
        seconds, cpu = time.perf_counter() - start, time.process_time()
        # extra work of methods with a cached reference, without the reference pass itself
        cache_key("weights", train, dtype="fp32", tokenizer="t", template="auto")
        record("(not counted: reference cache key)")
    first = hashlib.sha256(
        b"".join(ids.tobytes() for t in batch for ids in (t.prompt_ids, *t.completion_ids))
    ).hexdigest()
    return {"seconds": seconds, "cpu": cpu, "peak_mb": _peak(), "parts": parts, "trees": len(train), "batch": first}


WORKERS = {"audit": _audit, "tokenize": _tokenize, "start": _start}

if __name__ == "__main__":
    main()
