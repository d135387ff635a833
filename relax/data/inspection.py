"""Rows of a batch, shown as a person can check them before a run."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.text import Text

from relax.data.example_batches import Batch
from relax.data.targets import Tokenizer

_IN_LOSS, _WEIGHTED, _OUTSIDE = "bold green", "bold yellow", "dim"


class _Document(NamedTuple):
    """Tokens of a row that see each other, and their weights as targets."""

    tokens: np.ndarray
    weights: np.ndarray


def show_rows(batch: Batch, tokenizer: Tokenizer, console: Console, count: int) -> None:
    """Prints the first `count` rows of a batch, each document with its counts.

    Tokens in the loss are green, those of a weight other than 1 yellow; without
    colours they stand in ⟦ ⟧, after their weight if it is another than 1. A special
    token is shown by its name, a newline by ↵ before it, and what can't be printed by
    its escape.
    """
    coloured = console.color_system is not None and not console.no_color
    context = batch["tokens"].shape[1]
    for row in range(min(count, len(batch["tokens"]))):
        documents = list(_documents({name: v[row] for name, v in batch.items()}))
        padding = context - _places(batch, row)
        facts = [
            *_facts(documents),
            f"{len(documents)} document{'s' * (len(documents) != 1)}",
            f"{padding} padding of {context} places",
        ]
        _rule(console, f"row {row}: {', '.join(facts)}", "=")
        for number, document in enumerate(documents, start=1):
            _rule(console, f"document {number}: {', '.join(_facts([document]))}", "-")
            text = _painted(document, tokenizer, coloured=coloured)
            console.print(text, soft_wrap=True)


def _places(batch: Batch, row: int) -> int:
    """Returns how many places of a row hold a token.

    Unpacked rows don't say it, and token 0 may be a real one: there all that follows
    the last token, target or weight other than 0 is taken for padding.
    """
    if "segment_ids" in batch:
        return int(np.count_nonzero(batch["segment_ids"][row]))
    used = [batch[name][row] != 0 for name in ("tokens", "targets", "loss_mask")]
    places = np.flatnonzero(np.any(used, axis=0))
    return int(places[-1]) + 1 if len(places) else 0


def _documents(row: Batch) -> Iterator[_Document]:
    if "segment_ids" in row:
        segments = row["segment_ids"]
    else:
        one = {name: values[None] for name, values in row.items()}
        segments = np.arange(len(row["tokens"])) < _places(one, 0)
    for segment in range(1, int(segments.max(initial=0)) + 1):
        (places,) = np.nonzero(segments == segment)
        tokens, weights = row["tokens"][places], row["loss_mask"][places]
        target = row["targets"][places[-1]]
        # The last target of an unpacked row is no token of its places.
        if "segment_ids" not in row or target or weights[-1]:
            tokens = np.append(tokens, target)
        yield _Document(tokens, np.append(0.0, weights)[: len(tokens)])


def _facts(documents: Sequence[_Document]) -> list[str]:
    tokens = sum(len(document.tokens) for document in documents)
    in_loss = sum(np.count_nonzero(document.weights) for document in documents)
    return [f"{tokens} tokens", f"{in_loss} in the loss"]


def _rule(console: Console, title: str, character: str) -> None:
    console.print(Text(f"{character * 4} {title} {character * 4}"), soft_wrap=True)


def _painted(document: _Document, tokenizer: Tokenizer, *, coloured: bool) -> Text:
    names = {i: name for name, i in tokenizer.special_tokens.items()}
    text = Text()
    pairs = zip(document.tokens.tolist(), document.weights.tolist(), strict=True)
    for weight, run in groupby(pairs, key=lambda pair: pair[1]):
        shown = _shown([token_id for token_id, _ in run], tokenizer, names)
        style = _OUTSIDE if not weight else _IN_LOSS if weight == 1 else _WEIGHTED
        if coloured:
            text.append(shown, style)
        elif weight:
            text.append(f"⟦{shown}⟧" if weight == 1 else f"⟦{weight:g}: {shown}⟧")
        else:
            text.append(shown)
    return text


def _shown(
    token_ids: Sequence[int], tokenizer: Tokenizer, names: dict[int, str]
) -> str:
    """Returns the text of ids, with specials by name and all else visible."""

    def is_special(token_id: int) -> bool:
        return token_id in names or not tokenizer.token_bytes(token_id)

    shown = ""
    for special, run in groupby(token_ids, key=is_special):
        if special:
            shown += "".join(names.get(i, f"<id {i}>") for i in run)
        else:
            text = b"".join(map(tokenizer.token_bytes, run)).decode(errors="replace")
            shown += "".join(map(_visible, text))
    return shown


def _visible(character: str) -> str:
    if character == "\n":
        return "↵\n"
    return character if character.isprintable() else repr(character)[1:-1]
