"""The `algorithm` section of a config: methods that train on completions that the policy itself writes."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from penchant.schema import Section

DEFAULT_BETA = {"rloo": 0.05, "grpo": 0.04, "online_dpo": 0.1}


class OnlineConfig(Section):
    """An online method, its rollouts, and its update. Present: `loss` is not used; `reward` is needed."""

    name: Literal["rloo", "grpo", "online_dpo"] = Field(description="rloo, grpo or online_dpo")
    samples: int = Field(4, ge=2, description="completions of each prompt")
    max_new_tokens: int = Field(64, ge=1, description="tokens of a completion")
    temperature: float = Field(1.0, gt=0, description="of sampling, and of every log-prob in the update")
    top_p: float = Field(1.0, gt=0, le=1, description="sample from the smallest set of tokens of this probability")
    beta: float | Literal["auto"] = Field(
        "auto", description="weight of the KL to the reference; auto: 0.05 (rloo), 0.04 (grpo), 0.1 (online_dpo)"
    )
    epochs: int = Field(1, ge=1, description="passes over the rollouts")
    minibatches: int = Field(1, ge=1, description="optimiser steps of a pass")
    clip: float = Field(0.2, gt=0, description="the probability ratio is held within 1 +- clip")
    clip_high: float | None = Field(None, gt=0, description="its upper end where that differs (DAPO: 0.28)")
    scale_rewards: Literal["group", "batch", "none"] = Field(
        "group", description="grpo: standard deviation that rewards are divided by; none: Dr. GRPO"
    )
    loss_mean: Literal["sequence", "token", "constant"] = Field(
        "sequence",
        description="grpo: a mean over each completion's tokens, over all tokens (DAPO), or tokens over a constant",
    )
    missing_eos_penalty: float = Field(0.0, ge=0, description="taken off the reward of a completion that did not end")

    @model_validator(mode="after")
    def _whole_groups(self) -> OnlineConfig:
        if self.name == "online_dpo" and self.epochs * self.minibatches > 1:
            raise ValueError("online_dpo takes one step on each batch of rollouts; leave out epochs and minibatches")
        if self.kl_weight < 0 or (self.name == "online_dpo" and self.kl_weight == 0):
            raise ValueError(
                f"beta is {self.kl_weight:g}; give a number {'above' if self.name == 'online_dpo' else 'of at least'} 0"
            )
        return self

    @property
    def kl_weight(self) -> float:
        """beta, resolved."""
        return DEFAULT_BETA[self.name] if self.beta == "auto" else float(self.beta)

    @property
    def updates(self) -> int:
        """Optimiser steps on each batch of rollouts."""
        return self.epochs * self.minibatches
