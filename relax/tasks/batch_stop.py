"""SIGINT and SIGTERM: at once, but never while a record is written."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Self

NUMBERS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A signal asked the task to end."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.name = signal.Signals(number).name
        self.exit_code = 128 + number


class StopSignals:
    """Raises Interrupted where a signal comes; a context manager.

    Outside the main thread, where Python gives no signals, it changes nothing.
    """

    def __init__(self) -> None:
        self._before: dict[int, object] = {}
        self._holding = False
        self._pending: int | None = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {n: signal.signal(n, self._stop) for n in NUMBERS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Lets what is within come to its end before a signal is raised."""
        self._holding = True
        try:
            yield
        finally:
            self._holding = False
        if self._pending is not None:
            raise Interrupted(self._pending)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        del frame
        if not self._holding:
            raise Interrupted(number)
        self._pending = number
