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


def loss_gradients(model):
    def loss(params):
        out = model.forward(params, TOKENS)
        stats = token_stats(out.hidden, out.unembedding, jnp.asarray(TOKENS), 67)
        return -jnp.mean(stats.logprobs)

    return jax.jit(jax.grad(loss))(model.params)


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


@pytest.fixture(scope="module")
def wide(small_model):
    return small_model(**OPTIONS)


@pytest.fixture(scope="module")
def half(small_model):
    return small_model(**OPTIONS, compute_dtype="bfloat16")


def test_bfloat16_activations_keep_float32_logits(wide, half):
    out = half.forward(half.params, TOKENS)
    assert out.hidden.dtype == jnp.bfloat16
    assert out.unembedding.dtype == jnp.float32
    actual, expected = half.logits(TOKENS), wide.logits(TOKENS)
    assert actual.dtype == jnp.float32
    # bfloat16 rounds to 2⁻⁹; some ten roundings in a row per layer, of logits up to 4.
    np.testing.assert_allclose(actual, expected, rtol=0, atol=0.1)
    assert float(jnp.max(jnp.abs(actual - expected))) > 1e-4


def test_bfloat16_activations_give_float32_gradients(wide, half):
    expected = dict(flat_parameters(loss_gradients(wide)))
    for path, gradient in flat_parameters(loss_gradients(half)):
        assert gradient.dtype == jnp.float32
        error = jnp.linalg.norm(gradient - expected[path])
        assert float(error / jnp.linalg.norm(expected[path])) < 0.05, path


def test_float32_activations_of_bfloat16_parameters(small_model):
    model = small_model(**OPTIONS, param_dtype="bfloat16")
    rounded = {
        path: jax.tree.map(lambda x: x.astype(jnp.float32), leaves)
        for path, leaves in model.params.items()
    }
    out = model.forward(model.params, TOKENS)
    assert out.hidden.dtype == jnp.float32
    expected = small_model(**OPTIONS).forward(rounded, TOKENS).hidden
    np.testing.assert_allclose(out.hidden, expected, rtol=0, atol=1e-5)
    gradients = loss_gradients(model)
    assert {str(x.dtype) for _, x in flat_parameters(gradients)} == {"bfloat16"}
