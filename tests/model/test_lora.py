"""Adapters beside the matrices, apart from them, and added to them."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relax.model.cache import empty_cache
from relax.model.layers import adapter_for
from relax.model.llama import make_llama
from relax.model.lora import base_of, join, merge, split_trainable, with_lora
from relax.model.parameters import (
    flat_parameters,
    parameter_count,
    parameter_shapes,
    stack_layers,
    training_flops_per_token,
    unstack_layers,
)
from relax.ops.logprobs import compute_logits
from relax.optim import is_matrix

TOKENS = np.random.default_rng(0).integers(0, 67, (2, 7))
KEY = jax.random.key(5)
# 5 is none of the sizes; the scale is 8 / 5.
LORA = {"lora_rank": 5, "lora_alpha": 8.0, "lora_dropout": 0.25}
OPTIONS = {"qkv_bias": True, "attention_out_bias": True, "mlp_bias": True}
ALL = {
    *("self_attn/q_proj", "self_attn/k_proj", "self_attn/v_proj", "self_attn/o_proj"),
    *("mlp/gate_proj", "mlp/up_proj", "mlp/down_proj"),
}


@pytest.fixture(scope="module")
def adapted(small_model):
    """A model whose adapters, of every projection, hold random numbers."""
    return small_model(**OPTIONS, **LORA)


@pytest.fixture(scope="module")
def base(small_model):
    return small_model(**OPTIONS)


@pytest.fixture(scope="module")
def one_layer(small_model):
    """What is differentiated: compiling a backward pass takes long."""
    return small_model(num_hidden_layers=1, scan_layers=False, **LORA)


@pytest.fixture(scope="module")
def dropped(adapted):
    """The logits with a dropout key."""
    return adapted.logits(TOKENS, dropout_key=KEY)


def assert_close(actual, expected):
    scale = float(jnp.max(jnp.abs(expected)))
    np.testing.assert_allclose(actual, expected, 0, 1e-5 * scale)


def test_shapes_are_those_of_the_two_factors(make_config):
    shapes = dict(flat_parameters(parameter_shapes(make_config(**LORA))))
    found = {
        path.removeprefix("llama/layers/block/"): leaf.shape
        for path, leaf in shapes.items()
        if "/lora_" in path
    }
    assert found == {
        "self_attn/q_proj/lora_a": (3, 28, 5),
        "self_attn/q_proj/lora_b": (3, 5, 6, 10),
        "self_attn/k_proj/lora_a": (3, 28, 5),
        "self_attn/k_proj/lora_b": (3, 5, 2, 10),
        "self_attn/v_proj/lora_a": (3, 28, 5),
        "self_attn/v_proj/lora_b": (3, 5, 2, 10),
        "self_attn/o_proj/lora_a": (3, 6, 10, 5),
        "self_attn/o_proj/lora_b": (3, 5, 28),
        "mlp/gate_proj/lora_a": (3, 28, 5),
        "mlp/gate_proj/lora_b": (3, 5, 44),
        "mlp/up_proj/lora_a": (3, 28, 5),
        "mlp/up_proj/lora_b": (3, 5, 44),
        "mlp/down_proj/lora_a": (3, 44, 5),
        "mlp/down_proj/lora_b": (3, 5, 28),
    }


def test_merged_matrices_are_the_sum_by_hand(adapted):
    config, params = merge(adapted.config, adapted.params)
    assert config == replace(adapted.config, lora_rank=0)
    for module, matrix in (
        ("llama/layers/block/self_attn/q_proj", "ldr,lrnh->ldnh"),
        ("llama/layers/block/self_attn/o_proj", "lnhr,lrd->lnhd"),
        ("llama/layers/block/mlp/down_proj", "lfr,lrd->lfd"),
    ):
        leaves = {n: np.float64(leaf) for n, leaf in adapted.params[module].items()}
        product = np.einsum(matrix, leaves["lora_a"], leaves["lora_b"])
        expected = leaves["weight"] + 1.6 * product
        np.testing.assert_allclose(params[module]["weight"], expected, 0, 1e-6)
        assert set(params[module]) == {"weight", "bias"}


def test_merged_logits_are_those_beside_the_matrices(adapted, base):
    _, params = merge(adapted.config, adapted.params)
    expected = adapted.logits(TOKENS)
    assert float(jnp.max(jnp.abs(expected - base.logits(TOKENS)))) > 1.0
    assert_close(base.logits_of(params, TOKENS), expected)


def test_unrolled_parameters_merge_to_the_same(adapted):
    config = replace(adapted.config, scan_layers=False)
    _, unrolled = merge(config, unstack_layers(adapted.params))
    _, expected = merge(adapted.config, adapted.params)
    again = dict(flat_parameters(stack_layers(unrolled)))
    for path, leaf in flat_parameters(expected):
        np.testing.assert_allclose(again[path], leaf, 0, 1e-6, err_msg=path)


def test_narrow_matrices_are_summed_in_float32(make_config):
    """1 + 2^-8 + 2^-17 is nearest to 1 + 2^-7; in bfloat16 the last term is lost."""
    config = make_config(lora_rank=2, lora_alpha=2.0, param_dtype="bfloat16")
    leaves = {
        "weight": jnp.ones((1, 1), jnp.bfloat16),
        "lora_a": jnp.asarray([[2.0**-8, 2.0**-17]], jnp.bfloat16),
        "lora_b": jnp.ones((2, 1), jnp.bfloat16),
    }
    _, merged = merge(config, {"llama/layers_0/x": leaves})
    weight = merged["llama/layers_0/x"]["weight"]
    assert weight.dtype == jnp.bfloat16 and weight.item() == 1.0 + 2.0**-7


def test_new_adapters_change_no_bit(base, adapted):
    params = with_lora(adapted.config, base.params, jax.random.key(1))
    np.testing.assert_array_equal(
        adapted.logits_of(params, TOKENS), base.logits(TOKENS)
    )
    for module in ("self_attn/q_proj", "self_attn/o_proj", "mlp/down_proj"):
        leaves = params[f"llama/layers/block/{module}"]
        inputs = {"self_attn/q_proj": 28, "self_attn/o_proj": 60, "mlp/down_proj": 44}
        bound = inputs[module] ** -0.5
        largest = float(jnp.max(jnp.abs(leaves["lora_a"])))
        assert 0.97 * bound < largest <= bound, module
        assert not leaves["lora_b"].any()
        assert not np.array_equal(*leaves["lora_a"][:2])


def test_adapters_that_are_there_stay(adapted):
    again = with_lora(adapted.config, adapted.params, jax.random.key(1))
    for (path, leaf), (other, expected) in zip(
        flat_parameters(again), flat_parameters(adapted.params), strict=True
    ):
        assert path == other and leaf is expected


def test_adapters_alone_are_trained(one_layer):
    trainable, frozen = split_trainable(one_layer.params)
    assert {m.removeprefix("llama/layers_0/block/") for m in trainable} == ALL
    assert {n for leaves in trainable.values() for n in leaves} == {"lora_a", "lora_b"}
    assert not any(n.startswith("lora") for leaves in frozen.values() for n in leaves)
    assert jax.tree.structure(join(trainable, frozen)) == jax.tree.structure(
        one_layer.params
    )
    gradients = gradients_of(one_layer.config)(trainable, frozen)
    assert jax.tree.structure(gradients) == jax.tree.structure(trainable)
    assert all(jnp.max(jnp.abs(leaf)) > 0 for leaf in jax.tree.leaves(gradients))


def test_without_adapters_everything_is_trained(base, adapted):
    assert split_trainable(base.params) == (base.params, {})
    config, params = base_of(adapted.config, adapted.params)
    assert config == replace(adapted.config, lora_rank=0)
    assert jax.tree.structure(params) == jax.tree.structure(base.params)
    assert merge(base.config, base.params) == (base.config, base.params)


@functools.cache
def gradients_of(config):
    apply = make_llama(config).apply
    weights = np.random.default_rng(1).normal(size=(2, 7, 28))

    def loss(trainable, frozen):
        out = apply(join(trainable, frozen), TOKENS, dropout_key=KEY)
        return jnp.sum(weights * out.hidden)

    return jax.jit(jax.grad(loss))


def test_unrolled_layers_drop_the_same(adapted, dropped, small_model):
    unrolled = small_model(**OPTIONS, **LORA, scan_layers=False)
    params = unstack_layers(adapted.params)
    assert_close(unrolled.logits_of(params, TOKENS, dropout_key=KEY), dropped)


def test_rematerialised_layers_drop_the_same_again(one_layer):
    """The backward pass recomputes the masks of the forward."""
    parts = split_trainable(one_layer.params)
    expected = gradients_of(one_layer.config)(*parts)
    actual = gradients_of(replace(one_layer.config, remat="full"))(*parts)
    for (path, ours), (_, theirs) in zip(
        flat_parameters(actual), flat_parameters(expected), strict=True
    ):
        scale = float(jnp.max(jnp.abs(theirs)))
        np.testing.assert_allclose(ours, theirs, 0, 1e-5 * scale, err_msg=path)


def test_adapters_drop_with_a_key_alone(adapted, dropped, small_model):
    undropped = small_model(**OPTIONS, **LORA | {"lora_dropout": 0.0})
    without = adapted.logits(TOKENS)
    np.testing.assert_array_equal(without, undropped.logits(TOKENS))
    assert float(jnp.max(jnp.abs(dropped - without))) > 0.1
    np.testing.assert_array_equal(dropped, adapted.logits(TOKENS, dropout_key=KEY))


def test_adapters_leave_the_keys_of_the_residual_stream_alone(small_model):
    plain = small_model(num_hidden_layers=1, dropout=0.25)
    both = small_model(num_hidden_layers=1, dropout=0.25, **LORA)
    params = with_lora(both.config, plain.params, jax.random.key(1))
    np.testing.assert_array_equal(
        both.logits_of(params, TOKENS, dropout_key=KEY),
        plain.logits(TOKENS, dropout_key=KEY),
    )


def test_every_projection_has_a_key_of_its_own(adapted):
    config = adapted.config
    adapters = [adapter_for(config, name) for name in config.lora_targets]
    assert [each.number for each in adapters] == [2, 3, 4, 5, 6, 7, 8]
    few = replace(config, lora_targets=["v_proj", "q_proj"])  # as YAML gives them
    assert few.lora_targets == ("v_proj", "q_proj")
    assert adapter_for(few, "k_proj") is None
    assert adapter_for(few, "v_proj") == adapters[2]


def test_a_cache_gives_what_the_whole_row_gives(adapted):
    expected = adapted.logits(TOKENS)
    first = adapted.forward(
        adapted.params, TOKENS[:, :4], cache=empty_cache(adapted.config, 2, 7)
    )
    then = adapted.forward(adapted.params, TOKENS[:, 4:], cache=first.cache)
    hidden = jnp.concatenate([first.hidden, then.hidden], axis=1)
    logits = compute_logits(hidden, then.unembedding, 67)[..., :67]
    assert_close(logits, expected)


def test_both_factors_are_matrices(make_config):
    matrices = dict(flat_parameters(is_matrix(parameter_shapes(make_config(**LORA)))))
    told = {path.rsplit("/", 1)[1] for path, is_one in matrices.items() if is_one}
    assert told == {"weight", "lora_a", "lora_b"}


def test_frozen_matrices_cost_no_gradient(make_config):
    config = make_config(**LORA, lora_targets=("q_proj",))
    factors = 3 * (28 * 5 + 5 * 60)
    base = parameter_count(replace(config, lora_rank=0))
    assert parameter_count(config) == base + factors
    products = 6 * factors + 4 * (base - 67 * 28)
    attention = 12 * 3 * 60 * 11
    assert training_flops_per_token(config, 11) == products + attention


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lora_targets": ("q_proj", "qproj")}, r"lora_targets names 'qproj'.*q_proj,"),
        ({"lora_targets": ()}, r"lora_targets=\[\] must name at least one"),
        ({"lora_targets": ("q_proj",) * 2}, r"none twice"),
        ({"lora_rank": -1}, r"model.lora_rank=-1 must be at least 0"),
        ({"lora_alpha": 0.0}, r"model.lora_alpha=0.0 must be above 0"),
        ({"lora_dropout": 1.0}, r"model.lora_dropout=1.0 must lie in \[0, 1\)"),
    ],
)
def test_wrong_values_are_named(make_config, fields, message):
    with pytest.raises(ValueError, match=message):
        make_config(**{"lora_rank": 5, **fields})


def test_adapters_are_float32_beside_a_base_that_is_not(make_config):
    shapes = parameter_shapes(make_config(param_dtype="bfloat16", **LORA))
    found = {
        (path.split("/")[-1], leaf.dtype.name) for path, leaf in flat_parameters(shapes)
    }
    assert found == {
        *(("weight", "bfloat16"), ("lora_a", "float32"), ("lora_b", "float32"))
    }
