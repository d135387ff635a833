"""The forms in which conversations are published, and the three that we keep.

A message is `{"role", "content"}`, its content a text, and may hold a `weight`, by
which the loss of its tokens is multiplied.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from relax.data.records import Record

Message = dict[str, Any]

# What ShareGPT's files call the roles.
_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "bard"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "function", "observation"), "tool"),
}
_WEIGHTS = ("weight", "loss_weight")  # OpenAI's name, LLaMA-Factory's


def normalise(
    record: Mapping[str, Any], form: str, index: int, *, chat: bool = False
) -> Record:
    """Returns a record in one of the forms of `relax.data.records`, other keys kept.

    form: one of `FORMS`; "auto" goes by the record's keys. chat: whether data.template
    is set, so that alpaca's tasks become messages: the instruction, an empty line and
    the input are what the user says. Otherwise they become a prompt with headings,
    `### Instruction:`, `### Input:` where there is one, and `### Response:`.

    Raises ValueError naming data.form and the record's `index`.
    """
    try:
        if form not in FORMS:
            raise ValueError(f"this form is unknown; choose one of {', '.join(FORMS)}")
        found = _recognise(record) if form == "auto" else form
        keys, optional, convert = _FORMS[found]
        missing = [key for key in keys if key not in record]
        if missing:
            raise ValueError(
                f"it has no {' and no '.join(missing)} (keys: {', '.join(record)})"
            )
        others = {k: v for k, v in record.items() if k not in (*keys, *optional)}
        return with_tools(others | convert(record, chat), chat=chat)
    except ValueError as error:
        raise ValueError(f"data.form={form}: record {index}: {error}") from None


def both_alike(
    prompt: object,
    completion: object,
    names: tuple[str, str] = ("prompt", "completion"),
) -> tuple[str | list[Message], str | list[Message] | None]:
    """Returns a prompt and its completion, both texts or both messages.

    Where one of them is messages, the other's text becomes one: a prompt what the user
    says, a completion what the assistant says. completion: None where there is none.
    names: what errors call them. Raises ValueError for what is neither.
    """
    if isinstance(prompt, str) and isinstance(completion, str | None):
        return prompt, completion
    asked = _as_messages(prompt, "user", names[0])
    if completion is None:
        return asked, None
    return asked, _as_messages(completion, "assistant", names[1])


def with_tools(record: Record, *, chat: bool = False) -> Record:
    """Returns a record whose `tools`, where it has messages, are a list or missing.

    In files they may be null, or JSON in a text. chat: whether prompts that are texts
    become messages. Raises ValueError for what is no list of objects.
    """
    if "tools" not in record or not is_chat(record, chat=chat):
        return record
    others = {key: value for key, value in record.items() if key != "tools"}
    tools = read_tools(record["tools"])
    return others if tools is None else others | {"tools": tools}


def is_chat(record: Record, *, chat: bool) -> bool:
    """Whether a record is or, with `chat`, becomes messages."""
    prompt = record.get("prompt")
    return "messages" in record or isinstance(prompt, list) or (chat and bool(prompt))


def read_tools(tools: object) -> list[Mapping[str, Any]] | None:
    """Returns the JSON schemas of a record's `tools`, as chat templates take them."""
    given = tools
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError:
            tools = given
    if tools is None:
        return None
    if not isinstance(tools, list) or not all(isinstance(t, Mapping) for t in tools):
        raise ValueError(
            f"tools={json.dumps(given)[:60]} is no list of JSON schemas; give "
            'one, like [{"type": "function", "function": {"name": ...}}], or leave '
            "tools out"
        )
    return tools


def _recognise(record: Mapping[str, Any]) -> str:
    for name, form in _FORMS.items():
        if all(key in record for key in form.keys):
            return name
    forms = (f"{name} ({', '.join(form.keys)})" for name, form in _FORMS.items())
    raise ValueError(
        f"its keys ({', '.join(record)}) are those of no form; rename them to those of "
        f"{', '.join(forms)}"
    )


def _messages(record: Mapping[str, Any], chat: bool) -> Record:
    return {"messages": _message_list(record["messages"], "messages")}


def _sharegpt(record: Mapping[str, Any], chat: bool) -> Record:
    turns = record["conversations"]
    if not isinstance(turns, list) or not turns:
        raise ValueError("conversations is no list of turns, or an empty one")
    if system := record.get("system"):
        turns = [{"from": "system", "value": system}, *turns]
    messages = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, Mapping):
            raise ValueError(f"turn {number} is no object")
        role = turn.get("from", turn.get("role"))
        if role not in _ROLES:
            raise ValueError(
                f"turn {number} is from {role!r}, not one of {', '.join(_ROLES)}"
            )
        rest = {k: v for k, v in turn.items() if k not in ("from", "value")}
        content = turn.get("value", turn.get("content"))
        messages.append(rest | {"role": _ROLES[role], "content": content})
    return {"messages": _message_list(messages, "conversations")}


def _prompt_completion(record: Mapping[str, Any], chat: bool) -> Record:
    """Both are texts, or both are messages; a completion may be missing."""
    if record["prompt"] is None:
        raise ValueError("its prompt is null")
    prompt, completion = both_alike(record["prompt"], record.get("completion"))
    parts = {"prompt": prompt}
    return parts if completion is None else parts | {"completion": completion}


def _alpaca(record: Mapping[str, Any], chat: bool) -> Record:
    task = {k: record.get(k) or "" for k in ("instruction", "input", "output")}
    for key, value in task.items():
        if not isinstance(value, str):
            raise ValueError(f"{key} is no text but a {type(value).__name__}")
    more = [key for key in ("system", "history") if record.get(key)]
    if chat:
        return {"messages": _alpaca_messages(record, task)}
    if more:
        raise ValueError(
            f"its {' and '.join(more)} can only be written by a chat template; set "
            "data.template"
        )
    parts = [f"### Instruction:\n{task['instruction']}"]
    if task["input"]:
        parts.append(f"### Input:\n{task['input']}")
    prompt = "\n\n".join([*parts, "### Response:\n"])
    return {"prompt": prompt, "completion": task["output"]}


def _alpaca_messages(record: Mapping[str, Any], task: dict[str, str]) -> list[Message]:
    turns = [("system", record["system"])] if record.get("system") else []
    for pair in record.get("history") or []:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise ValueError("history is no list of pairs of question and answer")
        turns += zip(("user", "assistant"), pair, strict=True)
    question = "\n\n".join(filter(None, (task["instruction"], task["input"])))
    turns += [("user", question), ("assistant", task["output"])]
    messages = [{"role": role, "content": content} for role, content in turns]
    return _message_list(messages, "history")


def _text(record: Mapping[str, Any], chat: bool) -> Record:
    if not isinstance(record["text"], str):
        raise ValueError(f"text is no text but a {type(record['text']).__name__}")
    return {"text": record["text"]}


def _as_messages(part: object, role: str, name: str) -> list[Message]:
    if isinstance(part, str):
        return [{"role": role, "content": part}]
    if not isinstance(part, list) or not part:
        raise ValueError(f"{name} is neither a text nor messages")
    return _message_list(part, name)


def _message_list(messages: object, name: str) -> list[Message]:
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{name} is no list of messages, or an empty one")
    return [_message(message, f"{name}[{i}]") for i, message in enumerate(messages)]


def _message(message: object, place: str) -> Message:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ValueError(f"{place} is no object with a role and a content")
    kept = {key: value for key, value in message.items() if key not in _WEIGHTS}
    kept["content"] = _joined(message.get("content"), place)
    for key in _WEIGHTS:
        if message.get(key) is not None:
            kept["weight"] = _weight(message[key], f"{place}.{key}")
    return kept


def _joined(content: object, place: str) -> str:
    """Returns a content that may be null, or a list of parts, as one text."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise ValueError(f"{place}.content is no text but a {type(content).__name__}")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        text = part.get("text", part.get("value")) if kind == "text" else None
        if not isinstance(text, str):
            raise ValueError(f"{place}.content holds a part of type {kind}, not text")
        texts.append(text)
    return "".join(texts)


def _weight(value: object, place: str) -> float:
    number = isinstance(value, int | float)
    if not number or not 0 <= value < float("inf"):
        raise ValueError(f"{place}={value!r} must be a number of at least 0")
    return float(value)


class _Form(NamedTuple):
    """The keys that tell a form, those it may have besides, and what becomes of it."""

    keys: tuple[str, ...]
    optional: tuple[str, ...]
    convert: Callable[[Mapping[str, Any], bool], Record]


# In the order in which they are looked for.
_FORMS = {
    "messages": _Form(("messages",), (), _messages),
    "sharegpt": _Form(("conversations",), ("system",), _sharegpt),
    "alpaca": _Form(("instruction", "output"), ("input", "system", "history"), _alpaca),
    "prompt_completion": _Form(("prompt",), ("completion",), _prompt_completion),
    "text": _Form(("text",), (), _text),
}
FORMS = ("auto", *_FORMS)
