"""Losses against numbers worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relax.losses import cross_entropy, z_loss
from relax.ops.logprobs import TokenStats

MASK = jnp.array([[1.0, 0.0, 1.0], [0.5, 1.0, 0.0]])


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["plain", "jit"])
def test_cross_entropy_sums_over_the_mask(transform):
    logprobs = jnp.array([[-0.5, -7.0, -2.0], [-3.0, -0.25, -11.0]])
    loss, weight = transform(cross_entropy)(logprobs, MASK)
    assert loss == 0.5 + 2.0 + 0.5 * 3.0 + 0.25
    assert weight == 3.5


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["plain", "jit"])
def test_cross_entropy_pulls_each_logprob_up_by_its_weight(transform):
    gradient = jax.grad(lambda logprobs: cross_entropy(logprobs, MASK)[0])
    np.testing.assert_array_equal(transform(gradient)(jnp.zeros((2, 3))), -MASK)


def test_cross_entropy_of_masked_rows_is_nothing_of_nothing():
    loss, weight = cross_entropy(jnp.full((2, 3), -5.0), jnp.zeros((2, 3)))
    assert (loss, weight) == (0.0, 0.0)


def stats_with(logsumexp) -> TokenStats:
    rest = jnp.zeros_like(logsumexp)
    return TokenStats(rest, logsumexp, rest, rest.astype(bool))


def test_z_loss_sums_the_squared_log_normaliser_over_the_mask():
    logsumexp = jnp.array([[3.0, 5.0, -1.0], [2.0, 0.5, 7.0]])
    assert z_loss(stats_with(logsumexp), MASK) == 9.0 + 1.0 + 0.5 * 4.0 + 0.25


def test_z_loss_pulls_the_log_normaliser_to_zero():
    logsumexp = jnp.array([[3.0, 5.0, -1.0], [2.0, 0.0, 7.0]])
    gradient = jax.grad(lambda values: z_loss(stats_with(values), MASK))(logsumexp)
    np.testing.assert_array_equal(gradient, [[6.0, 0.0, -2.0], [2.0, 0.0, 0.0]])
