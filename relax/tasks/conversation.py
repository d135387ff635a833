"""A conversation with a model: its messages, the replies to them, and their cache."""

import contextlib
import functools
import json
import math
import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import jax

from relax.generation.requests import Completion
from relax.language_model import STREAM_CHUNK, LanguageModel
from relax.sampling import SamplingConfig
from relax.tasks.files import write_lines
from relax.tasks.options import chosen_context
from relax.text.chat import ChatTemplate
from relax.text.detokenizer import StreamingDetokenizer


@dataclass
class Turn:
    """What one reply took; complete once its pieces have been taken.

    prompt: tokens of the conversation that it answers, of which `reused` were in the
    cache and `prefilled` were run. dropped: the oldest turns that left to make room.
    made: tokens of the reply. first_seconds: until its first tokens, `first_made` of
    them. cut: the limit that ended the reply, in words, where one did.
    """

    prompt: int
    dropped: int
    prefilled: int = 0
    reused: int = 0
    made: int = 0
    first_made: int = 0
    first_seconds: float = math.nan
    seconds: float = math.nan
    cut: str = ""

    @property
    def tokens_per_second(self) -> float:
        """The pace after the first tokens, which wait for the prompt; NaN if none."""
        seconds = self.seconds - self.first_seconds
        after = self.made - self.first_made
        return after / seconds if after and seconds > 0 else math.nan


class _Entry(NamedTuple):
    """A message, and the ids a reply was generated as (None where its text rules)."""

    message: dict
    ids: list[int] | None = None

    @property
    def role(self) -> str:
        return self.message["role"]


class Conversation:
    """Messages that grow by a question and its reply; nothing fails half done.

    context: the most tokens that a prompt and its reply can have. `sampling` may be
    replaced between replies. `turn` is the last reply's record. A reply is an iterator
    of pieces of text: it belongs to the conversation as far as it was made, whether it
    ended by itself or was closed.
    """

    def __init__(
        self,
        model: LanguageModel,
        template: ChatTemplate,
        sampling: SamplingConfig,
        context: int | None = None,
    ):
        """`context`: null is the model's; raises ValueError where that has fewer."""
        self.sampling = sampling
        self.context = chosen_context(context, model.config)
        self.turn: Turn | None = None
        self._model = model
        self._template = template
        self._session = model.session()
        ids, self._stop_strings = template.end_of_turn(model.tokenizer)
        self._stop_ids = (*model.stop_ids, *ids)
        self._entries: list[_Entry] = []
        self._sample_index = 0

    @property
    def messages(self) -> list[dict]:
        return [entry.message for entry in self._entries]

    @property
    def turns(self) -> int:
        """The number of messages of the user."""
        return sum(entry.role == "user" for entry in self._entries)

    def say(self, text: str) -> Iterator[str]:
        """Returns the reply to a message of the user.

        Raises ValueError, the conversation as it was, where the template refuses the
        message or the context can't hold it.
        """
        message = {"role": "user", "content": text}
        return self._reply([*self._entries, _Entry(message)], sample_index=0)

    def retry(self) -> Iterator[str]:
        """Returns another reply, the next sample, in the last one's place.

        Raises ValueError where there is no message to answer.
        """
        entries, sample_index = list(self._entries), 0
        if entries and entries[-1].role == "assistant":
            entries.pop()
            sample_index = self._sample_index + 1
        if not entries or entries[-1].role != "user":
            raise ValueError("there is no message to answer again")
        return self._reply(entries, sample_index)

    def clear(self) -> None:
        """Forgets all but the system message."""
        self._entries = _head(self._entries)
        self.turn = None

    def set_system(self, text: str | None) -> None:
        """Sets the system message, or takes it away (None).

        Raises ValueError, the one before kept, where the template refuses it.
        """
        head = []
        if text is not None:
            head = [_Entry({"role": "system", "content": text})]
        self._check([entry.message for entry in head])
        self._entries = [*head, *self._entries[len(_head(self._entries)) :]]

    def load(self, messages: Sequence[dict]) -> None:
        """Takes messages (see `read_messages`) in the place of its own.

        Raises ValueError, its own kept, where the template refuses them.
        """
        self._check(messages)
        self._entries = [_Entry(message) for message in messages]
        self._sample_index, self.turn = 0, None

    def _check(self, messages: Sequence[dict]) -> None:
        """Raises ValueError where the template refuses what a user may yet answer."""
        messages = list(messages)
        if not messages or messages[-1]["role"] != "user":
            messages.append({"role": "user", "content": "?"})
        self._template.render(messages, add_generation_prompt=True)

    def _reply(self, entries: list[_Entry], sample_index: int) -> Iterator[str]:
        """Returns the pieces of a reply to `entries`, which are taken over at once."""
        entries, tokens, dropped = self._fitted(entries)
        room, wanted = self.context - len(tokens), self.sampling.max_new_tokens
        limit = f"sampling.max_new_tokens={wanted}"
        if room < wanted:
            limit = f"the context of {self.context} tokens"
        sampling = replace(
            self.sampling,
            max_new_tokens=min(room, wanted),
            min_new_tokens=min(room, self.sampling.min_new_tokens),
        )
        pieces = self._session.reply(
            self._model.params,
            tokens,
            sampling,
            sample_index=sample_index,
            limit=STREAM_CHUNK,
            stop_ids=self._stop_ids,
            stop_strings=self._stop_strings,
        )
        before = self._entries, self._sample_index, self.turn
        self._entries, self._sample_index = entries, sample_index
        self.turn = Turn(prompt=len(tokens), dropped=dropped)
        return self._stream(pieces, tokens, limit, self.turn, before)

    def _fitted(self, entries: list[_Entry]) -> tuple[list[_Entry], list[int], int]:
        """Returns what stays of a conversation, its tokens, and the turns left out.

        All of it stays while it leaves room for a reply. Then the oldest turns, never
        the system message, go until half of the context is free, so that the replies
        that follow find in the cache what stays. Only the last turn may take more.
        Raises ValueError where not even that fits.
        """
        reserved = min(self.sampling.max_new_tokens, max(1, self.context // 4))
        room, dropped = self.context - reserved, 0
        tokens = functools.cache(lambda n: self._encode(_without(entries, n)))
        if len(tokens(0)) > room:
            last = sum(entry.role == "user" for entry in entries) - 1
            dropped = bisect_left(
                range(last), True, key=lambda n: len(tokens(n)) <= self.context // 2
            )
        if len(tokens(dropped)) > room:
            raise ValueError(
                f"the message takes {len(tokens(dropped))} tokens, and the context of "
                f"{self.context} leaves {room} beside {reserved} for a reply; shorten "
                "it"
            )
        return _without(entries, dropped), tokens(dropped), dropped

    def _encode(self, entries: list[_Entry]) -> list[int]:
        return self._template.encode(
            self._model.tokenizer,
            [entry.message for entry in entries],
            add_generation_prompt=True,
            replies={i: e.ids for i, e in enumerate(entries) if e.ids is not None},
        )

    def _stream(
        self,
        pieces: Iterator[str],
        tokens: list[int],
        limit: str,
        turn: Turn,
        before: tuple[list[_Entry], int, Turn | None],
    ) -> Iterator[str]:
        """Yields a reply; records it at its end, or where it is closed.

        Where the device fails, as for lack of memory, all is as it was before.
        """
        started, ended = time.perf_counter(), True
        try:
            with contextlib.closing(pieces):
                for piece in pieces:
                    if not turn.first_made:
                        turn.first_made = len(self._session.completion.token_ids)
                        turn.first_seconds = time.perf_counter() - started
                    yield piece
        except GeneratorExit:
            ended = False
        except jax.errors.JaxRuntimeError:
            self._entries, self._sample_index, self.turn = before
            raise
        turn.seconds = time.perf_counter() - started
        self._record(tokens, turn, limit, ended)

    def _record(self, tokens: list[int], turn: Turn, limit: str, ended: bool) -> None:
        """Puts the reply that the session holds into the conversation."""
        completion = self._session.completion
        turn.prefilled, turn.reused = self._session.prefilled, self._session.reused
        turn.made = len(completion.token_ids)
        if ended and completion.finish_reason == "length":
            turn.cut = limit
            ids = list(completion.token_ids)
        else:
            ids = self._ids_of_text(tokens, completion)
        message = {"role": "assistant", "content": completion.text}
        self._entries = [*self._entries, _Entry(message, ids)]

    def _ids_of_text(
        self, prompt: list[int], completion: Completion
    ) -> list[int] | None:
        """Returns the ids that gave the text, those of the end of the turn left out.

        None where the text ends inside a token, as before a stop string.
        """
        ids = completion.token_ids
        if completion.finish_reason == "stop" and ids[-1] in self._stop_ids:
            return ids[:-1]
        detokenizer = StreamingDetokenizer(self._model.tokenizer)
        detokenizer.add(prompt)
        text = ""
        for count, token in enumerate(ids):
            if text == completion.text:
                return ids[:count]
            text += detokenizer.add([token])
        return list(ids) if text == completion.text else None


def _without(entries: list[_Entry], dropped: int) -> list[_Entry]:
    """Returns a conversation without its oldest turns, the system message kept."""
    if not dropped:
        return entries
    starts = [i for i, entry in enumerate(entries) if entry.role == "user"]
    return [*_head(entries), *entries[starts[dropped] :]]


def _head(entries: list[_Entry]) -> list[_Entry]:
    """Returns the system message, in a list, or an empty one."""
    return [entry for entry in entries[:1] if entry.role == "system"]


def write_messages(path: Path, messages: Sequence[dict]) -> None:
    """Writes messages as JSON, complete or not at all.

    Raises ValueError where the file can't be written.
    """
    text = json.dumps({"messages": list(messages)}, ensure_ascii=False, indent=2)
    try:
        write_lines(path, [text])
    except OSError as error:
        raise ValueError(f"{path} can't be written: {error.strerror}") from None


def read_messages(path: Path) -> list[dict]:
    """Returns the messages that `write_messages` wrote.

    Raises ValueError where the file holds none, or can't be read.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ValueError(f"{path} can't be read: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    messages = content.get("messages") if isinstance(content, dict) else None
    if not isinstance(messages, list):
        raise ValueError(f'{path} holds no list under "messages"')
    for index, message in enumerate(messages):
        fields = message if isinstance(message, dict) else {}
        if not all(isinstance(fields.get(key), str) for key in ("role", "content")):
            raise ValueError(
                f'{path}: message {index} has no texts under "role" and "content"'
            )
    return messages
