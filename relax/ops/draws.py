"""A token from each row of logits, and what the row says of it.

Logits are float32 `[B, V]`; -inf takes an id out, and at least one is left.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt8


def most_likely(logits: Float[Array, "B V"]) -> Int[Array, "B"]:
    """Returns the id of each row's largest logit, of equal ones the first."""
    V = logits.shape[-1]
    top = jnp.max(logits, axis=-1, keepdims=True)
    # Two plain reductions, which a CPU runs faster than argmax.
    first = jnp.min(jnp.where(logits == top, jnp.arange(V), V), axis=-1)
    return jnp.where(first < V, first, 0)  # a row may hold no numbers


def draw_tokens(keys: Key[Array, "B"], logits: Float[Array, "B V"]) -> Int[Array, "B"]:
    """Returns an id per row with the probabilities softmax(logits), by the row's key.

    Two random numbers a row: one chooses a block of some sqrt(V) ids by its mass, the
    other an id of the block. (A random number per id, as the Gumbel-max trick has it,
    costs as much as a step of a small model.) An id that is out is never drawn.
    """
    B, V = logits.shape
    size = 1 << V.bit_length() // 2
    masses = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    masses = jnp.pad(masses, ((0, 0), (0, -V % size))).reshape(B, -1, size)
    numbers = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys)
    block = _chosen(jnp.sum(masses, axis=-1), numbers[:, 0])
    inside = jnp.take_along_axis(masses, block[:, None, None], axis=1)[:, 0]
    return block * size + _chosen(inside, numbers[:, 1])


def _chosen(masses: Float[Array, "B n"], numbers: Float[Array, "B"]) -> Int[Array, "B"]:
    """Returns the place at which the running sum passes a share in [0, 1) of all."""
    running = jnp.cumsum(masses, axis=-1)
    passed = (running > numbers[:, None] * running[:, -1:]) & (masses > 0.0)
    # Rounded sums may fall again, so that none passes: any place with mass will do.
    marks = jnp.where(passed, jnp.inf, masses)
    return jnp.argmax(marks, axis=-1)


def logprobs_at(
    logits: Float[Array, "B V"], tokens: Int[Array, "B"]
) -> Float[Array, "B"]:
    """Returns log softmax(logits) at one id of each row."""
    shifted = logits - jnp.max(logits, axis=-1, keepdims=True)
    total = jnp.log(jnp.sum(jnp.exp(shifted), axis=-1))
    return jnp.take_along_axis(shifted, tokens[:, None], axis=-1)[:, 0] - total


def pack_support(support: Bool[Array, "B V"]) -> UInt8[Array, "B bytes"]:
    """Returns which ids could be drawn, a bit for each, eight to a byte.

    The first id is a byte's highest bit, as `numpy.unpackbits` reads them.
    """
    return jnp.packbits(support, axis=-1)
