import inspect
import json
from dataclasses import asdict, fields
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from omegaconf import OmegaConf

from relax.ops.logprobs import compute_logits
from relax.sampling import SamplingConfig, choose_tokens, row_key, sampling_params

CONF = Path(__file__).parents[1] / "conf" / "sampling"
# Upper 0.001 quantiles of the chi-square distribution, by degrees of freedom.
CHI_SQUARE = {1: 10.83, 3: 16.27, 10: 29.59}
LOGITS = np.array([2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, 0.2, 0.8, 1.9, -0.3], "f4")


def choose(
    logits, configs, *, keys=None, positions=None, seen=None, text=None, num_ids=None
):
    """Returns the choice for rows of logits; keys of row 0, 1 ... by default."""
    B, V = logits.shape
    params, filters = sampling_params(configs)
    if keys is None:
        keys = jax.vmap(lambda row: row_key(0, 0, row))(jnp.arange(B))
    if positions is None:
        positions = jnp.zeros(B, jnp.int32)
    return _choose(logits, keys, positions, params, filters, seen, text, num_ids or V)


_choose = jax.jit(choose_tokens, static_argnums=(4, 7))


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
    keys = jnp.broadcast_to(row_key(0, 0, 0), DRAWS)
    positions = jnp.arange(DRAWS)
    choice = choose(logits, [config] * DRAWS, keys=keys, positions=positions)
    return np.asarray(choice.tokens)


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
    seen = jnp.zeros((2, 11), bool).at[0, 0].set(True)
    choice = choose(logits, [greedy, narrow], seen=seen)
    np.testing.assert_array_equal(choice.tokens, [9, 0])
    np.testing.assert_allclose(
        choice.logprobs, np.log(probabilities(LOGITS))[[9, 0]], 1e-5
    )


def test_each_row_has_its_own_size_of_ngrams_that_may_not_repeat():
    """After 9, 0, 9 a 0 would repeat a pair; the 9 and the 0 came already alone."""
    logits = jnp.tile(LOGITS, (4, 1))
    sizes = (0, 1, 2, 3)
    configs = [SamplingConfig(temperature=0.0, no_repeat_ngram_size=n) for n in sizes]
    text = jnp.tile(jnp.array([9, 0, 9, 1, 2]), (4, 1))
    positions = jnp.full(4, 3)
    choice = choose(logits, configs, positions=positions, text=text)
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
        positions=jnp.full(DRAWS, 9),
        seen=jnp.zeros((DRAWS, 11), bool).at[:, 9].set(True),
        text=jnp.tile(jnp.arange(11), (DRAWS, 1)),
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
        positions=jnp.array([0, 0, 0, 0, 1]),
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
    seen = np.zeros(logits.shape, bool)
    for index, (case, row) in enumerate(rows):
        seen[index, case["input_ids"][row] if case["input_ids"] else []] = True
    choice = choose(
        jnp.asarray(np.repeat(logits, draws, axis=0)),
        [config for case, _ in rows for config in [sampling_of(case)] * draws],
        seen=jnp.asarray(np.repeat(seen, draws, axis=0)),
    )
    tokens, _, logprobs = (np.split(np.asarray(x), len(rows)) for x in choice)
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


def test_defaults_are_those_of_the_yaml():
    values = OmegaConf.to_container(OmegaConf.load(CONF / "default.yaml"))
    values["stop_strings"] = tuple(values["stop_strings"])
    assert asdict(SamplingConfig()) == values
    # Equality of dicts does not tell 1 from 1.0.
    for field in fields(SamplingConfig):
        assert type(values[field.name]) is type(field.default)


def test_fields_are_named_as_in_transformers():
    transformers = pytest.importorskip("transformers")
    theirs = set(vars(transformers.GenerationConfig()))
    ours = set(inspect.signature(SamplingConfig).parameters)
    assert ours - theirs == {"ignore_eos", "seed", "tokens_per_dispatch"}
    assert ours & theirs == {
        "max_new_tokens",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "repetition_penalty",
        "no_repeat_ngram_size",
        "num_return_sequences",
        "stop_strings",
    }


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_new_tokens": 0}, "sampling.max_new_tokens=0 must be at least 1"),
        ({"temperature": -0.5}, r"sampling.temperature=-0.5 must be in \[0, inf\)"),
        ({"temperature": float("inf")}, "sampling.temperature=inf must be"),
        ({"temperature": float("nan")}, "sampling.temperature=nan must be"),
        ({"top_k": -1}, "sampling.top_k=-1 must be at least 0"),
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
    ],
)
def test_values_that_mean_nothing_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**fields)
