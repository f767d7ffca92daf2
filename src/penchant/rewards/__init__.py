"""Rewards: functions from batches of prompts and completions to numbers."""

from penchant.rewards.builtin import RewardConfig
from penchant.rewards.functions import Reward, RewardTerm, load_reward

__all__ = ["Reward", "RewardConfig", "RewardTerm", "load_reward"]
