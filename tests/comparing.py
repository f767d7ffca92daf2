"""Shared by tests of comparisons: tiny models with numbers as words, on twelve prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from families import tiny_model

from penchant.compare.measured import Setting
from penchant.logprobs import Scorer
from penchant.types import TokenTree


class Letters:
    """A tokenizer whose tokens are numbers, with 1 as EOS."""

    eos_token_id = 1

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return " ".join(str(int(i)) for i in ids if not (skip_special_tokens and i == 1))


def scorer(seed: int) -> Scorer:
    return Scorer(tiny_model("llama", seed=seed, dtype=torch.float64), "shared")


def even(prompts: Sequence[str], completions: Sequence[str], trees: Sequence[TokenTree]) -> np.ndarray:
    """The share of even tokens."""
    assert [t.source for t in trees] == [f"row {i}" for i in range(len(trees))]
    return np.array([np.mean([int(t) % 2 == 0 for t in c.split()] or [0.0]) for c in completions])


def setting(**changes: Any) -> Setting:
    prompts = [[5, 6, 7 + i] for i in range(12)]
    answers = [
        TokenTree(i, np.array(p, np.int32), (np.array([9, 4], np.int32), np.array([8, 3, i], np.int32)), (False, False))
        for i, p in enumerate(prompts)
    ]
    values = {"prompts": prompts, "answers": answers, "judge": even, "samples": 2, "max_new_tokens": 5, "seed": 3}
    values["sources"] = [f"row {i}" for i in range(len(prompts))]
    return Setting(tokenizer=Letters(), **{**values, **changes})
