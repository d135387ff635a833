"""Records: what fine-tuning and reinforcement learning read, before it is tokens.

A record is a dict of one of three forms, and may hold more:
`{"messages": [...]}`, `{"prompt": ..., "completion": ...}` (texts or messages; no
completion where only a prompt is needed) and `{"text": ...}`. Beside messages, `tools`
are the JSON schemas of what the assistant may call, which chat templates write.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

LOSS_ON = ("auto", "assistant", "completion", "last_turn", "all")
Record = dict[str, Any]


class Records(NamedTuple):
    """The records of both splits, and where they came from."""

    train: Sequence[Record]
    validation: Sequence[Record]
    source: str


@dataclass(frozen=True, kw_only=True)
class RecordsConfig:
    """What all data of records is told.

    template: how messages are written, by name or .jinja file; None: as the model's
    own says, and prompts that are plain texts stay so. loss_on: the targets of SFT,
    "auto": the assistant's turns of messages, the completion of a prompt, all of a
    text. packing: several records share a row, each seeing itself alone. inspect: show
    the first rows and train nothing.
    """

    kind: str
    template: str | None
    loss_on: str
    packing: bool
    inspect: bool

    def __post_init__(self):
        if self.loss_on not in LOSS_ON:
            raise ValueError(
                f"data.loss_on={self.loss_on!r} is unknown; choose one of "
                f"{', '.join(LOSS_ON)}"
            )

    @property
    def cache(self) -> Path | None:
        """The folder where tokens are kept; None: they are made anew each time."""
        return None


def read_json_records(path: str, option: str = "data.path") -> list[Record]:
    """Returns the objects of a .json array or of a .jsonl file.

    Raises FileNotFoundError, or ValueError with the line, naming the `option`.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(
            f"{option}={path} is no file; give a .json or .jsonl file"
        )
    try:
        text = file.read_bytes().decode("utf-8-sig")  # Windows may begin it with a BOM
        records = _parse(text, file.suffix)
    except ValueError as error:
        raise ValueError(f"{option}={path}: {error}") from error
    if not records:
        raise ValueError(f"{option}={path} holds no records")
    for index, record in enumerate(records):
        if not isinstance(record, dict):
            raise ValueError(
                f"{option}={path}: record {index} is no object but a "
                f"{type(record).__name__}"
            )
    return records


def check_fraction(fraction: float) -> None:
    """Raises ValueError for a `data.validation_fraction` outside [0, 1)."""
    if not 0 <= fraction < 1:
        raise ValueError(
            f"data.validation_fraction={fraction}: must be at least 0 and below 1"
        )


def split_records(
    records: Sequence[Record], fraction: float
) -> tuple[Sequence[Record], Sequence[Record]]:
    """Returns the records but the last `fraction` of them, and these."""
    cut = len(records) - round(len(records) * fraction)
    return records[:cut], records[cut:]


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except json.JSONDecodeError:
        return False
    return True


def _parse(text: str, suffix: str) -> list[Any]:
    if suffix == ".json":
        try:
            whole = json.loads(text)
        except json.JSONDecodeError as error:
            if _is_json(text.lstrip().partition("\n")[0]):
                raise ValueError(
                    f"{error}; it looks like JSON lines: name the file .jsonl"
                ) from error
            raise
        if not isinstance(whole, list):
            raise ValueError("the file is no JSON array; write one, or .jsonl lines")
        return whole
    records = []
    # Not splitlines(): JSON strings may hold U+2028, which is no end of line here.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number} is not JSON: {error}") from error
    return records
