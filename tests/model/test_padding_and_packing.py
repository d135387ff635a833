import jax.numpy as jnp
import numpy as np
import pytest

RNG = np.random.default_rng(0)
DOCUMENTS = [RNG.integers(0, 67, n) for n in (5, 4, 2, 7, 3)]
# Two rows of 11: documents of 5 + 4 + 2 and of 7 + 3 tokens, one slot of padding.
ROWS = [[0, 1, 2], [3, 4]]
T = 11
TOKENS, GARBAGE = RNG.integers(0, 67, (2, 3, T))
PADDING = -1
# Sums of 28 to 60 float32 products of about 1, three layers deep.
TOLERANCE = 2e-5


@pytest.fixture(params=["default", "dynamic"])
def model(small_model, request):
    """Of the kinds of RoPE, `dynamic` alone depends on more than distances."""
    return small_model(
        rope_type=request.param,
        rope_factor=2.0,
        rope_original_max_position_embeddings=3,
    )


def packed():
    """Returns tokens and segment ids `[2, T]`."""
    tokens, segments = np.full((2, T), 13), np.full((2, T), PADDING)
    for row, documents in enumerate(ROWS):
        start = 0
        for i in documents:
            stop = start + len(DOCUMENTS[i])
            tokens[row, start:stop], segments[row, start:stop] = DOCUMENTS[i], i
            start = stop
    return tokens, segments


def packing_error(model, **inputs):
    """Returns the largest difference between packed and separate documents' logits."""
    tokens, segments = packed()
    actual = model.logits(tokens, **{k: jnp.asarray(v) for k, v in inputs.items()})
    padded = np.full((len(DOCUMENTS), max(map(len, DOCUMENTS))), 13)
    for i, document in enumerate(DOCUMENTS):
        padded[i, : len(document)] = document
    separate = model.logits(padded)
    return max(
        float(jnp.max(jnp.abs(actual[segments == i] - separate[i, : len(document)])))
        for i, document in enumerate(DOCUMENTS)
    )


def test_packed_documents_give_what_they_give_apart(model):
    assert packing_error(model, segment_ids=packed()[1]) < TOLERANCE


def test_the_check_catches_missing_segments(model):
    assert packing_error(model) > 1000 * TOLERANCE


def test_the_check_catches_shifted_positions(model):
    _, segments = packed()
    starts = np.stack([np.argmax(row[:, None] == row, axis=0) for row in segments])
    right = np.arange(T) - starts
    assert packing_error(model, segment_ids=segments, positions=right) < TOLERANCE
    shifted = right + (right >= 2)
    assert packing_error(model, segment_ids=segments, positions=shifted) > 0.02


def test_positions_that_do_not_restart_matter_to_dynamic_rope(small_model):
    model = small_model(
        rope_type="dynamic", rope_factor=2.0, rope_original_max_position_embeddings=3
    )
    _, segments = packed()
    positions = np.tile(np.arange(T), (2, 1))
    assert packing_error(model, segment_ids=segments, positions=positions) > 0.02


def test_garbage_after_a_row_changes_nothing(model):
    real = np.arange(T) < np.array([4, 11, 7])[:, None]
    expected = np.asarray(model.logits(TOKENS))
    actual = np.asarray(model.logits(np.where(real, TOKENS, GARBAGE)))
    np.testing.assert_array_equal(actual[real], expected[real])
    assert np.any(actual[~real] != expected[~real])


def test_a_row_alone_gives_what_it_gives_in_a_padded_batch(model):
    padded = model.logits(np.pad(DOCUMENTS[3], (0, 4))[None].repeat(3, axis=0))
    alone = model.logits(DOCUMENTS[3][None])
    for row in padded:
        np.testing.assert_allclose(row[:7], alone[0], rtol=0, atol=TOLERANCE)


def test_left_padding_with_its_positions_and_validity_changes_nothing(model):
    document, pads = DOCUMENTS[3], 4
    tokens = np.concatenate([GARBAGE[0, :pads], document])[None]
    positions = np.maximum(np.arange(T) - pads, 0)[None]
    valid = (np.arange(T) >= pads)[None]
    actual = model.logits(
        tokens, positions=jnp.asarray(positions), key_valid=jnp.asarray(valid)
    )
    expected = model.logits(document[None])
    np.testing.assert_allclose(actual[0, pads:], expected[0], rtol=0, atol=TOLERANCE)
    assert np.isfinite(actual).all()
