"""How far a batch has come: a live line in a terminal, log lines elsewhere."""

import logging
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Self

import rich.console

from relax.tracking.bars import find_terminal, progress_bar

logger = logging.getLogger(__name__)

LINE_SECONDS = 10.0


class Progress:
    """Shows records done, tokens per second and the time left; a context manager.

    It writes to stderr: a bar where that is a terminal, or else a line of the log every
    LINE_SECONDS. seconds, tokens: since it was entered.
    """

    def __init__(
        self,
        total: int,
        done: int = 0,
        *,
        terminal: rich.console.Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`done` of `total` records were finished before."""
        self.done = done
        self.tokens = 0
        self._total = total
        self._before = done
        self._clock = clock
        self._started = self._shown = clock()
        terminal = terminal or find_terminal(sys.stderr)
        self._bar = progress_bar(terminal) if terminal else None
        if self._bar:
            self._task = self._bar.add_task(
                "", total=total, completed=done, numbers="", left="–"
            )

    def __enter__(self) -> Self:
        self._started = self._shown = self._clock()
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar:
            self._bar.stop()

    @property
    def seconds(self) -> float:
        return self._clock() - self._started

    @property
    def pace(self) -> str:
        return f"{self.tokens / max(self.seconds, 1e-9):.1f} tokens/s"

    def advance(self, tokens: int, records: int = 0) -> None:
        """Counts tokens made, and records that they have finished."""
        self.tokens += tokens
        self.done += records
        if self._bar:
            self._bar.update(
                self._task, completed=self.done, numbers=self.pace, left=self._left()
            )
        elif self._clock() - self._shown >= LINE_SECONDS:
            self._shown = self._clock()
            logger.info(
                "%d/%d records, %s, %s left",
                *(self.done, self._total, self.pace, self._left()),
            )

    def _left(self) -> str:
        """The time that the others take at the pace of those done since the start."""
        done = self.done - self._before
        if not done:
            return "–"
        left = self.seconds / done * (self._total - self.done)
        return str(timedelta(seconds=round(left)))
