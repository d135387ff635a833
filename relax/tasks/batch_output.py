"""The output of a batch: whole lines, in the order of the input, at every moment."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from relax.tasks.journal import append_line


class Output:
    """A file that grows line by line; a context manager."""

    def __init__(self, path: Path) -> None:
        """Opens the file, or makes an empty one; raises OSError where it can't."""
        self._path = path
        path.touch()
        # Unbuffered: each line is there as soon as it is written.
        self._file = path.open("r+b", buffering=0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def take_up(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Makes the file hold `rows`, which it may already hold the beginning of.

        What comes after them, as half a line that a killed process left, is cut off.
        Raises ValueError where it holds other lines in their place.
        """
        data, end = self._path.read_bytes(), 0
        for number, row in enumerate(rows, 1):
            line = to_line(row)
            found = data[end : end + len(line)]
            if not line.startswith(found):
                raise ValueError(
                    f"{self._path}, line {number}: not what this task wrote there; "
                    "move the file elsewhere, and the same command writes it again"
                )
            if found != line:
                self._file.truncate(end)
                append_line(self._file, line)
            end += len(line)
        self._file.truncate(end)

    def write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Adds lines; OSError, as of a full disk, leaves whole ones."""
        for row in rows:
            append_line(self._file, to_line(row))


def to_line(row: Mapping[str, Any]) -> bytes:
    """Returns a line of JSON; a lone surrogate, not UTF-8, is written as an escape."""
    text = json.dumps(row, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace") + b"\n"
