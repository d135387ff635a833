import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relax.ops import draws

ROWS = 20_011


def keys(count, seed=3):
    return jax.random.split(jax.random.key(seed), count)


def shares(logits):
    weights = np.exp(logits - np.max(logits))
    return weights / weights.sum()


@pytest.mark.parametrize("V", [1, 2, 31, 67])
def test_every_id_has_its_share_whatever_block_it_stands_in(V):
    """Within five standard deviations of what the softmax says."""
    logits = np.random.default_rng(V).normal(size=V).astype(np.float32)
    logits[1::3] = -np.inf
    rows = jnp.broadcast_to(logits, (ROWS, V))
    drawn = np.asarray(jax.jit(draws.draw_tokens)(keys(ROWS), rows))
    expected = ROWS * shares(logits)
    counts = np.bincount(drawn, minlength=V)
    assert len(counts) == V and not counts[1::3].any()
    assert np.all(np.abs(counts - expected) <= 5 * np.sqrt(expected))


def test_a_row_s_draw_depends_on_its_own_key_and_logits_alone():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(13, 61)), "f4")
    whole = draws.draw_tokens(keys(13), logits)
    some = jnp.array([11, 2, 7])
    np.testing.assert_array_equal(
        draws.draw_tokens(keys(13)[some], logits[some]), whole[some]
    )
    assert (draws.draw_tokens(keys(13, seed=5), logits) != whole).any()


def test_the_only_id_that_is_left_is_drawn():
    """At the edges of blocks of eight, and however unlikely it was before."""
    logits = np.full((4, 67), -np.inf, np.float32)
    left = [0, 7, 8, 66]
    logits[np.arange(4), left] = [-80.0, 3.0, 0.0, -1e30]
    assert draws.draw_tokens(keys(4), jnp.asarray(logits)).tolist() == left


def test_running_sums_that_fall_again_leave_ids_with_mass():
    """A share of 1 is passed nowhere, as where a rounded sum is above the last one."""
    masses = jnp.array([[0.5, 2.0, 0.0], [0.0, 0.0, 3.0]])
    assert draws._chosen(masses, jnp.ones(2)).tolist() == [1, 2]
    assert draws._chosen(masses, jnp.zeros(2)).tolist() == [0, 2]
    assert draws._chosen(masses, jnp.full(2, 0.21)).tolist() == [1, 2]


def test_the_most_likely_is_the_first_of_equals():
    nothing = jnp.nan
    logits = jnp.array([[1.0, 5.0, 5.0], [2.0, 2.0, 2.0], [nothing] * 3])
    assert draws.most_likely(logits).tolist() == [1, 0, 0]


def test_logprobs_are_those_of_the_softmax():
    logits = np.random.default_rng(1).normal(scale=5.0, size=(7, 11)).astype("f4")
    logits[:, 3] = -np.inf
    tokens = np.array([0, 1, 2, 4, 5, 6, 10])
    expected = [np.log(shares(row)[i]) for row, i in zip(logits, tokens, strict=True)]
    actual = draws.logprobs_at(jnp.asarray(logits), jnp.asarray(tokens))
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_a_support_is_read_by_unpackbits():
    marks = np.random.default_rng(2).random((5, 67)) < 0.3
    packed = np.asarray(draws.pack_support(jnp.asarray(marks)))
    assert packed.shape == (5, 9) and packed.dtype == np.uint8
    np.testing.assert_array_equal(np.unpackbits(packed, axis=1, count=67), marks)
