from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relax.model.llama import make_llama
from relax.model.parameters import (
    flat_parameters,
    parameter_count,
    parameter_shapes,
    resize_vocabulary,
    stack_layers,
    training_flops_per_token,
    unstack_layers,
)

GOLDEN = Path(__file__).with_name("golden_parameters.txt")
EVERY_OPTION = {
    "qkv_bias": True,
    "attention_out_bias": True,
    "mlp_bias": True,
    "qk_norm": True,
}


@pytest.fixture(scope="module")
def config(make_config):
    return make_config(**EVERY_OPTION)


@pytest.fixture(scope="module")
def initialised(make_config):
    config = make_config(num_hidden_layers=5, hidden_size=52, initializer_range=0.03)
    tokens = jnp.zeros((1, 2), jnp.int32)
    return config, jax.jit(make_llama(config).init)(jax.random.key(0), tokens)


def test_paths_shapes_and_dtypes_are_the_golden_ones(config):
    lines = [
        f"{path} {list(leaf.shape)} {leaf.dtype}"
        for path, leaf in flat_parameters(parameter_shapes(config))
    ]
    assert lines == GOLDEN.read_text().splitlines()


def test_options_remove_what_they_name(config, make_config):
    every = {path for path, _ in flat_parameters(parameter_shapes(config))}
    plain_config = make_config(tie_word_embeddings=True)
    plain = {path for path, _ in flat_parameters(parameter_shapes(plain_config))}
    assert plain < every
    removed = {path for path in every - plain if not path.endswith("/bias")}
    assert removed == {
        "llama/lm_head/weight",
        "llama/layers/block/self_attn/q_norm/weight",
        "llama/layers/block/self_attn/k_norm/weight",
    }
    assert sum(path.endswith("/bias") for path in every - plain) == 7


def test_scanned_and_unrolled_shapes_convert_into_each_other(small_model):
    scanned = small_model(**EVERY_OPTION)
    unrolled_shapes = parameter_shapes(replace(scanned.config, scan_layers=False))
    unrolled = unstack_layers(scanned.params)
    assert shapes(unrolled) == shapes(unrolled_shapes)
    assert shapes(stack_layers(unrolled)) == shapes(parameter_shapes(scanned.config))


def shapes(params):
    return {path: (leaf.shape, leaf.dtype) for path, leaf in flat_parameters(params)}


def test_the_round_trip_is_lossless(small_model):
    # Twelve layers, so that the order of numbers and that of their names differ.
    params = small_model(num_hidden_layers=12, qkv_bias=True).params
    unrolled = unstack_layers(params)
    query = "self_attn/q_proj"
    np.testing.assert_array_equal(
        unrolled[f"llama/layers_10/block/{query}"]["weight"],
        params[f"llama/layers/block/{query}"]["weight"][10],
    )
    back = stack_layers(unrolled)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    for (path, ours), (_, theirs) in zip(
        flat_parameters(back), flat_parameters(params), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs, err_msg=path)


def test_parameter_count_by_hand(config, make_config):
    # D = 28, F = 44, V = 67, N = 6, K = 2, H = 10, L = 3.
    attention = 28 * 60 + 2 * 28 * 20 + 60 * 28
    layer = attention + 3 * 28 * 44 + 2 * 28
    plain = 3 * layer + 67 * 28 + 28
    biases = 60 + 2 * 20 + 28 + 2 * 44 + 28
    assert parameter_count(make_config(tie_word_embeddings=True)) == plain
    assert parameter_count(make_config()) == plain + 67 * 28
    assert parameter_count(config) == plain + 67 * 28 + 3 * (biases + 2 * 10)


@pytest.mark.parametrize("tied", [False, True])
def test_training_flops_by_hand(make_config, tied):
    config = make_config(tie_word_embeddings=tied)
    matrices = 3 * (28 * 60 + 2 * 28 * 20 + 60 * 28 + 3 * 28 * 44) + 67 * 28
    norms = 3 * 2 * 28 + 28
    attention = 12 * 3 * 6 * 10 * 31
    expected = 6 * (matrices + norms) + attention
    assert training_flops_per_token(config, context=31) == expected


def test_initial_scales(initialised):
    config, params = initialised
    wide = {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
    residual = {"o_proj", "down_proj"}
    for path, leaf in flat_parameters(params):
        name = path.split("/")[-2]
        if name in wide or name in ("embed_tokens", "lm_head"):
            expected = 0.03
        elif name in residual:
            expected = 0.03 / np.sqrt(2 * config.num_hidden_layers)
        else:
            np.testing.assert_array_equal(leaf, 1.0, err_msg=path)
            continue
        # Five standard errors of a standard deviation.
        error = 5 * expected / np.sqrt(2 * leaf.size)
        assert abs(float(jnp.std(leaf)) - expected) < error, path


def test_initial_layers_differ(initialised):
    _, params = initialised
    for path, leaf in flat_parameters(params):
        if path.startswith("llama/layers/") and not path.endswith("norm/weight"):
            assert len(np.unique(np.asarray(leaf)[:, 0, 0])) > 1, path
            assert (
                np.abs(np.corrcoef(np.reshape(leaf, (5, -1))) - np.eye(5)).max() < 0.2
            )


def test_unrolled_initialisation_has_zero_biases(make_config):
    config = make_config(**EVERY_OPTION, scan_layers=False, num_hidden_layers=2)
    tokens = jnp.zeros((1, 2), jnp.int32)
    params = jax.jit(make_llama(config).init)(jax.random.key(0), tokens)
    assert shapes(params) == shapes(parameter_shapes(config))
    biases = [x for path, x in flat_parameters(params) if path.endswith("/bias")]
    assert len(biases) == 2 * 7
    assert not any(np.any(bias) for bias in biases)


@pytest.fixture(scope="module")
def tables(make_config):
    """A configuration of 67 tokens, and tables of 128 rows that are no padding yet."""
    config = make_config(num_hidden_layers=2)
    rng = np.random.default_rng(3)
    params = {
        f"llama/{name}": {
            "weight": jnp.asarray(rng.normal(size=(128, 28)), jnp.float32)
        }
        for name in ("embed_tokens", "lm_head", "norm")
    }
    return config, params


def resized(tables, new_ids, rows, seed=0):
    return resize_vocabulary(*tables, new_ids, rows, jax.random.key(seed))


@pytest.mark.parametrize(("end", "height"), [(70, 128), (128, 128), (131, 192)])
def test_new_rows_are_the_mean_of_the_known_ones(tables, end, height):
    config, params = resized(tables, range(67, end), "mean")
    assert config == replace(tables[0], vocab_size=end)
    assert config.padded_vocab_size == height
    for name in ("llama/embed_tokens", "llama/lm_head"):
        old, new = (np.asarray(p[name]["weight"]) for p in (tables[1], params))
        assert new.shape == (height, 28)
        np.testing.assert_array_equal(new[:67], old[:67])
        mean = old[:67].sum(axis=0, dtype=np.float64) / 67
        np.testing.assert_allclose(new[67:end], np.tile(mean, (end - 67, 1)), 0, 1e-6)
    assert params["llama/norm"] is tables[1]["llama/norm"]


def test_rows_within_the_vocabulary_are_set_and_those_after_them_kept(tables):
    """Where a released table has more rows than its tokenizer ids."""
    config, params = resized(tables, range(60, 62), "mean")
    assert config == tables[0]
    old, new = (np.asarray(p["llama/lm_head"]["weight"]) for p in (tables[1], params))
    np.testing.assert_array_equal(
        np.delete(new, [60, 61], 0)[:126], np.delete(old, [60, 61], 0)
    )
    np.testing.assert_allclose(new[61], old[:60].mean(axis=0), 0, 1e-6)


def test_the_mean_of_narrow_rows_is_taken_in_float32(make_config):
    """Of 1 and 67 - 1 times 256, which bfloat16 sums would lose."""
    config = make_config(param_dtype="bfloat16", tie_word_embeddings=True)
    table = jnp.full((128, 28), 256.0, jnp.bfloat16).at[:40].set(1.0)
    given = {"llama/embed_tokens": {"weight": table}}
    _, params = resized((config, given), range(67, 68), "mean")
    new = params["llama/embed_tokens"]["weight"]
    assert new.dtype == jnp.bfloat16
    exact = (40 * 1 + 27 * 256) / 67
    assert np.all(np.asarray(new[67], np.float32) == np.float32(jnp.bfloat16(exact)))


def test_new_rows_may_be_zeros_or_normal(tables):
    _, zeros = resized(tables, range(67, 73), "zeros")
    assert not np.any(zeros["llama/lm_head"]["weight"][67:73])
    config, normal = resized(tables, range(67, 1067), "normal")
    rows = {
        name: np.asarray(normal[f"llama/{name}"]["weight"][67:1067])
        for name in ("embed_tokens", "lm_head")
    }
    for values in rows.values():
        assert abs(values.std() - config.initializer_range) < 5e-4
        assert abs(values.mean()) < 5e-4
    correlation = np.corrcoef(rows["embed_tokens"].ravel(), rows["lm_head"].ravel())
    assert abs(correlation[0, 1]) < 0.05
    _, again = resized(tables, range(67, 1067), "normal")
    _, other = resized(tables, range(67, 1067), "normal", seed=1)
    same, differ = (
        np.array_equal(p["llama/lm_head"]["weight"][67:1067], rows["lm_head"])
        for p in (again, other)
    )
    assert same and not differ


def test_other_rows_are_unknown(tables):
    with pytest.raises(ValueError, match="rows='ones' is unknown; choose one of"):
        resized(tables, range(67, 68), "ones")
