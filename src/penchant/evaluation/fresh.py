"""What a policy writes for held-out prompts while it is trained: length, ends, variety, and its reward against what its start wrote."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from penchant.evaluation.stats import Interval, bootstrap_ci, share_ci
from penchant.evaluation.text import distinct_n
from penchant.evaluation.written import Judge, Written, write

Metrics = dict[str, Any]

START_FILE = "start.completions.json"  # of a run folder
DRAWS = 2000


@dataclass(frozen=True, slots=True)
class Fresh:
    """What is asked of the policy at every evaluation.

    Args:
        tokenizer: of the policy; prompts: token ids, each once; sources: where each came from, by which a reward model knows it.
        max_new_tokens: of a completion; seed: of the run; judge: of completions, or None; judge_name: what tells it from another one (JSON).
    """

    tokenizer: Any
    prompts: Sequence[Sequence[int]]
    sources: Sequence[str]
    max_new_tokens: int
    seed: int
    judge: Judge | None = None
    judge_name: Any = None

    def write(self, model: Any, step: int) -> Written:
        """One completion of each prompt at temperature 1, judged: a function of weights, seed and optimiser step."""
        return write(
            model,
            self.tokenizer,
            self.prompts,
            n=1,
            max_new_tokens=self.max_new_tokens,
            seed=self.seed * 1_000_003 + step,
            judge=self.judge,
            sources=self.sources,
        )

    @property
    def asked(self) -> dict[str, Any]:
        """What completions and their rewards depend on, apart from weights and step; JSON."""
        digest = hashlib.sha256()
        for ids in self.prompts:
            digest.update(np.array(ids, dtype="<i4").tobytes() + b"|")
        return {
            "prompts": digest.hexdigest(),
            "max_new_tokens": self.max_new_tokens,
            "seed": self.seed,
            "judge": self.judge_name,
        }


def completion_figures(written: Written) -> Metrics:
    """``completions/length`` in tokens and ``completions/ended`` with intervals by prompt, ``completions/distinct_2`` over all together."""
    ids = written.ids
    lengths = np.array([len(i) for i in ids], dtype=np.float64)
    return {
        **_named("completions/length", bootstrap_ci(lengths, clusters=written.prompts, draws=DRAWS)),
        **_named("completions/ended", share_ci(written.ended, clusters=written.prompts, draws=DRAWS)),
        "completions/distinct_2": distinct_n(ids),
    }


def gain_figures(rewards: Sequence[float] | np.ndarray, start: Sequence[float] | np.ndarray) -> Metrics:
    """``reward``, and ``win_rate`` against the start's completion of the same prompt, each with its interval by prompt.

    ``win_rate = mean_prompts 1[r > r_start] + 1[r = r_start] / 2``: one half is no gain.

    Args:
        rewards, start: (prompts,), one completion each.

    Raises:
        ValueError: shapes that differ, or nothing.
    """
    now, then = np.asarray(rewards, dtype=np.float64), np.asarray(start, dtype=np.float64)
    if now.shape != then.shape:
        raise ValueError(f"rewards of the same prompts are wanted, not {now.shape} and {then.shape}")
    wins = (now > then) + 0.5 * (now == then)
    return _named("reward", bootstrap_ci(now, draws=DRAWS)) | _named("win_rate", share_ci(wins, draws=DRAWS))


def _named(name: str, interval: Interval) -> Metrics:
    return {name: interval.estimate, f"{name}/ci": [interval.low, interval.high]}


# ---------------------------------------------------------------------------------------------------------------------
# what the start wrote


def rows_of(written: Written, tokenizer: Any) -> list[dict[str, Any]]:
    """Judged completions, one of each prompt, as they are kept."""
    assert written.rewards is not None
    return [
        {
            "prompt": tokenizer.decode(tree.prompt_ids.tolist(), skip_special_tokens=True),
            "completion": text,
            "tokens": len(tree.completion_ids[0]),
            "ended": not tree.truncated[0],
            "reward": float(reward),
        }
        for tree, text, reward in zip(written.trees, written.texts, written.rewards, strict=True)
    ]


def keep_start(path: Path, asked: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    """Write down what the start wrote and what it was worth: whole or not at all, so that a resumed run compares with the same."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(
        json.dumps({"asked": asked, "completions": list(rows)}, ensure_ascii=False, indent=1), encoding="utf-8"
    )
    os.replace(partial, path)


def kept_start(path: Path, asked: dict[str, Any]) -> np.ndarray | None:
    """The rewards of what the start wrote, (prompts,); None where nothing was kept, or something else was asked."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["asked"] != json.loads(json.dumps(asked)):
            return None
        return np.array([row["reward"] for row in kept["completions"]], dtype=np.float64)
    except (OSError, ValueError, KeyError, TypeError):
        return None
