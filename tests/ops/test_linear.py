import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relax.ops.linear import linear


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# Equations of y, dx and dW; shapes of x and W.
CASES = {
    "matrix": ("btd,df->btf", "btf,df->btd", "btd,btf->df", (2, 5, 7), (7, 11)),
    "heads": ("btd,dnh->btnh", "btnh,dnh->btd", "btd,btnh->dnh", (2, 5, 7), (7, 3, 4)),
    "join": (
        "btnh,nhd->btd",
        "btd,nhd->btnh",
        "btnh,btd->nhd",
        (2, 5, 3, 4),
        (3, 4, 7),
    ),
    "vector": ("d,df->f", "f,df->d", "d,f->df", (7,), (7, 11)),
}


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_equal_einsum(case):
    forward, backward_x, backward_w, x_shape, w_shape = CASES[case]
    num_in_axes = 2 if case == "join" else 1
    x, w = normal(0, *x_shape), normal(1, *w_shape)
    y, vjp = jax.vjp(
        lambda x, w: linear(x, w, num_in_axes), jnp.asarray(x), jnp.asarray(w)
    )
    d_y = normal(2, *y.shape)
    d_x, d_w = vjp(jnp.asarray(d_y))
    x, w, d_y64 = (a.astype(np.float64) for a in (x, w, d_y))
    # Sums of at most 12 products of about 1, each rounded to 6e-8.
    np.testing.assert_allclose(y, np.einsum(forward, x, w), rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(d_x, np.einsum(backward_x, d_y64, w), 1e-5, 2e-6)
    np.testing.assert_allclose(d_w, np.einsum(backward_w, x, d_y64), 1e-5, 2e-6)


def test_values_and_gradients_equal_those_of_torch():
    torch = pytest.importorskip("torch")
    x, w, d_y = normal(3, 2, 5, 7), normal(4, 7, 11), normal(5, 2, 5, 11)
    y, vjp = jax.vjp(linear, jnp.asarray(x), jnp.asarray(w))
    x_torch = torch.tensor(x, requires_grad=True)
    w_torch = torch.tensor(w.T.copy(), requires_grad=True)
    peer = torch.nn.functional.linear(x_torch, w_torch)
    peer.backward(torch.tensor(d_y))
    d_x, d_w = vjp(jnp.asarray(d_y))
    np.testing.assert_allclose(y, peer.detach(), rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(d_x, x_torch.grad, rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(d_w, w_torch.grad.T, rtol=1e-5, atol=2e-6)


def test_bfloat16_activations_give_float32_weight_gradients_summed_in_float32():
    rows = 2053  # sums of about 2,000, of which bfloat16 keeps multiples of 8
    x = jnp.asarray(normal(6, rows, 3) + 1.0, jnp.bfloat16)
    d_y = jnp.asarray(normal(7, rows, 5) + 1.0, jnp.bfloat16)
    w = jnp.asarray(normal(8, 3, 5))
    y, vjp = jax.vjp(linear, x, w)
    d_x, d_w = vjp(d_y)
    assert (y.dtype, d_x.dtype, d_w.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    exact = np.asarray(x, np.float64).T @ np.asarray(d_y, np.float64)
    np.testing.assert_allclose(d_w, exact, rtol=2e-6)
    in_bfloat16 = x.T @ d_y
    assert np.max(np.abs(np.asarray(in_bfloat16, np.float64) / exact - 1.0)) > 1e-3


def test_weights_are_cast_to_the_dtype_of_the_activations():
    # 1 + 2⁻⁹ is 1 in bfloat16; a product in float32 would leave 2⁻⁹.
    x = jnp.array([1.0, -1.0], jnp.bfloat16)
    y = linear(x, jnp.array([[1.0 + 2**-9], [1.0]]))
    assert y.dtype == jnp.bfloat16 and float(y[0]) == 0.0


def test_it_maps_and_compiles():
    x, w = normal(9, 3, 5, 7), normal(10, 3, 7, 11)
    y = jax.jit(jax.vmap(linear))(x, w)
    np.testing.assert_allclose(y, np.einsum("btd,bdf->btf", x, w), rtol=1e-5, atol=2e-6)
