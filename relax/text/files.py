"""Reading text and JSON; what can't be read is named."""

import json
from pathlib import Path


def read_text(path: Path) -> str:
    """Returns a text file's content; raises ValueError where it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error


def read_json(path: Path) -> dict:
    """Returns a JSON file's object, an empty one where there is no file.

    Raises ValueError, naming the file, where it holds anything else.
    """
    if not path.is_file():
        return {}
    try:
        value = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, not a JSON object")
    return value
