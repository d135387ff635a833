"""Attempts at ARC-AGI tasks: from their files to a submission and a count."""

import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from relax.language_model import LanguageModel
from relax.sampling import SamplingConfig
from relax.tasks.arc_attempts import Input, complete, make_inputs
from relax.tasks.arc_files import ArcTask, choose_tasks, read_tasks, with_solutions
from relax.tasks.arc_grids import PLAIN_END, Parsed, parse_answer
from relax.tasks.arc_pictures import draw
from relax.tasks.arc_results import (
    OVER_CONTEXT,
    Answered,
    show,
    submission,
    summarise,
)
from relax.tasks.batch_identity import model_digest, sampling_values
from relax.tasks.chat import chosen_template
from relax.tasks.files import write_lines, write_rows
from relax.tasks.journal import Journal
from relax.tasks.options import check_template

logger = logging.getLogger(__name__)

JOURNAL, COMPLETIONS = "journal.jsonl", "completions.jsonl"
SUBMISSION, RESULTS, PICTURES = "submission.json", "results.json", "pictures"
SHOWN_OVER_CONTEXT = 10


@dataclass(frozen=True, kw_only=True)
class ArcConfig:
    """Which tasks to attempt, how they are asked, and where results go.

    path: a task's .json file, the competition's file of many by id, or a folder of task
    files. solutions: the competition's file of outputs, where `path` lacks them. ids,
    limit: only these tasks; of them the first ones by id. num_attempts: samples of each
    test input. chat: prompts go through the checkpoint's chat template, or through
    `template`, which implies it; `instruction` then stands above the grids. separator:
    between digits. answer_after: a mark that an answer follows (None: an answer is all
    of a completion). pictures: whether to draw a PNG for each test input.

    output_path: a folder, which holds in the end
    - submission.json: `{task id: [{"attempt_1": grid, "attempt_2": grid}, ...]}`;
    - completions.jsonl: a line for each attempt, task by task;
    - results.json: counts, and what became of each task;
    - pictures/<task id>_<test input>.png;
    - journal.jsonl: each completion as it came. The same command goes on from there;
      so does one for other ids, a higher limit or more attempts.
    """

    kind: str
    path: str
    solutions: str | None
    output_path: str | None
    ids: tuple[str, ...]
    limit: int | None
    num_attempts: int
    chat: bool
    template: str | None
    instruction: str
    separator: str
    answer_after: str | None
    pictures: bool
    batch_size: int

    def __post_init__(self):
        object.__setattr__(self, "ids", tuple(self.ids))
        for name in ("limit", "num_attempts", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"task.{name}={value} must be at least 1")
        if self.output_path is None:
            raise ValueError(
                "output_path=null: name a folder for the results, such as "
                "output_path=my_results"
            )
        if "\n" in self.separator or any(map(str.isdigit, self.separator)):
            raise ValueError(
                f"task.separator={self.separator!r} must hold no digit and no newline"
            )
        if self.answer_after is not None and not (self.answer_after and self.is_chat):
            raise ValueError(
                f"task.answer_after={self.answer_after!r} must be a text, and needs a "
                "chat (task.chat=true): a plain completion is the grid; null is off"
            )

    @property
    def is_chat(self) -> bool:
        """Whether prompts go through a chat template."""
        return self.chat or self.template is not None


def check(config: ArcConfig) -> None:
    """Raises ValueError or OSError where tasks or output can't work."""
    _read(config)
    check_template(config.template)
    folder = Path(config.output_path)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"output_path={folder} is a file; name a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / JOURNAL).exists():
        raise FileExistsError(
            f"output_path={folder} holds files and no {JOURNAL}; name a new folder"
        )


def run(
    config: ArcConfig,
    model: LanguageModel,
    sampling: SamplingConfig,
    terminal: TextIO = sys.stdout,
) -> None:
    """Makes the attempts that the folder lacks; writes what ArcConfig names."""
    tasks = _read(config)
    _use_template(config, model)
    sampling = _sampling(config, model, sampling)
    context = model.config.max_position_embeddings
    room = context - sampling.max_new_tokens
    inputs = make_inputs(tasks, _encoder(config, model), config.separator, room)
    _report_over_context(inputs, context, sampling)
    folder = Path(config.output_path)
    folder.mkdir(parents=True, exist_ok=True)
    with Journal(folder / JOURNAL, _fingerprint(config, model, sampling)) as journal:
        complete(
            model, sampling, inputs, journal, config.num_attempts, config.batch_size
        )
        answered = [_answered(config, one, journal.finished) for one in inputs]
        rows = _rows(inputs, answered, journal.finished)
        write_rows(str(folder / COMPLETIONS), rows)
    _write_json(folder / SUBMISSION, submission(answered))
    limits = {"context": context, "max_new_tokens": sampling.max_new_tokens}
    results = limits | summarise(answered)
    _write_json(folder / RESULTS, results)
    show(results, terminal)
    if config.pictures:
        _draw(inputs, answered, folder / PICTURES)


def _read(config: ArcConfig) -> list[ArcTask]:
    tasks = read_tasks(Path(config.path))
    if config.solutions is not None:
        tasks = with_solutions(tasks, Path(config.solutions))
    return choose_tasks(tasks, config.ids, config.limit)


def _use_template(config: ArcConfig, model: LanguageModel) -> None:
    if model.tokenizer is None:
        raise ValueError(
            "the checkpoint holds no tokenizer, and tasks are asked as text; put its "
            "tokenizer.json or tokenizer.model into the folder"
        )
    if config.is_chat:
        template = chosen_template(config, model)
        if config.template is not None:
            model.chat_template = template


def _sampling(
    config: ArcConfig, model: LanguageModel, sampling: SamplingConfig
) -> SamplingConfig:
    """Returns how attempts are sampled: up to where an answer ends as a text.

    That is a blank line, or of a template without a token for it what it writes there.
    """
    for name in ("num_return_sequences", "num_beams"):
        if getattr(sampling, name) != 1:
            raise ValueError(
                f"sampling.{name}={getattr(sampling, name)} must be 1: attempts are "
                "sampled one by one, as many as task.num_attempts says"
            )
    if sampling.temperature == 0 and config.num_attempts > 1:
        logger.warning(
            "sampling.temperature=0: the %d attempts at a test input will be alike",
            config.num_attempts,
        )
    ends = (PLAIN_END,)
    if config.is_chat:
        ends = model.chat_template.end_of_turn(model.tokenizer)[1]
    return replace(sampling, stop_strings=(*sampling.stop_strings, *ends))


def _report_over_context(
    inputs: Sequence[Input], context: int, sampling: SamplingConfig
) -> None:
    over = [one for one in inputs if one.over_context]
    for one in over[:SHOWN_OVER_CONTEXT]:
        logger.warning(
            "task %s, test %d: a prompt of %d tokens and sampling.max_new_tokens=%d "
            "exceed the context of %d; not attempted",
            *(one.task.task_id, one.test, len(one.prompt)),
            *(sampling.max_new_tokens, context),
        )
    if len(over) > SHOWN_OVER_CONTEXT:
        logger.warning(
            "%d of %d prompts exceed the context of %d; %s lists them all",
            *(len(over), len(inputs), context, RESULTS),
        )


def _encoder(config: ArcConfig, model: LanguageModel) -> Callable[[str], list[int]]:
    """Returns what makes a prompt's ids of the text of its grids."""
    if not config.is_chat:
        return model.encode

    def encode(text: str) -> list[int]:
        content = f"{config.instruction}\n\n{text}".strip()
        return model.encode([{"role": "user", "content": content}])

    return encode


def _fingerprint(
    config: ArcConfig, model: LanguageModel, sampling: SamplingConfig
) -> dict[str, Any]:
    """Returns all that decides a completion, but for the tasks themselves."""
    asked = ("chat", "template", "instruction", "separator")
    return {
        "the model's sha256": model_digest(model),
        **{f"task.{name}": getattr(config, name) for name in asked},
        **sampling_values(sampling),
    }


def _answered(
    config: ArcConfig, one: Input, finished: Mapping[str, Mapping[str, Any]]
) -> Answered:
    attempts = []
    for attempt in range(config.num_attempts):
        if one.over_context:
            attempts.append(Parsed(None, OVER_CONTEXT))
            continue
        record = finished[one.key(attempt)]
        text, finish_reason = record["completion"], record["finish_reason"]
        attempts.append(
            parse_answer(text, finish_reason, config.separator, config.answer_after)
        )
    return Answered(
        task_id=one.task.task_id,
        test=one.test,
        output=one.task.outputs[one.test],
        tokens=len(one.prompt),
        over_context=one.over_context,
        attempts=attempts,
    )


def _rows(
    inputs: Sequence[Input],
    answered: Sequence[Answered],
    finished: Mapping[str, Mapping[str, Any]],
) -> Iterator[dict[str, Any]]:
    """Yields what completions.jsonl says of each attempt, the first being attempt 1."""
    for one, answer in zip(inputs, answered, strict=True):
        for attempt, (grid, reason) in enumerate(answer.attempts):
            record = finished.get(one.key(attempt)) if not one.over_context else None
            record = record or {}
            yield {
                "task": answer.task_id,
                "test": answer.test,
                "attempt": attempt + 1,
                "prompt_tokens": answer.tokens,
                "completion": record.get("completion"),
                "token_ids": record.get("token_ids"),
                "finish_reason": record.get("finish_reason"),
                "grid": grid,
                "reason": reason,
                "right": None if answer.output is None else grid == answer.output,
            }


def _draw(inputs: Sequence[Input], answered: Sequence[Answered], folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    logger.info("drawing %d pictures in %s", len(inputs), folder)
    for one, answer in zip(inputs, answered, strict=True):
        draw(one.task, answer, folder / f"{answer.task_id}_{answer.test}.png")


def _write_json(path: Path, value: Any) -> None:
    write_lines(path, [json.dumps(value)])
