"""Attention over a cache: its cost follows the slots in use, not those allocated."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from relax.ops.masks import AttentionMask, key_block_mask

# Keys per step. An accelerator pays for each turn of a loop, a CPU for each key.
BLOCKS = {"cpu": 256}
LARGE_BLOCK = 2048

Block = tuple[Float[Array, "B K s H"], Float[Array, "B K s H"]]


def cached_attention(
    q: Float[Array, "B T N H"],
    read: Callable[[Int[Array, ""], int], Block],
    mask: AttentionMask,
    capacity: int,
    block: int,
) -> Float[Array, "B T N H"]:
    """Returns what `ops.attention.attention` defines, for keys and values in a cache.

    read: `(start, size) -> keys, values` of the slots from `start` on. The slots are
    walked in blocks of `block`, from the first that a query sees to the last, with a
    running maximum and sum (Milakov and Gimelshein 2018,
    https://arxiv.org/abs/1805.02867, algorithm 3). Blocks in which a row sees nothing
    leave it bit for bit as it is: neither longer neighbours nor a capacity above one
    block change a row. `mask.query_slots` is given; there is no gradient.
    """
    B, T, N, H = q.shape
    block = min(block, capacity)
    K = jax.eval_shape(lambda: read(0, block))[0].shape[1]
    rows = q.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    rows = (rows / math.sqrt(H)).astype(q.dtype).reshape(B, K, -1, H)

    def step(index, carry):
        top, total, out = carry
        # The last block may overlap the one before, whose slots are then left out.
        start = jnp.minimum(index * block, capacity - block)
        k, v = read(start, block)
        k = k.astype(q.dtype)
        visible = key_block_mask(mask, start, block)
        visible &= start + jnp.arange(block) >= index * block
        scores = _product(rows, k, 3).reshape(B, K, N // K, T, block)
        heads = (1, 1) if visible.shape[1] == 1 else (K, N // K)
        visible = visible.reshape(visible.shape[0], *heads, *visible.shape[2:])
        # An unused slot may hold anything, a NaN too, which a weight of 0 would spread.
        seen = jnp.any(visible, axis=(2, 3))[..., None]
        v = jnp.where(seen, v, jnp.zeros_like(v)).astype(q.dtype)
        scores = jnp.where(visible, scores, -jnp.inf).reshape(B, K, -1, block)
        new_top = jnp.maximum(top, jnp.max(scores, axis=-1, keepdims=True))
        kept = jnp.exp(top - new_top)
        weights = jnp.exp(scores - new_top)
        total = total * kept + jnp.sum(weights, axis=-1, keepdims=True)
        return new_top, total, out * kept + _product(weights.astype(v.dtype), v, 2)

    # The lowest float rather than -inf, whose differences would be no numbers.
    top = jnp.full((*rows.shape[:3], 1), jnp.finfo(jnp.float32).min)
    carry = (top, jnp.zeros_like(top), jnp.zeros(rows.shape, jnp.float32))
    first, last = _blocks_seen(mask, capacity, block)
    if block == capacity:
        _, total, out = step(0, carry)
    else:
        _, total, out = jax.lax.fori_loop(first, last, step, carry)
    out = (out / jnp.where(total > 0.0, total, 1.0)).astype(q.dtype)
    out = out.reshape(B, K, N // K, T, H).transpose(0, 3, 1, 2, 4)
    return out.reshape(B, T, N, H)


def _blocks_seen(mask: AttentionMask, capacity: int, block: int):
    """Returns the first block that a query sees, and one more than the last."""
    last = jnp.minimum(jnp.max(mask.query_slots), capacity - 1)
    first = jnp.zeros_like(last)
    if mask.window is not None:
        oldest = jnp.min(mask.query_slots)
        first = jnp.maximum(oldest - jnp.minimum(mask.window, oldest + 1) + 1, 0)
    return first // block, last // block + 1


def _product(x, y, axis: int):
    """Returns float32 `[B, K, rows, ...]`: the last axis of x with `axis` of y."""
    return jax.lax.dot_general(
        x,
        y,
        (((3,), (axis,)), ((0, 1), (0, 1))),
        preferred_element_type=jnp.float32,
    )
