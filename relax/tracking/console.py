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
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

log = logging.getLogger(__name__)

Metrics = Mapping[str, float]


class Console:
    """Shows steps, evaluations, samples and messages; a context manager.

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
        self._terminal = None if quiet else terminal or _find_terminal()
        self._clock = clock
        self._started = clock()
        self._pace_from = (start_step, self._started)
        self._has_stepped = False
        self._progress = _progress(self._terminal) if self._terminal else None
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
                numbers=_numbers(metrics, _LIVE_KEYS),
                left=left,
            )
        else:
            numbers = _numbers(metrics, _FORMATS)
            elapsed = _duration(self._clock() - self._started)
            self._say(
                f"step {step}/{self._total_steps}  {numbers}  {elapsed} ({left} left)"
            )

    def evaluation(self, step: int, metrics: Metrics) -> None:
        numbers = "  ".join(f"{key} {value:.4f}" for key, value in metrics.items())
        self._say(f"step {step}  {numbers}", style="bold")

    def samples(self, step: int, texts: Sequence[str]) -> None:
        """Shows generated texts; control characters in them are spelled out."""
        header = f"step {step}  samples"
        texts = [_printable(text) for text in texts]
        if self._terminal is None:
            indented = (textwrap.indent(text, "    ") for text in texts)
            self._say("\n\n".join((header, *indented)))
            return
        self._say(header)
        for text in texts:
            self._terminal.print(Padding(Text(text, style="dim"), (0, 0, 1, 4)))

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


def _find_terminal() -> rich.console.Console | None:
    """Returns stderr or else stdout where it is a terminal that can move its cursor."""
    for stream in (sys.stderr, sys.stdout):
        if stream.isatty():
            terminal = rich.console.Console(stderr=stream is sys.stderr)
            return None if terminal.is_dumb_terminal else terminal
    return None


def _progress(terminal: rich.console.Console) -> Progress:
    return Progress(
        MofNCompleteColumn(),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[numbers]}", markup=False),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]} left", markup=False, style="cyan"),
        console=terminal,
        expand=True,
        # What is piped into a file stays there, and only there.
        redirect_stdout=sys.stdout.isatty(),
        redirect_stderr=sys.stderr.isatty(),
    )


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
    "reward": "reward {:.3f}".format,
    "grad_norm": "grad_norm {:.3g}".format,
    "learning_rate": "lr {:.2e}".format,
    "tokens_per_second": lambda value: f"{_short(value)} tok/s",
    "mfu": "mfu {:.1%}".format,
}
_LIVE_KEYS = ("loss", "reward", "tokens_per_second", "mfu")  # fit in 80 columns


def _numbers(metrics: Metrics, keys: Iterable[str]) -> str:
    return "  ".join(_FORMATS[key](metrics[key]) for key in keys if key in metrics)


def _short(number: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:.0f}"


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _printable(text: str) -> str:
    """A model may write escape sequences, which must not reach the terminal."""
    return "".join(
        char if char.isprintable() or char in "\n\t" else repr(char)[1:-1]
        for char in text
    )
