"""One record as tokens, and how much each of them weighs in the loss."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import numpy as np

from relax.data.forms import both_alike, read_tools
from relax.data.records import Record

Message = Mapping[str, Any]
Tools = Sequence[Mapping[str, Any]] | None  # JSON schemas of what may be called


class Tokenizer(Protocol):
    """What this room needs of a tokenizer that writes conversations."""

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    bos_token: str | None
    special_tokens: Mapping[str, int]
    fingerprint: str

    def encode(self, text: str) -> list[int]: ...

    def token_bytes(self, token_id: int) -> bytes: ...


class Template(Protocol):
    """What this room needs of a chat template."""

    name: str
    source: str
    variables: Mapping[str, str]
    has_generation_marks: bool

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        tools: Tools = None,
    ) -> list[int]: ...

    def encode_with_mask(
        self, tokenizer: Tokenizer, messages: Sequence[Message], *, tools: Tools = None
    ) -> tuple[list[int], list[bool]]: ...


class Encoded(NamedTuple):
    """A record's tokens, and the weight of each one as a target."""

    tokens: list[int]
    weights: np.ndarray


@dataclass(frozen=True, kw_only=True)
class RecordEncoder:
    """From a record to its tokens and weights.

    loss_on: one of `relax.data.records.LOSS_ON`.
      assistant: what the assistant says, each end of turn included. It is what stands
        in the template's generation marks; where it has none, what the conversation up
        to a turn, with its header, lacks of the conversation up to the turn's end.
      last_turn: of that, the last.
      completion: all after the prompt, which is all before the last thing that the
        assistant says, with its header.
      all: every token.
      auto: assistant for messages, completion for a prompt, all for a text.
    The first token has nothing before it that it could be predicted from, and weighs 0
    always. A message's `weight` multiplies those of its tokens.
    as_messages: a prompt and a completion that are texts become messages; where only
    one of them is a text, it always does. A plain text begins with `bos_id` and ends
    with `eos_id`, where the tokenizer has them; a plain completion begins where its
    prompt, encoded alone, ceases to be the start of both, as in TRL 1.16.

    Raises ValueError for a record that has not what `loss_on` asks for; in the
    assistant modes, that has nothing or everything in the loss; for two BOS; and for a
    template that a turn's place cannot be told by.
    """

    tokenizer: Tokenizer
    template: Template | None
    loss_on: str
    as_messages: bool
    template_names: Sequence[str] = ()

    def __call__(self, record: Record) -> Encoded:
        if "messages" in record:
            tokens, weights = self._chat(record, record["messages"], None)
        elif "prompt" in record:
            tokens, weights = self._prompted(record)
        else:
            tokens, weights = self._plain("", record["text"], "all")
        bos = self.tokenizer.bos_id
        if bos is not None and len(tokens) > 2 and tokens[:2] == [bos, bos]:
            raise ValueError(
                f"it begins with two BOS ({self._name_of(bos)}, id {bos}); let the "
                "chat template write one"
            )
        weights[:1] = 0
        return Encoded(tokens, weights)

    def _prompted(self, record: Record) -> Encoded:
        prompt, completion = record["prompt"], record.get("completion")
        if completion is None:
            raise ValueError("it has a prompt and no completion to be trained on")
        prompt, completion = both_alike(prompt, completion)
        if isinstance(prompt, str):
            if not self.as_messages:
                return self._plain(prompt, completion, "completion")
            prompt = [{"role": "user", "content": prompt}]
            completion = [{"role": "assistant", "content": completion}]
        return self._chat(record, [*prompt, *completion], len(prompt))

    def _plain(self, prompt: str, completion: str, usual: str) -> Encoded:
        mode = usual if self.loss_on == "auto" else self.loss_on
        if mode not in ("all", usual):
            raise ValueError(
                f"it is plain text, which has no part for data.loss_on={mode}; use "
                "data.loss_on=auto, or set data.template for prompts with completions"
            )
        bos, eos = self.tokenizer.bos_id, self.tokenizer.eos_id
        # A text that spells the end of text is taken at its word, as TRL does.
        text = (prompt + completion).removesuffix(self._name_of(eos))
        self._check_spelled_bos(text, has_bos=bos is not None)
        body = self.tokenizer.encode(text)
        first = [bos] if body and bos is not None else []
        tokens = first + body + ([eos] if body and eos is not None else [])
        start = 0
        if mode == "completion":
            start = len(first) + _shared(self.tokenizer.encode(prompt), body)
        return Encoded(tokens, (np.arange(len(tokens)) >= start).astype(np.float32))

    def _chat(
        self, record: Record, messages: Sequence[Message], prompt: int | None
    ) -> Encoded:
        """prompt: how many of the messages are it; None: all before the last reply."""
        tools = read_tools(record.get("tools"))
        if self.template is None:
            raise ValueError(
                "data.template=null, and the model has no chat template: choose one of "
                f"{', '.join(self.template_names)}, or give a .jinja file"
            )
        usual = "assistant" if prompt is None else "completion"
        mode = usual if self.loss_on == "auto" else self.loss_on
        chat = Chat(self.tokenizer, self.template, messages, tools)
        if mode == "all":
            encoded = chat.whole()
        elif mode == "completion":
            encoded = chat.after(prompt)
        else:
            encoded = chat.said(last_only=mode == "last_turn")
        has_bos = encoded.tokens[:1] == [self.tokenizer.bos_id]
        self._check_spelled_bos(messages[0]["content"], has_bos=has_bos)
        if mode != "all":
            whole = encoded.weights[int(has_bos) :] > 0
            if not whole.any():
                raise ValueError(f"data.loss_on={mode} leaves nothing in the loss")
            if whole.all() and mode != "completion":
                raise ValueError(
                    f"data.loss_on={mode} leaves everything in the loss, with chat "
                    f"template {self.template.name}: it tells no turn from another"
                )
        return encoded

    def _name_of(self, token_id: int | None) -> str:
        names = self.tokenizer.special_tokens.items()
        return next((name for name, i in names if i == token_id), "")

    def _check_spelled_bos(self, text: str, *, has_bos: bool) -> None:
        name = self.tokenizer.bos_token
        if has_bos and name and text.startswith(name):
            raise ValueError(
                f"it begins with two BOS: its text spells {name}, and one is put "
                "before it; take it out of the text"
            )


class Chat:
    """A conversation as a template writes it, and where its messages stand in it."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: Template,
        messages: Sequence[Message],
        tools: Tools = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._tools = tools
        self._messages = [
            {key: v for key, v in message.items() if key != "weight"}
            for message in messages
        ]
        self._weights = [message.get("weight", 1.0) for message in messages]
        self._replies = [
            i for i, message in enumerate(messages) if message["role"] == "assistant"
        ]

    def whole(self) -> Encoded:
        """Returns every token with its message's weight."""
        tokens = self._encode(len(self._messages))
        return Encoded(tokens, self._by_message(tokens, self._weights))

    def after(self, prompt: int | None) -> Encoded:
        """Returns weights for all after that many messages and the reply's header.

        None: after those before the last reply.
        """
        if prompt is None:
            prompt = self._first_of(self._replies[-1:])
        tokens = self._encode(len(self._messages))
        if self._template.has_generation_marks:
            start = _shared(self._encode(prompt, header=True), tokens)
        else:
            start = self._place(tokens, prompt, header=True)
        weights = [self._weights[prompt]] * prompt + self._weights[prompt:]
        by_token = self._by_message(tokens, weights)
        by_token[:start] = 0
        return Encoded(tokens, by_token)

    def said(self, *, last_only: bool) -> Encoded:
        """Returns weights for what the assistant says, or for the last of it."""
        trained = self._replies[-1:] if last_only else self._replies
        self._first_of(trained)
        weights = [w if i in trained else 0.0 for i, w in enumerate(self._weights)]
        if self._template.has_generation_marks:
            tokens, marked = self._encode_marked(len(self._messages))
            return Encoded(tokens, self._by_reply(tokens, marked, weights) * marked)
        tokens = self._encode(len(self._messages))
        by_token = np.zeros(len(tokens), np.float32)
        for i in trained:
            if weights[i]:
                start = self._place(tokens, i, header=True)
                by_token[start : self._place(tokens, i + 1)] = weights[i]
        return Encoded(tokens, by_token)

    def _first_of(self, replies: Sequence[int]) -> int:
        if not replies:
            raise ValueError("it has no message of the assistant's to be trained on")
        return replies[0]

    def _encode(self, count: int, *, header: bool = False) -> list[int]:
        return self._template.encode(
            self._tokenizer,
            self._messages[:count],
            add_generation_prompt=header,
            tools=self._tools,
        )

    def _encode_marked(self, count: int) -> tuple[list[int], np.ndarray]:
        tokens, marked = self._template.encode_with_mask(
            self._tokenizer, self._messages[:count], tools=self._tools
        )
        return tokens, np.asarray(marked, bool)

    def _place(self, tokens: Sequence[int], count: int, *, header: bool = False) -> int:
        """Returns how many of the tokens are those of the first `count` messages.

        header: and what the template writes before a reply.
        """
        if not header and count in (0, len(self._messages)):
            return len(tokens) if count else 0
        before = self._encode(count, header=header)
        if before != tokens[: len(before)]:
            raise ValueError(
                f"chat template {self._template.name} writes the first {count} of its "
                "messages otherwise alone than in the whole, so that the place of a "
                "turn is unknown: put {% generation %} marks around what the assistant "
                "says there, or choose another template or data.loss_on=all"
            )
        return len(before)

    def _by_message(
        self, tokens: Sequence[int], weights: Sequence[float]
    ) -> np.ndarray:
        """Returns for each token the weight of the message that it stands in."""
        by_token = np.full(len(tokens), weights[0], np.float32)
        for i, (before, weight) in enumerate(pairwise(weights), start=1):
            if weight != before:  # other places need not be known
                by_token[self._place(tokens, i) :] = weight
        return by_token

    def _by_reply(
        self, tokens: Sequence[int], marked: np.ndarray, weights: Sequence[float]
    ) -> np.ndarray:
        """Returns for each marked token the weight of its reply."""
        of_replies = np.array([weights[i] for i in self._replies], np.float32)
        if (of_replies == of_replies[0]).all():
            return np.full(len(tokens), of_replies[0])
        if self._has_span_each(marked):
            begun = np.cumsum(_begins(marked))
            return of_replies[np.maximum(begun - 1, 0)]
        # Replies that nothing parts, or of several marked spans. Messages between them
        # have no marks, and so may take the weight of the reply before.
        carried = np.maximum.accumulate(
            [i if i in self._replies else self._replies[0] for i in range(len(weights))]
        )
        return self._by_message(tokens, [weights[i] for i in carried])

    def _has_span_each(self, marked: np.ndarray) -> bool:
        """Whether every reply surely stands in one marked span of its own.

        What is before a reply has as many spans as replies then, for each of them: an
        empty reply and one of two spans make up for each other in the whole alone.
        """
        if _begins(marked).sum() != len(self._replies):
            return False
        try:
            return all(
                _begins(self._encode_marked(i)[1]).sum() == count
                for count, i in enumerate(self._replies[1:], start=1)
            )
        except ValueError:  # the template refuses a part of the conversation
            return False


def _begins(marked: np.ndarray) -> np.ndarray:
    """Returns where a span of marked tokens begins."""
    return np.diff(marked.astype(np.int8), prepend=0) == 1


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    """Returns the length of the longest common prefix."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))
