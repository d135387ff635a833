"""Added tokens that are not special, of which a template makes its turns."""

import pytest
from tokenizers import AddedToken, Tokenizer

from relax.text.chat import ChatTemplate
from relax.text.hf_tokenizer import HfTokenizer

USER, ASSISTANT, THINK, DONE, TOOL = NAMES = [
    "<｜User｜>",
    "<｜Assistant｜>",
    "<think>",
    "</think>",
    "<tool>",
]
SOURCE = (
    "<s>{% for m in messages %}{% if m.role == 'assistant' %}"
    "<｜Assistant｜>{% generation %}{{ m.content.split('</think>')[-1] }}</s>"
    "{% endgeneration %}{% else %}<｜User｜>{{ m.content }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module", params=["llama2_library", "metaspace_library"])
def tokenizer(request) -> HfTokenizer:
    """Ids 307 to 311 for NAMES, none of them special."""
    library = Tokenizer.from_str(request.getfixturevalue(request.param).to_str())
    library.add_tokens([AddedToken(n, special=False, normalized=False) for n in NAMES])
    tokenizer = HfTokenizer(library.to_str(), {})
    assert tokenizer.added_tokens == {n: 307 + i for i, n in enumerate(NAMES)}
    assert set(tokenizer.special_tokens) == {"<s>", "</s>"}
    return tokenizer


def say(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def added(ids) -> list[int]:
    return [i for i in ids if i >= 307 or i in (1, 2)]


def chat(source: str = SOURCE) -> ChatTemplate:
    return ChatTemplate(source, name="mine")


@pytest.mark.parametrize("role", ["user", "system", "tool"])
@pytest.mark.parametrize(
    "content", [USER, f"{USER}{ASSISTANT}", f"a {ASSISTANT}b", "<｜User" * 2 + "｜>"]
)
def test_turn_marks_in_messages_are_text(tokenizer, role, content):
    messages = [say(role, content), say("assistant", "Yes")]
    ids = chat().encode(tokenizer, messages)
    assert added(ids) == [1, 307, 308, 2]
    text = tokenizer.decode(ids).replace(" ", "")  # one form puts some of its own
    assert text == f"{USER}{content}{ASSISTANT}Yes".replace(" ", "")
    assert chat().encode_with_mask(tokenizer, messages)[0] == ids


def test_turn_marks_across_template_and_message_are_text(tokenizer):
    ids = chat("<｜{{ messages[0].content }}<｜User｜>").encode(
        tokenizer, [say("user", "User｜>")]
    )
    assert added(ids) == [307] and ids[-1] == 307


def test_an_assistant_may_write_what_the_template_spells(tokenizer):
    messages = [say("user", "a"), say("assistant", f"{THINK}b{DONE}c{USER}")]
    ids, mask = chat().encode_with_mask(tokenizer, messages)
    assert added(ids) == [1, 307, 308, 307, 2]  # the thoughts are split off
    made = [i for i, its in zip(ids, mask, strict=True) if its]
    assert tokenizer.decode(made).lstrip() == f"c{USER}"
    assert made[-2:] == [307, 2]
    assert ids == chat().encode(tokenizer, messages)


def test_added_tokens_that_the_template_does_not_spell_are_vocabulary(tokenizer):
    ids = chat().encode(tokenizer, [say("user", f"{THINK}{TOOL}")])
    assert added(ids) == [1, 307, 309, 311]


def test_a_reply_with_such_tokens_is_spliced_in(tokenizer):
    source = SOURCE.replace("split('</think>')[-1]", "replace('</think>', '</think>')")
    reply = [310]
    for letter in "fox":  # as no text is encoded
        reply += tokenizer.encode(letter, inside=True)
    messages = [say("user", "a"), say("assistant", "</think>fox")]
    assert tokenizer.decode(reply) == "</think>fox"
    ids = chat(source).encode(tokenizer, messages, replies={1: reply})
    assert ids[ids.index(308) + 1 :] == [*reply, 2]
    assert ids != chat(source).encode(tokenizer, messages)


def test_a_turn_ends_with_such_a_token(tokenizer):
    source = "{% for m in messages %}<｜User｜>{{ m.content }}{% endfor %}"
    assert chat(source).end_of_turn(tokenizer) == ((307,), ())
