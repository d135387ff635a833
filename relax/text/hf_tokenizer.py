"""The tokenizer.json of a model folder, through the `tokenizers` library."""

import hashlib
import json
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, Self

import tokenizers

from relax.text import hf_export
from relax.text.base import Spans, SpecialTokens, Tokenizer
from relax.text.detokenizer import StreamingDetokenizer
from relax.text.files import read_json
from relax.text.hf_decoding import read_decoding

# Where tokenizer_config.json names none, the first of these that there is.
_USUAL_BOS = ("<s>", "<|begin_of_text|>", "<bos>")
_USUAL_EOS = ("</s>", "<|end_of_text|>", "<|endoftext|>", "<eos>", "<|im_end|>")
# What else of a tokenizer_config.json is kept.
_KEPT = ("bos_token", "pad_token", "padding_side", "model_max_length")


class HfTokenizer(Tokenizer):
    """A tokenizer.json; its added tokens that are marked special are the special ones.

    The model's unknown token is none of them, as text may give it; like them it
    stands for no text. Other added tokens are found in text, and shown.
    """

    kind = "huggingface"

    def __init__(self, text: str, config: dict) -> None:
        """Takes a tokenizer.json, and the tokenizer_config.json beside it or {}.

        Raises ValueError for text that is no tokenizer.json, and for a decoder or a
        BOS or EOS token that it cannot follow.
        """
        self._text = text
        self._config = config
        self._source = _open(text)
        self._library = self._source.library
        decoder = self._library.decoder
        self._decoding = read_decoding(decoder and json.loads(decoder.__getstate__()))
        byte_level = self._decoding.byte_level
        # A byte piece that is not UTF-8 is shown by itself, as sentencepiece does.
        self.utf8_errors = "replace" if byte_level else "surrogateescape"
        added = self._library.get_added_tokens_decoder()
        silent = {token.content: i for i, token in added.items() if token.special}
        special = self._read_special(silent)
        names = self._library.get_vocab(with_added_tokens=True)
        pieces = [b""] * (max(names.values(), default=-1) + 1)
        for name, token_id in names.items():
            if name not in silent and name not in special.ids:
                pieces[token_id] = self._decoding.piece(name)
        super().__init__(pieces, special)
        self.added_tokens = {
            token.content: i
            for i, token in added.items()
            if token.content not in special.ids and not token.special
        }
        self._special_ids = frozenset(special.ids.values())
        self.prefix_at_start_only = self._source.prefix_at_start_only

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """Returns the tokenizer of a file, with the tokenizer_config.json beside it.

        Raises ValueError, naming the file, where they are damaged or not supported.
        """
        config = read_json(path.parent / hf_export.CONFIG_FILE)
        try:
            return cls(path.read_text(encoding="utf-8"), config)
        except ValueError as error:  # also UnicodeDecodeError
            raise ValueError(f"{path}: {error}") from error

    def __reduce__(self) -> tuple:
        # The library's own pickle forgets that special tokens are ordinary text here.
        return type(self), (self._text, self._config)

    def _read_special(self, silent: dict[str, int]) -> SpecialTokens:
        """Returns the special tokens, and what the config says of BOS and EOS.

        A token that the config names as one of them is special in any case.
        """
        bos_id, unknown = self._source.bos_id, self._source.unknown
        adds_bos = self._config.get("add_bos_token")
        if adds_bos is False:
            bos_id = None
        elif adds_bos and (name := self._named("bos_token", _USUAL_BOS)) is not None:
            bos_id = self._library.token_to_id(name)
        eos = self._named("eos_token", _USUAL_EOS)
        eos_id = None if eos is None else self._library.token_to_id(eos)
        ends = {
            i: self._library.id_to_token(i) for i in (bos_id, eos_id) if i is not None
        }
        ids = silent | {name: token_id for token_id, name in ends.items()}
        bos = token_name(self._config.get("bos_token"))
        if bos is not None and (token_id := self._library.token_to_id(bos)) is not None:
            ids[bos] = token_id
        if unknown is not None and unknown not in ends.values():
            ids.pop(unknown, None)
        ids = dict(sorted(ids.items(), key=lambda item: item[1]))
        return SpecialTokens(ids=ids, bos_id=bos_id, eos_id=eos_id)

    def _named(self, key: str, usual: tuple[str, ...]) -> str | None:
        """Returns the token that the config names, or else a usual one there is."""
        if key not in self._config:
            known = (n for n in usual if self._library.token_to_id(n) is not None)
            return next(known, None)
        name = token_name(self._config[key])
        if name is not None and self._library.token_to_id(name) is None:
            raise ValueError(
                f"{hf_export.CONFIG_FILE} names {key}={name!r}, which is no token of "
                f"{hf_export.TOKENIZER_FILE}"
            )
        return name

    @property
    def bos_token(self) -> str | None:
        return super().bos_token or token_name(self._config.get("bos_token"))

    @cached_property
    def _inside_library(self) -> tokenizers.Tokenizer:
        """The library's tokenizer without the space before a text."""
        spec = json.loads(self._text)
        changed = spec | {
            key: _without_prefix(spec.get(key))
            for key in ("normalizer", "pre_tokenizer")
        }
        if changed == spec:
            return self._library
        return _open(json.dumps(changed, ensure_ascii=False)).library

    def _encode(self, text: str, inside: bool) -> list[int]:
        library = self._inside_library if inside else self._library
        ids = library.encode(text, add_special_tokens=False).ids
        if self._special_ids.isdisjoint(ids):
            return ids
        return self._encode_with_offsets(text, inside)[0]

    def _encode_with_offsets(self, text: str, inside: bool) -> tuple[list[int], Spans]:
        library = self._inside_library if inside else self._library
        encoding = library.encode(text, add_special_tokens=False)
        ids, spans = encoding.ids, encoding.offsets
        spelled = [
            span for i, span in zip(ids, spans, strict=True) if i in self._special_ids
        ]
        if spelled:
            return self._encode_cut(text, inside, spelled)
        for at in range(len(ids) - 1):
            # A space of the model's own has been given the character that follows it.
            start = spans[at][0]
            if start == spans[at + 1][0] and self._pieces[ids[at]] == b" ":
                spans[at] = (start, start)
        return ids, spans

    def _encode_cut(
        self, text: str, inside: bool, spelled: Spans
    ) -> tuple[list[int], Spans]:
        """Returns the ids of text whose pieces would spell special tokens.

        Where one is spelled, the text is encoded in two parts.
        """
        for start, end in spelled:
            if end - start < 2:
                raise ValueError(
                    f"the text {text[start:end]!r} has no ids but those of a special "
                    "token; leave it out"
                )
        cuts = [0, *(start + 1 for start, _ in spelled), len(text)]
        ids, spans = [], []
        for at, cut in pairwise(cuts):
            part, found = self._encode_with_offsets(text[at:cut], inside or at > 0)
            ids += part
            spans += [(at + start, at + end) for start, end in found]
        return ids, spans

    def next_bytes(self, token_id: int, started: bool) -> tuple[bytes, bool]:
        piece = self.token_bytes(token_id)
        if started or not piece:
            return piece, started
        return self._decoding.first(self._library.id_to_token(token_id))

    def _decode(self, ids: list[int]) -> str:
        stream = StreamingDetokenizer(self)
        return stream.add(ids) + stream.flush()

    def with_special(self, special: SpecialTokens) -> Self:
        spec = json.loads(self._text)
        hf_export.add_special_tokens(spec, special.ids)
        config = self._config | {
            "add_bos_token": special.bos_id is not None,
            "eos_token": special.name_of(special.eos_id),
        }
        if special.bos_id is not None:
            config["bos_token"] = special.name_of(special.bos_id)
        return type(self)(json.dumps(spec, ensure_ascii=False), config)

    def _knows(self, name: str) -> bool:
        return self._library.token_to_id(name) is not None

    @cached_property
    def fingerprint(self) -> str:
        ends = json.dumps([self.bos_id, self.eos_id]).encode()
        text = self._text.encode()
        return hashlib.sha256(b"huggingface\n" + ends + b"\n" + text).hexdigest()

    def _save_model(self, folder: Path) -> dict:
        path = folder / hf_export.TOKENIZER_FILE
        path.write_text(self._text, encoding="utf-8", newline="")
        return {"config": self._config}

    @classmethod
    def _load_model(cls, folder: Path, spec: dict) -> Self:
        path = folder / hf_export.TOKENIZER_FILE
        with path.open(encoding="utf-8", newline="") as file:
            return cls(file.read(), spec["config"])

    def save_hf(self, folder: Path) -> None:
        """Writes the tokenizer.json, changed only where the config overruled it."""
        spec = json.loads(self._text)
        if self.bos_id != self._source.bos_id:
            spec["post_processor"] = hf_export.post_processor(self.special)
        hf_export.add_special_tokens(spec, self.special_tokens)
        text = json.dumps(spec, ensure_ascii=False)
        kept = {key: self._config[key] for key in _KEPT if key in self._config}
        unknown = self._source.unknown
        hf_export.write_files(folder, text, self.special, unknown, **kept)


def token_name(value: str | dict | None) -> str | None:
    """Returns the name in either form that a tokenizer_config.json has for a token."""
    return value["content"] if isinstance(value, dict) else value


class _Source(NamedTuple):
    library: tokenizers.Tokenizer  # for ordinary text alone
    bos_id: int | None  # what its post-processor puts before a text
    unknown: str | None  # the token for text that the vocabulary lacks
    prefix_at_start_only: bool  # as `Tokenizer` has it


def _open(text: str) -> _Source:
    """Returns what a tokenizer.json says; raises ValueError where it is none."""
    library = _from_text(text)
    spec = json.loads(text)
    added = {token["content"]: token["id"] for token in spec.get("added_tokens") or []}
    if any(library.token_to_id(name) != i for name, i in added.items()):
        hf_export.pin_added_tokens(spec)
        library = _from_text(json.dumps(spec, ensure_ascii=False))
    for name, token_id in added.items():
        if (found := library.token_to_id(name)) != token_id:
            raise ValueError(
                f"added token {name!r} has id {token_id}, but the vocabulary gives it "
                f"{found}"
            )
    library.no_truncation()
    library.no_padding()
    first = library.encode("a")
    bos_id = first.ids[0] if first.ids and first.special_tokens_mask[0] else None
    library.post_processor = None  # it would also cut spaces off the offsets
    library.encode_special_tokens = True
    at_start = '"prepend_scheme": "first"' in json.dumps(spec.get("pre_tokenizer"))
    return _Source(library, bos_id, _unknown_token(spec["model"]), at_start)


def _from_text(text: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing more special
        raise ValueError(f"this is no tokenizer.json: {error}") from error


def _unknown_token(model: dict) -> str | None:
    if model["type"] == "Unigram":
        unknown = model["unk_id"]
        return None if unknown is None else model["vocab"][unknown][0]
    return model.get("unk_token")


def _without_prefix(part: dict | None) -> dict | None:
    """Returns a normalizer or pre-tokenizer that puts no space before a text."""
    if part is None or part["type"] == "Prepend":
        return None
    if part["type"] == "Sequence":
        key = "normalizers" if "normalizers" in part else "pretokenizers"
        parts = [_without_prefix(step) for step in part[key]]
        return part | {key: [step for step in parts if step is not None]}
    if part["type"] == "Metaspace":
        return part | {"prepend_scheme": "never", "add_prefix_space": False}
    if part["type"] == "ByteLevel":
        return part | {"add_prefix_space": False}
    return part
