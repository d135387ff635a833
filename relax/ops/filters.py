"""Logit filters, in the order in which generation applies them.

Each takes float32 `[B, V]` logits and per-row parameters `[B]`, and gives removed
tokens -inf; meanings and tie rules are those of transformers' generation.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def keep_first(logits: Float[Array, "B V"], count: int) -> Float[Array, "B V"]:
    """Keeps the ids below `count`."""
    return jnp.where(jnp.arange(logits.shape[-1]) < count, logits, -jnp.inf)


def penalise_repetition(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: Float[Array, "B"]
) -> Float[Array, "B V"]:
    """Divides seen tokens' positive logits by the penalty, multiplies negative ones.

    Once per distinct token, however often it was seen (Keskar et al. 2019,
    https://arxiv.org/abs/1909.05858, section 4.1).
    """
    penalty = penalty[:, None]
    penalised = jnp.where(logits < 0.0, logits * penalty, logits / penalty)
    return jnp.where(seen, penalised, logits)


def count_tokens(
    tokens: Int[Array, "B S"],
    starts: Int[Array, "B"],
    ends: Int[Array, "B"],
    num_columns: int,
) -> Int[Array, "B V"]:
    """Returns how often each id stands in [start, end) of its row."""
    slots = jnp.arange(tokens.shape[1])
    held = (slots >= starts[:, None]) & (slots < ends[:, None])
    rows = jnp.arange(tokens.shape[0])[:, None]
    counts = jnp.zeros((tokens.shape[0], num_columns), jnp.int32)
    return counts.at[rows, tokens].add(held)


def penalise_counts(
    logits: Float[Array, "B V"],
    counts: Int[Array, "B V"],
    presence: Float[Array, "B"],
    frequency: Float[Array, "B"],
) -> Float[Array, "B V"]:
    """Takes `frequency` off a logit for each time it came, `presence` if it came.

    As OpenAI's API and vLLM do; negative penalties favour what came.
    """
    penalty = frequency[:, None] * counts + presence[:, None] * (counts > 0)
    return logits - penalty


def ban_repeated_ngrams(
    logits: Float[Array, "B V"],
    tokens: Int[Array, "B S"],
    lengths: Int[Array, "B"],
    size: Int[Array, "B"],
) -> Float[Array, "B V"]:
    """Removes each token that would complete an n-gram the row already holds.

    A row is the first `lengths` of its `tokens`, n is its `size`: 1 removes every token
    that the row holds, 0 none.
    """
    slots = jnp.arange(tokens.shape[1])
    lengths, size = lengths[:, None], size[:, None]
    ends = (size > 0) & (slots >= size - 1) & (slots < lengths)

    longest = jnp.minimum(jnp.max(size), tokens.shape[1])

    def compare(back, ends):
        """Keeps the ends of n-grams whose token `back` slots earlier is the row's."""
        last = jnp.take_along_axis(tokens, jnp.maximum(lengths - back, 0), axis=1)
        return ends & ((jnp.roll(tokens, back, axis=1) == last) | (back >= size))

    ends = jax.lax.fori_loop(1, longest, compare, ends)
    rows = jnp.arange(tokens.shape[0])[:, None]
    banned = jnp.zeros(logits.shape, bool).at[rows, tokens].max(ends)
    return jnp.where(banned, -jnp.inf, logits)


def ban_stop_ids(
    logits: Float[Array, "B V"], stop_ids: Int[Array, "stops"], rows: Bool[Array, "B"]
) -> Float[Array, "B V"]:
    """Removes the tokens that end a text from the rows marked."""
    stops = jnp.isin(jnp.arange(logits.shape[-1]), stop_ids)
    return jnp.where(rows[:, None] & stops, -jnp.inf, logits)


def keep_allowed(
    logits: Float[Array, "B V"],
    allowed: Bool[Array, "B V"],
    unfiltered: Float[Array, "B V"],
    stop_ids: Int[Array, "stops"],
) -> Float[Array, "B V"]:
    """Keeps the tokens allowed.

    Of a row that keeps none, the tokens that end a text come back as they were before
    any filter: what can't go on ends.
    """
    logits = jnp.where(allowed, logits, -jnp.inf)
    nothing = ~jnp.any(logits > -jnp.inf, axis=-1, keepdims=True)
    ends = nothing & jnp.isin(jnp.arange(logits.shape[-1]), stop_ids)
    return jnp.where(ends, unfiltered, logits)


def keep_top_k(logits: Float[Array, "B V"], k: Int[Array, "B"]) -> Float[Array, "B V"]:
    """Keeps the `k` largest logits and those tied with the k-th; k = 0 keeps all."""
    V = logits.shape[-1]
    descending = -jnp.sort(-logits, axis=-1)
    kth = jnp.where(k > 0, jnp.minimum(k, V), V) - 1
    threshold = jnp.take_along_axis(descending, kth[:, None], axis=-1)
    return jnp.where(logits >= threshold, logits, -jnp.inf)


def keep_top_p(
    logits: Float[Array, "B V"], p: Float[Array, "B"]
) -> Float[Array, "B V"]:
    """Keeps the smallest set of most likely tokens whose mass is at least `p`.

    The token that crosses `p` is kept, and so is always the most likely one (Holtzman
    et al. 2020, https://arxiv.org/abs/1904.09751, section 3.1). p = 1 keeps all.
    """
    order = jnp.argsort(logits, axis=-1)
    ascending = jnp.take_along_axis(logits, order, axis=-1)
    mass = jnp.cumsum(jax.nn.softmax(ascending, axis=-1), axis=-1)
    removed = (mass <= 1.0 - p[:, None]).at[:, -1].set(False)
    rows = jnp.arange(logits.shape[0])[:, None]
    kept = jnp.zeros_like(removed).at[rows, order].set(~removed)
    # A running sum of float32 may stay at 0 over tiny masses: p = 1 removes nothing.
    kept |= p[:, None] >= 1.0
    return jnp.where(kept, logits, -jnp.inf)


def keep_min_p(
    logits: Float[Array, "B V"], p: Float[Array, "B"]
) -> Float[Array, "B V"]:
    """Keeps the tokens at least `p` times as likely as the most likely one.

    Nguyen et al. 2024, https://arxiv.org/abs/2407.01082, eq. 2.
    """
    probs = jax.nn.softmax(logits, axis=-1)
    threshold = p[:, None] * jnp.max(probs, axis=-1, keepdims=True)
    return jnp.where(probs >= threshold, logits, -jnp.inf)


def keep_typical(
    logits: Float[Array, "B V"], mass: Float[Array, "B"]
) -> Float[Array, "B V"]:
    """Keeps the tokens nearest to typical, as many as have `mass` together.

    Typical is a token whose information -log p is the entropy of the distribution. The
    token that reaches the mass is kept, and those as far off as it (Meister et al.
    2022, https://arxiv.org/abs/2202.00666, eq. 10). mass = 1 keeps all.
    """
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    probs = jnp.exp(logprobs)
    terms = jnp.where(probs > 0.0, probs * logprobs, 0.0)
    distance = jnp.abs(jnp.sum(terms, axis=-1, keepdims=True) - logprobs)
    order = jnp.argsort(distance, axis=-1)
    running = jnp.cumsum(jnp.take_along_axis(probs, order, axis=-1), axis=-1)
    count = jnp.sum(running < mass[:, None], axis=-1, keepdims=True)
    last = jnp.take_along_axis(order, jnp.minimum(count, logits.shape[-1] - 1), axis=-1)
    kept = distance <= jnp.take_along_axis(distance, last, axis=-1)
    # A running sum of float32 may reach 1 before the last token.
    kept |= mass[:, None] >= 1.0
    return jnp.where(kept, logits, -jnp.inf)
