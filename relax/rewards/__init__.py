"""Rewards: what a completion is worth, and how many of them are scored at once."""

from relax.rewards.registry import NEEDS_ANSWER, REWARDS, find_reward
from relax.rewards.samples import Reward, Sample
from relax.rewards.scorer import FAILED, TIMED_OUT, RewardScorer, Scores

__all__ = [
    "FAILED",
    "NEEDS_ANSWER",
    "REWARDS",
    "TIMED_OUT",
    "Reward",
    "RewardScorer",
    "Sample",
    "Scores",
    "find_reward",
]
