"""Who wrote what in a rendered chat, told by private-use characters.

The special tokens that a template spells are replaced by marks before it runs, so that
whatever the messages spell stays ordinary text, however a template joins and cuts it.
(A template that looks for a special token in the messages finds none, therefore.)

So are other added tokens that the template's source spells, such as DeepSeek's
`<｜User｜>`, which its tokenizer.json calls not special. In an assistant's messages,
which a model may have made of them, they get the same marks; elsewhere a text that
spells one is cut there, as tokenizers would find it. Added tokens that the template's
source does not spell are vocabulary, whoever writes them.
"""

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain

Span = tuple[int, int]  # [start, end)

_PRIVATE_USE = (
    range(0xE000, 0xF900),
    range(0xF0000, 0xFFFFE),
    range(0x100000, 0x10FFFE),
)


class Marks:
    """Characters that stand for special tokens, and others to come.

    None of them occurs in the texts given, or in the name of a special token.
    added: other added tokens, which get marks too. literals: pairs of a token's name
    and its mark. ids: those of the marks. spans: the marks before and after a
    generation block.
    """

    def __init__(
        self,
        special_tokens: Mapping[str, int],
        texts: Iterable[str] = (),
        added: Mapping[str, int] = {},
    ) -> None:
        tokens = {**special_tokens, **added}
        used = set().union(*texts, *tokens)
        code_points = chain(*_PRIVATE_USE)
        self._free = (c for c in map(chr, code_points) if c not in used)
        self.literals = tuple((name, self.new()) for name in tokens)
        self.ids = {mark: tokens[name] for name, mark in self.literals}
        self.spans = self.new(), self.new()
        self._added = tuple(pair for pair in self.literals if pair[0] in added)

    def new(self) -> str:
        """Returns a character that stands for nothing yet."""
        return next(self._free)

    def mark(self, text: str) -> str:
        """Returns the text with a mark for each special token that it spells."""
        return replace_strings(text, self.literals)

    def mark_added(self, text: str) -> str:
        """Returns the text with a mark for each added token that is not special."""
        return replace_strings(text, self._added)

    def cut_added(self, text: str) -> Iterator[tuple[int, str]]:
        """Yields the parts of a text, each with its start, that spell none of them."""
        start = 0
        for found in _starts_of(tuple(dict(self._added))).finditer(text):
            yield start, text[start : found.start() + 1]
            start = found.start() + 1
        yield start, text[start:]

    @functools.cached_property
    def disguise(self) -> dict[str, str]:
        """A mark for each character of the special tokens."""
        return {c: self.new() for c in sorted(set().union(*dict(self.literals)))}


def replace_strings(text: str, pairs: tuple[tuple[str, str], ...]) -> str:
    """Returns the text with the first of each pair replaced by the second.

    Of several that begin at one place, the longest is replaced.
    """
    replacements = dict(pairs)
    return _any_of(tuple(replacements)).sub(lambda m: replacements[m[0]], text)


@functools.lru_cache(maxsize=64)
def _any_of(names: tuple[str, ...]) -> re.Pattern:
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


@functools.lru_cache(maxsize=64)
def _starts_of(names: tuple[str, ...]) -> re.Pattern:
    return re.compile(f"(?={_any_of(names).pattern})")


def strings_in(value: object) -> Iterator[str]:
    """Yields every string in nested lists and dicts, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from chain.from_iterable(map(strings_in, chain(*value.items())))
    elif isinstance(value, list | tuple):
        yield from chain.from_iterable(map(strings_in, value))


def with_strings(value: object, change: Callable[[str], str]) -> object:
    """Returns nested lists and dicts with their strings changed.

    So are their keys, but those of one word, by which templates look things up.
    """
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {
            k if str(k).isidentifier() else with_strings(k, change): with_strings(
                v, change
            )
            for k, v in value.items()
        }
    if isinstance(value, list | tuple):
        return [with_strings(item, change) for item in value]
    return value


def changed_message(message: Mapping, change: Callable[[str], str]) -> dict:
    """Returns a message with all but its keys, and a role of one word, changed."""
    return {
        key: value
        if key == "role" and str(value).isidentifier()
        else with_strings(value, change)
        for key, value in message.items()
    }


def take_spans(text: str, marks: tuple[str, str]) -> tuple[str, list[Span]]:
    """Returns the text without the two marks, and the spans between them."""
    opening, closing = marks
    plain, start, spans = "", 0, []
    for piece in re.split(f"([{opening}{closing}])", text):
        if piece == opening:
            start = len(plain)
        elif piece == closing:
            spans.append((start, len(plain)))
        else:
            plain += piece
    return plain, spans


def split_at(text: str, marks: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Yields the marks in a text and what is between them, each with its start."""
    start = 0
    for piece in re.split(f"({'|'.join(marks) or '(?!)'})", text):
        if piece:
            yield start, piece
        start += len(piece)
