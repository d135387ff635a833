"""Tokens per second and peak memory of a training step, beside transformers' Llama.

Both sides take the whole step (forward, backward, clip by global norm, AdamW) on the
same weights and tokens in one process, in turns. Prints ratios: the figures of one run
compare, those of two runs need not.
"""

import sys
from collections.abc import Mapping
from statistics import median
from typing import Any

from common import (
    MEBIBYTE,
    load,
    make_batch,
    peak_memory,
    speed_ratio,
    take_turns,
    use_cores,
)

MODULES = {"relax": "relax_side", "pytorch": "torch_side"}
TOLERANCE = 1e-4


def main(overrides: list[str]) -> None:
    """Runs the benchmark of train_step.yaml and prints its figures."""
    config = load("train_step", overrides)
    use_cores(config["threads"])
    peaks = {
        name: peak_memory(module, config, config["memory_steps"])
        for name, module in MODULES.items()
    }
    seconds = compare(config)
    report(config, seconds, peaks)


def compare(config: Mapping[str, Any]) -> dict[str, list[float]]:
    """Returns each side's seconds per step, round by round.

    Raises ValueError where the first losses differ: the sides do different work.
    """
    import relax_side
    import torch_side

    ours = relax_side.TrainStep(config)
    weights = ours.weights()
    sides = {
        "relax": ours,
        "pytorch": torch_side.TrainStep(config, weights),
        "pytorch, fused AdamW": torch_side.TrainStep(config, weights, fused=True),
    }
    print(f"{ours.num_parameters:,} parameters, {ours.attention} attention")
    losses = {name: side.run(1) for name, side in sides.items()}
    print("first loss: " + ", ".join(f"{n} {x:.6f}" for n, x in losses.items()))
    difference = max(losses.values()) - min(losses.values())
    if not difference < TOLERANCE:
        raise ValueError(f"the first losses differ by {difference:.1e}: {losses}")
    steps = config["steps"]
    seconds = take_turns(
        {name: lambda side=side: side.run(steps) for name, side in sides.items()},
        warmup=config["warmup"],
        rounds=config["rounds"],
    )
    return {name: [s / steps for s in times] for name, times in seconds.items()}


def report(config, seconds, peaks) -> None:
    """Prints speed, ratios and memory."""
    rows, width = make_batch(config)[0].shape
    print(
        f"batch {rows} x {width}, {config['model']['compute_dtype']}, "
        f"{config['threads']} threads, {config['rounds']} rounds of "
        f"{config['steps']} steps in turns"
    )
    for name, times in seconds.items():
        middle = median(times)
        print(
            f"{name:22}{rows * width / middle:9,.0f} tokens/s"
            f"{middle * 1e3:9.1f} ms/step"
        )
    ours, *theirs = seconds
    for name in theirs:
        ratio = speed_ratio(seconds[ours], seconds[name])
        print(f"{ours} / {name}, tokens/s: {ratio}")
    for name, (peak, imports) in peaks.items():
        print(
            f"{name:22}{peak / MEBIBYTE:9,.0f} MiB peak, "
            f"{imports / MEBIBYTE:,.0f} of it before the model"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
