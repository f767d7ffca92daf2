"""Train reward models on film-review sentences from several base models, for the table in docs/results.md.

    .venv/bin/python recipes/reward_models.py --data sst2_train.tsv --model bundled --model minilm=all-MiniLM-L6-v2

The data is lines of sentence, tab, 0 or 1 (Stanford Sentiment Treebank). Every pair is a positive against a negative sentence, drawn
without replacement, and 500 pairs are held out, so no sentence is in both splits. A model is NAME=FOLDER (a causal model or a
BERT-type encoder), or `bundled`.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import penchant
from penchant import api
from penchant.metrics.heldout import format_quality

HELD_OUT = 500


def sentence_pairs(path: Path, folder: Path, seed: int = 0) -> dict[str, str]:
    """Write train.jsonl and heldout.jsonl with pairs of a positive and a negative sentence. Sentences with both labels are dropped."""
    labels: dict[str, set[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        sentence, _, label = line.rpartition("\t")
        labels.setdefault(sentence.strip(), set()).add(label)
    sides = [sorted(s for s, of_sentence in labels.items() if s and of_sentence == {label}) for label in ("1", "0")]
    for side in sides:
        random.Random(seed).shuffle(side)
    rows = [{"prompt": "Review:", "chosen": f" {a}", "rejected": f" {b}"} for a, b in zip(*sides, strict=False)]
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for name, part in (("path", rows[HELD_OUT:]), ("eval_path", rows[:HELD_OUT])):
        file = folder / ("train.jsonl" if name == "path" else "heldout.jsonl")
        file.write_text("".join(json.dumps(r) + "\n" for r in part), encoding="utf-8")
        paths[name] = str(file)
    return paths


def train(data: dict[str, str], name: str, model: str, output: Path, lr: float | None) -> dict[str, Any]:
    """Train one reward model and return its held-out metrics before and after training, its quality and its manifest."""
    run = {
        "model": {"path": model},
        "data": {**data, "max_length": 96},
        "algorithm": "reward_model",
        "train": {"epochs": 1, "batch_size": 32, **({} if lr is None else {"lr": lr})},
        "output": str(output / f"sst2-{name}"),
    }
    result = api.train(run)
    quality = json.loads((result.folder / "calibration.json").read_text())
    manifest = json.loads((result.folder / "manifest.json").read_text())
    return {
        "before": result.before,
        "after": result.after,
        "quality": quality,
        "manifest": manifest,
        "steps": result.steps,
    }


def row(name: str, m: Any) -> str:
    """Format one row of the table."""
    low, high = m["eval/rewards/accuracies/ci"]
    quartiles = " / ".join(f"{m[f'eval/length/q{q}/accuracy']:.3f}" for q in range(1, 5))
    return (
        f"| {name} | {m['eval/rewards/accuracies']:.3f} [{low:.3f}, {high:.3f}] | {m['eval/loss']:.3f} | "
        f"{m['eval/calibration/ece']:.3f} | {m['eval/calibration/brier']:.3f} | {quartiles} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="the sentences, such as sst2_train.tsv")
    parser.add_argument("--model", action="append", required=True, help="NAME=FOLDER or bundled; may be repeated")
    parser.add_argument("--lr", type=float, help="learning rate (default: depends on the kind of model)")
    parser.add_argument("--output", default="runs/reward-models")
    args = parser.parse_args()
    output = Path(args.output)
    data = sentence_pairs(Path(args.data), output / "sst2-pairs")
    bundled = str(Path(penchant.__file__).parent / "assets" / "model")
    lines, details = [], []
    for argument in args.model:
        name, _, folder = argument.partition("=")
        result = train(data, name, folder or bundled, output, args.lr)
        lines += [row(f"{name}, before", result["before"]), row(f"{name}, after", result["after"])]
        m, a = result["manifest"], result["after"]
        rows = [m["data"][k]["rows"] for k in ("train split", "held-out split") if k in m["data"]]
        details.append(
            f"{name}: {m['model']['parameters']:,} parameters, {rows[0]:,} training pairs, {a['eval/rows']:,} held out, "
            f"{result['steps']} steps, {m['hardware']['dtype']}; accuracy of preferring the longer answer: {a['eval/length/longer_wins']:.3f}\n"
            + format_quality(result["quality"])
        )
    print("| model | accuracy | loss | ECE | Brier | accuracy by quartile of length gap |")
    print("|---|---|---|---|---|---|")
    print("\n".join(lines), *(f"\n{d}" for d in details), sep="\n")


if __name__ == "__main__":
    main()
