"""What each line of a batch asks for, checked before anything runs."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from relax.generation.requests import Request, check_tokens
from relax.language_model import LanguageModel, Prompt
from relax.sampling import SamplingConfig
from relax.tasks.files import read_text

OPTION = "input_path"


@dataclass
class Record:
    """One line that is not blank.

    index: among such lines, from 0; line: in the file, from 1. fields: what the line
    holds and the output keeps. prompt: text, ids or messages. tokens: of the prompt,
    once it is encoded. error: what is wrong with the line, None where nothing is.
    """

    index: int
    line: int
    fields: dict[str, Any] = field(default_factory=dict)
    prompt: Prompt = ""
    max_new_tokens: int | None = None
    tokens: tuple[int, ...] = ()
    error: str | None = None

    @property
    def is_chat(self) -> bool:
        """Whether messages ask for an answer, not a text for more of it."""
        return "messages" in self.fields and self.error is None

    def requests(self, samples: int) -> list[Request]:
        """Returns what to ask of a model for all samples of the record."""
        asked = self.tokens, self.index
        return [Request(*asked, i, self.max_new_tokens) for i in range(samples)]


def read_records(path: Path) -> list[Record]:
    """Returns a record per line that is not blank, those in error included.

    A line of .jsonl is an object, one of any other file a prompt. Raises ValueError
    where the file holds none or is not UTF-8, and OSError where it can't be read.
    """
    # Not splitlines, which ends a line at U+2028 too: JSON may hold that as it is.
    lines = enumerate(read_text(path, OPTION).split("\n"), 1)
    filled = [(number, line) for number, line in lines if line.strip()]
    if not filled:
        raise ValueError(f"{OPTION}={path} holds no record; give at least one line")
    records = []
    for index, (number, line) in enumerate(filled):
        record = Record(index, number)
        try:
            record.fields = (
                _object(line) if path.suffix == ".jsonl" else {"prompt": line}
            )
            record.prompt = _prompt(record.fields)
            record.max_new_tokens = _max_new_tokens(record.fields)
        except ValueError as error:
            record.error = str(error)
        records.append(record)
    return records


def encode_records(
    records: Sequence[Record], model: LanguageModel, written: frozenset[str]
) -> None:
    """Gives each record its tokens, or the error why it can't be completed.

    `written` are the fields that the output adds, which no record may have.
    """
    for record in records:
        if record.error is not None:
            continue
        try:
            if taken := sorted(written & set(record.fields)):
                raise ValueError(
                    f"its field {taken[0]!r} is one that the output adds; rename it"
                )
            record.tokens = tuple(model.encode(record.prompt))
            check_tokens("its prompt", record.tokens, model.config, room=1)
        except ValueError as error:
            record.error = str(error)


def written_fields(sampling: SamplingConfig, logprobs: bool) -> frozenset[str]:
    """Returns the names of what the output adds to a record."""
    if sampling.num_return_sequences > 1:
        return frozenset({"completions", "error"})
    names = {"completion", "finish_reason", "error"}
    if logprobs:
        names |= {"token_ids", "logprobs", "sampled_logprobs"}
        names |= {"top_logprobs"} if sampling.num_top_logprobs else set()
    return frozenset(names | ({"score"} if sampling.num_beams > 1 else set()))


def _object(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
        # NaN and 1e999 are read, and could not be written as JSON again.
        json.dumps(row, allow_nan=False)
    except RecursionError:
        raise ValueError("not JSON that can be read: nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(row, dict):
        raise ValueError('not an object; give {"prompt": ...} or {"messages": [...]}')
    return row


def _prompt(fields: Mapping[str, Any]) -> Prompt:
    if ("prompt" in fields) == ("messages" in fields):
        raise ValueError('give one of "prompt" and "messages"')
    if "messages" in fields:
        messages = fields["messages"]
        if not isinstance(messages, list) or not messages:
            raise ValueError('"messages" must be a list of at least one message')
        for message in messages:
            if not isinstance(message, dict) or not isinstance(
                message.get("role"), str
            ):
                raise ValueError('each of "messages" must be an object with a "role"')
        return messages
    prompt = fields["prompt"]
    is_ids = isinstance(prompt, list) and all(type(token) is int for token in prompt)
    if not isinstance(prompt, str) and not is_ids:
        raise ValueError('"prompt" must be a text or a list of token ids')
    if not prompt:
        raise ValueError('"prompt" is empty; give at least one character')
    return prompt


def _max_new_tokens(fields: Mapping[str, Any]) -> int | None:
    value = fields.get("max_new_tokens")
    if value is not None and (type(value) is not int or value < 1):
        raise ValueError(f"max_new_tokens={value!r} must be a whole number from 1 on")
    return value
