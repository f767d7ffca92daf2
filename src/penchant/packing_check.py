"""Choose a packing for a model and prove it on the model: a mask that a family ignores would be a silent error."""

from __future__ import annotations

from typing import Any

import torch

from penchant.data.packing import pack
from penchant.errors import ConfigError
from penchant.logprobs import Packing, Scorer
from penchant.models.packing_choice import packing_by_config, probe_ids, same_numbers, same_states
from penchant.models.structure import base_model_of
from penchant.types import TokenTree


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
