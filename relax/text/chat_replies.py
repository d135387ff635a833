"""Where a rendered chat shows a reply just as it was generated."""

from collections.abc import Callable, Iterable, Sequence

from relax.text.base import Tokenizer
from relax.text.chat_marks import Span


def find_reply(
    text: str,
    around: tuple[str, str, str],
    tokenizer: Tokenizer,
    ids: Sequence[int],
    content: object,
    marked: Callable[[str], str],
) -> Span | None:
    """Returns where a text has a reply as its ids say it, None if nowhere.

    around: what the template writes before and after the message, with a mark in its
    place between. marked: how the text shows what an assistant says. One space before
    the reply may be the template's in the text and the first id's too, as in
    "[/INST] Yes": it belongs to the reply then.
    """
    before, mark, after = around
    said = b"".join(map(tokenizer.token_bytes, ids)).decode("utf-8", "replace")
    spellings = []
    if said.startswith(" ") and before.endswith(" "):
        spellings.append((before[:-1], said))
    if tokenizer.decode(ids) == content:
        spellings.append((before, content))
    for head, words in spellings:
        shown = marked(words)
        if mark and text == head + shown + after:
            return len(head), len(head) + len(shown)
    return None


def replace_spans(text: str, marks: Iterable[tuple[Span, str]]) -> str:
    """Returns a text with a mark for each span; of two that overlap, for one."""
    pieces, done = [], 0
    for (start, end), mark in sorted(marks):
        if start >= done:
            pieces += [text[done:start], mark]
            done = end
    return "".join([*pieces, text[done:]])
