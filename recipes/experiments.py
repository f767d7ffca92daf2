"""Shared code of the result tables: two tasks, training and measuring a setting, printing a table.

Every run is a folder. An interrupted table continues where it stopped, and a finished one is printed at once.

Tasks:
    demo  controlled sentiment on the bundled 3.4M-parameter model: pairs ranked by the lexicon, 130 held-out openings
    hh    hh-rlhf harmless with SmolLM2-135M-Instruct and LoRA; the held-out pairs have other prompts
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from penchant import demo
from penchant.api import train
from penchant.errors import CheckpointError, PenchantError
from penchant.losses import LOSSES
from penchant.metrics.stats import bootstrap_ci
from penchant.training.loop import Interrupted

Setting = Mapping[str, Any]  # a `loss` section (with `name`), or whole sections that override the task's config
HH_PAIRS, HH_HELDOUT = 96, 64
SAMPLE_TOKENS = 32
START = "(before training)"


@dataclass(frozen=True, slots=True)
class Task:
    """A config with its model and data, and the number of training and held-out pairs."""

    name: str
    config: Mapping[str, Any]
    train_rows: int
    heldout_rows: int
    unpaired: str = ""  # file with the same training completions as unpaired rows with labels

    def describe(self) -> str:
        t = self.config["train"]
        return (
            f"task {self.name}: {self.train_rows} training pairs, {self.heldout_rows} held-out pairs, {t['epochs']} epoch(s), "
            f"batch size {t['batch_size']}, lr {t['lr']}"
        )


def arguments(description: str) -> argparse.ArgumentParser:
    """Parser with the options that all tables share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--task", choices=["demo", "hh"], default="demo")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("runs/tables"))
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="model for --task hh")
    parser.add_argument("--data", help="hh-rlhf harmless-base rows (JSONL) for --task hh")
    parser.add_argument("--threads", type=int, help="CPU threads (default: depends on the task)")
    parser.add_argument("--only", help="comma-separated list of rows to run and print")
    parser.add_argument("--print-only", action="store_true", help="print finished results and run nothing")
    return parser


def make_task(args: argparse.Namespace) -> Task:
    """Build the task, writing its data files if they do not exist."""
    folder = args.output / args.task
    folder.mkdir(parents=True, exist_ok=True)
    task = _demo_task(folder) if args.task == "demo" else _hh_task(folder, args.model, args.data)
    if args.threads:
        task.config["train"]["threads"] = args.threads
    return task


def _demo_task(folder: Path) -> Task:
    """The model, data and training settings of `penchant demo`, with held-out pairs from its held-out openings."""
    paths = {name: folder / f"{name}.jsonl" for name in ("train", "heldout", "unpaired")}
    if not paths["unpaired"].exists():
        import torch

        torch.set_num_threads(1)
        model, tokenizer = demo._load(str(demo.asset("model"))), _tokenizer(str(demo.asset("model")))
        openings = json.loads(demo.asset("openings.json").read_text())
        for name, which, seed in (("train", "train", 0), ("heldout", "eval", 1)):
            _write(paths[name], demo._make_pairs(model, tokenizer, openings[which], seed, None))
        _write_unpaired(paths)
    config: dict[str, Any] = {k: dict(v) for k, v in demo.TRAINING.items() if k != "loss"}
    del config["data"]["validation_rows"], config["reference"]
    config["data"] |= {"path": str(paths["train"]), "eval_path": str(paths["heldout"])}
    config["model"] = {"path": str(demo.asset("model")), "dtype": "fp32"}
    return Task("demo", config, _count(paths["train"]), _count(paths["heldout"]), str(paths["unpaired"]))


def _hh_task(folder: Path, model: str, data: str | None) -> Task:
    """Train on the first pairs of hh-rlhf that are short enough, and hold out the next ones (with other prompts)."""
    paths = {name: folder / f"{name}.jsonl" for name in ("train", "heldout", "unpaired")}
    if not paths["unpaired"].exists():
        if data is None:
            sys.exit("--task hh needs --data, a JSONL file of Anthropic/hh-rlhf, harmless-base")
        from penchant.data.load import load_preferences, prompt_text

        trees = load_preferences(data, on_bad_row="skip").trees
        short = [t for t in trees if len(prompt_text(t.prompt)) + sum(len(c.text) for c in t.completions) < 900]
        rows = [
            {
                "prompt": [{"role": m.role, "content": m.content} for m in t.prompt],  # type: ignore[union-attr]
                "chosen": [{"role": "assistant", "content": t.completions[0].text}],
                "rejected": [{"role": "assistant", "content": t.completions[1].text}],
            }
            for t in short[: HH_PAIRS + HH_HELDOUT]
        ]
        _write(paths["train"], rows[:HH_PAIRS])
        _write(paths["heldout"], rows[HH_PAIRS:])
        _write_unpaired(paths)
    config = {
        "model": {"path": model},
        "lora": {"r": 16, "alpha": 32.0},
        "data": {"path": str(paths["train"]), "eval_path": str(paths["heldout"]), "max_length": 384},
        "train": {"epochs": 1, "batch_size": 8, "lr": 5e-4, "schedule": "linear", "tokens_per_step": 2048},
        "reference": {"kind": "cached"},
        "evaluation": {"samples": 0, "kl_prompts": 0},
    }
    return Task("hh", config, _count(paths["train"]), _count(paths["heldout"]), str(paths["unpaired"]))


def _write_unpaired(paths: Mapping[str, Path]) -> None:
    """Write each completion of the training pairs as a row with a label, shuffled."""
    rows = []
    for line in paths["train"].read_text().splitlines():
        row = json.loads(line)
        for name, label in (("chosen", True), ("rejected", False)):
            rows.append({"prompt": row["prompt"], "completion": row[name], "label": label})
    order = np.random.default_rng(0).permutation(len(rows))
    _write(paths["unpaired"], [rows[i] for i in order])


def _write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    aside = path.with_suffix(".tmp")
    aside.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    os.replace(aside, path)


def _count(path: Path) -> int:
    return sum(1 for _ in path.open(encoding="utf-8"))


def _tokenizer(path: str) -> Any:
    from penchant.models.load import load_tokenizer

    return load_tokenizer(path)


# ---------------------------------------------------------------------------------------------------------------------
# one setting


def run_setting(
    task: Task,
    folder: Path,
    loss: Setting,
    seed: int,
    before: Mapping[str, Any] | None,
    *,
    unpaired: bool = False,
    print_only: bool = False,
) -> dict[str, Any] | None:
    """Train (or resume) one setting with one seed and measure it. Returns None if it is unfinished and `print_only` is set.

    A run that fails, stops itself or does not fit the data returns ``{"stopped": why}``.
    """
    path = folder / "measured.json"
    if path.exists():
        measured: dict[str, Any] = json.loads(path.read_text())
        return measured
    if print_only:
        return None
    overlay = {"loss": dict(loss)} if "name" in loss else loss
    sections = {**task.config, "output": str(folder)}
    config = {k: {**v, **overlay.get(k, {})} if isinstance(v, Mapping) else v for k, v in sections.items()}
    config |= {k: v for k, v in overlay.items() if k not in config}
    config["data"] = {k: v for k, v in config["data"].items() if k != "eval_path"}  # see _measure
    config["train"] |= {"seed": seed}
    config["evaluation"] |= {"every": None, "at_start": False}
    config["checkpoint"] = {"keep_last": 1, "every": None}
    if "divergence" in LOSSES[str(overlay.get("loss", {}).get("name", "dpo"))].needs:
        config.pop("reference", None)  # needs full distributions, which the reference cache does not hold
    if unpaired:  # twice the rows, so double the batch to keep completions per step and the number of steps
        config["data"] |= {"path": task.unpaired}
        config["train"] |= {"batch_size": 2 * task.config["train"]["batch_size"]}
    started = time.monotonic()
    try:
        result = train(config, quiet=True)
        seconds = time.monotonic() - started
        measured = _measure(task, config, result.model.parent, before) | {"seconds": seconds}
    except (Interrupted, CheckpointError):
        raise  # the run is in use by another process or was interrupted by the user: there is no result
    except PenchantError as error:
        measured = {"stopped": str(error).split(": ", 1)[-1][:160]}
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(measured))
    return measured


def _measure(
    task: Task, config: Mapping[str, Any], checkpoint: Path | None, before: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Measure a checkpoint (None: the start) against `before`: held-out pairs, KL of samples, lengths, reward."""
    import torch

    from penchant.api import as_config
    from penchant.logprobs.reference import LiveReference, compute_logps
    from penchant.metrics.completions import distinct_n
    from penchant.metrics.heldout import pair_change
    from penchant.rollout.generate import sample
    from penchant.runs import Run
    from penchant.training.checkpoint import load_checkpoint
    from penchant.types import TokenTree

    # always measure against the starting model: ORPO, which has no reference, builds no other model
    of_policy = {k: v for k, v in config.items() if k not in ("algorithm", "reward", "reference", "teacher")}
    of_policy |= {"loss": {"name": "orpo"}, "data": task.config["data"], "output": "unused"}
    run = Run(as_config(of_policy), quiet=True)
    parts, tokenizer = run.built.parts, run.rows.tokenizer
    if checkpoint is not None:
        run.built.optimizer.load_state_tensors(load_checkpoint(checkpoint)[0])
    parts.model.eval()
    policy, start = LiveReference(parts.scorer), run.held_out.start()
    trees = run.rows.trees[1]
    budget = config["train"]["tokens_per_step"]
    logps = compute_logps(policy, trees, tokens_per_step=budget).sums
    change = pair_change(logps, logps if before is None else torch.tensor(before["logps"]))
    is_demo = task.name == "demo"
    prompts = list(dict.fromkeys(tuple(t.prompt_ids.tolist()) for t in trees))[: None if is_demo else 16]
    rows = sample(
        parts.model,
        prompts,
        n=4 if is_demo else 1,
        max_new_tokens=demo.NEW_TOKENS if is_demo else SAMPLE_TOKENS,
        seed=2,
        eos_token_id=tokenizer.eos_token_id,
    )
    ids = [s.ids for group in rows for s in group]
    written = [
        TokenTree(i, np.array(p, np.int32), tuple(np.array(s.ids, np.int32) for s in group), (False,) * len(group))
        for i, (p, group) in enumerate(zip(prompts, rows, strict=True))
    ]
    now, then = (compute_logps(m, written, tokens_per_step=budget).sums.double() for m in (policy, start))
    measured = {
        "correct": change.correct.tolist(),
        "chosen": change.chosen.tolist(),
        "rejected": change.rejected.tolist(),
        "kl": float((now - then).mean()),
        "logps": logps.tolist(),
        "length": float(np.mean([len(i) for i in ids])),
    }
    if is_demo:
        from penchant.rewards.builtin import sentiment

        texts = [tokenizer.decode(i, skip_special_tokens=True) for i in ids]
        rewards = sentiment(texts)
        reviews = demo._perplexity(parts.model, tokenizer, str(demo.asset("reviews.jsonl")))
        measured |= {
            "reward": float(np.mean(rewards)),
            "rewards": rewards.tolist(),
            "kls": (now - then).tolist(),
            "distinct": distinct_n(ids, 2),
            "perplexity": reviews,
            "texts": texts[::4][:8],
        }
    return measured


# ---------------------------------------------------------------------------------------------------------------------
# a table


def folder_of(args: argparse.Namespace, name: str, label: str, seed: int) -> Path:
    """Run folder of one setting and seed in the table `name`."""
    plain = label.replace(" ", "_").replace("=", "-")
    return Path(args.output) / args.task / name / plain / f"seed-{seed}"


def fill(
    args: argparse.Namespace, task: Task, name: str, settings: Mapping[str, Setting], *, unpaired: bool = False
) -> dict[str, list[dict[str, Any]]]:
    """Run every setting with every seed and return results by setting. The outer loop is over seeds, to interrupt evenly."""
    results: dict[str, list[dict[str, Any]]] = {START: [], **{label: [] for label in settings}}
    start = args.output / args.task / "start.json"
    if not start.exists() and not args.print_only:
        start.write_text(json.dumps(_measure(task, task.config, None, None)))
    before = json.loads(start.read_text()) if start.exists() else None
    if before is not None:
        results[START].append(before)
    for seed in range(args.seeds):
        for label, loss in settings.items():
            folder = folder_of(args, name, label, seed)
            measured = run_setting(task, folder, loss, seed, before, unpaired=unpaired, print_only=args.print_only)
            if measured is not None:
                results[label].append(measured)
                if not args.print_only:
                    print(f"{name}: {label}, seed {seed}", file=sys.stderr, flush=True)
    return {label: rows for label, rows in results.items() if rows}


def print_table(first: str, done: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Print a Markdown table of means over seeds, with a 95% interval of the accuracy, clustered by held-out pair."""
    reward = any("reward" in m for rows in done.values() for m in rows)
    names = [first, "seeds", "accuracy", "margin", "d chosen", "d rejected", "KL", "length", *(["reward"] * reward)]
    lines = [[*names]]
    for label, rows in done.items():
        good = [m for m in rows if "stopped" not in m]
        if not good:
            lines.append(
                [label, str(len(rows)), f"stopped: {rows[0]['stopped'].split('; ')[0]}", *[""] * (len(names) - 3)]
            )
            continue
        correct = np.array([m["correct"] for m in good])
        accuracy = bootstrap_ci(correct.ravel(), clusters=np.tile(np.arange(correct.shape[1]), len(good)))
        chosen, rejected = (np.array([np.mean(m[k]) for m in good]) for k in ("chosen", "rejected"))
        line = [
            label,
            f"{len(good)}" + (f" of {len(rows)}" if len(good) < len(rows) else ""),
            f"{accuracy.estimate:.3f} [{accuracy.low:.3f}, {accuracy.high:.3f}]",
            _mean(chosen - rejected),
            _mean(chosen),
            _mean(rejected),
            _mean([m["kl"] for m in good]),
            _mean([m["length"] for m in good], 1),
        ]
        lines.append(line + ([_mean([m["reward"] for m in good], 3)] if reward else []))
    widths = [max(len(line[i]) for line in lines) for i in range(len(names))]
    for i, line in enumerate(lines):
        print("| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |")
        if i == 0:
            print("|" + "|".join("-" * (w + 2) for w in widths) + "|")


def _mean(values: Any, digits: int = 2) -> str:
    """Format the mean over seeds, with the standard deviation if there are several."""
    x = np.asarray(values, dtype=float)
    spread = f" ±{x.std(ddof=1):.{digits}f}" if len(x) > 1 else ""
    return f"{x.mean():.{digits}f}{spread}"


def selected(settings: Mapping[str, Setting], only: str | None) -> dict[str, Setting]:
    """The settings named in `only`, a comma-separated list (None: all). Exits with an error if a name is unknown."""
    if only is None:
        return dict(settings)
    names = only.split(",")
    unknown = [w for w in names if w not in settings]
    if unknown:
        sys.exit(f"no such row: {', '.join(unknown)}; the rows are {', '.join(settings)}")
    return {w: settings[w] for w in names}
