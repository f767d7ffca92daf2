"""An online method from its config: the writer, the method, and what it may not be asked for."""

from __future__ import annotations

from typing import Any

import torch

from penchant.algorithms.group import GroupPolicyGradient
from penchant.algorithms.offline import Component, Offline
from penchant.algorithms.online_dpo import OnlineDPO
from penchant.algorithms.options import OnlineConfig, PPOConfig
from penchant.algorithms.ppo import PPO
from penchant.algorithms.rollouts import Writer
from penchant.data.tokenize import same_tokens
from penchant.errors import ConfigError
from penchant.logprobs import Scorer
from penchant.logprobs.reference import LiveReference
from penchant.losses import LOSSES
from penchant.models.load import backbone_of, base_model_of, head_scaling, load_tokenizer
from penchant.models.options import ModelConfig
from penchant.models.reward import ValueModel, head_of, is_encoder, load_model_config, load_reward_model
from penchant.rewards import RewardConfig, load_reward
from penchant.rewards.reward_model import PolicyText, find_reward_model

OnlineAlgorithm = GroupPolicyGradient | OnlineDPO | PPO


def build_online(
    online: OnlineConfig,
    reward: RewardConfig,
    scorer: Scorer,
    reference: LiveReference,
    policy: PolicyText,
    value: ValueModel | None,
    *,
    longest_prompt: int,
    seed: int,
    tokens_per_step: int,
) -> OnlineAlgorithm:
    """The method that `online.name` says.

    Args:
        scorer, reference: the policy, and a reference that runs live; both get the method's temperature.
        policy: its tokenizer and prompts, as a reward model wants to know them.
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
    judge = load_reward(reward, policy, next(scorer.model.parameters()).device)
    writer = Writer(scorer.model, policy.tokenizer, judge, online, seed)
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


def start_value(value: ValueModel, reward: RewardConfig, tokenizer: Any, *, demanded: bool) -> str:
    """Let a separate value model start as the reward model: its backbone, and its head times the reward's weight.

    Returns:
        A sentence for the log.

    Raises:
        ConfigError: it cannot (no causal reward model of the policy's architecture and tokenizer among the rewards) and is `demanded`.
    """
    folders = {name: found for name in reward.terms if (found := find_reward_model(name)) is not None}
    why = "" if len(folders) == 1 else f"{len(folders)} of the rewards are reward models"
    if not why:
        ((name, folder),) = folders.items()
        why = _start_there(value, str(folder), reward.terms[name], tokenizer)
        if not why:
            return f"value model: starts as {name}"
    if demanded:
        raise ConfigError("algorithm.value_init", f"is reward, but {why}", "set it to auto or zero")
    return f"value model: starts as the policy, its head from zero ({why})"


def _start_there(value: ValueModel, folder: str, weight: float, tokenizer: Any) -> str:
    """Copy the weights; why not, where it cannot be."""
    if is_encoder(load_model_config(folder), folder):
        return "the reward model is an encoder, which gives no value to each token"
    if not same_tokens(tokenizer, load_tokenizer(folder)):
        return "the reward model has another tokenizer"
    start = load_reward_model(ModelConfig(path=folder), torch.device("cpu")).model
    own = backbone_of(value.backbone).state_dict() if value.backbone is not None else {}
    # a token that was added for padding has a row behind the others, which nothing reads
    theirs = {
        n: w[: own[n].shape[0]] if n in own and w.ndim == 2 else w for n, w in backbone_of(start).state_dict().items()
    }
    if {n: w.shape for n, w in theirs.items()} != {n: w.shape for n, w in own.items()}:
        return "the reward model has another architecture"
    with torch.no_grad():
        for name, to in own.items():
            to.copy_(theirs[name])
        value.head.weight.copy_(weight * head_of(start).weight)
    return ""
