"""What a forward pass gives of its inside, and that this changes nothing."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relax.model.llama import make_llama
from relax.model.parameters import unstack_layers

B, T = 2, 13
TOKENS = np.random.default_rng(0).integers(0, 67, (B, T))
SITES = ("resid_pre", "attn.pattern", "resid_post")
L, D, N = 3, 28, 6
LAYOUTS = {
    "scanned": {},
    "unrolled": {"scan_layers": False},
    "rematerialised": {"remat": "full"},
    "unrolled, rematerialised": {"scan_layers": False, "remat": "dots"},
}


def run(model, params, sites=SITES, **inputs):
    apply = jax.jit(partial(make_llama(model.config).apply, capture=sites))
    return apply(params, TOKENS, **inputs)


@pytest.fixture(scope="module")
def scanned(small_model):
    model = small_model()
    return model, run(model, model.params)


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request, small_model, scanned):
    """A layout of the layers, and what it captures with the same parameters."""
    model = small_model(**LAYOUTS[request.param])
    params = scanned[0].params
    if not model.config.scan_layers:
        params = unstack_layers(params)
    return model, params, run(model, params)


def test_each_site_has_its_shape(layout):
    _, _, out = layout
    assert {site: value.shape for site, value in out.captured.items()} == {
        "resid_pre": (L, B, T, D),
        "resid_post": (L, B, T, D),
        "attn.pattern": (L, B, N, T, T),
    }
    assert out.hidden.shape == (B, T, D)


def test_every_layout_captures_the_same(layout, scanned):
    _, expected = scanned
    for site in SITES:
        found = np.asarray(layout[2].captured[site])
        np.testing.assert_allclose(found, expected.captured[site], 0, 1e-5)
        swapped = found[[1, 0, 2]]
        assert np.abs(swapped - np.asarray(expected.captured[site])).max() > 0.1


def test_capturing_changes_no_other_output(layout):
    model, params, out = layout
    plain = run(model, params, ())
    assert plain.captured == {}
    assert np.asarray(plain.hidden).tobytes() == np.asarray(out.hidden).tobytes()


def test_sites_asked_for_alone_come_alone(scanned):
    model, expected = scanned
    for site in SITES:
        captured = run(model, model.params, (site,)).captured
        assert list(captured) == [site]
        np.testing.assert_allclose(captured[site], expected.captured[site], 0, 1e-6)


def test_a_layer_starts_where_the_one_before_ended(scanned):
    model, out = scanned
    pre, post = out.captured["resid_pre"], out.captured["resid_post"]
    np.testing.assert_array_equal(pre[1:], post[:-1])
    table = model.params["llama/embed_tokens"]["weight"]
    np.testing.assert_array_equal(pre[0], np.asarray(table)[TOKENS])
    last = np.asarray(post[-1], np.float64)
    scale = np.sqrt(np.mean(last**2, axis=-1, keepdims=True) + 1e-5)
    weight = np.asarray(model.params["llama/norm"]["weight"])
    np.testing.assert_allclose(out.hidden, last / scale * weight, 0, 1e-4)


def test_a_swapped_layer_is_seen(scanned, small_model):
    _, expected = scanned
    model = small_model(scan_layers=False)
    params = unstack_layers(scanned[0].params)
    other = {
        path.translate(str.maketrans("01", "10")) if "layers_" in path else path: leaves
        for path, leaves in params.items()
    }
    found = run(model, other).captured
    assert np.array_equal(found["resid_pre"][0], expected.captured["resid_pre"][0])
    for site in ("attn.pattern", "resid_post"):
        assert np.abs(found[site][0] - expected.captured[site][0]).max() > 0.05


def test_patterns_are_causal_distributions(layout):
    patterns = np.asarray(layout[2].captured["attn.pattern"])
    assert patterns.dtype == np.float32
    np.testing.assert_allclose(patterns.sum(axis=-1), 1.0, 0, 1e-6)
    seen = np.tri(T, dtype=bool)
    assert not patterns[..., ~seen].any()
    assert (patterns[..., seen] > 0).all()


@pytest.mark.parametrize("scan_layers", [True, False])
def test_patterns_are_windowed_in_the_layers_that_have_a_window(
    small_model, scan_layers
):
    """Four tokens are seen, itself among them, but for the first layer."""
    model = small_model(sliding_window=4, max_window_layers=1, scan_layers=scan_layers)
    patterns = np.asarray(run(model, model.params).captured["attn.pattern"])
    causal = np.tri(T, dtype=bool)
    near = causal & ~np.tri(T, k=-4, dtype=bool)
    assert (patterns[0][..., causal] > 0).all()
    assert (patterns[1:][..., near] > 0).all()
    assert not patterns[1:][..., ~near].any()
    np.testing.assert_allclose(patterns.sum(axis=-1), 1.0, 0, 1e-6)


def test_patterns_leave_out_padding_and_what_a_mask_hides(small_model):
    model = small_model()
    valid = np.ones((B, T), bool)
    valid[0, :3] = False
    mask = np.ones((B, 1, T, T), bool)
    mask[1, :, 5, 2] = False
    out = run(model, model.params, key_valid=valid, mask=mask)
    patterns = np.asarray(out.captured["attn.pattern"])
    assert not patterns[:, 0, :, 3:, :3].any()
    assert not patterns[:, 1, :, 5, 2].any()
    assert (patterns[:, 1, :, 5, [0, 1, 3, 4, 5]] > 0).all()
    np.testing.assert_allclose(patterns[:, 0, :, 3:].sum(axis=-1), 1.0, 0, 1e-6)


def test_a_pattern_is_the_softmax_of_the_scaled_scores(small_model):
    """The first layer's, from its inputs in float64 by hand; one key/value head."""
    model = small_model(num_key_value_heads=1, rope_theta=1e4)
    out = run(model, model.params, ("resid_pre", "attn.pattern"))
    block = "llama/layers/block"
    first = {
        name: np.asarray(model.params[f"{block}/{name}"]["weight"][0], np.float64)
        for name in ("input_layernorm", "self_attn/q_proj", "self_attn/k_proj")
    }
    x = np.asarray(out.captured["resid_pre"][0], np.float64)
    x = x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-5) * first["input_layernorm"]
    turn = np.exp(1j * np.arange(T)[:, None] * 1e4 ** (-np.arange(5) / 5))
    q, k = (
        np.einsum("btd,dnh->bnth", x, first[f"self_attn/{name}_proj"]) for name in "qk"
    )
    q, k = ((y[..., :5] + 1j * y[..., 5:]) * turn for y in (q, k))
    scores = np.einsum("bnti,bki->bntk", q, k[:, 0].conj()).real / np.sqrt(10)
    weights = np.exp(np.where(np.tri(T, dtype=bool), scores, -np.inf))
    weights /= weights.sum(axis=-1, keepdims=True)
    found = np.asarray(out.captured["attn.pattern"])
    np.testing.assert_allclose(found[0], weights, 0, 1e-5)
    assert np.abs(found[1] - weights).max() > 0.05


def test_an_unknown_site_names_the_known_ones(small_model):
    model = small_model()
    message = "site 'mlp.out' is unknown; known: resid_pre, attn.pattern, resid_post"
    with pytest.raises(ValueError, match=message):
        make_llama(model.config).apply(
            model.params, jnp.asarray(TOKENS), capture=("resid_pre", "mlp.out")
        )
