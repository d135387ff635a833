import logging
import math

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from relax.ops.attention import attention, masked_softmax, resolve_implementation
from relax.ops.masks import AttentionMask, dense_mask

IMPLEMENTATIONS = ("xla", "blocked")
B, T, S, N, K, H = 2, 5, 7, 6, 3, 4
attend = jax.jit(attention, static_argnums=4)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def inputs(batch=B, queries=T, keys=T, heads=N, kv_heads=K, width=H):
    q = normal(0, batch, queries, heads, width)
    return (
        q,
        normal(1, batch, keys, kv_heads, width),
        normal(2, batch, keys, kv_heads, width),
    )


def masks(queries, keys):
    """Returns masks that leave each query its own slot, for `keys` >= `queries`."""
    rng = np.random.default_rng(3)
    slots = np.sort(
        rng.permutation(np.tile(np.arange(keys), (B, 1)), axis=1)[:, :queries]
    )
    own = slots[..., None] == np.arange(keys)
    segments = np.cumsum(rng.random((B, keys)) < 0.3, axis=1)
    fields = {
        "key_valid": rng.random((B, keys)) < 0.7,
        "window": 3,
        "query_segments": np.take_along_axis(segments, slots, axis=1),
        "key_segments": segments,
        "extra": (rng.random((B, N, queries, keys)) < 0.7) | own[:, None],
    }
    fields["key_valid"] |= own.any(axis=1)
    if keys > queries:
        fields["query_slots"] = slots
    fields = {name: jnp.asarray(value) for name, value in fields.items()}
    everything = AttentionMask(**fields)
    alone = AttentionMask(query_slots=everything.query_slots)
    return {
        "causal": alone,
        "key_valid": alone._replace(key_valid=everything.key_valid),
        "window": alone._replace(window=everything.window),
        "segments": everything._replace(key_valid=None, window=None, extra=None),
        "extra": alone._replace(extra=everything.extra),
        "everything": everything,
    }


def attention_by_loops(q, k, v, mask):
    """Returns the definition in float64, one query at a time."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    group = q.shape[2] // k.shape[2]
    visible = np.asarray(dense_mask(mask, range(q.shape[1]), range(k.shape[1])))
    visible = np.broadcast_to(visible, (len(q), q.shape[2], q.shape[1], k.shape[1]))
    out = np.zeros_like(q)
    for b, t, n in np.ndindex(q.shape[:3]):
        seen = [s for s in range(k.shape[1]) if visible[b, n, t, s]]
        scores = [
            q[b, t, n] @ k[b, s, n // group] / math.sqrt(q.shape[3]) for s in seen
        ]
        weights = [math.exp(score - max(scores)) for score in scores]
        for s, weight in zip(seen, weights, strict=True):
            out[b, t, n] += weight / sum(weights) * v[b, s, n // group]
    return out


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("keys", [T, S], ids=["aligned", "cached"])
@pytest.mark.parametrize("name", masks(T, T))
def test_attention_equals_loops(name, keys, implementation):
    mask = masks(T, keys)[name]
    q, k, v = inputs(keys=keys)
    actual = attend(q, k, v, mask, implementation)
    # Scores below 8 and values below 4: exp and the sums err by a few 6e-8 of them.
    np.testing.assert_allclose(actual, attention_by_loops(q, k, v, mask), 0, 2e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kv_heads", [1, 2, 3, 6])
def test_grouped_queries_equal_loops(kv_heads, implementation):
    q, k, v = inputs(kv_heads=kv_heads)
    actual = attend(q, k, v, AttentionMask(), implementation)
    expected = attention_by_loops(q, k, v, AttentionMask())
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-6)


def value_and_gradients(q, k, v, mask, implementation, d_out):
    @jax.jit
    def run(q, k, v, mask):
        out, vjp = jax.vjp(lambda *x: attention(*x, mask, implementation), q, k, v)
        return out, *vjp(d_out)

    return run(q, k, v, mask)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("keys", [T, S], ids=["aligned", "cached"])
def test_values_and_gradients_equal_those_of_torch(keys, implementation):
    torch = pytest.importorskip("torch")
    mask = masks(T, keys)["everything"]
    q, k, v = inputs(keys=keys)
    d_out = normal(4, *q.shape)
    ours = value_and_gradients(q, k, v, mask, implementation, d_out)
    leaves = [torch.tensor(np.array(x), requires_grad=True) for x in (q, k, v)]
    heads_first = [x.transpose(1, 2) for x in leaves]
    repeated = [x.repeat_interleave(N // x.shape[1], dim=1) for x in heads_first]
    visible = torch.tensor(np.array(dense_mask(mask, range(T), range(keys))))
    peer = torch.nn.functional.scaled_dot_product_attention(*repeated, visible)
    peer.transpose(1, 2).backward(torch.tensor(np.array(d_out)))
    peers = [peer.transpose(1, 2).detach(), *(x.grad for x in leaves)]
    for actual, expected in zip(ours, peers, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 130])
def test_blocked_equals_xla_around_the_block_size(length):
    mask = masks(length, length)["everything"]._replace(window=jnp.int32(40))
    q, k, v = inputs(queries=length, keys=length)
    d_out = normal(5, *q.shape)
    ours = value_and_gradients(q, k, v, mask, "blocked", d_out)
    expected = value_and_gradients(q, k, v, mask, "xla", d_out)
    for x, y in zip(ours, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=5e-6)


def test_blocked_equals_xla_for_long_rows_and_for_a_cache():
    # 1,030 queries are 16 blocks of 65, the last one shorter; 70 queries with slots of
    # their own are two blocks that see all keys.
    long = inputs(1, 1030, 1030, 2, 1, 2)
    slots = jnp.asarray([np.arange(5, 75), np.arange(70)])
    cases = [
        (long, AttentionMask()),
        (inputs(queries=70, keys=83), AttentionMask(query_slots=slots)),
    ]
    for (q, k, v), mask in cases:
        expected = attend(q, k, v, mask, "xla")
        actual = attend(q, k, v, mask, "blocked")
        np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_query_that_sees_nothing_gives_zeros_and_finite_gradients(implementation):
    q, k, v = inputs()
    # Row 0 sees no key at all; in row 1 the first query has no valid key.
    valid = jnp.array([[False] * T, [False] + [True] * (T - 1)])
    mask = AttentionMask(key_valid=valid)
    d_out = normal(6, *q.shape)
    out, *gradients = value_and_gradients(q, k, v, mask, implementation, d_out)
    np.testing.assert_array_equal(out[0], 0.0)
    np.testing.assert_array_equal(out[1, 0], 0.0)
    np.testing.assert_allclose(out, attention_by_loops(q, k, v, mask), 0, 2e-6)
    for gradient in gradients:
        assert np.isfinite(gradient).all()
        np.testing.assert_array_equal(gradient[0], 0.0)
        np.testing.assert_array_equal(gradient[1, 0], 0.0)
        assert np.any(gradient[1, 1:])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_query_whose_window_lies_beyond_the_keys_gives_zeros(implementation):
    q, k, v = inputs()
    slots = jnp.array([[0, 4, 6, 7, 99], [3, 4, 5, 6, 7]])
    mask = AttentionMask(query_slots=slots, window=3)
    actual = attend(q, k, v, mask, implementation)
    blind = np.asarray(slots) >= T + 2
    np.testing.assert_array_equal(np.asarray(actual)[blind], 0.0)
    np.testing.assert_allclose(actual, attention_by_loops(q, k, v, mask), 0, 2e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_scores_of_a_thousand_do_not_overflow(implementation):
    q, k, v = inputs()
    mask, d_out = AttentionMask(), normal(7, *q.shape)
    out, *gradients = value_and_gradients(q * 1e3, k, v, mask, implementation, d_out)
    # A score of 3,000 has a float32 spacing of 2.4e-4: as much is wrong of a weight.
    np.testing.assert_allclose(out, attention_by_loops(q * 1e3, k, v, mask), 0, 1e-3)
    assert all(np.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_inputs_keep_float32_scores(implementation):
    q, k, v = (x.astype(jnp.bfloat16) for x in inputs(queries=11, keys=11))
    # Scores of about 60, where bfloat16 has a spacing of 1/4.
    q = q * 16
    d_out = normal(8, *q.shape).astype(jnp.bfloat16)
    ours = value_and_gradients(q, k, v, AttentionMask(), implementation, d_out)
    wide = [x.astype(jnp.float32) for x in (q, k, v, d_out)]
    exact = value_and_gradients(*wide[:3], AttentionMask(), "xla", wide[3])
    # The weights and the result are rounded to bfloat16, 2⁻⁹ each at most.
    tolerance = 2.0**-8 * float(jnp.max(jnp.abs(v)))
    assert all(x.dtype == jnp.bfloat16 for x in ours)
    np.testing.assert_allclose(ours[0].astype(jnp.float32), exact[0], 0, tolerance)
    for actual, expected in zip(ours[1:], exact[1:], strict=True):
        scale = float(jnp.max(jnp.abs(expected)))
        np.testing.assert_allclose(
            actual.astype(jnp.float32), expected, rtol=0, atol=2.0**-6 * scale
        )
    assert worst_error_with_bfloat16_scores(q, k, v, exact[0]) > 3 * tolerance


def worst_error_with_bfloat16_scores(q, k, v, exact):
    k, v = (jnp.repeat(x, N // K, axis=2) for x in (k, v))
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) / jnp.bfloat16(math.sqrt(H))
    visible = dense_mask(AttentionMask(), range(q.shape[1]), range(k.shape[1]))
    pattern = masked_softmax(scores, visible).astype(jnp.float32)
    out = jnp.einsum("bnts,bsnh->btnh", pattern, v.astype(jnp.float32))
    return float(jnp.max(jnp.abs(out - exact)))


def test_masked_softmax_by_hand():
    scores = jnp.log(jnp.array([[1.0, 2.0, 5.0], [3.0, 1.0, 7.0], [1.0, 1.0, 1.0]]))
    visible = jnp.array([[True] * 3, [True, True, False], [False] * 3])
    expected = [[0.125, 0.25, 0.625], [0.75, 0.25, 0.0], [0.0, 0.0, 0.0]]
    np.testing.assert_allclose(masked_softmax(scores, visible), expected, rtol=3e-7)


def test_shapes_are_checked_in_tests():
    q, k, v = inputs()
    with pytest.raises(jaxtyping.TypeCheckError, match="parameter 'v'"):
        attention(q, k, v[:, 1:], AttentionMask())


@pytest.mark.parametrize(
    ("platform", "dtype", "expected"),
    [
        ("cpu", "float32", "blocked"),
        ("cpu", "bfloat16", "blocked"),
        ("gpu", "float32", "blocked"),
        ("gpu", "bfloat16", "cudnn"),
        ("cuda", "float16", "cudnn"),
        ("tpu", "float32", "xla"),
        ("tpu", "bfloat16", "xla"),
        ("METAL", "float32", "blocked"),
    ],
)
def test_auto_chooses_by_platform(platform, dtype, expected):
    assert resolve_implementation("auto", platform, dtype) == expected


def test_a_name_stands_for_itself():
    assert resolve_implementation("xla", "gpu", "bfloat16") == "xla"
    assert resolve_implementation("blocked", "tpu", "float32") == "blocked"
    assert resolve_implementation("cudnn", "gpu", "bfloat16") == "cudnn"


def test_an_unknown_name_is_refused_with_the_known_ones():
    message = r"model.attention='flash' is unknown; .*auto, xla, blocked, cudnn"
    with pytest.raises(ValueError, match=message):
        resolve_implementation("flash", "cpu", "float32")


@pytest.mark.parametrize(
    ("platform", "dtype"),
    [("cpu", "bfloat16"), ("tpu", "bfloat16"), ("gpu", "float32")],
)
def test_cudnn_is_refused_where_it_cannot_run(platform, dtype):
    message = f"model.attention='cudnn' .*{platform} .*model.compute_dtype={dtype}"
    with pytest.raises(ValueError, match=message):
        resolve_implementation("cudnn", platform, dtype)


def test_the_choice_is_logged_once(caplog):
    caplog.set_level(logging.INFO, logger="relax.ops.attention")
    for _ in range(3):
        resolve_implementation("auto", "a platform no other test names", "float32")
    assert [record.message for record in caplog.records] == [
        "attention implementation: blocked (on a platform no other test names)"
    ]
