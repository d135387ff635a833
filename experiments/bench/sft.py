"""Rows per second of a step of supervised fine-tuning, beside TRL's SFTTrainer.

Both sides make one update on the same rows, from the same weights, in one process, step
by step in turns. Prints ratios: the figures of one run compare, those of two need not.
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

import relax.data

TEXT = Path(relax.data.__file__).with_name("shakespeare_excerpt.txt")
TOLERANCE = 1e-3  # of the loss after the untimed steps


def main(overrides: list[str]) -> None:
    """Runs the benchmark of sft.yaml and prints its figures."""
    config = load("sft", overrides)
    use_cores(config["threads"])
    print(
        f"load average {os.getloadavg()[0]:.1f} before the start: near 0 is a fair run"
    )
    seconds, metrics = compare(config)
    print(
        f"{config['rows']} rows of {config['context']} tokens, "
        f"{config['threads']} threads"
    )
    show_speeds(seconds, config["rows"], "rows/s")
    show_last(metrics, ("loss", "grad_norm"))
    print(verdict(seconds, "bar", config["bar"]))


def compare(config: Mapping[str, Any]) -> tuple[Seconds, Metrics]:
    """Returns the seconds of each side's timed steps, and the metrics of all steps.

    Raises ValueError where the losses differ: the sides do different work.
    """
    import trl_side
    from trainer_side import TrainerSteps

    texts = make_texts(config["rows"], config["characters"])
    with tempfile.TemporaryDirectory() as root:
        work = Path(root)
        data = work / "texts.jsonl"
        data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        ours = TrainerSteps(
            [
                *config["overrides"],
                f"data.path={data}",
                f"data.cache_dir={work / 'cache'}",
                f"seed={config['seed']}",
                f"trainer.batch_size={config['rows']}",
                f"trainer.accumulation={config['accumulation']}",
                f"trainer.context={config['context']}",
                f"optimizer.learning_rate={config['learning_rate']}",
            ],
            config["checkpoint"],
            work / "run",
        )
        ours.model.save_hf(work / "model")
        make = partial(trl_side.sft, work / "model", work / "trl", texts, config)
        theirs = trl_side.TRLSteps(make, config["threads"])
        return take_steps(ours, theirs, config)


def make_texts(count: int, characters: int) -> list[str]:
    """Returns parts of Shakespeare; raises ValueError where there is too little."""
    text = TEXT.read_text(encoding="utf-8")
    if count * characters > len(text):
        raise ValueError(f"rows={count}: the text has {len(text) // characters}")
    return [
        text[at : at + characters] for at in range(0, count * characters, characters)
    ]


if __name__ == "__main__":
    main(sys.argv[1:])
