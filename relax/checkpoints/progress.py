"""What reading or writing a checkpoint says while it lasts."""

import logging
import time

logger = logging.getLogger(__name__)

_EVERY = 10.0  # seconds


class Progress:
    """Logs how many parameters are done: every ten seconds, and at the end."""

    def __init__(self, verb: str, total: int) -> None:
        """`verb` is in the past tense; `total` counts parameters."""
        self._verb, self._total, self._done = verb, total, 0
        self._began = self._told = time.monotonic()

    def add(self, count: int) -> None:
        """Counts parameters as done."""
        self._done += count
        now = time.monotonic()
        seconds = now - self._began
        if self._done >= self._total:
            logger.info(
                "%s %s parameters in %.1f s", self._verb, f"{self._done:,}", seconds
            )
        elif now - self._told >= _EVERY:
            self._told = now
            logger.info(
                "%s %s of %s parameters, %.0f s left",
                self._verb,
                f"{self._done:,}",
                f"{self._total:,}",
                seconds * (self._total / self._done - 1.0),
            )
