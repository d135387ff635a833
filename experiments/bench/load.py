"""Peak anonymous memory and speed of loading a checkpoint, beside transformers.

Random weights are written once per file dtype and number of shards; each load has a
fresh process, whose imports are not counted. Anonymous memory leaves out the pages of
mapped files, which the kernel may drop: transformers keeps tensors mapped where it need
not convert them. ReLax holds the parameters, and may hold twice its largest stacked
leaf besides: the run exits with 1 where it holds more. Files were just written, so the
speed is that of reading the page cache.
"""

import importlib.util
import json
import multiprocessing
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes  # noqa: F401  (numpy knows bfloat16 by it)
import numpy as np
from common import MEBIBYTE
from common import load as load_config
from safetensors.numpy import save_file

from relax.checkpoints.hf_config import write_config
from relax.checkpoints.names import leaves
from relax.config import to_dataclass
from relax.model.config import LlamaConfig
from relax.model.parameters import parameter_shapes
from relax.runtime import RuntimeConfig, configure

PEER = "transformers"


class Usage(NamedTuple):
    """What a load took: anonymous bytes at its peak above those before; seconds."""

    peak: int
    seconds: float


class Target(NamedTuple):
    """Bytes of all parameters, and of the largest array that holds every layer."""

    size: int
    largest_stacked: int

    @property
    def bound(self) -> int:
        """The anonymous bytes that loading may take."""
        return self.size + 2 * self.largest_stacked


class Load(NamedTuple):
    """One load: from which files, by whom, in which dtype."""

    file_dtype: str
    dtype: str
    shards: int
    loader: str  # PEER, or ReLax's name with its setting
    keep_freed_memory: bool | None


def main(overrides: list[str]) -> int:
    """Runs the benchmark of load.yaml and prints its figures; returns the exit code."""
    config = load_config("load", overrides)
    misses = 0
    with tempfile.TemporaryDirectory() as root:
        for load in plan(config):
            folder = Path(root, f"{load.file_dtype}-{load.shards}")
            if not folder.exists():
                write_checkpoint(folder, config, load.file_dtype, load.shards)
            misses += report(config, load, folder, run(config, load, folder))
    return 1 if misses else 0


def plan(config: Mapping[str, Any]) -> Iterator[Load]:
    """Yields what is to be loaded, the loads of one folder one after another."""
    for shards in config["shards"]:
        for file_dtype, dtype in config["cases"]:
            for keep in config["keep_freed_memory"]:
                name = f"relax, keep_freed_memory={str(keep).lower()}"
                yield Load(file_dtype, dtype, shards, name, keep)
            if importlib.util.find_spec(PEER):
                yield Load(file_dtype, dtype, shards, PEER, None)


def run(config: Mapping[str, Any], load: Load, folder: Path) -> Usage:
    """Returns what a load takes in a fresh process."""
    loader = load_transformers if load.loader == PEER else load_relax
    runtime = {**config["runtime"], "keep_freed_memory": bool(load.keep_freed_memory)}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        arguments = (folder, load.dtype, runtime, config["interval"])
        return pool.submit(loader, *arguments).result()


def report(config, load: Load, folder: Path, usage: Usage) -> bool:
    """Prints a load's figures; returns whether it is ours and above the bound."""
    target = target_of(model_config(config, load.dtype))
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    print(
        f"{load.file_dtype} in {load.shards} file{'s' * (load.shards > 1)} as "
        f"{load.dtype}, {load.loader}: peak {usage.peak / MEBIBYTE:,.0f} MiB, "
        f"parameters {target.size / MEBIBYTE:,.0f}, largest stacked leaf "
        f"{target.largest_stacked / MEBIBYTE:,.0f}; peak / bound of "
        f"{target.bound / MEBIBYTE:,.0f}: {usage.peak / target.bound:.2f}; "
        f"{usage.seconds:.2f} s, {size / 1e6 / usage.seconds:,.0f} MB/s",
        flush=True,
    )
    return load.loader != PEER and usage.peak > target.bound


def model_config(config: Mapping[str, Any], dtype: str) -> LlamaConfig:
    """Returns the model held in `dtype`."""
    fields = {**config["model"], "param_dtype": dtype, "compute_dtype": dtype}
    return to_dataclass(LlamaConfig, fields, "model")


def target_of(model: LlamaConfig) -> Target:
    """Returns the sizes of a model's parameters in their dtype."""
    shapes = parameter_shapes(model)
    sizes = {
        (module, name): leaf.size * leaf.dtype.itemsize
        for module, named in shapes.items()
        for name, leaf in named.items()
    }
    stacked = {(leaf.module, leaf.name) for leaf in leaves(model) if leaf.stacked}
    return Target(sum(sizes.values()), max(sizes[key] for key in stacked))


def write_checkpoint(
    folder: Path, config: Mapping[str, Any], dtype: str, shards: int
) -> None:
    """Writes random weights in `shards` files of about as many tensors each."""
    model = model_config(config, dtype)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(write_config(model)))
    shapes = sorted(
        (name, leaf.their_shape(model.vocab_size))
        for leaf in leaves(model)
        for name in leaf.names
    )
    generator = np.random.default_rng(config["seed"])
    files = [
        "model.safetensors"
        if shards == 1
        else f"model-{i + 1:05}-of-{shards:05}.safetensors"
        for i in range(shards)
    ]
    weight_map = {
        name: files[i * shards // len(shapes)] for i, (name, _) in enumerate(shapes)
    }
    for file, group in groupby(shapes, lambda item: weight_map[item[0]]):
        tensors = {
            name: generator.random(shape, np.float32).astype(dtype)
            for name, shape in group
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if shards > 1:
        index = folder / "model.safetensors.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def load_relax(
    folder: Path, dtype: str, runtime: Mapping[str, Any], interval: float
) -> Usage:
    """Returns what relax.load takes in this process."""
    configure(to_dataclass(RuntimeConfig, runtime, "runtime"))
    import relax

    jax.devices()
    jax.block_until_ready(jax.numpy.zeros(2))

    def load():
        return jax.block_until_ready(relax.load(folder, dtype=dtype).params)

    return watch(load, interval)


def load_transformers(
    folder: Path, dtype: str, _: Mapping[str, Any], interval: float
) -> Usage:
    """Returns what transformers' from_pretrained takes in this process."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    with torch.device("meta"):  # what it imports only with the first model
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))

    def load():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))

    return watch(load, interval)


def watch(load: Callable[[], Any], interval: float) -> Usage:
    """Returns what `load` takes in this process, looked at every `interval` seconds."""
    before = anonymous()
    peak, over = before, threading.Event()

    def look():
        nonlocal peak
        while not over.wait(interval):
            peak = max(peak, anonymous())

    watcher = threading.Thread(target=look)
    watcher.start()
    start = time.perf_counter()
    try:
        loaded = load()
    finally:
        seconds = time.perf_counter() - start
        over.set()
        watcher.join()
    peak = max(peak, anonymous())  # while what was loaded is there
    del loaded
    return Usage(peak - before, seconds)


def anonymous() -> int:
    """Returns the resident bytes of this process that no file backs (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) * 1024


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
