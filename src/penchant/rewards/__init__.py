"""Rewards as functions: a batch of prompts and completions to numbers."""

from penchant.rewards.functions import Reward, RewardTerm, load_reward
from penchant.rewards.options import RewardConfig

__all__ = ["Reward", "RewardConfig", "RewardTerm", "load_reward"]
