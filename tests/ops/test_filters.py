import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relax.ops.filters import (
    ban_repeated_ngrams,
    ban_stop_ids,
    count_tokens,
    keep_allowed,
    keep_first,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    keep_typical,
    penalise_counts,
    penalise_repetition,
)


def row(*values):
    return jnp.asarray([values], jnp.float32)


def log_row(*probabilities):
    return jnp.log(row(*probabilities))


def kept(logits):
    return [np.flatnonzero(np.isfinite(r)).tolist() for r in np.asarray(logits)]


def number(value, count=1):
    return jnp.full(count, value)


@jax.jit
def filtered(logits, seen, temperature, top_k, top_p, min_p, penalty):
    logits = penalise_repetition(logits, seen, penalty)
    logits = keep_top_k(logits / temperature[:, None], top_k)
    return keep_min_p(keep_top_p(logits, top_p), min_p)


def test_filters_equal_those_of_transformers(oracle_dir):
    cases = json.loads((oracle_dir / "hf_logits_processors.json").read_text())["cases"]
    assert len(cases) == 19
    off = {
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
    }
    for case in cases:
        logits = jnp.asarray(case["scores"], jnp.float32)
        seen = np.zeros(logits.shape, bool)
        for i, ids in enumerate(case["input_ids"] or []):
            seen[i, ids] = True
        options = [
            number(value if case[name] is None else case[name], len(logits))
            for name, value in off.items()
        ]
        actual = filtered(logits, jnp.asarray(seen), *options)
        assert kept(actual) == case["kept"], case
        # The peer's float32 softmax sums in another order.
        np.testing.assert_allclose(jax.nn.softmax(actual), case["probs"], 0, 3e-7)


def test_repetition_penalty_by_hand():
    # Seen and positive, seen and negative, seen and zero, not seen.
    seen = jnp.array([[True, True, True, False, False]])
    actual = penalise_repetition(row(3.0, -3.0, 0.0, 3.0, -3.0), seen, number(1.5))
    np.testing.assert_array_equal(actual, [[2.0, -4.5, 0.0, 3.0, -3.0]])


def test_penalties_of_counts_by_hand():
    counts = jnp.array([[0, 1, 3, 0], [2, 0, 1, 5]])
    logits = jnp.tile(row(1.0, 1.0, -1.0, 0.0), (2, 1))
    actual = penalise_counts(
        logits, counts, jnp.array([0.5, -1.0]), jnp.array([0.25, 2.0])
    )
    np.testing.assert_array_equal(
        actual, [[1.0, 0.25, -2.25, 0.0], [-2.0, 1.0, -2.0, -9.0]]
    )


def test_counts_are_of_a_row_s_own_part():
    tokens = jnp.array([[3, 1, 1, 4, 1], [0, 2, 2, 2, 0]])
    counts = count_tokens(tokens, jnp.array([0, 1]), jnp.array([3, 5]), 7)
    np.testing.assert_array_equal(counts, [[0, 2, 0, 1, 0, 0, 0], [1, 0, 3, *[0] * 4]])


def test_stop_ids_are_banned_in_the_rows_marked():
    logits = jnp.tile(row(0.0, 1.0, 2.0, 3.0, 4.0), (2, 1))
    actual = ban_stop_ids(logits, jnp.array([1, 4, 4]), jnp.array([True, False]))
    assert kept(actual) == [[0, 2, 3], [0, 1, 2, 3, 4]]
    none = ban_stop_ids(logits, jnp.zeros(0, jnp.int32), jnp.array([True, True]))
    np.testing.assert_array_equal(none, logits)


def test_ids_from_a_count_on_are_out():
    assert kept(keep_first(row(1.0, 2.0, 3.0, 4.0, 5.0), 3)) == [[0, 1, 2]]


def test_what_is_allowed_is_kept_and_else_what_ends_a_text():
    """Allowed: 1 and 3; 0, which a filter took; nothing. Ends: 2 and 4."""
    unfiltered = jnp.tile(row(1.0, 2.0, 3.0, 4.0, 5.0), (3, 1))
    logits = unfiltered.at[:, 0].set(-jnp.inf).at[:, 2].set(-1.0)
    allowed = np.zeros((3, 5), bool)
    allowed[0, [1, 3]] = allowed[1, 0] = True
    actual = keep_allowed(logits, jnp.asarray(allowed), unfiltered, jnp.array([2, 4]))
    assert kept(actual) == [[1, 3], [2, 4], [2, 4]]
    np.testing.assert_array_equal(actual[0, jnp.array([1, 3])], [2.0, 4.0])
    np.testing.assert_array_equal(actual[1:, 2], [3.0, 3.0])


def banned(tokens, size, V=7):
    """Returns what may not follow a row of tokens, the rest of which is padding."""
    padded = jnp.asarray([[*tokens, *[3] * (11 - len(tokens))]])
    logits = jnp.arange(float(V))[None]
    left = ban_repeated_ngrams(logits, padded, number(len(tokens)), number(size))
    (kept_ids,) = kept(left)
    assert all(left[0, index] == index for index in kept_ids)
    return sorted(set(range(V)) - set(kept_ids))


@pytest.mark.parametrize(
    ("tokens", "size", "expected"),
    [
        ([1, 2, 5, 1, 2], 3, [5]),
        ([1, 2, 5, 1, 2], 2, [5]),
        ([1, 2, 5, 1], 2, [2]),
        ([1, 2, 5, 1], 3, []),  # 5, 1 came once
        ([1, 2, 5, 1], 1, [1, 2, 5]),
        ([1, 2, 1, 5, 6, 1], 2, [2, 5]),  # of two continuations, neither
        ([4, 4, 4], 2, [4]),
        ([4, 4, 4], 3, [4]),
        ([4, 4, 4], 4, []),
        ([4, 4, 4], 5, []),  # no 5-gram ends in three tokens
        ([4], 2, []),
        ([4], 1, [4]),
        ([1, 2, 5, 1, 2], 0, []),
        (list(range(7)), 1, list(range(7))),
    ],
)
def test_repeated_ngrams_by_hand(tokens, size, expected):
    assert banned(tokens, size) == expected


def slowly_banned(tokens, size):
    """Returns the ids that would end an n-gram of `tokens` again, by trying each."""
    grams = {tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)}
    start = tokens[len(tokens) - size + 1 :]
    return [t for t in range(3) if len(tokens) >= size > 0 and (*start, t) in grams]


@settings(max_examples=200, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.lists(st.integers(0, 2), max_size=11), st.integers(0, 5)),
        min_size=5,
        max_size=5,
    ),
    padding=st.integers(0, 2),
)
def test_repeated_ngrams_equal_a_search_of_each_row(rows, padding):
    texts, sizes = zip(*rows, strict=True)
    padded = [[*text, *[padding] * (11 - len(text))] for text in texts]
    logits = _ban(
        jnp.zeros((5, 3)),
        jnp.asarray(padded),
        jnp.asarray([len(text) for text in texts]),
        jnp.asarray(sizes),
    )
    for left, text, size in zip(kept(logits), texts, sizes, strict=True):
        assert sorted({0, 1, 2} - set(left)) == slowly_banned(text, size)


_ban = jax.jit(ban_repeated_ngrams)


def test_repeated_ngrams_equal_those_of_transformers():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 3, (97, 11))
    for size in (1, 2, 3, 5):
        theirs = transformers.NoRepeatNGramLogitsProcessor(size)(
            torch.tensor(tokens), torch.zeros(97, 3)
        )
        ours = _ban(
            jnp.zeros((97, 3)), jnp.asarray(tokens), number(11, 97), number(size, 97)
        )
        np.testing.assert_array_equal(ours, theirs.numpy())
        assert np.isinf(ours).any()


@pytest.mark.parametrize(
    ("k", "expected"),
    [
        (1, [3]),
        (2, [1, 3, 4]),  # 1 and 4 tie for the second place
        (3, [1, 3, 4]),
        (4, [0, 1, 3, 4]),
        (0, [0, 1, 2, 3, 4]),
        (5, [0, 1, 2, 3, 4]),
        (99, [0, 1, 2, 3, 4]),
    ],
)
def test_top_k_by_hand(k, expected):
    actual = keep_top_k(row(0.5, 2.0, -1.0, 3.0, 2.0), number(k))
    assert kept(actual) == [expected]
    np.testing.assert_array_equal(
        actual[0, jnp.asarray(expected)],
        jnp.asarray([0.5, 2.0, -1.0, 3.0, 2.0])[jnp.asarray(expected)],
    )


@pytest.mark.parametrize(
    ("p", "expected"),
    [
        (0.0, [2]),  # the most likely one is always kept
        (0.49, [2]),
        (0.51, [2, 0]),  # 0.5 is less than p: the token that crosses it is kept
        (0.74, [2, 0]),
        (0.76, [2, 0, 3]),
        (0.99, [2, 0, 3, 1]),
        (1.0, [2, 0, 3, 1]),
    ],
)
def test_top_p_by_hand(p, expected):
    actual = keep_top_p(log_row(0.25, 0.1, 0.5, 0.15), number(p))
    assert kept(actual) == [sorted(expected)]


@pytest.mark.parametrize(("p", "count"), [(0.5, 2), (0.625, 3), (0.75, 3), (0.875, 4)])
def test_top_p_of_equal_tokens_keeps_as_many_as_reach_p(p, count):
    # Quarters are exact in float32: a mass equal to p is enough.
    assert len(kept(keep_top_p(row(7.0, 7.0, 7.0, 7.0), number(p)))[0]) == count


def test_top_p_of_1_keeps_tokens_whose_mass_vanishes_in_a_running_sum():
    logits = row(0.0, -40.0, -80.0, -104.0)
    np.testing.assert_array_equal(keep_top_p(logits, number(1.0)), logits)


def test_min_p_by_hand():
    logits = log_row(0.4, 0.09, 0.3, 0.21)  # ratios 1, 0.225, 0.75, 0.525
    for p, expected in [
        (0.0, [0, 1, 2, 3]),
        (0.2, [0, 1, 2, 3]),
        (0.25, [0, 2, 3]),
        (0.6, [0, 2]),
        (1.0, [0]),
    ]:
        assert kept(keep_min_p(logits, number(p))) == [expected]


# Information 0.693, 1.109, 2.120 and 2.996 nats around an entropy of 1.117: the second
# is the nearest, then the first, the third and the fourth.
TYPICAL = (0.5, 0.33, 0.12, 0.05)


@pytest.mark.parametrize(
    ("mass", "expected"),
    [
        (1e-6, [1]),
        (0.32, [1]),
        (0.34, [0, 1]),  # 0.33 is less than the mass
        (0.82, [0, 1]),
        (0.84, [0, 1, 2]),
        (0.94, [0, 1, 2]),
        (0.96, [0, 1, 2, 3]),
        (1.0, [0, 1, 2, 3]),
    ],
)
def test_typical_by_hand(mass, expected):
    actual = keep_typical(log_row(*TYPICAL), number(mass))
    assert kept(actual) == [expected]
    picked = jnp.asarray(expected)
    np.testing.assert_array_equal(actual[0, picked], log_row(*TYPICAL)[0, picked])


def test_typical_keeps_what_is_as_far_off():
    """Four equal tokens are all of them as typical."""
    assert kept(keep_typical(row(7.0, 7.0, 7.0, 7.0), number(0.1))) == [[0, 1, 2, 3]]
    # Two rare tokens alike: one of them would do for the mass.
    logits = log_row(0.5, 0.2, 0.2, 0.1)
    assert kept(keep_typical(logits, number(0.1))) == [[1, 2]]


def test_typical_mass_of_1_keeps_tokens_that_vanish_in_a_running_sum():
    logits = row(0.0, -40.0, -80.0, -104.0)
    np.testing.assert_array_equal(keep_typical(logits, number(1.0)), logits)


def test_typical_equals_that_of_transformers():
    """Also after another filter, and where logits are equal."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    rng = np.random.default_rng(3)
    logits = rng.normal(scale=2.5, size=(211, 53)).astype(np.float32)
    logits[::2] = np.round(logits[::2])
    logits[::3, rng.permutation(53)[:23]] = -np.inf
    sizes = set()
    for mass in (0.01, 0.2, 0.5, 0.9, 0.99):
        theirs = transformers.TypicalLogitsWarper(mass)(None, torch.tensor(logits))
        ours = _typical(jnp.asarray(logits), number(mass, 211))
        np.testing.assert_array_equal(ours, theirs.numpy())
        sizes |= {len(ids) for ids in kept(ours)}
    assert {1, 2, 3, 5, 7, 11, 13, 17, 19, 23} <= sizes
    other = _typical(jnp.asarray(logits), number(0.97, 211))
    assert (np.asarray(other) != theirs.numpy()).any()


_typical = jax.jit(keep_typical)


def test_what_an_earlier_filter_removed_stays_removed():
    logits = row(1.0, -jnp.inf, 0.5, -jnp.inf)
    for actual in (
        keep_top_k(logits, number(0)),
        keep_top_k(logits, number(3)),
        keep_top_p(logits, number(1.0)),
        keep_min_p(logits, number(0.0)),
        keep_typical(logits, number(1.0)),
        keep_typical(logits, number(0.99)),
        keep_first(logits, 3),
        penalise_counts(logits, jnp.array([[0, 3, 0, 1]]), number(-1.0), number(-2.0)),
        ban_stop_ids(logits, jnp.array([1]), jnp.array([True])),
        penalise_repetition(logits, jnp.full((1, 4), True), number(1.0)),
        ban_repeated_ngrams(logits, jnp.array([[0, 2]]), number(2), number(2)),
    ):
        np.testing.assert_array_equal(actual, logits)


def test_each_row_has_its_own_parameters():
    logits = jnp.tile(log_row(0.25, 0.1, 0.5, 0.15), (3, 1))
    assert kept(keep_top_k(logits, jnp.array([1, 0, 2]))) == [[2], [0, 1, 2, 3], [0, 2]]
    top_p = keep_top_p(logits, jnp.array([0.1, 1.0, 0.6]))
    assert kept(top_p) == [[2], [0, 1, 2, 3], [0, 2]]
    min_p = keep_min_p(logits, jnp.array([0.9, 0.0, 0.4]))
    assert kept(min_p) == [[2], [0, 1, 2, 3], [0, 2]]
    typical = keep_typical(logits, jnp.array([0.1, 1.0, 0.8]))
    assert kept(typical) == [[0], [0, 1, 2, 3], [0, 2, 3]]
    seen = jnp.full(logits.shape, True)
    penalised = penalise_repetition(logits, seen, jnp.array([1.0, 2.0, 3.0]))
    np.testing.assert_allclose(penalised, logits * np.array([[1.0], [2.0], [3.0]]))
