import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relax.model.llama import make_llama
from relax.model.parameters import flat_parameters
from relax.ops.logprobs import token_stats

TOKENS = np.random.default_rng(0).integers(0, 67, (2, 7))
OPTIONS = {
    "qkv_bias": True,
    "attention_out_bias": True,
    "mlp_bias": True,
    "qk_norm": True,
}


def loss_of(model):
    """Returns the mean cross entropy as a function of the parameters."""

    def loss(params):
        out = model.forward(params, TOKENS)
        stats = token_stats(out.hidden, out.unembedding, jnp.asarray(TOKENS), 67)
        return -jnp.mean(stats.logprobs)

    return loss


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_parameters_are_born_in_their_own_dtype(
    make_config, param_dtype, compute_dtype
):
    config = make_config(
        **OPTIONS, param_dtype=param_dtype, compute_dtype=compute_dtype
    )
    shapes = jax.eval_shape(make_llama(config).init, jax.random.key(0), TOKENS)
    dtypes = {str(leaf.dtype) for _, leaf in flat_parameters(shapes)}
    assert dtypes == {param_dtype}


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_gradients_have_the_dtype_of_their_parameters(
    small_model, param_dtype, compute_dtype
):
    model = small_model(**OPTIONS, param_dtype=param_dtype, compute_dtype=compute_dtype)
    gradients = jax.eval_shape(jax.grad(loss_of(model)), model.params)
    assert {str(leaf.dtype) for _, leaf in flat_parameters(gradients)} == {param_dtype}


@pytest.fixture(scope="module")
def wide(small_model):
    return small_model(qk_norm=True)


@pytest.fixture(scope="module")
def half(small_model):
    return small_model(qk_norm=True, compute_dtype="bfloat16")


def test_bfloat16_activations_keep_float32_logits(wide, half):
    out = half.forward(half.params, TOKENS)
    assert out.hidden.dtype == jnp.bfloat16
    assert out.unembedding.dtype == jnp.float32
    actual, expected = half.logits(TOKENS), wide.logits(TOKENS)
    assert actual.dtype == jnp.float32
    error = float(jnp.linalg.norm(actual - expected) / jnp.linalg.norm(expected))
    # bfloat16 rounds to 2⁻⁹ = 0.2%, some ten times in a row in each layer.
    assert 1e-4 < error < 0.03


def test_bfloat16_activations_give_gradients_close_to_those_of_float32(wide, half):
    actual, expected = (
        dict(flat_parameters(jax.jit(jax.grad(loss_of(model)))(model.params)))
        for model in (half, wide)
    )
    for path, gradient in actual.items():
        error = jnp.linalg.norm(gradient - expected[path])
        assert float(error / jnp.linalg.norm(expected[path])) < 0.05, path


def test_float32_activations_of_bfloat16_parameters(small_model, wide):
    model = small_model(qk_norm=True, param_dtype="bfloat16")
    rounded = jax.tree.map(lambda x: x.astype(jnp.float32), model.params)
    actual = model.forward(model.params, TOKENS).hidden
    assert actual.dtype == jnp.float32
    expected = wide.forward(rounded, TOKENS).hidden
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)
