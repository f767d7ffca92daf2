"""The `trust` section of a config: from where on a figure is worth a flag. It changes nothing in what a run computes."""

from __future__ import annotations

from pydantic import Field, model_validator

from penchant.schema import Section


class TrustConfig(Section):
    """Thresholds of the trust flags; docs/trust.md says what each rule does with them."""

    kl: list[float] = Field(
        [0.0, 20.0],
        min_length=2,
        max_length=2,
        description="band of the KL to the start, nats per completion: [low, high]",
    )
    perplexity_ratio: float = Field(
        1.5, gt=1, description="how many times the start's perplexity that of held-out chosen answers may become"
    )
    chosen_fall: float = Field(
        1.0, ge=0, description="how far the log-prob of chosen answers may fall, nats per completion"
    )
    length_ratio: float = Field(1.25, gt=1, description="how many times their first length completions may become")
    accuracy_gap: float = Field(
        0.2, gt=0, lt=1, description="how far accuracy on trained rows may be above that on held-out ones"
    )
    win_rate: float = Field(
        0.6, gt=0.5, lt=1, description="a win rate that certainly stays below this says that a risen margin won nothing"
    )
    first_position: float = Field(
        0.05, ge=0, lt=0.5, description="how far a judge's share of first answers may be from one half"
    )
    judge_failures: float = Field(0.05, ge=0, lt=1, description="share of a judge's replies that may be unreadable")
    skipped: float = Field(0.1, ge=0, lt=1, description="share of optimiser steps that may be skipped")
    prompts: int = Field(50, ge=2, description="fewer prompts than this are called few")

    @model_validator(mode="after")
    def _a_band(self) -> TrustConfig:
        if not 0 <= self.kl[0] < self.kl[1]:
            raise ValueError(f"kl is {self.kl}; give [low, high] with 0 <= low < high")
        return self
