import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relax.ops.norm import rms_norm

EPSILON = 1e-5


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    x, d_y = rng.normal(size=(2, 3, 5, 7)).astype(np.float32)
    return x, rng.normal(size=7).astype(np.float32), d_y


def test_rms_norm_equals_loops(arrays):
    x, weight, _ = arrays
    expected = np.empty_like(x)
    for row in np.ndindex(x.shape[:-1]):
        mean_square = sum(float(value) ** 2 for value in x[row]) / 7
        for d in range(7):
            expected[row][d] = x[row][d] / math.sqrt(mean_square + EPSILON) * weight[d]
    actual = rms_norm(jnp.asarray(x), jnp.asarray(weight), EPSILON)
    # Three float32 roundings of numbers below 4.
    np.testing.assert_allclose(actual, expected, rtol=5e-7, atol=0)


def test_rms_norm_by_hand():
    # mean((3, 4)²) = 12.5, and with epsilon 3.5 the root is 4.
    actual = rms_norm(jnp.array([3.0, 4.0]), jnp.array([2.0, -1.0]), 3.5)
    np.testing.assert_allclose(actual, [1.5, -1.0], rtol=2e-7)


def test_rms_norm_and_its_gradients_equal_those_of_torch(arrays):
    torch = pytest.importorskip("torch")
    x, weight, d_y = arrays
    expected, vjp = jax.vjp(
        lambda x, w: rms_norm(x, w, EPSILON), jnp.asarray(x), jnp.asarray(weight)
    )
    x_torch = torch.tensor(x, requires_grad=True)
    weight_torch = torch.tensor(weight, requires_grad=True)
    peer = torch.nn.functional.rms_norm(x_torch, (7,), weight_torch, EPSILON)
    peer.backward(torch.tensor(d_y))
    np.testing.assert_allclose(expected, peer.detach(), rtol=1e-6)
    d_x, d_weight = vjp(jnp.asarray(d_y))
    np.testing.assert_allclose(d_x, x_torch.grad, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(d_weight, weight_torch.grad, rtol=1e-5, atol=2e-6)


def test_bfloat16_is_normalised_in_float32_and_rounded_before_the_weight():
    # (3, 4) / sqrt(12.5) is (0.84853, 1.13137): in bfloat16 217/256 and 145/128. The
    # latter times 1.5 is 217.5/128, to even 218/128; unrounded, 1.69706 is 217/128.
    x = jnp.array([3.0, 4.0], jnp.bfloat16)
    actual = rms_norm(x, jnp.array([1.0, 1.5], jnp.float32), 0.0)
    assert actual.dtype == jnp.bfloat16
    np.testing.assert_array_equal(actual.astype(jnp.float32), [217 / 256, 218 / 128])


def test_squares_beyond_bfloat16_accuracy_are_summed_in_float32():
    # 1,000 squares of 1 sum to 256 in bfloat16, which would give 1.98.
    x = jnp.ones(1000, jnp.bfloat16)
    actual = rms_norm(x, jnp.ones(1000), 0.0)
    np.testing.assert_array_equal(actual.astype(jnp.float32), 1.0)
