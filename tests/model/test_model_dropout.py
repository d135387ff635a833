from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import relax.model.block
import relax.model.llama
from relax.model.llama import make_llama
from relax.model.parameters import unstack_layers
from relax.ops.dropout import dropout

TOKENS = np.random.default_rng(0).integers(0, 67, (2, 7))


@pytest.fixture
def model(small_model):
    return small_model(dropout=0.25)


def test_without_a_key_dropout_is_off(model, small_model):
    expected = small_model(dropout=0.0).logits(TOKENS)
    np.testing.assert_array_equal(model.logits(TOKENS), expected)


def test_a_key_turns_dropout_on_and_repeats_it(model):
    off = model.logits(TOKENS)
    first, again, other = (
        model.logits(TOKENS, dropout_key=jax.random.key(i)) for i in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert float(jnp.max(jnp.abs(first - off))) > 0.1
    assert float(jnp.max(jnp.abs(first - other))) > 0.1


def test_a_key_does_nothing_at_rate_zero(small_model):
    model = small_model(dropout=0.0)
    with_key = model.logits(TOKENS, dropout_key=jax.random.key(1))
    np.testing.assert_array_equal(with_key, model.logits(TOKENS))


def test_scanned_and_unrolled_layers_drop_the_same(model, small_model):
    unrolled = small_model(dropout=0.25, scan_layers=False)
    key = jax.random.key(3)
    expected = model.logits(TOKENS, dropout_key=key)
    params = unstack_layers(model.params)
    actual = unrolled.logits_of(params, TOKENS, dropout_key=key)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


def test_rematerialised_layers_drop_the_same_again(small_model):
    """The backward pass recomputes the activations with the masks of the forward."""
    key = jax.random.key(6)
    gradients = []
    for remat in ("none", "full"):
        model = small_model(dropout=0.25, remat=remat)

        def total(table, model=model):
            params = {**model.params, "llama/embed_tokens": {"weight": table}}
            return jnp.sum(model.logits_of(params, TOKENS, dropout_key=key) ** 2)

        table = model.params["llama/embed_tokens"]["weight"]
        gradients.append(jax.grad(total)(table))
    scale = float(jnp.max(jnp.abs(gradients[0])))
    np.testing.assert_allclose(*gradients, rtol=0, atol=3e-6 * scale)


def test_every_place_of_every_layer_has_its_own_mask(model, monkeypatch):
    """Embeddings, attention and feed-forward: 1 + 2L masks, no two alike."""
    recorded = []

    def recording(x, rate, key):
        recorded.append(dropout(jnp.ones_like(x), rate, key))
        return dropout(x, rate, key)

    monkeypatch.setattr(relax.model.llama, "dropout", recording)
    monkeypatch.setattr(relax.model.block, "dropout", recording)
    unrolled = make_llama(replace(model.config, scan_layers=False))

    @jax.jit
    def masks_of(params, key):
        unrolled.apply(params, TOKENS, dropout_key=key)
        return recorded

    masks = masks_of(unstack_layers(model.params), jax.random.key(4))
    assert len(masks) == 1 + 2 * 3
    assert len({np.asarray(mask).tobytes() for mask in masks}) == len(masks)
    for mask in masks:
        # A quarter of 2 x 7 x 28 entries, within five standard deviations.
        assert abs(np.mean(np.asarray(mask) == 0.0) - 0.25) < 0.11
