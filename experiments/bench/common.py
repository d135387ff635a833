"""What the benchmarks share: their configs, turns in one process, memory, figures."""

import importlib
import multiprocessing
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

HERE = Path(__file__).resolve().parent
CONF = HERE.parents[1] / "conf"
MEBIBYTE = 2**20


def load(name: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Returns `<name>.yaml` of this folder, its groups taken from conf/."""
    with initialize_config_dir(str(HERE), version_base="1.3"):
        groups = f"hydra.searchpath=['file://{CONF}']"
        config = compose(name, [groups, *overrides])
    return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)


def use_cores(count: int) -> None:
    """Leaves this process and its children `count` cores; XLA takes all that it sees.

    Raises ValueError where there are fewer.
    """
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < count:
        raise ValueError(
            f"threads={count} needs as many cores, and this process has {len(cores)}; "
            f"set threads={len(cores)}"
        )
    os.sched_setaffinity(0, cores[:count])


def make_batch(config: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Returns random tokens and the tokens after them, `[B, T]` each."""
    generator = np.random.default_rng(config["seed"])
    shape = (config["batch_size"], config["context"] + 1)
    rows = generator.integers(config["model"]["vocab_size"], size=shape, dtype=np.int32)
    return rows[:, :-1], rows[:, 1:]


def take_turns(
    sides: Mapping[str, Callable[[], Any]], *, warmup: int, rounds: int
) -> dict[str, list[float]]:
    """Returns each side's seconds per round: in a round the sides run one by one.

    What slows the machine for a while so slows both sides; their ratio is taken round
    by round.
    """
    for run in sides.values():
        for _ in range(warmup):
            run()
    seconds = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def speed_ratio(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Returns the speed of `ours` in that of `theirs`: median (least to most)."""
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    return f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def peak_memory(module: str, config: dict[str, Any], steps: int) -> tuple[int, int]:
    """Returns bytes: the peak of a fresh process over `steps`, and of its imports.

    `module` holds a side's TrainStep.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_peaks, module, config, steps).result()


def _peaks(module: str, config: dict[str, Any], steps: int) -> tuple[int, int]:
    side = importlib.import_module(module)
    imports = _peak()
    side.TrainStep(config).run(steps)
    return _peak(), imports


def _peak() -> int:
    """Returns this program's peak resident bytes; getrusage gives its parent's too."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024
