"""The cases of the generation benchmark beside transformers.

Both sides run the same weights on the same prompts, greedily. The prefix cache is off,
since the same prompts come again each round.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from generate_sides import (
    Bench,
    Rows,
    check_same,
    complete,
    describe,
    random_prompts,
    run_turns,
    show_ratio,
    show_speeds,
)


def whole(bench: Bench, case: Mapping[str, Any]) -> None:
    """Completes prompts of random lengths; counts new tokens."""
    generator = np.random.default_rng(case["seed"])
    lengths = generator.integers(case["shortest"], case["longest"] + 1, case["rows"])
    _compare(
        bench, case, lengths, case["new_tokens"], case["rows"] * case["new_tokens"]
    )


def prefill(bench: Bench, case: Mapping[str, Any]) -> None:
    """Reads a prompt, up to the first new token; counts its tokens."""
    for length in case["lengths"]:
        _compare(bench, case, [length], 1, length)


def _compare(bench: Bench, case, lengths, new_tokens: int, counted: int) -> None:
    if jax.default_backend() != "cpu":
        print("left out: the bar is one of two CPU sides")
        return
    model, generator = bench.model, np.random.default_rng(case["seed"])
    prompts = random_prompts(model.config.vocab_size, lengths, generator)
    sampling = bench.sampling(new_tokens)

    def ours() -> Rows:
        return complete(model, prompts, sampling, len(prompts), share_prefixes=False)

    def theirs() -> Rows:
        return bench.transformers.complete(prompts, new_tokens)

    print(f"{describe(prompts)} tokens, {new_tokens} new")
    seconds, rows = run_turns(model, {"relax": ours, "transformers": theirs}, case)
    check_same(model, prompts, *rows.values())
    show_speeds(seconds, counted)
    show_ratio("relax / transformers", *seconds.values(), case["bar"])
