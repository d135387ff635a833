"""From hidden states to logits and to logprobs of chosen tokens."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int, UInt8


class TokenStats(NamedTuple):
    """What the distribution over the next token says of a target, float32 `[B, T]`.

    logprobs: log p(target). logsumexp: log-normaliser of the scaled logits (for the
    z-loss). entropy: in nats. correct: whether the target is the most likely token.
    """

    logprobs: Float[Array, "B T"]
    logsumexp: Float[Array, "B T"]
    entropy: Float[Array, "B T"]
    correct: Bool[Array, "B T"]


def compute_logits(
    hidden: Float[Array, "*batch D"], table: Float[Array, "rows D"], vocab_size: int
) -> Float[Array, "*batch rows"]:
    """Returns float32 logits hidden·tableᵀ, -inf for the padded rows of `table`.

    `table` holds one row per id, padded beyond `vocab_size`; no softmax ever gives
    weight to a padded id.
    """
    rows = hidden.reshape(-1, hidden.shape[-1])
    logits = jax.lax.dot_general(
        rows,
        table.astype(hidden.dtype),
        (((1,), (1,)), ((), ())),
        preferred_element_type=jnp.float32,
    )
    if table.shape[0] > vocab_size:
        logits = jnp.where(jnp.arange(table.shape[0]) < vocab_size, logits, -jnp.inf)
    return logits.reshape(*hidden.shape[:-1], table.shape[0])


def mean_logits(
    hidden: Float[Array, "B T D"],
    table: Float[Array, "rows D"],
    vocab_size: int,
    *,
    temperature: float = 1.0,
) -> Float[Array, "B T"]:
    """Returns the mean over the vocabulary of logits / temperature, float32.

    It is the logit of the mean row: no `[B, T, V]` is made.
    """
    weights = (jnp.arange(table.shape[0]) < vocab_size) / vocab_size
    rows = table.astype(hidden.dtype).astype(jnp.float32)
    return hidden.astype(jnp.float32) @ (weights @ rows) / temperature


def token_stats(
    hidden: Float[Array, "B T D"],
    table: Float[Array, "rows D"],
    targets: Int[Array, "B T"],
    vocab_size: int,
    *,
    temperature: float = 1.0,
    max_logits: int = 2**25,
    support: UInt8[Array, "B T packed"] | None = None,
) -> TokenStats:
    """Returns what softmax(logits / temperature) says of each target.

    support: the ids that each softmax is over, a bit per row of `table` as
    `jnp.packbits` packs them; logits of the others are -inf, and so is the logprob of
    such a target. A position without a bit is over all ids. None: all are.

    At most `max_logits` numbers of logits exist at a time, forward and backward: longer
    inputs are walked in chunks along T (which keeps a sharded batch axis in place) and
    their logits are recomputed for the gradient, which is analytic:
    d logprob = onehot - p, d logsumexp = p, d entropy = -p (log p + entropy).
    """
    B, T = targets.shape
    chunk = max(1, min(T, max_logits // (B * table.shape[0])))
    stats = _stats(chunk, vocab_size, temperature, hidden, table, targets, support)
    return TokenStats(*stats)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _stats(chunk, vocab_size, temperature, hidden, table, targets, support):
    def body(_, inputs):
        hidden, targets, support = inputs
        logits = _supported_logits(vocab_size, temperature, table, hidden, support)
        return None, _chunk_stats(logits, targets)

    inputs = _to_chunks(chunk, (hidden, targets, support))
    _, stats = jax.lax.scan(body, None, inputs)
    return tuple(_from_chunks(x, targets.shape[1]) for x in stats)


def _stats_forward(chunk, vocab_size, temperature, *arrays):
    return _stats(chunk, vocab_size, temperature, *arrays), arrays


def _stats_backward(chunk, vocab_size, temperature, residuals, cotangents):
    hidden, table, targets, support = residuals

    def body(d_table, inputs):
        hidden, targets, support, d_stats = inputs
        logits = _supported_logits(vocab_size, temperature, table, hidden, support)
        if support is not None:
            # No logit of -inf is moved, not even a target's.
            chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
            targets = jnp.where(chosen > -jnp.inf, targets, -1)
        p = jax.nn.softmax(logits, axis=-1)
        d_logits = _d_logits(p, targets, d_stats) / temperature
        d_logits = d_logits.reshape(-1, table.shape[0]).astype(hidden.dtype)
        rows = hidden.reshape(-1, hidden.shape[-1])
        d_hidden = jnp.dot(d_logits, table.astype(hidden.dtype)).reshape(hidden.shape)
        d_rows = jax.lax.dot_general(
            d_logits, rows, (((0,), (0,)), ((), ())), preferred_element_type=table.dtype
        )
        return d_table + d_rows, d_hidden

    inputs = _to_chunks(chunk, (hidden, targets, support, cotangents[:3]))
    d_table, d_hidden = jax.lax.scan(body, jnp.zeros_like(table), inputs)
    return _from_chunks(d_hidden, targets.shape[1]), d_table, None, None


_stats.defvjp(_stats_forward, _stats_backward)


def _supported_logits(vocab_size, temperature, table, hidden, support):
    logits = compute_logits(hidden, table, vocab_size) / temperature
    if support is None:
        return logits
    bits = jnp.unpackbits(support, axis=-1, count=table.shape[0]) > 0
    # What T is padded by has no bits: without any logit it would be 0 / 0.
    unbound = jnp.all(support == 0, axis=-1, keepdims=True)
    return jnp.where(bits | unbound, logits, -jnp.inf)


def _chunk_stats(logits, targets):
    top = jnp.max(logits, axis=-1)
    # Differences from the largest logit keep the digits that its size would cost.
    shifted = logits - top[..., None]
    weights = jnp.exp(shifted)
    total = jnp.sum(weights, axis=-1)
    log_total = jnp.log(total)
    # Padded ids have logit -inf and weight 0: they must not make 0 x inf.
    scaled = jnp.where(weights > 0.0, weights * shifted, 0.0)
    entropy = log_total - jnp.sum(scaled, axis=-1) / total
    chosen = jnp.take_along_axis(shifted, targets[..., None], axis=-1)[..., 0]
    correct = jnp.argmax(logits, axis=-1) == targets
    return chosen - log_total, top + log_total, entropy, correct


def _d_logits(p, targets, d_stats):
    d_logprobs, d_logsumexp, d_entropy = (d[..., None] for d in d_stats)
    onehot = jnp.arange(p.shape[-1]) == targets[..., None]
    log_p = jnp.log(jnp.where(p > 0.0, p, 1.0))
    entropy = -jnp.sum(p * log_p, axis=-1, keepdims=True)
    return (
        d_logprobs * (onehot - p) + d_logsumexp * p - d_entropy * p * (log_p + entropy)
    )


def _to_chunks(chunk, arrays):
    """Splits each `[B, T, ...]` into `[T / chunk, B, chunk, ...]`, T zero-padded."""

    def split(x):
        count = -(-x.shape[1] // chunk)
        pad = [(0, 0)] * x.ndim
        pad[1] = (0, count * chunk - x.shape[1])
        padded = jnp.pad(x, pad).reshape(x.shape[0], count, chunk, *x.shape[2:])
        return jnp.moveaxis(padded, 1, 0)

    return jax.tree.map(split, arrays)


def _from_chunks(x, T):
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :T]
