"""Guesses of what comes next, taken from the text itself."""

import jax.numpy as jnp
from jaxtyping import Array, Int

LONGEST_NGRAM = 3


def draft_tokens(
    text: Int[Array, "B S"], lengths: Int[Array, "B"], count: int
) -> tuple[Int[Array, "B count"], Int[Array, "B"]]:
    """Returns guesses of each row's next tokens, and how many there are: all or none.

    What followed the latest earlier place at which the last three tokens of the text
    stood, else the last two, else the last one (prompt lookup, a drafter without a
    model for Leviathan et al. 2023, https://arxiv.org/abs/2211.17192). Where that runs
    into the end of the text, it goes round.
    """
    S = text.shape[1]
    slots, last = jnp.arange(S), lengths[:, None] - 1
    alike = jnp.zeros(text.shape, jnp.int32)
    matches = slots < last
    for back in range(LONGEST_NGRAM):
        token = jnp.take_along_axis(text, jnp.maximum(last - back, 0), axis=1)
        earlier = jnp.roll(text, back, axis=1)
        matches &= (slots >= back) & (last >= back) & (earlier == token)
        alike += matches
    # The longest match, and of several the latest.
    end = jnp.argmax(jnp.where(alike > 0, alike * S + slots, -1), axis=1)[:, None]
    found = jnp.max(alike, axis=1) > 0
    period = jnp.maximum(last - end, 1)
    drafts = jnp.take_along_axis(text, end + 1 + jnp.arange(count) % period, axis=1)
    return drafts, jnp.where(found, count, 0)
