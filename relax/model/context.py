"""What all layers of one forward pass share, and what each has of its own."""

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Array, Float, Int, Key

from relax.ops.masks import AttentionMask

Constrain = Callable[[Array, tuple[str | None, ...]], Array]


def unconstrained(x: Array, axes: tuple[str | None, ...]) -> Array:
    """Returns `x`: the constraint of a model on one device."""
    del axes
    return x


# Places in a layer whose values can be captured: the residual stream before and after
# it `[B, T, D]`, and the attention weights `[B, N, T, S]`.
SITES = ("resid_pre", "attn.pattern", "resid_post")


class CachePlace(NamedTuple):
    """Where the tokens of a pass stand in the cache.

    rows: of the cache; None: all of them, in order. slots: at the capacity for padding,
    which is then written nowhere. block: of the slots that attention reads at a time.
    """

    rows: Int[Array, "B"] | None
    slots: Int[Array, "B T"]
    capacity: int
    block: int


class Context(NamedTuple):
    """The same for every layer.

    attention: name of the implementation. constrain: says how an activation with the
    given logical axes is laid out over devices. capture: the sites, of SITES, whose
    values every layer returns. place: None without a cache.
    """

    cos: Float[Array, "B T half"]
    sin: Float[Array, "B T half"]
    mask: AttentionMask
    attention: str
    constrain: Constrain
    capture: tuple[str, ...] = ()
    place: CachePlace | None = None


class LayerInputs(NamedTuple):
    """One layer's own inputs; stacked `[L, ...]` outside the layers."""

    index: Int[Array, ""]
    window: Int[Array, ""] | None = None
    dropout_key: Key[Array, ""] | None = None
