"""Distillation: a teacher's distributions (GKD) against its text alone (SFT), at equal steps, three seeds each.

    python recipes/distillation.py runs/distillation

The teacher is `penchant demo`'s aligned model; the student is the bundled model from which it was trained. The teacher samples one
continuation of each training opening. Every student trains on these openings for the same number of steps: `sft` on the teacher's text;
`gkd` with `lambda: 0` on the same text but with the full distribution at every token, with 0.5 on its own text in half of the rows,
and with 1 on its own text only. Measured on held-out openings with four continuations each: KL in both directions, in nats per
continuation, and the sentiment that the teacher was trained for. It takes about twenty minutes on one core, plus the teacher's training.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from penchant import api, demo
from penchant.metrics.completions import Completions
from penchant.metrics.stats import bootstrap_ci

STUDENTS: dict[str, dict[str, Any]] = {
    "sft on the teacher's text": {"loss": "sft"},
    "gkd, forward KL, teacher's text": {"algorithm": {"name": "gkd", "lambda": 0.0, "divergence": "forward_kl"}},
    "gkd, JSD, half own text": {"algorithm": {"name": "gkd", "lambda": 0.5}},
    "gkd, reverse KL, own text": {"algorithm": {"name": "gkd", "lambda": 1.0, "divergence": "reverse_kl"}},
}


def interval(values: Sequence[np.ndarray], openings: np.ndarray) -> str:
    """Format the mean over seeds and continuations with its 95% interval, clustered by opening."""
    estimate = bootstrap_ci(np.concatenate(values), clusters=np.tile(openings, len(values)))
    return f"{estimate.estimate:.2f} [{estimate.low:.2f}, {estimate.high:.2f}]"


def config_of(name: str, seed: int, args: argparse.Namespace, data: Path, teacher: str) -> dict[str, Any]:
    """The config of one student and seed."""
    config: dict[str, Any] = {
        **{k: dict(v) if isinstance(v, dict) else v for k, v in STUDENTS[name].items()},
        "model": {"path": str(demo.asset("model")), "dtype": "fp32"},
        "data": {"path": str(data), "max_length": 256, "add_eos": False},
        "train": {
            "epochs": args.epochs,
            "batch_size": 16,
            "tokens_per_step": 2048,
            "lr": args.lr,
            "schedule": "linear",
            "seed": seed,
        },
        "evaluation": {"samples": 0, "kl_prompts": 0, "at_start": False, "every": None},
        "checkpoint": {"keep_last": 1},
        "output": str(args.output / f"{name.replace(',', '').replace(' ', '-').replace(chr(39), '')}-{seed}"),
    }
    if "algorithm" in config:
        config["teacher"] = {"path": teacher}
        if config["algorithm"]["lambda"] > 0:  # the student writes
            config["algorithm"]["max_new_tokens"] = demo.NEW_TOKENS
    return config


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--teacher", type=Path, help="run folder of `penchant demo` (default: run the demo)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--lr", type=float, default=3e-4)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    if args.teacher is None:
        args.teacher = args.output / "teacher"
        demo.run_demo(args.teacher, quiet=True)
    from penchant.models.load import load_tokenizer

    start = str(demo.asset("model"))
    (teacher_folder,) = (str(f) for f in args.teacher.glob("checkpoints/step-*/model"))  # the demo keeps only the last
    tokenizer, teacher = load_tokenizer(start), demo._load(teacher_folder)
    openings = json.loads(demo.asset("openings.json").read_text())
    written = demo._write(teacher, tokenizer, openings["train"], 1, 0, None)
    rows = [{"prompt": p, "completion": t} for p, t in zip(openings["train"], written.texts, strict=True) if t.strip()]
    data = args.output / "teacher.jsonl"
    data.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
    models: dict[str, list[str]] = {
        "(the start)": [start],
        **{name: [] for name in STUDENTS},
        "(the teacher)": [teacher_folder],
    }
    for name in STUDENTS:
        for seed in range(args.seeds):
            config = config_of(name, seed, args, data, teacher_folder)
            models[name].append(str(api.train(config, quiet=True).model))
    print(
        f"{len(rows)} training openings, {args.epochs} epochs, batch size 16, lr {args.lr:g}; {len(openings['eval'])} held-out openings\n"
    )
    print("| student | seeds | KL(student to teacher) | KL(teacher to student) | sentiment |\n|---|---|---|---|---|")
    teacher_completions: Completions = demo._write(teacher, tokenizer, openings["eval"], demo.EVAL_SAMPLES, 1, None)
    teacher_logps = demo._logps(teacher, teacher_completions.trees)
    for name, folders in models.items():
        to_teacher, from_teacher, rewards = [], [], []
        for seed, folder in enumerate(folders):
            model = demo._load(folder)
            completions = demo._write(model, tokenizer, openings["eval"], demo.EVAL_SAMPLES, 2 + seed, None)
            assert completions.rewards is not None
            to_teacher.append(demo._logps(model, completions.trees) - demo._logps(teacher, completions.trees))
            from_teacher.append(teacher_logps - demo._logps(model, teacher_completions.trees))
            rewards.append(completions.rewards)
        line = [interval(values, teacher_completions.prompts) for values in (to_teacher, from_teacher, rewards)]
        print(f"| {name} | {len(folders)} | {' | '.join(line)} |", flush=True)


if __name__ == "__main__":
    main()
