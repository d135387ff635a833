"""The cases of the generation benchmark that compare the engine with itself."""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import numpy as np
from common import speed_ratio
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

from relax import LanguageModel


def allocation(bench: Bench, case: Mapping[str, Any]) -> None:
    """Decodes with few and with many slots allocated: the whole less the prefill."""
    few, many, new_tokens = case["few"], case["many"], case["new_tokens"]
    model = with_context(bench.model, many)
    generator = np.random.default_rng(case["seed"])
    length = case["used"] - new_tokens // 2
    prompts = random_prompts(model.config.vocab_size, [length], generator)

    def run(slots: int, count: int) -> Rows:
        sampling = bench.sampling(count)
        return complete(
            model, prompts, sampling, 1, capacity=slots, share_prefixes=False
        )

    sides = {
        (slots, count): partial(run, slots, count)
        for slots in (few, many)
        for count in (1, new_tokens)
    }
    print(f"{describe(prompts)} tokens, {new_tokens} new, {few} and {many} slots")
    seconds, rows = run_turns(model, sides, case)
    check_same(model, prompts, rows[few, new_tokens], rows[many, new_tokens])
    decoding = {
        f"{slots} slots": np.subtract(seconds[slots, new_tokens], seconds[slots, 1])
        for slots in (few, many)
    }
    show_speeds(decoding, new_tokens - 1)
    with_few, with_many = decoding.values()
    verdict = "met" if median(with_many / with_few) <= case["bar"] else "missed"
    print(
        f"time with {many} / {few} slots: {speed_ratio(with_few, with_many)}, "
        f"bar at most {case['bar']:.2f}: {verdict}"
    )


def with_context(model: LanguageModel, context: int) -> LanguageModel:
    """Returns the model with at least this context; RoPE's angles stay."""
    if context <= model.config.max_position_embeddings:
        return model
    config = replace(model.config, max_position_embeddings=context)
    return LanguageModel(config, model.params, None, model.mesh)


def continuous(bench: Bench, case: Mapping[str, Any], *, small: bool = False) -> None:
    """Refills each slot as soon as its row ends, or waits for a batch's last row."""
    model = bench.small_model if small else bench.model
    generator = np.random.default_rng(case["seed"])
    count, slots, cap = case["prompts"], case["slots"], case["cap"]
    lengths = generator.integers(case["shortest"], case["longest"] + 1, count)
    prompts = random_prompts(model.config.vocab_size, lengths, generator)
    drawn = np.ceil(generator.exponential(case["mean"], count))
    limits = np.clip(drawn, 1, cap).astype(int).tolist()
    run = partial(
        complete,
        model,
        sampling=bench.sampling(cap),
        batch_size=slots,
        capacity=case["longest"] + cap,  # the same shapes for all
        share_prefixes=False,
    )

    def refilled(prompts: Rows, limits: list[int]) -> Rows:
        return run(prompts, limits=limits)

    def in_batches(prompts: Rows, limits: list[int]) -> Rows:
        parts = [slice(at, at + slots) for at in range(0, len(prompts), slots)]
        return [row for p in parts for row in run(prompts[p], limits=limits[p])]

    sides = {"refilled slots": refilled, f"batches of {slots}": in_batches}
    print(
        f"{describe(prompts)} tokens, {sum(limits):,} new: {min(limits)} to "
        f"{max(limits)}, mean {np.mean(limits):.1f}; {slots} slots"
    )
    least, waiting = decode_steps(limits, slots)
    print(f"steps: {least:,} and {waiting:,}, {waiting / least:.2f} times as many")
    # Compiles every shape: the first fill, refills, and a last batch of fewer rows.
    few = prompts[: 2 * slots + count % slots]
    for side in sides.values():
        side(few, [2] * len(few))
    sides = {name: partial(side, prompts, limits) for name, side in sides.items()}
    seconds, rows = run_turns(model, sides, {**case, "warmup": 0})
    check_same(model, prompts, *rows.values())
    show_speeds(seconds, sum(limits))
    show_ratio("refilled slots / batches", *seconds.values(), case["bar"])


def decode_steps(limits: Sequence[int], slots: int) -> tuple[int, int]:
    """Returns the decode steps of rows in slots: refilled at once, and in batches."""
    ends = [0] * slots
    for limit in limits:
        heapq.heappush(ends, heapq.heappop(ends) + limit)
    batches = [limits[at : at + slots] for at in range(0, len(limits), slots)]
    return max(ends), sum(map(max, batches))


def prefix(bench: Bench, case: Mapping[str, Any]) -> None:
    """Completes prompts that share a prefix, which is run once or for each of them."""
    model, sampling = bench.model, bench.sampling(case["new_tokens"])
    generator = np.random.default_rng(case["seed"])
    sets = [
        shared_prompts(model, case, generator)
        for _ in range(case["warmup"] + case["rounds"])
    ]
    hits = []

    def side(shared: bool):
        coming = iter(sets)

        def run() -> Rows:
            before = model.stats.shared_tokens
            rows = complete(
                model, next(coming), sampling, case["slots"], share_prefixes=shared
            )
            if shared:
                hits.append(model.stats.shared_tokens - before)
            return rows

        return run

    print(
        f"{describe(sets[0])} tokens, {case['common']} of them shared, "
        f"{case['new_tokens']} new; {case['slots']} slots"
    )
    sides = {"shared prefix": side(True), "each on its own": side(False)}
    seconds, rows = run_turns(model, sides, case)
    check_same(model, sets[-1], *rows.values())
    print(f"{hits[-1]:,} of {sum(map(len, sets[-1])):,} prompt tokens were shared")
    show_speeds(seconds, case["prompts"] * case["new_tokens"])
    show_ratio("shared / on their own", *seconds.values(), case["bar"])


def shared_prompts(model: LanguageModel, case: Mapping[str, Any], generator) -> Rows:
    """Returns prompts of random tokens whose first ones are the same."""
    V = model.config.vocab_size
    [common] = random_prompts(V, [case["common"]], generator)
    own = random_prompts(V, [case["own"]] * case["prompts"], generator)
    return [common + tokens for tokens in own]


def speculation(bench: Bench, case: Mapping[str, Any]) -> None:
    """Completes a prompt that repeats itself, with and without looking up drafts.

    Random models bracket real ones: one never repeats itself, the other does nothing
    else.
    """
    generator = np.random.default_rng(case["seed"])
    V, length = bench.model.config.vocab_size, case["prompt"]
    [period] = random_prompts(V, [case["period"]], generator)
    prompts = [(period * (-(-length // len(period))))[:length]]
    print(
        f"{describe(prompts)} tokens, {len(period)} again and again, "
        f"{case['new_tokens']} new, drafts of {case['draft']}"
    )
    _speculate(bench, bench.model, case, prompts)
    _speculate(bench, bench.make("model", case["loops"]), case, prompts)


def _speculate(bench: Bench, model: LanguageModel, case, prompts: Rows) -> None:
    counts = []

    def run(draft: int) -> Rows:
        before = np.array([model.stats.drafted_tokens, model.stats.accepted_tokens])
        sampling = bench.sampling(case["new_tokens"], speculate=draft)
        rows = complete(model, prompts, sampling, 1, share_prefixes=False)
        counts.append(
            [model.stats.drafted_tokens, model.stats.accepted_tokens] - before
        )
        return rows

    sides = {"plain": partial(run, 0), "speculating": partial(run, case["draft"])}
    seconds, rows = run_turns(model, sides, case)
    check_same(model, prompts, *rows.values())
    distinct = len(set(rows["plain"][0]))
    drafted, accepted = counts[-1]
    print(
        f"{distinct} distinct of {case['new_tokens']} new tokens: accepted {accepted} "
        f"of {drafted} drafted ({accepted / max(1, drafted):.0%})"
    )
    show_speeds(seconds, case["new_tokens"])
    ratio = speed_ratio(seconds["speculating"], seconds["plain"])
    print(f"speculating / plain: {ratio}, no bar")
