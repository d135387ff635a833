"""What the GRPO trainer is told."""

import logging
from dataclasses import dataclass, fields

from relax.advantages import SCALE_REWARDS
from relax.policy_losses import PolicyOptions
from relax.sampling import SamplingConfig
from relax.trainers.config import LoopConfig, check_seed

logger = logging.getLogger(__name__)

REFERENCES = ("none", "frozen", "base", "synced")
# Sampling options under which a token is not drawn from the softmax that is trained.
_BIASING = (
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "no_repeat_ngram_size",
    "min_new_tokens",
    "logit_bias",
    "constraint",
    "choices",
    "num_beams",
    "ignore_eos",
)
# How the YAML writes what turns them off, where Python writes it otherwise.
_OFF = {
    "logit_bias": "null",
    "constraint": "null",
    "choices": "[]",
    "ignore_eos": "false",
}


@dataclass(frozen=True, kw_only=True)
class GRPOConfig(PolicyOptions, LoopConfig):
    """Group-relative policy optimisation, with TRL 1.16's names and meanings.

    batch_size: completions per optimizer step. num_generations: G, completions of a
    prompt. steps_per_generation: steps that share a rollout, each with its own part of
    it; num_iterations: how often all parts are used. rollout_rows: completions that are
    sampled at a time, null: all, which takes a cache for each. rewards: names of
    `relax.rewards.REWARDS` or `module:function`; reward_weights: [] is 1 each.
    outcome_reward: the one that says what is solved (null: the first), by which
    evaluation and dynamic sampling judge. reward_processes: 0 is this process;
    reward_seconds: time limit of one completion. scale_rewards: see `relax.advantages`.
    What the loss is told: see `PolicyOptions`. reference: what beta holds the policy
    to: none, the model at the start (frozen), the model without its adapters (base), or
    a copy that moves towards the policy every `ref_sync_steps` by `ref_mixup` (synced).
    mask_truncated_completions: those that did not end by themselves are left out of the
    loss. dynamic_sampling: groups without signal are replaced, in at most
    `dynamic_sampling_rounds` rounds. skip_long_prompts: those that leave a completion
    no room are left out instead of refused. strict: stop where logprobs of rollout and
    training differ by more than mismatch_mean or mismatch_max. eval_prompts: held-out
    prompts, completed eval_samples times each. show_samples: completions shown every
    `log_completions_every` rollouts (0: never).
    """

    num_generations: int
    steps_per_generation: int
    num_iterations: int
    rollout_rows: int | None
    rewards: tuple[str, ...]
    reward_weights: tuple[float, ...]
    outcome_reward: str | None
    reward_processes: int
    reward_seconds: float | None
    scale_rewards: str
    reference: str
    ref_sync_steps: int
    ref_mixup: float
    mask_truncated_completions: bool
    dynamic_sampling: bool
    dynamic_sampling_rounds: int
    skip_long_prompts: bool
    strict: bool
    mismatch_mean: float
    mismatch_max: float
    eval_prompts: int
    eval_samples: int
    show_samples: int
    log_completions_every: int

    def __post_init__(self):
        for name in ("rewards", "reward_weights"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        LoopConfig.__post_init__(self)
        PolicyOptions.__post_init__(self)
        self._check_kind("grpo")
        self._choose("scale_rewards", SCALE_REWARDS)
        self._choose("reference", REFERENCES)
        self._check_numbers()
        self._check_groups()
        self._check_reference()
        self._check_rewards()

    @property
    def policy_options(self) -> PolicyOptions:
        """What the loss is told."""
        return PolicyOptions(
            **{field.name: getattr(self, field.name) for field in fields(PolicyOptions)}
        )

    @property
    def rows_per_rollout(self) -> int:
        """Completions that a rollout gives."""
        return self.batch_size * self.steps_per_generation

    @property
    def steps_per_rollout(self) -> int:
        """Optimizer steps that a rollout serves."""
        return self.steps_per_generation * self.num_iterations

    @property
    def outcome_index(self) -> int:
        """The place among `rewards` of the one that says what is solved."""
        return self.rewards.index(self.outcome_reward or self.rewards[0])

    def _check_numbers(self) -> None:
        for name in (
            "num_generations",
            "steps_per_generation",
            "num_iterations",
            "ref_sync_steps",
            "dynamic_sampling_rounds",
            "eval_samples",
        ):
            self._require(name, 1)
        for name in (
            "reward_processes",
            "mismatch_mean",
            "mismatch_max",
            "eval_prompts",
            "show_samples",
            "log_completions_every",
        ):
            self._require(name, 0)
        if not 0.0 <= self.ref_mixup <= 1.0:
            raise ValueError(f"trainer.ref_mixup={self.ref_mixup} must lie in [0, 1]")
        if self.rollout_rows is not None:
            self._require("rollout_rows", 1)
        if self.steps_per_dispatch != 1:
            raise ValueError(
                f"trainer.steps_per_dispatch={self.steps_per_dispatch} must be 1 in "
                "grpo: a rollout needs the parameters of the step before it"
            )

    def _check_groups(self) -> None:
        if self.num_generations < 2 and self.scale_rewards == "group":
            raise ValueError(
                f"trainer.num_generations={self.num_generations} must be at least 2 "
                "with trainer.scale_rewards=group: a group of one has no spread"
            )
        if self.num_generations < 2:
            logger.warning(
                "trainer.num_generations=1 compares a completion with itself: with "
                "trainer.scale_rewards=%s all advantages are 0, and rewards teach "
                "nothing; set trainer.num_generations=2 or more",
                self.scale_rewards,
            )
        if self.rows_per_rollout % self.num_generations:
            raise ValueError(
                f"trainer.batch_size x trainer.steps_per_generation = "
                f"{self.rows_per_rollout} must be a multiple of "
                f"trainer.num_generations={self.num_generations}"
            )

    def _check_reference(self) -> None:
        if (self.beta > 0) != (self.reference != "none"):
            raise ValueError(
                f"trainer.beta={self.beta} and trainer.reference={self.reference}: a "
                "KL penalty needs a reference (frozen, base or synced), and a "
                "reference a beta above 0"
            )

    def _check_rewards(self) -> None:
        if not self.rewards:
            raise ValueError("trainer.rewards=[] names no reward")
        if self.reward_weights and not any(self.reward_weights):
            raise ValueError(
                f"trainer.reward_weights={list(self.reward_weights)} leaves no reward "
                "that counts; give one above 0, or [] for 1 each"
            )
        if self.outcome_reward not in (None, *self.rewards):
            raise ValueError(
                f"trainer.outcome_reward={self.outcome_reward!r} is none of "
                f"trainer.rewards={list(self.rewards)}"
            )


def check_unbiased(sampling: SamplingConfig) -> None:
    """Raises ValueError where completions are not drawn from the trained softmax.

    Temperature and truncation (top_k, top_p, min_p, typical_p) are known to the loss.
    """
    check_seed(sampling)
    if sampling.temperature == 0:
        raise ValueError(
            "sampling.temperature=0 makes all completions of a prompt alike; set "
            "sampling.temperature=1 for grpo"
        )
    if sampling.num_return_sequences != 1:
        raise ValueError(
            f"sampling.num_return_sequences={sampling.num_return_sequences} is nothing "
            "that grpo goes by: set it to 1, and trainer.num_generations instead"
        )
    default = SamplingConfig()
    for name in _BIASING:
        value, off = getattr(sampling, name), getattr(default, name)
        if value != off:
            off = _OFF.get(name, off)
            raise ValueError(
                f"sampling.{name}={value} would bias the ratio of grpo, whose loss "
                f"doesn't know it; set sampling.{name}={off}"
            )
