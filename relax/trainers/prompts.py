"""Prompts of records: as ids, as text, and in the order that training takes them."""

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from relax.data.records import Record
from relax.text.chat import TEMPLATES, ChatTemplate
from relax.tracking.completions import shorten
from relax.trainers.config import Setup

logger = logging.getLogger(__name__)

CHECKED, CHECK_SECONDS = 20_000, 10.0


class LengthError(ValueError):
    """A prompt is empty, or leaves a completion no room."""


class Prompt(NamedTuple):
    """What a model is asked: ids, a text for people and rewards, and the answer."""

    ids: tuple[int, ...]
    text: str
    answer: Any
    record: Record


def make_prompt(record: Record, index: int, setup: Setup) -> Prompt:
    """Returns the prompt of a record.

    That of messages ends where the assistant first answers. A text becomes a user's
    message where `data.template` is given. Raises ValueError naming the record.
    """
    asked = _asked(record, index)
    answer = _answer(record, index)
    is_text = isinstance(asked, str)
    if is_text and setup.data.template is None:
        first = [] if setup.tokenizer.bos_id is None else [setup.tokenizer.bos_id]
        with _naming(index):
            ids = (*first, *setup.tokenizer.encode(asked))
        return Prompt(ids, asked, answer, record)
    chat = [{"role": "user", "content": asked}] if is_text else asked
    template = _require_template(setup.template)
    with _naming(index):  # what a template refuses, or a tokenizer
        ids = template.encode(
            setup.tokenizer,
            chat,
            add_generation_prompt=True,
            tools=record.get("tools"),
        )
    return Prompt(tuple(ids), str(chat[-1]["content"]), answer, record)


def check_length(
    prompt: Prompt, index: int, setup: Setup, option: str = "trainer.context"
) -> None:
    """Raises LengthError for a prompt that is empty or leaves a completion no room.

    option: what it and its completion must fit in, `trainer.context` where they are
    trained on, else `model.max_position_embeddings`.
    """
    group, name = option.split(".")
    limit, longest = getattr(getattr(setup, group), name), setup.sampling.max_new_tokens
    if limit <= longest:
        raise LengthError(
            f"sampling.max_new_tokens={longest} and {option}={limit} leave no room for "
            f"any prompt; raise {option}, or lower sampling.max_new_tokens"
        )
    if not 1 <= len(prompt.ids) <= limit - longest:
        leave_out = (
            "leave such prompts out with trainer.skip_long_prompts=true"
            if option == "trainer.context"
            else "leave the prompt out"
        )
        raise LengthError(
            f"prompt {index} of the data has {len(prompt.ids)} tokens, and with "
            f"sampling.max_new_tokens={longest} {option}={limit} has room for 1 to "
            f"{limit - longest}; raise {option}, lower sampling.max_new_tokens, or "
            f"{leave_out}"
        )


class PromptOrder:
    """The prompts of training, numbered as they are taken; each epoch is shuffled."""

    def __init__(self, records: Sequence[Record], setup: Setup):
        import grain  # 0.7 s

        self._records, self._setup = records, setup
        order = grain.MapDataset.range(len(records)).seed(setup.seed).shuffle()
        self._order = order.repeat()
        self._told: set[type] = set()

    def at(self, number: int) -> Prompt | None:
        """Returns a prompt, None for one that doesn't fit or is none, left out.

        The first of each kind that is left out is told of; a rollout's metrics count
        all.
        """
        index = self._order[number]
        try:
            return self._fitting(index)
        except ValueError as error:
            if type(error) not in self._told:
                logger.warning("left out, as others may be: %s", error)
            self._told.add(type(error))
            return None

    def check(self) -> Prompt:
        """Returns the first prompt that fits.

        Raises ValueError where none of the first does, one of them is no prompt, or
        with `trainer.skip_long_prompts` false one doesn't fit: of as many as CHECKED,
        as far as CHECK_SECONDS go. Later ones are left out.
        """
        skip = self._setup.trainer.skip_long_prompts
        ends_at, first = time.monotonic() + CHECK_SECONDS, None
        refused: LengthError | None = None
        for number in range(min(len(self._records), CHECKED)):
            try:
                prompt = self._fitting(self._order[number])
                first = first or prompt
            except LengthError as error:
                if not skip:
                    raise
                refused = error
            if first and time.monotonic() > ends_at:
                break
        if first is None:
            raise refused  # says what they should fit in
        return first

    def _fitting(self, index: int) -> Prompt:
        """Returns the prompt of a record; raises ValueError, LengthError among them."""
        prompt = make_prompt(self._records[index], index, self._setup)
        check_length(prompt, index, self._setup)
        return prompt


def asks(record: Record) -> bool:
    """Whether a record holds something to be answered."""
    return "prompt" in record or "messages" in record


def _asked(record: Record, index: int) -> str | list:
    if "prompt" in record:
        return record["prompt"]
    messages = record.get("messages")
    if not messages:
        raise ValueError(
            f"record {index} of the data holds no prompt, but "
            f"{', '.join(record) or 'nothing'}; give prompt or messages"
        )
    roles = [message.get("role") for message in messages]
    end = roles.index("assistant") if "assistant" in roles else len(roles)
    if not end:
        raise ValueError(f"record {index} of the data begins with the assistant")
    return list(messages[:end])


def _answer(record: Record, index: int) -> str | None:
    """Returns a text as it is, a number as one, of messages what the last one says."""
    answer = record.get("answer", record.get("completion"))
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        return str(answer)
    if isinstance(answer, list) and answer and isinstance(answer[-1], Mapping):
        answer = answer[-1].get("content", answer)
    if answer is None or isinstance(answer, str):
        return answer
    raise ValueError(
        f"record {index} of the data has the answer "
        f"{shorten(json.dumps(answer, default=repr), 60)}, neither a text nor a number "
        "nor messages; write it as a text"
    )


@contextmanager
def _naming(index: int) -> Iterator[None]:
    """Puts the record before what a ValueError says."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"record {index} of the data: {error}") from error


def _require_template(template: ChatTemplate | None) -> ChatTemplate:
    if template is None:
        raise ValueError(
            "data.template=null, and the model has no chat template of its own: choose "
            f"one of {', '.join(TEMPLATES)}, or give a .jinja file"
        )
    return template
