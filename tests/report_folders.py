"""Made-up folders of runs, sweeps and comparisons, for tests of the report."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]], *, ascii_only: bool = True) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r, ensure_ascii=ascii_only) + "\n" for r in rows), encoding="utf-8")


def evaluation(step: int, accuracy: float = 0.5, half_width: float = 0.0, **more: Any) -> dict[str, Any]:
    """A line of a held-out evaluation."""
    return {
        "kind": "eval",
        "step": step,
        "eval/rewards/accuracies": accuracy,
        "eval/rewards/accuracies/ci": [accuracy - half_width, accuracy + half_width],
        "eval/loss": 0.6931 - (accuracy - 0.5) / 4,
        "eval/rows": 100,
        **more,
    }


def make_run(
    folder: Path,
    *,
    seed: int = 0,
    beta: float = 0.1,
    steps: int = 40,
    evals: list[dict[str, Any]] | None = None,
    samples: int = 3,
    status: str = "finished",
    word: str = "fine",
) -> Path:
    """A DPO run. `word` is in every text that a user or a model could have written."""
    rng = random.Random(seed)
    lines: list[dict[str, Any]] = list(evals if evals is not None else [evaluation(0), evaluation(steps, 0.7, 0.08)])
    for i in range(1, steps + 1):
        noise = rng.gauss(0, 0.02)
        lines.append(
            {
                "kind": "train",
                "step": i,
                "loss": 0.69 * math.exp(-i / steps) + noise,
                "rewards/accuracies": 0.6 + noise,
                "rewards/margins": i / steps + noise,
                "rewards/chosen": noise,
                "rewards/rejected": -i / steps,
                "lr": 1e-4,
                "logps/per_token": -4.0 + noise,
                "grad_norm": 1.0 + abs(noise),
                "tokens": 100 * i,
            }
        )
    write_lines(folder / "metrics.jsonl", sorted(lines, key=lambda r: r["step"]))
    perf = [
        {"step": i, "seconds": 0.5, "tokens_per_second": 1000 + i, "trees_per_second": 8.0, "peak_memory_gb": 1.5}
        for i in range(1, steps + 1)
    ]
    write_lines(folder / "perf.jsonl", perf)
    rows = [
        {"prompt": f"{word} {i}", "before": f"before {word} {i}", "after": f"after {word} {i} {seed} {beta}", "reward_before": 0.0,
         "reward_after": rng.random()}
        for i in range(samples)
    ]  # fmt: skip
    write_lines(folder / "samples.jsonl", rows)
    write_json(
        folder / "manifest.json",
        {
            "penchant": "0.1.0", "python": "3.11", "status": status, "started": word, "seconds": 61.0, "steps": steps, "seed": seed,
            "loss": "dpo", "model": {"path": word, "sha256": "ab" * 32, "parameters": 1234},
        },
    )  # fmt: skip
    config = f"model: {{path: {json.dumps(word)}}}\nloss: {{name: dpo, beta: {beta}}}\ntrain: {{seed: {seed}}}\noutput: {json.dumps(str(folder))}\n"
    (folder / "config.resolved.yaml").write_text(config, encoding="utf-8")
    finding = {"title": word, "count": 1, "of": 2, "share": 0.5, "where": [word], "note": word}
    audit = {
        "summary": word,
        "findings": {"x": finding, "y": {**finding, "count": 0}},
        "lengths": {word: {"mean": 3.0}},
    }
    write_json(folder / "audit.json", audit)
    return folder


def make_sweep(
    folder: Path, *, betas: tuple[float, ...] = (0.1, 0.3), seeds: tuple[int, ...] = (0, 1), **options: Any
) -> Path:
    """A finished sweep over beta and seeds, with an accuracy that rises with beta."""
    runs: dict[str, Any] = {}
    for seed in seeds:
        for i, beta in enumerate(betas):
            name = f"beta-{beta}-seed-{seed}"
            last = evaluation(
                40,
                0.6 + 0.1 * i + 0.01 * seed,
                0.05,
                **{"eval/kl/policy_ref": 1.0 + i, "eval/kl/policy_ref/ci": [0.5 + i, 1.5 + i]},
            )
            evals = [evaluation(0, **{"eval/kl/policy_ref": 0.0}), last]
            make_run(folder / name, seed=seed, beta=beta, evals=evals, **options)
            metrics = {k: v for k, v in last.items() if k != "kind"}
            runs[name] = {
                "state": "finished", "varied": {"loss.beta": beta, "train.seed": seed}, "inputs": {}, "seconds": 60.0, "steps": 40,
                "metrics": metrics,
            }  # fmt: skip
    settings = [{"setting": f"beta-{b}", "varied": {"loss.beta": b}, "seeds": list(seeds)} for b in betas]
    table = {"metric": "eval/rewards/accuracies", "direction": "max", "settings": settings}
    write_json(folder / "sweep.json", {"table": table, "search": None, "runs": runs})
    return folder


def ci(value: float, low: float, high: float) -> dict[str, float]:
    return {"estimate": value, "low": low, "high": high}


def make_comparison(folder: Path, *, word: str = "fine", prompts: int = 4) -> Path:
    """A comparison of two settings with the start. The first wins clearly, the second does not."""
    models: dict[str, Any] = {"start": {"reward": 0.1, "reward/ci": [0.0, 0.2], "perplexity": 30.0}}
    for i, name in enumerate(("ours", word)):
        models[name] = {
            "reward": 0.5 + i / 10, "reward/ci": [0.4, 0.8], "kl": 4.0 + i, "kl/ci": [3.5 + i, 4.5 + i],
            "win_rate": 0.8 - 0.25 * i, "win_rate/ci": [0.7 - 0.25 * i, 0.9 - 0.25 * i],
        }  # fmt: skip
    pairs = []
    for a, b, rate in (
        ("ours", "start", ci(0.8, 0.7, 0.9)),
        (word, "start", ci(0.55, 0.45, 0.65)),
        ("ours", word, ci(0.7, 0.6, 0.8)),
    ):
        pairs.append(
            {"name": a, "other": b, "difference": ci(0.4, 0.2, 0.6), "win_rate": rate, "equal_length": rate, "p_prompts": 0.01,
             "p_seeds": None, "p": 0.01, "p_corrected": 0.03}
        )  # fmt: skip
    figures = {
        "models": models, "outcome": "mean reward", "comparisons": pairs, "heading": word, "notes": [word],
        "sentences": [f"ours is better than start: {word}", f"Between ours and {word} there is no clear winner: x"],
        "verdict": [{"tone": "good", "by": ""}, {"tone": "open", "by": ""}],
        "settings": {"reward": "sentiment", "prompts_asked": 4, "samples": 1, "max_new_tokens": 8, "seed": 0, "step": None, "data": None},
        "checkpoints": {word: "/nowhere/checkpoints/step-1/model"}, "prompts": prompts,
    }  # fmt: skip
    write_json(folder / "comparison.json", figures)
    rows = [
        {
            "prompt": f"{word} {i}",
            "sample": 0,
            "completions": {
                n: {"text": f"{word} {n} {i}", "tokens": 5 + j, "ended": bool(j), "reward": float((i * 7 + j * 3) % 5)}
                for j, n in enumerate(models)
            },
        }
        for i in range(prompts)
    ]
    write_lines(folder / "comparison.jsonl", rows)
    return folder


def make_flags(folder: Path, word: str = "fine") -> None:
    """One warning with evidence over steps, one note without."""
    evidence = [{"label": f"log-prob {word}", "values": [-10.0, -12.0, -15.0, -19.0], "steps": [0, 10, 20, 30]}]
    flag = {
        "name": "x",
        "title": f"title {word}",
        "level": "warning",
        "sentence": word,
        "advice": word,
        "about": word,
        "evidence": evidence,
    }
    write_json(
        folder / "flags.json",
        [{**flag, "level": "note", "evidence": [{"label": "n", "values": [3.0], "steps": []}]}, flag],
    )
