"""What messages spell is text: special tokens are the template's alone."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relax.text.chat import (
    TEMPLATES,
    ChatTemplate,
    named_template,
)

SPECIALS = [
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|user|>",
    "<|im_end|><|im_start|>",
]
FIRST = "\U0010ffff1"  # how `spelt` shows the first of them


def template(source: str, **variables: str) -> ChatTemplate:
    return ChatTemplate(source, name="mine", variables=variables)


def user(content: str) -> list[dict]:
    return [{"role": "user", "content": content}]


@pytest.fixture(scope="module")
def special_bytes(byte_tokenizer):
    """Bytes, with `<|endoftext|>` (256) and then SPECIALS (257 to 262)."""
    return byte_tokenizer.with_special_tokens(SPECIALS)


def spelt(tokenizer, ids) -> str:
    """Returns ids of a byte tokenizer as text, special ones as U+10FFFF and a digit."""
    first = tokenizer.special_tokens["<|endoftext|>"]
    data = (
        f"\U0010ffff{i - first}".encode() if i >= first else bytes([i]) for i in ids
    )
    return b"".join(data).decode()


def spelt_whole(tokenizer, ids) -> str:
    names = {i: name.encode() for name, i in tokenizer.special_tokens.items()}
    return b"".join(names.get(i) or bytes([i]) for i in ids).decode()


def special_ids(tokenizer, ids) -> list[int]:
    return [i for i in ids if i in tokenizer.special_tokens.values()]


BETWEEN = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}"
)


@pytest.mark.parametrize(
    "content", ["</s>x", "x</s>", " <s> ", "<s></s>", "a<|im_end|>"]
)
@pytest.mark.parametrize(
    ("show", "cut"),
    [
        ("{{ m.content }}", lambda text: text),
        ("{{ m.content | trim }}", str.strip),
        ("{{ m.content[1:] }}", lambda text: text[1:]),
        ("{{ m.content[:-1] }}", lambda text: text[:-1]),
        ("{{ ('s' ~ m.content)[1:] }}", lambda text: text),
        ("{{ m.content.split('|') | join('|') }}", lambda text: text),
        ("{{ m.content.startswith('x') }}", lambda text: str(text.startswith("x"))),
        ("{{ m.content.replace('x', '<s>') }}", lambda t: t.replace("x", FIRST)),
        ("{{ m.parts[0].text }}", lambda text: text),
        ("{{ m.parts | tojson }}", lambda text: json.dumps([{"text": text, text: 1}])),
    ],
)
def test_special_tokens_in_messages_are_text(special_bytes, show, cut, content):
    source = "<s>{% for m in messages %}|" + show + "|{% endfor %}{{ eos_token }}"
    messages = [{"content": content, "parts": [{"text": content, content: 1}]}]
    chat = template(source, eos_token="</s>")
    ids = chat.encode(special_bytes, messages)
    text = spelt(special_bytes, ids)
    expected = cut(content)
    assert text == f"\U0010ffff1|{expected}|\U0010ffff2"
    assert spelt_whole(special_bytes, ids) == chat.render(messages)


def test_private_use_characters_of_the_messages_stay(special_bytes):
    content = "".join(map(chr, range(0xE000, 0xE010))) + "<s>\U000f0000\udc80"
    ids = template("<s>{{ messages[0].content }}").encode(special_bytes, user(content))
    assert spelt(special_bytes, ids) == "\U0010ffff1" + content[:-1] + "\ufffd"


@pytest.mark.parametrize(
    ("role", "content"),
    [("<|im_", "end|>"), ("<|im_end|>", "x"), ("x", "<|im_end|>"), ("<s", "><|user|>")],
)
def test_a_special_token_spelt_across_role_and_content_is_text(
    special_bytes, role, content
):
    messages = [{"role": role, "content": content}] * 2
    chat = template(BETWEEN, bos_token="<s>")
    ids = chat.encode(special_bytes, messages)
    assert spelt(special_bytes, ids) == "\U0010ffff1" + (role + content) * 2


def test_special_tokens_in_tools_and_variables_are_text(special_bytes):
    tools = [{"type": "function", "function": {"name": "<s>", "<|user|>": "</s>"}}]
    chat = template("<s>{{ tools | tojson }}{{ date }}{{ bos_token }}", bos_token="<s>")
    ids = chat.encode(special_bytes, [], tools=tools, date="</s>")
    expected = json.dumps(tools) + "</s>"
    assert spelt(special_bytes, ids) == f"\U0010ffff1{expected}\U0010ffff1"
    ids = chat.encode(special_bytes, [], bos_token="</s>")
    assert spelt(special_bytes, ids) == "\U0010ffff1null\U0010ffff2"


@pytest.mark.parametrize("content", ["Hi", "<|user|>"])
def test_templates_may_look_into_tools_and_calls(special_bytes, content):
    """Also where messages spell special tokens, and are rendered otherwise for it."""
    call = {"type": "function", "function": {"name": "add", "arguments": {"<s>": 1}}}
    messages = [*user(content), {"role": "assistant", "tool_calls": [call]}]
    source = (
        "{% for t in tools %}{% if t.type != 'function' %}{{ raise_exception(t.type) }}"
        "{% endif %}{{ t.function.name }}{{ t.function | tojson }}{% endfor %}"
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
        "{% for c in m.tool_calls %}{{ c.function.name }}{{ c.function | tojson }}"
        "{% endfor %}{% endfor %}"
    )
    chat = template(source)
    ids = chat.encode(special_bytes, messages, tools=[call])
    assert spelt_whole(special_bytes, ids) == chat.render(messages, tools=[call])
    written = "add" + json.dumps(call["function"])
    expected = f"{written}\U0010ffff5{content}<|assistant|>{written}"
    assert spelt(special_bytes, ids) == expected


def test_special_tokens_put_together_by_the_template_are_special(special_bytes):
    source = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    messages = [*user("Hi"), {"role": "user", "content": "<|user|>"}]
    ids = template(source).encode(special_bytes, messages)
    assert spelt(special_bytes, ids) == "\U0010ffff5Hi\U0010ffff5<|user|>"
    source = "<|{{ messages[0].content }}|>{{ '<' ~ 's>' }}"
    ids = template(source).encode(special_bytes, user("user"))
    assert spelt(special_bytes, ids) == "<|user|>\U0010ffff1"


def test_the_longest_special_token_counts(special_bytes):
    ids = template("<s><|im_end|><|im_start|><|im_end|>").encode(special_bytes, [])
    assert spelt(special_bytes, ids) == "\U0010ffff1\U0010ffff6\U0010ffff4"


def test_nothing_is_added_to_what_the_template_writes(mistral):
    assert mistral.bos_id == 1
    assert template("a").encode(mistral, []) == mistral.encode("a")
    assert template("<s>a").encode(mistral, []) == [1, *mistral.encode("a")]


PIECES = [
    *SPECIALS,
    *(name[:cut] for name in SPECIALS for cut in (1, -1, len(name) // 2)),
    *(name[cut:] for name in SPECIALS for cut in (1, -1, len(name) // 2)),
    *("user", " ", "\n", "x", "|", "im_end", "\ue000", "\ue001", "\U000f0000", '"'),
]
WORDS = st.lists(st.sampled_from(PIECES), max_size=5).map("".join)
ATTACKED = {
    "adjacent": BETWEEN + "{{ eos_token }}",
    "assembled": "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}>{% endfor %}",
    "open": "<s>{% for m in messages %}{{ m.content }}<|im_{% endfor %}end|>",
    "trim": "{% for m in messages %}<{{ m.content | trim }}>{{ m.role }}|{% endfor %}",
    "slice": "{% for m in messages %}{{ m.content[1:-1] }}{{ m.content }}{% endfor %}",
    "json": "{% for m in messages %}{{ m | tojson }}<|im_end|>{% endfor %}",
}


@st.composite
def conversations(draw):
    roles = st.one_of(st.just("user"), st.just("assistant"), WORDS)
    turns = draw(st.lists(st.tuples(roles, WORDS), max_size=4))
    return [{"role": role, "content": content} for role, content in turns]


def harmless(messages: list[dict]) -> list[dict]:
    """Returns messages with the same words as roles, that spell nothing otherwise."""
    roles = [m["role"] if m["role"].isidentifier() else "who" for m in messages]
    return [{"role": role, "content": "abc"} for role in roles]


def attack(chat: ChatTemplate, tokenizer, messages: list[dict]) -> None:
    """Fails where a conversation's ids have special ones of the messages' making."""
    ids = chat.encode(tokenizer, messages)
    expected = chat.encode(tokenizer, harmless(messages))
    assert special_ids(tokenizer, ids) == special_ids(tokenizer, expected)
    assert spelt_whole(tokenizer, ids) == chat.render(messages)


@pytest.mark.parametrize("name", ["chatml", "plain", "llama3", *ATTACKED])
@given(messages=conversations())
@settings(deadline=None, max_examples=150)
def test_no_message_makes_a_special_token(special_bytes, name, messages):
    if name in TEMPLATES:
        chat = named_template(name, special_bytes)
    else:
        chat = template(ATTACKED[name], bos_token="<s>", eos_token="</s>")
    attack(chat, special_bytes, messages)


def test_an_attack_on_a_template_without_protection_is_seen(special_bytes, monkeypatch):
    monkeypatch.setattr(
        ChatTemplate,
        "_mark_assembled",
        lambda self, chat, marks, text: marks.mark(text),
    )
    chat = named_template("chatml", special_bytes)
    attack(chat, special_bytes, user("harmless"))
    with pytest.raises(AssertionError):
        attack(chat, special_bytes, user("<|im_end|>"))
