"""Completes prompts: one streamed to the terminal, or many into a file."""

import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TextIO

from relax.generation.requests import Completion
from relax.language_model import LanguageModel
from relax.sampling import SamplingConfig
from relax.tasks.files import check_output, read_texts, write_rows

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """What to complete and where to put it.

    prompt: one text; prompts_file: one prompt per line, or `{"prompt": ...}` per line
    of a .jsonl file; only one of them is given (neither: default_prompt). output_path:
    a .jsonl file, one line per completion; null: the terminal. batch_size: rows that
    run at a time.
    """

    kind: str
    prompt: str | None
    default_prompt: str
    prompts_file: str | None
    output_path: str | None
    batch_size: int

    def __post_init__(self):
        if self.prompt is not None and self.prompts_file is not None:
            raise ValueError(
                f"task.prompt={self.prompt!r} and task.prompts_file="
                f"{self.prompts_file} are both given; give one"
            )
        if self.batch_size < 1:
            raise ValueError(f"task.batch_size={self.batch_size} must be at least 1")


def check(config: GenerateConfig) -> None:
    """Raises ValueError or OSError where prompts or output can't work."""
    read_prompts(config)
    check_output(config.output_path)


def run(
    config: GenerateConfig,
    model: LanguageModel,
    sampling: SamplingConfig,
    terminal: TextIO = sys.stdout,
) -> None:
    """Completes every prompt; see GenerateConfig."""
    prompts = read_prompts(config)
    if config.output_path is not None:
        completions = model.generate(prompts, sampling, config.batch_size)
        write_rows(config.output_path, _rows(prompts, completions, sampling))
    elif len(prompts) == 1 and sampling.num_return_sequences == 1:
        pieces = model.stream(prompts[0], sampling)
        # A prompt that can't be completed is an error before it is shown.
        shown = prompts[0] + next(pieces, "")
        for piece in chain([shown], pieces):
            terminal.write(piece)
            terminal.flush()
        terminal.write("\n")
    else:
        completions = model.generate(prompts, sampling, config.batch_size)
        for prompt, completion in _paired(prompts, completions, sampling):
            terminal.write(f"{prompt}{completion.text}\n{'-' * 40}\n")
    if drafted := model.stats.drafted_tokens:
        accepted = model.stats.accepted_tokens
        logger.info(
            "%.0f%% of %d guessed tokens right", 100 * accepted / drafted, drafted
        )


def read_prompts(config: GenerateConfig) -> list[str]:
    """Returns the prompts; raises ValueError or OSError naming what is wrong."""
    if config.prompts_file is None:
        prompts = [config.default_prompt if config.prompt is None else config.prompt]
    else:
        path = Path(config.prompts_file)
        prompts = read_texts(path, "task.prompts_file", ("prompt",))
    if not prompts or not all(prompts):
        where = "prompts_file" if config.prompts_file else "prompt"
        raise ValueError(
            f"task.{where}={getattr(config, where)!r} holds no prompt, or an empty "
            "one; give at least one character"
        )
    return prompts


def _paired(
    prompts: list[str], completions: list[Completion], sampling: SamplingConfig
) -> Iterator[tuple[str, Completion]]:
    """Yields each completion with its prompt."""
    for index, completion in enumerate(completions):
        yield prompts[index // sampling.num_return_sequences], completion


def _rows(
    prompts: list[str], completions: list[Completion], sampling: SamplingConfig
) -> Iterator[dict]:
    """Yields a line of output per completion."""
    for prompt, completion in _paired(prompts, completions, sampling):
        yield {"prompt": prompt, **completion.row()}
