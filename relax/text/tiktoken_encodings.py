"""What defines a tiktoken encoding: a pattern, ranked byte strings, special tokens."""

import base64
import hashlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tiktoken
import tiktoken.registry

END_OF_TEXT = "<|endoftext|>"

# cl100k_base as published, and Llama 3. tiktoken 0.14 writes cl100k's pattern in
# another way, which splits whitespace with newlines at the end of a text differently.
_CL100K_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Bytes have no merges, so any split will do; a bounded one needs no backtracking.
_BYTES_PATTERN = r"(?s:.{1,64})"

_LLAMA3_RANKS = 128_000
_LLAMA3_SPECIALS = 256
_LLAMA3_NAMES = (  # Llama 3.1, llama-models `tokenizer.py`; the rest is reserved
    "begin_of_text",
    "end_of_text",
    "reserved_special_token_0",
    "reserved_special_token_1",
    "finetune_right_pad_id",
    "step_id",
    "start_header_id",
    "end_header_id",
    "eom_id",
    "eot_id",
    "python_tag",
    "image",
)

_HOST = "https://openaipublic.blob.core.windows.net/"
_URLS = {
    "gpt2": (
        _HOST + "gpt-2/encodings/main/vocab.bpe",
        _HOST + "gpt-2/encodings/main/encoder.json",
    ),
    "r50k_base": (_HOST + "encodings/r50k_base.tiktoken",),
    "p50k_base": (_HOST + "encodings/p50k_base.tiktoken",),
    "p50k_edit": (_HOST + "encodings/p50k_base.tiktoken",),
    "cl100k_base": (_HOST + "encodings/cl100k_base.tiktoken",),
    "o200k_base": (_HOST + "encodings/o200k_base.tiktoken",),
    "o200k_harmony": (_HOST + "encodings/o200k_base.tiktoken",),
}


@dataclass(frozen=True, kw_only=True)
class EncodingSpec:
    """Everything that maps text to ids in tiktoken; ids may have holes."""

    pattern: str
    ranks: dict[bytes, int]
    special_tokens: dict[str, int]


def bytes_spec() -> EncodingSpec:
    """Returns the 256 bytes as ids 0 to 255, and end-of-text as id 256."""
    return EncodingSpec(
        pattern=_BYTES_PATTERN,
        ranks={bytes([value]): value for value in range(256)},
        special_tokens={END_OF_TEXT: 256},
    )


def file_spec(path: str) -> EncodingSpec:
    """Returns the encoding of a file of `base64 rank` lines.

    128,000 ranks are Llama 3's, with the 256 special tokens of 3.1. Any other number
    gets `<|endoftext|>` as its last id. Both split text with cl100k_base's pattern.
    """
    ranks = parse_ranks(path)
    if len(ranks) == _LLAMA3_RANKS:
        special_tokens = _llama3_special_tokens()
    else:
        special_tokens = {END_OF_TEXT: max(ranks.values()) + 1}
    return EncodingSpec(
        pattern=_CL100K_PATTERN, ranks=ranks, special_tokens=special_tokens
    )


def named_spec(name: str) -> EncodingSpec:
    """Returns an encoding that tiktoken knows, downloading its files if it must.

    Raises:
        ValueError: tiktoken has no encoding of this name.
        FileNotFoundError: its files are neither cached nor within reach.
    """
    names = tiktoken.list_encoding_names()
    if name not in names:
        raise ValueError(
            f"tokenizer.encoding={name!r} is unknown; choose one of {', '.join(names)}"
        )
    try:
        _check_within_reach(name)
        fields = tiktoken.registry.ENCODING_CONSTRUCTORS[name]()
    except OSError as error:  # also every exception of requests
        raise FileNotFoundError(_missing_files(name, error)) from error
    return EncodingSpec(
        pattern=fields["pat_str"],
        ranks=fields["mergeable_ranks"],
        special_tokens=fields["special_tokens"],
    )


def parse_ranks(path: str | Path) -> dict[bytes, int]:
    """Returns the byte strings and ranks of a tiktoken file.

    `tiktoken.load` would copy the file into its cache under a hash of the path, and
    go on reading that copy after the file has changed.
    """
    ranks = {}
    for number, line in enumerate(Path(path).read_bytes().splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError as error:
            raise ValueError(
                f"tokenizer.path={str(path)!r} is no tiktoken file: line {number} is "
                "not `base64 rank`; a sentencepiece model needs "
                "tokenizer.kind=sentencepiece"
            ) from error
    if missing := [value for value in range(256) if bytes([value]) not in ranks]:
        raise ValueError(
            f"tokenizer.path={str(path)!r} lacks {len(missing)} of the 256 single "
            f"bytes, first {missing[0]:#04x}; tiktoken cannot encode without them"
        )
    return ranks


def format_ranks(ranks: dict[bytes, int]) -> bytes:
    """Returns a tiktoken file, in the order of the ranks."""
    lines = sorted((rank, base64.b64encode(token)) for token, rank in ranks.items())
    return b"".join(b"%s %d\n" % (token, rank) for rank, token in lines)


def _llama3_special_tokens() -> dict[str, int]:
    reserved = range(2, _LLAMA3_SPECIALS - len(_LLAMA3_NAMES) + 2)
    names = [*_LLAMA3_NAMES, *(f"reserved_special_token_{i}" for i in reserved)]
    return {f"<|{name}|>": _LLAMA3_RANKS + i for i, name in enumerate(names)}


def _cache_folder() -> str:
    """Returns the folder that tiktoken 0.14 caches in; "" means that it does not."""
    default = os.path.join(tempfile.gettempdir(), "data-gym-cache")
    fallback = os.environ.get("DATA_GYM_CACHE_DIR", default)
    return os.environ.get("TIKTOKEN_CACHE_DIR", fallback)


def _cached_files(name: str) -> list[str]:
    """Returns the paths at which tiktoken caches the files of an encoding."""
    hashes = [hashlib.sha1(url.encode()).hexdigest() for url in _URLS.get(name, ())]
    return [os.path.join(_cache_folder(), file) for file in hashes]


def _check_within_reach(name: str) -> None:
    """Raises an OSError if a file must be fetched and its host does not answer.

    tiktoken fetches without a timeout, which can hang for minutes behind a firewall.
    """
    if _cache_folder() and all(map(os.path.isfile, _cached_files(name))):
        return
    import requests  # what tiktoken itself fetches with, so proxies are honoured

    requests.head(_HOST, timeout=10)


def _missing_files(name: str, error: OSError) -> str:
    files = ", ".join(
        f"{os.path.basename(path)} ({url})"
        for path, url in zip(_cached_files(name), _URLS.get(name, ()), strict=True)
    )
    variable = os.environ.get("TIKTOKEN_CACHE_DIR")
    return (
        f"tokenizer.encoding={name!r} needs {files or 'its files'}, neither cached "
        f"nor fetched ({type(error).__name__}): put it into tiktoken's cache folder, "
        f"now {_cache_folder()!r} with TIKTOKEN_CACHE_DIR={variable!r}, or set "
        "tokenizer.path to a local file and tokenizer.encoding=null"
    )
