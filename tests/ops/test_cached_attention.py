import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relax.ops import cached_attention as module
from relax.ops.cached_attention import cached_attention
from relax.ops.masks import AttentionMask

# G = 3 query heads read each of the K.
B, T, S, K, G, H = 2, 5, 23, 7, 3, 11
N = K * G
# 23 slots are four blocks of 5 and a last one that overlaps the fourth, or one of 29.
BLOCKS = (5, 29)
SLOTS = np.array([[0, 1, 2, 3, 4], [3, 9, 10, 17, 22]])


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def inputs(kv_heads=K, dtype=jnp.float32):
    keys = (B, kv_heads, S, H)
    return (
        normal(0, B, T, N, H, dtype=dtype),
        normal(1, *keys, dtype=dtype),
        normal(2, *keys, dtype=dtype),
    )


def masks():
    """Returns masks by name, in most of which some queries see nothing."""
    rng = np.random.default_rng(3)
    own = AttentionMask(query_slots=SLOTS)
    segments = np.cumsum(rng.random((B, S)) < 0.3, axis=1)
    valid = {"key_valid": rng.random((B, S)) < 0.6}
    documents = {
        "query_segments": np.take_along_axis(segments, SLOTS, axis=1),
        "key_segments": segments,
    }
    extra = {"extra": rng.random((B, N, T, S)) < 0.3}
    some = {
        "causal": own,
        "window": own._replace(window=4),
        "window of all": own._replace(window=2**31 - 1),
        "key_valid": own._replace(**valid),
        "segments": own._replace(**documents),
        "extra": own._replace(**extra),
        "extra of all": own._replace(extra=rng.random((1, 1, T, S)) < 0.3),
        "everything": own._replace(window=13, **valid, **documents, **extra),
    }
    return {name: jax.tree.map(jnp.asarray, mask) for name, mask in some.items()}


def sees(mask, b, t, n, s):
    """Returns whether head n of query t of row b sees slot s."""
    own = mask.query_slots[b, t]
    conditions = [s <= own]
    if mask.window is not None:
        conditions.append(s > int(own) - int(mask.window))
    if mask.key_valid is not None:
        conditions.append(mask.key_valid[b, s])
    if mask.key_segments is not None:
        conditions.append(mask.query_segments[b, t] == mask.key_segments[b, s])
    if mask.extra is not None:
        rows, heads = mask.extra.shape[:2]
        conditions.append(mask.extra[b % rows, n % heads, t, s])
    return all(conditions)


def by_loops(q, k, v, mask):
    """Returns the definition in float64, one query at a time, and who sees nothing."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    mask = jax.tree.map(np.asarray, mask)
    group = q.shape[2] // k.shape[1]
    out, blind = np.zeros_like(q), np.zeros(q.shape[:3], bool)
    for b, t, n in np.ndindex(q.shape[:3]):
        seen = [s for s in range(k.shape[2]) if sees(mask, b, t, n, s)]
        scores = k[b, n // group, seen] @ q[b, t, n] / math.sqrt(q.shape[3])
        blind[b, t, n] = not seen
        if seen:
            weights = np.exp(scores - scores.max())
            out[b, t, n] = weights @ v[b, n // group, seen] / weights.sum()
    return out, blind


def attend(q, k, v, mask, block, starts=None):
    """Returns what comes of a cache `[B, K, S, H]`, compiled.

    starts: a list that grows by the first slot of each block that is read.
    """

    def run(q, k, v, mask):
        def read(start, size):
            if starts is not None:
                jax.debug.callback(lambda first: starts.append(int(first)), start)
            return tuple(
                jax.lax.dynamic_slice_in_dim(x, start, size, axis=2) for x in (k, v)
            )

        return cached_attention(q, read, mask, k.shape[2], block)

    out = jax.jit(run)(q, k, v, mask)
    jax.effects_barrier()
    return out


@pytest.fixture(scope="module")
def expected():
    """By name of the mask: the definition, and which queries see nothing."""
    return {name: by_loops(*inputs(), mask) for name, mask in masks().items()}


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("name", masks())
def test_attention_over_a_cache_equals_loops(name, block, expected):
    actual = np.asarray(attend(*inputs(), masks()[name], block))
    out, blind = expected[name]
    np.testing.assert_allclose(actual, out, rtol=0, atol=2e-6)
    assert np.all(actual[blind] == 0)


@pytest.mark.parametrize("block", [1, 13, 23])
def test_other_blocks_equal_loops(block, expected):
    actual = attend(*inputs(), masks()["everything"], block)
    np.testing.assert_allclose(actual, expected["everything"][0], rtol=0, atol=2e-6)


def test_the_masks_leave_some_queries_nothing(expected):
    blind = {name: int(nothing.sum()) for name, (_, nothing) in expected.items()}
    assert blind["causal"] == blind["window"] == 0
    assert blind["key_valid"] > 0 < blind["extra"]
    assert 0 < blind["everything"] < B * T * N


@pytest.mark.parametrize("kv_heads", [1, 3, 21])
def test_grouped_queries_equal_loops(kv_heads):
    mask = masks()["everything"]
    q, k, v = inputs(kv_heads)
    out, _ = by_loops(q, k, v, mask)
    np.testing.assert_allclose(attend(q, k, v, mask, 5), out, rtol=0, atol=2e-6)


@pytest.mark.parametrize("block", [5, 23])
def test_bfloat16_errs_by_its_own_rounding(block):
    mask = masks()["causal"]
    given = inputs(dtype=jnp.bfloat16)
    actual = attend(*given, mask, block)
    assert actual.dtype == jnp.bfloat16
    out, _ = by_loops(*given, mask)
    # q over the square root, the weights and the result are rounded, by 2^-9 each: of
    # scores below 4, which move a mean of values below 4.
    error = np.abs(np.asarray(actual, np.float64) - out)
    assert error.max() < 2**-5
    assert error.mean() < 2**-9


def see_one_slot_more(mask, start, size):
    wrong = mask._replace(query_slots=mask.query_slots + 1)
    return key_block_mask(wrong, start, size)


def begin_a_block_late(mask, capacity, block):
    first, last = blocks_seen(mask, capacity, block)
    return first + 1, last


def end_a_block_early(mask, capacity, block):
    first, last = blocks_seen(mask, capacity, block)
    return first, last - 1


key_block_mask, blocks_seen = module.key_block_mask, module._blocks_seen


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("key_block_mask", see_one_slot_more),
        ("_blocks_seen", begin_a_block_late),
        ("_blocks_seen", end_a_block_early),
    ],
)
def test_the_comparison_sees_a_wrong_walk(name, wrong, monkeypatch, expected):
    monkeypatch.setattr(module, name, wrong)
    actual = attend(*inputs(), masks()["causal"], 5)
    error = np.abs(np.asarray(actual) - expected["causal"][0])
    assert error.max() > 1e-2


# What a row is independent of, to the last bit.


def padded(x, capacity, value=0.0):
    more = [(0, 0), (0, 0), (0, capacity - x.shape[2]), (0, 0)]
    return jnp.pad(x, more, constant_values=value)


@pytest.mark.parametrize(("block", "window"), [(8, 4), (32, None)])
def test_the_capacity_changes_no_bit(block, window):
    """From a block on: a smaller cache is one smaller block, and sums differently."""
    q, k, v = inputs()
    mask = AttentionMask(query_slots=jnp.asarray(SLOTS), window=window)
    capacities = (32, 97, 256)
    made = [attend(q, *(padded(x, c) for x in (k, v)), mask, block) for c in capacities]
    assert np.any(made[0])
    for other in made[1:]:
        np.testing.assert_array_equal(other, made[0])


@pytest.mark.parametrize("block", [8, 128])
def test_longer_neighbours_change_no_bit_of_a_row(block):
    """Row 1 is at the end of the cache instead of at slots 3 to 22."""
    q, k, v = inputs()
    k, v = padded(k, 128), padded(v, 128)
    far = jnp.asarray(SLOTS).at[1].add(105)
    near = attend(q, k, v, AttentionMask(query_slots=jnp.asarray(SLOTS)), block)
    other = attend(q, k, v, AttentionMask(query_slots=far), block)
    np.testing.assert_array_equal(other[0], near[0])
    assert np.any(other[1] != near[1])


@pytest.mark.parametrize("block", [5, 23])
def test_what_unused_slots_hold_changes_no_bit(block):
    q, k, v = inputs()
    mask = AttentionMask(query_slots=jnp.asarray(SLOTS) // 2)
    unused = jnp.arange(S) > jnp.max(mask.query_slots, axis=1)[:, None]
    unused = unused[:, None, :, None]
    filled = [jnp.where(unused, value, x) for x, value in ((k, 1e30), (v, -1e30))]
    np.testing.assert_array_equal(
        attend(q, *filled, mask, block), attend(q, k, v, mask, block)
    )


# What it costs.


@pytest.mark.parametrize(
    ("slots", "window", "starts"),
    [
        ([[0], [0]], None, [0]),
        ([[4], [2]], None, [0]),
        ([[5], [2]], None, [0, 5]),
        ([[22], [2]], None, [0, 5, 10, 15, 18]),
        ([[12], [14]], 3, [10]),
        ([[12], [14]], 4, [5, 10]),
        ([[3], [14]], 4, [0, 5, 10]),
        ([[12], [14]], 2**31 - 1, [0, 5, 10]),
        # A row that is idle may stand anywhere, past the end too.
        ([[3], [99]], None, [0, 5, 10, 15, 18]),
    ],
)
def test_only_blocks_that_a_query_sees_are_read(slots, window, starts):
    q, k, v = inputs()
    mask = AttentionMask(query_slots=jnp.asarray(slots), window=window)
    read = []
    attend(q[:, :1], k, v, mask, 5, read)
    assert read == starts


def test_blocks_read_do_not_follow_the_capacity():
    q, k, v = inputs()
    mask = AttentionMask(query_slots=jnp.asarray(SLOTS))
    for capacity in (23, 97, 4001):
        read = []
        attend(q, padded(k, capacity), padded(v, capacity), mask, 13, read)
        assert len(read) == 2
