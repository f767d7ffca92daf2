"""Penchant's worker: its own run and training loop on the given rows. Takes a JSON spec, prints a JSON result.

It differs from `penchant train` in two ways: the token ids are given, so that both sides train on the same ones, and
the console is a clock. It depends on `config_from_mapping`, `Rows.trees`, `Run.make_loop()` and the loop's `console.step`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from measure import Clock, finish


class ClockConsole:
    """A console (see `training/console.py`) that marks the end of every optimizer step."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.notes: list[str] = []

    def step(self, step: int, total: int, metrics: Mapping[str, Any]) -> None:
        self.clock.step()
        self.clock.losses.append(float(metrics["loss"]))

    def evaluated(self, step: int, metrics: Mapping[str, Any]) -> None:
        raise AssertionError("the benchmark has no held-out set")

    def note(self, text: str) -> None:
        self.notes.append(text)

    def counter(self, text: str) -> Callable[[int, int], None]:
        return lambda done, total: None


def settings_of(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Translate a spec to a config mapping, as read from a YAML file."""
    lora = spec["lora_rank"]
    live = "frozen" if lora is None else "adapter"
    return {
        "output": str(Path(spec["work"]).resolve()),
        "model": {
            "path": spec["model"],
            "dtype": spec["precision"],
            "device": spec["device"],
            "kernels": spec["ours"]["kernels"],
            "quantize": spec["quantize"],
        },
        **(
            {}
            if lora is None
            else {"lora": {"r": lora, "alpha": 2 * lora, "dropout": 0.0, "target_modules": "all-linear"}}
        ),
        **({} if spec["sft"] else {"reference": {"kind": live if spec["reference"] == "live" else "cached"}}),
        "data": {"path": spec["data"], "max_length": spec["max_length"]},
        "loss": "sft" if spec["sft"] else {"name": "dpo", "beta": spec["beta"]},
        "train": {
            "max_steps": spec["steps"],
            "batch_size": spec["batch"],
            "tokens_per_step": spec["ours"]["tokens_per_step"],
            "lr": spec["lr"],
            "schedule": "constant",
            "warmup_fraction": 0.0,
            "weight_decay": 0.0,
            "max_grad_norm": spec["max_grad_norm"],
            "packing": spec["ours"]["packing"],
            "shuffle": False,
            "threads": spec["threads"],
            "seed": spec["seed"],
        },
        "checkpoint": {"every": None},
    }


def read_trees(spec: Mapping[str, Any]) -> list[Any]:
    """Read the rows of all steps as token trees."""
    import numpy as np

    from penchant.types import TokenTree

    rows = json.loads(Path(spec["rows"]).read_text())[: spec["batch"] * spec["steps"]]

    def ids(values: list[int]) -> np.ndarray:
        return np.asarray(values, dtype=np.int32)

    most = 1 if spec["sft"] else 2
    return [
        TokenTree(
            i,
            ids(r["prompt_ids"]),
            tuple(map(ids, r["completion_ids"][:most])),
            tuple(r["truncated"][:most]),
            f"line {r['line']}",
        )
        for i, r in enumerate(rows)
    ]


def main() -> None:
    import peft
    import torch
    import transformers

    import penchant
    from penchant.config import config_from_mapping
    from penchant.data.packing import tree_tokens
    from penchant.runs import Run
    from penchant.runs.rows import Rows
    from penchant.runs.sharing import Uncached

    spec = json.loads(sys.argv[1])
    clock = Clock(spec["warmup_steps"], spec["device"])
    config, console, trees = config_from_mapping(settings_of(spec), []), ClockConsole(clock), read_trees(spec)
    rows = Rows(config, Uncached(), console)
    rows.trees = (trees, [])  # replaces the cached property that reads a data file
    run = Run(config, console=console, rows=rows)
    run.folder.mkdir(parents=True, exist_ok=True)
    loop = run.make_loop()
    loop.run()
    timed = trees[spec["warmup_steps"] * spec["batch"] :]
    finish(
        clock.result(
            name=f"penchant {getattr(penchant, '__version__', 'dev')}",
            pairs=len(timed),
            computed_tokens=sum(tree_tokens(t, run.built.parts.engine.shared) for t in timed),
            settings=spec["ours"],
            notes=console.notes,
            versions={m.__name__: m.__version__ for m in (torch, transformers, peft)},
            trainable=sum(p.numel() for p in run.built.parts.model.parameters() if p.requires_grad),
            dtypes=sorted({str(p.dtype) for p in run.built.parts.model.parameters()}),
        )
    )


if __name__ == "__main__":
    main()
