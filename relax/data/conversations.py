"""Conversations, tasks and texts of a .json or .jsonl file, for fine-tuning."""

from dataclasses import dataclass
from pathlib import Path

from relax.data.cache import cache_folder
from relax.data.forms import FORMS, normalise
from relax.data.records import (
    Records,
    RecordsConfig,
    check_fraction,
    read_json_records,
    split_records,
)


@dataclass(frozen=True, kw_only=True)
class ConversationsConfig(RecordsConfig):
    """A file of records, in any of the forms of `relax.data.forms`.

    Of its records, the last `validation_fraction` are the validation split. cache_dir:
    where their tokens are kept; None: the user's cache folder.
    """

    path: str
    form: str
    validation_fraction: float
    cache_dir: str | None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form not in FORMS:
            raise ValueError(
                f"data.form={self.form!r} is unknown; choose one of {', '.join(FORMS)}"
            )
        check_fraction(self.validation_fraction)

    @property
    def cache(self) -> Path:
        return cache_folder(self.cache_dir)


def load_conversations(config: ConversationsConfig) -> Records:
    """Returns the records of both splits, each in one of the three forms.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not JSON, or a record has not the form; the message names the
        record by its place in the file.
    """
    chat = config.template is not None
    records = [
        normalise(record, config.form, index, chat=chat)
        for index, record in enumerate(read_json_records(config.path))
    ]
    train, validation = split_records(records, config.validation_fraction)
    return Records(train, validation, config.path)
