"""Tokens per second of the inference engine, beside transformers and beside itself.

A random Llama makes a fixed number of tokens greedily, past any end of text. The sides
of a case run in one process, in turns, and must give the same tokens, at least up to a
near-tie. Prints ratios, the median round and the extremes, beside the bars of
generate.yaml: the figures of one run compare, those of two runs need not.
"""

import os
import sys
from functools import partial

import generate_peer
import generate_self
from common import load, use_cores
from generate_gpu import gpu
from generate_sides import Bench

from relax.config import to_dataclass
from relax.runtime import RuntimeConfig, configure

CASES = {
    "batch1": generate_peer.whole,
    "batch8": generate_peer.whole,
    "ragged16": generate_peer.whole,
    "prefill": generate_peer.prefill,
    "allocation": generate_self.allocation,
    "continuous_small": partial(generate_self.continuous, small=True),
    "continuous": generate_self.continuous,
    "prefix": generate_self.prefix,
    "speculation": generate_self.speculation,
    "gpu": gpu,
}


def main(overrides: list[str]) -> None:
    """Runs the cases of generate.yaml and prints their figures.

    Raises ValueError for a case that is unknown, and where two sides do different work.
    """
    config = load("generate", overrides)
    if unknown := [name for name in config["cases"] if name not in CASES]:
        raise ValueError(f"cases={unknown} are unknown; choose of {', '.join(CASES)}")
    use_cores(config["threads"])
    configure(to_dataclass(RuntimeConfig, config["runtime"], "runtime"))
    # PyTorch's threads wait for one another at every operation: on a busy machine they
    # lose far more than their share, and transformers looks worse than it is.
    print(
        f"load average {os.getloadavg()[0]:.1f} before the start: near 0 is a fair run"
    )
    bench = Bench(config)
    for name in config["cases"]:
        print(f"\n{name}", flush=True)
        CASES[name](bench, {**config, **config[name]})


if __name__ == "__main__":
    main(sys.argv[1:])
