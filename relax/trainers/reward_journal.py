"""Finished rewards on disk, so that a killed run pays for none of them twice."""

import hashlib
import json
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from relax.generation.requests import Completion, Request

FILE = "rewards.jsonl"
BEFORE = "rewards_before.jsonl"


class Kept(NamedTuple):
    """A completion's rewards, and how each came to be (`relax.rewards.Scores`)."""

    values: list[float]
    states: list[int]


class RewardJournal:
    """Rewards by completion, in a run's folder, since the checkpoint before the last.

    What was kept is found again by prompt, sample and token ids, so that another
    completion is never given the same rewards.
    """

    def __init__(self, folder: Path, names: tuple[str, ...]):
        """`names`: of the rewards, whose change makes all that was kept useless."""
        self._path, self._before = folder / FILE, folder / BEFORE
        self._names = names
        self._known = {**self._read(self._before), **self._read(self._path)}
        self._mend()
        self._file = self._path.open("a", encoding="utf-8")

    def get(self, request: Request, completion: Completion) -> Kept | None:
        """Returns a completion's rewards and states, None where they are not known."""
        return self._known.get(self._key(request, completion))

    def put(self, request: Request, completion: Completion, kept: Kept) -> None:
        """Keeps a completion's rewards and states."""
        entry = {
            "key": self._key(request, completion),
            "values": [None if np.isnan(value) else value for value in kept.values],
            "states": kept.states,
        }
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()

    def rotate(self) -> None:
        """Forgets what is older than the last call: a checkpoint has begun.

        What came since is kept until the next one: this one may fail.
        """
        self._file.close()
        os.replace(self._path, self._before)
        self._file = self._path.open("a", encoding="utf-8")
        self._known.clear()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _key(self, request: Request, completion: Completion) -> str:
        parts = (
            self._names,
            request.input_index,
            request.sample_index,
            request.prompt,
            completion.token_ids,
            completion.finish_reason,
        )
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    @staticmethod
    def _read(path: Path) -> dict[str, Kept]:
        known = {}
        if path.exists():
            for line in path.read_bytes().split(b"\n"):
                try:
                    entry = json.loads(line)
                except ValueError:
                    continue  # torn by a kill
                values = [np.nan if v is None else v for v in entry["values"]]
                known[entry["key"]] = Kept(values, entry["states"])
        return known

    def _mend(self) -> None:
        """Ends a line that a kill has torn."""
        if self._path.exists():
            data = self._path.read_bytes()
            if data and not data.endswith(b"\n"):
                with self._path.open("ab") as file:
                    file.write(b"\n")
