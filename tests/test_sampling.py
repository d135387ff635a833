import inspect
import json
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from relax.config import to_dataclass
from relax.ops.logprobs import compute_logits
from relax.sampling import (
    SamplingConfig,
    TextState,
    append,
    choose_tokens,
    process_logits,
    row_key,
    sampling_params,
    start_text,
    warp_logits,
)

CONF = Path(__file__).parents[1] / "conf"
# Upper 0.001 quantiles of the chi-square distribution, by degrees of freedom.
CHI_SQUARE = {1: 10.83, 3: 16.27, 4: 18.47, 9: 27.88, 10: 29.59}
LOGITS = np.array([2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, 0.2, 0.8, 1.9, -0.3], "f4")


def choose(
    logits,
    configs,
    *,
    keys=None,
    texts=None,
    prompts=None,
    seen=None,
    bias=None,
    stops=(),
    constraint=None,
    num_ids=None,
):
    """Returns the choice for rows of logits; keys of row 0, 1 ... by default.

    texts: of each row, none by default. prompts: how much of each is prompt, all by
    default. seen: marks in place of those of the texts.
    """
    B, V = logits.shape
    params, filters = sampling_params(configs, constraint)
    if keys is None:
        keys = jax.vmap(lambda row: row_key(0, 0, row))(jnp.arange(B))
    text, lengths = padded(texts or [[]] * B)
    prompts = lengths if prompts is None else jnp.asarray(prompts)
    state = start_text(text, lengths, prompts, filters, V)
    if seen is not None:
        state = state._replace(seen=seen)
    return choose_after(logits, state, params, filters, keys, bias, stops, num_ids)


def choose_after(
    logits, state, params, filters, keys, bias=None, stops=(), num_ids=None
):
    """Returns the choice for rows of logits after texts."""
    stops = jnp.asarray(stops, jnp.int32)
    num_ids = num_ids or logits.shape[1]
    return _choose(logits, keys, state, params, filters, bias, stops, num_ids)


_choose = jax.jit(choose_tokens, static_argnums=(4, 7))


def padded(texts):
    """Returns texts, with ids that do not count after them, and their lengths."""
    width = 1 + max(map(len, texts))
    rows = [[*text, *[1] * (width - len(text))] for text in texts]
    return jnp.asarray(rows, jnp.int32), jnp.asarray([len(text) for text in texts])


def probabilities(logits):
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def assert_drawn_from(expected, tokens):
    """Pearson's chi-square test at the level of 0.001; what can't be must not be."""
    counts = np.bincount(tokens, minlength=len(expected))
    possible = expected > 0
    assert not counts[~possible].any()
    mean = len(tokens) * expected[possible]
    statistic = np.sum((counts[possible] - mean) ** 2 / mean)
    assert statistic < CHI_SQUARE[possible.sum() - 1]


DRAWS = 20_000


def draw(config, *, by_position=False):
    """Returns many draws with the logits LOGITS, for as many keys or positions."""
    logits = jnp.tile(LOGITS, (DRAWS, 1))
    if not by_position:
        return np.asarray(choose(logits, [config] * DRAWS).tokens)
    keys, lengths = jnp.broadcast_to(row_key(0, 0, 0), DRAWS), jnp.arange(DRAWS)
    state = TextState(jnp.zeros((DRAWS, 1), jnp.int32), lengths, lengths, None, None)
    params, filters = sampling_params([config] * DRAWS)
    return np.asarray(choose_after(logits, state, params, filters, keys).tokens)


@pytest.mark.parametrize("by_position", [False, True])
def test_draws_have_the_frequencies_of_the_softmax(by_position):
    tokens = draw(SamplingConfig(temperature=0.7), by_position=by_position)
    assert_drawn_from(probabilities(LOGITS / 0.7), tokens)
    with pytest.raises(AssertionError):
        assert_drawn_from(probabilities(LOGITS), tokens)


def test_draws_have_the_frequencies_of_what_the_filters_leave():
    tokens = draw(SamplingConfig(temperature=1.3, top_k=4))
    filtered = np.where(LOGITS >= 1.5, LOGITS / 1.3, -np.inf)  # 2.0 and 1.9 too
    filtered[2] = LOGITS[2] / 1.3  # the fourth largest is the 1.0
    assert_drawn_from(probabilities(filtered), tokens)
    with pytest.raises(AssertionError):
        assert_drawn_from(probabilities(LOGITS / 1.3), tokens)


def test_padded_ids_are_never_drawn():
    """Hidden states are such that the padded rows 11 to 63 would be likely ones."""
    rng = np.random.default_rng(0)
    hidden, table = rng.normal(size=(DRAWS, 5)), rng.normal(size=(64, 5))
    wild = [SamplingConfig(temperature=10.0)] * DRAWS

    def drawn(vocab_size):
        logits = compute_logits(
            jnp.asarray(hidden, jnp.float32), jnp.asarray(table, "f4"), vocab_size
        )
        return np.asarray(choose(logits, wild).tokens)

    assert set(drawn(11)) == set(range(11))
    assert drawn(64).max() > 11


def test_ids_from_num_ids_on_are_never_chosen_but_keep_their_share():
    """Of 11 ids only 7 may be chosen: the 1.9 of id 9 may not."""
    logits = jnp.tile(LOGITS, (2, 1)).at[:, 0].set(-5.0)
    configs = [SamplingConfig(temperature=t) for t in (0.0, 1e-3)]
    choice = choose(logits, configs, num_ids=7)
    np.testing.assert_array_equal(choice.tokens, [1, 1])
    expected = np.log(probabilities(np.asarray(logits[0])))[1]
    np.testing.assert_allclose(choice.logprobs, [expected] * 2, 1e-6)
    np.testing.assert_allclose(choice.sampled_logprobs, [0.0, 0.0], atol=1e-6)


def test_greedy_takes_the_first_of_equals_and_surely():
    logits = jnp.array([[0.0, 3.0, 1.0, 3.0], [2.0, 2.0, 2.0, 2.0]])
    choice = choose(logits, [SamplingConfig(temperature=0.0)] * 2)
    np.testing.assert_array_equal(choice.tokens, [1, 0])
    np.testing.assert_array_equal(choice.sampled_logprobs, [0.0, 0.0])
    total = 1 + 2 * np.exp(3) + np.exp(1)
    np.testing.assert_allclose(
        choice.logprobs, [3 - np.log(total), -np.log(4)], rtol=1e-6
    )


def test_greedy_and_sampled_rows_share_a_batch():
    """The greedy row heeds its penalty; no temperature or filter touches it."""
    logits = jnp.tile(LOGITS, (2, 1))
    greedy = SamplingConfig(temperature=0.0, repetition_penalty=4.0)
    narrow = SamplingConfig(temperature=0.5, top_k=1)
    choice = choose(logits, [greedy, narrow], texts=[[0], []])
    np.testing.assert_array_equal(choice.tokens, [9, 0])
    np.testing.assert_allclose(
        choice.logprobs, np.log(probabilities(LOGITS))[[9, 0]], 1e-5
    )


def test_each_row_has_its_own_size_of_ngrams_that_may_not_repeat():
    """After 9, 0, 9 a 0 would repeat a pair; the 9 and the 0 came already alone."""
    logits = jnp.tile(LOGITS, (4, 1))
    sizes = (0, 1, 2, 3)
    configs = [SamplingConfig(temperature=0.0, no_repeat_ngram_size=n) for n in sizes]
    choice = choose(logits, configs, texts=[[9, 0, 9]] * 4)
    np.testing.assert_array_equal(choice.tokens, [0, 1, 9, 0])
    expected = np.log(probabilities(LOGITS))[[0, 1, 9, 0]]
    np.testing.assert_allclose(choice.logprobs, expected, 1e-5)


def test_a_draw_has_the_frequencies_of_what_repeats_no_ngram():
    """Ids 0 to 8 are gone; the penalty halves the 1.9 of id 9 before."""
    config = SamplingConfig(
        temperature=0.7, no_repeat_ngram_size=1, repetition_penalty=2.0
    )
    tokens = choose(
        jnp.tile(LOGITS, (DRAWS, 1)),
        [config] * DRAWS,
        seen=jnp.zeros((DRAWS, 11), bool).at[:, 9].set(True),
        texts=[list(range(9))] * DRAWS,
    ).tokens
    filtered = np.where(np.arange(11) < 9, -np.inf, LOGITS)
    filtered[9] = 0.95
    assert_drawn_from(probabilities(filtered / 0.7), np.asarray(tokens))


def test_a_draw_depends_on_seed_input_sample_and_position():
    config = SamplingConfig()
    logits = jnp.zeros((5, 1009))
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0)]
    tokens = choose(
        logits,
        [config] * 5,
        keys=jnp.stack([row_key(*key) for key in keys]),
        texts=[[], [], [], [], [0]],
    ).tokens
    assert len(set(tokens.tolist())) == 5
    again = choose(logits[:1], [config], keys=row_key(0, 0, 0)[None]).tokens
    assert again[0] == tokens[0]
    assert row_key(2**32 - 1, 0, 0) != row_key(0, 0, 0)


def sampling_of(case):
    """Returns the settings of a peer's case."""
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    return SamplingConfig(**{n: case[n] for n in names if case[n] is not None})


def compare_with_peer(cases):
    """Compares what 1,024 draws show of each row, and with what logprobs.

    Cases of one vocabulary run as one batch. Returns how many rows were compared.
    """
    count = 0
    for V in {len(case["probs"][0]) for case in cases}:
        rows = [
            (case, row)
            for case in cases
            for row in range(len(case["scores"]))
            if len(case["probs"][0]) == V
        ]
        for (case, row), found in zip(rows, drawn_logprobs(rows), strict=True):
            kept, probs = set(case["kept"][row]), case["probs"][row]
            assert found.keys() <= kept
            # Drawing none of these has a chance of one in a million.
            assert {t for t in kept if probs[t] > 0.0135} <= found.keys()
            for token, logprob in found.items():
                assert abs(np.exp(logprob) - probs[token]) <= 1e-6
            count += 1
    return count


def drawn_logprobs(rows, draws=1024):
    """Returns a dict of token to logprob for each (case, row)."""
    logits = np.array([case["scores"][row] for case, row in rows], np.float32)
    texts = [case["input_ids"][row] if case["input_ids"] else [] for case, row in rows]
    choice = choose(
        jnp.asarray(np.repeat(logits, draws, axis=0)),
        [config for case, _ in rows for config in [sampling_of(case)] * draws],
        texts=[text for text in texts for _ in range(draws)],
    )
    columns = choice.tokens, choice.sampled_logprobs
    tokens, logprobs = (np.split(np.asarray(x), len(rows)) for x in columns)
    return [
        dict(zip(row_tokens.tolist(), row_logprobs.tolist(), strict=True))
        for row_tokens, row_logprobs in zip(tokens, logprobs, strict=True)
    ]


@pytest.fixture(scope="module")
def peer_cases(oracle_dir):
    path = oracle_dir / "hf_logits_processors.json"
    return json.loads(path.read_text())["cases"]


def test_the_order_of_the_filters_is_that_of_transformers(peer_cases):
    assert len(peer_cases) == 19
    assert compare_with_peer(peer_cases) == 15 * 2 + 4


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0.5),
        ("top_k", 2),
        ("top_p", 0.3),
        ("min_p", 0.5),
        ("repetition_penalty", 3.0),
    ],
)
def test_every_setting_counts_in_the_comparison(peer_cases, name, value):
    (case, *_) = [c for c in peer_cases if c[name] is not None]
    with pytest.raises(AssertionError):
        compare_with_peer([{**case, name: value}])


@partial(jax.jit, static_argnums=(3, 6))
def left(logits, state, params, filters, bias, stops, num_ids):
    """Returns what the processors leave, and what is drawn from."""
    shaped = process_logits(logits, state, params, filters, bias, stops, num_ids)
    return shaped, warp_logits(shaped, params, filters)


NO_STOPS = jnp.zeros(0, jnp.int32)


def test_what_is_drawn_from_is_that_of_transformers(peer_cases):
    assert len(peer_cases) == 19
    for case in peer_cases:
        logits = jnp.asarray(case["scores"], jnp.float32)
        B, V = logits.shape
        text, lengths = padded(case["input_ids"] or [[]] * B)
        params, filters = sampling_params([sampling_of(case)] * B)
        state = start_text(text, lengths, lengths, filters, V)
        _, warped = left(logits, state, params, filters, None, NO_STOPS, V)
        kept = [np.flatnonzero(np.isfinite(row)).tolist() for row in np.asarray(warped)]
        assert kept == case["kept"], case
        # The peer's float32 softmax sums in another order.
        np.testing.assert_allclose(jax.nn.softmax(warped), case["probs"], 0, 3e-7)


# What the live peer is compared over: with settings of a row's own, and for all rows.
V, T, STOPS, BIAS = 31, 13, (2, 11), {3: 1.5, 5: -2.0, 7: -np.inf}
SETTINGS = (
    {},
    {"temperature": 0.0, "repetition_penalty": 1.7, "no_repeat_ngram_size": 1},
    {"temperature": 0.7, "repetition_penalty": 1.3, "top_k": 9},
    {"temperature": 1.4, "no_repeat_ngram_size": 2, "min_new_tokens": 5, "top_p": 0.8},
    {"top_k": 20, "min_p": 0.05, "typical_p": 0.6},
    {"typical_p": 0.3},
    {"repetition_penalty": 0.8, "min_new_tokens": 3, "top_p": 0.95, "typical_p": 0.9},
    {
        "temperature": 1.3,
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 2,
        "min_new_tokens": 4,
        "top_k": 17,
        "top_p": 0.9,
        "min_p": 0.03,
        "typical_p": 0.8,
    },
)
REPEATS = 5


@pytest.fixture(scope="module")
def transformers_model():
    """A model whose `generate` makes the list of processors."""
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1}
    config = transformers.LlamaConfig(vocab_size=V, **sizes, **heads)
    return transformers.LlamaForCausalLM(config)


def their_logits(model, fields, logits, ids, made, together):
    """Returns a row's logits from the list that `generate` of transformers makes."""
    import torch
    import transformers

    fields = {"temperature": 1.0, "top_k": 0, **fields}
    sampled = fields["temperature"] > 0
    if not sampled:
        fields.pop("temperature")
    config = transformers.GenerationConfig(do_sample=sampled, num_beams=1, **fields)
    config._eos_token_tensor = torch.tensor(STOPS)
    if together:
        config.sequence_bias = {(token,): value for token, value in BIAS.items()}

    def allowed(_, text):
        return [token for token in range(V) if (token + int(text[-1])) % 3]

    processors = model._get_logits_processor(
        config,
        input_ids_seq_length=len(ids) - made,
        prefix_allowed_tokens_fn=allowed if together else None,
    )
    return processors(torch.tensor(ids[None]), torch.tensor(logits[None])).numpy()[0]


def same_thirds(state):
    """The constraint that `their_logits` has for all rows."""
    last = jnp.take_along_axis(state.text, state.lengths[:, None] - 1, axis=1)
    return (jnp.arange(V) + last) % 3 != 0


def rows_unlike_theirs(model, together, changes=None):
    """Returns the settings of rows that transformers makes something else of."""
    rng = np.random.default_rng(7)
    settings = SETTINGS * REPEATS
    B = len(settings)
    logits = rng.normal(scale=2.0, size=(B, V)).astype(np.float32)
    ids = rng.integers(0, V, (B, T))
    ids[:, 9:] = ids[:, 3:7]  # n-grams come again
    made = rng.integers(0, 8, B)
    configs = [SamplingConfig(**{**fields, **(changes or {})}) for fields in settings]
    params, filters = sampling_params(configs, same_thirds if together else None)
    bias = np.zeros(V, np.float32)
    bias[list(BIAS)] = list(BIAS.values())
    state = start_text(ids, jnp.full(B, T), T - made, filters, V)
    bias = jnp.asarray(bias) if together else None
    shaped, warped = left(logits, state, params, filters, bias, jnp.asarray(STOPS), V)
    unlike = []
    for row, setting in enumerate(settings):
        ours = warped if setting.get("temperature") != 0 else shaped
        theirs = their_logits(
            model, setting, logits[row], ids[row], made[row].item(), together
        )
        close = np.allclose(jax.nn.softmax(ours[row]), jax.nn.softmax(theirs), 0, 1e-6)
        if not close or (np.isfinite(ours[row]) != np.isfinite(theirs)).any():
            unlike.append(setting)
    return unlike


@pytest.mark.parametrize("together", [False, True])
def test_processors_have_the_order_of_transformers_generate(
    transformers_model, together
):
    """Each row with settings of its own; bias and constraint are of all rows."""
    assert rows_unlike_theirs(transformers_model, together) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"repetition_penalty": 1.4},
        {"no_repeat_ngram_size": 3},
        {"min_new_tokens": 2},
        {"temperature": 1.1},
        {"top_k": 12},
        {"top_p": 0.7},
        {"min_p": 0.2},
        {"typical_p": 0.5},
    ],
)
def test_every_setting_counts_in_the_comparison_of_the_order(
    transformers_model, changes
):
    assert rows_unlike_theirs(transformers_model, True, changes)


def test_penalties_of_counts_look_at_the_completion_alone():
    """The prompt 0 0 9 counts for nothing; of 0 1 1 1, id 1 is told three times."""
    logits = jnp.tile(LOGITS, (4, 1))
    base = SamplingConfig(temperature=0.0)
    configs = [
        base,
        replace(base, frequency_penalty=0.15),
        replace(base, presence_penalty=0.15),
        replace(base, presence_penalty=-1.0, frequency_penalty=0.5),
    ]
    text = [0, 0, 9, 0, 1, 1, 1]
    params, filters = sampling_params(configs)
    state = start_text(*padded([text] * 4), jnp.full(4, 3), filters, 11)
    np.testing.assert_array_equal(state.counts, np.tile([1, 3, *[0] * 9], (4, 1)))
    shaped, _ = left(logits, state, params, filters, None, NO_STOPS, 11)
    expected = np.tile(LOGITS, (4, 1))
    expected[1, :2] = [2.0 - 0.15, 1.5 - 0.45]
    expected[2, :2] = [2.0 - 0.15, 1.5 - 0.15]
    expected[3, :2] = [2.0 + 1.0 - 0.5, 1.5 + 1.0 - 1.5]
    np.testing.assert_allclose(shaped, expected, 1e-6)
    keys = jax.vmap(lambda row: row_key(0, 0, row))(jnp.arange(4))
    choice = choose_after(logits, state, params, filters, keys)
    np.testing.assert_array_equal(choice.tokens, [0, 9, 9, 0])


def test_the_penalty_of_repetition_comes_before_those_of_counts():
    config = SamplingConfig(
        temperature=0.0, repetition_penalty=2.0, presence_penalty=0.25
    )
    params, filters = sampling_params([config])
    state = start_text(*padded([[9, 0]]), jnp.array([1]), filters, 11)
    shaped, _ = left(LOGITS[None], state, params, filters, None, NO_STOPS, 11)
    assert shaped[0, 0] == 2.0 / 2 - 0.25
    assert shaped[0, 9] == np.float32(1.9) / 2  # the prompt's


def test_no_stop_id_comes_before_min_new_tokens():
    """Ids 0 and 9 end a row; after 2 and 3 tokens they are the likeliest again."""
    logits = jnp.tile(LOGITS, (5, 1))
    texts = [[4] * (2 + made) for made in (0, 1, 2, 3, 0)]
    configs = [SamplingConfig(temperature=0.0, min_new_tokens=2)] * 4
    configs.append(SamplingConfig(temperature=0.0))
    choice = choose(logits, configs, texts=texts, prompts=[2] * 5, stops=(0, 9))
    np.testing.assert_array_equal(choice.tokens, [1, 1, 0, 0, 0])
    expected = np.log(probabilities(LOGITS))[[1, 1, 0, 0, 0]]
    np.testing.assert_allclose(choice.logprobs, expected, 1e-5)


def test_a_logit_bias_moves_the_choice_and_not_the_model_s_logprobs():
    bias = np.zeros(11, np.float32)
    bias[[0, 6, 9]] = [-np.inf, 3.0, -0.5]
    configs = [SamplingConfig(temperature=0.0), SamplingConfig(temperature=1e-3)]
    choice = choose(jnp.tile(LOGITS, (2, 1)), configs, bias=bias)
    np.testing.assert_array_equal(choice.tokens, [6, 6])
    expected = np.log(probabilities(LOGITS))[6]
    np.testing.assert_allclose(choice.logprobs, [expected] * 2, 1e-5)
    np.testing.assert_allclose(choice.sampled_logprobs, [0.0, 0.0], atol=1e-6)


def test_a_draw_has_the_frequencies_that_a_logit_bias_gives():
    bias = np.zeros(11, np.float32)
    bias[[0, 6]] = [-np.inf, 2.5]
    logits = jnp.tile(LOGITS, (DRAWS, 1))
    tokens = choose(logits, [SamplingConfig()] * DRAWS, bias=bias).tokens
    assert_drawn_from(probabilities(LOGITS + bias), np.asarray(tokens))


def test_a_draw_has_the_frequencies_of_what_is_typical():
    tokens = draw(SamplingConfig(typical_p=0.5))
    probs = probabilities(LOGITS)
    distance = np.abs(-np.log(probs) + np.sum(probs * np.log(probs)))
    order = np.argsort(distance)
    count = 1 + np.sum(np.cumsum(probs[order]) < 0.5)
    assert 1 < count < 11
    typical = np.full(11, -np.inf)
    typical[order[:count]] = LOGITS[order[:count]]
    assert_drawn_from(probabilities(typical), tokens)


def test_alternatives_are_the_likeliest_under_the_full_softmax():
    """Filters change them not, ids that can't be chosen are none; equals by id."""
    logits = jnp.asarray([LOGITS, [0.0, 3.0, 1.0, 3.0, *[-1.0] * 5, 4.0, 1.0]])
    plain = SamplingConfig(temperature=0.0, num_top_logprobs=3)
    narrow = SamplingConfig(top_k=1, num_top_logprobs=1)
    choice = choose(logits, [plain, narrow], num_ids=9)
    np.testing.assert_array_equal(choice.top_ids, [[0, 1, 2], [1, 3, 2]])
    for row in range(2):
        expected = np.log(probabilities(np.asarray(logits[row])))
        np.testing.assert_allclose(
            choice.top_logprobs[row], expected[choice.top_ids[row]], 1e-5
        )
    # The greedy choice is the first of them.
    assert choice.top_logprobs[0, 0] == choice.logprobs[0]


def test_without_alternatives_there_is_room_for_none():
    choice = choose(jnp.tile(LOGITS, (2, 1)), [SamplingConfig()] * 2)
    assert choice.top_ids.shape == choice.top_logprobs.shape == (2, 0)


EVERYTHING = SamplingConfig(
    temperature=0.6,
    top_k=5,
    top_p=0.8,
    min_p=0.1,
    typical_p=0.7,
    repetition_penalty=1.5,
    presence_penalty=0.5,
    frequency_penalty=0.25,
    no_repeat_ngram_size=2,
    min_new_tokens=3,
    num_top_logprobs=2,
)


@pytest.mark.parametrize("config", [SamplingConfig(temperature=0.9), EVERYTHING])
def test_a_row_s_draw_is_the_same_alone_and_among_others(config):
    """In another row, between others with other filters, and a wider text."""
    rng = np.random.default_rng(5)
    logits = jnp.asarray(rng.normal(size=(7, 97)), jnp.float32)
    texts = [rng.integers(0, 97, n).tolist() for n in (3, 23, 5, 7, 0, 11, 2)]
    prompts = [min(2, len(text)) for text in texts]
    keys = jax.vmap(lambda row: row_key(3, row, 1))(jnp.arange(7))
    others = [
        EVERYTHING,
        SamplingConfig(temperature=0.0, repetition_penalty=2.0),
        SamplingConfig(top_k=2, frequency_penalty=1.0),
    ]
    for row in (3, 4):
        configs = (others * 3)[:7]
        configs[row] = config
        together = choose(
            logits, configs, keys=keys, texts=texts, prompts=prompts, stops=(5,)
        )
        one = slice(row, row + 1)
        alone = choose(
            logits[one],
            [config],
            keys=keys[one],
            texts=texts[one],
            prompts=prompts[one],
            stops=(5,),
        )
        assert alone.tokens[0] == together.tokens[row]
        np.testing.assert_allclose(alone.logprobs[0], together.logprobs[row], 1e-6)
        np.testing.assert_allclose(
            alone.sampled_logprobs[0], together.sampled_logprobs[row], 1e-5, 1e-7
        )


def test_a_text_grows_by_what_is_appended():
    """Like a text that was there from the start; rows that are done stay."""
    _, filters = sampling_params([EVERYTHING] * 3)
    texts = [[5, 3, 5], [2], [7, 7]]
    prompts = jnp.array([2, 1, 0])
    room = jnp.zeros((3, 5), jnp.int32)
    text = room.at[:, :4].set(padded(texts)[0])
    state = start_text(text, jnp.array([3, 1, 2]), prompts, filters, 11)
    for tokens, alive in (([5, 9, 7], [1, 0, 1]), ([8, 4, 10], [1, 1, 0])):
        state = append(state, jnp.array(tokens), jnp.array(alive, bool))
    whole = [[5, 3, 5, 5, 8], [2, 4], [7, 7, 7]]
    np.testing.assert_array_equal(state.lengths, [5, 2, 3])
    for row, ids in enumerate(whole):
        assert state.text[row, : len(ids)].tolist() == ids
        assert np.flatnonzero(state.seen[row]).tolist() == sorted({*ids})
        made = ids[int(prompts[row]) :]
        assert state.counts[row].tolist() == [made.count(i) for i in range(11)]
    again = start_text(state.text, state.lengths, prompts, filters, 11)
    jax.tree.map(np.testing.assert_array_equal, state, again)


def test_what_has_no_slot_is_not_written():
    _, filters = sampling_params([SamplingConfig()])
    full = jnp.array([[1, 2, 3], [4, 5, 6]])
    state = start_text(full, jnp.array([3, 2]), jnp.array([1, 1]), filters, 11)
    assert state.seen is None and state.counts is None
    state = append(state, jnp.array([7, 8]), jnp.array([True, True]))
    np.testing.assert_array_equal(state.text, [[1, 2, 3], [4, 5, 8]])


def only(*rows):
    """Returns the constraint to these ids, a list for each row."""
    marks = np.zeros((len(rows), 11), bool)
    for row, ids in enumerate(rows):
        marks[row, ids] = True
    return lambda state: jnp.asarray(marks)


def test_a_constraint_leaves_what_it_allows():
    logits = jnp.tile(LOGITS, (3, 1))
    configs = [SamplingConfig(temperature=t) for t in (0.0, 1e-3, 5.0)]
    choice = choose(logits, configs, constraint=only([4, 5], [6, 7], [10]))
    np.testing.assert_array_equal(choice.tokens, [4, 7, 10])
    np.testing.assert_allclose(choice.sampled_logprobs, [0.0] * 3, atol=1e-6)


def test_a_row_that_may_say_nothing_gets_its_stop_ids():
    """A constraint to nothing, to what is biased away, and to a stop id too early.

    The stop ids come with the model's own logits: 0 is likelier than 9.
    """
    logits = jnp.tile(LOGITS, (4, 1))
    bias = np.zeros(11, np.float32)
    bias[[3, 9]] = [-np.inf, 7.0]
    configs = [SamplingConfig(temperature=t, min_new_tokens=1) for t in (0, 0, 0, 2)]
    choice = choose(
        logits, configs, bias=bias, stops=(0, 9), constraint=only([], [3], [9], [])
    )
    np.testing.assert_array_equal(choice.tokens[:3], [0, 0, 0])
    pair = np.log(probabilities(LOGITS[[0, 9]] / 2))
    expected = pair[[0, 9].index(int(choice.tokens[3]))]
    np.testing.assert_allclose(choice.sampled_logprobs[3], expected, 1e-5)


def test_equal_settings_run_the_same_program():
    configs = [SamplingConfig(top_k=k, logit_bias={5: 1.0}) for k in (3, 7)]
    (_, first), (_, second) = (sampling_params([config] * 2) for config in configs)
    assert hash(first) == hash(second) and first == second
    params, _ = sampling_params([SamplingConfig(temperature=1), configs[0]])
    assert {(p.shape, str(p.dtype)) for p in params} == {
        ((2,), "float32"),
        ((2,), "int32"),
    }
    assert params.temperature.dtype == jnp.float32


def from_yaml(text):
    """Returns the sampling of default.yaml with these lines over it."""
    default = OmegaConf.load(CONF / "sampling" / "default.yaml")
    merged = OmegaConf.merge(default, OmegaConf.create(text))
    return to_dataclass(SamplingConfig, merged, "sampling")


def from_command_line(*words):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("infer", overrides=list(words))
    return to_dataclass(SamplingConfig, config.sampling, "sampling")


def test_a_logit_bias_is_a_mapping_everywhere():
    pairs = ((5, -100.0), (7, 2.5))
    for given in (
        {7: 2.5, 5: -100},
        pairs,
        [[7, 2.5], [5, -100]],
        {np.int32(5): -100, 7: 2.5},
    ):
        config = SamplingConfig(logit_bias=given)
        assert config.logit_bias == pairs
        assert [type(x) for pair in config.logit_bias for x in pair] == [int, float] * 2
        assert replace(config, seed=3).logit_bias == pairs
        assert hash(config) == hash(SamplingConfig(logit_bias=pairs))
    for nothing in (None, {}, ()):
        assert SamplingConfig(logit_bias=nothing) == SamplingConfig()
    assert from_yaml("logit_bias: {7: 2.5, 5: -100}").logit_bias == pairs
    banned = ((5, -np.inf),)
    assert from_yaml("logit_bias: {5: -.inf}").logit_bias == banned
    assert from_command_line("sampling.logit_bias={5:-100.0,7:2.5}").logit_bias == pairs
    assert from_command_line("sampling.logit_bias={5:-inf}").logit_bias == banned


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("logit_bias: {x: 1.0}", "sampling.logit_bias.x: Key x"),
        ("logit_bias: {5: x}", "sampling.logit_bias.5: Value 'x'"),
        ("stop_token_ids: [x]", "sampling.stop_token_ids"),
    ],
)
def test_yaml_of_another_type_is_named(line, message):
    with pytest.raises(ValueError, match=message):
        from_yaml(line)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("true", "true"),
        ("false", "false"),
        ('"true"', "true"),
        ("never", "never"),
        ("True", "true"),
    ],
)
def test_early_stopping_is_one_of_three_words(given, kept):
    assert from_yaml(f"early_stopping: {given}").early_stopping == kept
    assert from_command_line(f"sampling.early_stopping={given}").early_stopping == kept


def test_early_stopping_may_be_a_boolean():
    assert SamplingConfig(early_stopping=True).early_stopping == "true"
    assert SamplingConfig(early_stopping=False) == SamplingConfig()


def test_lists_come_from_the_command_line():
    words = ("sampling.constraint=choices", "sampling.choices=[yes,no,7]")
    config = from_command_line(*words, "sampling.stop_token_ids=[7,3]")
    assert config.choices == ("yes", "no", "7")
    assert config.stop_token_ids == (7, 3)
    config = from_command_line("sampling.constraint=my_module.part:function")
    assert config.constraint == "my_module.part:function"


def test_beam_search_is_one_word():
    config = from_command_line("sampling=beam", "sampling.num_return_sequences=4")
    assert (config.num_beams, config.temperature) == (4, 0.0)


def test_defaults_are_those_of_the_yaml():
    values = OmegaConf.to_container(OmegaConf.load(CONF / "sampling" / "default.yaml"))
    for name in ("stop_strings", "stop_token_ids", "choices"):
        values[name] = tuple(values[name])
    defaults = {field.name: field.default for field in fields(SamplingConfig)}
    assert list(defaults.items()) == list(values.items())
    assert asdict(SamplingConfig()) == values | {"logit_bias": ()}
    # Equality of dicts does not tell 1 from 1.0.
    for name, value in values.items():
        assert type(value) is type(defaults[name])


def test_fields_are_named_as_in_transformers():
    transformers = pytest.importorskip("transformers")
    theirs = set(vars(transformers.GenerationConfig()))
    ours = set(inspect.signature(SamplingConfig).parameters)
    assert ours - theirs == {
        "presence_penalty",
        "frequency_penalty",
        "logit_bias",
        "num_top_logprobs",
        "stop_token_ids",
        "ignore_eos",
        "constraint",
        "choices",
        "speculate",
        "seed",
        "tokens_per_dispatch",
    }
    assert ours & theirs == {
        "max_new_tokens",
        "min_new_tokens",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "typical_p",
        "repetition_penalty",
        "no_repeat_ngram_size",
        "num_return_sequences",
        "stop_strings",
        "num_beams",
        "length_penalty",
        "early_stopping",
    }


BEAMS = {"num_beams": 4, "temperature": 0.0}
INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_new_tokens": 0}, "sampling.max_new_tokens=0 must be at least 1"),
        ({"temperature": -0.5}, r"sampling.temperature=-0.5 must be in \[0, 3e38\)"),
        ({"temperature": float("inf")}, "sampling.temperature=inf must be"),
        ({"temperature": float("nan")}, "sampling.temperature=nan must be"),
        ({"top_k": -1}, "sampling.top_k=-1 must be in .0, 2.31. .0 is off"),
        ({"top_p": 1.5}, r"sampling.top_p=1.5 must be in \[0, 1\]"),
        ({"min_p": -0.1}, r"sampling.min_p=-0.1 must be in \[0, 1\]"),
        ({"repetition_penalty": 0.0}, "sampling.repetition_penalty=0.0 must be above"),
        ({"no_repeat_ngram_size": -1}, "sampling.no_repeat_ngram_size=-1 must be at"),
        ({"num_return_sequences": 0}, "sampling.num_return_sequences=0 must be"),
        ({"tokens_per_dispatch": 0}, "sampling.tokens_per_dispatch=0 must be"),
        ({"seed": -1}, "sampling.seed=-1 must be in"),
        ({"seed": 2**32}, "sampling.seed=4294967296 must be in"),
        ({"stop_strings": ["a", ""]}, "sampling.stop_strings=.* free of empty"),
        ({"stop_strings": "end"}, "sampling.stop_strings='end' must be a list"),
        ({"repetition_penalty": INF}, "sampling.repetition_penalty=inf must be above"),
        ({"typical_p": 0.0}, r"sampling.typical_p=0.0 must be in \(0, 1\]"),
        ({"typical_p": 1.1}, r"sampling.typical_p=1.1 must be in \(0, 1\]"),
        ({"presence_penalty": INF}, "sampling.presence_penalty=inf must be a finite"),
        ({"frequency_penalty": NAN}, "sampling.frequency_penalty=nan must be a fin"),
        ({"min_new_tokens": -1}, "sampling.min_new_tokens=-1 must be in .0, "),
        (
            {"min_new_tokens": 5, "max_new_tokens": 3},
            "sampling.min_new_tokens=5 must be at most sampling.max_new_tokens=3",
        ),
        ({"logit_bias": {-1: 0.5}}, "sampling.logit_bias=.*-1.* must be of ids from 0"),
        ({"logit_bias": {3: NAN}}, "sampling.logit_bias=.*nan.* must be of ids from 0"),
        ({"logit_bias": {3: INF}}, "sampling.logit_bias=.*inf.* below 3e38"),
        ({"logit_bias": {"3": 1}}, "sampling.logit_bias={'3': 1} must map ids to num"),
        ({"logit_bias": {3: "x"}}, "sampling.logit_bias={3: 'x'} must map ids to num"),
        ({"logit_bias": [3]}, r"sampling.logit_bias=\[3\] must map ids to numbers"),
        ({"logit_bias": 3}, "sampling.logit_bias=3 must map ids to numbers"),
        ({"stop_token_ids": 3}, "sampling.stop_token_ids=3 must be a list of token"),
        ({"stop_token_ids": [3, -1]}, r"sampling.stop_token_ids=\(3, -1\) must be ids"),
        ({"num_top_logprobs": -1}, "sampling.num_top_logprobs=-1 must be at least 0"),
        ({"speculate": -1}, "sampling.speculate=-1 must be at least 0"),
        ({"num_beams": 0}, "sampling.num_beams=0 must be at least 1"),
        ({"length_penalty": INF}, "sampling.length_penalty=inf must be a finite"),
        ({"early_stopping": "no"}, "sampling.early_stopping='no' must be \"true\", "),
        (
            {"constraint": "words"},
            "sampling.constraint='words' must be digits, choices",
        ),
        ({"constraint": "module:"}, "sampling.constraint='module:' must be digits"),
        (
            {"constraint": "choices"},
            r"sampling.choices=\[\] does not go with .*=choices",
        ),
        ({"choices": ["a"]}, r"sampling.choices=\['a'\] does not go with .*=None"),
        ({"choices": "a"}, "sampling.choices='a' must be a list of strings"),
        (
            {"choices": ["a"], "constraint": "digits"},
            r"sampling.choices=\['a'\] does not go with sampling.constraint=digits",
        ),
        (
            {"choices": ["a", ""], "constraint": "choices"},
            "sampling.choices=.* free of empty strings",
        ),
        (
            {"num_beams": 4},
            "sampling.num_beams=4 with sampling.temperature=1.0: beams are searched, "
            "not sampled; set sampling=greedy or sampling.temperature=0",
        ),
        ({"num_beams": 2, "temperature": 0.7, "top_k": 5}, "beams are searched, not"),
        (
            {**BEAMS, "speculate": 3},
            "num_beams=4 with sampling.speculate=3: beams take",
        ),
        (
            {**BEAMS, "num_return_sequences": 5},
            "num_return_sequences=5 must be at most sampling.num_beams=4",
        ),
    ],
)
def test_values_that_mean_nothing_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**fields)


def test_what_only_surprises_is_allowed():
    greedy = {"temperature": 0.0, "top_k": 5, "top_p": 0.5, "typical_p": 0.2}
    assert SamplingConfig(**greedy, num_return_sequences=3)
    assert SamplingConfig(**BEAMS, num_return_sequences=4, early_stopping="never")
    assert SamplingConfig(min_new_tokens=3, max_new_tokens=3, length_penalty=-1.0)
