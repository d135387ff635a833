"""What a reward is given."""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

_ANSWER_TAGS = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)


class Sample(NamedTuple):
    """A completion, what asked for it, and what is right.

    prompt: a text; of messages, what the last one says. completion: without special
    tokens. answer: of the record, None where it has none. record: all of it, messages
    of the prompt included. num_tokens: of the completion, its end of turn included.
    finished: it ended by itself, before max_new_tokens.
    """

    prompt: str
    completion: str
    answer: str | None
    record: Mapping[str, Any]
    num_tokens: int
    max_new_tokens: int
    finished: bool


# A reward, or None where the function does not apply to the sample.
Reward = Callable[[Sample], float | None]


def prompt_text(sample: Sample) -> str:
    """Returns the prompt where it is a text, else the text of its last message."""
    if isinstance(sample.prompt, str):
        return sample.prompt
    content = sample.prompt[-1]["content"]
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content)


def tagged_answer(text: str) -> str | None:
    """Returns what stands within the last <answer> tags of a text, or None."""
    found = _ANSWER_TAGS.findall(text)
    return found[-1] if found else None
