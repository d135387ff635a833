"""Records encoded once: what is cut, dropped and kept on disk."""

import io
import logging

import numpy as np
import pytest

from relax.data import examples as module
from relax.data.examples import encode_examples
from relax.text.chat import ChatTemplate, named_template

RECORDS = [
    {"prompt": "ab", "completion": "cde"},
    {"prompt": "abcdefg", "completion": "h"},
    {"text": ""},
    {"prompt": "a", "completion": "bcdef"},
]


def encode(tokenizer, records=RECORDS, *, template=None, loss_on="auto", **changes):
    settings = {"max_length": 6, "as_messages": False} | changes
    return encode_examples(records, tokenizer, template, loss_on, **settings)


def test_examples_written_out(special_bytes, caplog):
    """With <s>, </s> and six tokens at most: one fits not, two have no target."""
    encoded = encode(special_bytes)
    assert encoded.tokens.tolist() == [256, *b"abcde", 256, *b"abcde"]
    assert encoded.weights.tolist() == [0, 0, 0, 1, 1, 1, 0, 0, 1, 1, 1, 1]
    assert encoded.offsets.tolist() == [0, 6, 12]
    assert encoded.lengths.tolist() == [6, 6]
    assert (len(encoded), encoded.dropped, encoded.truncated) == (2, 2, 2)
    assert "2 of 4 records have no target within 6 tokens" in caplog.text
    tokens, weights = encoded[1]
    assert tokens.tolist() == [256, *b"abcde"]
    assert weights.tolist() == [0, 0, 1, 1, 1, 1]
    assert (tokens.dtype, weights.dtype) == (np.int32, np.float32)


def test_what_fits_is_left_whole_and_said_to_no_one(special_bytes, caplog, capfd):
    encoded = encode(special_bytes, RECORDS[:2], max_length=10)
    assert encoded.lengths.tolist() == [7, 10]
    assert (encoded.dropped, encoded.truncated) == (0, 0)
    assert not caplog.records
    assert capfd.readouterr() == ("", "")


def test_no_records_are_no_examples(special_bytes, tmp_path):
    for cache in (None, tmp_path):
        assert len(encode(special_bytes, [], cache=cache)) == 0


def test_progress_is_shown_in_a_terminal(special_bytes, monkeypatch):
    screen, make = io.StringIO(), module.Console
    monkeypatch.setattr(
        module, "Console", lambda stderr: make(file=screen, force_terminal=True)
    )
    encode(special_bytes)
    assert "Encoding" in screen.getvalue()


def test_fractions_of_weights_are_kept(special_bytes, tmp_path):
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "weight": 0.25},
    ]
    template = named_template("mistral", special_bytes)
    for cache in (None, tmp_path):
        encoded = encode(
            special_bytes,
            [{"messages": turns}],
            template=template,
            max_length=99,
            cache=cache,
        )
        assert encoded[0][1].tolist() == [0] * 17 + [0.25, 0.25]


def test_the_record_of_an_error_is_named(special_bytes):
    records = [*RECORDS, {"prompt": "a"}]
    with pytest.raises(ValueError, match=r"^data: record 4: it has a prompt and no co"):
        encode(special_bytes, records)
    with pytest.raises(ValueError, match=r"^data: record 454: "):
        encode(special_bytes, records, first_index=450)


@pytest.fixture
def encoded_records(monkeypatch):
    """The records that were encoded, and not read from the cache."""
    seen, encode_one = [], module._encode_one

    def watched(encoder, record, index):
        seen.append(record)
        return encode_one(encoder, record, index)

    monkeypatch.setattr(module, "_encode_one", watched)
    return seen


def test_records_are_encoded_once(special_bytes, tmp_path, encoded_records, caplog):
    caplog.set_level(logging.INFO)
    first = encode(special_bytes, cache=tmp_path)
    assert f"12 tokens written to {tmp_path}" in caplog.text
    caplog.clear()
    again = encode(special_bytes, cache=tmp_path)
    assert encoded_records == RECORDS
    assert "have no target" in caplog.text
    plain = encode(special_bytes)
    for made in (first, again):
        assert isinstance(made.tokens, np.memmap)
        assert made.tokens.dtype == np.uint16
        for name in ("tokens", "weights", "offsets"):
            np.testing.assert_array_equal(getattr(made, name), getattr(plain, name))
        assert (made.dropped, made.truncated) == (2, 2)


def test_whatever_changes_the_tokens_changes_the_key(
    plain_bytes, special_bytes, tmp_path, encoded_records
):
    template = named_template("chatml", special_bytes)
    chats = [{"messages": [{"role": r, "content": r} for r in ("user", "assistant")]}]
    weighted = [{"messages": [{**m, "weight": 0.5} for m in chats[0]["messages"]]}]
    other = named_template("llama3", special_bytes)
    tooled = [
        chats[0] | {"tools": [tool]}
        for tool in ({}, {"a": 1, "b": 2}, {"b": 2, "a": 1})  # in the order written
    ]
    changes = [
        {},
        {"loss_on": "all"},
        {"max_length": 5},
        {"as_messages": True, "template": template},
        {"as_messages": True, "template": other},
        {"as_messages": True, "template": template, "records": chats},
        {"as_messages": True, "template": template, "records": weighted},
        *(
            {"as_messages": True, "template": template, "records": [record]}
            for record in tooled
        ),
        {"records": RECORDS[:3]},
        {"records": RECORDS[:2]},
    ]
    for change in changes:
        for tokenizer in (plain_bytes, special_bytes):
            before = len(encoded_records)
            settings = {"max_length": 99, "cache": tmp_path} | change
            encode(tokenizer, **settings)
            assert len(encoded_records) > before
    folders = list((tmp_path / "examples").iterdir())
    assert len(folders) == 2 * len(changes)


def test_tools_that_a_template_does_not_write_are_told(special_bytes, caplog):
    turns = [{"role": r, "content": r} for r in ("user", "assistant")]
    records = [
        {"messages": turns, "tools": [{"name": "add"}]},
        {"messages": turns, "tools": []},
        {"prompt": "ab", "completion": "c", "tools": "a hammer"},
    ]
    chatml = named_template("chatml", special_bytes)
    encode(special_bytes, records, template=chatml, max_length=99)
    message = "1 of 3 records have tools, which chat template chatml does not write"
    assert message in caplog.text
    caplog.clear()
    source = "{{ tools }}" + chatml.source
    writes = ChatTemplate(source, name="mine", variables=chatml.variables)
    encode(special_bytes, records, template=writes, max_length=99)
    assert not caplog.records


def test_columns_that_are_not_encoded_leave_the_key(
    special_bytes, tmp_path, encoded_records
):
    for answer in (1, object()):
        records = [record | {"answer": answer} for record in RECORDS]
        encode(special_bytes, records, cache=tmp_path)
    assert len(encoded_records) == len(RECORDS)


def test_a_cache_that_was_not_finished_is_made_again(
    special_bytes, tmp_path, monkeypatch
):
    def break_off(file, values):
        raise KeyboardInterrupt

    save = np.save
    for broken in range(3):
        calls = iter([save] * broken + [break_off])
        with monkeypatch.context() as patch:
            patch.setattr(module.np, "save", lambda *a, calls=calls: next(calls)(*a))
            with pytest.raises(KeyboardInterrupt):
                encode(special_bytes, cache=tmp_path)
    assert encode(special_bytes, cache=tmp_path).lengths.tolist() == [6, 6]
    (folder,) = (tmp_path / "examples").iterdir()
    names = sorted(file.name for file in folder.iterdir())
    assert names == ["counts.json", "offsets.npy", "tokens.npy", "weights.npy"]


def test_a_cache_that_cannot_be_written_is_named(special_bytes, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"data\.cache_dir cannot take .*file"):
        encode(special_bytes, cache=tmp_path / "file")
