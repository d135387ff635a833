"""Prompts of ARC tasks, and the completions that a journal keeps of them."""

import logging
import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from relax.generation.requests import Request
from relax.language_model import LanguageModel
from relax.sampling import SamplingConfig
from relax.tasks.arc_files import ArcTask
from relax.tasks.arc_grids import format_prompt
from relax.tasks.batch_progress import Progress
from relax.tasks.batch_stop import Interrupted, StopSignals
from relax.tasks.journal import Journal

logger = logging.getLogger(__name__)


class Input(NamedTuple):
    """A test input as the model reads it."""

    task: ArcTask
    test: int
    prompt: tuple[int, ...]
    over_context: bool

    def key(self, attempt: int) -> str:
        """What the journal calls an attempt at it, counted from 0."""
        return f"{self.task.task_id}/{self.test}/{attempt}"

    @property
    def index(self) -> int:
        """What its random keys are made of: the same whatever other tasks there are."""
        return zlib.crc32(f"{self.task.task_id}/{self.test}".encode())

    @property
    def checksum(self) -> int:
        """A number that another prompt hardly has."""
        return zlib.crc32(np.asarray(self.prompt, np.int32))


def make_inputs(
    tasks: Sequence[ArcTask],
    encode: Callable[[str], list[int]],
    separator: str,
    room: int,
) -> list[Input]:
    """Returns the test inputs; a prompt of more than `room` tokens is over_context."""
    inputs = []
    for task in tasks:
        for test, grid in enumerate(task.inputs):
            prompt = encode(format_prompt(task.demonstrations, grid, separator))
            inputs.append(Input(task, test, tuple(prompt), len(prompt) > room))
    return inputs


def complete(
    model: LanguageModel,
    sampling: SamplingConfig,
    inputs: Sequence[Input],
    journal: Journal,
    num_attempts: int,
    batch_size: int,
) -> None:
    """Makes the attempts that the journal lacks and adds them to it.

    Those at one test input stand side by side, so that they share its prompt. Where a
    signal stops it, one line tells how far it came, and SystemExit is raised with 128
    plus the signal's number. Raises ValueError where the journal's tasks were others.
    """
    attempts = [
        (one, attempt)
        for one in inputs
        if not one.over_context
        for attempt in range(num_attempts)
    ]
    missing = [pair for pair in attempts if _is_missing(journal, *pair)]
    progress = Progress(len(attempts), len(attempts) - len(missing))
    try:
        with StopSignals() as signals, progress:
            requests = [Request(one.prompt, one.index, i) for one, i in missing]
            for place, completion in model.complete(requests, sampling, batch_size):
                one, attempt = missing[place]
                record = {
                    "prompt": one.checksum,
                    "completion": completion.text,
                    "token_ids": completion.token_ids,
                    "finish_reason": completion.finish_reason,
                }
                with signals.held():
                    journal.add(one.key(attempt), record)
                    progress.advance(len(completion.token_ids), records=1)
    except Interrupted as stopped:
        logger.warning(
            "%s: %d of %d attempts are made; the same command goes on from there",
            *(stopped.name, progress.done, len(attempts)),
        )
        raise SystemExit(stopped.exit_code) from None
    except ValueError:  # of settings, before anything was made
        if not journal.finished:
            journal.remove()
        raise
    logger.info(
        "%d attempts made: %d tokens in %.1f s, %s",
        *(len(missing), progress.tokens, progress.seconds, progress.pace),
    )


def _is_missing(journal: Journal, one: Input, attempt: int) -> bool:
    """Raises ValueError where the attempt was made at another prompt."""
    record = journal.finished.get(one.key(attempt))
    if record is not None and record["prompt"] != one.checksum:
        raise ValueError(
            f"{journal.path} holds attempts at task {one.task.task_id} from when it "
            "had another prompt; name a new output_path"
        )
    return record is None
