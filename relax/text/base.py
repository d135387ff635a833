"""What every tokenizer offers, whatever the library behind it."""

import abc
import json
import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Self

SPEC_FILE = "relax_tokenizer.json"
# A character as UTF-16 counts them: one, or a pair of surrogates.
_UTF16_CHARACTER = re.compile("[\ud800-\udbff][\udc00-\udfff]|.", re.DOTALL)

Spans = list[tuple[int, int]]


@dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """The ids of tokens that stand for no text, and which begin and end one."""

    ids: dict[str, int]
    bos_id: int | None
    eos_id: int | None

    def name_of(self, token_id: int | None) -> str | None:
        """Returns the name of a special id, None for any other."""
        return next((name for name, i in self.ids.items() if i == token_id), None)


class Tokenizer(abc.ABC):
    """Ids 0 to `vocab_size` - 1 for pieces of text, some of them special.

    Special ids stand for no text: `decode` skips them, and `encode` never gives them,
    also where the text spells one. `bos_id` is the id that goes before a plain text,
    None where there is none; whoever builds a prompt puts it there.
    """

    kind: str
    # How `decode` shows bytes that are not UTF-8, as an error handler of Python's.
    utf8_errors: str
    # Whether a text after a special token gets no space of the model's own.
    prefix_at_start_only = False
    # Tokens that stand for text, by name, and are found in it before all else.
    added_tokens: Mapping[str, int] = {}

    def __init__(self, pieces: list[bytes], special: SpecialTokens) -> None:
        unnamed = max(special.ids.values(), default=-1) + 1 - len(pieces)
        self._pieces = pieces + [b""] * unnamed
        self.vocab_size = len(self._pieces)
        self.special_tokens = special.ids
        self.bos_id = special.bos_id
        self.eos_id = special.eos_id

    @property
    def special(self) -> SpecialTokens:
        return SpecialTokens(
            ids=self.special_tokens, bos_id=self.bos_id, eos_id=self.eos_id
        )

    @property
    def bos_token(self) -> str | None:
        """What chat templates call so, also where no plain text begins with it."""
        return self.special.name_of(self.bos_id)

    def encode(self, text: str, *, inside: bool = False) -> list[int]:
        """Returns the ids of ordinary text; lone surrogates become U+FFFD.

        With `inside` the text goes on another one, and gets no space of the model's
        own before it.
        """
        return self._encode(_well_formed(text), inside)

    def encode_with_offsets(
        self, text: str, *, inside: bool = False
    ) -> tuple[list[int], Spans]:
        """Returns the ids of `encode`, and the [start, end) of each in the text.

        An id of a part of a character has the span of the whole character.
        """
        clean = _well_formed(text)
        ids, spans = self._encode_with_offsets(clean, inside)
        if clean != text:  # pairs of surrogates have become one character
            starts = [match.start() for match in _UTF16_CHARACTER.finditer(text)]
            starts.append(len(text))
            spans = [(starts[start], starts[end]) for start, end in spans]
        return ids, spans

    @abc.abstractmethod
    def _encode(self, text: str, inside: bool) -> list[int]: ...

    @abc.abstractmethod
    def _encode_with_offsets(
        self, text: str, inside: bool
    ) -> tuple[list[int], Spans]: ...

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

    def with_special_tokens(self, names: Sequence[str]) -> Self:
        """Returns a tokenizer with these names as the ids from `vocab_size` on.

        Raises ValueError for a name that is empty, doubled or in the vocabulary.
        """
        for number, name in enumerate(names):
            if not name or name in names[:number] or self._knows(name):
                raise ValueError(
                    f"special token {name!r} is empty, given twice or already in the "
                    f"vocabulary; choose new names in {list(names)}"
                )
        new = {name: self.vocab_size + number for number, name in enumerate(names)}
        return self.with_special(replace(self.special, ids=self.special.ids | new))

    @abc.abstractmethod
    def with_special(self, special: SpecialTokens) -> Self:
        """Returns a tokenizer of the same pieces, with other special tokens."""

    @abc.abstractmethod
    def _knows(self, name: str) -> bool:
        """Returns whether a piece or a special token has this name."""

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
        (folder / SPEC_FILE).write_text(text, encoding="utf-8")

    @abc.abstractmethod
    def _save_model(self, folder: Path) -> dict:
        """Writes the model file and returns what it leaves out."""

    @classmethod
    @abc.abstractmethod
    def _load_model(cls, folder: Path, spec: dict) -> Self: ...

    @abc.abstractmethod
    def save_hf(self, folder: Path) -> None:
        """Writes the tokenizer.json and tokenizer_config.json of a model folder.

        transformers' AutoTokenizer gives the same ids for ordinary text.
        """


def byte_spans(text: str, lengths: Iterable[int]) -> Spans:
    """Returns the characters that runs of so many bytes of UTF-8 touch."""
    ends = list(accumulate(len(character.encode()) for character in text))
    cuts = accumulate(lengths, initial=0)
    return [
        (bisect_right(ends, start), bisect_right(ends, end - 1) + 1)
        for start, end in pairwise(cuts)
    ]


def _well_formed(text: str) -> str:
    """Returns text with U+FFFD for surrogates that are not a pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
