"""Reward-KL frontier, as in figure 2 of the DPO paper (arXiv 2305.18290), of many methods on the bundled model.

    .venv/bin/pip install -e '.[plots]'
    .venv/bin/python recipes/frontier.py --picture frontier.png

The task is controlled sentiment with the lexicon as the true reward. Offline methods learn from the demo's pairs, the best and worst of
eight completions of each opening. Online methods sample the same number of completions and score them with the lexicon. GKD students
sample as many and learn from an aligned model instead. Each method runs at several betas with each seed. A point is the end of a run
on 130 held-out openings: mean reward against KL(policy || start) of sampled continuations. Perplexity of hand-written reviews,
distinct-2 and the samples show what the reward does not.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from experiments import START, Task, arguments, fill, folder_of, make_task, selected

from penchant import demo
from penchant.metrics.stats import bootstrap_ci

Runs = Mapping[str, Sequence[Mapping[str, Any]]]

SAMPLES = 4  # completions per prompt online; epochs are set so that the total equals that behind the offline pairs
TWO_STEPS = {"minibatches": 2}  # with one step per batch of rollouts the ratios are all 1, and the methods coincide
# name -> config section, betas
METHODS: dict[str, tuple[dict[str, Any], Sequence[float]]] = {
    "DPO": ({"loss": {"name": "dpo"}}, (0.03, 0.1, 0.3)),
    "DPO-Shift": ({"loss": {"name": "dpo_shift", "lambda": 0.75}}, (0.03,)),
    "PMPO": ({"loss": {"name": "pmpo"}}, (0.03, 0.1)),
    "online DPO": ({"algorithm": {"name": "online_dpo"}}, (0.03, 0.1)),
    "PPO": ({"algorithm": {"name": "ppo", "temperature": 1.0, "epochs": 2}}, (0.03, 0.1)),
    "RLOO": ({"algorithm": {"name": "rloo", **TWO_STEPS}}, (0.03, 0.1)),
    "GRPO": ({"algorithm": {"name": "grpo", **TWO_STEPS}}, (0.03, 0.1)),
    # rewards are not divided by their standard deviation, so beta weighs about three times as much
    "Dr. GRPO": ({"algorithm": {"name": "dr_grpo", **TWO_STEPS}}, (0.01, 0.03)),
    # nearly every continuation is truncated at 40 tokens, and those of an opening rarely share a reward
    "DAPO": ({"algorithm": {"name": "dapo", "overlong_filter": False, **TWO_STEPS}}, (0.03, 0.1)),
    "GSPO": ({"algorithm": {"name": "gspo", **TWO_STEPS}}, (0.03, 0.1)),
    "CISPO": ({"algorithm": {"name": "cispo", **TWO_STEPS}}, (0.03, 0.1)),
}
LR = 3e-4  # learning rate of online methods
TEACHER = "RLOO beta=0.03"  # the model of its first seed
STUDENTS = {"GKD forward KL": {"divergence": "forward_kl"}, "GKD reverse KL": {"divergence": "reverse_kl"}}
AT = (2.0, 4.0, 6.0, 8.0, 10.0)  # nats at which methods are compared
WIDTH = 30.0  # nats, right end of the plot; runs beyond it appear in the table only


def settings_of(task: Task, prompts: Path, teacher: Path) -> dict[str, Mapping[str, Any]]:
    """Config overrides of every method at every beta, and of the students, by label."""
    online = {
        "data": {"path": str(prompts), "shape": "prompts"},
        "train": {"epochs": demo.SAMPLES // SAMPLES, "lr": LR},
    }
    settings: dict[str, Mapping[str, Any]] = {}
    for method, (sections, betas) in METHODS.items():
        for beta in betas:
            setting = {name: {**section, "beta": beta} for name, section in sections.items()}
            if "algorithm" in setting:
                setting["algorithm"] = {"samples": SAMPLES, "max_new_tokens": demo.NEW_TOKENS, **setting["algorithm"]}
                setting |= {"reward": "sentiment", **online}
            elif method == "PMPO":  # keeps the number of completions per step with unpaired rows
                setting |= {
                    "data": {"path": task.unpaired},
                    "train": {"batch_size": 2 * task.config["train"]["batch_size"]},
                }
            settings[f"{method} beta={beta:g}"] = setting
    for name, divergence in STUDENTS.items():
        sections = {"algorithm": {"name": "gkd", "lambda": 1.0, "max_new_tokens": demo.NEW_TOKENS, **divergence}}
        batch = {"epochs": demo.SAMPLES, "lr": LR, "batch_size": SAMPLES * task.config["train"]["batch_size"]}
        settings[name] = {**online, **sections, "train": batch, "teacher": {"path": str(teacher)}}
    return settings


def method_of(label: str) -> str:
    return label.split(" beta=")[0]


def write_prompts(folder: Path) -> Path:
    """Write the demo's training openings as prompts and return the file."""
    path = folder / "prompts.jsonl"
    if not path.exists():
        openings = json.loads(demo.asset("openings.json").read_text())["train"]
        path.write_text("".join(json.dumps({"prompt": o}) + "\n" for o in openings), encoding="utf-8")
    return path


# ---------------------------------------------------------------------------------------------------------------------
# results


def print_frontier(done: Runs) -> None:
    """Print a row per setting: reward with its interval (clustered by opening), KL, side effects and minutes."""
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


def print_at(done: Runs) -> None:
    """Print reward at equal KL, interpolated between the start and a method's runs of each seed: mean, lowest, highest."""
    print("\nReward at a given KL in nats, interpolated between neighboring betas: mean over seeds (lowest, highest)\n")
    print(f"| method | {' | '.join(f'{x:g}' for x in AT)} |\n|---|{'---|' * len(AT)}")
    start = done[START][0]["reward"]
    for method in METHODS:
        lines: dict[int, list[tuple[float, float]]] = {}
        for label, runs in done.items():
            for seed, r in enumerate(runs if method_of(label) == method else ()):
                if "stopped" not in r:
                    lines.setdefault(seed, [(0.0, start)]).append((r["kl"], r["reward"]))
        cells = []
        for x in AT:
            reached = [p for points in lines.values() if max(p := sorted(points))[0] >= x]
            interpolated = [float(np.interp(x, *zip(*points, strict=True))) for points in reached]
            # leave the cell empty if a seed did not reach this KL: the mean would cover the other seeds only
            cells.append(
                f"{np.mean(interpolated):.3f} ({min(interpolated):.3f}, {max(interpolated):.3f})"
                if interpolated and len(interpolated) == len(lines)
                else ""
            )
        if any(cells):
            print(f"| {method} | {' | '.join(cells)} |")


def print_samples(done: Runs) -> None:
    """Print each method's continuations of the first two held-out openings, from its setting with the highest reward."""
    print("\nTwo continuations of each method, at its setting with the highest reward:\n")
    for method in [START, *METHODS, *STUDENTS]:
        of_method = {k: v for k, v in done.items() if method_of(k) == method and "texts" in v[0]}
        if of_method:
            label = max(of_method, key=lambda k: float(np.mean([r.get("reward", -math.inf) for r in of_method[k]])))
            for text in of_method[label][0]["texts"][:2]:
                print(f"- {label}: {' '.join(text.split())}")


def hull(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Upper concave hull from the point with the lowest KL to the one with the highest reward."""
    corners: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if corners and y <= corners[-1][1]:
            continue  # more KL without more reward
        while len(corners) > 1:
            (x1, y1), (x2, y2) = corners[-2:]
            if (y2 - y1) * (x - x1) > (y - y1) * (x2 - x1):
                break
            corners.pop()  # below the line from its neighbor to the new point
        corners.append((x, y))
    return corners


def draw(done: Runs, path: Path) -> None:
    """Plot a dot per run and the hull of each method, in two panels, each with the hull of all runs."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    start = done[START][0]["reward"]
    points: dict[str, list[tuple[float, float]]] = {method: [] for method in [*METHODS, *STUDENTS]}
    for label, runs in done.items():
        if label != START:
            points[method_of(label)] += [(r["kl"], r["reward"]) for r in runs if "stopped" not in r]
    names = [method for method, of_method in points.items() if of_method]
    all_points = [p for of_method in points.values() for p in of_method]
    halves = [names[: -(-len(names) // 2)], names[-(-len(names) // 2) :]]
    figure, axes = plt.subplots(1, 2, figsize=(12, 5), dpi=110, layout="constrained", sharey=True, sharex=True)
    # distinguishable for color-blind readers
    colors = ("#0072b2", "#56b4e9", "#009e73", "#d55e00", "#e69f00", "#cc79a7", "#555555")
    for half, methods in zip(axes, halves, strict=True):
        half.plot(
            *zip(*hull([(0.0, start), *all_points]), strict=True), color="#cccccc", linewidth=4, label="best of all"
        )
        for method, color, mark in zip(methods, colors, "osD^vPX", strict=False):
            half.scatter(*zip(*points[method], strict=True), s=22, marker=mark, color=color, alpha=0.7, label=method)
            if method in METHODS:  # students have no beta to vary
                line = hull([(0.0, start), *points[method]])
                half.plot(*zip(*line, strict=True), color=color, linewidth=1.2)
        half.scatter([0], [start], marker="*", s=90, color="black", label="before training")
        half.set(xlabel="KL(policy || start), nats per continuation", xlim=(-1.0, WIDTH))
        half.grid(alpha=0.3)
        half.legend(loc="lower right")
    axes[0].set(ylabel="mean sentiment reward (lexicon)")
    axes[0].set_title("Reward against KL: runs of each method and their hulls", loc="left")
    figure.savefig(path)


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--picture", type=Path, help="write the plot to this file (PNG or SVG)")
    args = parser.parse_args()
    if args.task != "demo":
        parser.error("only --task demo has a true reward")
    task = make_task(args)
    settings = settings_of(task, write_prompts(args.output / args.task), folder_of(args, "frontier", TEACHER, 0))
    results = fill(args, task, "frontier", selected(settings, args.only))
    print(task.describe(), "\n")
    print_frontier(results)
    print_at(results)
    print_samples(results)
    if args.picture:
        draw(results, args.picture)


if __name__ == "__main__":
    main()
