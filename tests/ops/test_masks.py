import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relax.ops.masks import AttentionMask, dense_mask

B, T, S, N = 2, 5, 7, 3
RNG = np.random.default_rng(0)
QUERY_SLOTS = np.array([[0, 2, 3, 4, 6], [5, 1, 1, 6, 0]])
KEY_VALID = RNG.random((B, S)) < 0.7
QUERY_SEGMENTS, KEY_SEGMENTS = RNG.integers(0, 2, (B, T)), RNG.integers(0, 2, (B, S))
EXTRA = {
    "none": None,
    "shared": RNG.random((1, 1, T, S)) < 0.7,
    "per row": RNG.random((B, 1, T, S)) < 0.7,
    "per head": RNG.random((1, N, T, S)) < 0.7,
    "per row and head": RNG.random((B, N, T, S)) < 0.7,
}
COMBINATIONS = list(
    itertools.product(
        [False, True], [False, True], [False, True], [None, 1, 3, 100], EXTRA
    )
)


def conditions(slots, valid, segments, window, extra):
    """Returns the AttentionMask fields of one combination, as numpy arrays."""
    return {
        "query_slots": QUERY_SLOTS if slots else None,
        "key_valid": KEY_VALID if valid else None,
        "query_segments": QUERY_SEGMENTS if segments else None,
        "key_segments": KEY_SEGMENTS if segments else None,
        "window": window,
        "extra": EXTRA[extra],
    }


def visible_by_loops(fields):
    """Returns what each query sees, condition by condition, as `[B, N, T, S]`."""
    visible = np.zeros((B, N, T, S), bool)
    for b, n, t, s in np.ndindex(B, N, T, S):
        slots, extra = fields["query_slots"], fields["extra"]
        slot = t if slots is None else slots[b, t]
        sees = s <= slot
        if fields["window"] is not None:
            sees = sees and slot - s < fields["window"]
        if fields["key_valid"] is not None:
            sees = sees and fields["key_valid"][b, s]
        if fields["query_segments"] is not None:
            same = fields["query_segments"][b, t] == fields["key_segments"][b, s]
            sees = sees and same
        if extra is not None:
            sees = sees and extra[b % len(extra), n % extra.shape[1], t, s]
        visible[b, n, t, s] = sees
    return visible


def to_mask(fields):
    return AttentionMask(**jax.tree.map(jnp.asarray, fields))


@pytest.mark.parametrize("combination", COMBINATIONS, ids=str)
def test_every_combination_equals_loops(combination):
    fields = conditions(*combination)
    expected = visible_by_loops(fields)
    mask = to_mask(fields)._replace(window=fields["window"])
    actual = dense_mask(mask, range(T), range(S))
    np.testing.assert_array_equal(np.broadcast_to(actual, expected.shape), expected)


@pytest.mark.parametrize("combination", COMBINATIONS[::7], ids=str)
def test_blocks_are_parts_of_the_whole(combination):
    expected = visible_by_loops(conditions(*combination))[:, :, 2:4, 1:6]
    mask = to_mask(conditions(*combination))
    actual = dense_mask(mask, range(2, 4), range(1, 6))
    np.testing.assert_array_equal(np.broadcast_to(actual, expected.shape), expected)


def test_a_traced_window_equals_a_known_one():
    @jax.jit
    def visible(window):
        return dense_mask(AttentionMask(window=window), range(T), range(S))

    for window in (1, 3, np.iinfo(np.int32).max):
        expected = visible_by_loops(conditions(False, False, False, window, "none"))
        actual = np.broadcast_to(visible(jnp.int32(window)), expected.shape)
        np.testing.assert_array_equal(actual, expected)


def test_a_mask_that_needs_no_row_has_no_row_axis():
    assert dense_mask(AttentionMask(window=2), range(T), range(S)).shape == (1, 1, T, S)


def test_only_the_empty_mask_is_plainly_causal():
    assert AttentionMask().is_plainly_causal()
    for field in AttentionMask._fields:
        assert not AttentionMask(**{field: jnp.zeros(())}).is_plainly_causal()
