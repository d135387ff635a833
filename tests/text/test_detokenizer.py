import base64
import json
from functools import cache

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from relax.text.detokenizer import StopStrings, StreamingDetokenizer
from relax.text.folder import load_folder_tokenizer
from relax.text.tokenizers import (
    SentencePieceTokenizer,
    TokenizerConfig,
    make_tokenizer,
)

REPLACEMENT = "\ufffd"


def check_stream(detokenizer, tokenizer, chunks) -> None:
    """Fails unless the pieces join to the decoded text of all ids."""
    shown = [detokenizer.add(chunk) for chunk in chunks]
    shown.append(detokenizer.flush())
    assert "".join(shown) == tokenizer.decode([i for chunk in chunks for i in chunk])


@cache
def awkward_ids(tokenizer) -> list[int]:
    """Returns ids of broken characters, of spaces alone, and of no text."""
    ids = []
    for token_id in range(tokenizer.vocab_size):
        piece = tokenizer.token_bytes(token_id)
        if not piece.strip() or REPLACEMENT in piece.decode(errors="replace"):
            ids.append(token_id)
    return ids


@given(data=st.data())
@settings(deadline=None, max_examples=300)
def test_stream_joins_to_the_decoded_text(tokenizer, data):
    any_id = st.integers(0, tokenizer.vocab_size - 1)
    ids = any_id | st.sampled_from(awkward_ids(tokenizer))
    chunks = data.draw(st.lists(st.lists(ids, max_size=7), max_size=11))
    check_stream(StreamingDetokenizer(tokenizer), tokenizer, chunks)


@given(text=st.text(), chunk=st.integers(1, 5))
@settings(deadline=None)
def test_stream_of_encoded_text_joins_to_the_decoded_text(tokenizer, text, chunk):
    ids = tokenizer.encode(text)
    chunks = [ids[at : at + chunk] for at in range(0, len(ids), chunk)]
    check_stream(StreamingDetokenizer(tokenizer), tokenizer, chunks)


class TokenByToken:
    """A detokenizer that decodes every id by itself."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def add(self, ids):
        return "".join(self.tokenizer.decode([i]) for i in ids)

    def flush(self):
        return ""


def test_check_catches_decoding_token_by_token(tokenizer):
    chunks = [[i] for i in tokenizer.encode("the 🚀")]
    check_stream(StreamingDetokenizer(tokenizer), tokenizer, chunks)
    with pytest.raises(AssertionError):
        check_stream(TokenByToken(tokenizer), tokenizer, chunks)


def test_ids_may_be_arrays(tokenizer):
    ids = np.array(tokenizer.encode("the 🚀"), np.int32)
    check_stream(StreamingDetokenizer(tokenizer), tokenizer, [ids])


def test_character_is_held_back_until_it_is_whole(byte_tokenizer):
    stream = StreamingDetokenizer(byte_tokenizer)
    assert stream.add([ord("a"), 0xF0]) == "a"
    assert stream.add([0x9F]) == ""
    assert stream.add([256, 0x9A]) == ""  # a special id does not break it
    assert stream.add([0x80, ord("b")]) == "🚀b"
    assert stream.flush() == ""


def test_byte_that_cannot_be_completed_is_shown_at_once(byte_tokenizer):
    stream = StreamingDetokenizer(byte_tokenizer)
    assert stream.add([0xE2, 0x80]) == ""
    assert stream.add([0x28]) == REPLACEMENT + "("
    assert stream.add([0xFF]) == REPLACEMENT


def test_flush_shows_what_was_held_back(byte_tokenizer, tiny):
    stream = StreamingDetokenizer(byte_tokenizer)
    assert stream.add([0xF0, 0x9F, 0x9A]) == ""
    assert stream.flush() == REPLACEMENT  # Python's rule: one for the run
    stream = StreamingDetokenizer(tiny)
    assert stream.add([0xF0 + 3, 0x9F + 3, 0x9A + 3]) == ""
    assert stream.flush() == 3 * REPLACEMENT  # sentencepiece's: one for each byte


@given(text=st.text())
@settings(deadline=None)
def test_no_replacement_character_while_text_is_valid(byte_tokenizer, text):
    stream = StreamingDetokenizer(byte_tokenizer)
    text = text.replace(REPLACEMENT, "")
    shown = [stream.add([value]) for value in text.encode()]
    assert REPLACEMENT not in "".join(shown)
    assert stream.flush() == ""


def test_real_replacement_character_is_shown_at_once(tokenizer):
    stream = StreamingDetokenizer(tokenizer)
    assert stream.add(tokenizer.encode("the" + REPLACEMENT)) == "the" + REPLACEMENT


def test_only_the_first_space_is_dropped(tiny, tiny_keeping_spaces):
    the, fox = tiny.encode("the fox")[0], tiny.encode("the fox")[1:]
    stream = StreamingDetokenizer(tiny)
    assert stream.add([tiny.bos_id]) == ""
    assert stream.add([the]) == "the"
    assert stream.add([tiny.eos_id, the]) == " the"
    assert stream.add(fox) == " fox"
    stream = StreamingDetokenizer(tiny_keeping_spaces)
    assert stream.add(tiny_keeping_spaces.encode(" the")) == " the"


@pytest.mark.parametrize(
    ("fixture", "expected"),
    [
        ("tiny", ["", "", " ", "j"]),
        ("tiny_keeping_spaces", ["", " ", " ", "j"]),
        ("tiny_dropping_spaces", ["", "", "", "j"]),
    ],
)
def test_spaces_at_the_start_follow_the_model(fixture, expected, request):
    tokenizer = request.getfixturevalue(fixture)
    pieces = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
    space = len(pieces) - 1 - pieces[::-1].index(b" ")  # not the byte piece <0x20>
    stream = StreamingDetokenizer(tokenizer)
    ids = [tokenizer.bos_id, space, space, pieces.index(b"j")]
    assert [stream.add([i]) for i in ids] == expected
    assert tokenizer.decode(ids) == "".join(expected)


ORACLE_CASES = {"llama2-sentencepiece": 5, "llama3-tiktoken": 5}


def oracle(oracle_dir, name) -> list[dict]:
    cases = json.loads((oracle_dir / "streaming_detok.json").read_text())["cases"]
    cases = [case for case in cases if case["tokenizer"] == name]
    assert len(cases) == ORACLE_CASES[name]
    return cases


def check_oracle(tokenizer, ids, case) -> None:
    """Compares with the peer's decode of each id and of each prefix of the ids."""
    assert [tokenizer.decode([i]) for i in ids] == case["single_decodes"]
    stream, shown = StreamingDetokenizer(tokenizer), ""
    for count, decoded in enumerate(case["prefix_decodes"], start=1):
        assert tokenizer.decode(ids[:count]) == decoded
        shown += stream.add([ids[count - 1]])
        assert shown == decoded.rstrip(REPLACEMENT)  # all here are yet to be completed
    assert shown + stream.flush() == case["final"]


def exported(tokenizer, folder):
    """Returns the tokenizer.json that does the same."""
    tokenizer.save_hf(folder)
    return load_folder_tokenizer(folder)


def test_stream_agrees_with_sentencepiece_on_every_prefix(
    train_sentencepiece, oracle_dir, tmp_path
):
    cases = oracle(oracle_dir, "llama2-sentencepiece")
    pieces = {p for case in cases for p in case["pieces"] if p[0] != "<" and p != "▁"}
    model = train_sentencepiece(
        user_defined_symbols=sorted(pieces), vocab_size=307 + len(pieces)
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokenizer = SentencePieceTokenizer(model)
    for case in cases:
        ids = [processor.piece_to_id(piece) for piece in case["pieces"]]
        assert [processor.id_to_piece(i) for i in ids] == case["pieces"]
        check_oracle(tokenizer, ids, case)
        check_oracle(exported(tokenizer, tmp_path), ids, case)


def test_stream_agrees_with_tiktoken_on_every_prefix(oracle_dir, tmp_path):
    cases = oracle(oracle_dir, "llama3-tiktoken")
    pieces = {bytes(piece) for case in cases for piece in case["pieces"]}
    tokens = {bytes([value]): value for value in range(256)}
    tokens |= {p: 256 + i for i, p in enumerate(sorted(pieces - tokens.keys()))}
    lines = (f"{base64.b64encode(t).decode()} {i}\n" for t, i in tokens.items())
    path = tmp_path / "ranks"
    path.write_text("".join(lines))
    tokenizer = make_tokenizer(
        TokenizerConfig(kind="tiktoken", encoding=None, path=str(path))
    )
    for case in cases:
        ids = [tokens[bytes(piece)] for piece in case["pieces"]]
        check_oracle(tokenizer, ids, case)
        check_oracle(exported(tokenizer, tmp_path / "hf"), ids, case)


def run_stop(stop, pieces) -> tuple[str, bool]:
    """Returns all that is shown of a text in pieces, and whether it stopped."""
    scanner, shown, stopped = StopStrings(stop), "", False
    for count, piece in enumerate(pieces, start=1):
        text, stopped = scanner.add(piece)
        shown += text
        held = "".join(pieces[:count])[len(shown) :]
        proper = {s[:length] for s in stop for length in range(len(s))}
        assert stopped or held == "" or held in proper
    return shown + scanner.flush(), stopped


def cut_at_stop(stop, text) -> tuple[str, bool]:
    """Returns the text before the stop string that ends first, tried end by end."""
    for end in range(len(text) + 1):
        starts = [end - len(s) for s in stop if text[:end].endswith(s)]
        if starts:
            return text[: min(starts)], True
    return text, False


@given(
    stop=st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=3),
    pieces=st.lists(st.text("abc\n", max_size=5)),
)
@settings(deadline=None, max_examples=500)
def test_text_is_shown_up_to_the_first_stop_string(stop, pieces):
    assert run_stop(stop, pieces) == cut_at_stop(stop, "".join(pieces))


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (["one\n", "\ntwo"], ("one", True)),
        (["one\n", "two\n"], ("one\ntwo\n", False)),
        (["a User", ": b"], ("a ", True)),
        (["a Use", "d User"], ("a Used User", False)),
        (["xabc", "d"], ("xa", True)),  # "bc" ends before "abcd" does
        (["\n\n"], ("", True)),
    ],
)
def test_stop_strings_by_hand(pieces, expected):
    assert run_stop(["\n\n", "User:", "abcd", "bc"], pieces) == expected


def test_nothing_is_shown_after_a_stop_string():
    scanner = StopStrings(["."])
    assert scanner.add("one. two") == ("one", True)
    assert scanner.add("three") == ("", True)
    assert scanner.flush() == ""


def test_without_stop_strings_nothing_is_held_back():
    assert StopStrings([]).add("text") == ("text", False)


@pytest.mark.parametrize("stop", ["###", ["a", ""]])
def test_stop_must_be_a_list_of_strings_with_characters(stop):
    with pytest.raises(ValueError, match="stop="):
        StopStrings(stop)
