"""What a line typed into a chat asks for: a message, or a command after a slash."""

import difflib
import json
import math
import os
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from relax.sampling import SamplingConfig
from relax.tasks.conversation import Conversation, read_messages, write_messages


class Answer(NamedTuple):
    """What a line brings: words about it, a reply of the model, the end of the chat."""

    note: str = ""
    reply: Iterator[str] | None = None
    leave: bool = False


class Command(NamedTuple):
    """A command: what it takes, what it does in words, and the function for it."""

    arguments: str
    help: str
    run: Callable[[Conversation, str], Answer]


def respond(line: str, conversation: Conversation) -> Answer:
    """Returns what a line asks for.

    "/name rest" is a command, and any other line a message, "//" at its start being
    written for one slash. Raises ValueError, in words for the user, where it can't be.
    """
    if not line.startswith("/"):
        return Answer(reply=conversation.say(line))
    if line.startswith("//"):
        return Answer(reply=conversation.say(line[1:]))
    name, _, rest = line[1:].partition(" ")
    if name not in COMMANDS:
        raise ValueError(
            f"/{name} is no command; {_nearest(name, COMMANDS, '/')} (a message that "
            'begins with a slash is written with "//")'
        )
    return COMMANDS[name].run(conversation, rest.strip())


def changed(sampling: SamplingConfig, name: str, text: str) -> SamplingConfig:
    """Returns `sampling` with one field read from text by the field's type."""
    types = typing.get_type_hints(SamplingConfig)
    if name not in types:
        raise ValueError(f"sampling.{name} is no setting; {_nearest(name, types)}")
    parse, words = _PARSERS[types[name]]
    try:
        value = parse(text)
    except ValueError:
        raise ValueError(f"sampling.{name}={text!r} must be {words}") from None
    return replace(sampling, **{name: value})


def _nearest(name: str, known: typing.Iterable[str], prefix: str = "") -> str:
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f"did you mean {prefix}{near[0]}?"
    return f"known: {', '.join(prefix + each for each in known)}"


def _boolean(text: str) -> bool:
    value = json.loads(text)
    if not isinstance(value, bool):
        raise ValueError(text)
    return value


def _list_of(kind: type) -> Callable[[str], tuple]:
    def parse(text: str) -> tuple:
        values = json.loads(text)
        if not isinstance(values, list) or any(type(v) is not kind for v in values):
            raise ValueError(text)
        return tuple(values)

    return parse


def _biases(text: str) -> Mapping[int, float]:
    pairs = json.loads(text)
    try:
        pairs = pairs.items() if isinstance(pairs, dict) else pairs
        return {int(token): float(bias) for token, bias in pairs}
    except TypeError:
        raise ValueError(text) from None


def _text(text: str) -> str | None:
    """Returns a word as it stands, or what JSON writes."""
    quoted = text == "null" or text.startswith('"')
    return json.loads(text) if quoted else text


_PARSERS: dict[Any, tuple[Callable, str]] = {
    int: (int, "a whole number"),
    float: (float, "a number"),
    bool: (_boolean, "true or false"),
    str: (_text, "a word"),
    str | None: (_text, "a word or null"),
    tuple[str, ...]: (_list_of(str), r'a list of strings, such as ["\n\n", "End"]'),
    tuple[int, ...]: (_list_of(int), "a list of ids, such as [2, 13]"),
    dict[int, float] | None: (_biases, 'numbers by id, such as {"5": -100.0}'),
}


def _help(conversation: Conversation, rest: str) -> Answer:
    uses = {f"/{name} {c.arguments}": c.help for name, c in COMMANDS.items()}
    width = max(map(len, uses))
    return Answer("\n".join(f"{use:{width}}  {text}" for use, text in uses.items()))


def _exit(conversation: Conversation, rest: str) -> Answer:
    return Answer(leave=True)


def _clear(conversation: Conversation, rest: str) -> Answer:
    conversation.clear()
    return Answer("a new conversation")


def _system(conversation: Conversation, rest: str) -> Answer:
    conversation.set_system(rest or None)
    return Answer("system message set" if rest else "no system message")


def _set(conversation: Conversation, rest: str) -> Answer:
    name, _, text = rest.partition(" ")
    if text:
        conversation.sampling = changed(conversation.sampling, name, text.strip())
    elif name:
        raise ValueError(f"/set {name} lacks a value; /set alone shows all")
    shown = [name] if name else [field.name for field in fields(SamplingConfig)]
    return Answer("\n".join(_setting(conversation.sampling, each) for each in shown))


def _setting(sampling: SamplingConfig, name: str) -> str:
    """Returns a field as `changed` reads it."""
    value = getattr(sampling, name)
    return f"{name} {json.dumps(value, ensure_ascii=False)}"


def _retry(conversation: Conversation, rest: str) -> Answer:
    return Answer(reply=conversation.retry())


def _save(conversation: Conversation, rest: str) -> Answer:
    path = _path("save", rest)
    write_messages(path, conversation.messages)
    return Answer(f"{path}: {len(conversation.messages)} messages written")


def _load(conversation: Conversation, rest: str) -> Answer:
    path = _path("load", rest)
    conversation.load(read_messages(path))
    messages = conversation.messages
    unanswered = messages and messages[-1]["role"] == "user"
    more = "; /retry answers the last" if unanswered else ""
    return Answer(f"{path}: {len(messages)} messages read{more}")


def _path(command: str, rest: str) -> Path:
    if not rest:
        raise ValueError(f"/{command} lacks a file")
    # Path.expanduser gives up the program for a user who is not there.
    return Path(os.path.expanduser(rest))


def _stats(conversation: Conversation, rest: str) -> Answer:
    turn = conversation.turn
    if turn is None:
        raise ValueError("there has been no reply yet")
    pace = turn.tokens_per_second
    at = "" if math.isnan(pace) else f" at {pace:.1f} tokens/s"
    return Answer(
        f"last turn: {turn.prefilled} tokens prefilled, {turn.reused} reused from the "
        f"cache, {turn.made} made{at}, the first after {turn.first_seconds:.2f} s\n"
        f"context: {turn.prompt + turn.made} of {conversation.context} tokens used; "
        f"turns: {conversation.turns}"
    )


COMMANDS: dict[str, Command] = {
    "help": Command("", "shows this", _help),
    "exit": Command("", "leaves, as Ctrl-D does", _exit),
    "clear": Command("", "begins anew, the system message kept", _clear),
    "system": Command(
        "TEXT", "sets the system message; without TEXT takes it away", _system
    ),
    "set": Command("NAME VALUE", "changes the sampling; alone shows it", _set),
    "retry": Command("", "makes another reply in the last one's place", _retry),
    "save": Command("FILE", "writes the conversation as JSON", _save),
    "load": Command("FILE", "goes on with a saved conversation", _load),
    "stats": Command("", "tells what the last reply took", _stats),
}
