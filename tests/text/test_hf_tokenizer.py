import json
import pickle

import pytest
import tokenizers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from relax.text.detokenizer import StreamingDetokenizer
from relax.text.hf_tokenizer import HfTokenizer
from relax.text.tokenizers import TokenizerConfig, load_tokenizer, make_tokenizer

SAMPLE = "Hello  world!\n\tcafé 你好 🚀 x̂ \u200d<0x0A> \ufffd 1234567\n"
GPT2_CASES = 46
TEXTS = st.text(st.characters(exclude_characters="▁", exclude_categories=["Cs"]))


def small(vocabulary, merges=(), **options) -> tokenizers.Tokenizer:
    """Returns a BPE of the library's with no more than a decoder of spaces."""
    library = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=list(merges), **options)
    )
    library.decoder = decoders.Metaspace()
    return library


def letters() -> tokenizers.Tokenizer:
    """Returns the letters a to c, and tokens that begin and end a text."""
    library = small({"a": 0, "b": 1, "c": 2})
    library.add_special_tokens(["<s>", "</s>", "<|im_end|>"])
    return library


def opened(library, **config) -> HfTokenizer:
    return HfTokenizer(library.to_str(), config)


@pytest.mark.parametrize("form", ["gpt2", "gpt2_json"])
def test_gpt2_ids_are_llama_cpps(form, oracle_dir, request):
    """Both through tiktoken and through a tokenizer.json."""
    tokenizer = request.getfixturevalue(form)
    stem = oracle_dir / "ggml-vocab-gpt-2.gguf"
    with open(f"{stem}.inp", encoding="utf-8", newline="") as file:
        texts = file.read().split("\n__ggml_vocab_test__\n")[:-1]
    with open(f"{stem}.out", encoding="utf-8") as file:
        lines = file.read().split("\n")[:-1]
    assert len(texts) == len(lines) == GPT2_CASES
    for text, line in zip(texts, lines, strict=True):
        assert tokenizer.encode(text) == [int(i) for i in line.split()], text
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_gpt2_has_its_published_vocabulary(gpt2_json):
    assert gpt2_json.vocab_size == 50257
    assert (gpt2_json.bos_id, gpt2_json.eos_id) == (None, 50256)
    assert gpt2_json.special_tokens == {"<|endoftext|>": 50256}
    assert gpt2_json.token_bytes(995) == b" world"


@given(ids=st.lists(st.integers(0, 50256)))
@settings(deadline=None)
def test_text_of_byte_level_ids_is_the_librarys(gpt2_json, gpt2_library, ids):
    assert gpt2_json.decode(ids) == gpt2_library.decode(ids)


@pytest.mark.parametrize("form", ["llama2_library", "metaspace_library"])
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
@settings(deadline=None)
def test_text_of_byte_fallback_ids_is_the_librarys(form, request, text):
    library = request.getfixturevalue(form)
    tokenizer = opened(library)
    # The library reads a special token that a text spells, and ours never does.
    assume(not any(name in text for name in tokenizer.special_tokens))
    ids = tokenizer.encode(text)
    assert ids == library.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == library.decode(ids)


@pytest.mark.parametrize("form", ["llama2_library", "metaspace_library"])
@given(ids=st.lists(st.just(1) | st.just(2) | st.integers(259, 306)))
@settings(deadline=None)
def test_text_of_any_pieces_is_the_librarys(form, request, ids):
    """Byte pieces apart: the library shows a whole run of them as bad, or none."""
    library = request.getfixturevalue(form)
    assert opened(library).decode(ids) == library.decode(ids)


@given(text=TEXTS, inside=st.booleans())
@settings(deadline=None)
def test_llama2_form_does_what_sentencepiece_does(tiny_json, tiny, text, inside):
    ids = tiny.encode(text, inside=inside)
    assert tiny_json.encode(text, inside=inside) == ids
    assert tiny_json.decode(ids) == tiny.decode(ids)
    expected = tiny.encode_with_offsets(text, inside=inside)
    assert tiny_json.encode_with_offsets(text, inside=inside) == expected


def test_every_bad_byte_is_one_replacement_character(tiny_json):
    assert tiny_json.decode([3 + 0xE4, 3 + 0xBD, 3 + 0xFF]) == 3 * "\ufffd"


def test_first_metaspace_token_loses_its_spaces(metaspace_json, metaspace_library):
    stream = StreamingDetokenizer(metaspace_json)
    space, the = (metaspace_library.token_to_id(t) for t in ("▁", "▁the"))
    assert [stream.add([i]) for i in (space, space, the)] == ["", " ", " the"]


def test_added_tokens_are_special_as_marked():
    library = letters()
    library.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    tokenizer = opened(library)
    assert tokenizer.special_tokens == {"<s>": 3, "</s>": 4, "<|im_end|>": 5}
    assert tokenizer.encode("a<think>b</s>") == [0, 6, 1]
    assert tokenizer.decode([0, 6, 1, 4]) == "a<think>b"
    assert tokenizer.token_bytes(6) == b"<think>"


def test_unknown_token_is_silent_and_not_special():
    library = small({"<unk>": 0, "a": 1}, unk_token="<unk>")
    library.add_special_tokens(["<unk>", "</s>"])
    tokenizer = opened(library)
    assert tokenizer.special_tokens == {"</s>": 2}
    assert tokenizer.encode("aé") == [1, 0]
    assert tokenizer.decode([1, 0, 1]) == "aa"


def test_ids_may_have_holes():
    spec = json.loads(small({"a": 0, "b": 5}).to_str())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    spec["added_tokens"] = [
        {"id": 9, "content": "</s>", **flags, "special": True},
        {"id": 7, "content": "<t>", **flags, "special": False},
    ]
    tokenizer = HfTokenizer(json.dumps(spec), {})
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (10, 9)
    assert tokenizer.encode("ab<t>") == [0, 5, 7]
    assert [tokenizer.token_bytes(i) for i in (5, 7, 8, 9)] == [b"b", b"<t>", b"", b""]


def test_added_token_with_two_ids_is_refused():
    spec = json.loads(letters().to_str())
    spec["model"]["vocab"]["<s>"] = 7
    with pytest.raises(ValueError, match=r"'<s>' has id 3, but the vocabulary .* 7"):
        HfTokenizer(json.dumps(spec), {})


BEFORE = processors.TemplateProcessing(
    single="<s> $A </s>", special_tokens=[("<s>", 3), ("</s>", 4)]
)
AFTER = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 4)])


@pytest.mark.parametrize(
    ("processor", "config", "bos_id", "eos_id"),
    [
        (None, {}, None, 4),
        (BEFORE, {}, 3, 4),
        (AFTER, {}, None, 4),
        (processors.Sequence([processors.ByteLevel(), BEFORE]), {}, 3, 4),
        (processors.RobertaProcessing(("</s>", 4), ("<s>", 3)), {}, 3, 4),
        (BEFORE, {"add_bos_token": False, "bos_token": "<s>"}, None, 4),
        (BEFORE, {"add_bos_token": None, "bos_token": "<s>"}, 3, 4),
        (None, {"add_bos_token": True}, 3, 4),
        (None, {"add_bos_token": True, "bos_token": "<|im_end|>"}, 5, 4),
        (BEFORE, {"eos_token": "<|im_end|>"}, 3, 5),
        (BEFORE, {"eos_token": {"content": "<|im_end|>", "lstrip": False}}, 3, 5),
        (BEFORE, {"eos_token": None}, 3, None),
    ],
)
def test_bos_and_eos(processor, config, bos_id, eos_id):
    library = letters()
    if processor is not None:
        library.post_processor = processor
    tokenizer = opened(library, **config)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (bos_id, eos_id)
    assert tokenizer.encode("ab") == [0, 1]


@pytest.mark.parametrize(
    ("library", "expected"),
    [
        (small({"<|endoftext|>": 0, "<|end_of_text|>": 1}), 1),
        (small({"<|im_end|>": 0, "<|endoftext|>": 1}), 1),
        (small({"a": 0}), None),
    ],
)
def test_usual_end_of_text(library, expected):
    assert opened(library).eos_id == expected


def test_config_with_an_unknown_token_is_refused():
    with pytest.raises(ValueError, match="eos_token='<end>', which is no token"):
        opened(letters(), eos_token="<end>")


def test_settings_of_padding_and_truncation_are_left_out():
    library = letters()
    library.enable_padding(length=7)
    library.enable_truncation(1)
    assert opened(library).encode("abc") == [0, 1, 2]


def merging() -> tokenizers.Tokenizer:
    """Returns a BPE whose merges spell its own special token, after a dummy space."""
    pieces = ["<", "s", ">", "a", "▁", "<s", "<s>"]
    library = small(
        {piece: i for i, piece in enumerate(pieces)}, [("<", "s"), ("<s", ">")]
    )
    library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    library.add_special_tokens(["<s>"])
    return library


def test_merges_never_spell_a_special_token():
    library = merging()
    tokenizer = opened(library, eos_token="<s>")
    library.encode_special_tokens = True
    assert library.encode("a<s>").ids == [4, 3, 6]
    assert tokenizer.encode("a<s>") == [4, 3, 0, 1, 2]
    ids, spans = tokenizer.encode_with_offsets("a<s><s>a")
    assert ids == [4, 3, 0, 1, 2, 0, 1, 2, 3]
    assert spans == [(0, 0), *((i, i + 1) for i in range(8))]
    assert tokenizer.encode("<s>" * 2000).count(6) == 0


def test_special_token_of_one_character_cannot_be_spelled():
    library = small({"a": 0, "b": 1})
    tokenizer = opened(library, eos_token="b")
    with pytest.raises(ValueError, match="'b' has no ids but those of a special"):
        tokenizer.encode("ab")


def test_spans_hold_the_spaces_of_their_tokens(gpt2_json):
    ids, spans = gpt2_json.encode_with_offsets(" Hello world é🚀")
    assert gpt2_json.encode(" Hello world é🚀") == ids
    assert spans[:3] == [(0, 6), (6, 12), (12, 14)]
    assert set(spans[3:]) == {(14, 15)}


def test_spans_of_byte_pieces_and_of_the_dummy_space(tiny_json, tiny_model):
    ids, spans = tiny_json.encode_with_offsets("🚀 the")
    assert [tiny_json.token_bytes(i) for i in ids] == [
        b" ", b"\xf0", b"\x9f", b"\x9a", b"\x80", b" the"
    ]  # fmt: skip
    assert spans == [(0, 0), *4 * [(0, 1)], (1, 5)]


def test_inside_has_no_space_of_the_models_own(tiny_json, metaspace_json):
    for tokenizer in (tiny_json, metaspace_json):
        assert tokenizer.token_bytes(tokenizer.encode("the")[0]) == b" the"
        ids = tokenizer.encode("the", inside=True)
        assert b"".join(map(tokenizer.token_bytes, ids)) == b"the"
        assert tokenizer.encode(" the", inside=True) == tokenizer.encode("the")


def test_inside_of_byte_level_with_a_prefix_space():
    library = small({"Ġ": 0, "a": 1, "Ġa": 2}, [("Ġ", "a")])
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    library.decoder = decoders.ByteLevel()
    tokenizer = opened(library)
    assert tokenizer.encode("a") == [2]
    assert tokenizer.encode("a", inside=True) == [1]


def test_copy_in_a_worker_still_takes_special_tokens_for_text(tiny_json):
    copy = pickle.loads(pickle.dumps(tiny_json))
    assert copy.encode("</s> the") == tiny_json.encode("</s> the")
    assert not {1, 2} & set(copy.encode("</s> the"))


def test_file_of_a_folder_heeds_its_config(tmp_path):
    library = letters()
    library.post_processor = BEFORE
    library.save(str(tmp_path / "tokenizer.json"))
    config = {"add_bos_token": False, "eos_token": "<|im_end|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    path = str(tmp_path / "tokenizer.json")
    tokenizer = make_tokenizer(
        TokenizerConfig(kind="huggingface", encoding=None, path=path)
    )
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, 5)
    tokenizer.save(tmp_path / "saved")
    loaded = load_tokenizer(tmp_path / "saved")
    assert (loaded.bos_id, loaded.eos_id) == (None, 5)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert opened(library).fingerprint != tokenizer.fingerprint


@pytest.mark.parametrize(
    "damage",
    [lambda t: t[: len(t) // 2], lambda t: "", lambda t: "[]", lambda t: '{"a": 1}'],
)
def test_damaged_file_is_named(damage, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(damage(letters().to_str()))
    with pytest.raises(ValueError, match=r"tokenizer.json: this is no tokenizer.json"):
        HfTokenizer.from_file(path)


@pytest.mark.parametrize("config", ['{"eos_token": "</s', "[]"])
def test_damaged_config_is_named(config, tmp_path):
    letters().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(config)
    with pytest.raises(ValueError, match=r"tokenizer_config.json (is no|holds a)"):
        HfTokenizer.from_file(tmp_path / "tokenizer.json")


@pytest.mark.parametrize(
    ("decoder", "message"),
    [
        (None, "type null is not supported; these are: ByteLevel, .*Metaspace"),
        (decoders.WordPiece(), "type WordPiece is not supported"),
        (decoders.Sequence([decoders.Fuse(), decoders.CTC()]), "type CTC is not"),
        (decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()]), "ByteLevel then"),
        (decoders.Strip(" ", 1, 0), "decoder of Strip is not supported"),
        (
            decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 1, 1)]),
            "strips 1 times ' ' from the start and 1 times",
        ),
        (decoders.Replace(tokenizers.Regex("_+"), " "), "replaces .*Regex"),
    ],
)
def test_decoder_that_is_not_supported_is_named(decoder, message):
    library = letters()
    spec = json.loads(library.to_str())
    spec["decoder"] = decoder and json.loads(decoder.__getstate__())
    with pytest.raises(ValueError, match=message):
        HfTokenizer(json.dumps(spec), {})
