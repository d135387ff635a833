"""What every trainer is told."""

from dataclasses import dataclass
from typing import NamedTuple

from jax.sharding import Mesh

from relax.data.corpora import DataConfig
from relax.model.config import LlamaConfig
from relax.optim import OptimizerConfig
from relax.sampling import SamplingConfig
from relax.text.tokenizers import Tokenizer


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """The loop that all trainers share; counts are in optimizer steps.

    batch_size: rows per step over all devices, taken in `accumulation` parts.
    context: tokens per row. steps_per_dispatch: steps that one call of the device runs.
    eval_every, save_every: 0 is never (the last step is evaluated and saved always).
    keep_last: how many last checkpoints stay beside the best. max_logits: how many
    logits may exist at a time. z_loss: weight of log²Z. sample_prompt,
    sample_tokens: what is sampled at each evaluation (0 tokens: nothing).
    profile_start: step at which `profile_steps` are profiled; null: never.
    """

    num_steps: int
    batch_size: int
    accumulation: int
    context: int
    steps_per_dispatch: int
    eval_every: int
    eval_batch_size: int
    save_every: int
    keep_last: int
    max_logits: int
    z_loss: float
    sample_prompt: str
    sample_tokens: int
    profile_start: int | None
    profile_steps: int

    def __post_init__(self):
        for name in (
            "num_steps",
            "batch_size",
            "accumulation",
            "context",
            "steps_per_dispatch",
            "eval_batch_size",
            "keep_last",
            "max_logits",
            "profile_steps",
        ):
            self._require(name, 1)
        for name in ("eval_every", "save_every", "z_loss", "sample_tokens"):
            self._require(name, 0)
        if self.profile_start is not None:
            self._require("profile_start", 0)
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"trainer.batch_size={self.batch_size} must be a multiple of "
                f"trainer.accumulation={self.accumulation}"
            )
        for name in ("eval_every", "save_every", "profile_start"):
            value = getattr(self, name)
            if value and value % self.steps_per_dispatch:
                raise ValueError(
                    f"trainer.{name}={value} must be a multiple of "
                    f"trainer.steps_per_dispatch={self.steps_per_dispatch}"
                )

    def _require(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if value < least:
            raise ValueError(f"trainer.{name}={value} must be at least {least}")


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(LoopConfig):
    """Next-token prediction over a text."""

    kind: str

    def __post_init__(self):
        super().__post_init__()
        if self.kind != "pretrain":
            raise ValueError(f"trainer.kind={self.kind!r} is not pretrain")


class Setup(NamedTuple):
    """All that a trainer builds its task from: dataclasses, tokenizer and mesh."""

    trainer: LoopConfig
    model: LlamaConfig
    optimizer: OptimizerConfig
    sampling: SamplingConfig
    data: DataConfig
    tokenizer: Tokenizer
    mesh: Mesh
    seed: int
