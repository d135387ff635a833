"""Completes the records of a file, as many at a time as fit, and can be interrupted.

A line of output is what its line of input holds, and what was made of it: `completion`,
`token_ids`, `logprobs` and so on as in the generate task; or, with
sampling.num_return_sequences above 1, a list of such objects under `completions`.
"""

import hashlib
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from relax.generation.requests import (
    Completion,
    GenerationStats,
    allowed_tokens,
)
from relax.language_model import LanguageModel
from relax.sampling import SamplingConfig
from relax.tasks.batch_identity import model_digest, sampling_values, tokens_digest
from relax.tasks.batch_output import Output
from relax.tasks.batch_progress import Progress
from relax.tasks.batch_records import (
    Record,
    encode_records,
    read_records,
    written_fields,
)
from relax.tasks.batch_stop import Interrupted, StopSignals
from relax.tasks.chat import chosen_template
from relax.tasks.files import check_output
from relax.tasks.journal import Journal, OtherFingerprint
from relax.tasks.options import check_template

logger = logging.getLogger(__name__)

ON_ERROR = ("fail", "skip")
SHOWN_ERRORS = 10
GO_ON = "; the same command goes on from there"


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """What to complete and where to put it.

    input_path: a .jsonl file whose lines have a "prompt" (a text or token ids) or
    "messages", and if they want "max_new_tokens" and fields of their own; or another
    file, each line a prompt. output_path: a .jsonl file; beside it, until all is done,
    a .journal, from which the same command goes on after an interruption. batch_size:
    rows that run at a time. template: of messages; null: the checkpoint's own, or as in
    the chat task. on_error: what to do about lines that can't be completed: "fail"
    before anything is run, or "skip", which writes them with an "error". logprobs:
    whether token ids and logprobs are written. overwrite: whether an output that is
    there, or the journal of another task, gives way.
    """

    kind: str
    input_path: str | None
    output_path: str | None
    batch_size: int
    template: str | None
    on_error: str
    logprobs: bool
    overwrite: bool

    def __post_init__(self):
        for name, example in (("input_path", "prompts"), ("output_path", "out")):
            if getattr(self, name) is None:
                raise ValueError(
                    f"{name}=null: task=batch needs a file, {name}={example}.jsonl"
                )
        if self.batch_size < 1:
            raise ValueError(f"task.batch_size={self.batch_size} must be at least 1")
        if self.on_error not in ON_ERROR:
            raise ValueError(
                f"task.on_error={self.on_error!r} is unknown; choose one of "
                f"{', '.join(ON_ERROR)}"
            )

    @property
    def journal_path(self) -> Path:
        """Where what is finished is kept until all is."""
        return Path(f"{self.output_path}.journal")


def check(config: BatchConfig) -> None:
    """Raises ValueError or OSError where records or paths can't work."""
    check_template(config.template)
    source, output = Path(config.input_path), Path(config.output_path)
    if not source.is_file():
        raise FileNotFoundError(f"input_path={source} does not exist")
    check_output(config.output_path)
    for path in (output, config.journal_path):
        if path.exists() and os.path.samefile(source, path):
            raise ValueError(
                f"input_path={source} and output_path={output}: {path} would be "
                "written over; give another output_path"
            )
    begun = config.journal_path.exists()
    if output.exists() and not begun and not config.overwrite:
        raise FileExistsError(
            f"output_path={output} is there already, and no interrupted task is; give "
            "another output_path, or task.overwrite=true to begin anew"
        )
    records = read_records(source)
    if config.on_error == "fail":
        _report(config, records)


def run(config: BatchConfig, model: LanguageModel, sampling: SamplingConfig) -> None:
    """Completes every record; see BatchConfig.

    Where a signal stops it, one line tells how far it came, and SystemExit is raised
    with 128 plus the signal's number.
    """
    records = read_records(Path(config.input_path))
    if any(record.is_chat for record in records):
        template = chosen_template(config, model)
        if config.template is not None:
            model.chat_template = template
    texts = (r for r in records if r.error is None and isinstance(r.prompt, str))
    if model.tokenizer is None and any(texts):
        model.encode("")  # raises what would be each line's error
    encode_records(records, model, written_fields(sampling, config.logprobs))
    _report(config, records)
    batch = Batch(config, records, model, sampling)
    try:
        batch.run()
    except Interrupted as interrupted:
        logger.warning("%s: %s%s", interrupted.name, batch.how_far(), GO_ON)
        sys.exit(interrupted.exit_code)
    except OSError:
        logger.warning("%s%s", batch.how_far(), GO_ON)
        raise


class Batch:
    """Records with their model, and which of them are finished."""

    def __init__(
        self,
        config: BatchConfig,
        records: Sequence[Record],
        model: LanguageModel,
        sampling: SamplingConfig,
    ):
        """`records` are encoded."""
        self._config = config
        self._records = records
        self._model = model
        self._sampling = sampling
        self._written = 0
        self._done = sum(record.error is not None for record in records)

    def how_far(self) -> str:
        """Returns how many records are done."""
        return f"{self._done} of {len(self._records)} records are done"

    def run(self) -> None:
        """Writes the output, whatever of it was written before."""
        self._model.check(self._sampling)
        with ExitStack() as open_files:
            stop = open_files.enter_context(StopSignals())
            self._journal = open_files.enter_context(self._open_journal())
            found = len(self._journal.finished)
            self._done += found
            if found:
                logger.info("going on: %s", self.how_far())
            path = Path(self._config.output_path)
            output = open_files.enter_context(Output(path))
            todo = self._todo()
            with stop.held():
                output.take_up(self._ready())
            before = copy(self._model.stats)
            progress = Progress(len(self._records), self._done)
            with progress:
                try:
                    self._complete(todo, output, stop, progress)
                except ValueError:  # of settings, before anything was made
                    if not self._done:
                        self._journal.remove()
                        path.unlink()
                    raise
            self._journal.remove()
            self._summarise(progress, before, self._model.stats)

    def _open_journal(self) -> Journal:
        path, fingerprint = self._config.journal_path, self._fingerprint()
        try:
            return Journal(path, fingerprint)
        except OtherFingerprint as error:
            if not self._config.overwrite:
                raise ValueError(
                    f"{error}, which task.overwrite=true does too"
                ) from None
        path.unlink()
        return Journal(path, fingerprint)

    def _fingerprint(self) -> dict[str, Any]:
        source = Path(self._config.input_path).read_bytes()
        tokens = [record.tokens for record in self._records]
        return {
            "the input's sha256": hashlib.sha256(source).hexdigest(),
            "the sha256 of its tokens": tokens_digest(tokens),
            "the model's sha256": model_digest(self._model),
            "task.logprobs": self._config.logprobs,
            **sampling_values(self._sampling),
        }

    def _todo(self) -> list[Record]:
        finished = self._journal.finished
        return [
            record
            for record in self._records
            if record.error is None and str(record.index) not in finished
        ]

    def _ready(self) -> Iterator[dict[str, Any]]:
        """Yields the rows that come next in the output, as far as they are finished."""
        finished = self._journal.finished
        while self._written < len(self._records):
            record = self._records[self._written]
            key = str(record.index)
            if record.error is not None:
                made = {"error": f"line {record.line}: {record.error}"}
            elif key in finished:
                # The file keeps it: memory holds only what waits for its turn.
                made = finished.pop(key)
            else:
                return
            self._written += 1
            yield {**record.fields, **made}

    def _complete(
        self,
        todo: Sequence[Record],
        output: Output,
        stop: StopSignals,
        progress: Progress,
    ) -> None:
        """Runs what is to do; each record is kept as soon as it is finished."""
        for record, samples in self._finished(todo, progress):
            with stop.held():
                fields = [_fields(s, self._config.logprobs) for s in samples]
                made = fields[0] if len(fields) == 1 else {"completions": fields}
                self._journal.add(str(record.index), made)
                self._done += 1
                output.write(self._ready())
            progress.advance(0, records=1)

    def _finished(
        self, todo: Sequence[Record], progress: Progress
    ) -> Iterator[tuple[Record, list[Completion]]]:
        """Yields a record with its samples when the last of them is complete."""
        count = self._sampling.num_return_sequences
        for is_chat, sampling in self._groups(todo):
            records = [r for r in todo if is_chat in (None, r.is_chat)]
            asked = [r for record in records for r in record.requests(count)]
            if not asked:
                continue
            rows, room = self._shape(is_chat)
            answers = self._model.complete(asked, sampling, rows, capacity=room)
            samples: dict[int, dict[int, Completion]] = {}
            for place, completion in answers:
                progress.advance(len(completion.token_ids))
                index, sample = divmod(place, count)
                found = samples.setdefault(index, {})
                found[sample] = completion
                if len(found) == count:
                    del samples[index]
                    yield records[index], [found[i] for i in range(count)]

    def _groups(
        self, todo: Sequence[Record]
    ) -> Iterator[tuple[bool | None, SamplingConfig]]:
        """Yields which records are sampled alike: chats, others or (None) all.

        Where the template ends an answer by a text, this stops messages' alone.
        """
        sampling, strings = self._sampling, ()
        if any(record.is_chat for record in todo):
            template, tokenizer = self._model.chat_template, self._model.tokenizer
            # One that refuses a plain question and answer has had its warning.
            with suppress(ValueError):
                strings = template.end_of_turn(tokenizer)[1]
        if not strings:
            yield None, sampling
            return
        ended = replace(sampling, stop_strings=(*sampling.stop_strings, *strings))
        yield True, ended
        yield False, sampling

    def _shape(self, is_chat: bool | None) -> tuple[int, int]:
        """Returns rows, and tokens of a row, that all records of a kind need.

        A task that goes on has the shapes in which it was begun, also where few records
        are left: the last bit of a logprob depends on them.
        """
        sampling, config = self._sampling, self._model.config
        requests = [
            request
            for record in self._records
            if record.error is None and is_chat in (None, record.is_chat)
            for request in record.requests(sampling.num_return_sequences)
        ]
        room = max(
            len(request.prompt) + allowed_tokens(request, sampling, config)
            for request in requests
        )
        return min(self._config.batch_size, len(requests)), room

    def _summarise(
        self, progress: Progress, before: GenerationStats, after: GenerationStats
    ) -> None:
        def since(name: str) -> int:
            return getattr(after, name) - getattr(before, name)

        parts = [
            f"{len(self._records)} records: {progress.tokens} tokens in "
            f"{progress.seconds:.1f} s, {progress.pace}",
            f"{since('prompt_tokens')} of prompts, {since('shared_tokens')} of them "
            "shared prefixes",
        ]
        if drafted := since("drafted_tokens"):
            share = since("accepted_tokens") / drafted
            parts.append(f"{share:.0%} of {drafted} drafted tokens accepted")
        if skipped := sum(record.error is not None for record in self._records):
            parts.append(f"{skipped} lines skipped")
        logger.info("%s; written: %s", "; ".join(parts), self._config.output_path)


def _fields(completion: Completion, logprobs: bool) -> dict[str, Any]:
    """Returns what the output says of a completion."""
    row: dict[str, Any] = {"completion": completion.text}
    if logprobs:
        row["token_ids"] = completion.token_ids
        row["logprobs"] = completion.logprobs
        row["sampled_logprobs"] = completion.sampled_logprobs
        if completion.top_logprobs:
            row["top_logprobs"] = completion.top_logprobs
    row["finish_reason"] = completion.finish_reason
    if completion.score is not None:
        row["score"] = completion.score
    return row


def _report(config: BatchConfig, records: Sequence[Record]) -> None:
    """Raises ValueError naming the lines in error, or warns of each."""
    path = config.input_path
    errors = [f"line {r.line}: {r.error}" for r in records if r.error is not None]
    if not errors:
        return
    if config.on_error == "fail":
        shown = "; ".join(errors[:SHOWN_ERRORS])
        more = len(errors) - SHOWN_ERRORS
        raise ValueError(
            f"input_path={path}, {shown}{f'; and {more} more' if more > 0 else ''}; "
            "mend them, or task.on_error=skip leaves them out"
        )
    for error in errors:
        logger.warning("input_path=%s, %s; skipped", path, error)
