"""The `algorithm` section of a config: methods that train on completions that the policy itself writes."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field, model_validator

from penchant.base.section import Section

DEFAULT_BETA = {"rloo": 0.05, "grpo": 0.04, "online_dpo": 0.1, "ppo": 0.05}


class OnlineConfig(Section):
    """An online method, its rollouts, and its update. Present: `loss` is not used; `reward` is needed."""

    name: Literal["rloo", "grpo", "online_dpo", "ppo"] = Field(description="rloo, grpo, online_dpo or ppo")
    samples: int = Field(4, ge=1, description="completions of each prompt")
    max_new_tokens: int = Field(64, ge=1, description="tokens of a completion")
    temperature: float = Field(1.0, gt=0, description="of sampling, and of every log-prob in the update")
    top_p: float = Field(1.0, gt=0, le=1, description="sample from the smallest set of tokens of this probability")
    top_k: int = Field(0, ge=0, description="sample from so many most likely tokens; 0: all")
    beta: float | Literal["auto"] = Field(
        "auto", description="weight of the KL to the reference; auto: 0.05 (rloo), 0.04 (grpo), 0.1 (online_dpo)"
    )
    epochs: int = Field(1, ge=1, description="passes over the rollouts")
    minibatches: int = Field(1, ge=1, description="optimizer steps of a pass")
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
    def _fits_together(self) -> OnlineConfig:
        if self.name != "ppo" and self.samples < 2:
            raise ValueError(
                f"samples is 1; {self.name} judges completions of one prompt against each other: give 2 or more"
            )
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
        """Optimizer steps on each batch of rollouts."""
        return self.epochs * self.minibatches


class PPOConfig(OnlineConfig):
    """PPO's own settings and defaults; docs/ppo.md says where each comes from."""

    name: Literal["ppo"] = Field(description="ppo")
    samples: int = Field(1, ge=1, description="completions of each prompt")
    temperature: float = Field(0.7, gt=0, description="of sampling, and of every log-prob in the update")
    epochs: int = Field(4, ge=1, description="passes over the rollouts")
    kl_estimator: Literal["k1", "k2", "k3"] = Field("k1", description="per-token KL penalty in the reward")
    kl_control: Literal["fixed", "adaptive"] = Field("fixed", description="beta stays, or follows kl_target")
    kl_target: float = Field(6.0, gt=0, description="adaptive: wanted KL per completion, nats")
    kl_horizon: float = Field(10_000, gt=0, description="adaptive: completions over which beta follows")
    gamma: float = Field(1.0, ge=0, le=1, description="discount of later rewards")
    lam: float = Field(0.95, alias="lambda", ge=0, le=1, description="of generalized advantage estimation")
    value: Literal["head", "separate"] = Field("head", description="a head on the policy, or a model of its own")
    value_init: Literal["auto", "zero", "reward"] = Field(
        "auto",
        description="of a separate value model: the reward model (auto: where it fits), or head zero on the policy",
    )
    value_coef: float = Field(0.1, ge=0, description="weight of the value loss")
    value_clip: float | None = Field(
        0.2, gt=0, description="the value is held within +- this of its old one; null: not"
    )
    whiten_advantages: bool = Field(True, description="zero mean, unit variance over all real tokens of the rollouts")
    whiten_rewards: bool = Field(False, description="unit variance of token rewards, mean kept")
    normalise_scores: bool = Field(False, description="divide rewards by their running standard deviation")
    score_clip: float | None = Field(None, gt=0, description="hold rewards within +- this")
    adam_eps: float = Field(1e-5, gt=0, description="Adam's, in place of train.adam_eps")
    ratio_limit: float = Field(
        10.0, gt=1, description="a minibatch whose mean probability ratio is beyond this is not learned from"
    )

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", populate_by_name=True)

    @model_validator(mode="after")
    def _a_value_model_to_start(self) -> PPOConfig:
        if self.value_init == "reward" and self.value != "separate":
            raise ValueError("value_init is reward, but a head on the policy cannot start there; set value: separate")
        return self

    @property
    def start_beta(self) -> float:
        """beta, resolved: 0.05 fixed; adaptive control starts at 0.2."""
        return 0.2 if self.beta == "auto" and self.kl_control == "adaptive" else self.kl_weight


class RewardModelConfig(Section):
    """Training a reward model on pairs; present: neither `loss` nor `reward` is used. See docs/reward_models.md."""

    name: Literal["reward_model"] = Field(description="reward_model")
    margin: Literal["none", "scores"] = Field(
        "none", description="scores: the chosen answer should be ahead by chosen_score - rejected_score"
    )
    centring: float = Field(0.0, ge=0, description="weight of (r_chosen + r_rejected)^2: the mean reward goes to 0")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="assumed share of flipped labels")
