"""NEFTune's noise on the embedded tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relax.model.llama import make_llama

T, D = 7, 28
TOKENS = np.random.default_rng(0).integers(0, 67, (11, T))
KEY = jax.random.key(3)
ALPHA = 7.0
BOUND = 0.5  # 7 / sqrt(7 · 28)


@functools.cache
def compiled(config, alpha):
    apply = make_llama(config).apply

    @jax.jit
    def embedded(params, key):
        """Returns what goes into the first layer."""
        out = apply(
            params,
            TOKENS,
            dropout_key=key,
            neftune_alpha=alpha,
            capture=("resid_pre",),
        )
        return out.captured["resid_pre"][0]

    return embedded


@pytest.fixture
def embedded(small_model):
    """A callable: what goes into the first layer, with NEFTune's alpha and dropout."""

    def run(key, alpha=ALPHA, dropout=0.0):
        model = small_model(num_hidden_layers=1, dropout=dropout)
        return np.asarray(compiled(model.config, alpha)(model.params, key))

    return run


def test_noise_is_uniform_within_alpha_over_the_root_of_t_d(embedded):
    noise = embedded(KEY) - embedded(None)
    assert 0.99 * BOUND < np.max(np.abs(noise)) <= BOUND * (1 + 1e-6)
    # Of 2156 uniform numbers: five standard errors.
    assert abs(np.mean(noise)) < 5 * BOUND / (3 * noise.size) ** 0.5
    assert abs(np.std(noise) - BOUND / 3**0.5) < 0.01
    assert len(np.unique(np.round(noise, 6))) > 0.9 * noise.size


def test_a_key_repeats_it_and_another_does_not(embedded):
    np.testing.assert_array_equal(embedded(KEY), embedded(KEY))
    assert np.max(np.abs(embedded(KEY) - embedded(jax.random.key(4)))) > 0.1


def test_without_a_key_or_alpha_there_is_none(embedded, small_model):
    table = small_model(num_hidden_layers=1).params["llama/embed_tokens"]["weight"]
    expected = np.asarray(table)[TOKENS]
    np.testing.assert_array_equal(embedded(None), expected)
    np.testing.assert_array_equal(embedded(KEY, alpha=0.0), expected)


def test_dropout_keeps_its_keys(embedded):
    plain = embedded(KEY, alpha=0.0, dropout=0.5)
    noisy = embedded(KEY, dropout=0.5)
    np.testing.assert_array_equal(plain == 0, noisy == 0)
    assert 0.4 < np.mean(noisy == 0) < 0.6
    # The noise is dropped and scaled with what it was added to.
    assert np.max(np.abs(noisy - plain)) > 0.9 * 2 * BOUND


def test_noise_has_the_compute_dtype(small_model):
    config = small_model(num_hidden_layers=1, compute_dtype="bfloat16").config
    params = small_model(num_hidden_layers=1).params
    out = jax.eval_shape(compiled(config, ALPHA), params, KEY)
    assert out.dtype == jnp.bfloat16
