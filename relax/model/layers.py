"""Linear, Embed and RMSNorm.

The precision contract: parameters are stored in `param_dtype` and cast at use to the
dtype of the activations, norms are computed in float32, and gradients have the dtype of
the parameters. (`hk.Linear` would ask for parameters in its input's dtype, so that
bfloat16 activations at initialisation would give bfloat16 master weights.)
"""

import dataclasses
import math
from typing import NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
from jax import Array

from relax.model.config import LORA_TARGETS, LlamaConfig
from relax.ops.dropout import dropout
from relax.ops.linear import linear
from relax.ops.norm import rms_norm


class Adapter(NamedTuple):
    """The low-rank addition to one matrix (Hu et al. 2021, eq. 3): scale · x·A·B.

    number: folded into the layer's dropout key; 0 and 1 are the residual stream's.
    """

    rank: int
    scale: float
    dropout: float
    number: int


def adapter_for(config: LlamaConfig, name: str) -> Adapter | None:
    """Returns what LoRA adds to the projection `name`, None where it adds nothing."""
    if not config.lora_rank or name not in config.lora_targets:
        return None
    scale = config.lora_alpha / config.lora_rank
    number = 2 + LORA_TARGETS.index(name)
    return Adapter(config.lora_rank, scale, config.lora_dropout, number)


@dataclasses.dataclass
class Linear(hk.Module):
    """A matrix `[*in, *out]`, and a bias `[*out]` where `bias` is set.

    With an adapter also A, `lora_a` `[*in, r]`, drawn from U(-1/sqrt(in), 1/sqrt(in)),
    and B, `lora_b` `[r, *out]`, zeros at first, both float32: what is trained is.
    """

    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    init_std: float
    dtype: str  # of the parameters
    bias: bool = False
    adapter: Adapter | None = None
    name: str | None = None

    def __call__(self, x: Array, key: Array | None = None) -> Array:
        """Returns `[*batch, *out]` for `[*batch, *in]`.

        `key` is the layer's dropout key; without one nothing is dropped.
        """
        init = hk.initializers.RandomNormal(self.init_std)
        shape = (*self.in_shape, *self.out_shape)
        weight = hk.get_parameter("weight", shape, self.dtype, init)
        y = linear(x, weight, len(self.in_shape))
        if self.bias:
            bias = hk.get_parameter("bias", self.out_shape, self.dtype, jnp.zeros)
            y = y + bias.astype(y.dtype)
        return y if self.adapter is None else y + self._adapted(x, key)

    @hk.transparent
    def _adapted(self, x: Array, key: Array | None) -> Array:
        rank, scale, rate, number = self.adapter
        bound = math.prod(self.in_shape) ** -0.5
        init = hk.initializers.RandomUniform(-bound, bound)
        a = hk.get_parameter("lora_a", (*self.in_shape, rank), jnp.float32, init)
        shape = (rank, *self.out_shape)
        b = hk.get_parameter("lora_b", shape, jnp.float32, jnp.zeros)
        if rate and key is not None:
            x = dropout(x, rate, jax.random.fold_in(key, number))
        return linear(scale * linear(x, a, len(self.in_shape)), b)


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
