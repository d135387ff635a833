import jax
import jax.numpy as jnp
import numpy as np

from relax.ops.dropout import dropout

RATE = 0.3


def ones(count=10_007):
    return jnp.ones(count)


def test_without_a_key_or_a_rate_dropout_is_the_identity():
    x = ones()
    assert dropout(x, RATE, None) is x
    assert dropout(x, 0.0, jax.random.key(0)) is x


def test_zero_fraction_and_scale():
    y = np.asarray(dropout(ones(), RATE, jax.random.key(0)))
    # Five standard deviations of a binomial fraction.
    assert abs(np.mean(y == 0.0) - RATE) < 5 * np.sqrt(RATE * (1 - RATE) / y.size)
    np.testing.assert_allclose(y[y != 0.0], 1.0 / 0.7, rtol=1e-6)


def test_the_gradient_passes_where_the_value_does():
    x = ones() * 3.0
    key = jax.random.key(1)
    y, vjp = jax.vjp(lambda x: dropout(x, RATE, key), x)
    (d_x,) = vjp(jnp.ones_like(y))
    np.testing.assert_allclose(d_x, np.where(np.asarray(y) == 0.0, 0.0, 1.0 / 0.7))


def test_a_key_repeats_its_mask_and_another_key_does_not():
    first, again, other = (dropout(ones(), RATE, jax.random.key(i)) for i in (2, 2, 3))
    np.testing.assert_array_equal(first, again)
    # Two independent masks differ in 2 x 0.3 x 0.7 of the entries.
    assert abs(float(jnp.mean(first != other)) - 0.42) < 0.025


def test_bfloat16_stays_bfloat16():
    y = dropout(ones().astype(jnp.bfloat16), 0.5, jax.random.key(4))
    assert y.dtype == jnp.bfloat16
    assert set(np.unique(y.astype(jnp.float32))) == {0.0, 2.0}
