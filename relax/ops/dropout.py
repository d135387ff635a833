"""Dropout."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key


def dropout(
    x: Float[Array, "*shape"], rate: float, key: Key[Array, ""] | None
) -> Float[Array, "*shape"]:
    """Zeroes each entry with probability `rate` and scales the others by 1/(1 - rate).

    Returns `x` itself without a key, which is how evaluation and generation call it
    (Srivastava et al. 2014, https://jmlr.org/papers/v15/srivastava14a.html).
    """
    if rate == 0.0 or key is None:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))
