"""Texts that tasks read and JSON lines that they write."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def read_texts(path: Path, option: str, names: tuple[str, ...]) -> list[str]:
    """Returns a text per line that is not blank; of .jsonl, the first field of `names`.

    Raises ValueError or OSError naming the config path `option` and the line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{option}={path} does not exist")
    lines = _lines(path, option)
    if path.suffix != ".jsonl":
        return list(lines.values())
    return [_text_of(path, option, names, n, line) for n, line in lines.items()]


def read_text(path: Path, option: str) -> str:
    """Returns a whole file; ValueError names the option where it is not UTF-8."""
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{option}={path} is not UTF-8: {error}") from None


def check_output(path: str | None) -> None:
    """Raises OSError where a file can't be written to task.output_path."""
    if path is None:
        return
    if Path(path).is_dir():
        raise IsADirectoryError(
            f"task.output_path={path} is a folder; name a file in it"
        )
    parent = Path(path).absolute().parent
    if not parent.is_dir():
        raise FileNotFoundError(
            f"task.output_path={path}: {parent} is no folder; make it"
        )


def write_rows(path: str, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes one JSON line per row, all of them or no file."""
    lines = (json.dumps(row, ensure_ascii=False) for row in rows)
    write_lines(Path(path), lines)


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Writes lines of JSON, all of them or no file."""
    temporary = path.with_name(f"{path.name}.partial")
    try:
        # A lone surrogate, which UTF-8 can't hold, is written as JSON escapes it.
        with temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(f"{line}\n" for line in lines)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _lines(path: Path, option: str) -> dict[int, str]:
    """Returns the lines that are not blank, by their number from 1."""
    # Not splitlines, which ends a line at U+2028 too: JSON may hold that as it is.
    lines = read_text(path, option).split("\n")
    return {number: line for number, line in enumerate(lines, 1) if line.strip()}


def _text_of(
    path: Path, option: str, names: tuple[str, ...], number: int, line: str
) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{option}={path}, line {number}: {error}") from None
    row = row if isinstance(row, dict) else {}
    for name in names:
        if isinstance(row.get(name), str):
            return row[name]
    fields = " or ".join(f'"{name}"' for name in names)
    raise ValueError(f"{option}={path}, line {number}: no text under {fields}")
