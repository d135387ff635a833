"""What each position depends on, seen in the gradient of its logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import relax.ops.attention
from relax.model.llama import make_llama
from relax.ops.logprobs import compute_logits

T, L = 11, 3
TOKENS = np.random.default_rng(0).permutation(67)[None, :T]
CAUSAL = np.tri(T, dtype=bool)
TABLE = "llama/embed_tokens"
OUT = "llama/layers/block/self_attn/o_proj"


def influence(config, params, **inputs):
    """Returns `[T, T]`: whether the logits at t depend on the embedding at s.

    No token occurs twice and the tables are untied, so that the gradient of a row of
    the table is that of one position's embedding.
    """
    by_row = jacobian(config)(params[TABLE]["weight"], params, inputs)
    return np.any(np.asarray(by_row)[:, TOKENS[0]] != 0.0, axis=-1)


@functools.cache
def jacobian(config):
    """Returns the compiled d(weighted logits `[T]`) of the embedding table."""
    apply = make_llama(config).apply
    weights = np.random.default_rng(1).normal(size=67)

    def weighted_logits(table, params, inputs):
        out = apply({**params, TABLE: {"weight": table}}, TOKENS, **inputs)
        logits = compute_logits(out.hidden, out.unembedding, 67)
        return logits[0, :, :67] @ weights

    return jax.jit(jax.jacrev(weighted_logits))


def reach(*layers):
    """Returns what positions depend on after layers that see the given keys."""
    steps = [np.eye(T, dtype=int) | layer for layer in layers]
    return functools.reduce(np.matmul, reversed(steps)) > 0


def within(window):
    return CAUSAL & ~np.tri(T, k=-window, dtype=bool)


@pytest.mark.parametrize("attention", ["xla", "blocked"])
def test_a_position_depends_on_all_before_it_and_on_none_after(small_model, attention):
    model = small_model(attention=attention)
    np.testing.assert_array_equal(influence(model.config, model.params), CAUSAL)


@pytest.mark.parametrize("defect", ["transposed", "one ahead", "no mask"])
def test_the_check_catches_a_wrong_mask(small_model, monkeypatch, defect):
    right = relax.ops.attention.dense_mask

    def wrong(mask, queries, keys):
        if defect == "one ahead":
            queries = range(queries.start + 1, queries.stop + 1)
        visible = right(mask, queries, keys)
        if defect == "transposed":
            return visible.swapaxes(-1, -2)
        return jnp.ones_like(visible) if defect == "no mask" else visible

    model = small_model(attention="xla")
    monkeypatch.setattr(relax.ops.attention, "dense_mask", wrong)
    jacobian.cache_clear()
    seen = influence(model.config, model.params)
    jacobian.cache_clear()
    with pytest.raises(AssertionError):
        np.testing.assert_array_equal(seen, CAUSAL)


def influence_under(small_model, **restrictions):
    """Returns the influence with the given restrictions and others that allow all."""
    inputs = {
        "segment_ids": np.zeros((1, T), int),
        "key_valid": np.ones((1, T), bool),
        "mask": np.ones((1, 1, T, T), bool),
        **restrictions,
    }
    model = small_model()
    return influence(model.config, model.params, **jax.tree.map(jnp.asarray, inputs))


def test_documents_see_themselves_alone(small_model):
    segments = np.array([0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2])
    seen = influence_under(small_model, segment_ids=segments[None])
    same = segments[:, None] == segments[None]
    np.testing.assert_array_equal(seen, CAUSAL & same)


def test_an_invalid_key_is_seen_by_none_but_itself(small_model):
    valid = np.ones(T, bool)
    valid[[0, 5]] = False
    seen = influence_under(small_model, key_valid=valid[None])
    np.testing.assert_array_equal(seen, (CAUSAL & valid) | np.eye(T, dtype=bool))


def test_a_mask_of_the_callers_own_is_combined_with_causality(small_model):
    mask = np.random.default_rng(2).random((T, T)) < 0.25
    seen = influence_under(small_model, mask=mask[None, None])
    np.testing.assert_array_equal(seen, reach(*[CAUSAL & mask] * L))
    assert not np.array_equal(seen, CAUSAL)


def test_windows_add_up_over_layers(small_model):
    model = small_model(sliding_window=3)
    seen = influence(model.config, model.params)
    np.testing.assert_array_equal(seen, within(7))  # 3 layers x 2 back
    np.testing.assert_array_equal(seen, reach(*[within(3)] * L))


@pytest.mark.parametrize("scan_layers", [True, False])
@pytest.mark.parametrize("live", range(L))
def test_only_layers_from_max_window_layers_on_have_a_window(
    small_model, live, scan_layers
):
    """With the attention of the other layers silenced, one layer's reach is left."""
    model = small_model(sliding_window=3, max_window_layers=1, scan_layers=scan_layers)
    silenced = {}
    for path, leaves in model.params.items():
        keep = 1.0
        if path == OUT:
            keep = (np.arange(L) == live)[:, None, None, None]
        elif path.endswith("o_proj"):
            keep = float(f"layers_{live}/" in path)
        silenced[path] = jax.tree.map(lambda x, keep=keep: x * keep, leaves)
    seen = influence(model.config, silenced)
    np.testing.assert_array_equal(seen, CAUSAL if live < 1 else within(3))
