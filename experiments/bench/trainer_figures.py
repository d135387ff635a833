"""Figures of the benchmarks of trainers."""

from collections.abc import Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any

from common import speed_ratio, take_turns

Seconds = Mapping[str, Sequence[float]]
Metrics = Mapping[str, Sequence[Mapping[str, float]]]


def take_steps(ours, theirs, config: Mapping[str, Any]) -> tuple[Seconds, Metrics]:
    """Returns the seconds of each side's timed steps, and the metrics of all steps.

    The sides are closed. TRL tells of a step when the next one is over.
    """
    sides = {"relax": ours, "trl": theirs}
    metrics: dict[str, list[Mapping[str, float]]] = {name: [] for name in sides}

    def step(name: str) -> None:
        metrics[name].append(sides[name].run())

    try:
        seconds = take_turns(
            {name: partial(step, name) for name in sides},
            warmup=config["warmup"],
            rounds=config["rounds"],
        )
    finally:
        for side in sides.values():
            side.close()
    metrics["trl"] = metrics["trl"][1:]
    return seconds, metrics


def show_speeds(seconds: Seconds, count: int, unit: str) -> None:
    """Prints the median speed and time of each side."""
    for name, times in seconds.items():
        middle = median(times)
        print(f"{name:8}{count / middle:9,.1f} {unit}{middle * 1e3:11,.1f} ms/step")


def show_last(metrics: Metrics, names: Sequence[str]) -> None:
    """Prints what the last step of each side says of itself."""
    for side, (*_, values) in metrics.items():
        known = [f"{name} {values[name]:.4f}" for name in names if name in values]
        if known:
            print(f"{side:8}" + ", ".join(known))


def verdict(seconds: Seconds, name: str, bar: float) -> str:
    """Returns the speed of the first side in that of the second, beside a bar."""
    ours, theirs = seconds.values()
    ratio = median(b / a for a, b in zip(ours, theirs, strict=True))
    met = "met" if ratio >= bar else "missed"
    return f"relax / trl: {speed_ratio(ours, theirs)}, {name} {bar:.2f}: {met}"
