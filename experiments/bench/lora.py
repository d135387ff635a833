"""Seconds and memory of a training step with LoRA, beside one of full fine-tuning.

Both sides take the whole step (forward, backward, clip by global norm, AdamW) of the
same model on the same tokens in one process, in turns. Memory is what the compiled step
asks for: its state, and what it needs besides. Prints ratios: the figures of one run
compare, those of two runs need not.
"""

import sys
from collections.abc import Mapping
from statistics import median
from typing import Any

from common import MEBIBYTE, load, speed_ratio, take_turns, use_cores

FULL = "full"


def main(overrides: list[str]) -> None:
    """Runs the benchmark of lora.yaml and prints its figures."""
    config = load("lora", overrides)
    use_cores(config["threads"])
    report(config, *compare(config))


def compare(config: Mapping[str, Any]) -> tuple[dict, dict]:
    """Returns each side's seconds per step, round by round, and its memory."""
    import relax_side

    lora = f"LoRA, rank {config['rank']}"
    ranks = {FULL: 0, lora: config["rank"]}
    sides = {
        name: relax_side.TrainStep(
            {**config, "model": {**config["model"], "lora_rank": rank}}
        )
        for name, rank in ranks.items()
    }
    memory = {name: side.memory for name, side in sides.items()}
    steps = config["steps"]
    seconds = take_turns(
        {name: lambda side=side: side.run(steps) for name, side in sides.items()},
        warmup=config["warmup"],
        rounds=config["rounds"],
    )
    return {name: [s / steps for s in times] for name, times in seconds.items()}, memory


def report(config, seconds, memory) -> None:
    """Prints speed, memory and ratios, full fine-tuning being 1."""
    model = config["model"]
    print(
        f"batch {config['batch_size']} x {config['context']}, "
        f"{model['compute_dtype']}, remat {model['remat']}, {config['threads']} "
        f"threads, {config['rounds']} rounds of {config['steps']} steps in turns"
    )
    for name, times in seconds.items():
        state, besides = memory[name]
        print(
            f"{name:16}{median(times) * 1e3:9.1f} ms/step"
            f"{state / MEBIBYTE:9,.0f} MiB state"
            f"{besides / MEBIBYTE:9,.0f} MiB besides"
        )
    lora = next(name for name in seconds if name != FULL)
    (state, besides), (lora_state, lora_besides) = memory[FULL], memory[lora]
    share = (lora_state + lora_besides) / (state + besides)
    print(
        f"{lora} / {FULL}, steps/s: {speed_ratio(seconds[lora], seconds[FULL])}\n"
        f"{lora} / {FULL}, memory: {share:.2f} (state {lora_state / state:.2f}, "
        f"besides {lora_besides / besides:.2f})"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
