"""Reward functions, run in processes of their own under a deadline, and the rubric that weighs them."""

from rewards.base import BUILT_IN, RewardConfig, RewardFn, Score, resolve
from rewards.pool import PoolBroken
from rewards.rubric import REWARD_METRICS, RewardFailure, Rubric, RubricConfig, passed, reward_metrics

__all__ = [
    "BUILT_IN",
    "REWARD_METRICS",
    "PoolBroken",
    "RewardConfig",
    "RewardFailure",
    "RewardFn",
    "Rubric",
    "RubricConfig",
    "Score",
    "passed",
    "resolve",
    "reward_metrics",
]
