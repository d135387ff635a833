"""Where records come from, by name."""

import hashlib
from pathlib import Path

from relax.data.arithmetic import ArithmeticConfig, load_arithmetic
from relax.data.conversations import ConversationsConfig, load_conversations
from relax.data.countdown import CountdownConfig, load_countdown
from relax.data.prompts import PromptsConfig, load_prompts
from relax.data.records import Records, RecordsConfig

# data.kind -> its dataclass, and what loads it.
SOURCES = {
    "conversations": (ConversationsConfig, load_conversations),
    "arithmetic": (ArithmeticConfig, load_arithmetic),
    "countdown": (CountdownConfig, load_countdown),
    "prompts": (PromptsConfig, load_prompts),
    "gsm8k": (PromptsConfig, load_prompts),
}


def load_records(config: RecordsConfig) -> Records:
    """Returns the records of a data group; raises ValueError or FileNotFoundError."""
    return SOURCES[config.kind][1](config)


def records_key(config: RecordsConfig) -> str:
    """Returns the sha256 of the file that records are read from; "" where none is."""
    path = getattr(config, "path", None)
    if path is None:
        return ""
    with Path(path).expanduser().open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
