"""Text corpora: found, split, and tokenised once into a memory-mapped cache."""

import glob
import hashlib
import http.client
import json
import logging
import os
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from rich.console import Console
from rich.progress import wrap_file

from relax.data.cache import cache_folder, cache_key, write_atomically
from relax.data.records import check_fraction

logger = logging.getLogger(__name__)

KINDS = ("shakespeare", "text")
_SHAKESPEARE = "tinyshakespeare.txt"
_FORMAT_VERSION = 1  # of the cached tokens; raise it when `_encode` or `_split` change
_PIECE = 2**20  # characters


class Tokenizer(Protocol):
    """What this room needs of a tokenizer."""

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    fingerprint: str

    def encode(self, text: str) -> list[int]: ...

    def token_bytes(self, id: int) -> bytes: ...


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the text comes from and how it is split; values in conf/data."""

    kind: str  # one of KINDS
    path: str | None  # file, folder or glob
    text_field: str  # of the lines of .jsonl files
    validation_fraction: float  # of the characters, taken from the end
    cache_dir: str | None  # None: the user's cache folder
    url: str | None
    sha256: str | None  # of the download
    download: bool

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"data.kind={self.kind}: choose one of {', '.join(KINDS)}")
        if self.kind == "text" and self.path is None:
            raise ValueError(
                "data.path=null, but data.kind=text reads its text from there; "
                "set data.path to a file, a folder or a glob"
            )
        check_fraction(self.validation_fraction)
        needs_url = self.kind == "shakespeare" and self.download
        if needs_url and not (self.url and self.sha256):
            raise ValueError(
                f"data.download=true needs data.url (now {self.url}) and data.sha256 "
                f"(now {self.sha256}); set both, or data.download=false"
            )


class Corpus(NamedTuple):
    """Token ids of both splits, memory-mapped `[tokens]`, and where they came from.

    key: differs where text, split or tokenizer do.
    """

    train: np.ndarray
    validation: np.ndarray
    source: str
    key: str


def load_corpus(config: DataConfig, tokenizer: Tokenizer) -> Corpus:
    """Returns the tokens of both splits, uint16 where the vocabulary allows it.

    The text is split by position, the last `validation_fraction` of its characters
    being the validation split, as in nanoGPT; many documents are split as if
    concatenated, so one of them may be cut in two. Within a split, `eos_id` stands
    between documents. Ids are cached under a key of text, split and tokenizer;
    processes that start at once do the same work twice and leave the same files.

    Raises:
      FileNotFoundError, ValueError: see `read_texts`; also where the cache folder
        cannot be written.
    """
    documents, source = read_texts(config)
    fraction = config.validation_fraction
    version = str(_FORMAT_VERSION)
    key = cache_key([version, str(fraction), tokenizer.fingerprint, *documents])
    folder = cache_folder(config.cache_dir) / "tokens" / key
    train, validation = _split(documents, fraction)
    return Corpus(
        train=_cached_tokens(folder / "train.npy", train, tokenizer),
        validation=_cached_tokens(folder / "validation.npy", validation, tokenizer),
        source=source,
        key=key,
    )


def read_texts(config: DataConfig) -> tuple[list[str], str]:
    """Returns the documents and the name of their source.

    A text file is one document, a line of a .jsonl file another.

    Raises:
      FileNotFoundError: `data.path` names no file.
      ValueError: a file is not UTF-8, a line of a .jsonl file has no text, or there
        is no text at all.
    """
    if config.path is not None:
        documents = _read_path(config.path, config.text_field)
        source = config.path
    else:
        document, source = _read_shakespeare(config)
        documents = [document]
    characters = sum(map(len, documents))
    if not characters:
        raise ValueError(f"data.path={config.path}: the text of {source} is empty")
    logger.info(
        "data: %d characters in %d documents from %s",
        characters,
        len(documents),
        source,
    )
    return documents, source


def _read_path(path: str, field: str) -> list[str]:
    documents = []
    for file in _find_files(path):
        text = _read_utf8(file)
        if file.suffix == ".jsonl":
            documents.extend(_jsonl_documents(file, text, field))
        else:
            documents.append(text)
    return documents


def _find_files(path: str) -> list[Path]:
    """Returns the files that `data.path` names, sorted."""
    root = Path(path).expanduser()
    if root.is_dir():
        found = [p for p in root.rglob("*") if p.suffix in (".txt", ".jsonl")]
    else:
        # An existing file comes first: its name may hold the characters of a glob.
        found = [root] if root.is_file() else glob.glob(str(root), recursive=True)
    files = sorted(file for file in map(Path, found) if file.is_file())
    if not files:
        raise FileNotFoundError(
            f"data.path={path} names no file; set it to a text file, a .jsonl file, "
            "a folder that holds .txt or .jsonl files, or a glob"
        )
    return files


def _read_utf8(file: Path) -> str:
    try:
        return file.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"data.path: {file} is not UTF-8: {error}") from error


def _jsonl_documents(file: Path, text: str, field: str) -> Iterator[str]:
    # Not splitlines(): JSON strings may hold U+2028, which is no end of line here.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield _jsonl_text(line, field)
            except ValueError as error:
                raise ValueError(f"data.path: {file}, line {number}: {error}") from None


def _jsonl_text(line: str, field: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(row, dict) or field not in row:
        fields = ", ".join(row) if isinstance(row, dict) else "none, it is no object"
        raise ValueError(f"no field data.text_field={field} (fields: {fields})")
    if not isinstance(row[field], str):
        kind = type(row[field]).__name__
        raise ValueError(f"field data.text_field={field} holds {kind}, not a string")
    return row[field]


def _read_shakespeare(config: DataConfig) -> tuple[str, str]:
    """Returns Tiny Shakespeare and its source, or the excerpt with a warning."""
    cached = cache_folder(config.cache_dir) / _SHAKESPEARE
    data_dir = os.environ.get("RELAX_DATA_DIR")
    for file in [Path(data_dir) / _SHAKESPEARE, cached] if data_dir else [cached]:
        if file.is_file():
            return _read_utf8(file), str(file)
    if config.download and (payload := _download(config.url, config.sha256)):
        write_atomically(cached, lambda file: file.write(payload))
        return payload.decode(), config.url
    logger.warning(
        "data: using the bundled excerpt of Shakespeare: recalled text, not for "
        "quality figures; name the whole text with data.path"
    )
    excerpt = resources.files("relax.data") / "shakespeare_excerpt.txt"
    return excerpt.read_text(encoding="utf-8"), "bundled excerpt"


def _download(url: str, sha256: str) -> bytes | None:
    """Returns what `url` holds if its digest is `sha256`, else warns."""
    try:
        with (
            urllib.request.urlopen(url, timeout=10) as response,
            wrap_file(
                response,
                total=int(response.headers.get("Content-Length", 0)),
                description="Tiny Shakespeare",
                console=Console(stderr=True),
            ) as reader,
        ):
            payload = b"".join(iter(partial(reader.read, 2**16), b""))
    except (OSError, http.client.HTTPException) as error:
        logger.warning("data.url=%s could not be downloaded: %s", url, error)
        return None
    digest = hashlib.sha256(payload).hexdigest()
    if digest != sha256:
        logger.warning(
            "data.url=%s: discarded, its sha256 is %s and data.sha256=%s",
            url,
            digest,
            sha256,
        )
        return None
    return payload


def _split(documents: list[str], fraction: float) -> tuple[list[str], list[str]]:
    """Returns the two splits' documents; the last `fraction` is validation."""
    cut = int(sum(map(len, documents)) * (1 - fraction))
    train, validation = [], []
    for document in documents:
        train.append(document[:cut])
        validation.append(document[cut:])
        cut = max(0, cut - len(document))
    return list(filter(None, train)), list(filter(None, validation))


def _cached_tokens(
    path: Path, documents: list[str], tokenizer: Tokenizer
) -> np.ndarray:
    if not path.is_file():
        dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
        tokens = np.fromiter(_encode(documents, tokenizer), dtype)
        write_atomically(path, lambda file: np.save(file, tokens))
        logger.info("data: %d tokens written to %s", len(tokens), path)
    return np.load(path, mmap_mode="r")


def _encode(documents: list[str], tokenizer: Tokenizer) -> Iterator[int]:
    for number, document in enumerate(documents):
        if number and tokenizer.eos_id is not None:
            yield tokenizer.eos_id
        for piece in _pieces(document):
            yield from tokenizer.encode(piece)


def _pieces(document: str) -> Iterator[str]:
    """Yields the document in the pieces that are encoded, by its text alone.

    A document of at most 2**20 characters is one piece. A longer one is cut after the
    first newline that follows each 2**20 characters, and so again: encoders need
    memory, and some of them time, beyond what is linear in a piece's length. A merge
    across a cut is lost, once in about a million characters.
    """
    start = 0
    while start < len(document):
        newline = document.find("\n", start + _PIECE)
        end = len(document) if newline < 0 else newline + 1
        yield document[start:end]
        start = end
