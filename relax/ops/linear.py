"""Matrix products with weights."""

import math

import jax
from jax import Array
from jax.lax import dot_general


def linear(x: Array, w: Array, num_in_axes: int = 1) -> Array:
    """Contracts the last `num_in_axes` axes of `x` with the first ones of `w`.

    `x` is `[*batch, *in]` in the compute dtype, `w` is `[*in, *out]` in its own dtype
    and is cast to that of `x` at use; the result is `[*batch, *out]` in the dtype of
    `x`. The gradient of `w` is summed in the dtype of `w`, so that bfloat16
    activations still give float32 weight gradients.

    All three products (forward, dx = dy·Wᵀ, dW = xᵀ·dy) run on matrices: XLA's CPU
    backend runs the products that `[B, T, D]` arrays differentiate into at about half
    the speed.
    """
    out_shape = w.shape[num_in_axes:]
    matrix = w.reshape(math.prod(w.shape[:num_in_axes]), math.prod(out_shape))
    batch_shape = x.shape[: x.ndim - num_in_axes]
    y = _product(x.reshape(*batch_shape, matrix.shape[0]), matrix)
    return y.reshape(*batch_shape, *out_shape)


@jax.custom_vjp
def _product(x: Array, w: Array) -> Array:
    """Returns x·W for `[*batch, I]` and `[I, O]`."""
    y = dot_general(_rows(x), w.astype(x.dtype), (((1,), (0,)), ((), ())))
    return y.reshape(*x.shape[:-1], w.shape[1])


def _product_forward(x, w):
    return _product(x, w), (x, w)


def _product_backward(residuals, dy):
    x, w = residuals
    # The barrier keeps XLA from moving the reshape behind the products.
    x_rows, dy_rows = jax.lax.optimization_barrier((_rows(x), _rows(dy)))
    dx = dot_general(dy_rows, w.astype(x.dtype), (((1,), (1,)), ((), ())))
    dw = dot_general(
        x_rows, dy_rows, (((0,), (0,)), ((), ())), preferred_element_type=w.dtype
    )
    return dx.reshape(x.shape), dw


_product.defvjp(_product_forward, _product_backward)


def _rows(x: Array) -> Array:
    return x.reshape(-1, x.shape[-1])
