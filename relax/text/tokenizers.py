"""Text to token ids and back: four kinds of tokenizer behind one interface.

A tokenizer adds no special ids and reads none out of text; who builds a prompt puts
`bos_id`, `eos_id` or an entry of `special_tokens` where they belong.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Self

import sentencepiece
import tiktoken

from relax.text import hf_export
from relax.text.base import SPEC_FILE, Spans, SpecialTokens, Tokenizer, byte_spans
from relax.text.byte_level import spelled_bytes
from relax.text.hf_tokenizer import HfTokenizer
from relax.text.tiktoken_encodings import (
    END_OF_TEXT,
    EncodingSpec,
    bytes_spec,
    file_spec,
    format_ranks,
    named_spec,
    parse_ranks,
)

_SPACE = "▁"  # sentencepiece's U+2581, a space inside a piece
# `normalizer_spec { add_dummy_prefix: false }`, which protobuf merges into the model.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Which tokenizer; raises ValueError where the fields do not fit the kind."""

    kind: str  # bytes, tiktoken, sentencepiece or huggingface
    encoding: str | None  # a name that tiktoken knows, such as gpt2
    path: str | None  # a tiktoken or sentencepiece file, or a tokenizer.json

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
            "huggingface": ([(False, True)], "path and no encoding"),
        }[self.kind]
        if given not in allowed:
            raise ValueError(
                f"tokenizer.kind={self.kind!r} takes {rule}, not "
                f"tokenizer.encoding={self.encoding!r} with "
                f"tokenizer.path={self.path!r}"
            )


class TiktokenTokenizer(Tokenizer):
    """Byte-level BPE: every id is a byte string, and every text has ids."""

    kind = "tiktoken"
    utf8_errors = "replace"
    _MODEL_FILE = "tokenizer.tiktoken"

    def __init__(
        self, spec: EncodingSpec, special: SpecialTokens | None = None
    ) -> None:
        special = special or _usual_special(spec.special_tokens)
        self._spec = replace(spec, special_tokens=special.ids)
        self._encoding = tiktoken.Encoding(
            "relax",
            pat_str=spec.pattern,
            mergeable_ranks=spec.ranks,
            special_tokens=special.ids,
        )
        pieces = [b""] * self._encoding.n_vocab
        for piece, rank in spec.ranks.items():
            pieces[rank] = piece
        super().__init__(pieces, special)

    def _encode(self, text: str, inside: bool) -> list[int]:
        return self._encoding.encode_ordinary(text)

    def _encode_with_offsets(self, text: str, inside: bool) -> tuple[list[int], Spans]:
        ids = self._encode(text, inside)
        return ids, byte_spans(text, (len(self._pieces[i]) for i in ids))

    def _decode(self, ids: list[int]) -> str:
        return self._encoding.decode(ids, errors=self.utf8_errors)

    def with_special(self, special: SpecialTokens) -> Self:
        return type(self)(self._spec, special)

    def _knows(self, name: str) -> bool:
        return name in self.special_tokens or spelled_bytes(name) in self._spec.ranks

    @cached_property
    def fingerprint(self) -> str:
        settings = json.dumps(self._settings, sort_keys=True).encode()
        return hashlib.sha256(settings + b"\n" + self._model).hexdigest()

    @property
    def _settings(self) -> dict:
        settings = {
            "pattern": self._spec.pattern,
            "special_tokens": self.special_tokens,
        }
        if self.special != _usual_special(self.special_tokens):
            settings |= {"bos_id": self.bos_id, "eos_id": self.eos_id}
        return settings

    @property
    def _model(self) -> bytes:
        return format_ranks(self._spec.ranks)

    def _save_model(self, folder: Path) -> dict:
        (folder / self._MODEL_FILE).write_bytes(self._model)
        return self._settings

    @classmethod
    def _load_model(cls, folder: Path, spec: dict) -> Self:
        usual = _usual_special(spec["special_tokens"])
        return cls(
            EncodingSpec(
                pattern=spec["pattern"],
                ranks=parse_ranks(folder / cls._MODEL_FILE),
                special_tokens=usual.ids,
            ),
            replace(usual, **{k: spec[k] for k in ("bos_id", "eos_id") if k in spec}),
        )

    def save_hf(self, folder: Path) -> None:
        hf_export.write(
            folder, hf_export.tiktoken_json(self._spec), self.special, unknown=None
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

    def __init__(
        self,
        model: bytes,
        special: SpecialTokens | None = None,
        *,
        prefix_at_start_only: bool = False,
    ) -> None:
        self._model = model
        self.prefix_at_start_only = prefix_at_start_only
        self._processor = sentencepiece.SentencePieceProcessor()
        self._processor.load_from_serialized_proto(model)
        ids = range(self._processor.vocab_size())
        special = special or self._model_special
        super().__init__([self._piece_bytes(i) for i in ids], special)

    @cached_property
    def _model_special(self) -> SpecialTokens:
        ids = filter(self._processor.is_control, range(self._processor.vocab_size()))
        bos_id, eos_id = self._processor.bos_id(), self._processor.eos_id()
        return SpecialTokens(
            ids={self._processor.id_to_piece(i): i for i in ids},
            bos_id=bos_id if bos_id >= 0 else None,
            eos_id=eos_id if eos_id >= 0 else None,
        )

    @cached_property
    def _inside_processor(self) -> sentencepiece.SentencePieceProcessor:
        """The model without the space before a text."""
        processor = sentencepiece.SentencePieceProcessor()
        processor.load_from_serialized_proto(self._model + _NO_DUMMY_PREFIX)
        return processor

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

    def _encode(self, text: str, inside: bool) -> list[int]:
        processor = self._inside_processor if inside else self._processor
        return processor.encode(text)

    def _encode_with_offsets(self, text: str, inside: bool) -> tuple[list[int], Spans]:
        processor = self._inside_processor if inside else self._processor
        mapping = processor.encode_as_offset_mapping(text)
        ids, spans = mapping["ids"], mapping["offsets"]
        # The last of the bytes of a character has all of it, those before have none.
        for at in range(len(ids) - 2, -1, -1):
            start, end = spans[at]
            if start == end and self._processor.is_byte(ids[at]):
                spans[at] = spans[at + 1]
        return ids, spans

    def _decode(self, ids: list[int]) -> str:
        return self._processor.decode(ids)

    def next_bytes(self, token_id: int, started: bool) -> tuple[bytes, bool]:
        inside = self.token_bytes(token_id)
        if started or not inside or self._processor.is_byte(token_id):
            return inside, started or bool(inside)
        first = self._processor.decode([token_id]).encode()
        return first, bool(first) or self._drops_one_space

    def with_special(self, special: SpecialTokens) -> Self:
        return type(self)(
            self._model, special, prefix_at_start_only=self.prefix_at_start_only
        )

    def _knows(self, name: str) -> bool:
        unknown = self._processor.unk_id()
        return (
            name in self.special_tokens
            or name == self._processor.id_to_piece(unknown)
            or self._processor.piece_to_id(name) != unknown
        )

    @cached_property
    def fingerprint(self) -> str:
        settings = self._settings
        added = json.dumps(settings, sort_keys=True).encode() if settings else b""
        return hashlib.sha256(b"sentencepiece\n" + added + self._model).hexdigest()

    @property
    def _settings(self) -> dict:
        """What the model file does not say."""
        settings = {}
        if self.special != self._model_special:
            settings |= asdict(self.special)
        if self.prefix_at_start_only:
            settings["prefix_at_start_only"] = True
        return settings

    def _save_model(self, folder: Path) -> dict:
        (folder / self._MODEL_FILE).write_bytes(self._model)
        return {"special": self._settings}

    @classmethod
    def _load_model(cls, folder: Path, spec: dict) -> Self:
        special = dict(spec.get("special", {}))
        once = special.pop("prefix_at_start_only", False)
        model = (folder / cls._MODEL_FILE).read_bytes()
        return cls(
            model,
            SpecialTokens(**special) if special else None,
            prefix_at_start_only=once,
        )

    def save_hf(self, folder: Path) -> None:
        """Writes tokenizer.json, and beside it the model it was made from.

        Read from there, it has `prefix_at_start_only` no more.
        """
        spec = hf_export.sentencepiece_json(self._model)
        unknown = self._processor.id_to_piece(self._processor.unk_id())
        hf_export.write(folder, spec, self.special, unknown=unknown)
        (folder / self._MODEL_FILE).write_bytes(self._model)


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
    path = folder / SPEC_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there; the folder holds no tokenizer")
    spec = json.loads(path.read_text(encoding="utf-8"))
    classes = (TiktokenTokenizer, SentencePieceTokenizer, HfTokenizer)
    tokenizer = {c.kind: c for c in classes}[spec["kind"]]._load_model(folder, spec)
    if tokenizer.fingerprint != spec["fingerprint"]:
        raise ValueError(
            f"{path} was saved with fingerprint {spec['fingerprint']}, but its files "
            f"give {tokenizer.fingerprint}; restore them from the run's own folder"
        )
    return tokenizer


def _usual_special(ids: dict[str, int]) -> SpecialTokens:
    """Returns special tokens of tiktoken's, which names no first and last."""
    return SpecialTokens(
        ids=ids,
        bos_id=ids.get("<|begin_of_text|>"),
        eos_id=ids.get("<|end_of_text|>", ids.get(END_OF_TEXT)),
    )


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


def _make_huggingface(config: TokenizerConfig) -> Tokenizer:
    return HfTokenizer.from_file(Path(config.path))


TOKENIZERS: dict[str, Callable[[TokenizerConfig], Tokenizer]] = {
    "bytes": _make_bytes,
    "tiktoken": _make_tiktoken,
    "sentencepiece": _make_sentencepiece,
    "huggingface": _make_huggingface,
}
