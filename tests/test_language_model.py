from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relax import LanguageModel, SamplingConfig
from relax.model.parameters import parameter_shapes
from relax.sharding import MeshConfig, make_mesh
from relax.text.tokenizers import TokenizerConfig, make_tokenizer

B, T, V = 2, 7, 257
TOKENS = np.random.default_rng(0).integers(0, 256, (B, T))
# Logits reach 6; other orders of float32 sums move them by up to 3e-6.
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def model(make_config):
    """Bytes are its tokens; 63 rows of its tables are padding."""
    config = make_config(vocab_size=V)
    rng = np.random.default_rng(5)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(scale=0.5, size=leaf.shape), leaf.dtype),
        parameter_shapes(config),
    )
    tokenizer = make_tokenizer(TokenizerConfig(kind="bytes", encoding=None, path=None))
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, tensor=1))
    return LanguageModel(config, params, tokenizer, mesh)


@pytest.fixture(scope="module")
def plain(model):
    """Logits of TOKENS without any mask."""
    return np.asarray(model.logits(TOKENS))


def assert_equals_row_alone(model, logits, tokens):
    """Compares logits of a row's real tokens with those of the row by itself."""
    alone = np.asarray(model.logits(tokens[None]))[0]
    np.testing.assert_allclose(logits, alone, rtol=0, atol=TOLERANCE)


def test_logits_are_float32_over_the_vocabulary_without_padding(model, plain):
    assert model.config.padded_vocab_size == 320
    assert plain.dtype == np.float32
    assert plain.shape == (B, T, V)
    assert np.isfinite(plain).all()
    assert plain.std() > 0.5


def test_lengths_are_of_right_padded_rows(model):
    logits = model.logits(TOKENS, lengths=[4, 7])
    assert_equals_row_alone(model, logits[0, :4], TOKENS[0, :4])
    assert_equals_row_alone(model, logits[1], TOKENS[1])
    with pytest.raises(AssertionError):
        shorter = model.logits(TOKENS, lengths=[3, 7])
        assert_equals_row_alone(model, shorter[0, :4], TOKENS[0, :4])


@pytest.mark.parametrize("real", [slice(3, 7), slice(0, 5), slice(2, 6)])
def test_a_mask_of_keys_hides_padding_on_either_side(model, plain, real):
    """Positions count the real tokens, as transformers' do."""
    mask = np.zeros((B, T), int)
    mask[0, real], mask[1] = 1, 1
    logits = model.logits(TOKENS, attention_mask=mask)
    assert_equals_row_alone(model, logits[0, real], TOKENS[0, real])
    np.testing.assert_allclose(logits[1], plain[1], rtol=0, atol=TOLERANCE)
    if real.start:
        with pytest.raises(AssertionError):
            assert_equals_row_alone(model, plain[0, real], TOKENS[0, real])


def test_lengths_and_a_mask_of_keys_both_count(model):
    mask = np.ones((B, T), bool)
    mask[0, :2] = False
    logits = model.logits(TOKENS, lengths=[5, 7], attention_mask=mask)
    assert_equals_row_alone(model, logits[0, 2:5], TOKENS[0, 2:5])


def test_a_mask_of_queries_and_keys_is_added_to_causality(model, plain):
    """Tokens that do not see the first three are as if these were not there."""
    mask = np.ones((B, T, T), bool)
    np.testing.assert_allclose(
        model.logits(TOKENS, attention_mask=mask), plain, rtol=0, atol=TOLERANCE
    )
    mask[1, 3:, :3] = False
    logits = model.logits(TOKENS, attention_mask=mask)
    assert_equals_row_alone(model, logits[1, 3:], TOKENS[1, 3:])
    np.testing.assert_allclose(logits[0], plain[0], rtol=0, atol=TOLERANCE)
    with pytest.raises(AssertionError):
        assert_equals_row_alone(model, plain[1, 3:], TOKENS[1, 3:])


@pytest.mark.parametrize("shape", [(T,), (B, T + 1), (T, B), (B, 1, T, T), (1, T, T)])
def test_a_mask_of_another_shape_is_an_error(model, shape):
    with pytest.raises(ValueError, match=r"attention_mask has shape .*\(2, 7, 7\)"):
        model.logits(TOKENS, attention_mask=np.ones(shape))


def test_scores_are_logprobs_of_each_token_given_those_before_it(model, plain):
    scores = model.score(["hello", TOKENS[0].tolist(), [9]])
    assert [score.token_ids for score in scores] == [
        [104, 101, 108, 108, 111],
        TOKENS[0].tolist(),
        [9],
    ]
    logits = plain[0].astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    expected = logprobs[np.arange(T - 1), TOKENS[0, 1:]]
    assert scores[1].logprobs[0] is None
    np.testing.assert_allclose(scores[1].logprobs[1:], expected, rtol=0, atol=TOLERANCE)
    assert scores[2].logprobs == [None]
    with pytest.raises(AssertionError):
        shifted = logprobs[np.arange(1, T), TOKENS[0, 1:]]
        np.testing.assert_allclose(scores[1].logprobs[1:], shifted, 0, TOLERANCE)


def test_scores_do_not_depend_on_the_batch(model):
    rows = [TOKENS[0, :5].tolist(), TOKENS[1].tolist(), TOKENS[0, :2].tolist()]
    for one, other in zip(
        model.score(rows), model.score(rows, batch_size=1), strict=True
    ):
        np.testing.assert_allclose(one.logprobs[1:], other.logprobs[1:], 0, TOLERANCE)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "text 1 has 0 tokens; give 1 to 101 .model.max_position_embeddings=101"),
        ("a" * 102, "text 1 has 102 tokens; give 1 to 101"),
        ([3, 257], "text 1 holds ids from 3 to 257; give ids below model.vocab_size"),
    ],
)
def test_a_text_that_cannot_be_scored_is_named(model, text, message):
    with pytest.raises(ValueError, match=message):
        model.score(["fine", text])


NEW = SamplingConfig(max_new_tokens=19, ignore_eos=True, tokens_per_dispatch=8)


def test_completions_come_prompt_by_prompt_and_sample_by_sample(model):
    pairs = replace(NEW, num_return_sequences=2)
    first, second, third, fourth = model.generate(["ab", "cde"], pairs, batch_size=1)
    singles = model.generate(["ab", "cde"], NEW, batch_size=1)
    assert [first, third] == singles
    assert len({tuple(c.token_ids) for c in (first, second, third, fourth)}) == 4


def test_equal_prompts_are_different_inputs(model):
    first, second = model.generate(["ab", "ab"], NEW, batch_size=1)
    assert first.token_ids != second.token_ids


def test_texts_and_ids_are_the_same_prompts(model):
    assert model.generate(["ab"], NEW) == model.generate([[97, 98]], NEW)


def test_no_prompts_give_no_completions(model):
    assert model.generate([]) == [] == model.score([])


@pytest.mark.parametrize("stop", [None, slice(3, 5), slice(11, 14)])
def test_a_stream_joins_to_the_text_of_generate(model, stop):
    (whole,) = model.generate(["ab"], NEW)
    stops = () if stop is None else (whole.text[stop],)
    sampling = replace(NEW, stop_strings=stops)
    (completion,) = model.generate(["ab"], sampling)
    pieces = list(model.stream("ab", sampling))
    assert "".join(pieces) == completion.text
    assert all(pieces)
    if stop is None:
        assert completion.text == whole.text == model.tokenizer.decode(whole.token_ids)
        assert len(pieces) > 2
    else:
        assert completion.text == whole.text[: whole.text.index(stops[0])]


def test_new_parameters_take_effect(model, monkeypatch):
    (before,) = model.generate(["ab"], NEW)
    doubled = jax.tree.map(lambda leaf: leaf * 2, model.params)
    monkeypatch.setattr(model, "params", doubled)
    (after,) = model.generate(["ab"], NEW)
    assert before.token_ids != after.token_ids


def test_a_bare_text_where_a_list_belongs_is_an_error(model):
    for method in (model.generate, model.score):
        with pytest.raises(ValueError, match="'abc' is one text; give a list"):
            method("abc")
