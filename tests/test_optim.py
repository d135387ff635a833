"""Schedules by hand numbers; which parameters are matrices, in either layout."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers

from relax import optim
from relax.model.parameters import (
    flat_parameters,
    parameter_shapes,
    stack_layers,
    unstack_layers,
)
from relax.optim import (
    OptimizerConfig,
    is_matrix,
    make_optimizer,
    make_schedule,
    muon_dimensions,
)

CONFIG = OptimizerConfig(
    kind="adamw",
    learning_rate=1.0,
    adam_learning_rate=0.25,
    b1=0.5,
    b2=0.75,
    eps=1e-8,
    momentum=0.9,
    weight_decay=0.0,
    clip_norm=None,
    schedule="constant",
    warmup_steps=0,
    decay_fraction=0.5,
    final_fraction=0.2,
)
KINDS = ("adamw", "muon", "lion")

# Of 14 steps: 4 of warm-up and 10 after; the last 7 are half of all (wsd).
WARMUP = {0: 0.25, 1: 0.5, 2: 0.75, 3: 1.0, 4: 1.0}
SCHEDULES = {
    "constant": {9: 1.0, 13: 1.0},
    # 0.2 + 0.4 (1 + cos(0.5 pi)) and 0.2 + 0.4 (1 + cos(0.9 pi))
    "cosine": {9: 0.6, 13: 0.2195774},
    "linear": {5: 0.92, 9: 0.6, 13: 0.28},
    "wsd": {7: 1.0, 8: 0.8857143, 9: 0.7714286, 13: 0.3142857},
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_has_these_rates(schedule):
    rate = make_schedule(replace(CONFIG, schedule=schedule, warmup_steps=4), 14)
    expected = WARMUP | SCHEDULES[schedule]
    found = {step: float(rate(step)) for step in expected}
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_a_schedule_ends_at_the_final_fraction(schedule):
    rate = make_schedule(replace(CONFIG, schedule=schedule, warmup_steps=4), 14)
    assert float(rate(14)) == pytest.approx(0.2)
    assert float(rate(1000)) == pytest.approx(0.2)


def test_wsd_decays_at_most_over_what_the_warm_up_leaves():
    config = replace(CONFIG, schedule="wsd", warmup_steps=4, decay_fraction=1.0)
    rate = make_schedule(config, 14)
    assert [float(rate(step)) for step in (4, 9)] == pytest.approx([1.0, 0.6])


@pytest.mark.parametrize("warmup_steps", [0, 1])
def test_the_first_step_is_taken_at_the_peak_with_little_warm_up(warmup_steps):
    config = replace(CONFIG, schedule="linear", warmup_steps=warmup_steps)
    assert float(make_schedule(config, 14)(0)) == 1.0


def test_another_peak_scales_the_schedule():
    config = replace(CONFIG, schedule="linear", warmup_steps=4)
    rate = make_schedule(config, 14, peak=3.0)
    assert [float(rate(step)) for step in (0, 4, 9)] == pytest.approx([0.75, 3.0, 1.8])


@pytest.mark.parametrize("warmup_steps", [14, 100])
def test_a_warm_up_as_long_as_the_run_is_refused(warmup_steps):
    config = replace(CONFIG, warmup_steps=warmup_steps)
    with pytest.raises(
        ValueError,
        match=rf"^optimizer\.warmup_steps={warmup_steps} .* trainer\.num_steps=14; ",
    ):
        make_schedule(config, 14)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("kind", "sgd"),
        ("schedule", "step"),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("adam_learning_rate", -0.1),
        ("clip_norm", 0.0),
        ("warmup_steps", -1),
        ("weight_decay", -0.1),
        ("decay_fraction", 1.1),
        ("final_fraction", -0.1),
    ],
)
def test_a_value_that_cannot_be_is_named(field, value):
    with pytest.raises(ValueError, match=rf"^optimizer\.{field}={value!r} "):
        replace(CONFIG, **{field: value})


@pytest.mark.parametrize("field", ["momentum", "adam_learning_rate"])
def test_muon_needs_momentum_and_a_rate_for_adam(field):
    with pytest.raises(ValueError, match=rf"^optimizer\.kind=muon .*{field}"):
        replace(CONFIG, kind="muon", **{field: None})


MATRICES = {
    "llama/embed_tokens/weight",
    "llama/lm_head/weight",
    "llama/layers/block/self_attn/q_proj/weight",
    "llama/layers/block/self_attn/k_proj/weight",
    "llama/layers/block/self_attn/v_proj/weight",
    "llama/layers/block/self_attn/o_proj/weight",
    "llama/layers/block/mlp/gate_proj/weight",
    "llama/layers/block/mlp/up_proj/weight",
    "llama/layers/block/mlp/down_proj/weight",
}
OTHERS = {
    "llama/norm/weight",
    "llama/layers/block/input_layernorm/weight",
    "llama/layers/block/post_attention_layernorm/weight",
    "llama/layers/block/self_attn/q_norm/weight",
    "llama/layers/block/self_attn/k_norm/weight",
    "llama/layers/block/self_attn/q_proj/bias",
    "llama/layers/block/self_attn/k_proj/bias",
    "llama/layers/block/self_attn/v_proj/bias",
    "llama/layers/block/self_attn/o_proj/bias",
    "llama/layers/block/mlp/gate_proj/bias",
    "llama/layers/block/mlp/up_proj/bias",
    "llama/layers/block/mlp/down_proj/bias",
}
# Axes of inputs and outputs in the scanned layout, whose axis 0 counts layers.
DIMENSIONS = {
    "q_proj": ((1,), (2, 3)),
    "k_proj": ((1,), (2, 3)),
    "v_proj": ((1,), (2, 3)),
    "o_proj": ((1, 2), (3,)),
    "gate_proj": ((1,), (2,)),
    "up_proj": ((1,), (2,)),
    "down_proj": ((1,), (2,)),
}
ALL_OPTIONS = {
    "qkv_bias": True,
    "attention_out_bias": True,
    "mlp_bias": True,
    "qk_norm": True,
    "tie_word_embeddings": False,
}


def unrolled(paths) -> set[str]:
    """Returns the paths of three layers of their own for those of stacked ones."""
    layers = (f"layers_{index}" for index in range(3))
    return {path.replace("layers", layer) for layer in layers for path in paths}


@pytest.fixture(scope="module", params=["scanned", "unrolled"])
def layout(request, make_config):
    """The layout's name and the shapes of a model with every parameter there is."""
    config = make_config(**ALL_OPTIONS, scan_layers=request.param == "scanned")
    return request.param, parameter_shapes(config)


def test_matrices_are_told_by_name(layout):
    name, shapes = layout
    matrices, others = MATRICES, OTHERS
    if name == "unrolled":
        matrices, others = unrolled(matrices), unrolled(others)
    found = dict(flat_parameters(is_matrix(shapes)))
    assert found == dict.fromkeys(matrices, True) | dict.fromkeys(others, False)


def test_muon_orthogonalises_the_layers_projections(layout):
    name, shapes = layout
    shift = 0 if name == "scanned" else 1
    found = dict(flat_parameters(muon_dimensions(shapes)))
    assert set(found) == {path for path, _ in flat_parameters(shapes)}
    for path, dimensions in found.items():
        *_, module, leaf = path.split("/")
        if module not in DIMENSIONS or leaf == "bias":
            assert dimensions is None, path
            continue
        inputs, outputs = (
            tuple(axis - shift for axis in axes) for axes in DIMENSIONS[module]
        )
        assert dimensions == MuonDimensionNumbers(inputs, outputs), path


def random_like(shapes, seed: int):
    """Returns normal numbers of the given shapes."""
    leaves, structure = jax.tree.flatten(shapes)
    rng = np.random.default_rng(seed)
    drawn = [jnp.asarray(rng.normal(size=leaf.shape), jnp.float32) for leaf in leaves]
    return structure.unflatten(drawn)


@pytest.fixture(scope="module")
def scanned_shapes(make_config):
    return parameter_shapes(make_config(**ALL_OPTIONS, num_hidden_layers=2))


def updated(config: OptimizerConfig, params, gradients):
    """Returns parameters after one update for each tree of gradients."""
    optimizer = make_optimizer(config, num_steps=14)

    @jax.jit
    def update(params, state, gradient):
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for gradient in gradients:
        params, state = update(params, state, gradient)
    return params


@pytest.mark.parametrize("kind", KINDS)
def test_decay_shrinks_matrices_alone(kind, scanned_shapes):
    config = replace(CONFIG, kind=kind, learning_rate=0.1, weight_decay=0.3)
    params = random_like(scanned_shapes, 0)
    nothing = jax.tree.map(jnp.zeros_like, params)
    after = dict(flat_parameters(updated(config, params, [nothing])))
    # Muon hands embedding and head to an Adam without decay.
    kept = {path for path in MATRICES if kind == "muon" and "layers" not in path}
    for path, before in flat_parameters(params):
        factor = 0.97 if path in MATRICES - kept else 1.0
        np.testing.assert_allclose(
            after[path], factor * before, rtol=1e-6, err_msg=path
        )


def largest_difference(config: OptimizerConfig, shapes) -> float:
    """Returns by how much scanned and unrolled parameters differ after three steps."""
    params = random_like(shapes, 0)
    gradients = [random_like(shapes, seed) for seed in (1, 2, 3)]
    scanned = updated(config, params, gradients)
    separate = updated(
        config, unstack_layers(params), [unstack_layers(each) for each in gradients]
    )
    differences = jax.tree.map(
        lambda one, other: jnp.max(jnp.abs(one - other)),
        scanned,
        stack_layers(separate),
    )
    return max(map(float, jax.tree.leaves(differences)))


def full_config(kind: str) -> OptimizerConfig:
    return replace(
        CONFIG,
        kind=kind,
        learning_rate=0.01,
        weight_decay=0.1,
        clip_norm=1.0,
        schedule="cosine",
        warmup_steps=2,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_scanned_and_unrolled_layers_move_alike(kind, scanned_shapes):
    assert largest_difference(full_config(kind), scanned_shapes) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_a_rule_by_number_of_axes_would_be_caught(kind, scanned_shapes, monkeypatch):
    def by_axes(params):
        return jax.tree.map(lambda leaf: leaf.ndim >= 2, params)

    def muon_by_axes(params):
        plain = MuonDimensionNumbers()
        return jax.tree.map(lambda leaf: plain if leaf.ndim == 2 else None, params)

    monkeypatch.setattr(optim, "is_matrix", by_axes)
    monkeypatch.setattr(optim, "muon_dimensions", muon_by_axes)
    assert largest_difference(full_config(kind), scanned_shapes) > 1e-4


def norm(*values: float):
    return {"llama/norm": {"weight": jnp.array(values, jnp.float32)}}


def test_the_rate_follows_the_schedule():
    """Lion's steps are signs, so that what is left is the rate."""
    config = replace(CONFIG, kind="lion", schedule="linear", warmup_steps=4)
    ascents = [norm(3.0, -5.0)] * 6
    moved = [
        updated(config, norm(0.0, 0.0), ascents[:count])["llama/norm"]["weight"]
        for count in (1, 2, 4, 5, 6)
    ]
    sums = np.array([0.25, 0.75, 2.5, 3.5, 4.42])
    np.testing.assert_allclose(moved, np.stack([-sums, sums], axis=1), rtol=1e-6)


def test_adamw_takes_hand_computed_steps():
    """The sums, by hand, for b1 1/2 and b2 3/4.

    Gradients 1 and 3: m = 0.5, then 0.25 + 1.5 = 1.75, corrected by 1/2 and 3/4 to
    1 and 7/3; v = 0.25, then 0.1875 + 2.25 = 2.4375, corrected by 1/4 and 7/16 to
    1 and 39/7.
    """
    first = updated(CONFIG, norm(0.0), [norm(1.0)])
    both = updated(CONFIG, norm(0.0), [norm(1.0), norm(3.0)])
    assert float(first["llama/norm"]["weight"][0]) == pytest.approx(-1.0)
    second_step = (7 / 3) / (39 / 7) ** 0.5
    assert float(both["llama/norm"]["weight"][0]) == pytest.approx(-1.0 - second_step)


def test_moments_of_16_bit_parameters_are_float32_and_fall():
    """In bfloat16, 0.999 of a second moment would round to itself."""
    params = {"llama/norm": {"weight": jnp.ones(3, jnp.bfloat16)}}
    optimizer = make_optimizer(replace(CONFIG, b2=0.999, clip_norm=1e9), 300)
    state = optimizer.init(params)
    step = jax.jit(optimizer.update)
    for size in [1.0] + [0.0] * 200:
        grads = jax.tree.map(lambda x, size=size: jnp.full_like(x, size), params)
        updates, state = step(grads, state, params)
    (nu,) = (
        leaf
        for path, leaf in jax.tree.leaves_with_path(state)
        if ".nu" in jax.tree_util.keystr(path)
    )
    np.testing.assert_allclose(nu, 0.001 * 0.999**200, rtol=1e-4)
    moved = optax.apply_updates(params, updates)
    assert moved["llama/norm"]["weight"].dtype == jnp.bfloat16


def test_clipping_bounds_the_norm_over_all_parameters():
    """Gradients of norm 1 and 65, clipped to 1: the same direction, the same step."""
    config = replace(CONFIG, clip_norm=1.0)
    gradients = [norm(0.6, -0.8), norm(39.0, -52.0)]
    clipped = updated(config, norm(0.0, 0.0), gradients)["llama/norm"]["weight"]
    np.testing.assert_allclose(clipped, [-2.0, 2.0], rtol=1e-5)
    free = updated(CONFIG, norm(0.0, 0.0), gradients)["llama/norm"]["weight"]
    assert abs(float(free[0]) + 2.0) > 0.1


def test_clipping_leaves_a_smaller_gradient_alone():
    config = replace(CONFIG, clip_norm=100.0)
    gradients = [norm(0.6, -0.8), norm(39.0, -52.0)]
    np.testing.assert_array_equal(
        updated(config, norm(0.0, 0.0), gradients)["llama/norm"]["weight"],
        updated(CONFIG, norm(0.0, 0.0), gradients)["llama/norm"]["weight"],
    )


def test_muon_moves_matrices_at_its_rate_and_the_rest_at_adam_s(scanned_shapes):
    config = replace(CONFIG, kind="muon", learning_rate=0.1, adam_learning_rate=0.003)
    config = replace(config, eps=1e-12)  # below the smallest gradient drawn
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), scanned_shapes)
    gradients = random_like(scanned_shapes, 1)
    moved = dict(flat_parameters(updated(config, params, [gradients])))
    # Adam with Nesterov's momentum: b1 (1 - b1) / (1 - b1²) + 1 = 4/3 at first.
    for path, steps in moved.items():
        if "proj/weight" not in path:
            np.testing.assert_allclose(np.abs(steps), 0.004, rtol=1e-4, err_msg=path)
    # Newton and Schulz's five steps bring singular values near 1: about 0.7 to 1.2.
    # o_proj has 60 inputs and 28 outputs; q_proj 28 and 60, and the scale sqrt(60/28).
    for module, shape, scale in (
        ("o_proj", (60, 28), 1.0),
        ("q_proj", (28, 60), 1.464),
    ):
        for layer in moved[f"llama/layers/block/self_attn/{module}/weight"]:
            values = jnp.linalg.svd(layer.reshape(shape), compute_uv=False)
            assert 0.05 * scale < float(values.min())
            assert float(values.max()) < 0.13 * scale
