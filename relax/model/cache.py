"""The key/value cache: an explicit pytree with a length per row."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from relax.model.config import LlamaConfig

COPY_BLOCK = 128

# All layers in one array `[L, B, K, S, H]`, or `[B, K, S, H]` for each of them.
Buffer = Array | tuple[Array, ...]


class Cache(NamedTuple):
    """Keys and values of all layers, and how many slots of each row are in use.

    Scanned layers keep theirs in one array `[L, B, K, S, H]`, unrolled ones in an array
    each. Slot s of a row holds the row's s-th token. Slots at or beyond `lengths` may
    hold anything: causality by slot keeps queries from seeing them until they are
    written.
    """

    keys: Buffer
    values: Buffer
    lengths: Int[Array, "B"]

    @property
    def capacity(self) -> int:
        """S, the number of slots per row."""
        return jax.tree.leaves(self.keys)[0].shape[-2]


def empty_cache(config: LlamaConfig, batch_size: int, capacity: int) -> Cache:
    """Returns a cache of zeros, all lengths 0.

    In the compute dtype; on a CPU in float32, which holds the same numbers: XLA's CPU
    backend would convert all of a 16-bit cache at every token.
    """
    heads, width = config.num_key_value_heads, config.head_width
    shape = (batch_size, heads, capacity, width)
    L, on_cpu = config.num_hidden_layers, jax.default_backend() == "cpu"
    dtype = jnp.dtype("float32" if on_cpu else config.compute_dtype)

    def buffer():
        if config.scan_layers:
            return jnp.zeros((L, *shape), dtype)
        return tuple(jnp.zeros(shape, dtype) for _ in range(L))

    return Cache(buffer(), buffer(), jnp.zeros(batch_size, jnp.int32))


def write(
    buffer: Buffer,
    layer: Int[Array, ""] | int,
    rows: Int[Array, "B"] | None,
    slots: Int[Array, "B T"],
    update: Float[Array, "B T K H"],
) -> Buffer:
    """Returns `buffer` with `update` at each row's own slots of one layer.

    rows: which rows of the buffer these are; None: all of them, in order. One scatter,
    in place where the buffer is donated or carried through a loop; rows and slots that
    the buffer lacks are dropped.
    """
    rows = jnp.arange(update.shape[0]) if rows is None else rows
    if isinstance(buffer, tuple):
        old = buffer[layer]
        place = old.at[rows[:, None], :, slots]
        new = place.set(update.astype(old.dtype), mode="drop")
        return (*buffer[:layer], new, *buffer[layer + 1 :])
    place = buffer.at[layer, rows[:, None], :, slots]
    return place.set(update.astype(buffer.dtype), mode="drop")


def read(
    buffer: Buffer,
    layer: Int[Array, ""] | int,
    rows: Int[Array, "B"] | None,
    start: Int[Array, ""] | int,
    size: int,
) -> Float[Array, "B K size H"]:
    """Returns the slots from `start` on of one layer, and of some rows (None: all)."""
    if isinstance(buffer, tuple):
        buffer, layer = buffer[layer][None], 0
    _, B, K, _, H = buffer.shape

    def part(row, count):
        place = (layer, row, 0, start, 0)
        return jax.lax.dynamic_slice(buffer, place, (1, count, K, size, H))[0]

    return part(0, B) if rows is None else jax.vmap(lambda row: part(row, 1)[0])(rows)


@partial(jax.jit, static_argnames="capacity")
def grown(cache: Cache, capacity: int) -> Cache:
    """Returns the cache with `capacity` slots, the new ones empty."""

    def of(buffer):
        more = [(0, 0)] * buffer.ndim
        more[-2] = (0, capacity - cache.capacity)
        return jnp.pad(buffer, more)

    keys, values = jax.tree.map(of, (cache.keys, cache.values))
    return cache._replace(keys=keys, values=values)


def copy_slots(cache: Cache, source, target, length) -> Cache:
    """Returns the cache with the first `length` slots of a row in another row too.

    Slots after them up to the next block are copied with them; their lengths stay.
    """
    block = min(COPY_BLOCK, cache.capacity)

    def step(index, buffers):
        # The last block may overlap the one before.
        start = jnp.minimum(index * block, cache.capacity - block)

        def copied(buffer):
            layers = buffer.shape[:-4]
            size = (*layers, 1, buffer.shape[-3], block, buffer.shape[-1])
            zeros = (0,) * len(layers)
            part = jax.lax.dynamic_slice(buffer, (*zeros, source, 0, start, 0), size)
            return jax.lax.dynamic_update_slice(
                buffer, part, (*zeros, target, 0, start, 0)
            )

        return jax.tree.map(copied, buffers)

    blocks = (length + block - 1) // block
    keys, values = jax.lax.fori_loop(0, blocks, step, (cache.keys, cache.values))
    return cache._replace(keys=keys, values=values)
