"""Tokenizers of every kind: two that need no files, and real ones where present."""

import io
import shutil

import pytest
import sentencepiece

from relax.text.tokenizers import (
    SentencePieceTokenizer,
    Tokenizer,
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
    }
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_LINES),
        model_writer=model,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
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


_FAITHFUL = ["byte_tokenizer", "tiny", "tiny_keeping_spaces", "gpt2", "mistral"]


@pytest.fixture(scope="session", params=_FAITHFUL)
def faithful_tokenizer(request) -> Tokenizer:
    """Every tokenizer whose decoded text is the text that was encoded."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session", params=[*_FAITHFUL, "tiny_dropping_spaces", "stories"])
def tokenizer(request) -> Tokenizer:
    """Every tokenizer."""
    return request.getfixturevalue(request.param)
