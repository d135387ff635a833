"""Chat templates: text, ids, masks and ends of turns; replies; a folder's own."""

import json
import re

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from relax.text.chat import (
    TEMPLATES,
    ChatTemplate,
    load_template,
    named_template,
)
from relax.text.folder import load_folder_tokenizer
from relax.text.hf_tokenizer import HfTokenizer

RENDERS, MASKS = 54, 12
SPECIALS = [
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|user|>",
    "<|im_end|><|im_start|>",
]
QUESTION = [{"role": "user", "content": "Hi"}]
TURN = [*QUESTION, {"role": "assistant", "content": "Yes"}]
TURNS = [*TURN, {"role": "user", "content": " And?\n"}]
SYSTEM = {"role": "system", "content": "Be\nbrief. "}


def template(source: str, **variables: str) -> ChatTemplate:
    return ChatTemplate(source, name="mine", variables=variables)


@pytest.fixture(scope="module")
def oracle(oracle_dir) -> dict:
    return json.loads((oracle_dir / "chat_templates.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def gpt2_chat(oracle, data_dir, tmp_path_factory):
    """GPT-2 with the oracle's added tokens, the two of thinking ordinary ones."""
    cache = data_dir / "tiktoken_cache"
    vocab = json.loads((cache / "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6").read_text())
    lines = (cache / "6d1cbeee0f20b3d9449abfede4726ed8212e3aee").read_text()
    merges = [tuple(line.split()) for line in lines.splitlines()[1:] if line]
    library = tokenizers.Tokenizer(models.BPE(vocab, merges))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    names = list(oracle["special_token_ids"])
    library.add_tokens(
        [AddedToken(n, special="think" not in n, normalized=False) for n in names]
    )
    folder = tmp_path_factory.mktemp("gpt2_chat")
    library.save(str(folder / "tokenizer.json"))
    tokenizer = load_folder_tokenizer(folder)
    assert [library.token_to_id(n) for n in names] == [*range(50257, 50265)]
    assert set(tokenizer.special_tokens) >= {n for n in names if "think" not in n}
    assert not set(tokenizer.special_tokens) & {"<think>", "</think>"}
    return tokenizer


@pytest.fixture(scope="module")
def special_bytes(byte_tokenizer):
    """Bytes, with `<|endoftext|>` (256) and then SPECIALS (257 to 262)."""
    return byte_tokenizer.with_special_tokens(SPECIALS)


def spelt_whole(tokenizer, ids) -> str:
    names = {i: name.encode() for name, i in tokenizer.special_tokens.items()}
    return b"".join(names.get(i) or bytes([i]) for i in ids).decode()


# What transformers renders


def from_oracle(oracle, case) -> ChatTemplate:
    source = oracle["templates"][case["template"]]
    return ChatTemplate(
        source, name=case["template"], variables={"bos_token": "<|begin_of_text|>"}
    )


def test_every_text_equals_that_of_transformers(oracle):
    texts = [
        from_oracle(oracle, case).render(
            oracle["conversations"][case["messages"]],
            add_generation_prompt=case["add_generation_prompt"],
            **case["kwargs"],
        )
        for case in oracle["renders"]
    ]
    assert len(texts) == RENDERS
    assert texts == [case["text"] for case in oracle["renders"]]


def test_every_mask_and_its_ids_equal_those_of_transformers(oracle, gpt2_chat):
    assert len(oracle["masks"]) == MASKS
    for case in oracle["masks"]:
        chat = from_oracle(oracle, case)
        messages = oracle["conversations"][case["messages"]]
        ids, mask = chat.encode_with_mask(gpt2_chat, messages)
        assert ids == case["input_ids"] == chat.encode(gpt2_chat, messages)
        assert mask == [bool(value) for value in case["assistant_masks"]]


def test_every_oracle_template_ends_a_turn_with_its_own_token(oracle, gpt2_chat):
    ends = {
        name: template(source, bos_token="").end_of_turn(gpt2_chat)
        for name, source in oracle["templates"].items()
    }
    assert ends == {
        name: (((50262,) if "llama" in name else (50258,)), ()) for name in ends
    }
    assert len(ends) == 9


def test_a_template_has_what_transformers_gives_it():
    source = (
        "{% for m in messages %}\n"
        "    {% if m.role == 'system' %}{% continue %}{% endif %}\n"
        "{{ m | tojson }}\n"
        "{%- endfor %}{{ strftime_now('%Y') | length }}{{ tools is none }}"
        "{{ documents is none }}{{ add_generation_prompt }}{{ mine }}{{ absent }}\n"
    )
    messages = [SYSTEM, {"role": "user", "content": "<é'&>"}]
    text = template(source, mine="!").render(messages)
    expected = '{"role": "user", "content": "<é\'&>"}4TrueTrueFalse!'
    assert text == expected
    assert template(source, mine="!").render(messages, mine="?") == expected[:-1] + "?"


# Errors


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('no\n such role') }}", "mine: no such role$"),
        ("a\n{% if %}", "mine, line 2: Expected an expression, got 'end of stat"),
        ("{% generation %}", "mine, line 1: Unexpected end of template"),
        ("{{ a.b.c }}", "mine uses what is not defined: 'a' is undefined"),
        ("{{ 1 + 'a' }}", "mine fails with TypeError: unsupported operand"),
        ("{{ ''.__class__.__mro__ }}", "forbidden to it: access to attribute '__cla"),
        ("{{ messages.append(1) }}", "forbidden to it: access to attribute 'append'"),
        ("{{ messages[0].update(a=1) }}", "forbidden to it: .* attribute 'update'"),
        ("{{ '{0.__class__.a}'.format(1) }}", "forbidden to it: .* '__class__'"),
        ("{{ range(10 ** 9) }}", "mine fails with OverflowError: Range too big"),
        ("{% include 'a' %}", "mine fails with TypeError: no loader"),
    ],
)
def test_a_failing_template_is_named_in_one_line(source, message):
    with pytest.raises(ValueError, match=r"^chat template mine") as caught:
        template(source).render(QUESTION)
    assert re.search(message, str(caught.value))
    assert "\n" not in str(caught.value)


def test_a_syntax_error_is_seen_before_anything_is_rendered():
    with pytest.raises(ValueError, match="mine, line 1"):
        template("{% for %}")


def test_rendering_leaves_the_messages_as_they_were():
    messages = [{"role": "user", "content": "a <s>", "calls": [{"b": ["</s>"]}]}]
    before = json.dumps(messages)
    template("{{ messages }}").render(messages)
    assert json.dumps(messages) == before


# Masks


def test_a_token_with_any_character_inside_is_masked_in(special_bytes):
    source = (
        "{% macro say(m) %}{% generation %}{{ m.content }}</s>{% endgeneration %}"
        "{% endmacro %}{% for m in messages %}{{ say(m) if m.role == 'assistant' else "
        "m.content }}\n{% endfor %}"
    )
    ids, mask = template(source).encode_with_mask(special_bytes, TURN)
    assert spelt_whole(special_bytes, ids) == "Hi\nYes</s>\n"
    assert mask == [False] * 3 + [True] * 4 + [False]


def test_a_token_across_the_mark_is_masked_in(gpt2):
    source = "Say{% generation %} hello wor{% endgeneration %}ld{{ '!' }}"
    ids, mask = template(source).encode_with_mask(gpt2, [])
    assert [gpt2.decode([i]) for i in ids] == ["Say", " hello", " world", "!"]
    assert mask == [False, True, True, False]


def test_a_mask_needs_marks(special_bytes):
    chat = template("{# {% generation %} #}{{ messages }}")
    assert not chat.has_generation_marks
    with pytest.raises(ValueError, match=r"mine has no .% generation %. marks"):
        chat.encode_with_mask(special_bytes, TURN)


# The end of a turn


@pytest.mark.parametrize(
    ("source", "end"),
    [
        ("{{ m.content }}</s>", ((258,), ())),
        ("{{ m.content[:1] }} .</s><s>", ((258,), ())),
        ("{% if not loop.last %}{{ m.content }}</s>{% endif %}", ((258,), ())),
        ("<|{{ m.role }}|>{{ m.content }}", ((261,), ())),
        ("{{ '\\n' + m.role }}: {{ m.content | trim }}", ((), ("\nuser:",))),
        ("{{ m.content }} ## End\n", ((), ("## End",))),
        ("{{ m.content }}", ((), ())),
        ("{{ m.role }}</s>", ((), ())),
    ],
)
def test_the_end_of_a_turn(special_bytes, source, end):
    chat = template("{% for m in messages %}" + source + "{% endfor %}")
    assert chat.end_of_turn(special_bytes) == end


def test_bos_ends_no_turn(tiny):
    source = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}\n{% endfor %}"
    assert tiny.bos_id == 1
    assert template(source).end_of_turn(tiny) == ((), ("\nuser:",))


# Replies as they were generated


ADJACENT = "<s>{% for m in messages %}{{ m.content }}{% endfor %}"
PIECES = ["<|im_end|>", "<s>", " ", "x", "\n", "\ue000", "é"]
WORDS = st.lists(st.sampled_from(PIECES), max_size=5).map("".join)


def test_a_reply_is_spliced_in_and_what_follows_goes_on_it(tiny):
    """llama2 writes the space before a reply, which is in the reply's first id too."""
    chat = named_template("llama2", tiny)
    prompt = chat.encode(tiny, QUESTION, add_generation_prompt=True)
    reply = [
        *tiny.encode("d"),
        *tiny.encode("o", inside=True),
        *tiny.encode("g", inside=True),
    ]
    assert tiny.decode(reply) == "dog"
    assert reply != tiny.encode("dog")
    messages = [*QUESTION, {"role": "assistant", "content": "dog"}, *QUESTION]
    ids = chat.encode(tiny, messages, replies={1: reply})
    after = tiny.encode(" ", inside=True)
    assert after != tiny.encode(" ")
    assert ids == [*prompt, *reply, *after, 2, *prompt]


def test_a_reply_keeps_bytes_and_special_tokens_that_its_text_lacks(special_bytes):
    chat = named_template("chatml", special_bytes)
    prompt = chat.encode(special_bytes, QUESTION, add_generation_prompt=True)
    for reply in ([0xC3, 65], [65, 261, 0xE2], [32, 257], list(b"<s>")):
        content = special_bytes.decode(reply)
        messages = [*QUESTION, {"role": "assistant", "content": content}]
        ids = chat.encode(special_bytes, messages, replies={1: reply})
        assert ids == [*prompt, *reply, 260, 10]


def test_the_space_after_a_plain_prompt_is_the_replys(special_bytes):
    chat = named_template("plain", special_bytes)
    prompt = chat.encode(special_bytes, QUESTION, add_generation_prompt=True)
    reply = [*b" Y", 261, *b"es"]
    messages = [*QUESTION, {"role": "assistant", "content": " Yes"}]
    ids = chat.encode(special_bytes, messages, replies={1: reply})
    assert ids == [*prompt, *reply, 256, 10]


@pytest.mark.parametrize(
    ("name", "content", "reply"),
    [
        ("llama3", " Yes", [32, 89, 261, *b"es"]),  # the template strips it
        ("chatml", "Yes", [*b"No"]),  # other words
        ("chatml", "Yes", []),
    ],
)
def test_a_reply_that_the_template_changes_is_encoded(
    special_bytes, name, content, reply
):
    chat = named_template(name, special_bytes)
    messages = [*QUESTION, {"role": "assistant", "content": content}]
    ids = chat.encode(special_bytes, messages, replies={1: reply})
    assert ids == chat.encode(special_bytes, messages)


def test_one_changed_reply_leaves_the_others_as_they_are(special_bytes):
    source = (
        "{% for m in messages %}<s>{% if not loop.last %}"
        "{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}"
        "{% endfor %}"
    )
    replies = {0: [*b"a</think>b", 262], 1: [*b"c", 261], 2: [*b"</think>d", 261]}
    messages = [
        {"role": "assistant", "content": special_bytes.decode(ids)}
        for ids in replies.values()
    ]
    ids = template(source).encode(special_bytes, messages, replies=replies)
    assert ids == [257, *b"b", 257, *replies[1], 257, *replies[2]]


@given(contents=st.lists(WORDS, min_size=1, max_size=4), data=st.data())
@settings(deadline=None, max_examples=100)
@pytest.mark.parametrize("name", ["chatml", "plain", "adjacent"])
def test_spliced_replies_read_as_the_text(special_bytes, name, contents, data):
    if name in TEMPLATES:
        chat = named_template(name, special_bytes)
    else:
        chat = template(ADJACENT)
    messages = [{"role": "assistant", "content": content} for content in contents]
    chosen = data.draw(st.sets(st.sampled_from(range(len(contents)))))
    replies = {i: special_bytes.encode(contents[i]) for i in chosen}
    ids = chat.encode(special_bytes, messages, replies=replies)
    assert ids == chat.encode(special_bytes, messages)


# A folder's own template


def write(path, value) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def test_a_folder_without_a_template_has_none(tmp_path, tiny):
    assert load_template(tmp_path, tiny) is None
    write(tmp_path / "tokenizer_config.json", {"bos_token": "<s>"})
    assert load_template(tmp_path, tiny) is None


def test_the_template_file_comes_before_the_config(tmp_path, tiny):
    write(tmp_path / "chat_template.json", {"chat_template": "third"})
    assert load_template(tmp_path, tiny).render([]) == "third"
    config = {"chat_template": "second"}
    write(tmp_path / "tokenizer_config.json", config)
    assert load_template(tmp_path, tiny).render([]) == "second"
    named = [{"name": n, "template": n} for n in ("tool_use", "default")]
    write(tmp_path / "tokenizer_config.json", {"chat_template": named})
    assert load_template(tmp_path, tiny).render([]) == "default"
    template("first").save(tmp_path)
    assert load_template(tmp_path, tiny).render([]) == "first"
    assert load_template(tmp_path, tiny).name == str(tmp_path / "chat_template.jinja")


def test_special_tokens_are_those_that_the_folder_names(tmp_path, tiny):
    template("{{ bos_token }}|{{ eos_token }}|{{ pad_token }}").save_hf(tmp_path)
    assert load_template(tmp_path, tiny).render([]) == "<s>|</s>|"
    tokens = {"eos_token": {"content": "<eot>"}, "pad_token": "<pad>"}
    write(tmp_path / "special_tokens_map.json", tokens)
    assert load_template(tmp_path, tiny).render([]) == "<s>|<eot>|<pad>"
    config = {"bos_token": None, "eos_token": {"content": "<e>"}, "add_bos_token": True}
    write(tmp_path / "tokenizer_config.json", config)
    chat = load_template(tmp_path, tiny)
    assert chat.render([]) == "|<e>|<pad>"
    assert chat.variables == {"bos_token": "", "eos_token": "<e>", "pad_token": "<pad>"}


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer_config.json", b'{"a": ', "tokenizer_config.json is not JSON"),
        ("tokenizer_config.json", b"[]", "tokenizer_config.json holds a list"),
        ("chat_template.json", b"\xff", "chat_template.json is not UTF-8"),
        ("chat_template.jinja", b"\xff", "chat_template.jinja is not UTF-8"),
        ("chat_template.jinja", b"{% if", "chat_template.jinja, line 1"),
        (
            "tokenizer_config.json",
            b'{"chat_template": [{"name": "rag", "template": "a"}, '
            b'{"name": "tool_use", "template": "a"}]}',
            "tokenizer_config.json has a chat_template .* one named default",
        ),
        ("tokenizer_config.json", b'{"chat_template": 3}', "neither a text nor a list"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, tiny, file, content, message):
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_template(tmp_path, tiny)


@pytest.mark.parametrize("form", ["llama2_library", "metaspace_library"])
def test_text_between_special_tokens_has_the_ids_of_the_library(form, request):
    """The later form puts its own space before the very start of a text alone."""
    library = request.getfixturevalue(form)
    ours = HfTokenizer(library.to_str(), {})
    chat = named_template("mistral", ours)
    text = chat.render(TURNS)
    assert text == "<s>[INST] Hi [/INST]Yes</s>[INST]  And?\n [/INST]"
    expected = library.encode(text, add_special_tokens=False).ids
    assert chat.encode(ours, TURNS) == expected
    assert chat.encode_with_mask(ours, TURNS)[0] == expected
    after = ours.encode("[INST]", inside=ours.prefix_at_start_only)
    assert expected[1 : 1 + len(after)] == after


@pytest.mark.parametrize("tools", [None, [], [{"b": "é<s>", "a": [1, None]}]])
def test_tools_are_rendered_as_by_transformers(special_bytes, tools):
    theirs = pytest.importorskip("transformers.utils.chat_template_utils")
    source = (
        "{{ tools is none }}{% for t in tools or [] %}{{ t | tojson }}{{ t }}"
        "{{ t | tojson(indent=2) }}{% endfor %}{{ messages[0].content }}"
    )
    chat = template(source)
    (text,), _ = theirs.render_jinja_template([TURN], tools=tools, chat_template=source)
    assert chat.render(TURN, tools=tools) == text
    assert special_bytes.decode(chat.encode(special_bytes, TURN, tools=tools)) == text
