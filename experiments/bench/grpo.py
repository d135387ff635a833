"""Completions per second of a GRPO step, beside TRL's GRPOTrainer.

Both sides sample from the same weights, for the same prompts and as many tokens, score
the texts by the same function and make one update. They run in one process, step by
step in turns. Prints ratios: the figures of one run compare, those of two need not.
"""

import json
import os
import sys
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from common import load, use_cores
from trainer_figures import (
    Metrics,
    Seconds,
    show_last,
    show_speeds,
    take_steps,
    verdict,
)

NAMES = ("Tom", "Lily", "Ben", "Mia", "Max", "Sue", "Tim", "Anna")
PLACES = ("in a small house", "near the sea", "in the park", "on a farm")
BEGINNINGS = ("Once upon a time, {name} lived {place}.", "One day {name} was {place}.")


def main(overrides: list[str]) -> None:
    """Runs the benchmark of grpo.yaml and prints its figures."""
    config = load("grpo", overrides)
    use_cores(config["threads"])
    print(
        f"load average {os.getloadavg()[0]:.1f} before the start: near 0 is a fair run"
    )
    seconds, metrics = compare(config)
    completions = config["prompts"] * config["generations"]
    print(
        f"{config['prompts']} prompts, {config['generations']} completions each of at "
        f"most {config['new_tokens']} tokens, {config['threads']} threads"
    )
    show_speeds(seconds, completions, "completions/s")
    show_last(metrics, ("completions/mean_length", "reward", "entropy", "grad_norm"))
    show_last(metrics, ("rollout/time", "rollout/tokens_per_second"))
    for name in ("bar", "goal"):
        print(verdict(seconds, name, config[name]))


def compare(config: Mapping[str, Any]) -> tuple[Seconds, Metrics]:
    """Returns the seconds of each side's timed steps, and the metrics of all steps."""
    import rl_reward
    import trl_side
    from trainer_side import TrainerSteps

    prompts = make_prompts(config["prompts"])
    with tempfile.TemporaryDirectory() as root:
        work = Path(root)
        data = work / "prompts.jsonl"
        data.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
        ours = TrainerSteps(
            [
                *config["overrides"],
                f"data.path={data}",
                f"seed={config['seed']}",
                f"trainer.rewards=[{rl_reward.__name__}:relax]",
                f"trainer.num_generations={config['generations']}",
                f"trainer.batch_size={config['prompts'] * config['generations']}",
                f"trainer.accumulation={config['accumulation']}",
                f"trainer.context={config['longest_prompt'] + config['new_tokens']}",
                f"sampling.max_new_tokens={config['new_tokens']}",
                f"optimizer.learning_rate={config['learning_rate']}",
            ],
            config["checkpoint"],
            work / "run",
        )
        ours.model.save_hf(work / "model")
        make = partial(
            trl_side.grpo,
            work / "model",
            work / "trl",
            prompts,
            rl_reward.trl,
            config,
        )
        theirs = trl_side.TRLSteps(make, config["threads"])
        return take_steps(ours, theirs, config)


def make_prompts(count: int) -> list[str]:
    """Returns beginnings of stories, all different; raises ValueError for too many."""
    prompts = [
        beginning.format(name=name, place=place)
        for beginning in BEGINNINGS
        for place in PLACES
        for name in NAMES
    ]
    if count > len(prompts):
        raise ValueError(f"prompts={count}: there are {len(prompts)}")
    return prompts[:count]


if __name__ == "__main__":
    main(sys.argv[1:])
