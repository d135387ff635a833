"""The key/value cache: an explicit pytree with a length per row."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from relax.model.config import LlamaConfig


class Cache(NamedTuple):
    """Keys and values of all layers, and how many slots of each row are in use.

    Slot s of a row holds the row's s-th token. Slots at or beyond `lengths` may hold
    anything: causality by slot keeps queries from seeing them until they are written.
    """

    keys: Float[Array, "L B S K H"]
    values: Float[Array, "L B S K H"]
    lengths: Int[Array, "B"]

    @property
    def capacity(self) -> int:
        """S, the number of slots per row."""
        return self.keys.shape[2]


def empty_cache(config: LlamaConfig, batch_size: int, capacity: int) -> Cache:
    """Returns a cache of zeros in the compute dtype, all lengths 0."""
    heads, width = config.num_key_value_heads, config.head_width
    shape = (config.num_hidden_layers, batch_size, capacity, heads, width)
    dtype = jnp.dtype(config.compute_dtype)
    return Cache(
        keys=jnp.zeros(shape, dtype),
        values=jnp.zeros(shape, dtype),
        lengths=jnp.zeros(batch_size, jnp.int32),
    )


def write(
    buffer: Float[Array, "L B S K H"],
    layer: Int[Array, ""] | int,
    slots: Int[Array, "B T"],
    update: Float[Array, "B T K H"],
) -> Float[Array, "L B S K H"]:
    """Returns `buffer` with `update` at each row's own slots of one layer.

    One scatter, in place where the buffer is donated or carried through a loop; slots
    at or beyond the capacity are dropped.
    """
    rows = jnp.arange(update.shape[0])[:, None]
    return buffer.at[layer, rows, slots].set(update.astype(buffer.dtype), mode="drop")


def read(buffer: Float[Array, "L B S K H"], layer) -> Float[Array, "B S K H"]:
    """Returns one layer's keys or values."""
    return jax.lax.dynamic_index_in_dim(buffer, layer, axis=0, keepdims=False)
