"""What a long task has finished, kept so that the same command goes on from there."""

import fcntl
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Self

SYNC_SECONDS = 5.0
_START = b'{"journal": 1, "fingerprint": '


class OtherFingerprint(ValueError):
    """A journal holds the records of another task, or of other settings."""


class Journal:
    """An append-only file of finished records, each under its key; a context manager.

    finished: the records by key, those found on opening and those added since. Whoever
    holds many may take out what is no longer needed: the file keeps it.

    Each record goes to the operating system at once, where it survives the end of the
    process however it comes. It goes to the disk (fsync) every SYNC_SECONDS and at the
    end: a power cut costs the work of the last seconds, which is then done again, while
    a sync per record would let a slow disk wait for thousands of them.
    """

    def __init__(self, path: Path, fingerprint: Mapping[str, Any]) -> None:
        """Opens or begins the file; `fingerprint` is all that decides the records.

        What a killed process left half written at the end is cut off. Raises
        OtherFingerprint, a ValueError, where the records in it have another one;
        ValueError where it is no journal or another process uses it; OSError where it
        can't be opened.
        """
        self.path = path
        self.finished: dict[str, dict[str, Any]] = {}
        # Unbuffered, so that no write that failed is tried again on closing.
        self._file = path.open("a+b", buffering=0)
        try:
            self._lock()
            self._take_up(_plain(fingerprint))
        except BaseException:
            self._file.close()
            raise
        self._synced = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def add(self, key: str, record: Mapping[str, Any]) -> None:
        """Keeps a finished record; OSError, as of a full disk, keeps none of it."""
        append_line(self._file, _line({"key": key, "record": dict(record)}))
        self.finished[key] = dict(record)
        if time.monotonic() - self._synced >= SYNC_SECONDS:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()

    def close(self) -> None:
        """Leaves the file for the next process; may be called twice."""
        if not self._file.closed:
            try:
                os.fsync(self._file.fileno())
            finally:
                self._file.close()

    def remove(self) -> None:
        """Closes and deletes the file: all is done."""
        # Before closing, which lets go of the lock.
        self.path.unlink(missing_ok=True)
        self._file.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{self.path} is in use by another process, which does the same task; "
                "wait for its end, or stop it"
            ) from None

    def _take_up(self, fingerprint: dict[str, Any]) -> None:
        """Fills `finished`, and leaves a header and whole records in the file."""
        begun, end = self._read()
        if self.finished:
            self._compare(begun, fingerprint)
            self._file.truncate(end)
        else:
            self._file.truncate(0)
            append_line(self._file, _line({"journal": 1, "fingerprint": fingerprint}))

    def _read(self) -> tuple[dict[str, Any], int]:
        """Fills `finished`; returns the fingerprint and the bytes of whole lines."""
        begun, end = {}, 0
        with self.path.open("rb") as lines:
            for line in lines:
                if end == 0 and not (
                    line.startswith(_START) or _START.startswith(line)
                ):
                    raise ValueError(
                        f"{self.path} is no journal of ours; move it elsewhere"
                    )
                row = _row(line)
                if row is None:
                    break
                if end == 0:
                    begun = row["fingerprint"]
                else:
                    self.finished[row["key"]] = row["record"]
                end += len(line)
        return begun, end

    def _compare(self, begun: dict[str, Any], now: dict[str, Any]) -> None:
        for name in [*begun, *(name for name in now if name not in begun)]:
            if begun.get(name) != now.get(name):
                raise OtherFingerprint(
                    f"{self.path} was begun with {name}={begun.get(name)!r}, and now "
                    f"it is {now.get(name)!r}: go on with what it was, or remove the "
                    "file to begin anew"
                )


def append_line(file: BinaryIO, line: bytes) -> None:
    """Writes a line at the end of an unbuffered file, the whole of it or nothing.

    Raises OSError where it can't, as on a full disk.
    """
    end = file.seek(0, os.SEEK_END)
    left = memoryview(line)
    try:
        while left:
            left = left[file.write(left) :]
    except BaseException as error:
        # The next line must not come after half of this one.
        file.truncate(end)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(file.name)) from None
        raise


def _line(row: Mapping[str, Any]) -> bytes:
    # ASCII: a lone surrogate, which UTF-8 can't hold, is kept as an escape.
    return json.dumps(row).encode("ascii") + b"\n"


def _plain(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """Returns it as JSON gives it back, its tuples as lists."""
    return json.loads(json.dumps(dict(fingerprint)))


def _row(line: bytes) -> dict[str, Any] | None:
    """Returns what a line says, None where it is not whole."""
    if not line.endswith(b"\n"):
        return None
    try:
        return json.loads(line)
    except ValueError:
        return None
