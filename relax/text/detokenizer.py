"""Text out of ids that arrive a few at a time, and where to stop."""

import codecs
import re
from collections.abc import Iterable, Sequence

from relax.text.base import Tokenizer

# What `surrogateescape` makes of a byte that is not UTF-8; no UTF-8 decodes to it.
_ESCAPED_BYTE = re.compile("[\udc80-\udcff]")


class StreamingDetokenizer:
    """Gives out text once no later id can change it, in constant time per id.

    All that `add` returns, and then `flush`, join to `tokenizer.decode` of all ids.
    Held back are at most three bytes that may yet become a character; special ids
    between them do not break it.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._started = False
        decoder = codecs.getincrementaldecoder("utf-8")
        self._decoder = decoder(tokenizer.utf8_errors)

    def add(self, ids: Iterable[int]) -> str:
        """Returns the text that has become final with these ids."""
        data = bytearray()
        for token_id in map(int, ids):
            piece, self._started = self._tokenizer.next_bytes(token_id, self._started)
            data += piece
        return self._text(data, final=False)

    def flush(self) -> str:
        """Returns the text of the bytes held back, where nothing more will come."""
        return self._text(b"", final=True)

    def _text(self, data: bytes | bytearray, *, final: bool) -> str:
        return _ESCAPED_BYTE.sub("\ufffd", self._decoder.decode(data, final))


class StopStrings:
    """Cuts a text that arrives in pieces before the first stop string in it.

    First is the one whose end comes first (of several, the one that starts first),
    which does not depend on how the text was cut into pieces.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        if isinstance(stop, str) or "" in stop:
            raise ValueError(f"stop={stop!r} must be a list of strings, none empty")
        self._stop = tuple(stop)
        self._longest = max(map(len, self._stop), default=0)
        self._held = ""
        self._stopped = False

    def add(self, text: str) -> tuple[str, bool]:
        """Returns the text that can be shown, and whether a stop string has come.

        Held back is the longest end of the text that may become a stop string.
        """
        if self._stopped:
            return "", True
        text = self._held + text
        found = [(at + len(s), at) for s in self._stop if (at := text.find(s)) >= 0]
        if found:
            _, cut = min(found)
            self._held, self._stopped = "", True
        else:
            cut = len(text) - self._open_length(text)
            self._held = text[cut:]
        return text[:cut], self._stopped

    def flush(self) -> str:
        """Returns the text held back, where nothing more will come."""
        held, self._held = self._held, ""
        return held

    def _open_length(self, text: str) -> int:
        """Returns the length of the longest suffix that begins a stop string."""
        for length in range(min(len(text), self._longest - 1), 0, -1):
            if any(s.startswith(text[-length:]) for s in self._stop):
                return length
        return 0
