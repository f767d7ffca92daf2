"""Error of `penchant plan`: its memory estimate against the measured peak of the training process, for several runs.

    python benchmarks/plan_memory.py --model DIR --hh FILE --long FILE [--only NAME ...] [--output FILE.json]

Each configuration is planned (without a probe) and then trained for a few steps, both through the command line in separate
processes. The peak is ru_maxrss of the finished training process. The constants in `plan/memory.py` were fitted to the `fitted`
configurations; the `held out` ones were only predicted.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ASSETS = Path(__file__).resolve().parents[1] / "src" / "penchant" / "assets" / "model"
FEW = {"samples": 0, "kl_prompts": 0}


@dataclass(frozen=True, slots=True)
class Case:
    """A configuration: `data` is ``hh`` or ``long``, `model` ``given`` or ``bundled``."""

    name: str
    role: str
    model: str
    data: str
    more: dict[str, Any] = field(default_factory=dict)


def _data(limit: int, length: int, held_out: int = 0) -> dict[str, Any]:
    rows = {"validation_rows": held_out} if held_out else {}
    return {"limit": limit, "max_length": length, "on_bad_row": "skip", **rows}


CASES = (
    Case("whole bf16 DPO", "fitted", "given", "hh", {
        "loss": "dpo", "data": _data(60, 512), "train": {"batch_size": 12, "max_steps": 4, "tokens_per_step": 2048}}),
    Case("LoRA bf16 DPO, long rows", "fitted", "given", "long", {
        "loss": "dpo", "lora": {"r": 16}, "data": _data(24, 1536), "train": {"batch_size": 4, "max_steps": 3, "tokens_per_step": 2048}}),
    Case("bundled reward model", "fitted", "bundled", "hh", {
        "algorithm": "reward_model", "data": _data(400, 512, 60), "train": {"batch_size": 32, "max_steps": 10}}),
    Case("whole fp32 SFT", "held out", "given", "hh", {
        "loss": "sft", "model": {"dtype": "fp32"}, "data": _data(40, 384), "train": {"batch_size": 8, "max_steps": 3, "tokens_per_step": 1024}}),
    Case("LoRA fp32 KTO", "held out", "given", "hh", {
        "loss": "kto", "model": {"dtype": "fp32"}, "lora": {"r": 8}, "data": _data(24, 384),
        "train": {"batch_size": 6, "max_steps": 3, "tokens_per_step": 1024}}),
    Case("bundled RLOO", "held out", "bundled", "hh", {
        "algorithm": {"name": "rloo", "max_new_tokens": 48}, "reward": "words", "data": _data(200, 384),
        "train": {"batch_size": 16, "max_steps": 5}}),
)  # fmt: skip


def config_of(case: Case, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    more = {key: dict(value) if isinstance(value, dict) else value for key, value in case.more.items()}
    model = {"path": str(ASSETS if case.model == "bundled" else args.model), **more.pop("model", {})}
    data = {"path": str(args.hh if case.data == "hh" else args.long), **more.pop("data")}
    return {"model": model, "data": data, "evaluation": FEW, "output": str(folder / "run"), **more}


def penchant(*arguments: str, environment: dict[str, str]) -> tuple[str, int]:
    """Run the command line and return (its output, its peak resident bytes)."""
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen([sys.executable, "-m", "penchant", *arguments], stdout=out, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"penchant {' '.join(arguments)} failed with exit code {process.returncode}")
        out.seek(0)
        return out.read(), usage.ru_maxrss * (1024 if sys.platform == "linux" else 1)


def measure(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="plan-memory-") as name:
        folder = Path(name)
        file = folder / "run.yaml"
        file.write_text(json.dumps(config_of(case, args, folder)))  # JSON is YAML
        environment = {**os.environ, "PENCHANT_CACHE": str(folder / "cache")}
        environment.pop("PENCHANT_REEXECUTED", None)
        planned, _ = penchant("plan", str(file), "--no-probe", "--json", environment=environment)
        _, peak = penchant("train", str(file), "--quiet", environment=environment)
        steps = [json.loads(line) for line in (folder / "run" / "perf.jsonl").read_text().splitlines()]
    memory = json.loads(planned)["memory"]
    return {
        "name": case.name,
        "role": case.role,
        "estimate": memory["peak"],
        "measured": peak,
        "ratio": memory["peak"] / peak,
        "moments": memory["moments"],
        "parts": memory["parts"],
        "after_steps": [round(s["peak_memory_gb"] * 2**30) for s in steps],
    }


def summary(result: dict[str, Any]) -> str:
    steps = ", ".join(f"{n / 2**20:,.0f}" for n in result["after_steps"])
    estimate, measured = (result[k] / 2**20 for k in ("estimate", "measured"))
    lines = [
        f"{result['name']} ({result['role']}): estimate {estimate:,.0f} MB, measured {measured:,.0f} MB, ratio {result['ratio']:.3f}"
    ]
    lines += [
        f"    {name:<45}{size / 2**20:>8,.0f} MB"
        for name, size in {**result["parts"], **result["moments"]}.items()
        if size
    ]
    return "\n".join([*lines, f"    measured after each step: {steps} MB"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="a model folder, such as one from prepare_smollm2.py")
    parser.add_argument("--hh", type=Path, required=True, help="rows with chosen and rejected transcripts")
    parser.add_argument("--long", type=Path, required=True, help="rows with long prompts or answers")
    parser.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="a configuration to run (may be repeated)"
    )
    parser.add_argument("--output", type=Path, help="write the figures to this file (JSON)")
    args = parser.parse_args()
    results = []
    for case in CASES:
        if not args.only or case.name in args.only:
            results.append(measure(case, args))
            print(summary(results[-1]), flush=True)
    if args.output:
        args.output.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
