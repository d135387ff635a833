"""Scanned, unrolled and rematerialised layers are the same function."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relax.model.llama import make_llama
from relax.model.parameters import flat_parameters, stack_layers, unstack_layers
from relax.ops.logprobs import compute_logits

TOKENS = np.random.default_rng(0).integers(0, 67, (2, 7))
# Every path of the block, and a different input for each layer.
OPTIONS = {
    "qkv_bias": True,
    "attention_out_bias": True,
    "mlp_bias": True,
    "qk_norm": True,
    "sliding_window": 3,
    "max_window_layers": 1,
    "dropout": 0.25,
}


KEY = jax.random.key(5)


def logits_and_gradients(config, params):
    """Returns the logits and d(weighted logits) of the parameters, with dropout."""
    return compiled_gradients(config)(params)


@functools.cache
def compiled_gradients(config):
    apply = make_llama(config).apply
    weights = np.random.default_rng(1).normal(size=(2, 7, 67))

    def loss(params):
        out = apply(params, TOKENS)
        logits = compute_logits(out.hidden, out.unembedding, 67)[..., :67]
        return jnp.sum(weights * logits), logits

    gradients = jax.jit(jax.grad(loss, has_aux=True))
    return lambda params: gradients(params)[::-1]


@pytest.fixture(scope="module")
def scanned(small_model):
    model = small_model(**OPTIONS)
    return model.params, *logits_and_gradients(model.config, model.params)


def assert_equal_gradients(actual, expected):
    for (path, ours), (other, theirs) in zip(
        flat_parameters(actual), flat_parameters(expected), strict=True
    ):
        assert path == other and ours.dtype == theirs.dtype == jnp.float32
        scale = float(jnp.max(jnp.abs(theirs)))
        assert scale > 0.0, path
        # The order of float32 sums is the compiler's.
        np.testing.assert_allclose(ours, theirs, 0, 3e-6 * scale, err_msg=path)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_unrolled_layers_equal_scanned_ones(small_model, scanned, remat):
    params, logits, gradients = scanned
    config = small_model(**OPTIONS, scan_layers=False, remat=remat).config
    ours, our_gradients = logits_and_gradients(config, unstack_layers(params))
    np.testing.assert_allclose(ours, logits, rtol=0, atol=1e-5)
    assert_equal_gradients(stack_layers(our_gradients), gradients)


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_remat_changes_nothing(small_model, scanned, remat):
    params, logits, gradients = scanned
    config = small_model(**OPTIONS, remat=remat).config
    ours, our_gradients = logits_and_gradients(config, params)
    np.testing.assert_allclose(ours, logits, rtol=0, atol=1e-5)
    assert_equal_gradients(our_gradients, gradients)


def test_the_check_catches_swapped_layers(small_model, scanned):
    params, logits, _ = scanned
    swapped = {
        path: jax.tree.map(lambda x: x[::-1], leaves) if "/layers/" in path else leaves
        for path, leaves in params.items()
    }
    ours, _ = logits_and_gradients(small_model(**OPTIONS).config, swapped)
    assert float(jnp.max(jnp.abs(ours - logits))) > 0.1
