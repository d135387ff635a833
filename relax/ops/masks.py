"""Which keys a query sees."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


class AttentionMask(NamedTuple):
    """The conditions under which query t of row b sees key slot s: all must hold.

    A *slot* is a place in the key array, so that causality is a matter of slots and
    not of the positions that feed RoPE (which restart in packed rows).

    query_slots: slot of each query `[B, T]`; None: query t stands in slot t, and S = T.
        A query sees the slots up to its own.
    key_valid: False where a slot holds no key `[B, S]`.
    query_segments, key_segments: documents see themselves only `[B, T]`, `[B, S]`.
    window: a query sees the `window` last slots, its own included (a scalar, so that
        it may differ by layer under a scan); None: all.
    extra: a caller's own mask `[B or 1, N or 1, T, S]`.
    """

    query_slots: Int[Array, "B T"] | None = None
    key_valid: Bool[Array, "B S"] | None = None
    query_segments: Int[Array, "B T"] | None = None
    key_segments: Int[Array, "B S"] | None = None
    window: Int[Array, ""] | int | None = None
    extra: Bool[Array, "#B #N T S"] | None = None

    def is_plainly_causal(self) -> bool:
        """Whether causality is the only condition."""
        return all(field is None for field in self)

    def never_blind(self) -> bool:
        """Whether every query surely sees a key, namely its own."""
        conditions = (self.query_slots, self.key_valid, self.extra)
        return all(field is None for field in conditions)


def dense_mask(
    mask: AttentionMask, queries: range, keys: range
) -> Bool[Array, "#B #N t s"]:
    """Returns the boolean block of `mask` for a range of queries and of key slots.

    The first two axes have length 1 where the block does not depend on them.
    """
    t, s = slice(queries.start, queries.stop), slice(keys.start, keys.stop)
    key_slots = jnp.arange(keys.start, keys.stop)
    if mask.query_slots is None:
        query_slots = jnp.arange(queries.start, queries.stop)[None, :, None]
    else:
        query_slots = mask.query_slots[:, t, None]
    visible = key_slots <= query_slots
    if mask.window is not None:
        visible &= key_slots > query_slots - mask.window
    if mask.key_valid is not None:
        visible &= mask.key_valid[:, None, s]
    if mask.query_segments is not None:
        visible &= mask.query_segments[:, t, None] == mask.key_segments[:, None, s]
    visible = visible[:, None]
    return visible if mask.extra is None else visible & mask.extra[:, :, t, s]
