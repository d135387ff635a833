"""A run's progress: one live line in a terminal, log lines everywhere else."""

import contextlib
import logging
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Self

import rich.console
from rich.padding import Padding
from rich.progress import Progress
from rich.text import Text

from relax.tracking.bars import find_terminal, progress_bar
from relax.tracking.completions import (
    Row,
    completion_lines,
    completions_table,
    printable,
)

log = logging.getLogger(__name__)

Metrics = Mapping[str, float]


class Console:
    """Shows steps, evaluations, texts and messages; a context manager.

    In a terminal the latest step is a live line below everything else. Without one
    (a file, CI) every call is one record of this module's logger. `quiet` shows
    nothing. A resumed run gives `start_step`, so that the time left is judged by the
    steps made since.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        *,
        quiet: bool = False,
        terminal: rich.console.Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total_steps = total_steps
        self._quiet = quiet
        found = terminal or find_terminal(sys.stderr, sys.stdout)
        self._terminal = None if quiet else found
        self._clock = clock
        self._started = clock()
        self._pace_from = (start_step, self._started)
        self._has_stepped = False
        self._progress = progress_bar(self._terminal) if self._terminal else None
        if self._progress:
            self._bar = self._progress.add_task(
                "", total=total_steps, completed=start_step, numbers="", left="–"
            )
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Self:
        if self._progress:
            self._open.enter_context(_live(self._progress))
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()

    def step(self, step: int, metrics: Metrics) -> None:
        """Shows a training step; `step` counts the steps done."""
        left = self._time_left(step)
        if self._progress:
            self._progress.update(
                self._bar,
                completed=step,
                numbers=_live_numbers(metrics),
                left=left,
            )
        else:
            numbers = "  ".join(_numbers(metrics, _FORMATS))
            elapsed = _duration(self._clock() - self._started)
            self._say(
                f"step {step}/{self._total_steps}  {numbers}  {elapsed} ({left} left)"
            )

    def evaluation(self, step: int, metrics: Metrics) -> None:
        numbers = "  ".join(_evaluated(key, value) for key, value in metrics.items())
        self._say(f"step {step}  {numbers}", style="bold")

    def samples(self, step: int, texts: Sequence[str]) -> None:
        """Shows generated texts; control characters in them are spelled out."""
        header = f"step {step}  samples"
        texts = [printable(text) for text in texts]
        if self._terminal is None:
            indented = (textwrap.indent(text, "    ") for text in texts)
            self._say("\n\n".join((header, *indented)))
            return
        self._say(header)
        for text in texts:
            self._terminal.print(Padding(Text(text, style="dim"), (0, 0, 1, 4)))

    def completions(self, step: int, rows: Sequence[Row]) -> None:
        """Shows the first completions and their rewards."""
        if self._terminal:
            self._terminal.print(completions_table(step, rows))
        else:
            self._say(completion_lines(step, rows))

    def message(self, text: str) -> None:
        self._say(text)

    def _say(self, text: str, style: str = "") -> None:
        if self._terminal:
            self._terminal.print(Text(text, style))
        elif not self._quiet:
            log.info("%s", text)

    def _time_left(self, step: int) -> str:
        """The time to the last step at the pace since the first step seen.

        The first step itself is left out as soon as there is a second, because it
        holds the compilation.
        """
        now = self._clock()
        from_step, from_time = self._pace_from
        if step <= from_step:
            return "–"
        if not self._has_stepped:
            self._pace_from = (step, now)
            self._has_stepped = True
        seconds_per_step = (now - from_time) / (step - from_step)
        return _duration(seconds_per_step * (self._total_steps - step))


@contextlib.contextmanager
def _live(progress: Progress) -> Iterator[None]:
    """Keeps the line on screen; what the root logger prints appears above it.

    Handlers hold the stream they were made with, which rich does not replace.
    """
    before = (sys.stdout, sys.stderr)
    with progress, contextlib.ExitStack() as restored:
        replaced = dict(zip(before, (sys.stdout, sys.stderr), strict=True))
        for handler in logging.getLogger().handlers:
            stream = getattr(handler, "stream", None)
            if isinstance(handler, logging.StreamHandler) and stream in before:
                handler.setStream(replaced[stream])
                restored.callback(handler.setStream, stream)
        yield


_FORMATS: dict[str, Callable[[float], str]] = {
    "loss": "loss {:.4f}".format,
    "mean_token_accuracy": "acc {:.1%}".format,
    "reward": "reward {:.3f}".format,
    "reward_std": "reward_std {:.3f}".format,
    "completions/mean_length": "length {:.1f}".format,
    "kl": "kl {:.3g}".format,
    "entropy": "entropy {:.3f}".format,
    "grad_norm": "grad_norm {:.3g}".format,
    "learning_rate": "lr {:.2e}".format,
    "tokens_per_second": lambda value: f"{_short(value)} tok/s",
    "mfu": "mfu {:.1%}".format,
}
# The live line has those that come first here and fit in 80 columns with the rest.
_LIVE_KEYS = (
    *("reward", "completions/mean_length", "kl", "entropy"),
    *("loss", "mean_token_accuracy", "tokens_per_second", "mfu"),
)
_LIVE_WIDTH = 40


def _numbers(metrics: Metrics, keys: Iterable[str]) -> list[str]:
    known = (key for key in keys if metrics.get(key) is not None)
    return [_FORMATS[key](metrics[key]) for key in known]


def _live_numbers(metrics: Metrics) -> str:
    shown = ""
    for number in _numbers(metrics, _LIVE_KEYS):
        longer = f"{shown}  {number}" if shown else number
        if len(longer) > _LIVE_WIDTH:
            break
        shown = longer
    return shown


def _evaluated(key: str, value: float | None) -> str:
    if value is None:
        return f"{key} –"
    if "pass@" in key:
        return f"{key} {value:.1%}"
    return f"{key} {value}" if isinstance(value, int) else f"{key} {value:.4f}"


def _short(number: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:.0f}"


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
