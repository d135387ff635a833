"""The folder of what was made from data once: its place, its keys, whole files."""

import hashlib
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

import platformdirs


def cache_folder(cache_dir: str | None) -> Path:
    """Returns the folder that data.cache_dir names, the user's own for None."""
    if cache_dir is None:
        return platformdirs.user_cache_path("relax")
    return Path(cache_dir).expanduser()


def cache_key(parts: Iterable[str]) -> str:
    """Returns the sha256, in hex, of texts in their order."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")  # JSON may spell half a pair
        digest.update(len(data).to_bytes(8))  # keeps "ab","c" apart from "a","bc"
        digest.update(data)
    return digest.hexdigest()


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes a cache file that other processes see whole or not at all.

    Raises ValueError naming data.cache_dir where it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("xb") as file:
                write(file)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(
            f"data.cache_dir cannot take {path}: {error}; name a folder that is "
            "writable and has room"
        ) from error
