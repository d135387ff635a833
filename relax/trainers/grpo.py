"""Group-relative policy optimisation (Shao et al. 2024, DeepSeekMath, section 4.1).

https://arxiv.org/abs/2402.03300; names and meanings of options and metrics are those of
TRL 1.16. Departures from it: the logprobs that the ratio starts from are always those
of the parameters that sampled; a step's loss is the same whatever its accumulation
(but for the threshold and the bonus of entropy, which each part takes by itself, as
in TRL); dropout is off, so that what samples is what trains.
"""

import contextlib
import logging

import jax

from relax.data.sources import load_records, records_key
from relax.generation.requests import Completion
from relax.model.config import LlamaConfig
from relax.rewards import NEEDS_ANSWER, REWARDS, find_reward
from relax.sampling import SamplingConfig
from relax.steps import make_policy_loss, policy_summary
from relax.trainers.common import check_sizes, optimisation
from relax.trainers.config import Setup
from relax.trainers.evaluation import (
    as_sample,
    completion_metrics,
    held_out_prompts,
    make_completion_evaluation,
)
from relax.trainers.grpo_config import GRPOConfig, check_unbiased
from relax.trainers.loop import Task
from relax.trainers.policy import MismatchError, Policy, make_scorer
from relax.trainers.prompts import Prompt, PromptOrder
from relax.trainers.sampler import Sampler

__all__ = [
    "MismatchError",
    "check_together",
    "inspect",
    "kept_on_resume",
    "make_task",
]

logger = logging.getLogger(__name__)


def make_task(setup: Setup) -> Task:
    """Returns what the loop needs for GRPO on the setup's prompts.

    Raises ValueError where settings don't fit together, or a prompt is too long.
    """
    check_sizes(setup)
    check_together(setup.trainer, setup.model, setup.sampling)
    trainer = setup.trainer
    records = load_records(setup.data)
    prompts = PromptOrder(records.train, setup)
    _check_rewards(prompts.check(), setup)
    sampler = Sampler(setup)
    sampler.check(setup.sampling)
    if sampler.extra_bytes:
        logger.info(
            "rollouts: unrolled layers take %.1f MB more", sampler.extra_bytes / 1e6
        )
    evaluate, opened = None, contextlib.ExitStack()
    if trainer.eval_prompts:
        held_out = held_out_prompts(
            setup, records, trainer.eval_prompts, trainer.skip_long_prompts
        )
        judge = make_scorer(trainer, [trainer.rewards[trainer.outcome_index]])
        opened.enter_context(judge)
        evaluate = make_completion_evaluation(setup, sampler, held_out, judge)
    policy = Policy(setup, sampler, prompts)
    opened.callback(policy.close)
    options = trainer.policy_options
    loss_fn = make_policy_loss(
        policy.apply,
        policy.num_ids,
        options,
        temperature=setup.sampling.temperature,
        max_logits=trainer.max_logits,
        accumulation=trainer.accumulation,
    )
    return Task(
        **optimisation(setup, loss_fn, summarize=policy_summary(options)),
        batch_at=policy.batch_at,
        tokens_at=policy.tokens_at,
        evaluate=evaluate,
        rank=lambda m: 1.0 - m["val_pass@1"] if "val_pass@1" in m else None,
        evaluates=completion_metrics(setup) if evaluate else (),
        prepare=policy.prepare,
        conclude=policy.conclude,
        extra=policy.extra,
        progress=policy.progress,
        saved=policy.saved,
        restore=policy.restore,
        close=opened.close,
        data_key=records_key(setup.data),
    )


def inspect(setup: Setup) -> None:
    """Refuses: prompts are not packed into rows."""
    raise ValueError(
        "data.inspect=true shows the rows of trainer=sft; grpo has none: set "
        "data.inspect=false, and see completions.jsonl of a run"
    )


def check_together(
    trainer: GRPOConfig, model: LlamaConfig, sampling: SamplingConfig
) -> None:
    """Raises ValueError where settings don't fit together, before anything is read."""
    check_unbiased(sampling)
    for name in trainer.rewards:
        find_reward(name)
    if trainer.loss_type == "cispo" and trainer.epsilon_high is None:
        logger.warning(
            "trainer.loss_type=cispo caps the ratio itself at trainer.epsilon=%s; its "
            "paper has trainer.epsilon_high=5.0",
            trainer.epsilon,
        )
    for name in ("dropout", "lora_dropout"):
        if value := getattr(model, name):
            raise ValueError(
                f"model.{name}={value} would train another policy than the one that "
                f"samples; set model.{name}=0"
            )
    if trainer.reference == "base" and not model.lora_rank:
        raise ValueError(
            "trainer.reference=base is the model without its adapters, and "
            "model.lora_rank=0 has none; set trainer.reference=frozen"
        )
    if jax.process_count() > 1:
        raise ValueError(
            f"trainer.kind=grpo runs in one process, and {jax.process_count()} are "
            "running; use the devices of one host"
        )


def kept_on_resume(trainer: GRPOConfig) -> tuple[str, ...]:
    """Returns the paths of what a run's checkpoints depend on.

    A rollout that serves several steps is part of them.
    """
    kept = ["reference", "num_iterations", "steps_per_generation"]
    if trainer.steps_per_rollout == 1:
        return tuple(f"trainer.{name}" for name in kept)
    kept += ["batch_size", "context", "num_generations"]
    drawn = ("max_new_tokens", "top_k", "top_p", "min_p", "typical_p")
    return (
        *(f"trainer.{name}" for name in kept),
        *(f"sampling.{name}" for name in drawn),
    )


def _check_rewards(prompt: Prompt, setup: Setup) -> None:
    """Raises ValueError where a reward of ours can't judge what the data asks.

    Warns where the outcome reward does not call the data's own completion right.
    """
    for name in setup.trainer.rewards:
        if name in NEEDS_ANSWER and prompt.answer is None:
            raise ValueError(
                f"trainer.rewards has {name}, which compares with an answer, and a "
                f"record of the data has none, but {', '.join(prompt.record)}; give "
                "each an answer, or choose other rewards"
            )
        if name in REWARDS:
            try:
                REWARDS[name](as_sample(prompt, Completion(), 1))
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise ValueError(
                    f"trainer.rewards has {name}, which can't judge what the data "
                    f"asks, {prompt.text[:60]!r}: {error}; choose other rewards"
                ) from error
    name = setup.trainer.rewards[setup.trainer.outcome_index]
    gold = prompt.record.get("completion")
    if name in REWARDS and isinstance(gold, str):
        found = REWARDS[name](as_sample(prompt, Completion(text=gold), 1))
        if not found >= 1.0:
            logger.warning(
                "trainer.rewards: %s gives %s to the completion that the data has for "
                "%r, %r",
                name,
                found,
                prompt.text[:60],
                gold[:60],
            )
