"""Advantages of completions over the others of their prompt, from rewards; NumPy."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

SCALE_REWARDS = ("group", "batch", "none")


class Advantages(NamedTuple):
    """Advantages of a batch `[N]`, and what its rewards were like.

    reward_mean and reward_std are over all scorable rows, NaN where there are none (of
    the std: fewer than two). frac_reward_zero_std: the share of rows whose rewards are
    all the same, within the group or, scaled by batch, within the batch.
    """

    advantages: np.ndarray
    reward_mean: float
    reward_std: float
    frac_reward_zero_std: float


def group_advantages(
    rewards: Sequence[float] | np.ndarray, num_generations: int, scale_rewards: str
) -> Advantages:
    """Returns reward - mean of its group, over (std + 1e-4) of its group or the batch.

    rewards: `[N]`, groups of `num_generations` one after another; a NaN is a row that
    could not be scored: it counts in no mean and its advantage is 0. The std is that of
    a sample (n - 1). Raises ValueError for rows that are no whole groups.

    Shao et al. 2024 (DeepSeekMath), https://arxiv.org/abs/2402.03300, section 4.1.2;
    without a std, Liu et al. 2025 (Dr. GRPO), https://arxiv.org/abs/2503.20783.
    """
    if scale_rewards not in SCALE_REWARDS:
        raise ValueError(
            f"trainer.scale_rewards={scale_rewards!r} is unknown; choose one of "
            f"{', '.join(SCALE_REWARDS)}"
        )
    rewards = np.asarray(rewards, np.float64)
    if not rewards.size or rewards.size % num_generations:
        raise ValueError(
            f"trainer.num_generations={num_generations} must divide the "
            f"{rewards.size} rewards"
        )
    groups = rewards.reshape(-1, num_generations)
    deviations, _, group_std = _centre(groups)
    _, batch_mean, batch_std = _centre(rewards[None])
    std = np.broadcast_to(
        batch_std if scale_rewards == "batch" else group_std, group_std.shape
    )
    if scale_rewards != "none":
        deviations = deviations / (std + 1e-4)
    return Advantages(
        np.nan_to_num(deviations, nan=0.0).reshape(-1).astype(np.float32),
        float(batch_mean[0, 0]),
        float(batch_std[0, 0]) if rewards.size > 1 else math.nan,
        float(np.mean(np.abs(std) <= 1e-8)),
    )


def _centre(groups):
    """Returns deviations from the mean, mean and std of the finite ones of each row."""
    finite = np.isfinite(groups)
    count = finite.sum(axis=1, keepdims=True)
    # From the least reward on: rewards that are all the same deviate by nothing at all.
    least = np.min(groups, axis=1, keepdims=True, where=finite, initial=np.inf)
    least = np.where(count > 0, least, np.nan)
    above = groups - least
    mean = np.sum(above, axis=1, keepdims=True, where=finite) / np.maximum(count, 1)
    deviations = above - mean
    squares = np.sum(deviations**2, axis=1, keepdims=True, where=finite)
    std = np.sqrt(squares / np.maximum(count - 1, 1))
    single = 0.0 if groups.shape[1] == 1 else np.nan
    return deviations, least + mean, np.where(count > 1, std, single)
