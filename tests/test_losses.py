"""Losses against numbers worked out by hand, and against torch's."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relax.losses import cross_entropy, smoothed_cross_entropy, target_mask, z_loss
from relax.ops.logprobs import TokenStats, mean_logits, token_stats

MASK = jnp.array([[1.0, 0.0, 1.0], [0.5, 1.0, 0.0]])


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["plain", "jit"])
def test_cross_entropy_sums_over_the_mask(transform):
    logprobs = jnp.array([[-0.5, -7.0, -2.0], [-3.0, -0.25, -11.0]])
    loss, weight = transform(cross_entropy)(logprobs, MASK)
    assert loss == 0.5 + 2.0 + 0.5 * 3.0 + 0.25
    assert weight == 4


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["plain", "jit"])
def test_weights_scale_the_loss_and_not_what_divides_it(transform):
    """Over parts too, as of an accumulation, of which one has no target."""
    logprobs = jnp.array([[-8.0, -7.0, -2.0], [-3.0, -0.25, -11.0]])
    whole = (8 + 2 + 3 + 0.25) / 4
    for weight in (1.0, 0.125, 3.0):
        mask = weight * (MASK > 0)
        for split in ([0, 2], [0, 1, 2], [0, 0, 2]):
            parts = [
                transform(cross_entropy)(logprobs[a:b], mask[a:b])
                for a, b in pairwise(split)
            ]
            loss, count = map(sum, zip(*parts, strict=True))
            assert count == 4
            assert loss / count == weight * whole


def test_targets_are_the_places_with_a_weight():
    assert target_mask(MASK).tolist() == [[1, 0, 1], [1, 1, 0]]
    assert target_mask(MASK).dtype == MASK.dtype


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


def test_label_smoothing_by_hand():
    # Logits ln 1, ln 2, ln 5: -log p are ln 8, ln 4, ln 1.6, and their mean is that of
    # ln 51.2 / 3; the target is the last.
    logits = jnp.log(jnp.array([1.0, 2.0, 5.0]))
    logsumexp, target = jnp.full((1, 2), np.log(8.0)), jnp.full((1, 2), np.log(0.625))
    stats = stats_with(logsumexp)._replace(logprobs=target)
    means = jnp.full((1, 2), jnp.mean(logits))
    for epsilon in (0.0, 0.1, 1.0):
        loss = smoothed_cross_entropy(stats, means, jnp.array([[1.0, 0.0]]), epsilon)
        expected = (1 - epsilon) * np.log(1.6) + epsilon * np.log(51.2) / 3
        assert float(loss) == pytest.approx(expected, abs=1e-6)


def test_label_smoothing_equals_that_of_torch():
    torch = pytest.importorskip("torch")
    B, T, D, V, rows, epsilon = 2, 3, 5, 11, 13, 0.1
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(B, T, D)).astype(np.float32)
    table = rng.normal(size=(rows, D)).astype(np.float32)
    targets = rng.integers(0, V, (B, T))

    def loss_fn(hidden, table):
        stats = token_stats(hidden, table, jnp.asarray(targets), V)
        means = mean_logits(hidden, table, V)
        return smoothed_cross_entropy(stats, means, MASK > 0, epsilon)

    value_and_grad = jax.jit(jax.value_and_grad(loss_fn, argnums=(0, 1)))
    loss, grads = value_and_grad(jnp.asarray(hidden), jnp.asarray(table))
    arrays = [torch.tensor(x, requires_grad=True) for x in (hidden, table)]
    logits = (arrays[0] @ arrays[1][:V].T).reshape(-1, V)
    labels = torch.tensor(np.where(MASK > 0, targets, -100).reshape(-1))
    theirs = torch.nn.functional.cross_entropy(
        logits, labels, label_smoothing=epsilon, reduction="sum"
    )
    theirs.backward()
    assert float(loss) == pytest.approx(theirs.item(), rel=1e-6)
    for ours, array in zip(grads, arrays, strict=True):
        np.testing.assert_allclose(ours, array.grad, rtol=0, atol=2e-6)
