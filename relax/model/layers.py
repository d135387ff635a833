"""Linear, Embed and RMSNorm.

The precision contract: parameters are stored in `param_dtype` and cast at use to the
dtype of the activations, norms are computed in float32, and gradients have the dtype of
the parameters. (`hk.Linear` would ask for parameters in its input's dtype, so that
bfloat16 activations at initialisation would give bfloat16 master weights.)
"""

import dataclasses

import haiku as hk
import jax.numpy as jnp
from jax import Array

from relax.ops.linear import linear
from relax.ops.norm import rms_norm


@dataclasses.dataclass
class Linear(hk.Module):
    """A matrix `[*in, *out]`, and a bias `[*out]` where `bias` is set."""

    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    init_std: float
    dtype: str  # of the parameters
    bias: bool = False
    name: str | None = None

    def __call__(self, x: Array) -> Array:
        """Returns `[*batch, *out]` for `[*batch, *in]`."""
        init = hk.initializers.RandomNormal(self.init_std)
        shape = (*self.in_shape, *self.out_shape)
        weight = hk.get_parameter("weight", shape, self.dtype, init)
        y = linear(x, weight, len(self.in_shape))
        if self.bias:
            bias = hk.get_parameter("bias", self.out_shape, self.dtype, jnp.zeros)
            y = y + bias.astype(y.dtype)
        return y


@dataclasses.dataclass
class Embed(hk.Module):
    """A table with one row per token id, padded rows at the end."""

    rows: int
    width: int
    init_std: float
    dtype: str  # of the parameters
    name: str | None = None

    def __call__(self) -> Array:
        """Returns the table `[rows, D]` in its own dtype."""
        init = hk.initializers.RandomNormal(self.init_std)
        return hk.get_parameter("weight", (self.rows, self.width), self.dtype, init)


@dataclasses.dataclass
class RMSNorm(hk.Module):
    """Root-mean-square norm over the last axis with a learnt scale."""

    epsilon: float
    dtype: str  # of the parameters
    name: str | None = None

    def __call__(self, x: Array) -> Array:
        """Returns `x` normalised, in the dtype of `x`."""
        weight = hk.get_parameter("weight", x.shape[-1:], self.dtype, jnp.ones)
        return rms_norm(x, weight, self.epsilon)


def lookup(table: Array, tokens: Array, dtype: str) -> Array:
    """Returns the rows `[B, T, D]` of `table` in `dtype`."""
    return jnp.take(table, tokens, axis=0).astype(jnp.dtype(dtype))
