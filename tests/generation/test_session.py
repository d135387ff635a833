"""A session says what a generator says, and runs only what is new."""

from dataclasses import replace

import numpy as np
import pytest

from relax.generation import slots as slots_module
from relax.generation.generator import Generator
from relax.generation.requests import Request
from relax.generation.session import Session
from relax.model.llama import make_llama
from relax.sampling import SamplingConfig

GREEDY = SamplingConfig(temperature=0.0, max_new_tokens=11, ignore_eos=True)
SAMPLED = SamplingConfig(
    temperature=0.8,
    top_k=20,
    top_p=0.9,
    min_p=0.02,
    repetition_penalty=1.3,
    no_repeat_ngram_size=2,
    max_new_tokens=11,
    seed=3,
    ignore_eos=True,
    tokens_per_dispatch=4,
)
PLAIN = SamplingConfig(max_new_tokens=11, ignore_eos=True, tokens_per_dispatch=4)
RNG = np.random.default_rng(0)
SYSTEM, OTHER_SYSTEM = [5, 17, 29, 31, 2], [5, 17, 30, 31, 2]
TURNS = [RNG.integers(0, 66, count).tolist() for count in (3, 7, 2, 13, 1)]


class Chat:
    """A session beside a generator that starts each reply anew."""

    def __init__(self, generator, params):
        self.session, self._generator = Session(generator), generator
        self.params, self.ids = params, []

    def say(self, ids, sampling=GREEDY, **options):
        """Adds ids and the reply to the text; returns tokens prefilled and reused."""
        self.ids = [*self.ids, *ids]
        pieces = list(self.session.reply(self.params, self.ids, sampling, **options))
        return self._compare(pieces, sampling, **options)

    def _compare(self, pieces, sampling, sample_index=0):
        completion = self.session.completion
        request = Request(tuple(self.ids), 0, sample_index)
        (expected,) = self._generator.run(self.params, [request], sampling)
        assert completion.token_ids == expected.token_ids
        assert completion.text == expected.text == "".join(pieces)
        assert completion.finish_reason == expected.finish_reason
        for name in ("logprobs", "sampled_logprobs"):
            ours, theirs = getattr(completion, name), getattr(expected, name)
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=5e-5)
        self.ids += completion.token_ids
        assert self.session.length == len(self.ids) - 1
        return self.session.prefilled, self.session.reused


@pytest.fixture
def chat(generator, model):
    return Chat(generator, model.params)


# Many turns, all that a chat does to its text; the context is 101 tokens. A reply has
# 11 of which the last is not in the cache.


@pytest.mark.parametrize("sampling", [GREEDY, PLAIN, SAMPLED])
def test_every_turn_equals_a_generator_and_runs_what_is_new(chat, sampling):
    assert chat.say(SYSTEM + TURNS[0], sampling) == (8, 0)
    assert chat.say(TURNS[1], sampling) == (1 + 7, 18)
    assert chat.say(TURNS[2], sampling) == (1 + 2, 36)
    assert chat.say(TURNS[3], sampling) == (1 + 13, 49)
    assert chat.say(TURNS[4], sampling) == (1 + 1, 73)
    assert chat.session.length == 75 + 10
    with pytest.raises(AssertionError):
        chat._compare([], replace(sampling, max_new_tokens=3))


def retry(chat, sampling=GREEDY):
    """Says two things and the second again, as another sample."""
    chat.say(SYSTEM + TURNS[0], sampling)
    before = chat.ids
    first = chat.say(TURNS[1], sampling)
    reply, chat.ids = chat.session.completion.token_ids, before
    again = chat.say(TURNS[1], sampling, sample_index=1)
    same = chat.session.completion.token_ids == reply
    assert same == (sampling is GREEDY)
    return first, again


@pytest.mark.parametrize("sampling", [GREEDY, PLAIN, SAMPLED])
def test_a_retry_runs_the_last_token_alone(chat, sampling):
    assert retry(chat, sampling) == ((8, 18), (1, 25))


def test_going_back_is_a_shorter_cache(chat):
    chat.say(SYSTEM + TURNS[0])
    before = chat.ids
    chat.say(TURNS[1])
    chat.say(TURNS[3])
    chat.ids = before
    assert chat.say(TURNS[2]) == (2, 19)  # the reply's last token has been run since
    chat.ids = []
    assert chat.say(SYSTEM) == (1, 4)


def change_system(chat):
    chat.say(SYSTEM + TURNS[0])
    chat.say(TURNS[1])
    chat.ids = OTHER_SYSTEM + chat.ids[5:]
    return chat.say(TURNS[2])


def test_another_system_prompt_runs_all_that_follows_it(chat):
    assert change_system(chat) == (39 - 2, 2)


def test_a_text_that_shares_nothing_starts_anew(chat):
    chat.say([7, *TURNS[3]])
    chat.ids = []
    assert chat.say([8, *TURNS[3]]) == (14, 0)


@pytest.fixture
def windowed(make_config, make_params, tokenizer):
    config = make_config(sliding_window=13, max_window_layers=1)
    generator = Generator(make_llama(config).apply, config, tokenizer, ())
    return Chat(generator, make_params(config))


def test_a_window_of_attention_goes_along(windowed):
    assert windowed.say(SYSTEM + TURNS[3], SAMPLED) == (18, 0)
    assert windowed.say(TURNS[1], SAMPLED) == (8, 28)
    before = windowed.ids
    assert windowed.say(TURNS[1], SAMPLED) == (8, 46)
    windowed.ids = before
    assert windowed.say(TURNS[2], SAMPLED) == (2, 47)


def test_other_parameters_start_anew(chat, make_params, config):
    chat.say(SYSTEM)
    chat.params = {**chat.params}
    assert chat.say(TURNS[0])[1] == 15
    chat.params = make_params(config, seed=5)
    assert chat.say(TURNS[0])[1] == 0


# Broken on purpose.


def test_a_prefix_too_long_is_seen(chat, monkeypatch):
    def careless(text, held, ids):
        return np.minimum(held, len(ids))

    monkeypatch.setattr(slots_module, "_common_lengths", careless)
    with pytest.raises(AssertionError):
        change_system(chat)


@pytest.mark.parametrize(
    "filtered",
    [
        replace(GREEDY, repetition_penalty=1.5),
        replace(GREEDY, no_repeat_ngram_size=1),
    ],
)
def test_filters_that_see_only_the_new_text_are_seen(chat, monkeypatch, filtered):
    place = slots_module.Slots.place

    def forgetful(slots, *args):
        row, shared = place(slots, *args)
        slots.text[row, :shared] = 0
        return row, shared

    chat.say(SYSTEM + TURNS[3], filtered)
    before = chat.ids
    chat.say(TURNS[0], filtered)
    chat.ids = before
    monkeypatch.setattr(slots_module.Slots, "place", forgetful)
    with pytest.raises(AssertionError):
        chat.say(TURNS[0], filtered)


# Capacity and context.


def capacity(chat):
    return chat.session._slots.capacity


def test_capacity_doubles_where_it_must(chat):
    """40 + 11 tokens fit into 64 slots, 54 + 11 do not; the context has 101."""
    chat.say(TURNS[3] * 3 + TURNS[4])
    assert capacity(chat) == 64
    assert chat.say(TURNS[0]) == (1 + 3, 50)
    assert capacity(chat) == 101
    assert chat.say(TURNS[4]) == (1 + 1, 64)
    assert capacity(chat) == 101
    chat.ids = chat.ids[:9]
    assert chat.say([]) == (1, 8)
    assert capacity(chat) == 101


def test_a_reply_ends_where_the_context_is_full(chat):
    chat.say(TURNS[3] * 6)
    assert chat.say(TURNS[0], replace(GREEDY, max_new_tokens=30)) == (4, 88)
    assert chat.session.completion.finish_reason == "length"
    assert len(chat.ids) == 101 and len(chat.session.completion.token_ids) == 9
    chat.ids = chat.ids[:100]
    assert chat.say([]) == (1, 99)
    assert len(chat.session.completion.token_ids) == 1


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "prompt 0 has 0 tokens; give 1 to 100 "),
        ([1] * 101, "prompt 0 has 101 tokens; .*max_position_embeddings=101"),
        ([1, 67], "prompt 0 holds ids from 1 to 67; "),
    ],
)
def test_a_text_that_cannot_go_on_changes_nothing(chat, ids, message):
    chat.say(SYSTEM)
    completion = chat.session.completion
    with pytest.raises(ValueError, match=message):
        chat.session.reply(chat.params, ids, GREEDY)
    assert chat.session.completion is completion
    assert chat.say(TURNS[0]) == (4, 15)


def test_a_reply_takes_no_beams(chat):
    with pytest.raises(ValueError, match=r"num_beams=2: .* set sampling.num_beams=1"):
        chat.session.reply(chat.params, [1], replace(GREEDY, num_beams=2))


# Replies that do not come to their end.


def test_a_reply_closed_early_keeps_what_was_made(chat):
    """The first dispatch makes a token, each further one four."""
    chat.ids = SYSTEM + TURNS[0]
    pieces = chat.session.reply(chat.params, chat.ids, PLAIN)
    next(pieces), next(pieces)
    pieces.close()
    made = chat.session.completion.token_ids
    assert (len(made), chat.session.length) == (5, 8 + 4)
    chat.ids += made
    assert chat.say(TURNS[1], PLAIN) == (1 + 7, 12)


def test_a_reply_that_never_began_leaves_all_as_it_was(chat):
    chat.say(SYSTEM)
    chat.session.reply(chat.params, [8], PLAIN).close()
    assert chat.say(TURNS[0]) == (4, 15)


def test_a_new_reply_ends_the_one_before(chat):
    first = chat.session.reply(chat.params, SYSTEM, PLAIN)
    next(first)
    chat.ids = SYSTEM
    assert chat.say(TURNS[1], PLAIN) == (7, 5)
    assert list(first) == []


@pytest.mark.parametrize("broken", ["prefill", "decode"])
def test_a_failure_that_loses_the_cache_starts_anew(
    chat, generator, monkeypatch, broken
):
    def failing(*args, **options):
        getattr(steps, broken)(*args, **options)
        raise RuntimeError("the device is gone")

    chat.say(SYSTEM)
    steps = generator.steps
    with monkeypatch.context() as patch:
        broken_steps = steps._replace(**{broken: failing})
        patch.setattr(generator, "steps", broken_steps)
        patch.setattr(chat.session._slots, "_steps", broken_steps)
        with pytest.raises(RuntimeError, match="gone"):
            chat.say(TURNS[0])
    assert chat.session.length == 0
    assert chat.say([]) == (5 + 11 + 3, 0)


def test_a_failure_between_dispatches_leaves_a_session_that_is_right(chat, monkeypatch):
    def failing(*args):
        raise KeyboardInterrupt

    chat.say(SYSTEM)
    with monkeypatch.context() as patch:
        patch.setattr("relax.generation.run.Run._append", failing)
        with pytest.raises(KeyboardInterrupt):
            chat.say(TURNS[0])
    chat.say([])


# How a reply ends, by a scripted model; the end of text is id 16.

SCRIPT = [b"a", b"b", b"c", b"h", b"o", b"n", b"pie", b"xyz"]


@pytest.fixture
def reply(scripted):
    """A callable: the completion of "a", and the pieces it came in."""
    model = scripted(SCRIPT)

    def make(max_new_tokens=20, tokens_per_dispatch=3, **options):
        sampling = SamplingConfig(
            temperature=0.0,
            max_new_tokens=max_new_tokens,
            tokens_per_dispatch=tokens_per_dispatch,
            stop_strings=["ie"],
            ignore_eos=options.pop("ignore_eos", False),
        )
        session = Session(model.generator)
        pieces = list(session.reply(model.params, [0], sampling, **options))
        return session, pieces

    return make


def test_pieces_come_by_dispatch_and_stop_strings_add_up(reply):
    session, pieces = reply()
    assert pieces == ["b", "cho", "np"]
    assert session.completion.finish_reason == "stop"
    assert session.completion.token_ids == [1, 2, 4, 11, 12, 15]
    assert session.length == 1 + 5
    assert reply(stop_strings=["on"])[1] == ["b", "ch", ""]
    assert reply(stop_strings=["h", "never"])[1] == ["b", "c"]


def test_tokens_after_a_stop_string_are_not_kept(reply):
    session, pieces = reply(tokens_per_dispatch=64, stop_strings=["ch"])
    assert pieces == ["b", ""]
    assert session.completion.token_ids == [1, 2, 4]
    assert session.length == 1 + 2


def test_stop_ids_of_a_call_are_added_to_the_generators_own(reply):
    session, _ = reply(stop_ids=[11, 50])
    assert session.completion.token_ids == [1, 2, 4, 11]
    assert session.completion.finish_reason == "stop"
    session, _ = reply(stop_ids=[11], ignore_eos=True)
    assert session.completion.token_ids == [1, 2, 4, 11, 12, 15]


def test_the_generators_own_stop_ids_go_on_to_count(scripted):
    model = scripted([b"a", b"b"])
    session = Session(model.generator)
    pieces = session.reply(model.params, [0], GREEDY_STOPS, stop_ids=[11])
    assert list(pieces) == ["b", ""]
    assert session.completion.token_ids == [1, 16]


GREEDY_STOPS = replace(GREEDY, ignore_eos=False)


# Several devices, and no tokenizer.


def test_rows_that_fill_up_a_batch_change_nothing(model, config, tokenizer):
    apply = make_llama(config).apply
    several = Chat(Generator(apply, config, tokenizer, (), 3), model.params)
    assert several.say(SYSTEM + TURNS[0], SAMPLED) == (8, 0)
    assert several.say(TURNS[3], SAMPLED) == (1 + 13, 18)
    assert several.say(TURNS[0], SAMPLED) == (1 + 3, 42)


def test_a_session_without_a_tokenizer_gives_ids(model, config, chat):
    bare = Chat(Generator(make_llama(config).apply, config, None, ()), model.params)
    bare.say(SYSTEM)
    chat.say(SYSTEM)
    assert bare.ids == chat.ids and bare.session.completion.text == ""
    with pytest.raises(ValueError, match=r"sampling.stop_strings=.'x'. need a token"):
        bare.session.reply(bare.params, [1], GREEDY, stop_strings=["x"])


def test_the_cache_stays_in_its_buffers(chat):
    chat.say(SYSTEM)
    given = chat.session._slots._cache.keys
    chat.say(TURNS[0])
    assert given.is_deleted()
    assert not chat.session._slots._is_lost()
