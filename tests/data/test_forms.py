"""The published forms of conversations, and what becomes of each."""

import json

import pytest

from relax.data.forms import normalise

USER = {"role": "user", "content": "Hi"}
REPLY = {"role": "assistant", "content": "Yes"}
PARTS = [{"type": "text", "text": "He"}, {"type": "text", "value": "y"}]


def messages(*turns):
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


CASES = {
    "messages": ({"messages": [USER, REPLY]}, {"messages": [USER, REPLY]}),
    "parts": (
        {"messages": [{"role": "user", "content": PARTS}, REPLY]},
        messages(("user", "Hey"), ("assistant", "Yes")),
    ),
    "null content": (
        {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": []}]},
        {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": []}]},
    ),
    "weights": (
        {"messages": [USER | {"loss_weight": 0}, REPLY | {"weight": 0.5}]},
        {"messages": [USER | {"weight": 0.0}, REPLY | {"weight": 0.5}]},
    ),
    "sharegpt": (
        {
            "id": 3,
            "conversations": [
                {"from": "human", "value": "Hi"},
                {"from": "gpt", "value": "Yes", "loss_weight": 0.25},
                {"from": "user", "value": "And?"},
                {"from": "chatgpt", "value": "No"},
            ],
        },
        {
            "id": 3,
            "messages": [
                USER,
                REPLY | {"weight": 0.25},
                {"role": "user", "content": "And?"},
                {"role": "assistant", "content": "No"},
            ],
        },
    ),
    "sharegpt with roles": (
        {"conversations": [USER, REPLY], "system": "Be brief."},
        messages(("system", "Be brief."), ("user", "Hi"), ("assistant", "Yes")),
    ),
    "prompt": ({"prompt": "1+1=", "answer": 2}, {"prompt": "1+1=", "answer": 2}),
    "completion": (
        {"prompt": "1+1=", "completion": "2"},
        {"prompt": "1+1=", "completion": "2"},
    ),
    "prompt of messages": (
        {"prompt": [USER], "completion": "Yes"},
        {"prompt": [USER], "completion": [REPLY]},
    ),
    "completion of messages": (
        {"prompt": "Hi", "completion": [REPLY]},
        {"prompt": [USER], "completion": [REPLY]},
    ),
    "text": ({"text": "Once", "meta": {}}, {"text": "Once", "meta": {}}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_form_is_recognised(name):
    record, expected = CASES[name]
    assert normalise(record, "auto", 0) == expected


def test_a_form_may_be_named():
    record = {"messages": [USER], "text": "Once"}
    assert normalise(record, "text", 0) == record
    assert normalise({"text": "a", "prompt": "b"}, "text", 0)["text"] == "a"


ALPACA = {"instruction": "Add.", "input": "1 and 2", "output": "3"}


def test_alpaca_without_a_template_has_headings():
    assert normalise(ALPACA, "auto", 0) == {
        "prompt": "### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:\n",
        "completion": "3",
    }
    assert normalise(ALPACA | {"input": ""}, "alpaca", 0) == {
        "prompt": "### Instruction:\nAdd.\n\n### Response:\n",
        "completion": "3",
    }


def test_alpaca_with_a_template_is_a_conversation():
    assert normalise(ALPACA, "auto", 0, chat=True) == messages(
        ("user", "Add.\n\n1 and 2"), ("assistant", "3")
    )
    more = {"system": "Be brief.", "history": [["Hi", "Yes"]], "input": None}
    record = normalise(ALPACA | more, "auto", 0, chat=True)
    assert (
        record["messages"]
        == messages(
            ("system", "Be brief."),
            ("user", "Hi"),
            ("assistant", "Yes"),
            ("user", "Add."),
            ("assistant", "3"),
        )["messages"]
    )


TOOLS = [{"type": "function", "function": {"name": "add"}}]


@pytest.mark.parametrize("given", [TOOLS, json.dumps(TOOLS)], ids=["list", "text"])
@pytest.mark.parametrize(
    "record",
    [
        {"messages": [USER, REPLY]},
        {"conversations": [USER, REPLY]},
        {"prompt": [USER], "completion": "Yes"},
    ],
    ids=["messages", "sharegpt", "prompt"],
)
def test_tools_of_conversations_are_a_list(record, given):
    assert normalise(record | {"tools": given}, "auto", 7)["tools"] == TOOLS
    for none in (None, "null"):
        assert "tools" not in normalise(record | {"tools": none}, "auto", 7)


def test_what_texts_call_tools_is_left_alone():
    records = [{"text": "a"}, {"prompt": "a", "completion": "b"}, ALPACA]
    for record in records:
        made = normalise(record | {"tools": "a hammer"}, "auto", 7)
        assert made["tools"] == "a hammer"
    for record in records[1:]:
        made = normalise(record | {"tools": TOOLS}, "auto", 7, chat=True)
        assert made["tools"] == TOOLS
        with pytest.raises(ValueError, match=r"tools=.*hammer.* is no list of JSON"):
            normalise(record | {"tools": "a hammer"}, "auto", 7, chat=True)


@pytest.mark.parametrize(
    ("record", "form", "message"),
    [
        (
            {"messages": [USER, REPLY], "tools": TOOLS[0]},
            "auto",
            r'tools=\{"type": .* is no list of JSON schemas; .*leave tools out',
        ),
        ({"messages": [USER], "tools": ["add"]}, "auto", r'tools=\["add"\] is no list'),
        ({"messages": [USER], "tools": "add"}, "auto", 'tools="add" is no list'),
        (
            {"question": "a"},
            "auto",
            r"its keys \(question\) are those of no form; .*alpaca \(inst",
        ),
        ({"text": "a"}, "sharegpt", r"no conversations \(keys: text\)"),
        ({"text": "a"}, "alpacca", r"unknown; choose one of auto, messages, sharegpt"),
        ({"text": 7}, "auto", "text is no text but a int"),
        ({"messages": []}, "auto", "messages is no list of messages, or an empty one"),
        ({"messages": ["Hi"]}, "auto", r"messages\[0\] is no object with a role"),
        (
            {"messages": [USER, {"role": "user", "content": 3}]},
            "auto",
            r"messages\[1\]\.content is no text but a int",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "auto",
            r"messages\[0\]\.content holds a part of type image_url",
        ),
        (
            {"messages": [REPLY | {"loss_weight": -1}]},
            "auto",
            r"messages\[0\]\.loss_weight=-1 must be a number of at least 0",
        ),
        (
            {"conversations": [{"from": "cat", "value": "Mew"}]},
            "auto",
            "from 'cat', not",
        ),
        ({"prompt": None}, "auto", "its prompt is null"),
        ({"prompt": 3}, "auto", "prompt is neither a text nor messages"),
        (
            {"prompt": "Hi", "completion": 3},
            "auto",
            "completion is neither a text nor messages",
        ),
        ({"prompt": ["Hi"]}, "auto", r"prompt\[0\] is no object with a role"),
        (ALPACA | {"history": [["a", "b"]]}, "auto", r"history .* set data\.template"),
        (ALPACA | {"output": 3}, "auto", "output is no text but a int"),
    ],
)
def test_what_fits_no_form_is_named_with_its_index(record, form, message):
    with pytest.raises(ValueError, match=rf"^data\.form={form}: record 7: .*{message}"):
        normalise(record, form, 7)
