"""The progress bar that every long job shows where there is a terminal."""

import sys
from typing import TextIO

import rich.console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)


def find_terminal(*streams: TextIO) -> rich.console.Console | None:
    """Returns the first of stderr and stdout that can move its cursor, or None.

    A dumb terminal counts as none, whatever the other stream is.
    """
    for stream in streams:
        if stream.isatty():
            terminal = rich.console.Console(stderr=stream is sys.stderr)
            return None if terminal.is_dumb_terminal else terminal
    return None


def progress_bar(terminal: rich.console.Console) -> Progress:
    """Returns a bar whose tasks have the fields `numbers` and `left`, a duration."""
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
