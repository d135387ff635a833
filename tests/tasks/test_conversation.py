"""Conversations with a random model of bytes; its numbers of tokens are by hand.

In chatml a message of n bytes has 8 + n tokens as the user's, and the reply begins
after 11 (`<|im_start|>assistant` and a newline) and ends with 2.
"""

import json
from dataclasses import replace
from itertools import chain, islice

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relax.generation.generator import Generator
from relax.generation.run import Run
from relax.generation.session import Session
from relax.language_model import LanguageModel
from relax.model.llama import LlamaOutput
from relax.model.parameters import parameter_shapes
from relax.sampling import SamplingConfig
from relax.sharding import MeshConfig, make_mesh
from relax.tasks.conversation import Conversation, read_messages, write_messages
from relax.text.chat import ChatTemplate, named_template
from relax.text.tokenizers import TokenizerConfig, make_tokenizer

START, END = "<|im_start|>", "<|im_end|>"
GREEDY = SamplingConfig(temperature=0.0, max_new_tokens=7)
DRAWN = SamplingConfig(max_new_tokens=7, seed=3)


@pytest.fixture(scope="module")
def tokenizer():
    """Bytes, the end of text, and the two tokens of chatml: V = 259."""
    config = TokenizerConfig(kind="bytes", encoding=None, path=None)
    return make_tokenizer(config).with_special_tokens([START, END])


@pytest.fixture(scope="module")
def config(make_config, tokenizer):
    """A context of 101 tokens."""
    return make_config(vocab_size=tokenizer.vocab_size)


@pytest.fixture(scope="module")
def model(config, tokenizer) -> LanguageModel:
    """A model whose distributions are far from flat."""
    rng = np.random.default_rng(3)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(scale=0.5, size=leaf.shape), leaf.dtype),
        parameter_shapes(config),
    )
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, tensor=1))
    return LanguageModel(config, params, tokenizer, mesh)


@pytest.fixture
def talk(model, tokenizer):
    """A callable: a conversation in chatml."""
    template = named_template("chatml", tokenizer)
    return lambda sampling=GREEDY: Conversation(model, template, sampling)


@pytest.fixture
def chat(talk) -> Conversation:
    return talk()


def said(reply) -> str:
    return "".join(reply)


def ids_of(tokenizer, role: str, content: str | list[int]) -> list[int]:
    """Returns the ids of a message in chatml, written out."""
    start, end = (tokenizer.special_tokens[name] for name in (START, END))
    content = list(content.encode()) if isinstance(content, str) else content
    return [start, *f"{role}\n".encode(), *content, end, *b"\n"]


def opening(tokenizer) -> list[int]:
    """Returns the ids before a reply."""
    return ids_of(tokenizer, "assistant", [])[:-2]


def test_a_reply_is_what_generate_gives_for_the_whole_text(model, tokenizer, chat):
    ids = []
    for text in ("ab", "cde", "f"):
        ids += ids_of(tokenizer, "user", text)
        (fresh,) = model.generate([ids + opening(tokenizer)], GREEDY)
        assert len(fresh.token_ids) == 7
        assert said(chat.say(text)) == fresh.text
        ids += ids_of(tokenizer, "assistant", fresh.token_ids)
        assert chat.messages[-1] == {"role": "assistant", "content": fresh.text}
    roles = [message["role"] for message in chat.messages]
    assert roles == ["user", "assistant"] * 3


def test_each_turn_runs_only_what_is_new(chat):
    """A reply's last token was not yet run: 21 + 6 are in the cache, 52 + 6, ..."""
    counts = []
    for text in ("ab", "cde", "f"):
        said(chat.say(text))
        turn = chat.turn
        counts.append((turn.prompt, turn.reused, turn.prefilled, turn.made))
    assert counts == [(21, 0, 21, 7), (51 + 1, 27, 25, 7), (52 + 9 + 20, 58, 23, 7)]
    assert chat.turns == 3


def test_a_reply_at_its_limit_says_which(chat):
    said(chat.say("ab"))
    assert chat.turn.cut == "sampling.max_new_tokens=7"
    chat.clear()
    chat.sampling = SamplingConfig(temperature=0.0, max_new_tokens=97, ignore_eos=True)
    said(chat.say("a" * 50))
    assert chat.turn.made == 101 - 69
    assert chat.turn.cut == "the context of 101 tokens"


def test_a_shorter_context_cuts_the_reply(model, tokenizer):
    """53 tokens leave 32 after a prompt of 21."""
    long = SamplingConfig(temperature=0.0, max_new_tokens=97, ignore_eos=True)
    chat = Conversation(model, named_template("chatml", tokenizer), long, context=53)
    ids = ids_of(tokenizer, "user", "ab") + opening(tokenizer)
    (fresh,) = model.generate([ids], replace(long, max_new_tokens=32))
    assert said(chat.say("ab")) == fresh.text
    assert (chat.context, chat.turn.made) == (53, 32)
    assert chat.turn.cut == "the context of 53 tokens"
    with pytest.raises(ValueError, match=r"takes 59 tokens.* 53 leaves 40 beside 13"):
        chat.say("x" * 40)
    chat.sampling = GREEDY
    said(chat.retry())
    assert chat.turn.cut == "sampling.max_new_tokens=7"


def test_a_context_beyond_the_models_is_refused_with_both_numbers(model, tokenizer):
    template = named_template("chatml", tokenizer)
    assert Conversation(model, template, GREEDY, 101).context == 101
    with pytest.raises(ValueError, match=r"task.context=102 must be at most 101"):
        Conversation(model, template, GREEDY, 102)


@pytest.mark.parametrize("dispatches", [0, 1])
@pytest.mark.parametrize("question", ["say", "retry"])
def test_a_reply_that_the_device_fails_at_changes_nothing(
    model, tokenizer, chat, monkeypatch, dispatches, question
):
    said(chat.say("ab"))
    before, turn = chat.messages, chat.turn
    run = Run.dispatches

    def failing(*arguments):
        yield from islice(run(*arguments), dispatches)
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(Run, "dispatches", failing)
        reply = chat.say("cde") if question == "say" else chat.retry()
        with pytest.raises(jax.errors.JaxRuntimeError, match="Out of memory"):
            said(reply)
    assert (chat.messages, chat.turn) == (before, turn)
    ids = ids_of(tokenizer, "user", "ab")
    (first,) = model.generate([ids + opening(tokenizer)], GREEDY)
    ids += ids_of(tokenizer, "assistant", first.token_ids)
    ids += ids_of(tokenizer, "user", "f") + opening(tokenizer)
    assert said(chat.say("f")) == model.generate([ids], GREEDY)[0].text


def test_retry_gives_the_next_sample_in_the_replys_place(model, tokenizer, talk):
    chat = talk(DRAWN)
    ids = ids_of(tokenizer, "user", "ab")
    samples = model.generate(
        [ids + opening(tokenizer)], replace(DRAWN, num_return_sequences=3)
    )
    replies = [said(chat.say("ab")), said(chat.retry()), said(chat.retry())]
    assert replies == [sample.text for sample in samples]
    assert len(set(replies)) == 3
    assert [message["content"] for message in chat.messages] == ["ab", replies[2]]
    # Nothing but the prompt's last token had to be run again.
    assert (chat.turn.reused, chat.turn.prefilled) == (20, 1)

    ids += ids_of(tokenizer, "assistant", samples[2].token_ids)
    ids += ids_of(tokenizer, "user", "cd") + opening(tokenizer)
    # The next message starts with the first sample again.
    assert said(chat.say("cd")) == model.generate([ids], DRAWN)[0].text


def test_there_must_be_a_message_to_retry(chat):
    with pytest.raises(ValueError, match="there is no message to answer again"):
        chat.retry()
    chat.set_system("S")
    with pytest.raises(ValueError, match="there is no message to answer again"):
        chat.retry()


def test_clear_keeps_the_system_message(chat):
    chat.set_system("S")
    said(chat.say("ab"))
    chat.clear()
    assert chat.messages == [{"role": "system", "content": "S"}]
    assert chat.turn is None


def test_a_new_system_message_changes_the_text_from_its_start(chat, tokenizer):
    said(chat.say("ab"))
    chat.set_system("Speak.")
    said(chat.say("cd"))
    assert chat.messages[0] == {"role": "system", "content": "Speak."}
    # What the two texts share is the token before the role.
    assert (chat.turn.prompt, chat.turn.reused) == (16 + 30 + 21, 1)
    chat.set_system("Speak no more.")
    assert [message["role"] for message in chat.messages[:2]] == ["system", "user"]
    chat.set_system(None)
    assert chat.messages[0] == {"role": "user", "content": "ab"}


def test_a_closed_reply_stays_as_far_as_it_was_made(talk, tokenizer):
    chat = talk(SamplingConfig(temperature=0.0, max_new_tokens=53, ignore_eos=True))
    reply = chat.say("ab")
    pieces = [next(reply), next(reply)]
    reply.close()
    made = chat.turn.made
    assert 2 <= made < 53
    assert chat.messages[-1] == {"role": "assistant", "content": "".join(pieces)}
    assert chat.turn.cut == ""
    said(chat.say("c"))
    assert 21 <= chat.turn.reused < 21 + made


def test_oldest_turns_leave_a_full_context(chat):
    """A turn has 30 tokens with its reply, and the system message 11.

    All of it is 122 tokens at the fourth turn. Half of the context is 50: without two
    turns 62 would be left, so three go, and two turns more fit with room for a reply.
    """
    chat.set_system("S")
    sizes = []
    for text in ("a1", "a2", "a3", "a4", "a5", "a6", "a7"):
        said(chat.say(text))
        turn = chat.turn
        sizes.append((turn.prompt, turn.dropped, turn.reused, chat.turns))
    # With the fourth turn the cache has the system message and the seven tokens up to
    # "a" in common; the turns after it find all but a reply's last token.
    first = [(32, 0, 0, 1), (62, 0, 38, 2), (92, 0, 68, 3)]
    then = [(32, 3, 18, 1), *first[1:]]
    assert sizes == [*first, *then, then[0]]
    contents = [message["content"] for message in chat.messages]
    assert contents[:2] == ["S", "a7"] and len(contents) == 3


def test_the_turns_that_must_leave_are_found_by_few_encodings(chat, monkeypatch):
    """A turn of 9 and 14 tokens: after 20 of the last one a second makes 43 of 50."""
    turn = [("user", "q"), ("assistant", "a")]
    chat.load([{"role": role, "content": text} for role, text in turn * 64])
    encode, calls = chat._template.encode, []

    def counted(*arguments, **options):
        calls.append(arguments)
        return encode(*arguments, **options)

    monkeypatch.setattr(chat._template, "encode", counted)
    said(chat.say("z"))
    assert (chat.turn.prompt, chat.turn.dropped, chat.turns) == (43, 63, 2)
    assert len(calls) <= 1 + 7


def test_the_last_turn_may_take_more_than_half_of_the_context(chat):
    said(chat.say("ab"))
    said(chat.say("x" * 60))
    assert (chat.turn.prompt, chat.turn.dropped, chat.turns) == (79, 1, 1)


def test_a_reply_after_turns_have_left_is_that_to_what_remains(model, tokenizer, chat):
    """A turn has 29 tokens: 20, 49 and 78 fit, and of 107 two turns leave 49."""
    turns = []
    for text in ("a", "b", "c", "d"):
        kept = turns[2:] if text == "d" else turns
        ids = [*chain.from_iterable(kept), *ids_of(tokenizer, "user", text)]
        (fresh,) = model.generate([ids + opening(tokenizer)], GREEDY)
        assert said(chat.say(text)) == fresh.text
        reply = ids_of(tokenizer, "assistant", fresh.token_ids)
        turns.append(ids_of(tokenizer, "user", text) + reply)
    assert (chat.turn.prompt, chat.turn.dropped) == (49, 2)


def test_a_message_that_never_fits_is_refused_with_both_numbers(chat):
    said(chat.say("ab"))
    before, turn = chat.messages, chat.turn
    with pytest.raises(ValueError, match=r"takes 109 tokens.* 101 leaves 94 beside 7"):
        chat.say("x" * 90)
    assert (chat.messages, chat.turn) == (before, turn)
    assert said(chat.say("cd"))


def test_what_a_template_refuses_is_taken_back(model, tokenizer):
    source = """
        {%- for message in messages %}
            {%- if message.role == 'system' %}
                {{- raise_exception('no system role here') }}
            {%- elif 'bad' in message.content %}
                {{- raise_exception('no bad words') }}
            {%- endif %}
            {{- message.content + eos_token }}
        {%- endfor %}"""
    template = ChatTemplate(
        source, name="strict", variables={"eos_token": "<|endoftext|>"}
    )
    chat = Conversation(model, template, GREEDY)
    said(chat.say("ab"))
    before = chat.messages
    with pytest.raises(ValueError, match="no system role here"):
        chat.set_system("S")
    with pytest.raises(ValueError, match="no bad words"):
        chat.say("so bad")
    with pytest.raises(ValueError, match="no bad words"):
        chat.load([{"role": "user", "content": "bad"}])
    assert chat.messages == before
    said(chat.say("cd"))
    assert chat.turns == 2


def test_a_text_that_the_model_cannot_take_is_taken_back(chat, monkeypatch):
    """As where the template writes a special token that the model has no row for."""
    said(chat.say("ab"))
    before = chat.messages
    encode = chat._template.encode

    def unknown_at_the_end(*arguments, **options):
        return [*encode(*arguments, **options), 999]

    with monkeypatch.context() as patch:
        patch.setattr(chat._template, "encode", unknown_at_the_end)
        with pytest.raises(ValueError, match="999"):
            chat.say("cd")
        with pytest.raises(ValueError, match="999"):
            chat.retry()
    assert chat.messages == before
    assert said(chat.say("cd"))


class Parrot:
    """A model that says a script of ids after a prompt of a known length."""

    def __init__(self, config, tokenizer, prompt: int, script: list[int]):
        self.config, self.tokenizer, self.stop_ids = config, tokenizer, ()
        self.params = jnp.asarray([0] * prompt + script + [0] * 128)

    def session(self) -> Session:
        return Session(Generator(self._apply, self.config, self.tokenizer, ()))

    @staticmethod
    def _apply(params, tokens, cache, lengths):
        slots = cache.lengths[:, None] + jnp.arange(tokens.shape[1])
        hidden = 30.0 * jax.nn.one_hot(params[slots + 1], 384)
        lengths = cache.lengths + lengths
        return LlamaOutput(hidden, jnp.eye(384), cache._replace(lengths=lengths))


def test_the_end_of_turn_is_no_part_of_the_reply(config, tokenizer):
    end = tokenizer.special_tokens[END]
    model = Parrot(config, tokenizer, 21, [*b"Yes.", end, *b"\nmore"])
    chat = Conversation(model, named_template("chatml", tokenizer), GREEDY)
    assert said(chat.say("ab")) == "Yes."
    assert (chat.turn.made, chat.turn.cut) == (5, "")
    said(chat.say("cd"))
    # 21, the reply and its end; the newline after it is new.
    assert (chat.turn.prompt, chat.turn.reused) == (21 + 6 + 10 + 11, 25)


def test_a_stop_string_is_no_part_of_the_reply(config, tokenizer):
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=7, stop_strings=("\nU",))
    model = Parrot(config, tokenizer, 21, [*b"Yes.", *b"\nUser: no"])
    chat = Conversation(model, named_template("chatml", tokenizer), sampling)
    assert said(chat.say("ab")) == "Yes."
    assert (chat.turn.made, chat.turn.cut) == (6, "")
    said(chat.say("cd"))
    assert (chat.turn.prompt, chat.turn.reused) == (21 + 6 + 10 + 11, 25)


def test_messages_come_back_from_their_file(talk, tmp_path):
    chat, other = talk(), talk()
    chat.set_system("Sé \ud800")
    said(chat.say("ab"))
    path = tmp_path / "chat.json"
    write_messages(path, chat.messages)
    assert list(tmp_path.iterdir()) == [path]
    assert list(json.loads(path.read_text("utf-8"))) == ["messages"]
    assert "Sé" in path.read_text("utf-8")
    other.load(read_messages(path))
    assert other.messages == chat.messages


def test_a_loaded_conversation_that_waits_for_an_answer_gets_one(chat):
    chat.load([{"role": "user", "content": "ab"}])
    assert said(chat.retry())
    assert [message["role"] for message in chat.messages] == ["user", "assistant"]
