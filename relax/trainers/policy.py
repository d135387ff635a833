"""The policy that GRPO trains: its rollouts, as batches of the steps they serve."""

import contextlib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from relax.model.llama import make_llama
from relax.model.lora import base_of
from relax.policy_losses import row_weights
from relax.rewards import RewardScorer
from relax.sharding import make_constrain, shard_batch
from relax.steps import MISMATCH, TrainState, make_completion_step
from relax.trainers.config import Setup
from relax.trainers.grpo_config import GRPOConfig
from relax.trainers.loop import Prepared
from relax.trainers.prompts import PromptOrder
from relax.trainers.reward_journal import RewardJournal
from relax.trainers.rollout import (
    Arrays,
    RolloutMaker,
    completion_rows,
    empty_arrays,
    rollout_metrics,
    to_arrays,
)
from relax.trainers.sampler import Sampler

logger = logging.getLogger(__name__)


class MismatchError(ValueError):
    """Rollout and training give other logprobs to the same tokens."""


def make_scorer(
    trainer: GRPOConfig, rewards: Sequence[str], weights: Sequence[float] = ()
) -> RewardScorer:
    """Returns what scores by these rewards, in the processes that the trainer names."""
    return RewardScorer(
        rewards,
        weights,
        processes=trainer.reward_processes,
        time_limit_seconds=trainer.reward_seconds,
    )


class Policy:
    """Rollouts of the policy that is trained, as batches of its steps."""

    def __init__(self, setup: Setup, sampler: Sampler, prompts: PromptOrder):
        trainer = setup.trainer
        self._setup, self._trainer = setup, trainer
        self.num_ids = min(setup.model.vocab_size, setup.tokenizer.vocab_size)
        self.apply = make_llama(setup.model, make_constrain(setup.mesh)).apply
        self._open = contextlib.ExitStack()
        self.scorer = make_scorer(trainer, trainer.rewards, trainer.reward_weights)
        self._open.enter_context(self.scorer)
        self._journal = RewardJournal(setup.folder, trainer.rewards)
        self._open.callback(self._journal.close)
        truncates = _truncates(setup)
        self._support = setup.model.padded_vocab_size // 8 if truncates else 0
        if truncates:
            tokens = trainer.rows_per_rollout * setup.sampling.max_new_tokens
            logger.info(
                "rollouts: the ids that truncation leaves take up to %.1f MB",
                tokens * self._support / 1e6,
            )
        self._maker = RolloutMaker(
            setup,
            sampler,
            self.scorer,
            self._journal,
            prompts.at,
            truncates,
        )
        self._logprobs = self._completion_step(self.apply)
        self._reference = None
        if trainer.reference == "base":
            base, _ = base_of(setup.model, {})
            apply = make_llama(base, make_constrain(setup.mesh)).apply
            self._reference = self._completion_step(apply)
        elif trainer.reference != "none":
            self._reference = self._logprobs
        self._rollout: Arrays | None = None
        self._consumed = 0

    def _completion_step(self, apply):
        return make_completion_step(
            apply,
            self.num_ids,
            temperature=self._setup.sampling.temperature,
            max_logits=self._trainer.max_logits,
        )

    def extra(self, params) -> dict[str, Any]:
        """Returns what the train state keeps: a reference, a rollout in use."""
        kept: dict[str, Any] = {}
        if self._trainer.reference in ("frozen", "synced"):
            kept["reference"] = jax.tree.map(jnp.copy, params)
        if self._trainer.steps_per_rollout > 1:
            kept["rollout"] = jax.tree.map(jnp.asarray, self._empty())
        return kept

    def progress(self) -> dict[str, Any]:
        """Returns how many prompts were taken."""
        return {"prompts_consumed": self._consumed}

    def saved(self) -> None:
        """Forgets the rewards that the checkpoint before this one has made useless."""
        self._journal.rotate()

    def restore(self, progress: Mapping[str, Any]) -> None:
        """Goes on after the prompts that were taken."""
        self._consumed = progress["prompts_consumed"]

    def close(self) -> None:
        """Ends the processes that reward, and closes the journal."""
        self._open.close()

    def prepare(self, state: TrainState, step: int) -> Prepared:
        """Returns the state with what the step needs: a rollout, if that's used up."""
        state = self._synced(state, step)
        if step % self._trainer.steps_per_rollout:
            if self._rollout is None:
                self._rollout = jax.device_get(state.extra["rollout"])
            return Prepared(state, {}, [])
        trainer = self._trainer
        jax.block_until_ready(state.params)  # so that the times are those of rollouts
        groups, counts = self._maker.make(state.params, self._consumed)
        arrays, advantages = to_arrays(groups, self._setup, self._support)
        self._consumed += counts.consumed
        if trainer.steps_per_rollout > 1:
            arrays["old_logprobs"] = self._completion_logprobs(
                self._logprobs, state.params, arrays
            )
        if self._reference is not None:
            arrays["ref_logprobs"] = self._completion_logprobs(
                self._reference, self._reference_params(state), arrays
            )
        self._rollout = arrays
        if trainer.steps_per_rollout > 1:
            kept = self._placed_like(state.extra["rollout"], arrays)
            state = state._replace(extra={**state.extra, "rollout": kept})
        every = trainer.log_completions_every
        due = every and (step // trainer.steps_per_rollout) % every == 0
        rows = completion_rows(groups, advantages, trainer.rewards) if due else []
        metrics = rollout_metrics(groups, advantages, counts, self._setup)
        return Prepared(state, metrics, rows)

    def batch_at(self, step: int) -> Arrays:
        """Returns the part of the rollout that a step trains on, cut to its length."""
        trainer, rollout, rows = self._trainer, self._rollout, self._rows(step)
        batch = {name: array[rows] for name, array in rollout.items()}
        tokens_in_loss = float(rollout["loss_mask"].sum())
        batch["row_weights"] = row_weights(
            trainer.loss_type,
            batch["loss_mask"].sum(axis=1),
            max_new_tokens=self._setup.sampling.max_new_tokens,
            num_tokens=tokens_in_loss / trainer.steps_per_generation,
        )
        return _cut(batch)

    def tokens_at(self, step: int) -> int:
        """Returns how many tokens of prompts and completions a step trains on."""
        names, rows = ("prompt_lengths", "completion_mask"), self._rows(step)
        return int(sum(self._rollout[name][rows].sum() for name in names))

    def conclude(self, step: int, row: Mapping[str, float]) -> dict[str, float]:
        """Returns what training took of a step, apart from its rollout.

        Raises MismatchError where `trainer.strict` asks for it.
        """
        trainer = self._trainer
        for name in ("mean", "max"):
            value = row[f"{MISMATCH}/{name}"]
            bound = getattr(trainer, f"mismatch_{name}")
            if trainer.strict and not value <= bound:
                raise MismatchError(
                    f"step {step}: {MISMATCH}/{name}={value:.3g} is above "
                    f"trainer.mismatch_{name}={bound:.3g}: rollout and training "
                    "disagree; compute in float32, raise the bound, or set "
                    "trainer.strict=false"
                )
        rollout = row.get("rollout/time", 0.0) + row.get("rollout/reward_time", 0.0)
        seconds = row["step_time"] - rollout
        rate = self.tokens_at(step - 1) / seconds
        return {"train/time": seconds, "train/tokens_per_second": rate}

    def _synced(self, state: TrainState, step: int) -> TrainState:
        """Moves a synced reference towards the policy where that is due."""
        trainer = self._trainer
        if trainer.reference != "synced" or not step or step % trainer.ref_sync_steps:
            return state
        mixed = _mix(state.params, state.extra["reference"], trainer.ref_mixup)
        return state._replace(extra={**state.extra, "reference": mixed})

    def _reference_params(self, state: TrainState):
        if self._trainer.reference == "base":
            return base_of(self._setup.model, state.params)[1]
        return state.extra["reference"]

    def _completion_logprobs(self, step, params, arrays: Arrays) -> np.ndarray:
        """Returns the logprobs of a rollout's completions, as many rows as in training.

        At its full width, `[N, C]`; beyond the completions they are 0.
        """
        out = np.zeros_like(arrays["rollout_logprobs"])
        names = ("tokens", "prompt_lengths", "completions", "support")
        names = [name for name in names if name in arrays]
        size = self._trainer.batch_size // self._trainer.accumulation
        masked = {name: arrays[name] for name in (*names, "completion_mask")}
        for start in range(0, len(out), size):
            part = _cut({n: a[start : start + size] for n, a in masked.items()})
            mask = part.pop("completion_mask")
            logprobs = step(params, shard_batch(self._setup.mesh, part))
            known = np.where(mask > 0, jax.device_get(logprobs), 0.0)
            out[start : start + size, : known.shape[1]] = known
        return out

    def _rows(self, step: int) -> np.ndarray:
        """Returns which rows of its rollout a step trains on."""
        trainer = self._trainer
        rows = np.arange(trainer.rows_per_rollout)
        if trainer.steps_per_generation == 1:
            return rows
        number, phase = divmod(step, trainer.steps_per_rollout)
        dealt = np.random.default_rng((self._setup.seed, number)).permutation(rows)
        start = phase % trainer.steps_per_generation * trainer.batch_size
        return dealt[start : start + trainer.batch_size]

    def _empty(self) -> Arrays:
        trainer = self._trainer
        arrays = empty_arrays(
            trainer.rows_per_rollout,
            trainer.context,
            self._setup.sampling.max_new_tokens,
            self._support,
        )
        arrays["old_logprobs"] = np.zeros_like(arrays["rollout_logprobs"])
        if self._reference is not None:
            arrays["ref_logprobs"] = np.zeros_like(arrays["rollout_logprobs"])
        return arrays

    def _placed_like(self, before, arrays: Arrays):
        return jax.tree.map(
            lambda old, new: jax.device_put(new, old.sharding), before, arrays
        )


@jax.jit
def _mix(policy, reference, mixup):
    """Returns mixup·policy + (1 - mixup)·reference, as TRL's `SyncRefModelCallback`."""
    return jax.tree.map(lambda p, r: mixup * p + (1.0 - mixup) * r, policy, reference)


def _truncates(setup: Setup) -> bool:
    """Whether tokens are drawn from less than the whole softmax."""
    sampling = setup.sampling
    return bool(
        sampling.top_k or sampling.top_p < 1 or sampling.min_p or sampling.typical_p < 1
    )


def _cut(batch: Arrays) -> Arrays:
    """Returns a batch without columns that none of its rows uses.

    Rows and completions are cut to as many eighths of their full width: a step is
    compiled for eight shapes at most.
    """
    lengths = batch["completion_mask"].sum(axis=1)
    used = int((batch["prompt_lengths"] + lengths).max()), int(lengths.max())
    widths = batch["tokens"].shape[1], batch["completion_mask"].shape[1]
    eighths = max(1, *(-(-8 * n // w) for n, w in zip(used, widths, strict=True)))
    whole, longest = (-(-w * eighths // 8) for w in widths)

    def cut(name: str, array: np.ndarray) -> np.ndarray:
        if array.ndim == 1:
            return array
        return array[:, : whole if name == "tokens" else longest]

    return {name: cut(name, array) for name, array in batch.items()}
