import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relax.model.cache import empty_cache, read, write

RNG = np.random.default_rng(0)
LENGTHS, STEPS, CAPACITY = np.array([5, 2, 4]), 4, 11
B, T = 3, max(LENGTHS)
TOKENS = RNG.integers(0, 67, (B, T + STEPS))
# Hidden states of about 1, after three layers of float32 sums in another order.
TOLERANCE = 1e-5

MODELS = {
    "default": {},
    "window": {"sliding_window": 3, "num_key_value_heads": 1},
    "window of upper layers": {
        "sliding_window": 3,
        "max_window_layers": 1,
        "scan_layers": False,
    },
    "linear": {"rope_type": "linear", "num_key_value_heads": 6},
    "dynamic": {"rope_type": "dynamic"},
    "llama3": {"rope_type": "llama3", "num_key_value_heads": 3},
    "yarn": {"rope_type": "yarn", "qk_norm": True, "qkv_bias": True},
}


@pytest.fixture
def build(small_model):
    """The named model; stretched frequencies start from a context that rows outgrow."""
    stretch = {"rope_factor": 4.0, "rope_original_max_position_embeddings": 4}
    return lambda name: small_model(**stretch, **MODELS[name])


def full_forward(model):
    """Returns the hidden states of the rows that decoding arrives at."""
    return np.asarray(model.forward(model.params, TOKENS).hidden)


def decoding_errors(model, step_positions=None):
    """Returns the largest error of prefill and of each step against a full forward.

    Rows are prefilled together at their own lengths, and the slots after a short row
    hold what its padding left there until its own tokens arrive.
    """
    expected = full_forward(model)
    lengths = jnp.asarray(LENGTHS)
    prompts = np.where(np.arange(T) < LENGTHS[:, None], TOKENS[:, :T], 66)
    cache = empty_cache(model.config, B, CAPACITY)
    out = model.forward(model.params, prompts, cache=cache, lengths=lengths)
    real = np.arange(T) < LENGTHS[:, None]
    errors = [np.abs(np.asarray(out.hidden) - expected[:, :T])[real].max()]
    for step in range(STEPS):
        slots = LENGTHS + step
        np.testing.assert_array_equal(out.cache.lengths, slots)
        inputs = {} if step_positions is None else {"positions": step_positions(slots)}
        tokens = TOKENS[np.arange(B), slots][:, None]
        out = model.forward(model.params, tokens, cache=out.cache, **inputs)
        errors.append(
            np.abs(np.asarray(out.hidden[:, 0]) - expected[np.arange(B), slots]).max()
        )
    return errors


@pytest.mark.parametrize("name", MODELS)
def test_decoding_token_by_token_equals_a_full_forward(build, name):
    assert max(decoding_errors(build(name))) < TOLERANCE


def test_the_check_catches_a_shifted_position(build):
    def shifted(slots):
        return jnp.asarray(slots[:, None] + 1)

    prefill, *steps = decoding_errors(build("default"), shifted)
    assert prefill < TOLERANCE
    assert min(steps) > 100 * TOLERANCE


def test_the_check_catches_keys_of_another_row(build):
    model = build("default")
    expected = full_forward(model)
    cache = empty_cache(model.config, B, CAPACITY)
    cache = model.forward(model.params, TOKENS[:, :T], cache=cache).cache
    swapped = cache._replace(
        keys=jax.tree.map(lambda x: x[..., ::-1, :, :, :], cache.keys)
    )
    out = model.forward(model.params, TOKENS[:, T : T + 1], cache=swapped)
    error = np.abs(np.asarray(out.hidden[:, 0]) - expected[:, T])
    assert error[0].max() > 100 * TOLERANCE and error[1].max() < TOLERANCE


def test_a_prompt_may_arrive_in_ragged_pieces(build):
    model = build("dynamic")
    expected = full_forward(model)
    cache = empty_cache(model.config, B, CAPACITY)
    done = np.zeros(B, int)
    for added in ([3, 0, 2], [1, 3, 3], [2, 3, 0]):
        take = np.minimum(done[:, None] + np.arange(3), TOKENS.shape[1] - 1)
        tokens = np.take_along_axis(TOKENS, take, axis=1)
        out = model.forward(
            model.params, tokens, cache=cache, lengths=jnp.asarray(added)
        )
        for row, count in enumerate(added):
            actual = out.hidden[row, :count]
            wanted = expected[row, done[row] : done[row] + count]
            np.testing.assert_allclose(actual, wanted, rtol=0, atol=TOLERANCE)
        cache, done = out.cache, done + added
    np.testing.assert_array_equal(cache.lengths, [6, 6, 5])


def test_the_room_left_in_a_cache_changes_nothing(build):
    model = build("default")
    tokens = TOKENS[:, :T]
    hidden = [
        model.forward(
            model.params, tokens, cache=empty_cache(model.config, B, capacity)
        ).hidden
        for capacity in (T, CAPACITY)
    ]
    np.testing.assert_allclose(hidden[0], hidden[1], rtol=0, atol=TOLERANCE)


@pytest.fixture(params=["one array", "an array per layer"])
def buffer(request):
    """Numbered slots `[L, B, K, S, H]` = `[2, 3, 1, 5, 2]`, in both layouts."""
    array = jnp.arange(60.0).reshape(2, 3, 1, 5, 2)
    return array if request.param == "one array" else tuple(array)


def as_array(buffer):
    return np.array(buffer if isinstance(buffer, jax.Array) else jnp.stack(buffer))


UPDATE = -jnp.arange(1.0, 13.0).reshape(3, 2, 1, 2)  # [B, T, K, H]


def test_write_fills_each_rows_own_slots_of_one_layer(buffer):
    slots = jnp.array([[0, 1], [3, 4], [2, 3]])
    actual = write(buffer, 1, None, slots, UPDATE)
    expected = as_array(buffer)
    expected[1, 0, 0, 0:2], expected[1, 1, 0, 3:5] = UPDATE[0, :, 0], UPDATE[1, :, 0]
    expected[1, 2, 0, 2:4] = UPDATE[2, :, 0]
    np.testing.assert_array_equal(as_array(actual), expected)


def test_write_fills_the_rows_named_and_drops_those_that_are_not_there(buffer):
    """Row 3 of layer 0 would be row 0 of layer 1, were it not dropped."""
    slots = jnp.array([[0, 1], [3, 4], [2, 3]])
    actual = write(buffer, 0, jnp.array([2, 3, 0]), slots, UPDATE)
    expected = as_array(buffer)
    expected[0, 2, 0, 0:2], expected[0, 0, 0, 2:4] = UPDATE[0, :, 0], UPDATE[2, :, 0]
    np.testing.assert_array_equal(as_array(actual), expected)


def test_write_drops_what_lies_beyond_the_capacity(buffer):
    update = -jnp.ones((3, 2, 1, 2))
    slots = jnp.array([[4, 5], [5, 6], [100, 0]])
    actual = write(buffer, 0, None, slots, update)
    expected = as_array(buffer)
    expected[0, 0, 0, 4] = expected[0, 2, 0, 0] = -1.0
    np.testing.assert_array_equal(as_array(actual), expected)


def test_write_takes_a_traced_layer_and_keeps_the_dtype_of_the_buffer():
    buffer = jnp.arange(60.0, dtype=jnp.bfloat16).reshape(2, 3, 1, 5, 2)
    update = jnp.full((3, 1, 1, 2), 1.0 + 2**-9)
    slots = jnp.zeros((3, 1), jnp.int32)
    actual = jax.jit(write)(buffer, jnp.int32(1), None, slots, update)
    assert actual.dtype == jnp.bfloat16
    np.testing.assert_array_equal(actual[1, :, 0, 0].astype(jnp.float32), 1.0)
    np.testing.assert_array_equal(actual[0], buffer[0])


def test_read_gives_some_slots_of_some_rows_of_a_layer(buffer):
    everything = as_array(buffer)
    actual = read(buffer, 1, None, 2, 3)
    np.testing.assert_array_equal(actual, everything[1, :, :, 2:5])
    actual = read(buffer, 0, jnp.array([2, 0]), 1, 2)
    np.testing.assert_array_equal(actual, everything[0, [2, 0], :, 1:3])


@pytest.mark.parametrize("scan_layers", [True, False])
def test_an_empty_cache_has_the_shape_and_dtype_of_its_model(make_config, scan_layers):
    """Float32 on a CPU, whatever the compute dtype."""
    config = make_config(compute_dtype="bfloat16", scan_layers=scan_layers)
    on_cpu = jax.default_backend() == "cpu"
    cache = empty_cache(config, 5, 13)
    for buffer in (cache.keys, cache.values):
        layers = [buffer] if scan_layers else buffer
        shape = (3, 5, 2, 13, 10) if scan_layers else (5, 2, 13, 10)
        assert [layer.shape for layer in layers] == [shape] * (1 if scan_layers else 3)
        dtype = jnp.dtype("float32" if on_cpu else "bfloat16")
        assert {layer.dtype for layer in layers} == {dtype}
    assert cache.capacity == 13
    np.testing.assert_array_equal(cache.lengths, [0] * 5)


@pytest.mark.parametrize("name, shape", [("key_valid", (B, 1)), ("mask", (B, 1, 1, 1))])
def test_a_mask_that_does_not_cover_the_slots_is_an_error(small_model, name, shape):
    model = small_model()
    cache = empty_cache(model.config, B, CAPACITY)
    given = {name: jnp.ones(shape, bool)}
    with pytest.raises(ValueError, match=rf"{name} .* must be {CAPACITY} slots"):
        model.forward(model.params, TOKENS[:, :1], cache=cache, **given)


def test_a_mask_over_the_slots_hides_them_from_a_cached_query(small_model):
    model = small_model()
    out = model.forward(
        model.params, TOKENS[:, :T], cache=empty_cache(model.config, B, CAPACITY)
    )
    hidden_slot = jnp.arange(CAPACITY) != 1
    last = model.forward(
        model.params,
        TOKENS[:, T : T + 1],
        cache=out.cache,
        key_valid=jnp.broadcast_to(hidden_slot, (B, CAPACITY)),
    ).hidden
    plain = model.forward(model.params, TOKENS[:, T : T + 1], cache=out.cache).hidden
    assert np.abs(last - plain).max() > 1e-3


def test_segments_and_a_cache_together_are_an_error(small_model):
    model = small_model()
    cache = empty_cache(model.config, B, CAPACITY)
    with pytest.raises(ValueError, match="segment_ids and a cache"):
        model.forward(
            model.params, TOKENS[:, :1], cache=cache, segment_ids=np.ones((B, 1), int)
        )
