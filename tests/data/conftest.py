"""Bytes as tokens, with the special tokens of every template of ours."""

import pytest

from relax.text.base import SpecialTokens, Tokenizer
from relax.text.tokenizers import TokenizerConfig, make_tokenizer

SPECIAL_TOKENS = {
    "<s>": 256,
    "</s>": 257,
    "<|im_start|>": 258,
    "<|im_end|>": 259,
    "<|start_header_id|>": 260,
    "<|end_header_id|>": 261,
    "<|eot_id|>": 262,
}


@pytest.fixture(scope="session")
def plain_bytes() -> Tokenizer:
    """A byte is its id; 256 ends a text, and nothing begins one."""
    return make_tokenizer(TokenizerConfig(kind="bytes", encoding=None, path=None))


@pytest.fixture(scope="session")
def special_bytes(plain_bytes) -> Tokenizer:
    """A byte is its id; <s> begins a text, </s> ends it."""
    special = SpecialTokens(ids=SPECIAL_TOKENS, bos_id=256, eos_id=257)
    return plain_bytes.with_special(special)
