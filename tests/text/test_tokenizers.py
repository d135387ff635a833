import base64
import hashlib
import json
import pickle
import shutil

import pytest
import requests
import sentencepiece
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from relax.text.tokenizers import (
    SentencePieceTokenizer,
    TokenizerConfig,
    load_tokenizer,
    make_tokenizer,
)

SAMPLE = "Hello  world!\n\tcafé 你好 🚀 x̂ \u200d<0x0A> \ufffd 1234567\n"
SPECIAL_TEXTS = ["<|endoftext|>", "<s>", "</s>", "<unk>", "<|eot_id|>", "<0x41>"]
# sentencepiece spells a space U+2581 inside, and gives a space back for either.
TEXTS = st.text(st.characters(exclude_characters="▁", exclude_categories=["Cs"]))


def config(kind, encoding=None, path=None) -> TokenizerConfig:
    return TokenizerConfig(kind=kind, encoding=encoding, path=path and str(path))


def write_ranks(path, pieces) -> None:
    """Writes a tiktoken file of the 256 bytes and then the pieces."""
    tokens = [*(bytes([value]) for value in range(256)), *pieces]
    lines = (f"{base64.b64encode(t).decode()} {i}\n" for i, t in enumerate(tokens))
    path.write_text("".join(lines))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (("word",), "tokenizer.kind='word' .* bytes, .*sentencepiece, huggingface"),
        (("bytes", "gpt2"), "'bytes' takes neither .* tokenizer.encoding='gpt2'"),
        (("bytes", None, "a"), "'bytes' takes neither .* tokenizer.path='a'"),
        (("tiktoken",), "'tiktoken' takes either .*=None with tokenizer.path=None"),
        (("tiktoken", "gpt2", "a"), "either .*='gpt2' with tokenizer.path='a'"),
        (("sentencepiece",), "takes path and no encoding, .* tokenizer.path=None"),
        (("sentencepiece", "gpt2", "a"), "no encoding, .* tokenizer.encoding='gpt2'"),
        (("huggingface",), "takes path and no encoding, .* tokenizer.path=None"),
        (("huggingface", "gpt2", "a"), "no encoding, .* tokenizer.encoding='gpt2'"),
    ],
)
def test_config_names_the_fields_that_do_not_fit(fields, message):
    with pytest.raises(ValueError, match=message):
        config(*fields)


def test_bytes_are_their_own_ids(byte_tokenizer):
    assert byte_tokenizer.encode("Aé\n") == [65, 0xC3, 0xA9, 10]
    assert byte_tokenizer.vocab_size == 257
    assert (byte_tokenizer.bos_id, byte_tokenizer.eos_id) == (None, 256)


@given(text=st.text())
@settings(deadline=None)
def test_bytes_round_trip(byte_tokenizer, text):
    ids = byte_tokenizer.encode(text)
    assert ids == list(text.encode())
    assert byte_tokenizer.decode(ids) == text


@given(text=TEXTS)
@settings(deadline=None)
def test_decode_gives_back_what_was_encoded(faithful_tokenizer, text):
    ids = faithful_tokenizer.encode(text)
    assert all(0 <= i < faithful_tokenizer.vocab_size for i in ids)
    assert faithful_tokenizer.decode(ids) == text


def test_extra_spaces_are_dropped_where_the_model_says_so(tiny_dropping_spaces):
    ids = tiny_dropping_spaces.encode("  the  fox ")
    assert tiny_dropping_spaces.decode(ids) == "the fox"


def test_lone_surrogates_become_replacement_characters(faithful_tokenizer):
    ids = faithful_tokenizer.encode("a\ud800b")
    assert faithful_tokenizer.decode(ids) == "a\ufffdb"


@pytest.mark.parametrize("special", SPECIAL_TEXTS)
def test_text_that_spells_a_special_token_stays_text(faithful_tokenizer, special):
    text = f"a{special}{special} b"
    ids = faithful_tokenizer.encode(text)
    assert not set(ids) & set(faithful_tokenizer.special_tokens.values())
    assert faithful_tokenizer.decode(ids) == text


def test_special_ids_decode_to_nothing(tokenizer):
    assert tokenizer.eos_id in tokenizer.special_tokens.values()
    ids = tokenizer.encode("the fox")
    for special in tokenizer.special_tokens.values():
        assert tokenizer.token_bytes(special) == b""
        assert tokenizer.decode([special, *ids[:1], special, *ids[1:]]) == "the fox"


@pytest.mark.parametrize("offset", [-1, 0, 5])
def test_ids_outside_the_vocabulary_are_refused(tokenizer, offset):
    token_id = -1 if offset < 0 else tokenizer.vocab_size + offset
    message = f"{token_id} .* {tokenizer.vocab_size}"
    with pytest.raises(ValueError, match=message):
        tokenizer.decode([0, token_id])
    with pytest.raises(ValueError, match=message):
        tokenizer.token_bytes(token_id)


def test_bytes_of_the_ids_join_to_the_text(faithful_tokenizer):
    ids = faithful_tokenizer.encode(SAMPLE)
    joined = b"".join(faithful_tokenizer.token_bytes(i) for i in ids)
    assert joined.removeprefix(b" ") == SAMPLE.encode()  # a dummy space may stand first


def test_bytes_of_sentencepiece_ids(tiny, tiny_model):
    processor = sentencepiece.SentencePieceProcessor(model_proto=tiny_model)
    expected = {"▁the": b" the", "▁": b" ", "<0xF0>": b"\xf0", "<0x0A>": b"\n"}
    expected |= {"<s>": b"", "</s>": b"", "<unk>": " ⁇ ".encode()}
    for piece, value in expected.items():
        assert tiny.token_bytes(processor.piece_to_id(piece)) == value
    assert (tiny.bos_id, tiny.eos_id) == (1, 2)
    assert tiny.special_tokens == {"<s>": 1, "</s>": 2}


def test_absent_bos_and_eos_are_none(train_sentencepiece):
    model = train_sentencepiece(bos_id=-1, eos_id=-1, vocab_size=305)
    tokenizer = SentencePieceTokenizer(model)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, None)


def test_sentencepiece_ids_and_text_are_the_librarys(mistral, data_dir):
    path = str(data_dir / "mistral" / "tokenizer.model")
    processor = sentencepiece.SentencePieceProcessor(model_file=path)
    ids = processor.encode(SAMPLE)
    assert mistral.encode(SAMPLE) == ids
    bad = [1, *ids, 0xF0 + 3, 0x9F + 3, *ids, 0xC3 + 3]
    assert mistral.decode(bad) == processor.decode(bad)
    assert mistral.decode(bad).count("\ufffd") == 2 + 2 + 1  # one a bad byte


def test_mistral_gives_back_every_byte(mistral, data_dir):
    path = str(data_dir / "mistral" / "tokenizer.model")
    processor = sentencepiece.SentencePieceProcessor(model_file=path)
    pieces = [processor.piece_to_id(f"<0x{value:02X}>") for value in range(256)]
    assert [mistral.token_bytes(i) for i in pieces] == [
        bytes([value]) for value in range(256)
    ]
    text = "".join(map(chr, range(0x800)))
    assert mistral.decode(pieces[:128]) == text[:128]
    for character in text[128:]:
        assert mistral.decode(pieces[b] for b in character.encode()) == character


@pytest.mark.parametrize("fixture", ["tiny", "tiny_keeping_spaces", "mistral"])
def test_inside_sentencepiece_has_no_space_before_it(fixture, request):
    tokenizer = request.getfixturevalue(fixture)
    assert tokenizer.encode("", inside=True) == []
    for text in ("the fox", " the fox", "  ", "\n🚀"):
        ids = tokenizer.encode(text, inside=True)
        assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()


def test_inside_makes_no_difference_to_bytes(byte_tokenizer, gpt2):
    for tokenizer in (byte_tokenizer, gpt2):
        assert tokenizer.encode("the", inside=True) == tokenizer.encode("the")


@given(text=st.text(), inside=st.booleans())
@settings(deadline=None)
def test_spans_cover_the_text_in_order(faithful_tokenizer, text, inside):
    """Each has the characters of which its token holds bytes, "▁" spelling a space."""
    ids, spans = faithful_tokenizer.encode_with_offsets(text, inside=inside)
    assert ids == faithful_tokenizer.encode(text, inside=inside)
    assert len(ids) == len(spans)
    covered = 0
    for token_id, (start, end) in zip(ids, spans, strict=True):
        piece = faithful_tokenizer.token_bytes(token_id)
        assert covered - 1 <= start <= covered <= end <= len(text)
        covered = end
        whole = text[start:end].replace("▁", " ").encode()
        assert piece in whole or piece == b" " + whole
    assert covered == len(text)


def test_spans_by_hand(byte_tokenizer, gpt2, tiny):
    ids, spans = byte_tokenizer.encode_with_offsets("aé\n")
    assert (ids, spans) == ([97, 0xC3, 0xA9, 10], [(0, 1), (1, 2), (1, 2), (2, 3)])
    assert gpt2.encode_with_offsets("Hello world") == ([15496, 995], [(0, 5), (5, 11)])
    ids, spans = tiny.encode_with_offsets("the the é")
    assert spans == [(0, 3), (3, 7), (7, 8), (8, 9), (8, 9)]
    assert tiny.encode_with_offsets("é")[1] == [(0, 0), (0, 1), (0, 1)]
    assert tiny.encode_with_offsets("é", inside=True)[1] == [(0, 1), (0, 1)]


def test_spans_count_surrogates_as_the_text_does(byte_tokenizer):
    ids, spans = byte_tokenizer.encode_with_offsets("\ud83d\ude80a\ud800b")
    assert bytes(ids).decode() == "🚀a\ufffdb"
    assert spans == [*4 * [(0, 2)], (2, 3), *3 * [(3, 4)], (4, 5)]


@pytest.mark.parametrize(
    "names", [[""], ["<a>", "<a>"], ["<a>", "{eos}"], ["a"], ["<a>", "{unknown}"]]
)
def test_special_tokens_must_be_new(tokenizer, names):
    (eos,) = (n for n, i in tokenizer.special_tokens.items() if i == tokenizer.eos_id)
    known = {"eos": eos, "unknown": "<unk>" if eos == "</s>" else "a"}
    with pytest.raises(ValueError, match=r"special token .* already in the vocabulary"):
        tokenizer.with_special_tokens([name.format(**known) for name in names])


@pytest.mark.parametrize("fixture", ["byte_tokenizer", "gpt2"])
def test_added_tokens_leave_bos_and_eos(fixture, request, tmp_path):
    """Also where their names are those that usually begin and end a text."""
    tokenizer = request.getfixturevalue(fixture)
    names = ["<|begin_of_text|>", "<|end_of_text|>"]
    added = tokenizer.with_special_tokens(names)
    added.save(tmp_path)
    for each in (added, load_tokenizer(tmp_path), added.with_special_tokens(["<a>"])):
        assert (each.bos_id, each.eos_id) == (None, tokenizer.eos_id)


def test_files_of_earlier_versions_still_load(tiny_model, tiny, tmp_path):
    fingerprint = hashlib.sha256(b"sentencepiece\n" + tiny_model).hexdigest()
    (tmp_path / "tokenizer.model").write_bytes(tiny_model)
    spec = {"kind": "sentencepiece", "fingerprint": fingerprint}
    (tmp_path / "relax_tokenizer.json").write_text(json.dumps(spec))
    assert load_tokenizer(tmp_path).encode(SAMPLE) == tiny.encode(SAMPLE)


def test_gpt2_has_its_published_vocabulary(gpt2):
    assert gpt2.vocab_size == 50257
    assert (gpt2.bos_id, gpt2.eos_id) == (None, 50256)
    assert gpt2.encode("Hello world") == [15496, 995]
    assert gpt2.token_bytes(995) == b" world"


def test_file_of_other_sizes_gets_end_of_text_last(tmp_path):
    path = tmp_path / "ranks"
    write_ranks(path, [b"12", b"123", b"1234"])
    tokenizer = make_tokenizer(config("tiktoken", path=path))
    assert tokenizer.special_tokens == {"<|endoftext|>": 259}
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (260, 259)
    # cl100k_base splits numbers into groups of three digits, GPT-2 does not.
    assert tokenizer.encode("1234") == [257, ord("4")]


def test_file_of_128000_ranks_is_llama3(tmp_path):
    path = tmp_path / "tokenizer.model"
    write_ranks(path, (b"#" + i.to_bytes(3) for i in range(128_000 - 256)))
    tokenizer = make_tokenizer(config("tiktoken", path=path))
    special = tokenizer.special_tokens
    assert len(special) == 256
    assert tokenizer.vocab_size == 128_256
    assert (tokenizer.bos_id, tokenizer.eos_id) == (128_000, 128_001)
    assert special["<|finetune_right_pad_id|>"] == 128_004
    assert special["<|start_header_id|>"] == 128_006
    assert special["<|end_header_id|>"] == 128_007
    assert special["<|eom_id|>"] == 128_008
    assert special["<|eot_id|>"] == 128_009
    assert special["<|python_tag|>"] == 128_010
    assert special["<|reserved_special_token_2|>"] == 128_012
    assert special["<|reserved_special_token_245|>"] == 128_255


def test_changed_file_is_read_anew(tmp_path, monkeypatch):
    """tiktoken's own reader goes on giving its cached copy."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    path = tmp_path / "ranks"
    write_ranks(path, [b"ab"])
    before = make_tokenizer(config("tiktoken", path=path))
    write_ranks(path, [b"bc"])
    after = make_tokenizer(config("tiktoken", path=path))
    assert before.encode("abc") == [256, ord("c")]
    assert after.encode("abc") == [ord("a"), 256]
    assert before.fingerprint != after.fingerprint


def test_saved_tokenizer_needs_nothing_but_its_folder(tokenizer, tmp_path, offline):
    tokenizer.save(tmp_path / "run")
    loaded = load_tokenizer(shutil.move(tmp_path / "run", tmp_path / "moved"))
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.vocab_size == tokenizer.vocab_size
    assert loaded.special_tokens == tokenizer.special_tokens
    assert (loaded.bos_id, loaded.eos_id) == (tokenizer.bos_id, tokenizer.eos_id)
    ids = loaded.encode(SAMPLE)
    assert ids == tokenizer.encode(SAMPLE)
    assert loaded.decode(ids) == tokenizer.decode(ids)


def test_tokenizer_can_be_sent_to_a_worker(tokenizer):
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode(SAMPLE) == tokenizer.encode(SAMPLE)


def test_fingerprint_covers_pattern_special_tokens_and_ranks(byte_tokenizer):
    lines = "".join(
        f"{base64.b64encode(bytes([i])).decode()} {i}\n" for i in range(256)
    )
    definition = (
        '{"pattern": "(?s:.{1,64})", "special_tokens": {"<|endoftext|>": 256}}\n'
    )
    expected = hashlib.sha256((definition + lines).encode()).hexdigest()
    assert byte_tokenizer.fingerprint == expected


def test_fingerprint_of_sentencepiece_covers_the_file(tiny, tiny_model):
    expected = hashlib.sha256(b"sentencepiece\n" + tiny_model).hexdigest()
    assert tiny.fingerprint == expected


def test_changed_run_folder_is_refused(byte_tokenizer, tmp_path):
    byte_tokenizer.save(tmp_path)
    spec = json.loads((tmp_path / "relax_tokenizer.json").read_text())
    spec["special_tokens"] = {"<|end|>": 256}
    (tmp_path / "relax_tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(ValueError, match=r"relax_tokenizer.json .* fingerprint"):
        load_tokenizer(tmp_path)


def test_folder_without_tokenizer_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"relax_tokenizer.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("kind", ["tiktoken", "sentencepiece"])
def test_missing_file_is_named(kind, tmp_path):
    path = tmp_path / "no.model"
    with pytest.raises(FileNotFoundError, match=r"tokenizer.path=.*no.model"):
        make_tokenizer(config(kind, path=path))


@pytest.mark.parametrize("content", [b"", b"just text\n"])
@pytest.mark.parametrize("kind", ["tiktoken", "sentencepiece"])
def test_file_of_another_kind_is_named(kind, content, tmp_path):
    path = tmp_path / "other.model"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer.path=.*other.model"):
        make_tokenizer(config(kind, path=path))


def test_sentencepiece_model_given_as_tiktoken_says_so(tiny_model, tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(tiny_model)
    with pytest.raises(ValueError, match=r"tokenizer.kind=sentencepiece"):
        make_tokenizer(config("tiktoken", path=path))


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """An empty tiktoken cache and no network; gives the URLs that tiktoken reads."""
    urls = []

    def no_answer(*args, **kwargs):
        raise requests.ConnectionError("no network")

    def read(url):
        urls.append(url)
        no_answer()

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "empty"))
    monkeypatch.setattr(requests, "head", no_answer)
    monkeypatch.setattr(tiktoken.load, "read_file", read)
    return urls


def test_unknown_encoding_lists_the_known(offline):
    with pytest.raises(
        ValueError, match=r"tokenizer.encoding='gpt9' .* gpt2, .*cl100k"
    ):
        make_tokenizer(config("tiktoken", "gpt9"))
    assert offline == []


def test_offline_error_names_file_and_folder(offline, tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        make_tokenizer(config("tiktoken", "gpt2"))
    message = str(caught.value)
    assert "tokenizer.encoding='gpt2'" in message
    assert "6d1cbeee0f20b3d9449abfede4726ed8212e3aee" in message
    assert "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6" in message
    assert f"TIKTOKEN_CACHE_DIR={str(tmp_path / 'empty')!r}" in message
    assert "\n" not in message
    assert offline == []  # tiktoken, which has no timeout, was not asked


@pytest.mark.parametrize("name", tiktoken.list_encoding_names())
def test_failed_download_names_the_file_that_tiktoken_wanted(
    name, offline, monkeypatch
):
    monkeypatch.setattr(requests, "head", lambda *args, **kwargs: None)
    with pytest.raises(FileNotFoundError) as caught:
        make_tokenizer(config("tiktoken", name))
    (url,) = offline
    assert hashlib.sha1(url.encode()).hexdigest() in str(caught.value)


def test_damaged_cached_file_gives_the_same_error(offline, tmp_path):
    name = "9b5ad71b2ce5302211f9c61530b329a4922fc6a4"
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / name).write_bytes(b"cut off")
    with pytest.raises(FileNotFoundError, match=name):
        make_tokenizer(config("tiktoken", "cl100k_base"))


@pytest.mark.parametrize("variable", ["TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"])
def test_cache_folder_is_found_where_tiktoken_looks(
    variable, offline, data_dir, tmp_path, monkeypatch
):
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR")
    monkeypatch.setenv(
        variable, str(shutil.copytree(data_dir / "tiktoken_cache", tmp_path / "copy"))
    )
    assert make_tokenizer(config("tiktoken", "gpt2")).vocab_size == 50257
