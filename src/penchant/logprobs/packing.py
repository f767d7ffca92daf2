"""Which packing a model can take, proved on it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from penchant.data.packing import pack
from penchant.errors import ConfigError
from penchant.logprobs import Packing, Scorer
from penchant.models.load import base_model_of, carries_state
from penchant.types import TokenTree

# ---- Choose a packing for a model and prove it on the model: a mask that a family ignores would be a silent error ----


def choose_packing(model: Any, requested: str, kernels: str) -> tuple[Scorer, str]:
    """A scorer with the best packing that gives the numbers of plain padding on this model.

    Args:
        requested: ``auto``, ``shared``, ``separate`` or ``padded``; anything but auto that fails the check is refused.

    Returns:
        The scorer and a sentence for the log.

    Raises:
        ConfigError: the requested packing gives other numbers than plain padding.
    """
    by_config, reason = packing_by_config(model)
    candidates: list[Packing] = ["shared", "separate", "padded"]
    if requested != "auto":
        candidates = [requested]  # type: ignore[list-item]
    elif by_config == "padded":
        candidates = ["padded"]
    plain = _probe(Scorer(model, "padded"))
    dtype = next(model.parameters()).dtype
    for packing in candidates:
        scorer = Scorer(model, packing, kernels)
        agree = same_numbers if plain.ndim == 1 else same_states
        if packing == "padded" or agree(_probe(scorer), plain, dtype):
            if packing == "shared":
                reason = "prompts are shared"
            elif by_config != "padded":
                reason = "the model's attention does not take the tree mask" if requested == "auto" else "as asked"
            fast = ", fast path" if scorer.fast else ""
            return scorer, f"packing: {packing} ({reason}{fast})"
    raise ConfigError(
        "train.packing", f"{requested} packing gives wrong log-probs on this model", "set train.packing=auto or padded"
    )


def _probe(scorer: Scorer) -> torch.Tensor:
    """Log-probs of completions; hidden states where there is no language-model head."""
    config = base_model_of(scorer.model).config
    prompt, completions = probe_ids(config.vocab_size)
    tree = TokenTree(0, prompt, completions, (False,) * len(completions))
    device = next(scorer.model.parameters()).device
    training = scorer.model.training
    scorer.model.eval()
    with torch.no_grad():
        batch = pack([tree], shared=scorer.shared).to(device)
        headless = base_model_of(scorer.model).get_output_embeddings() is None
        found = scorer.predicting(batch) if headless else scorer.logps(batch).sums
    scorer.model.train(training)
    return found


# ---- Which packing a model can take: looked up in its config, then checked on the model itself ----


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
