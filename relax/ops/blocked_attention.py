"""Attention in blocks of queries that never holds the whole array of scores.

The backward pass recomputes the probabilities of a block from the log-sum-exp that the
forward pass kept (Dao et al. 2022, https://arxiv.org/abs/2205.14135, algorithm 4, with
blocks over queries alone).
"""

import math

import jax
import jax.numpy as jnp

from relax.ops.masks import AttentionMask, dense_mask

MIN_BLOCK, MAX_BLOCKS = 64, 16
# Of scores that a CPU's caches hold with what is made of them: on two cores, 32 rows of
# 256 and 8 heads of 8 take a layer forward and back in 91 ms at once, 62 in parts of
# 8 MiB, 23 in parts of 2.
PART_BYTES = 2**21


def blocked_attention(q, k, v, mask: AttentionMask):
    """Returns what `attention` defines, for `[B, T, N, H]` and `[B, S, K, H]`."""
    B, T, N, H = q.shape
    K = k.shape[2]
    grouped = q.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    out = _attend(grouped, k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3), mask)
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


@jax.custom_vjp
def _attend(q, k, v, mask):
    """`[B, K, G, T, H]` queries with `[B, K, S, H]` keys and values."""
    return _forward(q, k, v, mask)[0]


def _forward(q, k, v, mask):
    out, logsumexps = _in_parts(_forward_rows, q, k, (q, k, v, mask))
    return out, (q, k, v, mask, out, logsumexps)


def _backward(residuals, d_out):
    q, k, *_ = residuals
    return *_in_parts(_backward_rows, q, k, (*residuals, d_out)), None


def _forward_rows(q, k, v, mask):
    outs, logsumexps = [], []
    for queries, keys in _blocks(q.shape[3], k.shape[2], mask):
        scores, visible = _scores(_queries(q, queries), _keys(k, keys), mask, queries)
        top = jnp.max(scores, axis=-1, keepdims=True)
        weights = _weights(scores - top, visible, mask)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        total = jnp.where(total > 0.0, total, 1.0)
        out = _product(weights.astype(v.dtype), _keys(v, keys), contract=(3, 2))
        outs.append((out / total).astype(q.dtype))
        logsumexps.append(top + jnp.log(total))
    return jnp.concatenate(outs, axis=3), logsumexps


def _backward_rows(q, k, v, mask, out, logsumexps, d_out):
    inner = jnp.sum(d_out * out, axis=-1, keepdims=True, dtype=jnp.float32)
    d_queries = []
    d_k = d_v = jnp.zeros((*k.shape[:2], k.shape[3], k.shape[2]), jnp.float32)
    blocks = _blocks(q.shape[3], k.shape[2], mask)
    for (queries, keys), logsumexp in zip(blocks, logsumexps, strict=True):
        q_block, k_block, v_block = _queries(q, queries), _keys(k, keys), _keys(v, keys)
        d_block = _queries(d_out, queries)
        scores, visible = _scores(q_block, k_block, mask, queries)
        pattern = _weights(scores - logsumexp, visible, mask)
        d_pattern = _product(d_block, v_block, contract=(3, 3))
        d_scores = pattern * (d_pattern - _queries(inner, queries))
        d_scores = (d_scores / math.sqrt(q.shape[-1])).astype(q.dtype)
        d_queries.append(_product(d_scores, k_block, contract=(3, 2)).astype(q.dtype))
        d_k = _add_to(d_k, keys, _key_product(_transposed(q_block), d_scores))
        pattern = pattern.astype(v.dtype)
        d_v = _add_to(d_v, keys, _key_product(_transposed(d_block), pattern))
    d_q = jnp.concatenate(d_queries, axis=3)
    d_k, d_v = jax.lax.optimization_barrier((d_k, d_v))
    return d_q, d_k.mT.astype(k.dtype), d_v.mT.astype(v.dtype)


_attend.defvjp(_forward, _backward)


def _in_parts(function, q, k, arguments):
    """Returns `function(*arguments)`, computed for some rows of the batch at a time.

    So many that a block's scores stay in a processor's caches; elsewhere all of them.
    """
    B, parts = q.shape[0], _num_parts(q, k)
    if parts == 1:
        return function(*arguments)
    leaves, tree = jax.tree.flatten(arguments)
    # What all rows share (a mask's window, say) is no part of it.
    own = [leaf.ndim > 0 and leaf.shape[0] == B for leaf in map(jnp.asarray, leaves)]

    def deal(x):
        # Rows are dealt out in turn, so that every part keeps the batch's sharding.
        return jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0)

    def one(dealt):
        dealt = iter(dealt)
        mixed = [next(dealt) if o else x for o, x in zip(own, leaves, strict=True)]
        return function(*jax.tree.unflatten(tree, mixed))

    dealt = [deal(x) for o, x in zip(own, leaves, strict=True) if o]
    return jax.tree.map(
        lambda x: jnp.moveaxis(x, 0, 1).reshape(B, *x.shape[2:]),
        jax.lax.map(one, dealt),
    )


def _num_parts(q, k) -> int:
    """Returns the least number of equal parts of the rows within PART_BYTES."""
    B, K, G, T, _ = q.shape
    if jax.default_backend() != "cpu":
        return 1
    block = max(MIN_BLOCK, -(-T // MAX_BLOCKS))
    row_bytes = 4 * K * G * min(block, T) * k.shape[2]
    least = -(-B * row_bytes // PART_BYTES)
    return next(parts for parts in range(min(least, B), B + 1) if B % parts == 0)


def _blocks(T: int, S: int, mask: AttentionMask) -> list[tuple[range, range]]:
    """Returns ranges of queries, each with the range of key slots it can see.

    Known slots (`query_slots` None) leave out the keys after the block.
    """
    size = max(MIN_BLOCK, -(-T // MAX_BLOCKS))
    starts = range(0, T, size)
    blocks = [range(start, min(start + size, T)) for start in starts]
    aligned = mask.query_slots is None
    return [(block, range(block.stop if aligned else S)) for block in blocks]


def _scores(q_block, k_block, mask, queries):
    """Returns scaled float32 scores `[B, K, G, t, s]` and which of them count.

    The scores that do not count are the lowest float, so that the maximum skips them.
    """
    scores = _product(q_block, k_block, contract=(3, 3)) / math.sqrt(q_block.shape[-1])
    visible = dense_mask(mask, queries, range(k_block.shape[2]))
    heads = (1, 1) if visible.shape[1] == 1 else scores.shape[1:3]
    visible = visible.reshape(visible.shape[0], *heads, *visible.shape[2:])
    return jnp.where(visible, scores, jnp.finfo(jnp.float32).min), visible


def _product(x, y, contract: tuple[int, int]):
    """Multiplies `[B, K, G, t, I]` with `[B, K, ...]`, the G·t rows as one matrix.

    `contract` names the contracted axes as those of the rows `[B, K, G·t, I]` and of
    `y`. Returns float32.
    """
    B, K, G, t, _ = x.shape
    rows = x.reshape(B, K, G * t, x.shape[-1])
    out = jax.lax.dot_general(
        rows,
        y,
        (((contract[0],), (contract[1],)), ((0, 1), (0, 1))),
        preferred_element_type=jnp.float32,
    )
    return out.reshape(B, K, G, t, out.shape[-1])


def _key_product(x_transposed, weights):
    """Returns float32 `[B, K, H, s]` for `[B, K, H, G·t]` and `[B, K, G, t, s]`.

    XLA's CPU backend takes five times as long for weightsᵀ·x, whose result would need
    no transpose (heads of 8), and for what it may fold into that.
    """
    B, K, G, t, s = weights.shape
    return jax.lax.dot_general(
        x_transposed,
        weights.reshape(B, K, G * t, s),
        (((3,), (2,)), ((0, 1), (0, 1))),
        preferred_element_type=jnp.float32,
    )


def _transposed(x):
    """Returns `[B, K, G, t, H]` as `[B, K, H, G·t]`."""
    B, K, G, t, H = x.shape
    rows = x.reshape(B, K, G * t, H).transpose(0, 1, 3, 2)
    return jax.lax.optimization_barrier(rows)


def _queries(x, queries: range):
    return x[:, :, :, queries.start : queries.stop]


def _keys(x, keys: range):
    return x[:, :, keys.start : keys.stop]


def _add_to(total, keys: range, part):
    return total.at[..., keys.start : keys.stop].add(part)


def _weights(exponents, visible, mask: AttentionMask):
    """Returns exp of the exponents, 0 for keys that are not visible.

    Where a query sees a key at all, the lowest float already gives exp 0 for the rest.
    """
    weights = jnp.exp(exponents)
    return weights if mask.never_blind() else jnp.where(visible, weights, 0.0)
