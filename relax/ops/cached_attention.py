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
# XLA's CPU backend multiplies the small matrices of narrow heads at less than half the
# speed of the same sums written out (512 rows, 96 slots, 4 x 2 heads of 8).
NARROW_HEAD, FEW_ROWS = 16, 8

Block = tuple[Float[Array, "B K s H"], Float[Array, "B K s H"]]


def cached_attention(
    q: Float[Array, "B T N H"],
    read: Callable[[Int[Array, ""], int], Block],
    mask: AttentionMask,
    capacity: int,
    block: int,
) -> Float[Array, "B T N H"]:
    """Returns what `ops.attention.attention` defines, for keys and values in a cache.

    read: `(start, size) -> keys, values` of the slots from `start` on; values are
    finite in unused slots too (a weight of 0 would spread a NaN). The slots are
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

    narrow = H <= NARROW_HEAD and rows.shape[2] <= FEW_ROWS
    written_out = narrow and jax.default_backend() == "cpu"
    scores_of, mixture = (_dots, _mix) if written_out else (_scores, _mixture)

    def step(index, carry):
        top, total, out = carry
        # The last block may overlap the one before, whose slots are then left out.
        start = jnp.minimum(index * block, capacity - block)
        k, v = read(start, block)
        k = k.astype(q.dtype)
        visible = key_block_mask(mask, start, block)
        visible &= start + jnp.arange(block) >= index * block
        scores = scores_of(rows, k).reshape(B, K, N // K, T, block)
        heads = (1, 1) if visible.shape[1] == 1 else (K, N // K)
        visible = visible.reshape(visible.shape[0], *heads, *visible.shape[2:])
        scores = jnp.where(visible, scores, -jnp.inf).reshape(B, K, -1, block)
        new_top = jnp.maximum(top, jnp.max(scores, axis=-1, keepdims=True))
        kept = jnp.exp(top - new_top)
        weights = jnp.exp(scores - new_top)
        total = total * kept + jnp.sum(weights, axis=-1, keepdims=True)
        v = v.astype(q.dtype)
        return new_top, total, out * kept + mixture(weights.astype(v.dtype), v)

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


def _scores(rows, k):
    """Returns float32 `[B, K, rows, s]` for `[B, K, rows, H]` and `[B, K, s, H]`."""
    return _product(rows, k, 3)


def _mixture(weights, v):
    """Returns float32 `[B, K, rows, H]` for `[B, K, rows, s]` and `[B, K, s, H]`."""
    return _product(weights, v, 2)


def _dots(rows, k):
    """Returns what `_scores` does, one term of the width after another."""
    terms = (rows[..., i, None] * k[:, :, None, :, i] for i in range(k.shape[-1]))
    return sum(terms).astype(jnp.float32)


def _mix(weights, v):
    """Returns what `_mixture` does, the terms added up in pairs."""
    terms = (weights[..., None] * v[:, :, None]).astype(jnp.float32)
    while (count := terms.shape[-2]) > 1:
        half = count // 2
        halves = terms[..., :half, :] + terms[..., half : 2 * half, :]
        odd = terms[..., 2 * half :, :]
        terms = jnp.concatenate([halves, odd], axis=-2) if count % 2 else halves
    return terms[..., 0, :]


def _product(x, y, axis: int):
    """Returns float32 `[B, K, rows, ...]`: the last axis of x with `axis` of y."""
    return jax.lax.dot_general(
        x,
        y,
        (((3,), (axis,)), ((0, 1), (0, 1))),
        preferred_element_type=jnp.float32,
    )
