import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relax.ops.logprobs import compute_logits, mean_logits, token_stats

B, T, D, V, ROWS = 2, 7, 5, 11, 13
TEMPERATURE = 0.7


def inputs(seed=0, length=T):
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.normal(size=(B, length, D)), jnp.float32)
    table = jnp.asarray(rng.normal(size=(ROWS, D)), jnp.float32)
    return hidden, table, jnp.asarray(rng.integers(0, V, (B, length)))


def stats_by_log_softmax(hidden, table, targets, temperature=TEMPERATURE):
    """Returns logprobs, logsumexp and entropy over the V real rows."""
    logits = jnp.einsum("btd,vd->btv", hidden, table[:V]) / temperature
    log_p = jax.nn.log_softmax(logits, axis=-1)
    logprobs = jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
    entropy = -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
    return logprobs, jax.nn.logsumexp(logits, axis=-1), entropy


def stats(hidden, table, targets, **options):
    return token_stats(
        hidden, table, targets, V, **{"temperature": TEMPERATURE, **options}
    )


def gradients(function, hidden, table, targets, weights):
    """Returns d(weights · the first three statistics) of hidden and of table."""

    def total(hidden, table):
        values = function(hidden, table, targets)[:3]
        return sum(jnp.sum(w * x) for w, x in zip(weights, values, strict=True))

    return jax.jit(jax.grad(total, argnums=(0, 1)))(hidden, table)


def random_weights(seed=1, length=T):
    weights = np.random.default_rng(seed).normal(size=(3, B, length))
    return list(jnp.asarray(weights, jnp.float32))


def test_one_token_by_hand():
    # Logits ln 1, ln 2, ln 5: probabilities 1/8, 2/8, 5/8.
    hidden, table = jnp.ones((1, 1, 1)), jnp.log(jnp.array([[1.0], [2.0], [5.0]]))
    actual = token_stats(hidden, table, jnp.array([[2]]), 3)
    assert float(actual.logprobs[0, 0]) == pytest.approx(-0.4700036, abs=1e-6)
    assert float(actual.logsumexp[0, 0]) == pytest.approx(2.0794415, abs=1e-6)
    assert float(actual.entropy[0, 0]) == pytest.approx(0.9002561, abs=1e-6)
    assert bool(actual.correct[0, 0])
    # At temperature 1/2 the weights are 1, 4, 25 of 30.
    cold = token_stats(hidden, table, jnp.array([[1]]), 3, temperature=0.5)
    assert float(cold.logprobs[0, 0]) == pytest.approx(math.log(4 / 30), abs=1e-6)
    assert float(cold.logsumexp[0, 0]) == pytest.approx(math.log(30), abs=1e-6)
    assert not bool(cold.correct[0, 0])


def test_large_logits_cost_no_digits():
    # Logits 4096, 4097, 4098, which float32 spaces by 5e-4: e⁰ + e⁻¹ + e⁻² = 1.5032147.
    hidden, table = jnp.ones((1, 1, 1)), jnp.array([[4096.0], [4097.0], [4098.0]])
    actual = token_stats(hidden, table, jnp.array([[1]]), 3)
    assert float(actual.logprobs[0, 0]) == pytest.approx(-1.4076060, abs=3e-7)
    assert float(actual.entropy[0, 0]) == pytest.approx(0.8323956, abs=3e-7)


def test_values_equal_log_softmax():
    arrays = inputs()
    actual = stats(*arrays)
    for ours, expected in zip(actual[:3], stats_by_log_softmax(*arrays), strict=True):
        assert ours.dtype == jnp.float32
        # Logits below 16: a few of their float32 spacings of 1e-6.
        np.testing.assert_allclose(ours, expected, rtol=0, atol=3e-6)
    hidden, table, targets = arrays
    best = np.argmax(np.einsum("btd,vd->btv", hidden, table[:V]), axis=-1)
    np.testing.assert_array_equal(actual.correct, best == np.asarray(targets))


@pytest.mark.parametrize("statistic", ["logprobs", "logsumexp", "entropy", "all"])
def test_gradients_equal_those_through_log_softmax(statistic):
    arrays, weights = inputs(), random_weights()
    if statistic != "all":
        index = ["logprobs", "logsumexp", "entropy"].index(statistic)
        weights = [w * (i == index) for i, w in enumerate(weights)]
    actual = gradients(stats, *arrays, weights)
    expected = gradients(stats_by_log_softmax, *arrays, weights)
    for ours, theirs in zip(actual, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("chunk", [1, 2, 3, 7])
def test_chunks_change_nothing(chunk):
    arrays, weights = inputs(), random_weights()

    def chunked(*arrays):
        return stats(*arrays, max_logits=chunk * B * ROWS + 1)

    for ours, whole in zip(chunked(*arrays), stats(*arrays), strict=True):
        assert ours.shape == (B, T)
        np.testing.assert_allclose(ours, whole, rtol=0, atol=1e-6)
    actual = gradients(chunked, *arrays, weights)
    expected = gradients(stats, *arrays, weights)
    for ours, whole in zip(actual, expected, strict=True):
        # The sum over positions of d_table is taken in another order.
        np.testing.assert_allclose(ours, whole, rtol=1e-5, atol=5e-6)


def test_padded_rows_have_no_probability_and_no_gradient():
    hidden, table, targets = inputs()
    # A padded row that would win every softmax, were it counted.
    table = table.at[V:].set(100.0)
    logits = compute_logits(hidden, table, V)
    assert logits.shape == (B, T, ROWS)
    np.testing.assert_array_equal(logits[..., V:], -np.inf)
    np.testing.assert_array_equal(jax.nn.softmax(logits)[..., V:], 0.0)
    expected = stats_by_log_softmax(hidden, table, targets)
    for ours, theirs in zip(stats(hidden, table, targets)[:3], expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=3e-6)
    d_hidden, d_table = gradients(stats, hidden, table, targets, random_weights())
    np.testing.assert_array_equal(d_table[V:], 0.0)
    assert np.isfinite(d_hidden).all() and np.all(np.any(d_table[:V] != 0.0, axis=1))


def test_a_certain_token_has_no_entropy_and_finite_gradients():
    # Logits 0 and 200: the other probability is 0 in float32.
    hidden, table = jnp.ones((1, 1, 1)), jnp.array([[0.0], [200.0]])
    targets = jnp.array([[0]])
    actual = token_stats(hidden, table, targets, 2)
    assert float(actual.logprobs[0, 0]) == -200.0
    assert float(actual.entropy[0, 0]) == 0.0

    def total(hidden):
        return sum(jnp.sum(x) for x in token_stats(hidden, table, targets, 2)[:3])

    # d logprob = 0 - 200, d logsumexp = 200, d entropy = 0.
    assert float(jax.grad(total)(hidden)[0, 0, 0]) == 0.0


def test_logits_are_float32_products_of_activations_in_their_dtype():
    hidden, table, targets = inputs()
    hidden = hidden.astype(jnp.bfloat16)
    actual = compute_logits(hidden[0, 0], table, V)
    rounded = np.asarray(table.astype(jnp.bfloat16), np.float64)
    expected = rounded[:V] @ np.asarray(hidden[0, 0], np.float64)
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual[:V], expected, rtol=0, atol=1e-6)
    weights = random_weights()
    d_hidden, d_table = gradients(stats, hidden, table, targets, weights)
    assert (d_hidden.dtype, d_table.dtype) == (jnp.bfloat16, jnp.float32)


def test_mean_logits_are_those_of_the_real_rows():
    hidden, table, _ = inputs()
    actual = mean_logits(hidden, table, V, temperature=TEMPERATURE)
    expected = np.mean(np.asarray(compute_logits(hidden, table, V))[..., :V], axis=-1)
    np.testing.assert_allclose(actual, expected / TEMPERATURE, rtol=0, atol=2e-6)


def supports(seed=2):
    """Returns which ids each position is over `[B, T, ROWS]`, targets among them.

    Those of the first position are none, which is all.
    """
    ids = np.random.default_rng(seed).random((B, T, ROWS)) < 0.4
    _, _, targets = inputs()
    np.put_along_axis(ids, np.asarray(targets)[..., None], True, axis=-1)
    ids[..., V:] = False
    ids[0, 0] = False
    return ids


SUPPORTS = supports()


def stats_by_masked_log_softmax(hidden, table, targets, ids=SUPPORTS):
    """Returns logprobs, logsumexp and entropy over each position's ids."""
    ids = ids[..., :V].copy()
    ids[0, 0] = True
    logits = jnp.einsum("btd,vd->btv", hidden, table[:V]) / TEMPERATURE
    # -100 is as good as nothing here, and has no 0 x inf in its gradient.
    logits = jnp.where(ids, logits, -100.0)
    log_p = jax.nn.log_softmax(logits, axis=-1)
    logprobs = jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
    entropy = -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
    return logprobs, jax.nn.logsumexp(logits, axis=-1), entropy


@pytest.mark.parametrize("chunk", [3, T])
def test_a_support_renormalises_over_its_ids(chunk):
    arrays, weights = inputs(), random_weights()
    support = jnp.packbits(jnp.asarray(SUPPORTS), axis=-1)
    assert support.shape == (B, T, 2)

    def supported(*arrays):
        return stats(*arrays, support=support, max_logits=chunk * B * ROWS)

    actual = supported(*arrays)
    expected = stats_by_masked_log_softmax(*arrays)
    for ours, theirs in zip(actual[:3], expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=3e-6)
    found = gradients(supported, *arrays, weights)
    dense = gradients(stats_by_masked_log_softmax, *arrays, weights)
    for ours, theirs in zip(found, dense, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=5e-6)


def test_a_support_by_hand():
    # Weights 1, 2, 5, of which the first and the last are left: 1/6 and 5/6.
    hidden, table = jnp.ones((1, 1, 1)), jnp.log(jnp.array([[1.0], [2.0], [5.0]]))
    support = jnp.array([[[0b10100000]]], jnp.uint8)
    for target, logprob in ((0, math.log(1 / 6)), (2, math.log(5 / 6))):
        actual = token_stats(hidden, table, jnp.array([[target]]), 3, support=support)
        assert float(actual.logprobs[0, 0]) == pytest.approx(logprob, abs=1e-6)
        assert float(actual.logsumexp[0, 0]) == pytest.approx(math.log(6), abs=1e-6)


def test_a_target_outside_its_support_moves_only_the_ids_within():
    arrays, weights = inputs(), random_weights()
    ids = SUPPORTS.copy()
    ids[1, 2, arrays[2][1, 2]] = False
    support = jnp.packbits(jnp.asarray(ids), axis=-1)

    def supported(*arrays):
        return stats(*arrays, support=support)

    logprobs = supported(*arrays).logprobs
    assert logprobs[1, 2] == -np.inf and np.isfinite(logprobs).sum() == B * T - 1
    found = gradients(supported, *arrays, weights)
    dense = gradients(partial(stats_by_masked_log_softmax, ids=ids), *arrays, weights)
    for ours, theirs in zip(found, dense, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=5e-6)


def peak_bytes(max_logits, length=64, rows=1024):
    """Returns the scratch memory of the compiled gradient."""
    shapes = [
        jax.ShapeDtypeStruct((B, length, D), jnp.float32),
        jax.ShapeDtypeStruct((rows, D), jnp.float32),
        jax.ShapeDtypeStruct((B, length), jnp.int32),
    ]

    def total(hidden, table, targets):
        stats = token_stats(hidden, table, targets, rows, max_logits=max_logits)
        return jnp.sum(stats.logprobs)

    compiled = jax.jit(jax.grad(total, argnums=(0, 1))).lower(*shapes).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_the_logits_of_all_positions_never_exist_at_a_time():
    whole = B * 64 * 1024
    assert peak_bytes(max_logits=whole) > 4 * whole
    # A sixteenth of the positions at a time, with all that is derived from them.
    assert peak_bytes(max_logits=whole // 16) < 4 * whole // 3
