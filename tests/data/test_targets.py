"""Which tokens of a record are in the loss, told by hand."""

import json
import re

import numpy as np
import pytest

from relax.data.targets import RecordEncoder, _shared
from relax.text.chat import TEMPLATES, ChatTemplate, named_template
from relax.text.tokenizers import SentencePieceTokenizer

BOS, EOS, IM_START, IM_END = 256, 257, 258, 259
PREFIXES = 4
TURNS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes"},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "No"},
]


def encoder(tokenizer, template=None, loss_on="auto", as_messages=False):
    if isinstance(template, str) and template in TEMPLATES:
        template = named_template(template, tokenizer)
    elif isinstance(template, str):
        variables = {"bos_token": "<s>", "eos_token": "</s>"}
        template = ChatTemplate(template, name="mine", variables=variables)
    return RecordEncoder(
        tokenizer=tokenizer,
        template=template,
        loss_on=loss_on,
        as_messages=as_messages,
        template_names=TEMPLATES,
    )


def stories(data_dir):
    model = data_dir / "stories260K_hf/tokenizer.model"
    return SentencePieceTokenizer(model.read_bytes())


def parts(tokenizer, encoded):
    """Returns the runs of one weight, as pairs of their text and the weight."""
    names = {i: name for name, i in tokenizer.special_tokens.items()}
    runs = []
    for token, weight in zip(encoded.tokens, encoded.weights.tolist(), strict=True):
        text = names.get(token) or bytes([token]).decode()
        if runs and runs[-1][1] == weight:
            runs[-1] = runs[-1][0] + text, weight
        else:
            runs.append((text, weight))
    return runs


def without_marks(template: ChatTemplate) -> ChatTemplate:
    source = re.sub(r"\{%-? (end)?generation -?%\}", "", template.source)
    assert source != template.source
    return ChatTemplate(source, name="stripped", variables=template.variables)


def weighted(*weights):
    return {
        "messages": [
            turn if w is None else turn | {"weight": w}
            for turn, w in zip(TURNS, weights, strict=True)
        ]
    }


HEADER = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
SECOND = "\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n"
END = "<|im_end|>"


@pytest.mark.parametrize(
    ("loss_on", "weights", "expected"),
    [
        (
            "auto",
            [None] * 4,
            [(HEADER, 0), (f"Yes{END}", 1), (SECOND, 0), (f"No{END}", 1), ("\n", 0)],
        ),
        (
            "last_turn",
            [None] * 4,
            [(f"{HEADER}Yes{END}{SECOND}", 0), (f"No{END}", 1), ("\n", 0)],
        ),
        (
            "completion",
            [None] * 4,
            [(f"{HEADER}Yes{END}{SECOND}", 0), (f"No{END}\n", 1)],
        ),
        (
            "all",
            [None] * 4,
            [("<|im_start|>", 0), (f"{HEADER[12:]}Yes{END}{SECOND}No{END}\n", 1)],
        ),
        (
            "assistant",
            [0.0, 0.5, 7.0, 2.0],
            [(HEADER, 0), (f"Yes{END}", 0.5), (SECOND, 0), (f"No{END}", 2), ("\n", 0)],
        ),
        (
            "assistant",
            [None, 0.0, None, None],
            [(f"{HEADER}Yes{END}{SECOND}", 0), (f"No{END}", 1), ("\n", 0)],
        ),
        (
            "completion",
            [0.0, 0.0, 0.0, 0.5],
            [(f"{HEADER}Yes{END}{SECOND}", 0), (f"No{END}\n", 0.5)],
        ),
        (
            "all",
            [0.0, 0.5, 0.0, None],
            [
                ("<|im_start|>user\nHi<|im_end|>\n", 0),
                (f"<|im_start|>assistant\nYes{END}\n", 0.5),
                ("<|im_start|>user\nAnd?<|im_end|>\n", 0),
                (f"<|im_start|>assistant\nNo{END}\n", 1),
            ],
        ),
    ],
)
def test_the_modes_and_the_messages_weights(special_bytes, loss_on, weights, expected):
    encoded = encoder(special_bytes, "chatml", loss_on)(weighted(*weights))
    assert parts(special_bytes, encoded) == expected
    assert encoded.weights.dtype == np.float32


# What a template writes after a turn, outside of its marks.
AFTER_A_TURN = {"chatml": 1, "plain": 1, "llama2": 0, "llama3": 0, "mistral": 0}


@pytest.mark.parametrize("loss_on", ["assistant", "last_turn", "completion", "all"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_prefixes_tell_what_the_marks_tell(special_bytes, name, loss_on):
    """But for a newline after a turn, which belongs to the prefix up to its end."""
    template = named_template(name, special_bytes)
    record = weighted(None, 0.5, None, 2.0)
    marked = encoder(special_bytes, template, loss_on)(record)
    prefixed = encoder(special_bytes, without_marks(template), loss_on)(record)
    assert prefixed.tokens == marked.tokens
    expected = marked.weights.copy()
    if loss_on in ("assistant", "last_turn"):
        ends = np.flatnonzero((expected[:-1] > 0) & (expected[1:] == 0))
        if expected[-1] > 0:
            assert not AFTER_A_TURN[name]
        for end in ends[: None if AFTER_A_TURN[name] else 0]:
            assert marked.tokens[end + 1] == ord("\n")
            expected[end + 1] = expected[end]
    np.testing.assert_array_equal(prefixed.weights, expected)
    assert expected.any()


def test_prefixes_and_marks_agree_in_pieces_of_words(data_dir):
    """As above, for tokens that could reach across the end of a header."""
    tokenizer = stories(data_dir)
    for name in ("llama2", "plain"):
        template = named_template(name, tokenizer)
        marked = encoder(tokenizer, template)({"messages": TURNS})
        stripped = encoder(tokenizer, without_marks(template))({"messages": TURNS})
        assert stripped.tokens == marked.tokens
        differ = np.flatnonzero(stripped.weights != marked.weights)
        between = b"".join(tokenizer.token_bytes(marked.tokens[i]) for i in differ)
        # The space is sentencepiece's, before any text that follows a special token.
        assert between == b" \n" * 2 * AFTER_A_TURN[name]


def test_replies_that_nothing_parts_are_told_by_prefixes(special_bytes):
    """Marks alone would give two replies one span."""
    source = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
        "{% endfor %}"
    )
    turns = [
        {"role": "user", "content": "abc"},
        {"role": "assistant", "content": "de", "weight": 0.5},
        {"role": "assistant", "content": "fgh"},
    ]
    made = [
        parts(special_bytes, encoder(special_bytes, source, mode)({"messages": turns}))
        for mode in ("assistant", "last_turn")
    ]
    assert made == [[("abc", 0), ("de", 0.5), ("fgh", 1)], [("abcde", 0), ("fgh", 1)]]


THOUGHTS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}[{% if m.thought %}"
    "{% generation %}{{ m.thought }}{% endgeneration %}|{% endif %}{% generation %}"
    "{{ m.content }}{% endgeneration %}]{% else %}{{ m.content }}{% endif %}"
    "{% endfor %}"
)


@pytest.mark.parametrize("thoughtful", [2, 3])
@pytest.mark.parametrize("last", [False, True], ids=["weights", "last_turn"])
def test_spans_that_are_as_many_as_replies_need_not_be_theirs(
    special_bytes, thoughtful, last
):
    """Of three replies one is empty, and one has two spans."""
    turns = [{"role": "user", "content": "a"}]
    for i, content in enumerate(("b", "", "cd")):
        turns.append({"role": "assistant", "content": content, "weight": float(i)})
    turns[1 if thoughtful == 2 else 3]["thought"] = "ef"
    encode = encoder(special_bytes, THOUGHTS, "last_turn" if last else "auto")
    made = parts(special_bytes, encode({"messages": turns}))
    if thoughtful == 2:
        assert made == [("a[ef|b][][", 0), ("cd", 2), ("]", 0)]
    else:
        assert made == [("a[b][][", 0), ("ef", 2), ("|", 0), ("cd", 2), ("]", 0)]


def test_the_order_of_spans_tells_replies_that_no_prefix_does(special_bytes):
    """A template that writes the number of messages first; each reply has a span."""
    source = "{{ messages|length }}" + THOUGHTS
    encode = encoder(special_bytes, source)
    made = parts(special_bytes, encode(weighted(None, 0.5, None, 2.0)))
    expected = [("4Hi[", 0), ("Yes", 0.5), ("]And?[", 0), ("No", 2), ("]", 0)]
    assert made == expected
    empty = weighted(None, 0.5, None, 2.0)
    empty["messages"][1]["content"] = ""
    with pytest.raises(ValueError, match="template mine writes the first "):
        encode(empty)


def test_replies_of_one_weight_need_no_places(special_bytes):
    """Not even where the spans are more than the replies, and prefixes none."""
    turns = [turn | {"thought": "e"} for turn in TURNS]
    encode = encoder(special_bytes, "{{ messages|length }}" + THOUGHTS)
    made = parts(special_bytes, encode({"messages": turns}))
    assert [text for text, weight in made if weight == 1] == ["e", "Yes", "e", "No"]


TOOLS = [{"type": "function", "function": {"name": "add", "strict": True}}]
SPELT_TOOLS = json.dumps(TOOLS)
WITH_TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}" + THOUGHTS


@pytest.mark.parametrize("marks", [True, False], ids=["marks", "prefixes"])
@pytest.mark.parametrize("tools", [TOOLS, SPELT_TOOLS], ids=["list", "text"])
@pytest.mark.parametrize("loss_on", ["assistant", "last_turn", "completion", "all"])
def test_a_record_s_tools_are_written(special_bytes, loss_on, tools, marks):
    template = encoder(special_bytes, WITH_TOOLS).template
    encode = encoder(
        special_bytes, template if marks else without_marks(template), loss_on
    )
    record = weighted(None, 0.5, None, 2.0)
    plain = encode(record)
    encoded = encode(record | {"tools": tools})
    header = list(SPELT_TOOLS.encode())
    assert encoded.tokens == header + plain.tokens
    weights = plain.weights.copy()
    if loss_on == "all":
        assert (encoded.weights[1 : len(header)] == 1).all()
        weights[0] = 1
    else:
        assert not encoded.weights[: len(header)].any()
    np.testing.assert_array_equal(encoded.weights[len(header) :], weights)
    for none in ({"tools": None}, {"tools": []}, {"tools": "null"}):
        assert encode(record | none).tokens == plain.tokens


def test_prompts_have_tools_where_they_are_messages(special_bytes):
    for asked in ("Hi", TURNS[:1]):
        record = {"prompt": asked, "completion": "Yes", "tools": TOOLS}
        encode = encoder(special_bytes, WITH_TOOLS, as_messages=True)
        text = f"{SPELT_TOOLS}Hi"
        assert parts(special_bytes, encode(record)) == [(text, 0), ("[Yes]", 1)]
    record = {"prompt": "Hi", "completion": "Yes", "tools": "a hammer"}
    encode = encoder(special_bytes, WITH_TOOLS)
    assert parts(special_bytes, encode(record)) == [("<s>Hi", 0), ("Yes</s>", 1)]


def test_a_template_whose_prefixes_are_no_prefixes_is_named(special_bytes):
    source = "{{ messages|length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    record = {"messages": TURNS}
    for loss_on, count in {"auto": 1, "last_turn": 3, "completion": 3}.items():
        message = f"template mine writes the first {count} .*{{% generation %}} marks"
        with pytest.raises(ValueError, match=message):
            encoder(special_bytes, source, loss_on)(record)
    whole = encoder(special_bytes, source, "all")(record)
    assert parts(special_bytes, whole) == [("4", 0), ("HiYesAnd?No", 1)]


def test_an_ill_placed_turn_is_seen_by_its_weight_too(special_bytes):
    """Where marks give no place, and the prefixes neither."""
    source = (
        "{{ messages|length }}{% generation %}{% for m in messages %}{{ m.content }}"
        "{% endfor %}{% endgeneration %}"
    )
    with pytest.raises(ValueError, match="chat template mine writes the first 3 "):
        encoder(special_bytes, source, "last_turn")({"messages": TURNS})


def test_plain_prompts_and_texts(special_bytes, plain_bytes):
    record = {"prompt": "1+1=", "completion": "2"}
    assert parts(special_bytes, encoder(special_bytes)(record)) == [
        ("<s>1+1=", 0),
        ("2</s>", 1),
    ]
    assert parts(special_bytes, encoder(special_bytes, loss_on="all")(record)) == [
        ("<s>", 0),
        ("1+1=2</s>", 1),
    ]
    assert parts(plain_bytes, encoder(plain_bytes)(record)) == [
        ("1+1=", 0),
        ("2<|endoftext|>", 1),
    ]
    text = encoder(special_bytes)({"text": "abc"})
    assert parts(special_bytes, text) == [("<s>", 0), ("abc</s>", 1)]
    for empty in ({"text": ""}, {"prompt": "", "completion": ""}):
        assert encoder(special_bytes)(empty).tokens == []


def test_an_end_of_text_that_is_spelled_is_not_doubled(special_bytes):
    for record in ({"text": "ab</s>"}, {"prompt": "a", "completion": "b</s>"}):
        assert encoder(special_bytes)(record).tokens == [BOS, 97, 98, EOS]


def test_a_completion_begins_where_its_prompt_ceases_to_be_the_start(data_dir):
    """The prompt's last token is not in the whole, where its letters go otherwise."""
    tokenizer = stories(data_dir)
    whole, start = tokenizer.encode("a lion th" + "ere"), tokenizer.encode("a lion th")
    assert whole[: len(start)] != start and whole[: len(start) - 1] == start[:-1]
    encoded = encoder(tokenizer)({"prompt": "a lion th", "completion": "ere"})
    assert encoded.tokens == [1, *whole, 2]
    assert np.flatnonzero(encoded.weights)[0] == len(start)


def test_common_prefixes_are_trl_s(oracle_dir):
    text = (oracle_dir / "trl_sft_packing_collate.json").read_text()
    cases = json.loads(text)["common_prefix_length"]
    assert len(cases) == PREFIXES
    for case in cases:
        assert _shared(case["a"], case["b"]) == case["out"]


def test_a_set_template_makes_messages_of_a_plain_prompt(special_bytes):
    record = {"prompt": "Hi", "completion": "Yes"}
    encode = encoder(special_bytes, "chatml", as_messages=True)
    assert parts(special_bytes, encode(record)) == [(HEADER, 0), (f"Yes{END}\n", 1)]
    plain = encoder(special_bytes, "chatml", as_messages=False)(record)
    assert parts(special_bytes, plain) == [("<s>Hi", 0), ("Yes</s>", 1)]


def test_a_prompt_of_messages_has_the_completion_s_after_it(special_bytes):
    record = {"prompt": TURNS[:1], "completion": TURNS[1:]}
    encoded = encoder(special_bytes, "chatml")(record)
    assert parts(special_bytes, encoded) == [
        (HEADER, 0),
        (f"Yes{END}{SECOND}No{END}\n", 1),
    ]


def test_a_text_beside_messages_becomes_one(special_bytes):
    """Whatever data.template is."""
    for template_is_set in (False, True):
        encode = encoder(special_bytes, "chatml", as_messages=template_is_set)
        for prompt, completion in (("Hi", TURNS[1:2]), (TURNS[:1], "Yes")):
            encoded = encode({"prompt": prompt, "completion": completion})
            assert parts(special_bytes, encoded) == [
                (HEADER, 0),
                (f"Yes{END}\n", 1),
            ]


QUESTION = {"messages": TURNS[:1]}
CHAT = {"messages": TURNS[:2]}
ONLY_ASSISTANT = {"messages": TURNS[1:2]}
SPELLS_BOS = {"messages": [{"role": "user", "content": "<s>a"}, TURNS[1]]}
ALL_MARKED = (
    "{{ bos_token }}{% generation %}{% for m in messages %}{{ m.content }}{% endfor %}"
    "{% endgeneration %}"
)
NOTHING_MARKED = "{% for m in messages %}{{ m.content }}{% endfor %}" + (
    "{% generation %}{% endgeneration %}"
)
TWO_BOS = (
    "{{ bos_token }}<s>{% for m in messages %}{{ m.role + m.content }}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "loss_on", "record", "message"),
    [
        (None, "auto", CHAT, r"data\.template=null, .*one of chatml, .*\.jinja file"),
        (None, "auto", {"prompt": "a"}, "a prompt and no completion"),
        (
            None,
            "auto",
            {"prompt": "a", "completion": 7},
            "completion is neither a text",
        ),
        (None, "auto", {"prompt": ["a"], "completion": "b"}, r"prompt\[0\] is no obje"),
        (None, "assistant", {"prompt": "a", "completion": "b"}, r"loss_on=assistant;"),
        (None, "completion", {"text": "a"}, r"no part for data\.loss_on=completion"),
        ("chatml", "auto", CHAT | {"tools": 3}, r"tools=3 is no list of JSON schemas"),
        ("chatml", "auto", QUESTION, "no message of the assistant's"),
        ("chatml", "completion", QUESTION, "no message of the assistant's"),
        (NOTHING_MARKED, "auto", CHAT, r"loss_on=assistant leaves nothing in the loss"),
        (ALL_MARKED, "auto", CHAT, r"leaves everything in the loss, .* template mine"),
        (ALL_MARKED, "auto", ONLY_ASSISTANT, "leaves everything in the loss"),
        (TWO_BOS, "auto", CHAT, r"begins with two BOS \(<s>, id 256\)"),
        (TWO_BOS, "all", CHAT, r"begins with two BOS \(<s>, id 256\)"),
        ("llama3", "auto", SPELLS_BOS, "two BOS: its text spells <s>"),
        (None, "auto", {"text": "<s>Once"}, "two BOS: its text spells <s>"),
        ("chatml", "auto", weighted(None, 0.0, None, 0.0), "leaves nothing in the"),
        ("mistral", "auto", ONLY_ASSISTANT, "roles must alternate"),
    ],
)
def test_records_without_what_is_asked_for(
    special_bytes, template, loss_on, record, message
):
    with pytest.raises(ValueError, match=message):
        encoder(special_bytes, template, loss_on)(record)


def test_a_text_may_spell_a_bos_where_none_is_put_before_it(plain_bytes, special_bytes):
    assert encoder(plain_bytes)({"text": "<s>"}).tokens == [60, 115, 62, 256]
    assert encoder(special_bytes, "chatml")(SPELLS_BOS).tokens[0] == IM_START
