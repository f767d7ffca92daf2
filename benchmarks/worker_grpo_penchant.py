"""Our side of GRPO: the product's own run and loop on the given prompts. Reads a JSON spec, ends with a JSON line."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

import worker_ppo_penchant as ppo
from measure import Clock, finish


def settings_of(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a spec, as a YAML file would give it: PPO's, with another method."""
    like_ppo = {"epochs": 1, "minibatches": 1, "missing_eos_penalty": 0.0, "lam": 1.0, "gamma": 1.0}
    unused = {"value_coef": 0.1, "adam_eps": 1e-8, "whiten_rewards": False}
    made = ppo.settings_of({**unused, **like_ppo, **spec, "ours": {"value": "head", **spec["ours"]}})
    method = {k: spec[k] for k in ("samples", "temperature", "beta", "clip")}
    made["algorithm"] = {"name": "grpo", "max_new_tokens": spec["response_length"], **method}
    made["train"]["max_grad_norm"] = 1.0
    return made


def main() -> None:
    import torch
    import transformers

    import penchant
    from penchant.config import config_from_mapping
    from penchant.runs import Run
    from penchant.runs.rows import Rows
    from penchant.runs.sharing import Alone

    spec = json.loads(sys.argv[1])
    clock, warm, samples = Clock(spec["warmup_batches"]), spec["warmup_batches"], spec["samples"]
    config, console = config_from_mapping(settings_of(spec), []), ppo.EpisodeConsole(clock, 1)
    rows = Rows(config, Alone(), console)
    rows.trees, rows.asked = (ppo.read_trees(spec), []), {}
    run = Run(config, console=console, rows=rows)
    run.folder.mkdir(parents=True, exist_ok=True)
    run.make_loop().run()
    timed = clock.result()
    asked = [len(t.prompt_ids) for t in rows.trees[0]][spec["batch"] * warm :]
    # as the peer counts them: the prompt once for each of its completions
    written = sum(r["length"] for r in console.rollouts[warm:]) * spec["batch"] * samples
    parameters = list(run.built.parts.model.parameters())
    finish(
        timed
        | {
            "name": f"penchant {getattr(penchant, '__version__', 'dev')}",
            "tokens": sum(asked) * samples + written,
            "rollouts": console.rollouts,
            "notes": console.notes,
            "versions": {m.__name__: m.__version__ for m in (torch, transformers)},
            "trainable": sum(p.numel() for p in parameters if p.requires_grad),
            "dtypes": sorted({str(p.dtype) for p in parameters}),
        }
    )


if __name__ == "__main__":
    main()
