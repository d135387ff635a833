import cmath
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relax.ops.rope import (
    RopeScaling,
    attention_factor,
    frequencies,
    rope_tables,
    rotate,
)

DEFAULT = RopeScaling(kind="default")
FLOAT32_ULP = 2.0**-23
# How many units in the last place separate the frequencies from the peer's (whose
# powers are not correctly rounded); not listed: bit-equal. `dynamic` takes the power of
# a base that is itself a float32 power, once per position.
ULPS = {"qwen2.5_yarn_x4": 1, "qwen3_default": 1, "dynamic_x2": 4}


def tables(positions, head_dim, theta, scaling=DEFAULT):
    return rope_tables(jnp.asarray(positions, jnp.int32), head_dim, theta, scaling)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def peer_scaling(case):
    names = {
        "rope_type": "kind",
        "original_max_position_embeddings": "original_context",
    }
    options = {"original_max_position_embeddings": case["max_position_embeddings"]}
    options |= case["rope_parameters"]
    theta = options.pop("rope_theta")
    return theta, RopeScaling(**{names.get(k, k): v for k, v in options.items()})


@pytest.fixture(scope="module")
def peer_cases(oracle_dir):
    cases = json.loads((oracle_dir / "hf_rope.json").read_text())["cases"]
    assert len(cases) == 9 and all(len(case["rows"]) == 10 for case in cases)
    return cases


def test_frequencies_equal_those_of_transformers(peer_cases):
    for case in peer_cases:
        theta, scaling = peer_scaling(case)
        ours = frequencies(case["head_dim"], theta, scaling)
        # The frequencies of `dynamic` inside its context are the default ones.
        ulps = 0 if scaling.kind == "dynamic" else ULPS.get(case["name"], 0)
        peer = np.float32(case["inv_freq"])
        assert ours.dtype == np.float32
        assert np.max(np.abs(ours.view(np.int32) - peer.view(np.int32))) <= ulps, case
        assert attention_factor(scaling) == case["attention_scaling"]


def test_tables_equal_those_of_transformers(peer_cases):
    for case in peer_cases:
        theta, scaling = peer_scaling(case)
        rows, ulps = case["rows"], ULPS.get(case["name"], 0)
        positions = np.array([[row["position"] for row in rows]])
        cos, sin = tables(positions, case["head_dim"], theta, scaling)
        # An angle is position x frequency, rounded once more where frequencies differ.
        angles = positions[0][:, None] * [row["inv_freq_used"] for row in rows]
        d_angle = (ulps + 1 if ulps else 0) * FLOAT32_ULP * angles
        tolerance = case["attention_scaling"] * (FLOAT32_ULP + d_angle)
        for ours, name in ((cos, "cos"), (sin, "sin")):
            peer = np.array([row[name] for row in rows])
            error = np.abs(np.tile(ours[0], 2) - peer)
            assert np.all(error <= np.tile(tolerance, 2)), (case["name"], name)


def test_dynamic_base_of_a_position_is_the_same_in_any_batch():
    scaling = RopeScaling(kind="dynamic", factor=2.0, original_context=7)
    positions = np.array([[3, 6, 7, 11, 23]])
    together = np.stack(tables(positions, 10, 1e4, scaling))
    for i, position in enumerate(positions[0]):
        alone = np.stack(tables([[position]], 10, 1e4, scaling))
        # The same float32 arithmetic, but for the last bit of vectorised functions.
        np.testing.assert_allclose(together[:, 0, i], alone[:, 0, 0], rtol=0, atol=1e-5)


def test_dynamic_by_hand():
    # Context 8, factor 2, head width 4: position 15 ends a sequence of 16, whose base
    # is 100 x (2 x 16/8 - 1)^(4/2) = 900: frequencies 1 and 1/30.
    scaling = RopeScaling(kind="dynamic", factor=2.0, original_context=8)
    cos, sin = tables([[7, 15]], 4, 100.0, scaling)
    angles = np.array([[7.0, 0.7], [15.0, 0.5]])
    np.testing.assert_allclose(cos[0], np.cos(angles), rtol=0, atol=5e-7)
    np.testing.assert_allclose(sin[0], np.sin(angles), rtol=0, atol=5e-7)


def test_frequencies_by_hand():
    linear = RopeScaling(kind="linear", factor=4.0)
    expected = np.array([1.0, 0.1, 0.01])
    # The exponent 2/3 is rounded to float32 before the power.
    for scaling, factor in ((DEFAULT, 1.0), (linear, 4.0)):
        actual = frequencies(6, 1000.0, scaling)
        np.testing.assert_allclose(actual, expected / factor, rtol=2e-7)


def test_yarn_scales_cos_and_sin_by_its_attention_factor():
    computed = RopeScaling(kind="yarn", factor=math.e, original_context=64)
    given = RopeScaling(
        kind="yarn", factor=8.0, original_context=64, attention_factor=1.5
    )
    assert attention_factor(computed) == pytest.approx(1.1)
    cos, sin = tables([[0, 5]], 4, 100.0, given)
    np.testing.assert_allclose(cos**2 + sin**2, 2.25, rtol=1e-6)


def test_rotate_is_a_product_of_complex_numbers():
    B, T, N, H = 2, 5, 3, 8
    positions = np.random.default_rng(0).integers(0, 97, size=(B, T))
    x = normal(1, B, T, N, H)
    expected = np.empty_like(x)
    for b, t, n, i in np.ndindex(B, T, N, H // 2):
        turn = cmath.exp(1j * positions[b, t] * 50.0 ** (-2 * i / H))
        pair = complex(x[b, t, n, i], x[b, t, n, i + H // 2]) * turn
        expected[b, t, n, i], expected[b, t, n, i + H // 2] = pair.real, pair.imag
    actual = rotate(jnp.asarray(x), *tables(positions, H, 50.0))
    # Angles up to 97, each with a float32 rounding of half a unit in 2⁻¹⁷.
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-5)


def test_rotate_and_its_gradient_equal_those_of_torch():
    torch = pytest.importorskip("torch")
    x, d_out = normal(2, 2, 5, 3, 8), normal(3, 2, 5, 3, 8)
    cos, sin = tables(np.arange(10).reshape(2, 5), 8, 50.0)
    out, vjp = jax.vjp(lambda x: rotate(x, cos, sin), jnp.asarray(x))
    x_torch = torch.tensor(x, requires_grad=True)
    first, second = x_torch.chunk(2, dim=-1)
    half_turned = torch.cat((-second, first), dim=-1)
    cos2, sin2 = (torch.tensor(np.tile(a, 2)).unsqueeze(2) for a in (cos, sin))
    peer = x_torch * cos2 + half_turned * sin2
    peer.backward(torch.tensor(d_out))
    np.testing.assert_allclose(out, peer.detach(), rtol=0, atol=5e-7)
    np.testing.assert_allclose(vjp(jnp.asarray(d_out))[0], x_torch.grad, 0, 5e-7)


def test_scores_depend_on_the_distance_alone():
    q, k = normal(4, 1, 1, 1, 8), normal(5, 1, 1, 1, 8)

    def score(query_position, key_position):
        q_turned = rotate(jnp.asarray(q), *tables([[query_position]], 8, 50.0))
        k_turned = rotate(jnp.asarray(k), *tables([[key_position]], 8, 50.0))
        return float(jnp.sum(q_turned * k_turned))

    assert score(19, 12) == pytest.approx(score(7, 0), abs=1e-5)
    assert abs(score(19, 12) - score(12, 19)) > 0.1


def test_bfloat16_is_rotated_in_float32():
    x = jnp.asarray(normal(6, 2, 5, 3, 8), jnp.bfloat16)
    turns = tables(np.arange(1000, 1010).reshape(2, 5), 8, 50.0)
    expected = rotate(x.astype(jnp.float32), *turns)
    actual = rotate(x, *turns)
    assert actual.dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        actual.astype(jnp.float32), expected.astype(jnp.bfloat16).astype(jnp.float32)
    )
