"""Logit filters, in the order in which generation applies them.

Each takes float32 `[B, V]` logits and per-row parameters `[B]`, and gives removed
tokens -inf; meanings and tie rules are those of transformers' generation.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def penalise_repetition(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: Float[Array, "B"]
) -> Float[Array, "B V"]:
    """Divides seen tokens' positive logits by the penalty, multiplies negative ones.

    Once per distinct token, however often it was seen (Keskar et al. 2019,
    https://arxiv.org/abs/1909.05858, section 4.1).
    """
    penalty = penalty[:, None]
    penalised = jnp.where(logits < 0.0, logits * penalty, logits / penalty)
    return jnp.where(seen, penalised, logits)


def keep_top_k(logits: Float[Array, "B V"], k: Int[Array, "B"]) -> Float[Array, "B V"]:
    """Keeps the `k` largest logits and those tied with the k-th; k = 0 keeps all."""
    V = logits.shape[-1]
    descending = -jnp.sort(-logits, axis=-1)
    kth = jnp.where(k > 0, jnp.minimum(k, V), V) - 1
    threshold = jnp.take_along_axis(descending, kth[:, None], axis=-1)
    return jnp.where(logits >= threshold, logits, -jnp.inf)


def keep_top_p(
    logits: Float[Array, "B V"], p: Float[Array, "B"]
) -> Float[Array, "B V"]:
    """Keeps the smallest set of most likely tokens whose mass is at least `p`.

    The token that crosses `p` is kept, and so is always the most likely one (Holtzman
    et al. 2020, https://arxiv.org/abs/1904.09751, section 3.1). p = 1 keeps all.
    """
    order = jnp.argsort(logits, axis=-1)
    ascending = jnp.take_along_axis(logits, order, axis=-1)
    mass = jnp.cumsum(jax.nn.softmax(ascending, axis=-1), axis=-1)
    removed = (mass <= 1.0 - p[:, None]).at[:, -1].set(False)
    rows = jnp.arange(logits.shape[0])[:, None]
    kept = jnp.zeros_like(removed).at[rows, order].set(~removed)
    # A running sum of float32 may stay at 0 over tiny masses: p = 1 removes nothing.
    kept |= p[:, None] >= 1.0
    return jnp.where(kept, logits, -jnp.inf)


def keep_min_p(
    logits: Float[Array, "B V"], p: Float[Array, "B"]
) -> Float[Array, "B V"]:
    """Keeps the tokens at least `p` times as likely as the most likely one.

    Nguyen et al. 2024, https://arxiv.org/abs/2407.01082, eq. 2.
    """
    probs = jax.nn.softmax(logits, axis=-1)
    threshold = p[:, None] * jnp.max(probs, axis=-1, keepdims=True)
    return jnp.where(probs >= threshold, logits, -jnp.inf)
