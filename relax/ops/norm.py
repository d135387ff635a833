"""Normalisation."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rms_norm(
    x: Float[Array, "*batch D"], weight: Float[Array, "D"], epsilon: float
) -> Float[Array, "*batch D"]:
    """Divides `x` by its root mean square and scales it.

    The mean square is taken in float32; the result is cast to the dtype of `x` before
    the product with `weight`, as in the released Llama code (Zhang & Sennrich 2019,
    https://arxiv.org/abs/1910.07467, eq. 4).
    """
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + epsilon)
    return y.astype(x.dtype) * weight.astype(x.dtype)
