import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relax.generation.decode import PAD, Rows, make_steps
from relax.sampling import SamplingConfig, row_key, sampling_params

GREEDY = SamplingConfig(temperature=0.0)
SCRIPT = [7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47]
LENGTHS = [3, 1, 5]


class Run:
    """A batch of prompts, the first tokens of SCRIPT, under scripted steps."""

    def __init__(self, steps, configs, remaining, ignore_eos=False, stop_ids=(29, 41)):
        params, self.filters = sampling_params(configs)
        B = len(configs)
        keys = jnp.stack([row_key(0, row, 0) for row in range(B)])
        ignore_eos = jnp.broadcast_to(jnp.asarray(ignore_eos), B)
        self.rows = Rows(keys, params, ignore_eos, jnp.asarray(stop_ids, jnp.int32))
        self.steps, self.script = steps, jnp.asarray(SCRIPT + [0] * 64)
        tokens = np.zeros((B, 7), np.int32)
        for row, length in enumerate(LENGTHS[:B]):
            tokens[row, :length] = SCRIPT[:length]
        self.state, first = steps.prefill(
            self.script,
            tokens,
            jnp.asarray(LENGTHS[:B]),
            jnp.asarray(remaining),
            self.rows,
            capacity=19,
            filters=self.filters,
        )
        self.first = np.asarray(first.tokens).tolist()

    def decode(self):
        """Returns the tokens of one dispatch of five."""
        self.state, choice = self.steps.decode(
            self.script, self.state, self.rows, chunk=5, filters=self.filters
        )
        return np.asarray(choice.tokens).tolist()


@pytest.fixture(scope="module")
def steps(config, scripted_apply):
    return make_steps(scripted_apply, config, num_ids=67)


def test_prefill_gives_the_token_after_each_prompt(steps):
    run = Run(steps, [GREEDY] * 3, [5, 5, 5])
    assert run.first == [[17], [11], [23]]
    np.testing.assert_array_equal(run.state.remaining, [4, 4, 4])
    np.testing.assert_array_equal(run.state.cache.lengths, LENGTHS)


def test_rows_that_have_ended_repeat_pad_and_keep_their_length(steps):
    run = Run(steps, [GREEDY] * 3, [1, 3, 7], ignore_eos=True)
    assert run.decode() == [
        [PAD, PAD, PAD, PAD, PAD],
        [13, 17, PAD, PAD, PAD],
        [29, 31, 37, 41, 43],
    ]
    np.testing.assert_array_equal(run.state.remaining, [0, 0, 1])
    np.testing.assert_array_equal(run.state.cache.lengths, [3, 3, 10])
    assert [row[0] for row in run.decode()] == [PAD, PAD, 47]


def test_every_stop_id_ends_a_row_and_is_kept(steps):
    run = Run(steps, [GREEDY] * 3, [9, 9, 9], ignore_eos=[False, True, False])
    assert run.decode() == [
        [19, 23, 29, PAD, PAD],
        [13, 17, 19, 23, 29],
        [29, PAD, PAD, PAD, PAD],
    ]
    np.testing.assert_array_equal(run.state.remaining, [0, 3, 0])


def test_a_row_that_may_have_no_token_gets_none(steps):
    run = Run(steps, [GREEDY] * 3, [0, 2, 0])
    assert run.first == [[PAD], [11], [PAD]]
    assert [row[:2] for row in run.decode()] == [[PAD, PAD], [13, PAD], [PAD, PAD]]


def test_seen_holds_prompt_and_completion_and_no_padding(steps):
    penalised = SamplingConfig(temperature=0.0, repetition_penalty=1.5)
    run = Run(steps, [penalised] * 3, [1, 3, 3], ignore_eos=True)
    run.decode()
    seen = [set(np.flatnonzero(row).tolist()) for row in run.state.seen]
    assert seen == [{7, 11, 13, 17}, {7, 11, 13, 17}, {7, 11, 13, 17, 19, 23, 29, 31}]


def test_text_holds_prompt_and_completion_in_order(steps):
    """Pairs do not repeat in SCRIPT, so that it goes on as it does without."""
    apart = SamplingConfig(temperature=0.0, no_repeat_ngram_size=2)
    run = Run(steps, [apart, apart, GREEDY], [1, 3, 3], ignore_eos=True)
    run.decode()
    for row, count in enumerate([4, 4, 8]):
        assert run.state.text[row, :count].tolist() == SCRIPT[:count]
    assert run.state.text.shape == (3, 19)
    assert run.state.seen is None
    assert Run(steps, [GREEDY] * 3, [1, 3, 3]).state.text is None


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_ids_that_the_tokenizer_lacks_are_never_chosen(
    config, scripted_apply, temperature
):
    """The script wants 11, 13 and 17; logprobs are still those of the whole model."""
    steps = make_steps(scripted_apply, config, num_ids=11)
    sampling = [SamplingConfig(temperature=temperature)] * 3
    run = Run(steps, sampling, [4, 4, 4], stop_ids=())
    tokens = np.concatenate([run.first, run.decode()], axis=1)[:, :4]
    assert tokens.min() >= 0 and tokens.max() < 11


def test_rows_of_one_batch_have_their_own_parameters(steps):
    """At temperature 1,000 the script is one voice among 67, of which min-p lets 1."""
    wild = SamplingConfig(temperature=1e3)
    tame = SamplingConfig(temperature=1e3, min_p=1.0)
    run = Run(steps, [GREEDY, wild, tame], [9, 9, 9], ignore_eos=True)
    tokens = np.concatenate([run.first, run.decode()], axis=1)
    assert tokens[0].tolist() == SCRIPT[3:9]
    assert tokens[2].tolist() == SCRIPT[5:11]
    assert np.sum(tokens[1] == SCRIPT[1:7]) <= 1


def greedy_tokens(model, prompts, sampling):
    """Returns what a model decodes with its cache, all prompts in one batch."""
    return [completion.token_ids for completion in model.generate(prompts, sampling)]


@pytest.fixture(scope="module")
def ragged():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 66, length).tolist() for length in (1, 5, 29, 64)]


@pytest.fixture(scope="module")
def expected(full_forward, ragged):
    return [full_forward.greedy(prompt, 23) for prompt in ragged]


def test_cached_greedy_tokens_are_those_of_a_loop_of_full_forwards(
    model, ragged, expected, greedy
):
    assert greedy_tokens(model, ragged, greedy) == expected
    assert len({tuple(tokens) for tokens in expected}) == len(ragged)


def test_a_shifted_position_in_decoding_changes_the_greedy_tokens(
    model_with_shifted_positions, ragged, expected, greedy
):
    tokens = greedy_tokens(model_with_shifted_positions, ragged, greedy)
    assert [row[0] for row in tokens] == [row[0] for row in expected]  # of the prefill
    assert tokens != expected


def test_decode_gives_its_cache_back_in_the_buffers_it_was_given(steps):
    run = Run(steps, [GREEDY] * 3, [5, 5, 5])
    given = run.state.cache.keys
    run.decode()
    assert given.is_deleted()
    assert not jax.tree.leaves(run.state.cache)[0].is_deleted()
