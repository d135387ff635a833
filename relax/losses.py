"""Losses: pure functions of logprobs, one per formula.

Each returns the sum of a loss and the weight that it is to be divided by, so that
micro-batches add up to the big batch whatever their masks.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from relax.ops.logprobs import TokenStats


def cross_entropy(
    logprobs: Float[Array, "B T"], loss_mask: Float[Array, "B T"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns the sum of -log p(target) in nats over the mask, and the mask's sum."""
    return -jnp.sum(logprobs * loss_mask), jnp.sum(loss_mask)


def z_loss(stats: TokenStats, loss_mask: Float[Array, "B T"]) -> Float[Array, ""]:
    """Returns the sum of log²Z, which keeps the log-normaliser near 0.

    Chowdhery et al. 2022 (PaLM), https://arxiv.org/abs/2204.02311, section 5.
    """
    return jnp.sum(jnp.square(stats.logsumexp) * loss_mask)
