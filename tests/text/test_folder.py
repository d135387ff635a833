import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relax.text.chat import ChatTemplate
from relax.text.folder import load_folder_tokenizer
from relax.text.hf_tokenizer import HfTokenizer
from relax.text.tiktoken_encodings import EncodingSpec, format_ranks
from relax.text.tokenizers import SentencePieceTokenizer, TiktokenTokenizer

NAMES = ["<|im_start|>", "<|im_end|>", "the fox"]
TEXTS = [
    "",
    " ",
    "a",
    " the  fox\n\njumps\t",
    "Hello  world!\n\tcafé 你好 🚀 x̂ \u200d<0x0A> \ufffd 1234567\n",
    "'LL don't 'ſ WE'RE\r\n\r\n  x   \n   y",
    "=====-----    ====  aaaaaaaaaaa abababababab",
    " fox 1111 1111111",
    "def f(x):\n    return x**2  # \u3000 \u00a0 \u2581",
]


def write_config(folder, **config) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def same(loaded, tokenizer, texts=TEXTS) -> None:
    """Fails unless two tokenizers give the same ids, with the same special tokens."""
    assert loaded.special_tokens == tokenizer.special_tokens
    assert (loaded.bos_id, loaded.eos_id) == (tokenizer.bos_id, tokenizer.eos_id)
    assert loaded.vocab_size == tokenizer.vocab_size
    for text in texts:
        for inside in (False, True):
            ids = tokenizer.encode(text, inside=inside)
            assert loaded.encode(text, inside=inside) == ids, text
            assert loaded.decode(ids) == tokenizer.decode(ids)


def test_folder_without_tokenizer_gives_none(tmp_path):
    assert load_folder_tokenizer(tmp_path) is None


def test_own_saved_form_comes_first(tiny, byte_tokenizer, tmp_path):
    byte_tokenizer.save_hf(tmp_path)
    tiny.save(tmp_path)
    assert load_folder_tokenizer(tmp_path).fingerprint == tiny.fingerprint


def test_tokenizer_json_comes_before_the_model(tiny, byte_tokenizer, tmp_path):
    byte_tokenizer.save_hf(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(tiny._model)
    same(load_folder_tokenizer(tmp_path), byte_tokenizer)


def test_model_of_sentencepiece(tiny, tiny_model, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(tiny_model)
    assert load_folder_tokenizer(tmp_path).fingerprint == tiny.fingerprint


def test_config_beside_a_sentencepiece_model(tiny_model, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(tiny_model)
    added = {"0": "<unk>", "1": "<s>", "2": "</s>", "307": "<a>", "311": "<b>"}
    write_config(
        tmp_path,
        add_bos_token=False,
        bos_token={"content": "<s>"},
        eos_token="<b>",
        added_tokens_decoder={
            key: {"content": name, "special": True} for key, name in added.items()
        },
    )
    tokenizer = load_folder_tokenizer(tmp_path)
    assert tokenizer.special_tokens == {"<s>": 1, "</s>": 2, "<a>": 307, "<b>": 311}
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, 311)
    assert tokenizer.vocab_size == 312
    assert tokenizer.token_bytes(309) == b""
    tokenizer.save(tmp_path / "saved")
    same(load_folder_tokenizer(tmp_path / "saved"), tokenizer)


def test_added_token_that_is_not_special_needs_a_json(tiny_model, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(tiny_model)
    write_config(tmp_path, added_tokens_decoder={"307": {"content": "<a>"}})
    with pytest.raises(ValueError, match=r"tokenizer_config.json: .*'<a>' with id 307"):
        load_folder_tokenizer(tmp_path)


def test_config_with_an_unknown_token_is_refused(tiny_model, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(tiny_model)
    write_config(tmp_path, eos_token="<end>")
    with pytest.raises(ValueError, match=r"_config.json names eos_token=.*</s>"):
        load_folder_tokenizer(tmp_path)


@pytest.fixture(scope="module")
def llama3(tmp_path_factory):
    """A folder with a tokenizer.model of Llama 3's size, and what it holds."""
    pieces = [bytes([i]) for i in range(256)] + [b"th", b"the", b" the"]
    pieces += [b"#" + i.to_bytes(3) for i in range(128_000 - len(pieces))]
    folder = tmp_path_factory.mktemp("llama3")
    ranks = {piece: rank for rank, piece in enumerate(pieces)}
    (folder / "tokenizer.model").write_bytes(format_ranks(ranks))
    return folder


def test_model_of_tiktoken_form_is_llama3(llama3):
    tokenizer = load_folder_tokenizer(llama3)
    assert isinstance(tokenizer, TiktokenTokenizer)
    assert tokenizer.encode("the the 1234") == [257, 258, 32, 49, 50, 51, 52]
    assert (tokenizer.bos_id, tokenizer.eos_id) == (128_000, 128_001)
    assert tokenizer.special_tokens["<|eot_id|>"] == 128_009


def test_config_names_the_special_tokens_of_llama3(llama3, tmp_path):
    (tmp_path / "tokenizer.model").symlink_to(llama3 / "tokenizer.model")
    name = "<|reserved_special_token_4|>"  # as Llama 3.0 has it, which 3.1 calls eom
    token = {"content": name, "special": True}
    write_config(
        tmp_path, eos_token="<|eot_id|>", added_tokens_decoder={"128008": token}
    )
    tokenizer = load_folder_tokenizer(tmp_path)
    assert tokenizer.special_tokens[name] == 128_008
    assert "<|eom_id|>" not in tokenizer.special_tokens
    assert (tokenizer.bos_id, tokenizer.eos_id) == (128_000, 128_009)
    assert tokenizer.vocab_size == 128_256


def write_names(folder, names: dict[int, str]) -> None:
    tokens = {str(i): {"content": n, "special": True} for i, n in names.items()}
    write_config(folder, added_tokens_decoder=tokens)


def test_config_that_renames_every_special_token_of_llama3(llama3, tmp_path):
    """Llama 3.1's names at Hugging Face, most of which Meta gives to other ids."""
    (tmp_path / "tokenizer.model").symlink_to(llama3 / "tokenizer.model")
    usual = {0: "begin_of_text", 1: "end_of_text", 4: "finetune_right_pad_id"}
    usual |= {6: "start_header_id", 7: "end_header_id", 8: "eom_id", 9: "eot_id"}
    usual |= {10: "python_tag"}
    others = [i for i in range(256) if i not in usual]
    names = usual | {i: f"reserved_special_token_{n}" for n, i in enumerate(others)}
    names = {128_000 + i: f"<|{name}|>" for i, name in names.items()}
    write_names(tmp_path, names)
    tokenizer = load_folder_tokenizer(tmp_path)
    assert tokenizer.special_tokens == {name: i for i, name in names.items()}
    assert tokenizer.special_tokens["<|reserved_special_token_2|>"] == 128_005
    assert tokenizer.special_tokens["<|reserved_special_token_247|>"] == 128_255
    assert tokenizer.vocab_size == 128_256


def test_config_that_moves_one_special_token_of_llama3(llama3, tmp_path):
    """The id that it leaves has a name still."""
    before = load_folder_tokenizer(llama3).special_tokens
    (tmp_path / "tokenizer.model").symlink_to(llama3 / "tokenizer.model")
    name = "<|reserved_special_token_2|>"
    assert (before["<|image|>"], before[name]) == (128_011, 128_012)
    write_names(tmp_path, {128_011: name})
    after = load_folder_tokenizer(tmp_path).special_tokens
    assert (after[name], after["<|unused_128012|>"]) == (128_011, 128_012)
    assert sorted(after.values()) == [*range(128_000, 128_256)]
    assert before.keys() - after.keys() == {"<|image|>"}


def test_space_at_the_start_only(tiny, tiny_model, auto_tokenizer, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(tiny_model)
    added = {"307": {"content": "[INST]", "special": True}}
    write_config(
        tmp_path,
        legacy=False,
        added_tokens_decoder=added,
        tokenizer_class="LlamaTokenizer",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    tokenizer = load_folder_tokenizer(tmp_path)
    assert tokenizer.prefix_at_start_only and not tiny.prefix_at_start_only
    chat = ChatTemplate("[INST]{{ messages[0].content }}", name="mine")

    def encode(tokenizer, text: str) -> list[int]:
        return chat.encode(tokenizer, [{"role": "user", "content": text}])

    ids = encode(tokenizer, "the fox")
    assert ids == [307, *tiny.encode("the fox", inside=True)]
    assert ids[1:] != tiny.encode("the fox")
    assert tokenizer.encode("the fox") == tiny.encode("the fox")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    peer = auto_tokenizer(tmp_path)
    for text in ("the fox", " the fox"):
        expected = peer.encode("[INST]" + text, add_special_tokens=False)
        assert encode(tokenizer, text) == expected

    tokenizer.save(tmp_path / "saved")
    for other in (
        load_folder_tokenizer(tmp_path / "saved"),
        tokenizer.with_special_tokens(["<a>"]),
    ):
        assert other.prefix_at_start_only
        assert encode(other, "the fox") == ids
    assert tokenizer.fingerprint != tiny.with_special(tokenizer.special).fingerprint


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com\n"])
def test_damaged_model_is_named(content, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer.model is neither a sentencepiece"):
        load_folder_tokenizer(tmp_path)


@pytest.fixture(scope="session")
def with_holes():
    """An encoding whose ranks go on after its special token, as p50k_base's do."""
    pieces = [bytes([i]) for i in range(256)] + [b"th", b"the"]
    ranks = {piece: rank for rank, piece in enumerate(pieces)} | {b" the": 261}
    ranks |= {b"11": 262, b"111": 263, b"1111": 264}  # the last is never whole
    ranks[b" fox"] = 265  # whole, and not made by merges
    special = {"<|endoftext|>": 258, "<|far|>": 277}
    return TiktokenTokenizer(
        EncodingSpec(
            pattern=r"\s?\p{L}++|\p{N}{1,3}+|[^\p{L}\p{N}]",
            ranks=ranks,
            special_tokens=special,
        )
    )


@pytest.fixture(scope="session")
def with_user_pieces(train_sentencepiece):
    return SentencePieceTokenizer(
        train_sentencepiece(user_defined_symbols=["<think>", "=="], vocab_size=309)
    )


@pytest.fixture(scope="session")
def unigram(train_sentencepiece):
    return SentencePieceTokenizer(
        train_sentencepiece(model_type="unigram", vocab_size=289)
    )


MORE = ["with_holes", "with_user_pieces", "unigram"]
GREEDY = ["tiny", "tiny_dropping_spaces", "tiny_json", "metaspace_json", "gpt2_json"]
GREEDY += ["byte_tokenizer", "gpt2", "mistral", "stories", *MORE]


@pytest.fixture(scope="session", params=GREEDY)
def any_tokenizer(request):
    return request.getfixturevalue(request.param)


def test_exported_folder_holds_the_same_tokenizer(any_tokenizer, tmp_path):
    any_tokenizer.save_hf(tmp_path)
    loaded = load_folder_tokenizer(tmp_path)
    assert isinstance(loaded, HfTokenizer)
    same(loaded, any_tokenizer, [t for t in TEXTS if "▁" not in t])
    loaded.save_hf(tmp_path / "again")
    same(load_folder_tokenizer(tmp_path / "again"), any_tokenizer, TEXTS[:3])


def test_added_tokens_are_kept(any_tokenizer, tmp_path):
    tokenizer = any_tokenizer.with_special_tokens(NAMES)
    first = any_tokenizer.vocab_size
    added = {name: first + i for i, name in enumerate(NAMES)}
    assert tokenizer.special_tokens == any_tokenizer.special_tokens | added
    assert tokenizer.vocab_size == first + 3
    text = "the fox <|im_start|><|im_end|>"
    assert tokenizer.encode(text) == any_tokenizer.encode(text)
    assert tokenizer.fingerprint != any_tokenizer.fingerprint
    tokenizer.save(tmp_path / "own")
    tokenizer.save_hf(tmp_path / "hf")
    for folder in ("own", "hf"):
        same(load_folder_tokenizer(tmp_path / folder), tokenizer, [*TEXTS[:4], text])


def test_encoding_with_holes_by_hand(with_holes):
    assert with_holes.encode("the fox 1111") == [257, 265, 32, 263, 49]


@given(text=st.text(st.sampled_from(list(" ab\n\r1'é🚀=-<>thekinfox\u3000"))))
@settings(deadline=None)
@pytest.mark.parametrize("name", ["gpt2", "mistral", "stories", "tiny", *MORE])
def test_exported_tokenizer_gives_the_same_ids(name, exported, text):
    tokenizer, loaded = exported(name)
    assert loaded.encode(text) == tokenizer.encode(text)
    assert loaded.encode(text, inside=True) == tokenizer.encode(text, inside=True)


@pytest.fixture(scope="session")
def exported(request, tmp_path_factory):
    """A function from a fixture's name to the tokenizer, and to its exported form."""
    pairs = {}

    def get(name):
        if name not in pairs:
            tokenizer = request.getfixturevalue(name)
            folder = tmp_path_factory.mktemp(name)
            tokenizer.save_hf(folder)
            pairs[name] = tokenizer, load_folder_tokenizer(folder)
        return pairs[name]

    return get


def test_export_of_a_normalising_model_says_where_it_differs(
    train_sentencepiece, tmp_path, caplog
):
    model = train_sentencepiece(normalization_rule_name="nmt_nfkc")
    tokenizer = SentencePieceTokenizer(model)
    tokenizer.save_hf(tmp_path)
    assert "nmt_nfkc" in caplog.text
    same(load_folder_tokenizer(tmp_path), tokenizer, ["ｔｈｅ\tﬁｆｔｈ ½\nfox①", "é ſ"])


def test_model_of_words_has_no_tokenizer_json(train_sentencepiece, tmp_path):
    options = {"model_type": "word", "byte_fallback": False, "vocab_size": 15}
    tokenizer = SentencePieceTokenizer(train_sentencepiece(**options))
    with pytest.raises(ValueError, match=r"type 3 has no tokenizer\.json"):
        tokenizer.save_hf(tmp_path)


def test_export_of_an_overruled_bos(llama2_library, tmp_path):
    """A BOS that the config takes away, or gives, is so in the tokenizer.json too."""
    for adds, expected in ((False, None), (True, 1)):
        tokenizer = HfTokenizer(llama2_library.to_str(), {"add_bos_token": adds})
        tokenizer.save_hf(tmp_path)
        (tmp_path / "tokenizer_config.json").unlink()
        assert load_folder_tokenizer(tmp_path).bos_id == expected


@pytest.fixture(scope="module")
def auto_tokenizer():
    """AutoTokenizer.from_pretrained, without a network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield pytest.importorskip("transformers").AutoTokenizer.from_pretrained


@pytest.mark.parametrize("model_type", [None, "llama", "mistral", "qwen3"])
def test_transformers_agrees(any_tokenizer, model_type, auto_tokenizer, tmp_path):
    tokenizer = any_tokenizer.with_special_tokens(NAMES)
    tokenizer.save_hf(tmp_path)
    if model_type is not None:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    peer = auto_tokenizer(tmp_path)
    for text in TEXTS:
        if "the fox" in text or "▁" in text:
            continue  # to transformers a special token, and to sentencepiece a space
        ids = tokenizer.encode(text)
        assert peer.encode(text, add_special_tokens=False) == ids, text
        first = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        assert peer.encode(text) == first + ids
    for name, token_id in tokenizer.special_tokens.items():
        assert peer.encode(name, add_special_tokens=False)[-1] == token_id
    assert peer.convert_tokens_to_ids(NAMES) == [
        any_tokenizer.vocab_size + i for i in range(3)
    ]
    assert peer.bos_token_id == tokenizer.bos_id
    assert peer.eos_token_id == tokenizer.eos_id
    assert max(peer.get_vocab().values()) == tokenizer.vocab_size - 1
