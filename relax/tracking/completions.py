"""Completions with their rewards, as a table for people."""

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from rich.table import Table
from rich.text import Text

Row = Mapping[str, Any]

_ROWS = 4  # shown of a step's; the file has all
_CELL, _LINE = 240, 72  # characters of a text in a cell and in a line of the log


def completions_table(step: int, rows: Sequence[Row]) -> Table:
    """Returns the first rows with a column for each reward and other number."""
    title = Text(f"step {step}  completions{_count(rows)}", style="bold")
    table = Table(title=title, title_justify="left", expand=True)
    for name, ratio in (("prompt", 2), ("completion", 3)):
        table.add_column(name, ratio=ratio, overflow="fold")
    names = number_names(rows)
    for name in names:
        table.add_column(Text(printable(name)), justify="right", overflow="fold")
    for row in rows[:_ROWS]:
        texts = (shorten(row[name], _CELL) for name in ("prompt", "completion"))
        cells = [printable(text) for text in texts]
        cells += [_number(row.get(name)) for name in names]
        table.add_row(*map(Text, cells))
    return table


def completion_lines(step: int, rows: Sequence[Row]) -> str:
    """Returns the first rows as one record of a log, a line each."""
    lines = [f"step {step}  completions{_count(rows)}"]
    names = number_names(rows)
    for row in rows[:_ROWS]:
        texts = (shorten(row[name], _LINE) for name in ("prompt", "completion"))
        prompt, completion = (printable(text, spared="") for text in texts)
        numbers = (f"{printable(name)} {_number(row.get(name))}" for name in names)
        lines.append("  ".join((f"    {prompt} → {completion}", *numbers)))
    return "\n".join(lines)


def number_names(rows: Sequence[Row]) -> list[str]:
    """Returns the keys that hold numbers or None alone, the advantage last."""
    values: dict[str, list] = {}
    for row in rows:
        for key, value in row.items():
            values.setdefault(key, []).append(value)
    names = [key for key, column in values.items() if all(map(_is_number, column))]
    return sorted(names, key=lambda name: name == "advantage")


def shorten(text: str, limit: int) -> str:
    """Returns the text without its middle where it has more than `limit` characters.

    Twice as much is kept of its start as of its end.
    """
    if len(text) <= limit:
        return text
    tail = (limit - 1) // 3
    return f"{text[: limit - 1 - tail]}…{text[len(text) - tail :]}"


def printable(text: str, spared: str = "\n\t") -> str:
    """A model may write escape sequences, which must not reach the terminal."""
    return "".join(
        char if char.isprintable() or char in spared else repr(char)[1:-1]
        for char in text
    )


def _count(rows: Sequence[Row]) -> str:
    return f" (the first {_ROWS} of {len(rows)})" if len(rows) > _ROWS else ""


def _is_number(value: object) -> bool:
    return value is None or (isinstance(value, Real) and not isinstance(value, bool))


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return str(value) if isinstance(value, int) else f"{value:.3f}"
