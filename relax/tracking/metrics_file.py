"""JSON-lines files that survive a killed run: one row per line, cut back on resume."""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class MetricsFile:
    """Appends rows to a JSON-lines file; each row is on disk when `write` returns."""

    def __init__(self, path: Path, resume_step: int | None) -> None:
        """Opens the file after the rows of steps up to `resume_step`.

        Without `resume_step` the file starts empty, whatever an earlier run left.
        """
        if resume_step is not None:
            cut_back(path, resume_step)
        mode = "w" if resume_step is None else "a"
        # Half a surrogate pair, which UTF-8 lacks, becomes the escape that JSON has.
        self._file = path.open(
            mode, encoding="utf-8", errors="backslashreplace", newline="\n"
        )

    def write(self, row: dict[str, Any]) -> None:
        """Appends one row of what JSON can say; NaN and infinity become null."""
        line = json.dumps(_finite(row), ensure_ascii=False, allow_nan=False)
        self._file.write(line + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict]:
    """Returns the rows of a JSON-lines file, without a torn last line.

    Raises ValueError when another line is not JSON.
    """
    return [row for _, row in _lines(path)]


def cut_back(path: Path, step: int) -> None:
    """Drops the rows with a later `step` and a torn last line; no file is no error.

    The file is replaced in one move, so a kill leaves the old or the new one.
    """
    if not path.exists():
        return
    shorter = path.with_name(path.name + ".tmp")
    with shorter.open("wb") as file:
        for line, row in _lines(path):
            if row["step"] <= step:
                file.write(line.rstrip(b"\n") + b"\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(shorter, path)


def _finite(value: Any) -> Any:
    """Returns the value with None for each number that is not finite, at any depth."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _lines(path: Path) -> Iterator[tuple[bytes, dict]]:
    """Yields each line with the row it holds.

    Lines are read as bytes because a kill can also tear a UTF-8 character.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
            except ValueError as error:
                if not line.endswith(b"\n"):
                    return  # the writer was killed inside this line
                raise ValueError(
                    f"{path}, line {number} is not JSON; mend or remove it"
                ) from error
            yield line, row
