"""The reward-KL frontier of the DPO paper (arXiv 2305.18290, figure 2) on the bundled model: what each method pays for reward.

    .venv/bin/pip install -e '.[plots]'
    .venv/bin/python recipes/frontier.py --picture frontier.png

Controlled sentiment with the lexicon as the true reward. Offline methods learn from the demo's pairs, the best and worst of eight
completions of each opening; online ones write as many completions themselves and ask the lexicon. Each method runs at several betas with each seed; a point is a run's end on 130 held-out
openings: mean reward against KL(policy || start) of sampled continuations. Perplexity of hand-written reviews, distinct-2 and
the samples show what the reward does not.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from experiments import START, Task, arguments, fill, make_task, selected

from penchant import demo
from penchant.metrics.stats import bootstrap_ci

Runs = Mapping[str, Sequence[Mapping[str, Any]]]

BETAS = {
    "DPO": (0.03, 0.1, 0.3, 1.0),
    "DPO-Shift": (0.03, 0.1, 0.3, 1.0),
    "PMPO": (0.03, 0.1, 0.25, 1.0),
    "PPO": (0.01, 0.03, 0.1, 0.3),
    "RLOO": (0.01, 0.03, 0.1, 0.3),
    "GRPO": (0.01, 0.03, 0.1, 0.3),
}
SAMPLES = 4  # completions of a prompt, online; passes over the prompts make them as many as the pairs were chosen from
ONLINE = {
    "PPO": {"name": "ppo", "temperature": 1.0, "epochs": 2, "samples": SAMPLES},
    "RLOO": {"name": "rloo", "samples": SAMPLES},
    "GRPO": {"name": "grpo", "samples": SAMPLES},
}
ONLINE_LR = {"PPO": 3e-4, "RLOO": 3e-4, "GRPO": 3e-4}


def settings_of(task: Task, prompts: Path) -> dict[str, Mapping[str, Any]]:
    """Every method at every beta: what is laid over the task's config."""
    found: dict[str, Mapping[str, Any]] = {}
    for method, betas in BETAS.items():
        for beta in betas:
            label = f"{method} beta={beta:g}"
            if method == "DPO":
                found[label] = {"name": "dpo", "beta": beta}
            elif method == "DPO-Shift":
                found[label] = {"name": "dpo_shift", "lambda": 0.75, "beta": beta}
            elif method == "PMPO":
                found[label] = {
                    "loss": {"name": "pmpo", "beta": beta},
                    "data": {"path": task.unpaired},
                    **_double(task),
                }
            else:
                found[label] = {
                    "algorithm": {**ONLINE[method], "max_new_tokens": demo.NEW_TOKENS, "beta": beta},
                    "reward": "sentiment",
                    "data": {"path": str(prompts), "shape": "prompts"},
                    "train": {"epochs": demo.SAMPLES // SAMPLES, "lr": ONLINE_LR[method]},
                }
    return found


def _double(task: Task) -> dict[str, Any]:
    """The same answers a step when pairs are taken apart."""
    return {"train": {"batch_size": 2 * task.config["train"]["batch_size"]}}


def write_prompts(folder: Path) -> Path:
    """The openings that the pairs were written for."""
    path = folder / "prompts.jsonl"
    if not path.exists():
        openings = json.loads(demo.asset("openings.json").read_text())["train"]
        path.write_text("".join(json.dumps({"prompt": o}) + "\n" for o in openings), encoding="utf-8")
    return path


# ---------------------------------------------------------------------------------------------------------------------
# what came out


def print_frontier(done: Runs) -> None:
    """A line a setting: reward with its interval (openings as clusters, seeds of one opening together), KL, and what they cost."""
    print("| method | seeds | reward | KL | perplexity | distinct-2 | length | minutes |")
    print("|---|---|---|---|---|---|---|---|")
    for label, runs in done.items():
        good = [r for r in runs if "stopped" not in r]
        if not good:
            print(f"| {label} | {len(runs)} | stopped: {runs[0]['stopped'].split('; ')[0]} ||||||")
            continue
        rewards = np.array([r["rewards"] for r in good])
        openings = np.tile(np.arange(rewards.shape[1]) // 4, len(good))
        reward = bootstrap_ci(rewards.ravel(), clusters=openings)
        mean = {k: float(np.mean([r[k] for r in good])) for k in ("kl", "perplexity", "distinct", "length")}
        minutes = f"{np.mean([r['seconds'] for r in good]) / 60:.1f}" if "seconds" in good[0] else ""
        print(
            f"| {label} | {len(good)} | {reward.estimate:.3f} [{reward.low:.3f}, {reward.high:.3f}] | {mean['kl']:.2f} "
            f"| {mean['perplexity']:.1f} | {mean['distinct']:.3f} | {mean['length']:.1f} | {minutes} |"
        )


def print_samples(done: Runs) -> None:
    """The first two held-out openings' continuations of each method at its highest reward: not chosen by what they say."""
    print("\nFirst continuations of each method where its reward is highest:\n")
    for method in [START, *BETAS]:
        of_method = {k: v for k, v in done.items() if k.split(" beta=")[0] == method and "texts" in v[0]}
        if of_method:
            label = max(of_method, key=lambda k: float(np.mean([r.get("reward", -math.inf) for r in of_method[k]])))
            for text in of_method[label][0]["texts"][:2]:
                print(f"- {label}: {' '.join(text.split())}")


def hull(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The upper concave hull from the point of least KL to the point of highest reward."""
    found: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if found and y <= found[-1][1]:
            continue  # more KL for no more reward
        while len(found) > 1:
            (x1, y1), (x2, y2) = found[-2:]
            if (y2 - y1) * (x - x1) > (y - y1) * (x2 - x1):
                break
            found.pop()  # it lies below the line from its neighbor to the new point
        found.append((x, y))
    return found


def draw(done: Runs, path: Path) -> None:
    """The picture: a dot a run, a line around each method's best."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    start = done[START][0]["reward"]
    figure, axes = plt.subplots(figsize=(8, 5), dpi=120, layout="constrained")
    colors = ("#0072b2", "#56b4e9", "#009e73", "#d55e00", "#e69f00", "#cc79a7")  # told apart by color-blind eyes too
    for (method, _), color, mark in zip(BETAS.items(), colors, "osD^vP", strict=True):
        runs = [r for k, v in done.items() if k.startswith(f"{method} beta") for r in v if "stopped" not in r]
        points = [(r["kl"], r["reward"]) for r in runs]
        if points:
            axes.scatter(*zip(*points, strict=True), s=22, marker=mark, color=color, alpha=0.6, label=method)
            axes.plot(*zip(*hull([(0.0, start), *points]), strict=True), color=color, linewidth=1.2)
    axes.scatter([0], [start], marker="*", s=90, color="black", label="before training")
    axes.set(xlabel="KL(policy || start), nats per continuation", ylabel="mean sentiment reward (lexicon)")
    axes.set_title("What each method pays for reward: runs and their hulls", loc="left")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path)


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--picture", type=Path, help="write the picture here (PNG or SVG)")
    args = parser.parse_args()
    if args.task != "demo":
        parser.error("only --task demo has a true reward")
    task = make_task(args)
    settings = settings_of(task, write_prompts(args.output / args.task))
    done = fill(args, task, "frontier", selected(settings, args.only))
    print(task.describe(), "\n")
    print_frontier(done)
    print_samples(done)
    if args.picture:
        draw(done, args.picture)


if __name__ == "__main__":
    main()
