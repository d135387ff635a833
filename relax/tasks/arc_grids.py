"""Grids of ARC as text and back, and the prompts made of them.

A grid is a line for each row, its digits with `separator` between them. A prompt holds
every demonstration and then the test input:

    Input:
    0 7
    7 0
    Output:
    7 0
    0 7

    Input:
    ...
    Output:

The answer is a grid written the same way. Below a plain prompt it ends where the next
demonstration would come, at a blank line (PLAIN_END), or with the text.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

Grid = list[list[int]]
Pair = Mapping[str, Grid]

MAX_SIDE = 30
PLAIN_END = "\n\n"
_DIGITS = frozenset("0123456789")
_BLANK = " \t\r\n"

CUT_OFF = "cut off at max_new_tokens"
EMPTY = "empty"
NO_MARK = "no task.answer_after"
NO_ROWS = "not rows of digits"
RAGGED = "rows of different lengths"
TOO_LARGE = f"more than {MAX_SIDE} rows or columns"


class Parsed(NamedTuple):
    """A grid, or None and the reason why there is none."""

    grid: Grid | None
    reason: str | None


def format_grid(grid: Grid, separator: str) -> str:
    """Returns the text of a grid, no newline after its last row."""
    return "\n".join(separator.join(map(str, row)) for row in grid)


def parse_grid(text: str, separator: str) -> Parsed:
    """Returns the grid that a text is, all of it but blanks around it.

    Nothing is mended: single ASCII digits with exactly `separator` between them, rows
    of one length on lines of their own, 1 to 30 of both.
    """
    text = text.strip(_BLANK)
    if not text:
        return Parsed(None, EMPTY)
    rows = [_parse_row(line, separator) for line in text.split("\n")]
    if any(row is None for row in rows):
        return Parsed(None, NO_ROWS)
    if len({len(row) for row in rows}) > 1:
        return Parsed(None, RAGGED)
    if max(len(rows), len(rows[0])) > MAX_SIDE:
        return Parsed(None, TOO_LARGE)
    return Parsed(rows, None)


def parse_answer(
    text: str, finish_reason: str, separator: str, answer_after: str | None
) -> Parsed:
    """Returns the grid of a completion.

    answer_after: the grid is what follows the last place where this stands; None: the
    whole text. One that was cut off holds none, since more rows might have come.
    """
    if finish_reason == "length":
        return Parsed(None, CUT_OFF)
    if answer_after is not None:
        _, found, text = text.rpartition(answer_after)
        if not found:
            return Parsed(None, NO_MARK)
    return parse_grid(text, separator)


def format_prompt(
    demonstrations: Sequence[Pair], test_input: Grid, separator: str
) -> str:
    """Returns the prompt that the head of this file shows, without its answer."""

    def block(grid: Grid, output: str) -> str:
        return f"Input:\n{format_grid(grid, separator)}\nOutput:\n{output}"

    shown = [
        block(pair["input"], format_grid(pair["output"], separator))
        for pair in demonstrations
    ]
    return PLAIN_END.join([*shown, block(test_input, "")])


def _parse_row(line: str, separator: str) -> list[int] | None:
    cells = line.split(separator) if separator else list(line)
    # A row without cells is no row: "" splits into one empty cell or into none.
    if not cells or not all(cell in _DIGITS for cell in cells):
        return None
    return [int(cell) for cell in cells]
