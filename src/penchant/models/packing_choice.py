"""Which packing a model can take: looked up in its config, then checked on the model itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from penchant.models.structure import base_model_of, carries_state


def packing_by_config(model: Any) -> tuple[str, str]:
    """(packing, reason) from the model's config: padded rows where layers carry state along a row, else shared."""
    reason = carries_state(base_model_of(model).config)
    return ("padded", reason) if reason else ("shared", "attention only: prompts are shared")


def probe_ids(vocab_size: int, seed: int = 0) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """A small made-up tree for the check that a packing gives the same numbers: prompt ids and three completions."""
    rng = np.random.default_rng(seed)
    prompt, *completions = (rng.integers(0, vocab_size, size=n).astype(np.int32) for n in (9, 5, 7, 2))
    return prompt, tuple(completions)


def same_numbers(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether two packings' log-probs agree to what the dtype allows."""
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4
    return bool(((a - b).abs() <= tolerance * (1 + b.abs())).all())


def same_states(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> bool:
    """The same for hidden states (R, d): the difference of each against its size."""
    tolerance = 5e-2 if dtype == torch.bfloat16 else 1e-4
    return bool(((a - b).float().norm(dim=1) <= tolerance * b.float().norm(dim=1)).all())
