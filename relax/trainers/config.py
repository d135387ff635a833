"""What every trainer is told."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from jax.sharding import Mesh

from relax.data.corpora import DataConfig
from relax.data.records import RecordsConfig
from relax.model.config import LlamaConfig
from relax.optim import OptimizerConfig
from relax.sampling import SamplingConfig
from relax.text.chat import ChatTemplate
from relax.text.tokenizers import Tokenizer


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """The loop that all trainers share; counts are in optimizer steps.

    batch_size: rows per step over all devices, taken in `accumulation` parts. context:
    most tokens per row. steps_per_dispatch: steps that one call of the device runs.
    eval_every, save_every: 0 is never (the last step is evaluated and saved always).
    eval_at_start: also before the first step. keep_last: how many last checkpoints stay
    beside the best. stop_metric, stop_value: the run ends where an evaluation's metric
    reaches the value (from above where the name ends in "loss"); null: never.
    max_logits: how many logits may exist at a time. profile_start: step at which
    `profile_steps` are profiled; null: never.
    """

    kind: str
    num_steps: int
    batch_size: int
    accumulation: int
    context: int
    steps_per_dispatch: int
    eval_every: int
    eval_at_start: bool
    eval_batch_size: int
    save_every: int
    keep_last: int
    stop_metric: str | None
    stop_value: float | None
    max_logits: int
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
        for name in ("eval_every", "save_every"):
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
        if (self.stop_metric is None) != (self.stop_value is None):
            raise ValueError(
                f"trainer.stop_metric={self.stop_metric} and trainer.stop_value="
                f"{self.stop_value}: give both, or null for both"
            )
        if self.stop_value is not None and not math.isfinite(self.stop_value):
            raise ValueError(
                f"trainer.stop_value={self.stop_value} must be finite, or null with "
                "trainer.stop_metric=null"
            )
        if self.stop_metric is not None and not self.eval_every:
            raise ValueError(
                f"trainer.stop_metric={self.stop_metric} is looked at in evaluations, "
                "and trainer.eval_every=0 makes none before the last step"
            )

    def _check_kind(self, kind: str) -> None:
        if self.kind != kind:
            raise ValueError(f"trainer.kind={self.kind!r} is not {kind}")

    def _require(self, name: str, least: float) -> None:
        value = getattr(self, name)
        if not value >= least:
            raise ValueError(f"trainer.{name}={value} must be at least {least}")
        if value == math.inf:
            raise ValueError(
                f"trainer.{name}={value} must be finite; give a number of at least "
                f"{least}"
            )

    def _choose(self, name: str, choices: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if value not in choices:
            raise ValueError(
                f"trainer.{name}={value!r} is unknown; choose one of "
                f"{', '.join(choices)}"
            )


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(LoopConfig):
    """Next-token prediction over a text.

    z_loss: weight of log²Z. sample_prompt, sample_tokens: what is sampled at each
    evaluation (0 tokens: nothing).
    """

    z_loss: float
    sample_prompt: str
    sample_tokens: int

    def __post_init__(self):
        super().__post_init__()
        self._check_kind("pretrain")
        self._require("z_loss", 0)
        self._require("sample_tokens", 0)


@dataclass(frozen=True, kw_only=True)
class SFTConfig(LoopConfig):
    """Next-token prediction over the targets of records.

    label_smoothing: of the training loss. neftune_alpha: noise on the embeddings, 0:
    none. eval_prompts: held-out prompts that are completed at each evaluation (0:
    none), `eval_samples` times each, and judged by `eval_reward` (null: only whether
    they end by themselves). show_samples: how many of them are shown.
    """

    z_loss: float
    label_smoothing: float
    neftune_alpha: float
    eval_prompts: int
    eval_samples: int
    eval_reward: str | None
    show_samples: int

    def __post_init__(self):
        super().__post_init__()
        self._check_kind("sft")
        for name in ("z_loss", "neftune_alpha", "eval_prompts", "show_samples"):
            self._require(name, 0)
        self._require("eval_samples", 1)
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(
                f"trainer.label_smoothing={self.label_smoothing} must lie in [0, 1)"
            )


def check_seed(sampling: SamplingConfig) -> None:
    """Raises ValueError for a seed of its own: a run's is that of its samples too."""
    if sampling.seed:
        raise ValueError(
            f"sampling.seed={sampling.seed} is for infer.py; a run draws with its own: "
            f"set seed={sampling.seed} instead"
        )


class Setup(NamedTuple):
    """All that a trainer builds its task from: dataclasses, tokenizer and mesh.

    template: how chats are written, None where that isn't known. stop_ids: the ids that
    end a completion. folder: the run's.
    """

    trainer: LoopConfig
    model: LlamaConfig
    optimizer: OptimizerConfig
    sampling: SamplingConfig
    data: DataConfig | RecordsConfig
    tokenizer: Tokenizer
    mesh: Mesh
    seed: int
    template: ChatTemplate | None = None
    stop_ids: tuple[int, ...] = ()
    folder: Path | None = None
