"""Writes a model as a Hugging Face folder, with new special tokens if wanted."""

import logging
from dataclasses import dataclass
from pathlib import Path

from relax.checkpoints.hf_export import NewFolder
from relax.language_model import LanguageModel
from relax.model.parameters import NEW_ROWS
from relax.sampling import SamplingConfig
from relax.tasks.options import check_template
from relax.text.chat import named_template

logger = logging.getLogger(__name__)

DTYPE = "auto"  # where the config names none: an export keeps the checkpoint's


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What to write and where.

    output_path: a new folder. max_shard_gigabytes: weights beyond it go into several
    files. add_special_tokens: tokens that tokenizer and model get first; new_rows: what
    their rows hold, "mean" of the others, "zeros" or "normal" (drawn with seed 0).
    template: the name of a chat template, or a .jinja file, to be written instead of
    the checkpoint's own. adapter: writes the LoRA adapters alone, in PEFT's form;
    else they are merged into the weights.
    """

    kind: str
    output_path: str | None
    max_shard_gigabytes: float
    add_special_tokens: tuple[str, ...]
    new_rows: str
    template: str | None
    adapter: bool

    def __post_init__(self):
        object.__setattr__(self, "add_special_tokens", tuple(self.add_special_tokens))
        if self.max_shard_gigabytes <= 0:
            raise ValueError(
                f"task.max_shard_gigabytes={self.max_shard_gigabytes} must be above 0"
            )
        if self.new_rows not in NEW_ROWS:
            raise ValueError(
                f"task.new_rows={self.new_rows!r} is unknown; choose one of "
                f"{', '.join(NEW_ROWS)}"
            )
        if self.output_path is None:
            raise ValueError(
                "output_path=null: name the folder to write, output_path=my_model"
            )
        if self.adapter and (self.add_special_tokens or self.template is not None):
            raise ValueError(
                "task.adapter=true writes no tokens and no template; take "
                "task.add_special_tokens=[] and task.template=null, or task.adapter="
                "false"
            )


def check(config: ExportConfig) -> None:
    """Raises FileExistsError where the folder is there already.

    Raises ValueError or FileNotFoundError for a template that there is not.
    """
    check_template(config.template)
    NewFolder(Path(config.output_path), "output_path")


def run(config: ExportConfig, model: LanguageModel, sampling: SamplingConfig) -> None:
    """Writes the folder; see ExportConfig."""
    del sampling
    if config.template is not None and model.tokenizer is None:
        raise ValueError(
            f"task.template={config.template!r}, and the checkpoint holds no "
            "tokenizer, without which there is no chat; put its tokenizer.json or "
            "tokenizer.model into the folder, or take task.template=null"
        )
    if config.add_special_tokens:
        added = model.add_special_tokens(config.add_special_tokens, config.new_rows)
        logger.info("special tokens added: %s", added)
    if config.template is not None:
        model.chat_template = named_template(config.template, model.tokenizer)
    if config.adapter:
        model.save_adapter(config.output_path)
    else:
        model.save_hf(config.output_path, int(config.max_shard_gigabytes * 1e9))
    logger.info("written: %s", config.output_path)
