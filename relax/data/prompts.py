"""Prompts with answers, from files: yours, or GSM8K's."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relax.data.forms import both_alike, with_tools
from relax.data.records import (
    Record,
    Records,
    RecordsConfig,
    check_fraction,
    read_json_records,
    split_records,
)

KINDS = ("prompts", "gsm8k")
_ANSWER_MARK = "####"
_ALIKE = ("prompt_field", "completion_field")


@dataclass(frozen=True, kw_only=True)
class PromptsConfig(RecordsConfig):
    """Where prompts are, and which of their columns are what.

    path: a .json or .jsonl file; for gsm8k also a folder of train.jsonl and test.jsonl,
    and None: $RELAX_DATA_DIR/gsm8k. validation_path: a file; None: the last
    validation_fraction of `path`, or where that is 0 the folder's test.jsonl.
    prompt_field: a text or messages. answer_field: what rewards compare with, a text or
    a number; None: there is none. completion_field: what SFT learns, a text, a number
    or messages; None: there is none. suffix: added to prompts that are texts.

    In gsm8k the answer is the number behind the #### of answer_field, without the
    commas, and the completion all of answer_field where completion_field is None.
    """

    path: str | None
    validation_path: str | None
    validation_fraction: float
    prompt_field: str
    answer_field: str | None
    completion_field: str | None
    suffix: str

    def __post_init__(self):
        super().__post_init__()
        if self.kind not in KINDS:
            raise ValueError(f"data.kind={self.kind}: choose one of {', '.join(KINDS)}")
        if self.kind == "prompts" and self.path is None:
            raise ValueError(
                "data.path=null, but data.kind=prompts reads its prompts from there; "
                "set data.path to a .json or .jsonl file"
            )
        if self.kind == "gsm8k" and self.answer_field is None:
            raise ValueError(
                "data.answer_field=null, but data.kind=gsm8k takes the answers from "
                "there; name the column, which GSM8K calls answer"
            )
        check_fraction(self.validation_fraction)


def load_prompts(config: PromptsConfig) -> Records:
    """Returns records of "prompt", "answer", "completion" and all other columns.

    Answers are texts, numbers of the file as JSON writes them. A prompt and its
    completion are both texts or both messages: where the file has one of each, the text
    becomes what the user says, or the assistant; `tools` beside messages become a
    list. Raises FileNotFoundError, or ValueError with the record that lacks a
    column, or holds something else there.
    """
    path, validation_path = _paths(config)
    train: Sequence[Record] = _read(path, "data.path", config)
    validation: Sequence[Record] = []
    if validation_path is not None:
        validation = _read(validation_path, "data.validation_path", config)
    elif config.validation_fraction:
        train, validation = split_records(train, config.validation_fraction)
    if not train:
        raise ValueError(
            f"data.validation_fraction={config.validation_fraction} leaves nothing to "
            f"train on of data.path={path}; lower it"
        )
    return Records(train, validation, path)


def _paths(config: PromptsConfig) -> tuple[str, str | None]:
    """Returns the files of both splits, those of a GSM8K folder included."""
    if config.kind != "gsm8k":
        return config.path, config.validation_path
    if config.path is None:
        root = os.environ.get("RELAX_DATA_DIR")
        if not root:
            raise FileNotFoundError(
                "data.path=null, and RELAX_DATA_DIR, below which gsm8k is looked for, "
                "is not set; set data.path to the folder of train.jsonl and test.jsonl"
            )
        folder = Path(root) / "gsm8k"
    else:
        folder = Path(config.path).expanduser()
        if not folder.is_dir():
            return config.path, config.validation_path
    given = config.validation_path is not None or config.validation_fraction > 0
    test = config.validation_path if given else str(folder / "test.jsonl")
    return str(folder / "train.jsonl"), test


def _read(path: str, option: str, config: PromptsConfig) -> list[Record]:
    records = []
    for index, columns in enumerate(read_json_records(path, option)):
        try:
            records.append(_record(columns, config))
        except ValueError as error:
            raise ValueError(f"{option}={path}, record {index}: {error}") from None
    return records


def _record(columns: Record, config: PromptsConfig) -> Record:
    """Returns a record of the file with the keys that all data has."""
    record = dict(columns)
    prompt = _column(columns, "prompt_field", config.prompt_field)
    if isinstance(prompt, str):
        prompt += config.suffix
    completion = None
    if config.answer_field is not None:
        answer = _column(columns, "answer_field", config.answer_field)
        answer = _text(answer, f"data.answer_field={config.answer_field}")
        if config.kind == "gsm8k":
            completion = answer
            answer = _after_mark(answer)
        record["answer"] = answer
    if config.completion_field is not None:
        completion = _column(columns, "completion_field", config.completion_field)
    names = tuple(f"data.{x}={getattr(config, x)}" for x in _ALIKE)
    if completion is not None and not isinstance(completion, list):
        completion = _text(completion, names[1])
    prompt, completion = both_alike(prompt, completion, names)
    record["prompt"] = prompt
    if completion is not None:
        record["completion"] = completion
    return with_tools(record, chat=config.template is not None)


def _column(columns: Record, field: str, name: str) -> Any:
    if columns.get(name) is None:
        raise ValueError(
            f"data.{field}={name} is not among the columns {', '.join(columns)}"
        )
    return columns[name]


def _text(value: Any, name: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(
            f"{name} holds {json.dumps(value)}, neither a text nor a number; write it "
            "as a text"
        )
    return value if isinstance(value, str) else json.dumps(value)


def _after_mark(answer: str) -> str:
    if _ANSWER_MARK not in answer:
        raise ValueError(
            f"the answer has no {_ANSWER_MARK}, which data.kind=gsm8k reads"
        )
    return answer.rpartition(_ANSWER_MARK)[2].strip().replace(",", "")
