"""Losses of next-token prediction: pure functions of logprobs, one per formula.

Each returns a sum over the mask, whose numbers are the targets' weights, so that
micro-batches add up to the big batch whatever their masks. Those of reinforcement
learning are in `relax/policy_losses.py`.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from relax.ops.logprobs import TokenStats


def cross_entropy(
    logprobs: Float[Array, "B T"], loss_mask: Float[Array, "B T"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns the sum of -log p(target) in nats over the mask, and how many targets.

    A target counts as one whatever its weight, so that a weight scales the loss.
    """
    return -jnp.sum(logprobs * loss_mask), jnp.sum(target_mask(loss_mask))


def target_mask(loss_mask: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """Returns 1 for each target, which is a place with a weight, and 0 elsewhere."""
    return (loss_mask != 0).astype(loss_mask.dtype)


def smoothed_cross_entropy(
    stats: TokenStats,
    mean_logits: Float[Array, "B T"],
    loss_mask: Float[Array, "B T"],
    epsilon: float,
) -> Float[Array, ""]:
    """Returns the sum of (1 - ε)·(-log p(target)) + ε·mean(-log p) over the mask.

    The mean is over the vocabulary: logsumexp less `mean_logits`, which
    `relax.ops.logprobs.mean_logits` gives.

    Szegedy et al. 2015, https://arxiv.org/abs/1512.00567, section 7.
    """
    uniform = stats.logsumexp - mean_logits
    losses = epsilon * uniform - (1.0 - epsilon) * stats.logprobs
    return jnp.sum(losses * loss_mask)


def z_loss(stats: TokenStats, loss_mask: Float[Array, "B T"]) -> Float[Array, ""]:
    """Returns the sum of log²Z, which keeps the log-normaliser near 0.

    Chowdhery et al. 2022 (PaLM), https://arxiv.org/abs/2204.02311, section 5.
    """
    return jnp.sum(jnp.square(stats.logsumexp) * loss_mask)
