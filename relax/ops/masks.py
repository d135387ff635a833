"""Which keys a query sees."""

from typing import NamedTuple

import jax
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

    query_slots: Int[Array, "#B T"] | None = None
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
    t = slice(queries.start, queries.stop)
    if mask.query_slots is None:
        query_slots = jnp.arange(queries.start, queries.stop)[None]
    else:
        query_slots = mask.query_slots[:, t]
    segments, extra = mask.query_segments, mask.extra
    part = mask._replace(
        query_slots=query_slots,
        query_segments=None if segments is None else segments[:, t],
        extra=None if extra is None else extra[:, :, t],
    )
    return key_block_mask(part, keys.start, len(keys))


def key_block_mask(
    mask: AttentionMask, start: Int[Array, ""] | int, size: int
) -> Bool[Array, "#B #N T size"]:
    """Returns the block of `mask` for the key slots from `start` on.

    `mask.query_slots` is given. `start` may be traced; `start + size` is at most S.
    """

    def keys_of(array):
        return jax.lax.dynamic_slice_in_dim(array, start, size, axis=-1)

    key_slots, query_slots = start + jnp.arange(size), mask.query_slots[:, :, None]
    visible = key_slots <= query_slots
    if mask.window is not None:
        visible &= key_slots > query_slots - mask.window
    if mask.key_valid is not None:
        visible &= keys_of(mask.key_valid)[:, None]
    if mask.query_segments is not None:
        key_segments = keys_of(mask.key_segments)[:, None]
        visible &= mask.query_segments[:, :, None] == key_segments
    visible = visible[:, None]
    return visible if mask.extra is None else visible & keys_of(mask.extra)
