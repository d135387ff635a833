"""How well held-out prompts are completed."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from relax.data.records import Records
from relax.generation.requests import Completion, Request
from relax.rewards import RewardScorer, Sample
from relax.trainers.config import Setup
from relax.trainers.loop import Evaluation
from relax.trainers.prompts import LengthError, Prompt, check_length, make_prompt
from relax.trainers.sampler import Sampler

logger = logging.getLogger(__name__)

FIRST_INDEX = 2**31  # of held-out prompts: no key of theirs is one of training's


def pass_at_k(solved: Sequence[int], num_samples: int, k: int) -> float:
    """Returns the mean chance that one of k samples is right.

    solved: right ones among `num_samples`, per prompt. The unbiased estimate of Chen et
    al. 2021, https://arxiv.org/abs/2107.03374, eq. 1.
    """
    wrong = math.comb(num_samples, k)
    return float(np.mean([1 - math.comb(num_samples - c, k) / wrong for c in solved]))


def held_out_prompts(
    setup: Setup, records: Records, count: int, skip_long: bool = False
) -> list[Prompt]:
    """Returns the first `count` prompts of held-out records, for completion.

    skip_long: without those that are too long. Raises ValueError where there are none,
    or one is too long; errors count records from the first of training's.
    """
    skipped = LengthError if skip_long else ()
    prompts, _ = _take(setup, records, count, skipped)
    if not prompts:
        raise ValueError(
            f"trainer.eval_prompts={count}, and no validation record has a prompt that "
            "fits model.max_position_embeddings; set trainer.eval_prompts=0"
        )
    return prompts


def prompts_that_fit(setup: Setup, records: Records, count: int) -> list[Prompt]:
    """Returns the first `count` prompts of held-out records, of those that fit.

    How many records were passed over, and why the first, is logged. Raises ValueError
    where no records are held out.
    """
    prompts, reasons = _take(setup, records, count, ValueError)
    if reasons:
        logger.warning(
            "data: %d of the first %d held-out records are not completed: %s",
            len(reasons),
            len(prompts) + len(reasons),
            reasons[0] if len(reasons) == 1 else f"{reasons[0]}, to name the first",
        )
    return prompts


def _take(
    setup: Setup, records: Records, count: int, skipped
) -> tuple[list[Prompt], list[ValueError]]:
    """Returns `count` held-out prompts, and the `skipped` errors of those before."""
    held_out, first = records.validation, len(records.train)
    if not len(held_out):
        raise ValueError(
            f"trainer.eval_prompts={count}, and the data holds no validation records; "
            "hold some out, or set trainer.eval_prompts=0"
        )
    prompts: list[Prompt] = []
    reasons: list[ValueError] = []
    for index in range(len(held_out)):
        try:
            prompt = make_prompt(held_out[index], first + index, setup)
            check_length(prompt, first + index, setup, "model.max_position_embeddings")
            prompts.append(prompt)
        except skipped as error:
            reasons.append(error)
        if len(prompts) == count:
            break
    return prompts, reasons


def completion_metrics(setup: Setup) -> tuple[str, ...]:
    """Returns the names of what `make_completion_evaluation` may find."""
    counts = sorted({1, setup.trainer.eval_samples})
    return "val_ended", "val_mean_length", *(f"val_pass@{k}" for k in counts)


def make_completion_evaluation(
    setup: Setup,
    sampler: Sampler,
    prompts: Sequence[Prompt],
    scorer: RewardScorer | None,
) -> Callable[..., Evaluation]:
    """Returns params -> how the prompts are completed, `trainer.eval_samples` times.

    Metrics: `val_ended`, the share that ended by itself, `val_mean_length` in tokens,
    and `val_pass@1` and `val_pass@k` for k samples of the prompts that the scorer's one
    reward can judge, if it can judge any; a completion is right where it is at least 1,
    and not where it fails. The same keys are drawn with at each evaluation.
    """
    trainer = setup.trainer
    count = trainer.eval_samples
    sampling = replace(setup.sampling, seed=setup.seed)
    requests = [
        Request(prompt.ids, FIRST_INDEX + index, sample)
        for index, prompt in enumerate(prompts)
        for sample in range(count)
    ]

    def evaluate(params) -> Evaluation:
        completions = sampler.complete(
            sampler.decoding_params(params), requests, sampling, trainer.eval_batch_size
        )
        metrics = {
            "val_ended": _mean(c.finish_reason == "stop" for c in completions),
            "val_mean_length": _mean(len(c.token_ids) for c in completions),
        }
        rows = [prompt for prompt in prompts for _ in range(count)]
        shown = [
            {"prompt": prompt.text, "completion": completion.text}
            for prompt, completion in zip(rows, completions, strict=True)
        ][: trainer.show_samples * count : count]
        if scorer is not None:
            longest = sampling.max_new_tokens
            samples = [
                as_sample(*pair, longest)
                for pair in zip(rows, completions, strict=True)
            ]
            solved = _solved(scorer, samples).reshape(len(prompts), count)
            judged = solved[~np.isnan(solved).any(axis=1)].sum(axis=1).astype(int)
            for k in sorted({1, count}) if len(judged) else ():
                metrics[f"val_pass@{k}"] = pass_at_k(judged, count, k)
        return Evaluation(metrics, shown)

    return evaluate


def as_sample(prompt: Prompt, completion: Completion, max_new_tokens: int) -> Sample:
    """Returns what a reward judges."""
    return Sample(
        prompt=prompt.text,
        completion=completion.text,
        answer=prompt.answer,
        record=prompt.record,
        num_tokens=len(completion.token_ids),
        max_new_tokens=max_new_tokens,
        finished=completion.finish_reason == "stop",
    )


def _solved(scorer: RewardScorer, samples: Sequence[Sample]) -> np.ndarray:
    """Returns 1 for completions that are right, 0 for wrong ones and failures `[N]`.

    NaN where there is nothing to judge by.
    """
    scores = scorer.score(samples)
    values, states = scores.values[:, 0], scores.states[:, 0]
    right = np.where(np.isnan(values), np.nan, values >= 1.0)
    return np.where(states == 0, right, 0.0)


def _mean(values) -> float:
    return float(np.mean(list(values)))
