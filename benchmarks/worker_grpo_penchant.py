"""Penchant's worker for GRPO: its own run and training loop on the given prompts. Takes a JSON spec, prints a JSON result."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

import worker_ppo_penchant as ppo
from measure import finish


def settings_of(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Translate a spec to a config mapping: the PPO worker's config with GRPO as the algorithm."""
    like_ppo = {"epochs": 1, "minibatches": 1, "missing_eos_penalty": 0.0, "lam": 1.0, "gamma": 1.0}
    unused = {"value_coef": 0.1, "adam_eps": 1e-8, "whiten_rewards": False}
    config = ppo.settings_of({**unused, **like_ppo, **spec, "ours": {"value": "head", **spec["ours"]}})
    method = {k: spec[k] for k in ("samples", "temperature", "beta", "clip")}
    config["algorithm"] = {"name": "grpo", "max_new_tokens": spec["response_length"], **method}
    config["train"]["max_grad_norm"] = 1.0
    return config


def main() -> None:
    spec = json.loads(sys.argv[1])
    warm, samples = spec["warmup_batches"], spec["samples"]
    run, console, timed = ppo.trained(spec, settings_of(spec), 1)
    prompt_lengths = [len(t.prompt_ids) for t in run.rows.trees[0]][spec["batch"] * warm :]
    # counted as in the peer: a prompt once for each of its completions
    completion_tokens = sum(r["length"] for r in console.rollouts[warm:]) * spec["batch"] * samples
    finish(
        timed
        | {"tokens": sum(prompt_lengths) * samples + completion_tokens}
        | ppo.described(console, run.built.parts.model)
    )


if __name__ == "__main__":
    main()
