"""Penchant's worker for PPO: its own run and training loop on the given prompts. Takes a JSON spec, prints a JSON result.

As in worker_penchant.py, the token ids are given and the console is a clock. Here it marks batches of episodes, each of
`epochs x minibatches` optimizer steps.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from measure import Clock, finish
from worker_penchant import ClockConsole


class EpisodeConsole(ClockConsole):
    """Marks every `updates`-th optimizer step and keeps the reward, KL, length and EOS rate of its rollouts."""

    def __init__(self, clock: Clock, updates: int) -> None:
        super().__init__(clock)
        self.updates = updates
        self.rollouts: list[dict[str, float]] = []

    def step(self, step: int, total: int, metrics: Mapping[str, Any]) -> None:
        if step % self.updates == 0:
            self.clock.step()
            names = {
                "reward": "reward",
                "kl": "kl/policy_ref",
                "ended": "completions/ended",
                "length": "completions/length",
            }
            self.rollouts.append({short: float(metrics[name]) for short, name in names.items()})


def settings_of(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Translate a spec to a config mapping, as read from a YAML file."""
    return {
        "output": str(Path(spec["work"]).resolve()),
        "model": {
            "path": spec["model"],
            "dtype": spec["precision"],
            "device": "cpu",
            "kernels": spec["ours"]["kernels"],
        },
        "reference": {"kind": "frozen"},
        "data": {"path": spec["prompts"], "max_length": spec["longest"] + spec["response_length"]},
        "algorithm": {
            "name": "ppo",
            "value": spec["ours"]["value"],
            "samples": 1,
            "max_new_tokens": spec["response_length"],
            "epochs": spec["epochs"],
            "minibatches": spec["minibatches"],
            "missing_eos_penalty": spec["missing_eos_penalty"],
            "value_clip": spec["clip"],
            "whiten_advantages": True,
            "lambda": spec["lam"],
            **{
                k: spec[k] for k in ("temperature", "beta", "gamma", "clip", "value_coef", "adam_eps", "whiten_rewards")
            },
        },
        "reward": str(Path(__file__).with_name("ppo_reward.py")) + ":warmth",
        "train": {
            "max_steps": spec["batches"] * spec["epochs"] * spec["minibatches"],
            "batch_size": spec["batch"],
            "tokens_per_step": spec["ours"]["tokens_per_step"],
            "lr": spec["lr"],
            "schedule": "constant",
            "warmup_fraction": 0.0,
            "weight_decay": 0.0,
            "max_grad_norm": None,
            "packing": "auto",
            "shuffle": False,
            "threads": spec["threads"],
            "seed": spec["seed"],
        },
        "evaluation": {"every": None, "at_start": False, "samples": 0},
        "checkpoint": {"every": None},
    }


def read_trees(spec: Mapping[str, Any]) -> list[Any]:
    """Read the prompts of all batches, in order."""
    import numpy as np

    from penchant.types import TokenTree

    rows = json.loads(Path(spec["prompts"]).read_text())[spec["kind"]][: spec["batch"] * spec["batches"]]
    return [TokenTree(i, np.asarray(ids, dtype=np.int32), (), (), f"prompt {i}") for i, ids in enumerate(rows)]


def trained(
    spec: Mapping[str, Any], settings: Mapping[str, Any], updates: int
) -> tuple[Any, EpisodeConsole, dict[str, Any]]:
    """Train with a config on the given prompts. Returns the run, its console and the clock's result.

    Args:
        updates: optimizer steps per batch of rollouts.
    """
    from penchant.config import config_from_mapping
    from penchant.runs import Run
    from penchant.runs.rows import Rows
    from penchant.runs.sharing import Uncached

    clock = Clock(spec["warmup_batches"])
    config, console = config_from_mapping(settings, []), EpisodeConsole(clock, updates)
    rows = Rows(config, Uncached(), console)
    # replaces the cached properties that read a data file
    rows.trees, rows.prompts_by_source = (read_trees(spec), []), {}
    run = Run(config, console=console, rows=rows)
    run.folder.mkdir(parents=True, exist_ok=True)
    run.make_loop().run()
    return run, console, clock.result()  # ends at the last update, so the final checkpoint is not timed


def described(console: EpisodeConsole, *modules: Any) -> dict[str, Any]:
    """The descriptive fields of a result: version, rollouts, notes, trainable parameters and dtypes of `modules`."""
    import torch
    import transformers

    import penchant

    parameters = [p for module in modules for p in module.parameters()]
    return {
        "name": f"penchant {getattr(penchant, '__version__', 'dev')}",
        "rollouts": console.rollouts,
        "notes": console.notes,
        "versions": {m.__name__: m.__version__ for m in (torch, transformers)},
        "trainable": sum(p.numel() for p in parameters if p.requires_grad),
        "dtypes": sorted({str(p.dtype) for p in parameters}),
    }


def main() -> None:
    spec = json.loads(sys.argv[1])
    run, console, timed = trained(spec, settings_of(spec), spec["epochs"] * spec["minibatches"])
    episodes = spec["batch"] * (spec["batches"] - spec["warmup_batches"])
    parts = run.built.parts
    finish(timed | {"episodes": episodes} | described(console, parts.model, parts.modules["value"]))


if __name__ == "__main__":
    main()
