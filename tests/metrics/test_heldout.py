"""Held-out metrics: intervals resample whole prompts, so copies of a row add no certainty."""

from __future__ import annotations

from dataclasses import replace

import pytest
from families import evaluate_heldout, some_pairs, tiny_model

from penchant.algorithms.offline import Component, Offline
from penchant.logprobs import Scorer
from penchant.logprobs.reference import LiveReference
from penchant.losses import LOSSES
from penchant.types import TokenTree


def _evaluated(name: str, trees: list[TokenTree]) -> dict[str, object]:
    reference = LiveReference(Scorer(tiny_model("llama", seed=1), "shared"))
    algorithm = Offline(
        Scorer(tiny_model("llama"), "shared"), [Component(LOSSES[name], LOSSES[name].params())], reference
    )
    trees = [replace(t, row=i) for i, t in enumerate(trees)]
    return evaluate_heldout(algorithm, trees, 60)


@pytest.mark.parametrize(
    ("name", "figures"),
    [("dpo", ("loss", "rewards/margins", "rewards/accuracies", "logratios/chosen")), ("sft", ("nll",))],
)
def test_copies_of_a_prompt_bring_no_certainty(name: str, figures: tuple[str, ...]) -> None:
    pairs = some_pairs(8)
    once, copied = _evaluated(name, pairs), _evaluated(name, [t for t in pairs for _ in range(5)])
    assert copied["eval/rows"] == 40
    for figure in figures:
        assert copied[f"eval/{figure}"] == pytest.approx(once[f"eval/{figure}"], rel=1e-9)
        low, high = once[f"eval/{figure}/ci"]  # type: ignore[misc]
        assert copied[f"eval/{figure}/ci"] == pytest.approx([low, high], rel=1e-9) and low < high
