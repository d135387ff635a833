"""The cases of the generation benchmark that need a GPU."""

import time
from collections.abc import Mapping
from functools import partial
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import MEBIBYTE, take_turns
from generate_sides import Bench, complete, describe, random_prompts, run_turns

from relax import LanguageModel


def gpu(bench: Bench, case: Mapping[str, Any]) -> None:
    """Decodes one row beside the memory's bandwidth, then many requests."""
    if not has_gpu():
        print(f"left out: it needs a GPU, and this is {jax.default_backend()}")
        return
    decode_alone(bench, case, copy_bandwidth(case))
    serve(bench, case)


def has_gpu() -> bool:
    """Whether JAX computes on a GPU."""
    return jax.default_backend() == "gpu"


def copy_bandwidth(case: Mapping[str, Any]) -> float:
    """Returns bytes read and written per second by a copy, the best of the rounds."""
    size = case["copy_mib"] * MEBIBYTE
    source = jax.block_until_ready(jnp.zeros(size // 4, jnp.float32))
    copy = jax.jit(jnp.copy)
    runs = {"copy": lambda: jax.block_until_ready(copy(source))}
    seconds = take_turns(runs, warmup=case["warmup"], rounds=case["rounds"])
    bandwidth = 2 * size / min(seconds["copy"])
    print(f"copying {case['copy_mib']:,} MiB: {bandwidth / 1e9:,.0f} GB/s")
    return bandwidth


def decode_alone(bench: Bench, case: Mapping[str, Any], bandwidth: float) -> None:
    """Prints which share of `bandwidth` the weights are read with, for one row."""
    model, new_tokens = bench.gpu_model, case["new_tokens"]
    generator = np.random.default_rng(case["seed"])
    V = model.config.vocab_size
    prompts = random_prompts(V, [case["prompt"]], generator)

    def run(count: int):
        sampling = bench.sampling(count)
        return complete(model, prompts, sampling, 1, share_prefixes=False)

    sides = {count: partial(run, count) for count in (1, new_tokens)}
    seconds, _ = run_turns(model, sides, case)
    decoding = np.subtract(seconds[new_tokens], seconds[1]) / (new_tokens - 1)
    shares = weight_bytes(model) / decoding / bandwidth
    print(
        f"{describe(prompts)} tokens, {new_tokens} new: "
        f"{1 / median(decoding):,.1f} tokens/s, {median(decoding) * 1e3:.2f} ms/token, "
        f"{weight_bytes(model) / 1e9:.2f} GB of weights each"
    )
    verdict = "met" if median(shares) >= case["goal"] else "missed"
    print(
        f"share of the bandwidth: {median(shares):.2f} ({min(shares):.2f} to "
        f"{max(shares):.2f}), goal {case['goal']:.2f}: {verdict}"
    )


def weight_bytes(model: LanguageModel) -> int:
    """Returns the bytes of weights that a step reads: all but an untied embedding."""
    leaves = jax.tree_util.tree_leaves_with_path(model.params)
    tied = model.config.tie_word_embeddings
    return sum(
        leaf.nbytes
        for path, leaf in leaves
        if tied or "embed_tokens" not in jax.tree_util.keystr(path)
    )


def serve(bench: Bench, case: Mapping[str, Any]) -> None:
    """Prints the tokens per second of requests of random lengths in and out."""
    model, count = bench.gpu_model, case["requests"]
    generator = np.random.default_rng(case["seed"])
    span = case["shortest"], case["longest"] + 1
    lengths = generator.integers(*span, count)
    limits = generator.integers(*span, count).tolist()
    prompts = random_prompts(model.config.vocab_size, lengths, generator)
    run = partial(
        complete,
        model,
        sampling=bench.sampling(case["longest"]),
        batch_size=case["slots"],
        share_prefixes=False,
    )
    run(prompts, limits=limits)  # compiles
    start = time.perf_counter()
    run(prompts, limits=limits)
    seconds = time.perf_counter() - start
    new, read = sum(limits), sum(lengths)
    print(
        f"{describe(prompts)} tokens, {min(limits)} to {max(limits)} new, "
        f"{case['slots']} slots: {seconds:.1f} s, {new / seconds:,.0f} new tokens/s, "
        f"{(new + read) / seconds:,.0f} with those read"
    )
