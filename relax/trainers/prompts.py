"""Prompts of records: as ids, as text, and in the order that training takes them."""

from typing import Any, NamedTuple

from relax.data.records import Record
from relax.text.chat import TEMPLATES, ChatTemplate
from relax.trainers.config import Setup


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
    answer = record.get("answer", _text(record.get("completion")))
    chat = asked
    if isinstance(asked, str):
        if setup.data.template is None:
            first = [] if setup.tokenizer.bos_id is None else [setup.tokenizer.bos_id]
            ids = (*first, *setup.tokenizer.encode(asked))
            return Prompt(ids, asked, answer, record)
        chat = [{"role": "user", "content": asked}]
    ids = _require_template(setup.template).encode(
        setup.tokenizer, chat, add_generation_prompt=True
    )
    return Prompt(tuple(ids), str(chat[-1]["content"]), answer, record)


def check_length(
    prompt: Prompt, index: int, setup: Setup, option: str = "trainer.context"
) -> None:
    """Raises ValueError for a prompt that is empty or leaves a completion no room.

    option: what it and its completion must fit in, `trainer.context` where they are
    trained on, else `model.max_position_embeddings`.
    """
    group, name = option.split(".")
    limit, longest = getattr(getattr(setup, group), name), setup.sampling.max_new_tokens
    if not 1 <= len(prompt.ids) <= limit - longest:
        raise ValueError(
            f"prompt {index} of the data has {len(prompt.ids)} tokens, and with "
            f"sampling.max_new_tokens={longest} {option}={limit} has room for 1 to "
            f"{limit - longest}; raise {option}, lower sampling.max_new_tokens, or "
            "leave the prompt out"
        )


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


def _text(content: Any) -> Any:
    """Returns a text as it is, and of messages what the last one says."""
    return content[-1]["content"] if isinstance(content, list) else content


def _require_template(template: ChatTemplate | None) -> ChatTemplate:
    if template is None:
        raise ValueError(
            "data.template=null, and the model has no chat template of its own: choose "
            f"one of {', '.join(TEMPLATES)}, or give a .jinja file"
        )
    return template
