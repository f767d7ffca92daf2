"""An online method from its config: the writer, the method, and what it may not be asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from penchant.algorithms.group import GroupPolicyGradient
from penchant.algorithms.offline import Component, Offline
from penchant.algorithms.online_dpo import OnlineDPO
from penchant.algorithms.options import OnlineConfig, PPOConfig
from penchant.algorithms.ppo import PPO
from penchant.algorithms.rollouts import Writer
from penchant.errors import ConfigError
from penchant.logprobs import Scorer
from penchant.losses import LOSSES
from penchant.models.structure import base_model_of, head_scaling
from penchant.models.value import ValueModel
from penchant.reference import LiveReference
from penchant.rewards import load_reward

OnlineAlgorithm = GroupPolicyGradient | OnlineDPO | PPO


def build_online(
    online: OnlineConfig,
    reward: str | Mapping[str, float],
    scorer: Scorer,
    reference: LiveReference,
    tokenizer: Any,
    value: ValueModel | None,
    *,
    longest_prompt: int,
    seed: int,
    tokens_per_step: int,
) -> OnlineAlgorithm:
    """The method that `online.name` says.

    Args:
        scorer, reference: the policy, and a reference that runs live; both get the method's temperature.
        value: PPO's, None for the others; longest_prompt: tokens; seed: of sampling and minibatches.

    Raises:
        ConfigError: the completions would not fit the model's context, or the model cannot take a temperature.
    """
    config = base_model_of(scorer.model).config
    context = getattr(config, "max_position_embeddings", None)
    longest = longest_prompt + online.max_new_tokens
    if context is not None and longest > context:
        raise ConfigError(
            "algorithm.max_new_tokens",
            f"the longest prompt and its completion make {longest} tokens, beyond the model's context of {context}",
            "lower it, or data.max_length, which cuts prompts",
        )
    if online.temperature != 1.0 and head_scaling(config)[1] is not None:
        raise ConfigError("algorithm.temperature", "this model caps its logits", "set it to 1.0")
    scorer.temperature = reference.scorer.temperature = online.temperature
    writer = Writer(scorer.model, tokenizer, load_reward(reward), online, seed)
    if isinstance(online, PPOConfig):
        assert value is not None
        own = None
        if value.backbone is not None:
            own = Scorer(value.backbone, scorer.packing, "auto" if scorer.fast else "off")
        return PPO(scorer, reference, value.head, writer, online, tokens_per_step, own)
    if online.name == "online_dpo":
        dpo = LOSSES["dpo"]
        component = Component(dpo, dpo.params.model_validate({"beta": online.kl_weight}))
        return OnlineDPO(Offline(scorer, [component], reference), writer)
    return GroupPolicyGradient(scorer, reference, writer, online, tokens_per_step)
