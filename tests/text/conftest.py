"""Tokenizers of every kind: some that need no files, and real ones where present."""

import io
import json
import shutil

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from relax.text.base import Tokenizer
from relax.text.folder import load_folder_tokenizer
from relax.text.hf_tokenizer import HfTokenizer
from relax.text.tokenizers import (
    SentencePieceTokenizer,
    TokenizerConfig,
    make_tokenizer,
)

_LINES = ["the quick brown fox jumps over the lazy dog", "five boxing wizards jump"]


def _train(**options) -> bytes:
    """Returns a small byte-fallback model of two sentences, made like Llama 2's."""
    defaults = {
        "vocab_size": 307,
        "add_dummy_prefix": True,
        "remove_extra_whitespaces": False,
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
    }
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_LINES),
        model_writer=model,
        num_threads=1,
        minloglevel=2,
        **(defaults | options),
    )
    return model.getvalue()


def from_file(kind: str, path) -> Tokenizer:
    return make_tokenizer(TokenizerConfig(kind=kind, encoding=None, path=str(path)))


@pytest.fixture(scope="session")
def byte_tokenizer() -> Tokenizer:
    return make_tokenizer(TokenizerConfig(kind="bytes", encoding=None, path=None))


@pytest.fixture(scope="session")
def train_sentencepiece():
    """The function that makes small models, for options of a test's own."""
    return _train


@pytest.fixture(scope="session")
def tiny_model() -> bytes:
    return _train()


@pytest.fixture(scope="session")
def tiny(tiny_model, tmp_path_factory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tiny") / "tokenizer.model"
    path.write_bytes(tiny_model)
    return from_file("sentencepiece", path)


@pytest.fixture(scope="session")
def tiny_dropping_spaces() -> Tokenizer:
    """A model that drops every extra space, as that of stories does."""
    return SentencePieceTokenizer(_train(remove_extra_whitespaces=True))


@pytest.fixture(scope="session")
def tiny_keeping_spaces() -> Tokenizer:
    """A model without the dummy space, which keeps every space of a text."""
    return SentencePieceTokenizer(_train(add_dummy_prefix=False))


@pytest.fixture(scope="session")
def gpt2(data_dir, tmp_path_factory) -> Tokenizer:
    # A copy, because tiktoken deletes a cached file that it takes for a damaged one.
    cache = tmp_path_factory.mktemp("tiktoken") / "cache"
    shutil.copytree(data_dir / "tiktoken_cache", cache)
    config = TokenizerConfig(kind="tiktoken", encoding="gpt2", path=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
        return make_tokenizer(config)


@pytest.fixture(scope="session")
def mistral(data_dir) -> Tokenizer:
    return from_file("sentencepiece", data_dir / "mistral" / "tokenizer.model")


@pytest.fixture(scope="session")
def stories(data_dir) -> Tokenizer:
    return from_file("sentencepiece", data_dir / "stories260K_hf" / "tokenizer.model")


@pytest.fixture(scope="session")
def gpt2_library(data_dir) -> tokenizers.Tokenizer:
    """GPT-2 by the vocabulary and the merges that OpenAI published."""
    cache = data_dir / "tiktoken_cache"
    vocabulary = json.loads((cache / _GPT2_VOCABULARY).read_text())
    lines = (cache / _GPT2_MERGES).read_text(encoding="utf-8").split("\n")[1:-1]
    merges = [tuple(line.split()) for line in lines]
    library = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.post_processor = processors.ByteLevel(trim_offsets=True)
    library.add_special_tokens(["<|endoftext|>"])
    return library


@pytest.fixture(scope="session")
def gpt2_json(gpt2_library) -> Tokenizer:
    return HfTokenizer(gpt2_library.to_str(), {})


@pytest.fixture(scope="session")
def llama2_library(tiny_model) -> tokenizers.Tokenizer:
    """The tiny sentencepiece model in the form that Llama 2's tokenizer.json has."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=tiny_model)
    pieces = [processor.id_to_piece(i) for i in range(len(processor))]
    normal = pieces[3 + 256 :]  # a trained model has them best first
    merges = [
        (piece[:cut], piece[cut:])
        for piece in normal
        for cut in range(1, len(piece))
        if piece[:cut] in normal and piece[cut:] in normal
    ]
    library = tokenizers.Tokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    library.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    library.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    library.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    library.add_special_tokens(["<unk>", "<s>", "</s>"])
    return library


@pytest.fixture(scope="session")
def tiny_json(llama2_library) -> Tokenizer:
    return HfTokenizer(llama2_library.to_str(), {})


@pytest.fixture(scope="session")
def metaspace_library(llama2_library) -> tokenizers.Tokenizer:
    """The same vocabulary in a later form."""
    library = tokenizers.Tokenizer.from_str(llama2_library.to_str())
    library.normalizer = normalizers.Sequence([])
    library.pre_tokenizer = pre_tokenizers.Metaspace(
        prepend_scheme="first", split=False
    )
    library.decoder = decoders.Sequence(
        [decoders.Metaspace(prepend_scheme="first"), decoders.ByteFallback()]
    )
    return library


@pytest.fixture(scope="session")
def metaspace_json(metaspace_library) -> Tokenizer:
    return HfTokenizer(metaspace_library.to_str(), {})


@pytest.fixture(scope="session")
def mistral_json(mistral, tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("mistral")
    mistral.save_hf(folder)
    return load_folder_tokenizer(folder)


_GPT2_MERGES = "6d1cbeee0f20b3d9449abfede4726ed8212e3aee"
_GPT2_VOCABULARY = "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6"
_FAITHFUL = [
    "byte_tokenizer",
    "tiny",
    "tiny_keeping_spaces",
    "gpt2",
    "mistral",
    "gpt2_json",
    "tiny_json",
    "mistral_json",
]
_OTHERS = ["tiny_dropping_spaces", "stories", "metaspace_json"]


@pytest.fixture(scope="session", params=_FAITHFUL)
def faithful_tokenizer(request) -> Tokenizer:
    """Every tokenizer whose decoded text is the text that was encoded."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session", params=[*_FAITHFUL, *_OTHERS])
def tokenizer(request) -> Tokenizer:
    """Every tokenizer."""
    return request.getfixturevalue(request.param)
