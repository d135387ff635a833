"""Text to token ids and back: bytes, tiktoken and sentencepiece behind one interface.

A tokenizer adds no special ids and reads none out of text; who builds a prompt puts
`bos_id`, `eos_id` or an entry of `special_tokens` where they belong.
"""

import abc
import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

import sentencepiece
import tiktoken

from relax.text.tiktoken_encodings import (
    END_OF_TEXT,
    EncodingSpec,
    bytes_spec,
    file_spec,
    format_ranks,
    named_spec,
    parse_ranks,
)

_SPEC_FILE = "relax_tokenizer.json"
_SPACE = "▁"  # sentencepiece's U+2581, a space inside a piece


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Which tokenizer; raises ValueError where the fields do not fit the kind."""

    kind: str  # bytes, tiktoken or sentencepiece
    encoding: str | None  # a name that tiktoken knows, such as gpt2
    path: str | None  # a tiktoken or sentencepiece file

    def __post_init__(self) -> None:
        if self.kind not in TOKENIZERS:
            raise ValueError(
                f"tokenizer.kind={self.kind!r} is unknown; choose one of "
                f"{', '.join(TOKENIZERS)}"
            )
        given = (self.encoding is not None, self.path is not None)
        allowed, rule = {
            "bytes": ([(False, False)], "neither encoding nor path"),
            "tiktoken": ([(True, False), (False, True)], "either encoding or path"),
            "sentencepiece": ([(False, True)], "path and no encoding"),
        }[self.kind]
        if given not in allowed:
            raise ValueError(
                f"tokenizer.kind={self.kind!r} takes {rule}, not "
                f"tokenizer.encoding={self.encoding!r} with "
                f"tokenizer.path={self.path!r}"
            )


class Tokenizer(abc.ABC):
    """Ids 0 to `vocab_size` - 1 for pieces of text, some of them special.

    Special ids stand for no text: `decode` skips them, and `encode` never gives them,
    also where the text spells one.
    """

    kind: str
    # How `decode` shows bytes that are not UTF-8, as an error handler of Python's.
    utf8_errors: str

    def __init__(
        self,
        pieces: list[bytes],
        special_tokens: dict[str, int],
        bos_id: int | None,
        eos_id: int | None,
    ) -> None:
        self._pieces = pieces
        self.special_tokens = special_tokens
        self.vocab_size = len(pieces)
        self.bos_id = bos_id
        self.eos_id = eos_id

    @abc.abstractmethod
    def encode(self, text: str) -> list[int]:
        """Returns the ids of ordinary text; lone surrogates become U+FFFD."""

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ids, with U+FFFD for bytes that are not UTF-8."""
        return self._decode([int(i) for i in ids if self.token_bytes(i)])

    @abc.abstractmethod
    def _decode(self, ids: list[int]) -> str: ...

    def token_bytes(self, token_id: int) -> bytes:
        """Returns the bytes that an id stands for, b"" for special and unused ids."""
        if not 0 <= token_id < self.vocab_size:
            raise ValueError(
                f"token id {token_id} is outside the tokenizer's vocabulary of "
                f"{self.vocab_size} ids"
            )
        return self._pieces[token_id]

    def next_bytes(self, token_id: int, started: bool) -> tuple[bytes, bool]:
        """Returns the bytes that an id adds to a text, and whether it has started then.

        `started` tells whether ids before gave the text anything, which decides about
        a space that only the start of a text drops.
        """
        return self.token_bytes(token_id), True

    @property
    @abc.abstractmethod
    def fingerprint(self) -> str:
        """The sha256, in hex, of everything that maps text to ids."""

    def save(self, folder: Path) -> None:
        """Writes all that `load_tokenizer` needs, whatever the tokenizer came from."""
        folder.mkdir(parents=True, exist_ok=True)
        spec = {"kind": self.kind, "fingerprint": self.fingerprint}
        spec |= self._save_model(folder)
        text = json.dumps(spec, indent=2) + "\n"
        (folder / _SPEC_FILE).write_text(text, encoding="utf-8")

    @abc.abstractmethod
    def _save_model(self, folder: Path) -> dict:
        """Writes the model file and returns what it leaves out."""

    @classmethod
    @abc.abstractmethod
    def _load_model(cls, folder: Path, spec: dict) -> Self: ...


class TiktokenTokenizer(Tokenizer):
    """Byte-level BPE: every id is a byte string, and every text has ids."""

    kind = "tiktoken"
    utf8_errors = "replace"
    _MODEL_FILE = "tokenizer.tiktoken"

    def __init__(self, spec: EncodingSpec) -> None:
        self._spec = spec
        self._encoding = tiktoken.Encoding(
            "relax",
            pat_str=spec.pattern,
            mergeable_ranks=spec.ranks,
            special_tokens=spec.special_tokens,
        )
        pieces = [b""] * self._encoding.n_vocab
        for piece, rank in spec.ranks.items():
            pieces[rank] = piece
        names = spec.special_tokens
        super().__init__(
            pieces,
            names,
            bos_id=names.get("<|begin_of_text|>"),
            eos_id=names.get("<|end_of_text|>", names.get(END_OF_TEXT)),
        )

    def encode(self, text: str) -> list[int]:
        return self._encoding.encode_ordinary(text)

    def _decode(self, ids: list[int]) -> str:
        return self._encoding.decode(ids, errors=self.utf8_errors)

    @cached_property
    def fingerprint(self) -> str:
        settings = json.dumps(self._settings, sort_keys=True).encode()
        return hashlib.sha256(settings + b"\n" + self._model).hexdigest()

    @property
    def _settings(self) -> dict:
        return {
            "pattern": self._spec.pattern,
            "special_tokens": self._spec.special_tokens,
        }

    @property
    def _model(self) -> bytes:
        return format_ranks(self._spec.ranks)

    def _save_model(self, folder: Path) -> dict:
        (folder / self._MODEL_FILE).write_bytes(self._model)
        return self._settings

    @classmethod
    def _load_model(cls, folder: Path, spec: dict) -> Self:
        return cls(
            EncodingSpec(
                pattern=spec["pattern"],
                ranks=parse_ranks(folder / cls._MODEL_FILE),
                special_tokens=spec["special_tokens"],
            )
        )


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model; its control pieces are the special tokens.

    User-defined pieces are ordinary text to sentencepiece, also when they look special.
    `decode` drops the space that a model with a dummy prefix puts before a text, so
    the pieces of one text have to be decoded together.
    """

    kind = "sentencepiece"
    # sentencepiece shows every bad byte as one U+FFFD, and this marks every one.
    utf8_errors = "surrogateescape"
    _MODEL_FILE = "tokenizer.model"

    def __init__(self, model: bytes) -> None:
        self._model = model
        self._processor = sentencepiece.SentencePieceProcessor()
        self._processor.load_from_serialized_proto(model)
        ids = range(self._processor.vocab_size())
        names = {i: self._processor.id_to_piece(i) for i in ids}
        controls = [i for i in ids if self._processor.is_control(i)]
        bos_id, eos_id = self._processor.bos_id(), self._processor.eos_id()
        super().__init__(
            [self._piece_bytes(i) for i in ids],
            {names[i]: i for i in controls},
            bos_id=bos_id if bos_id >= 0 else None,
            eos_id=eos_id if eos_id >= 0 else None,
        )

    def _piece_bytes(self, token_id: int) -> bytes:
        """Returns the bytes of a piece that stands inside a text."""
        piece = self._processor.id_to_piece(token_id)
        if self._processor.is_control(token_id):
            return b""
        if self._processor.is_byte(token_id):  # "<0xE2>"
            return bytes([int(piece[1:-1], 16)])
        if self._processor.is_unknown(token_id):
            return self._processor.decode([token_id]).encode()
        return piece.replace(_SPACE, " ").encode()

    @cached_property
    def _drops_one_space(self) -> bool:
        """Whether the second of two leading spaces counts (they all go otherwise)."""
        space = self._processor.piece_to_id(_SPACE)
        return self._processor.decode([space, space]) != ""

    def encode(self, text: str) -> list[int]:
        if not text.isascii():
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return self._processor.encode(text)

    def _decode(self, ids: list[int]) -> str:
        return self._processor.decode(ids)

    def next_bytes(self, token_id: int, started: bool) -> tuple[bytes, bool]:
        inside = self.token_bytes(token_id)
        if started or not inside or self._processor.is_byte(token_id):
            return inside, started or bool(inside)
        first = self._processor.decode([token_id]).encode()
        return first, bool(first) or self._drops_one_space

    @cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256(b"sentencepiece\n" + self._model).hexdigest()

    def _save_model(self, folder: Path) -> dict:
        (folder / self._MODEL_FILE).write_bytes(self._model)
        return {}

    @classmethod
    def _load_model(cls, folder: Path, spec: dict) -> Self:
        return cls((folder / cls._MODEL_FILE).read_bytes())


def make_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """Returns the tokenizer that a config names.

    Raises:
        FileNotFoundError: its file, or tiktoken's cached one, is not there.
        ValueError: the file is of another kind, or the encoding's name is unknown.
    """
    if config.path is not None and not Path(config.path).is_file():
        raise FileNotFoundError(
            f"tokenizer.path={config.path!r} is not a file; give the tokenizer's own, "
            "such as tokenizer.model"
        )
    return TOKENIZERS[config.kind](config)


def load_tokenizer(folder: Path) -> Tokenizer:
    """Returns the tokenizer that `Tokenizer.save` wrote into a folder.

    Raises:
        FileNotFoundError: the folder holds no tokenizer.
        ValueError: its files have changed since they were saved.
    """
    path = folder / _SPEC_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there; the folder holds no tokenizer")
    spec = json.loads(path.read_text(encoding="utf-8"))
    classes = (TiktokenTokenizer, SentencePieceTokenizer)
    tokenizer = {c.kind: c for c in classes}[spec["kind"]]._load_model(folder, spec)
    if tokenizer.fingerprint != spec["fingerprint"]:
        raise ValueError(
            f"{path} was saved with fingerprint {spec['fingerprint']}, but its files "
            f"give {tokenizer.fingerprint}; restore them from the run's own folder"
        )
    return tokenizer


def _make_bytes(config: TokenizerConfig) -> Tokenizer:
    return TiktokenTokenizer(bytes_spec())


def _make_tiktoken(config: TokenizerConfig) -> Tokenizer:
    if config.path is not None:
        return TiktokenTokenizer(file_spec(config.path))
    return TiktokenTokenizer(named_spec(config.encoding))


def _make_sentencepiece(config: TokenizerConfig) -> Tokenizer:
    try:
        return SentencePieceTokenizer(Path(config.path).read_bytes())
    except RuntimeError as error:
        raise ValueError(
            f"tokenizer.path={config.path!r} is no sentencepiece model; a file of "
            "`base64 rank` lines needs tokenizer.kind=tiktoken"
        ) from error


TOKENIZERS: dict[str, Callable[[TokenizerConfig], Tokenizer]] = {
    "bytes": _make_bytes,
    "tiktoken": _make_tiktoken,
    "sentencepiece": _make_sentencepiece,
}
