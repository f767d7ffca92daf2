"""Run folders with the files that a run writes, for tests of `penchant watch` and the studio."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def lines(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(r) + "\n" for r in rows)


def train_rows(first: int, last: int) -> list[dict[str, Any]]:
    """Steps of a run of 2 epochs with 10 steps each."""
    return [
        {
            **{"kind": "train", "step": s, "epoch": round(s / 10, 6), "loss": 0.7 - 0.01 * s, "lr": 1e-4},
            **{"rewards/accuracies": 0.5 + 0.02 * s, "rewards/margins": 0.1 * s, "grad_norm": 2.0, "tokens": 100 * s},
        }
        for s in range(first, last + 1)
    ]


def eval_row(step: int) -> dict[str, Any]:
    return {
        **{"kind": "eval", "step": step, "epoch": step / 10, "eval/rows": 1234, "eval/loss": 0.69 - 0.005 * step},
        **{"eval/rewards/accuracies": 0.5 + 0.01 * step, "eval/rewards/accuracies/ci": [0.45 + 0.01 * step, 0.65]},
        **{"eval/rewards/margins": 0.05 * step, "eval/kl/policy_ref": 0.02 * step},
    }


def perf_rows(first: int, last: int, seconds: float = 2.0) -> list[dict[str, Any]]:
    return [
        {"step": s, "seconds": seconds, "tokens_per_second": 50.0, "trees_per_second": 4.0, "peak_memory_gb": 1.5}
        for s in range(first, last + 1)
    ]


def make_run(folder: Path, done: int = 8, **manifest: Any) -> Path:
    """A run of 20 steps, of which `done` are done, and whose process has ended."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "identity.json").write_text("{}")
    (folder / "config.resolved.yaml").write_text(
        "loss: {name: dpo, beta: 0.1}\nalgorithm: null\ntrain: {epochs: 2.0, max_steps: null}\nlogging: {every: 1}\n"
    )
    rows = [eval_row(0), *train_rows(1, done)]
    (folder / "metrics.jsonl").write_text(lines([*rows, eval_row(done)] if done else rows))
    (folder / "perf.jsonl").write_text(lines(perf_rows(1, done)))
    said = {"status": "running", "started": "2026-01-01T00:00:00+0000", "seconds": 65.0, "steps": done, "loss": "dpo"}
    (folder / "manifest.json").write_text(json.dumps(said | manifest))
    return folder
