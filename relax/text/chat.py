"""Chat templates: messages to text and ids, each special token from the template.

`render` gives the text that transformers renders. `encode` gives its ids, where what
the messages spell is ordinary text, and what the template writes is all there is: no
BOS or EOS beside its own.
"""

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from relax.text.base import Tokenizer
from relax.text.chat_files import (
    TEMPLATE_FILE,
    VARIABLES_FILE,
    find_template,
    token_variables,
)
from relax.text.chat_marks import (
    Marks,
    Span,
    changed_message,
    split_at,
    strings_in,
    take_spans,
    with_strings,
)
from relax.text.chat_replies import find_reply, replace_spans
from relax.text.files import read_json, read_text

logger = logging.getLogger(__name__)

TEMPLATES = ("chatml", "llama2", "llama3", "mistral", "plain")
_FOLDER = Path(__file__).with_name("templates")
_UNSET = {"tools": None, "documents": None, "add_generation_prompt": False}

Message = Mapping[str, object]


class _Chat(NamedTuple):
    """What a template renders; the variables are those besides its own."""

    messages: Sequence[Message]
    variables: Mapping[str, object] = {}

    def with_content(self, index: int, content: str) -> "_Chat":
        messages = list(self.messages)
        messages[index] = {**messages[index], "content": content}
        return self._replace(messages=messages)

    def with_assistant(self, marks: Marks) -> "_Chat":
        """Returns it with marks for the added tokens that an assistant has written."""
        messages = [
            changed_message(m, marks.mark_added) if m.get("role") == "assistant" else m
            for m in self.messages
        ]
        return self._replace(messages=messages)


class ChatTemplate:
    """A Jinja template, with the variables that it knows besides the messages.

    Its errors are ValueErrors that name it: here where it is not Jinja, and in its
    methods where it refuses the messages (in its own words) or fails on them. Other
    variables go to its methods by name, such as `tools`, the JSON schemas of what the
    assistant may call, which it sees as they are, as from transformers 5.23.
    """

    def __init__(
        self, source: str, *, name: str, variables: Mapping[str, str] | None = None
    ) -> None:
        """`name` is what errors call it; `variables` are bos_token and the like."""
        self.source = source
        self.name = name
        self.variables = dict(variables or {})
        _ = self.has_generation_marks  # parses it

    @cached_property
    def has_generation_marks(self) -> bool:
        """Whether it tells which part of a text an assistant makes."""
        from relax.text.chat_rendering import check_template

        return check_template(self.source, self.name)

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        **variables: object,
    ) -> str:
        """Returns the text of a conversation, as transformers 5.23 renders it."""
        variables["add_generation_prompt"] = add_generation_prompt
        return self._render(_Chat(messages, variables), Marks({}), ("", ""))

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        replies: Mapping[int, Sequence[int]] | None = None,
        **variables: object,
    ) -> list[int]:
        """Returns the ids of a conversation.

        replies: by index, the ids that a message was generated as. They are taken as
        they are where the template shows what they say unchanged.
        """
        variables["add_generation_prompt"] = add_generation_prompt
        chat = _Chat(messages, variables)
        marks = self._marks(tokenizer, chat)
        text, _ = self._marked(chat, marks)
        text, spliced = self._splice(tokenizer, chat, marks, text, replies or {})
        ids, spliced_before = [], False
        for _, piece in split_at(text, {*marks.ids, *spliced}):
            if piece in marks.ids:
                ids.append(marks.ids[piece])
            elif piece in spliced:
                ids += spliced[piece]
            else:
                inside = spliced_before or _goes_on(tokenizer, ids)
                for start, part in marks.cut_added(piece):
                    ids += tokenizer.encode(part, inside=inside or start > 0)
            spliced_before = piece in spliced
        return ids

    def encode_with_mask(
        self, tokenizer: Tokenizer, messages: Sequence[Message], **variables: object
    ) -> tuple[list[int], list[bool]]:
        """Returns the ids of a conversation, and which of them an assistant makes.

        Those are the ones with a character inside the template's generation marks.
        Raises ValueError where it has none.
        """
        if not self.has_generation_marks:
            raise ValueError(
                f"chat template {self.name} has no {{% generation %}} marks, which "
                "tell what the assistant makes; put them in, or take one of "
                f"{', '.join(TEMPLATES)}"
            )
        chat = _Chat(messages, variables)
        marks = self._marks(tokenizer, chat)
        text, spans = self._marked(chat, marks)
        ids, mask = [], []
        for start, piece in split_at(text, marks.ids):
            if piece in marks.ids:
                ids.append(marks.ids[piece])
                mask.append(_overlaps(start, start + 1, spans))
                continue
            inside = _goes_on(tokenizer, ids)
            for at, part in marks.cut_added(piece):
                new, offsets = tokenizer.encode_with_offsets(
                    part, inside=inside or at > 0
                )
                at += start
                ids += new
                mask += [_overlaps(at + a, at + b, spans) for a, b in offsets]
        return ids, mask

    def end_of_turn(
        self, tokenizer: Tokenizer
    ) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """Returns the stop ids and the stop strings that end what an assistant says.

        There is one of the two: the special token that the template writes after it,
        or else the text at the conversation's end or before the user's next words.
        """
        marks = self._marks(tokenizer, _Chat([]))
        question, answer, more = marks.new(), marks.new(), marks.new()
        said = (("user", question), ("assistant", answer), ("user", more))
        turns = [{"role": role, "content": content} for role, content in said]
        ended, _ = self._marked(_Chat(turns[:2]), marks)
        going_on, _ = self._marked(_Chat(turns), marks)
        starts = {tokenizer.bos_id} - {tokenizer.eos_id}  # a turn, and ends none
        for text, strip in ((ended, str.strip), (going_on, str.rstrip)):
            after = text.rpartition(answer)[2] if answer in text else ""
            after = after.partition(more)[0]
            special = [marks.ids[c] for c in after if c in marks.ids]
            if ids := [token_id for token_id in special if token_id not in starts]:
                return (ids[0],), ()
            if string := strip("".join(c for c in after if c not in marks.ids)):
                return (), (string,)
        return (), ()

    def save(self, folder: Path) -> None:
        """Writes all that `load_template` needs: the template and its variables."""
        self.save_hf(folder)
        text = json.dumps(self.variables, ensure_ascii=False, indent=2) + "\n"
        (folder / VARIABLES_FILE).write_text(text, encoding="utf-8")

    def save_hf(self, folder: Path) -> None:
        """Writes the template as transformers reads it, without its variables."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / TEMPLATE_FILE).write_text(self.source, encoding="utf-8")

    def _marks(self, tokenizer: Tokenizer, chat: _Chat) -> Marks:
        given = chat.messages, chat.variables, self.variables
        added = {
            name: token_id
            for name, token_id in tokenizer.added_tokens.items()
            if len(name) > 1 and name in self.source  # one character can't be cut
        }
        texts = [self.source, *strings_in(given)]
        return Marks(tokenizer.special_tokens, texts, added)

    def _render(self, chat: _Chat, marks: Marks, span_marks: tuple[str, str]) -> str:
        from relax.text.chat_rendering import render_template

        context = {**_UNSET, **self.variables, **chat.variables}
        for name in self.variables:
            if isinstance(context[name], str):
                context[name] = marks.mark(context[name])
        context["messages"] = chat.messages
        return render_template(
            self.source, self.name, context, marks.literals, span_marks
        )

    def _marked(self, chat: _Chat, marks: Marks) -> tuple[str, list[Span]]:
        """Returns the text, with a mark for each special token of the template's.

        Also returns the spans of its generation blocks.
        """
        chat = chat.with_assistant(marks)
        text = self._render(chat, marks, marks.spans)
        if marks.mark(text) != text:
            text = self._mark_assembled(chat, marks, text)
        return take_spans(text, marks.spans)

    def _mark_assembled(self, chat: _Chat, marks: Marks, text: str) -> str:
        """Returns a text with marks for what the template puts together, as <|role|>.

        To tell that from what messages spell, they are rendered with other characters
        for those of special tokens, except roles and what stands in variables, such
        as a tool's type, of one word. Where this changes more than the characters,
        nothing is marked.
        """

        def disguised(text: str) -> str:
            return text.translate(table)

        def by_words(text: str) -> str:
            return text if text.isidentifier() else disguised(text)

        table = str.maketrans(marks.disguise)
        messages = [changed_message(m, disguised) for m in chat.messages]
        variables = {
            name: value if name in self.variables else with_strings(value, by_words)
            for name, value in chat.variables.items()
        }
        try:
            other = self._render(_Chat(messages, variables), marks, marks.spans)
        except ValueError:  # it looks into what the words say
            return text
        back = str.maketrans({mark: c for c, mark in marks.disguise.items()})
        same = other.translate(back) == text
        return marks.mark(other).translate(back) if same else text

    def _splice(
        self,
        tokenizer: Tokenizer,
        chat: _Chat,
        marks: Marks,
        text: str,
        replies: Mapping[int, Sequence[int]],
    ) -> tuple[str, dict[str, Sequence[int]]]:
        """Returns the text with a mark in each reply's place, and the marks' ids."""
        places, spliced = [], {}
        for index, ids in replies.items():
            mark = marks.new()
            alone, _ = self._marked(chat.with_content(index, mark), marks)
            content = chat.messages[index].get("content")
            place = find_reply(
                text, alone.partition(mark), tokenizer, ids, content, marks.mark_added
            )
            if len(ids) and place is not None:
                places.append((place, mark))
                spliced[mark] = ids
        return replace_spans(text, places), spliced


def named_template(
    name: str, tokenizer: Tokenizer, option: str = "task.template"
) -> ChatTemplate:
    """Returns one of `TEMPLATES`, or that of a .jinja file, for a tokenizer.

    Raises ValueError where there is none of that name, and FileNotFoundError, naming
    the `option` that gave it.
    """
    path = Path(name) if name.endswith(".jinja") else _FOLDER / f"{name}.jinja"
    if name not in TEMPLATES and not name.endswith(".jinja"):
        raise ValueError(
            f"{option}={name!r} is unknown; choose one of {', '.join(TEMPLATES)}, or "
            "give a .jinja file"
        )
    if not path.is_file():
        raise FileNotFoundError(f"{option}={name!r} is not a file")
    return ChatTemplate(read_text(path), name=name, variables=_bos_and_eos(tokenizer))


def ending_ids(
    stop_ids: Iterable[int], tokenizer: Tokenizer | None, template: ChatTemplate | None
) -> tuple[int, ...]:
    """Returns the ids that end a completion, in order.

    The checkpoint's `stop_ids`, the tokenizer's end of text, and what the template
    writes after an assistant's turn.
    """
    ids = set(stop_ids)
    if tokenizer is not None and tokenizer.eos_id is not None:
        ids.add(tokenizer.eos_id)
    if template is not None and tokenizer is not None:
        try:
            ids.update(template.end_of_turn(tokenizer)[0])
        except ValueError as error:  # it refuses a plain question and answer
            logger.warning("the template's end of turn isn't known: %s", error)
    return tuple(sorted(ids))


def load_template(folder: Path, tokenizer: Tokenizer) -> ChatTemplate | None:
    """Returns the chat template of a model's folder, None where it has none.

    Its special tokens are those that `ChatTemplate.save` wrote, or else those that the
    folder names, or else the tokenizer's own.
    Raises ValueError naming the file that can't be read.
    """
    found = find_template(folder)
    if found is None:
        return None
    source, name = found
    if (folder / VARIABLES_FILE).is_file():
        variables = read_json(folder / VARIABLES_FILE)
    else:
        variables = _bos_and_eos(tokenizer) | token_variables(folder)
    return ChatTemplate(source, name=name, variables=variables)


def _bos_and_eos(tokenizer: Tokenizer) -> dict[str, str]:
    special = tokenizer.special
    return {
        "bos_token": tokenizer.bos_token or "",
        "eos_token": special.name_of(special.eos_id) or "",
    }


def _goes_on(tokenizer: Tokenizer, ids: Sequence[int]) -> bool:
    """Whether a text after special tokens is not the start of one to the tokenizer."""
    return tokenizer.prefix_at_start_only and bool(ids)


def _overlaps(start: int, end: int, spans: Iterable[Span]) -> bool:
    return any(start < stop and end > begin for begin, stop in spans)
