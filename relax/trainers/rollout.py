"""Rollouts: groups of completions with their rewards, and as arrays to train on."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from relax.advantages import Advantages, group_advantages
from relax.generation.requests import Completion, Request
from relax.rewards import FAILED, TIMED_OUT, RewardScorer
from relax.trainers.config import Setup
from relax.trainers.evaluation import as_sample
from relax.trainers.prompts import Prompt
from relax.trainers.reward_journal import Kept, RewardJournal
from relax.trainers.sampler import Sampler

Arrays = dict[str, np.ndarray]

LEFT_OUT_AT_MOST = 10_000  # prompts one after another that don't fit


class Group(NamedTuple):
    """A prompt's completions and their rewards, `[G, rewards]` and in total `[G]`."""

    prompt: Prompt
    requests: Sequence[Request]
    completions: Sequence[Completion]
    values: np.ndarray
    totals: np.ndarray

    def is_informative(self, outcome: int) -> bool:
        """Whether the outcome reward differs within the group."""
        known = self.values[:, outcome]
        known = known[np.isfinite(known)]
        return len(known) > 1 and known.min() < known.max()


@dataclass
class Counts:
    """What a rollout took.

    consumed: prompts; groups: made; wasted_tokens: of groups that were replaced.
    failed, timed_out: rewards by name that raised or were not a number, or took too
    long. seconds: of sampling, and of rewarding.
    """

    consumed: int = 0
    groups: int = 0
    new_tokens: int = 0
    wasted_tokens: int = 0
    sampling_seconds: float = 0.0
    reward_seconds: float = 0.0
    failed: Counter = field(default_factory=Counter)
    timed_out: Counter = field(default_factory=Counter)


class RolloutMaker:
    """Makes rollouts of prompts, which are numbered as training takes them."""

    def __init__(
        self,
        setup: Setup,
        sampler: Sampler,
        scorer: RewardScorer,
        journal: RewardJournal,
        prompt_at: Callable[[int], Prompt | None],
        keep_support: bool,
    ):
        """`prompt_at`: from a prompt's number to the prompt, None for one left out."""
        self._trainer = setup.trainer
        self._sampling = replace(setup.sampling, seed=setup.seed)
        self._sampler, self._scorer, self._journal = sampler, scorer, journal
        self._prompt_at, self._keep_support = prompt_at, keep_support

    def make(self, params: Any, first: int) -> tuple[list[Group], Counts]:
        """Returns the groups of a rollout, of the prompts from number `first` on.

        With dynamic sampling (Yu et al. 2025, DAPO, https://arxiv.org/abs/2503.14476,
        section 3.2) groups whose outcome reward is the same throughout are replaced
        while rounds are left, and fill up what is missing after them.
        """
        trainer, counts = self._trainer, Counts()
        wanted = trainer.rows_per_rollout // trainer.num_generations
        rounds = trainer.dynamic_sampling_rounds if trainer.dynamic_sampling else 1
        params = self._sampler.decoding_params(params)
        kept: list[Group] = []
        silent: list[Group] = []
        for _ in range(rounds):
            for group in self._groups(
                params, first + counts.consumed, wanted - len(kept), counts
            ):
                informative = group.is_informative(trainer.outcome_index)
                fits = informative or not trainer.dynamic_sampling
                (kept if fits else silent).append(group)
            if len(kept) == wanted:
                break
        missing = wanted - len(kept)
        for group in silent[missing:]:
            counts.wasted_tokens += sum(len(c.token_ids) for c in group.completions)
        return kept + silent[:missing], counts

    def _groups(
        self, params: Any, first: int, count: int, counts: Counts
    ) -> list[Group]:
        """Returns the groups of `count` prompts, sampled and rewarded at once."""
        G = self._trainer.num_generations
        numbered, consumed = self._take(first, count)
        prompts = list(numbered.values())
        requests = [
            Request(prompt.ids, number % 2**31, sample)
            for number, prompt in numbered.items()
            for sample in range(G)
        ]
        started = time.perf_counter()
        completions = self._sampler.complete(
            params,
            requests,
            self._sampling,
            self._trainer.rollout_rows or self._trainer.rows_per_rollout,
            capacity=self._trainer.context,
            keep_support=self._keep_support,
        )
        sampled = time.perf_counter()
        rows = [prompt for prompt in prompts for _ in range(G)]
        values, totals = self._rewards(rows, requests, completions, counts)
        counts.reward_seconds += time.perf_counter() - sampled
        counts.sampling_seconds += sampled - started
        counts.consumed += consumed
        counts.groups += count
        counts.new_tokens += sum(len(c.token_ids) for c in completions)
        return [
            Group(prompt, requests[part], completions[part], values[part], totals[part])
            for index, prompt in enumerate(prompts)
            if (part := slice(index * G, (index + 1) * G))
        ]

    def _take(self, first: int, count: int) -> tuple[dict[int, Prompt], int]:
        """Returns the next prompts that fit, by number, and how many were taken."""
        prompts: dict[int, Prompt] = {}
        number = first
        while len(prompts) < count:
            prompt = self._prompt_at(number)
            if prompt is not None:
                prompts[number] = prompt
            elif number - first > LEFT_OUT_AT_MOST + len(prompts):
                raise ValueError(
                    f"{LEFT_OUT_AT_MOST} prompts didn't fit trainer.context="
                    f"{self._trainer.context}, or are none, as the log says of the "
                    "first; raise it, or lower sampling.max_new_tokens"
                )
            number += 1
        return prompts, number - first

    def _rewards(self, prompts, requests, completions, counts: Counts):
        """Returns rewards `[N, rewards]` and `[N]`, those known already not again."""
        shape = len(requests), len(self._trainer.rewards)
        values, states = np.full(shape, np.nan), np.zeros(shape, np.int8)
        todo = []
        for index, pair in enumerate(zip(requests, completions, strict=True)):
            known = self._journal.get(*pair)
            if known is None:
                todo.append(index)
            else:
                values[index], states[index] = known
                self._journal.put(*pair, known)  # the next checkpoint may fail too
        longest = self._sampling.max_new_tokens
        samples = [as_sample(prompts[i], completions[i], longest) for i in todo]

        def keep(place: int, row: list[float], row_states: list[int]) -> None:
            index = todo[place]
            kept = Kept(row, row_states)
            self._journal.put(requests[index], completions[index], kept)

        scores = self._scorer.score(samples, on_result=keep)
        values[todo], states[todo] = scores.values, scores.states
        counts.failed.update(self._scorer.count(states, FAILED))
        counts.timed_out.update(self._scorer.count(states, TIMED_OUT))
        return values, self._scorer.total(values)


def empty_arrays(rows: int, context: int, longest: int, support: int) -> Arrays:
    """Returns a rollout's arrays, `[N, T]` and `[N, C]`, without anything in them.

    support: bytes of a token's support, 0 where that is not kept.
    """
    per_token = (rows, longest)
    arrays = {
        "tokens": np.zeros((rows, context), np.int32),
        "prompt_lengths": np.ones(rows, np.int32),
        "completions": np.zeros(per_token, np.int32),
        "completion_mask": np.zeros(per_token, np.float32),
        "loss_mask": np.zeros(per_token, np.float32),
        "rollout_logprobs": np.zeros(per_token, np.float32),
        "advantages": np.zeros(rows, np.float32),
    }
    if support:
        arrays["support"] = np.zeros((*per_token, support), np.uint8)
    return arrays


def to_arrays(
    groups: Sequence[Group], setup: Setup, support: int
) -> tuple[Arrays, Advantages]:
    """Returns a rollout as `empty_arrays` has it, and its advantages."""
    trainer = setup.trainer
    advantages = group_advantages(
        np.concatenate([group.totals for group in groups]),
        trainer.num_generations,
        trainer.scale_rewards,
    )
    longest = setup.sampling.max_new_tokens
    rows = len(groups) * trainer.num_generations
    arrays = empty_arrays(rows, trainer.context, longest, support)
    arrays["advantages"][:] = advantages.advantages
    pairs = [
        pair
        for group in groups
        for pair in zip(group.requests, group.completions, strict=True)
    ]
    for row, (request, completion) in enumerate(pairs):
        start, count = len(request.prompt), len(completion.token_ids)
        arrays["tokens"][row, :start] = request.prompt
        arrays["tokens"][row, start : start + count] = completion.token_ids
        arrays["prompt_lengths"][row] = start
        arrays["completions"][row, :count] = completion.token_ids
        arrays["completion_mask"][row, :count] = 1.0
        arrays["rollout_logprobs"][row, :count] = completion.sampled_logprobs
        if support:
            arrays["support"][row, :count] = completion.support
        if completion.finish_reason == "stop" or not trainer.mask_truncated_completions:
            arrays["loss_mask"][row, :count] = 1.0
    return arrays, advantages


def rollout_metrics(
    groups: Sequence[Group], advantages: Advantages, counts: Counts, setup: Setup
) -> dict[str, float]:
    """Returns a rollout's metrics under TRL 1.16's names, and what it took."""
    trainer = setup.trainer
    completions = [c for group in groups for c in group.completions]
    metrics = _length_metrics(completions)
    values = np.concatenate([group.values for group in groups])
    for name, column in zip(trainer.rewards, values.T, strict=True):
        known = column[np.isfinite(column)]
        if len(known):
            metrics[f"rewards/{name}/mean"] = float(known.mean())
        if len(known) > 1:
            metrics[f"rewards/{name}/std"] = float(known.std(ddof=1))
    metrics |= {
        "reward": advantages.reward_mean,
        "reward_std": advantages.reward_std,
        "frac_reward_zero_std": advantages.frac_reward_zero_std,
    }
    for what, by_name in (("failed", counts.failed), ("timed_out", counts.timed_out)):
        for name, count in by_name.items():
            metrics[f"rewards/{name}/{what}"] = float(count)
    if trainer.dynamic_sampling:
        metrics["dynamic_sampling/acceptance"] = (
            sum(group.is_informative(trainer.outcome_index) for group in groups)
            / counts.groups
        )
        metrics["dynamic_sampling/wasted_tokens"] = float(counts.wasted_tokens)
    metrics |= {
        "rollout/prompts": float(counts.consumed),
        "rollout/prompts_left_out": float(counts.consumed - counts.groups),
        "rollout/time": counts.sampling_seconds,
        "rollout/reward_time": counts.reward_seconds,
        "rollout/tokens_per_second": counts.new_tokens / counts.sampling_seconds,
    }
    return {name: value for name, value in metrics.items() if np.isfinite(value)}


def _length_metrics(completions: Sequence[Completion]) -> dict[str, float]:
    lengths = np.array([len(c.token_ids) for c in completions])
    ended = np.array([c.finish_reason == "stop" for c in completions])
    metrics = {"completions/clipped_ratio": float(1.0 - ended.mean())}
    for name, some in (("length", lengths), ("terminated_length", lengths[ended])):
        for how in ("mean", "min", "max"):
            value = getattr(some, how)() if len(some) else 0.0
            metrics[f"completions/{how}_{name}"] = float(value)
    return metrics


def completion_rows(
    groups: Sequence[Group], advantages: Advantages, rewards: Sequence[str]
) -> list[dict]:
    """Returns a row per completion, for `Tracker.log_completions`."""
    rows = []
    for group in groups:
        for completion, values in zip(group.completions, group.values, strict=True):
            rows.append(
                {
                    "prompt": group.prompt.text,
                    "completion": completion.text,
                    **dict(zip(rewards, map(float, values), strict=True)),
                    "advantage": float(advantages.advantages[len(rows)]),
                }
            )
    return rows
