"""Constraints: which ids may follow a text, and that nothing else is ever chosen."""

import io
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece

from relax.generation.constraints import digits_only, make_constraint, one_of
from relax.generation.generator import Request
from relax.sampling import (
    SamplingConfig,
    choose_tokens,
    row_key,
    sampling_params,
    start_text,
)
from relax.text.tiktoken_encodings import END_OF_TEXT, EncodingSpec
from relax.text.tokenizers import (
    SentencePieceTokenizer,
    TiktokenTokenizer,
    Tokenizer,
)

STOPS = (66, 5)
# "0" to "9" are the ids 0 to 9 of the tokenizer, "a" to "q" 49 to 65; the rest of the
# 128 columns stands for no token.
COLUMNS = 128
A, B, C = 49, 50, 51


def state_of(*rows):
    """Returns the state of rows (prompt, completion), with room and ids after them."""
    width = 3 + max(len(prompt) + len(made) for prompt, made in rows)
    text = np.full((len(rows), width), A)
    for row, (prompt, made) in zip(text, rows, strict=True):
        row[: len(prompt) + len(made)] = [*prompt, *made]
    lengths = jnp.array([len(prompt) + len(made) for prompt, made in rows])
    prompts = jnp.array([len(prompt) for prompt, _ in rows])
    _, filters = sampling_params([SamplingConfig()])
    return start_text(text, lengths, prompts, filters, COLUMNS)


def allowed(constraint, *rows):
    """Returns the ids that may follow each row of (prompt, completion)."""
    marks = np.asarray(jax.jit(constraint)(state_of(*rows)))
    assert marks.shape == (len(rows), COLUMNS) and marks.dtype == bool
    return [np.flatnonzero(row).tolist() for row in marks]


def made(sampling, tokenizer, stop_ids=STOPS, columns=COLUMNS):
    return make_constraint(sampling, tokenizer, stop_ids, columns)


def choice_of(*choices):
    return SamplingConfig(constraint="choices", choices=choices)


def test_digits_come_first_and_then_an_end_may(tokenizer):
    """Id 5 is a digit and, here, one that ends a row too."""
    constraint = digits_only(tokenizer, (66,), COLUMNS)
    digits = list(range(10))
    assert allowed(constraint, ([A], []), ([A, 7], [3]), ([], []), ([A], [3, 0])) == [
        digits,
        [*digits, 66],
        digits,
        [*digits, 66],
    ]


def test_tokens_of_several_digits_are_digits_and_others_are_not(mixed_tokenizer):
    constraint = digits_only(mixed_tokenizer, (7,), COLUMNS)
    assert allowed(constraint, ([3], [])) == [[0, 1]]


@pytest.fixture(scope="module")
def mixed_tokenizer() -> Tokenizer:
    """Digits of ASCII, digits of others, a space before one, and a letter after one."""
    pieces = ["4", "42", " 4", "4a", "٤", "²", "-4"]
    ranks = {piece.encode(): rank for rank, piece in enumerate(pieces)}
    specials = {END_OF_TEXT: len(pieces)}
    return TiktokenTokenizer(
        EncodingSpec(pattern=".", ranks=ranks, special_tokens=specials)
    )


def test_a_choice_is_said_to_its_end(tokenizer):
    """Of "ab", "abc" and "cab": one is the beginning of another."""
    ab, abc, cab = (A, B), (A, B, C), (C, A, B)
    constraint = one_of((ab, abc, cab), STOPS, COLUMNS)
    prompt = [A, B]  # which is no part of the completion
    stops = sorted(STOPS)
    assert allowed(
        constraint,
        (prompt, []),
        (prompt, [A]),
        (prompt, [A, B]),
        (prompt, [A, B, C]),
        ([], [C]),
        ([A] * 5, [C, A]),
        (prompt, [C, A, B]),
        (prompt, [C, B]),
        (prompt, [B]),
        (prompt, [A, B, C, A, B, C]),
        (prompt, [A, B, 66]),
    ) == [[A, C], [B], [5, C, 66], stops, [A], [B], stops, [], [], [], []]


def test_one_choice_is_the_only_completion():
    constraint = one_of(((A,),), (66,), COLUMNS)
    assert allowed(constraint, ([], []), ([], [A])) == [[A], [66]]


def test_choices_near_the_end_of_the_room():
    """A text that fills its array, so that the choice has no slots left."""
    constraint = one_of(((A, B, C), (B, B)), (66,), COLUMNS)
    state = state_of(([A, A, B], [A]), ([A, A, A], [B]))
    state = state._replace(text=state.text[:, :4])
    marks = np.asarray(constraint(state))
    assert [np.flatnonzero(row).tolist() for row in marks] == [[B], [B]]


def test_choices_are_spelled_in_ids(tokenizer):
    constraint = made(choice_of("ba", "c"), tokenizer)
    assert allowed(constraint, ([7], []), ([7], [B]), ([7], [C])) == [
        [B, C],
        [A],
        sorted(STOPS),
    ]


def sentencepiece_tokenizer(**options) -> Tokenizer:
    """Returns a model that puts a space before a text."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["yes no yes no maybe yes"] * 3),
        model_writer=model,
        vocab_size=279,
        model_type="bpe",
        byte_fallback=True,
        num_threads=1,
        minloglevel=2,
        **options,
    )
    return SentencePieceTokenizer(model.getvalue())


@pytest.mark.parametrize("choice", ["yes", " yes", "no maybe\n", "é"])
def test_a_choice_goes_on_a_text_without_a_space_of_the_model_s(choice):
    """What is said after a prompt reads as the prompt and the choice."""
    tokenizer = sentencepiece_tokenizer(
        normalization_rule_name="identity", remove_extra_whitespaces=False
    )
    constraint = made(choice_of(choice), tokenizer, (2,), 320)
    prompt, ids = tokenizer.encode("maybe"), []
    _, filters = sampling_params([SamplingConfig()])
    while 2 not in ids:
        text = np.asarray([[*prompt, *ids, *[0] * (31 - len(ids))]])
        lengths = jnp.array([len(prompt) + len(ids)])
        state = start_text(text, lengths, jnp.array([len(prompt)]), filters, 320)
        ids += np.flatnonzero(constraint(state)[0]).tolist()
        assert len(ids) <= 31
    assert tokenizer.decode(prompt + ids) == "maybe" + choice


def test_a_choice_that_a_tokenizer_changes_is_named():
    """Two spaces are one to the default model of sentencepiece."""
    message = "sampling.choices holds 'no  no', which the tokenizer turns into 'no no';"
    with pytest.raises(ValueError, match=message):
        made(choice_of("yes", "no  no"), sentencepiece_tokenizer())


def test_the_same_settings_give_the_same_function(tokenizer, mixed_tokenizer):
    digits = SamplingConfig(constraint="digits", seed=3)
    first = made(digits, tokenizer)
    assert made(SamplingConfig(constraint="digits"), tokenizer, [*STOPS]) is first
    assert made(digits, mixed_tokenizer) is not first
    assert made(digits, tokenizer, (66,)) is not first
    assert made(digits, tokenizer, STOPS, 192) is not first
    choices = made(choice_of("a", "ba"), tokenizer)
    assert made(choice_of("a", "ba"), tokenizer) is choices
    assert made(choice_of("a", "bc"), tokenizer) is not choices
    assert made(SamplingConfig(), tokenizer) is None


def test_a_program_is_compiled_once_for_a_constraint(tokenizer):
    traced = []

    @partial(jax.jit, static_argnames="filters")
    def run(state, filters):
        traced.append(filters)
        return filters.constraint(state)

    for seed in range(3):
        sampling = SamplingConfig(constraint="digits", seed=seed)
        _, filters = sampling_params([sampling], made(sampling, tokenizer))
        run(state_of(([A], [])), filters)
    assert len(traced) == 1


@pytest.mark.parametrize("temperature", [0.0, 3.0])
def test_nothing_but_a_choice_and_an_end_is_generated(tokenizer, temperature):
    """Step by step, 97 rows of wild logits each."""
    sampling = SamplingConfig(
        temperature=temperature,
        constraint="choices",
        choices=("a", "abc", "cab"),
        min_new_tokens=2,
        logit_bias={B: -3.0},
    )
    rows, room = 97, 7
    constraint = made(sampling, tokenizer, (66,))
    params, filters = sampling_params([sampling] * rows, constraint)
    keys = jax.vmap(lambda row: row_key(0, row, 0))(jnp.arange(rows))
    bias = np.zeros(COLUMNS, np.float32)
    bias[B] = -3.0
    rng = np.random.default_rng(0)
    text, lengths = np.zeros((rows, room), np.int32), jnp.full(rows, 2)
    run = jax.jit(choose_tokens, static_argnums=(4, 7))
    for slot in range(2, room):
        logits = rng.normal(scale=5.0, size=(rows, COLUMNS)).astype(np.float32)
        state = start_text(text, lengths, jnp.full(rows, 2), filters, COLUMNS)
        choice = run(logits, keys, state, params, filters, bias, jnp.array([66]), 67)
        assert np.isfinite(choice.sampled_logprobs).all()
        assert np.isfinite(choice.logprobs).all()
        text[:, slot] = choice.tokens
        lengths = lengths + 1
    said = {tokenizer.decode(row[2 : row.tolist().index(66)]) for row in text}
    # After "a" an end would come too early.
    assert said == {"abc", "cab"}


def test_a_model_says_what_it_may(model, tokenizer):
    """Through the whole engine, in dispatches of a few tokens."""
    digits = SamplingConfig(
        constraint="digits", max_new_tokens=13, tokens_per_dispatch=5
    )
    [completion] = model.generate([[A, B]], digits)
    assert completion.text.isdigit()
    choices = SamplingConfig(
        constraint="choices", choices=("abc", "cab"), num_return_sequences=5
    )
    found = model.generate([[A, B], [C]], choices)
    assert {c.finish_reason for c in found} == {"stop"}
    assert {c.text for c in found} <= {"abc", "cab"}


def even_ids(tokenizer, stop_ids, num_columns):
    """A constraint of a user's own, called by its name below."""
    marks = np.arange(num_columns) % 2 == 0
    return lambda state: jnp.broadcast_to(marks, (state.text.shape[0], num_columns))


def no_function(tokenizer, stop_ids, num_columns):
    return num_columns


def flat_marks(tokenizer, stop_ids, num_columns):
    return lambda state: jnp.ones(num_columns, bool)


def number_marks(tokenizer, stop_ids, num_columns):
    return lambda state: jnp.ones((state.text.shape[0], num_columns))


@pytest.fixture
def plugin(monkeypatch):
    """A callable: the sampling that names a function of this module."""
    monkeypatch.setitem(sys.modules, "plugin", sys.modules[__name__])
    return lambda name: SamplingConfig(constraint=f"plugin:{name}")


def test_a_function_is_found_by_its_name(plugin, tokenizer):
    constraint = made(plugin("even_ids"), tokenizer)
    assert allowed(constraint, ([A], [])) == [list(range(0, COLUMNS, 2))]
    assert made(plugin("even_ids"), tokenizer) is constraint
    assert made(plugin("even_ids"), None) is not constraint


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("odd_ids", "sampling.constraint=plugin:odd_ids: plugin has no function odd_"),
        ("STOPS", "sampling.constraint=plugin:STOPS: plugin has no function STOPS"),
        ("no_function", "sampling.constraint=plugin:no_function gave 128; it must ret"),
    ],
)
def test_a_function_that_is_none_is_named(plugin, tokenizer, name, message):
    with pytest.raises(ValueError, match=message):
        made(plugin(name), tokenizer)


def test_a_module_that_is_not_there_is_named(tokenizer):
    sampling = SamplingConfig(constraint="no_such_module:f")
    message = "sampling.constraint=no_such_module:f: no_such_module can't be imported"
    with pytest.raises(ValueError, match=message):
        made(sampling, tokenizer)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "flat_marks",
            r"plugin:flat_marks gave bool\[128\]; it must give bool\[1, 128",
        ),
        (
            "number_marks",
            r"number_marks gave float32\[1, 128\]; it must give bool\[1, ",
        ),
    ],
)
def test_marks_of_another_shape_or_type_are_named(plugin, tokenizer, name, message):
    constraint = made(plugin(name), tokenizer)
    with pytest.raises(ValueError, match=message):
        constraint(state_of(([A], [])))


def test_what_a_constraint_needs_is_named(tokenizer, mixed_tokenizer):
    digits = SamplingConfig(constraint="digits")
    for sampling in (digits, choice_of("a")):
        with pytest.raises(ValueError, match="needs a tokenizer, which this model lac"):
            made(sampling, None)
    with pytest.raises(ValueError, match="choices needs an id that ends a completion"):
        made(choice_of("a"), tokenizer, ())
    assert made(digits, tokenizer, ())
    with pytest.raises(ValueError, match="digits: the tokenizer has no token of digit"):
        made(digits, mixed_tokenizer, (7,), 0)


def test_requests_of_a_constraint_do_not_touch_others(model):
    """The hook is of one call: the next one is free again."""
    free = SamplingConfig(temperature=0.0, max_new_tokens=7, ignore_eos=True)
    request = Request((A, B), 0, 0)
    before = dict(model.complete([request], free))[0].token_ids
    bound = SamplingConfig(temperature=0.0, constraint="digits", max_new_tokens=7)
    assert dict(model.complete([request], bound))[0].text.isdigit()
    assert dict(model.complete([request], free))[0].token_ids == before
