"""DPO, DPO-Shift and PMPO with a known true reward: beta chosen on validation openings, compared once on test openings.

    .venv/bin/python recipes/three_methods.py                # writes runs/three-methods/report.html; resumes if interrupted

The demo's task (controlled sentiment, arXiv 2305.18290, section 6) with the lexicon as the true reward. Every method trains at every
beta with every seed on the same pairs, PMPO on the same completions as unpaired rows. The win rate on openings held out of training
selects each method's beta. The three selected settings are then compared once on unseen test openings, which gives the final result.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import make_task

from penchant import api, demo
from penchant.errors import PenchantError

BETAS = [0.03, 0.1, 0.3]
METHODS: dict[str, dict[str, Any]] = {
    "dpo": {"loss": {"name": "dpo"}},
    "dpo_shift": {"loss": {"name": "dpo_shift", "lambda": 0.75}},
    "pmpo": {"loss": {"name": "pmpo"}},
}
VALIDATION_OPENINGS = 60
METRIC = "eval/win_rate"


def split(folder: Path, rows: Path) -> tuple[Path, Path]:
    """Split the training pairs, with those of the last openings for validation, and return both files."""
    train, validation = folder / "train.jsonl", folder / "validation.jsonl"
    if not validation.exists():
        lines = rows.read_text(encoding="utf-8").splitlines(keepends=True)
        openings = list(dict.fromkeys(json.loads(line)["prompt"] for line in lines))
        held_out = set(openings[-VALIDATION_OPENINGS:])
        for path, in_validation in ((train, False), (validation, True)):
            path.write_text(
                "".join(x for x in lines if (json.loads(x)["prompt"] in held_out) is in_validation), encoding="utf-8"
            )
    return train, validation


def sweep_config(folder: Path, config: Mapping[str, Any], pairs: Path, seeds: int) -> dict[str, Any]:
    """Config of a sweep with every method at every beta and seed."""
    train, validation = split(folder, pairs)
    base = {k: dict(v) for k, v in config.items()}
    base["data"] |= {"path": str(train), "eval_path": str(validation)}
    base["evaluation"] = {
        "every": "epoch",
        "samples": 8,
        "sample_tokens": demo.NEW_TOKENS,
        "kl_prompts": VALIDATION_OPENINGS,
        "reward": "sentiment",
    }
    return {
        "output": str(folder / "sweep"),
        "base": base,
        "runs": METHODS,
        "grid": {"loss.beta": BETAS, "train.seed": list(range(seeds))},
        "metric": METRIC,
    }


def best_of_each(settings: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The varied keys of each method's best setting. `settings` must be sorted by the metric, best first."""
    best: dict[str, Mapping[str, Any]] = {}
    for setting in settings:
        if setting["mean"] is not None and not setting["stopped"]:
            best.setdefault(setting["varied"]["run"], setting["varied"])
    return list(best.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/three-methods"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="number of runs at a time")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    task = make_task(argparse.Namespace(task="demo", output=args.output, threads=None))
    pairs = Path(task.config["data"]["path"])
    try:
        swept = api.sweep(sweep_config(args.output, task.config, pairs, args.seeds), jobs=args.jobs)
        print(swept.to_text(), "\n")
        chosen = best_of_each(swept.table.to_json()["settings"])
        runs = [
            str(swept.folder / name)
            for name, record in swept.runs.items()
            if {k: v for k, v in record["varied"].items() if k != "train.seed"} in chosen
        ]
        comparison = api.compare(
            *runs,
            reward="sentiment",
            prompts=200,
            samples=4,
            max_new_tokens=demo.NEW_TOKENS,
            data=task.config["data"]["eval_path"],
            output=args.output / "comparison",
        )
        print(comparison.to_text())
        print(api.report(args.output / "comparison", swept.folder, output=args.output / "report.html"))
    except PenchantError as error:
        print(f"three_methods: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
