import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relax.generation.decode import Rows, make_steps
from relax.generation.drafts import draft_tokens
from relax.model.llama import make_llama
from relax.sampling import SamplingConfig, sampling_params

GREEDY = SamplingConfig(temperature=0.0)
SCRIPT = [7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47]
LENGTHS = [3, 1, 5]
CAPACITY, CHUNK, NEVER = 19, 5, 99


class Run:
    """A batch of prompts, the first tokens of SCRIPT, under scripted steps."""

    def __init__(self, steps, configs, remaining, ignore_eos=False, stop_ids=(29, 41)):
        params, self.filters = sampling_params(configs)
        B = len(configs)
        self.steps, self.script = steps, jnp.asarray(SCRIPT + [0] * 64)
        text = np.zeros((B, CAPACITY), np.int32)
        for row, length in enumerate(LENGTHS[:B]):
            text[row, :length] = SCRIPT[:length]
        lengths = np.asarray(LENGTHS[:B], np.int32)
        zeros = np.zeros(B, np.uint32)
        self.rows = Rows(
            text=text,
            lengths=lengths,
            prompt_lengths=lengths,
            remaining=np.asarray(remaining, np.int32),
            seeds=zeros,
            inputs=np.arange(B, dtype=np.uint32),
            samples=zeros,
            ignore_eos=np.broadcast_to(ignore_eos, B),
            params=params,
            stop_ids=np.asarray(stop_ids, np.int32),
            logit_bias=None,
        )
        self.cache = steps.new_cache(B, CAPACITY)
        order = np.arange(B, dtype=np.int32)
        starts = np.zeros(B, np.int32)
        self.cache = steps.prefill(
            self.script, self.cache, text[:, :7], order, starts, lengths - 1
        )

    def decode(self, limit=CHUNK, patience=NEVER, drafts=0):
        """Returns each row's tokens of one dispatch, and goes on from there."""
        self.cache, made = self.steps.decode(
            self.script,
            self.cache,
            self.rows,
            limit,
            patience,
            chunk=CHUNK,
            drafts=drafts,
            filters=self.filters,
        )
        text, lengths = self.rows.text.copy(), np.asarray(self.rows.lengths)
        tokens = [
            np.asarray(made.choices.tokens[row, :count]).tolist()
            for row, count in enumerate(made.counts)
        ]
        for row, new in enumerate(tokens):
            text[row, lengths[row] : lengths[row] + len(new)] = new
        self.rows = self.rows._replace(
            text=text, lengths=lengths + made.counts, remaining=made.remaining
        )
        self.made = made
        return tokens


@pytest.fixture(scope="module")
def steps(config, scripted_apply):
    return make_steps(scripted_apply, config, num_ids=67)


def test_the_first_tokens_are_those_after_each_prompt(steps):
    run = Run(steps, [GREEDY] * 3, [5, 5, 5])
    assert run.decode(limit=1) == [[17], [11], [23]]
    np.testing.assert_array_equal(run.made.remaining, [4, 4, 4])
    np.testing.assert_array_equal(run.cache.lengths, LENGTHS)


def test_rows_that_have_ended_make_nothing_and_keep_their_length(steps):
    run = Run(steps, [GREEDY] * 3, [1, 4, 8], ignore_eos=True)
    assert run.decode() == [[17], [11, 13, 17, 19], [23, 29, 31, 37, 41]]
    np.testing.assert_array_equal(run.made.remaining, [0, 0, 3])
    np.testing.assert_array_equal(run.cache.lengths, [3, 4, 9])
    assert run.decode() == [[], [], [43, 47, 0]]


def test_every_stop_id_ends_a_row_and_is_kept(steps):
    run = Run(steps, [GREEDY] * 3, [9, 9, 9], ignore_eos=[False, True, False])
    assert run.decode() == [[17, 19, 23, 29], [11, 13, 17, 19, 23], [23, 29]]
    np.testing.assert_array_equal(run.made.remaining, [0, 4, 0])


def test_a_row_that_may_have_no_token_gets_none(steps):
    run = Run(steps, [GREEDY] * 3, [0, 2, 0])
    assert run.decode() == [[], [11, 13], []]
    assert run.decode() == [[], [], []]


@pytest.mark.parametrize(
    ("limit", "patience", "counts"),
    [
        (2, NEVER, [1, 2, 2]),
        (5, NEVER, [1, 5, 3]),
        (5, 1, [1, 1, 1]),
        (5, 2, [1, 3, 3]),
    ],
)
def test_a_dispatch_ends_at_its_limit_or_where_rows_have_ended(
    steps, limit, patience, counts
):
    run = Run(steps, [GREEDY] * 3, [1, 9, 3], ignore_eos=True)
    assert [len(row) for row in run.decode(limit, patience)] == counts


def test_rows_idle_from_the_start_do_not_end_a_dispatch(steps):
    run = Run(steps, [GREEDY] * 3, [0, 9, 0], ignore_eos=True)
    assert [len(row) for row in run.decode(patience=1)] == [0, 5, 0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_ids_that_the_tokenizer_lacks_are_never_chosen(
    config, scripted_apply, temperature
):
    """The script wants 11, 13 and 17; logprobs are still those of the whole model."""
    steps = make_steps(scripted_apply, config, num_ids=11)
    sampling = [SamplingConfig(temperature=temperature)] * 3
    tokens = np.array(Run(steps, sampling, [4, 4, 4], stop_ids=()).decode())
    assert tokens.shape == (3, 4)
    assert tokens.min() >= 0 and tokens.max() < 11


def test_rows_of_one_batch_have_their_own_parameters(steps):
    """At temperature 1,000 the script is one voice among 67, of which min-p lets 1."""
    wild = SamplingConfig(temperature=1e3)
    tame = SamplingConfig(temperature=1e3, min_p=1.0)
    run = Run(steps, [GREEDY, wild, tame], [9, 9, 9], ignore_eos=True)
    tokens = np.concatenate([run.decode(), run.decode()], axis=1)
    assert tokens[0, :6].tolist() == SCRIPT[3:9]
    assert tokens[2, :6].tolist() == SCRIPT[5:11]
    assert np.sum(tokens[1, :6] == SCRIPT[1:7]) <= 1


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
    assert tokens != expected


@pytest.mark.parametrize("drafts", [0, 3])
@pytest.mark.parametrize("scan_layers", [True, False])
def test_no_step_needs_room_for_a_second_cache(
    make_config, make_params, steps, scan_layers, drafts
):
    """A layer's buffer of keys has 1.6 MB, more than all else of so small a model."""
    config = make_config(scan_layers=scan_layers, max_position_embeddings=5003)
    scripted = Run(steps, [GREEDY] * 3, [5, 5, 5])
    steps = make_steps(make_llama(config).apply, config, num_ids=67)
    rows = scripted.rows._replace(text=np.zeros((3, 5003), np.int32))
    params, cache = make_params(config), steps.new_cache(3, 5003)
    buffer = sum(x.nbytes for x in jax.tree.leaves(cache.keys)) // 3
    places = np.arange(3, dtype=np.int32)
    options = {"chunk": CHUNK, "drafts": drafts, "filters": scripted.filters}
    for lowered in (
        steps.decode.lower(params, cache, rows, 5, 3, **options),
        steps.prefill.lower(params, cache, rows.text[:, :7], *[places] * 3),
        steps.copy.lower(cache, np.zeros((3, 3), np.int32), 2),
    ):
        assert lowered.compile().memory_analysis().temp_size_in_bytes < buffer


def test_the_cache_that_was_given_is_used_up(steps):
    run = Run(steps, [GREEDY] * 3, [5, 5, 5])
    given = run.cache.keys
    run.decode()
    assert given.is_deleted()
    assert not jax.tree.leaves(run.cache)[0].is_deleted()


# Speculation.

LOOP = [7, 11, 13, 7, 11, 13, 7, 11, 17, 7, 11, 13, 7, 11, 13, 7, 11, 13]


@pytest.mark.parametrize("drafts", [1, 2, 4])
def test_guesses_change_no_token_and_are_counted(config, scripted_apply, drafts):
    """From five tokens on: 13 7 11 is guessed and right, 13 for 17 is wrong."""
    steps = make_steps(scripted_apply, config, num_ids=67)
    run = Run(steps, [GREEDY] * 3, [12, 6, 13], stop_ids=())
    text = np.zeros((3, CAPACITY), np.int32)
    for row, length in enumerate((5, 4, 5)):
        text[row, :length] = LOOP[:length]
    lengths = np.array([5, 4, 5], np.int32)
    run.rows = run.rows._replace(text=text, lengths=lengths, prompt_lengths=lengths)
    run.script = jnp.asarray(LOOP + [0] * 64)
    made = [[], [], []]
    drafted = accepted = dispatches = 0
    while (np.asarray(run.rows.remaining) > 0).any():
        for row, new in enumerate(run.decode(drafts=drafts)):
            made[row] += new
        drafted += int(run.made.drafted)
        accepted += int(run.made.accepted)
        dispatches += 1
    assert made == [LOOP[5:17], LOOP[4:10], LOOP[5:18]]
    assert 0 < accepted < drafted
    assert accepted >= 12


def test_guesses_are_what_followed_the_longest_match():
    text = [
        [1, 2, 3, 9, 4, 2, 3, 8, 5, 2, 3, 0, 0],  # "2 3": its last place was before 8
        [7, 1, 2, 3, 6, 2, 3, 5, 1, 2, 3, 0, 0],  # "1 2 3" goes before the later "2 3"
        [4, 5, 6, 7, 8, 9, 1, 2, 3, 0, 0, 0, 0],  # nothing
        [5, 5, 5, 5, 5, 0, 0, 0, 0, 0, 0, 0, 0],  # round and round
    ]
    lengths = jnp.array([11, 11, 9, 5])
    drafts, known = jax.jit(draft_tokens, static_argnums=2)(
        jnp.asarray(text), lengths, 3
    )
    np.testing.assert_array_equal(known, [3, 3, 0, 3])
    assert drafts[0].tolist() == [8, 5, 2]
    assert drafts[1].tolist() == [6, 2, 3]
    assert drafts[3].tolist() == [5, 5, 5]
