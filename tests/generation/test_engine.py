"""Slots, prefixes, pieces and guesses: how a text is made changes none of it."""

import random
from dataclasses import replace

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from relax.generation import slots as slots_module
from relax.generation.decode import _Loop
from relax.generation.generator import Generator
from relax.generation.requests import Completion, Request
from relax.model.llama import make_llama
from relax.sampling import SamplingConfig
from relax.sharding import MeshConfig, make_mesh

RNG = np.random.default_rng(1)
SYSTEM = RNG.integers(0, 66, 37).tolist()
LENGTHS = [1, 2, 5, 17, 40, 41, 60, 3, 33, 19, 7]
# Float32 sums in another order, over logits of about 10.
TOLERANCE = 5e-5
SAMPLED = SamplingConfig(
    max_new_tokens=17,
    temperature=0.8,
    top_k=20,
    repetition_penalty=1.3,
    frequency_penalty=0.2,
    no_repeat_ngram_size=3,
    seed=3,
    ignore_eos=True,
)
GREEDY = SamplingConfig(temperature=0.0, max_new_tokens=17, ignore_eos=True)


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    """Eleven prompts of their own, three of which come in three samples, and six that
    begin with SYSTEM; every third row gets fewer tokens."""
    prompts = [RNG.integers(0, 66, length).tolist() for length in LENGTHS]
    prompts += [SYSTEM + prompts[index][:12] for index in (3, 4, 5, 6, 8, 9)]
    rows = [(index, 0) for index in range(len(prompts))]
    rows += [(index, sample) for index in (3, 8, 14) for sample in (1, 2)]
    return [
        Request(tuple(prompts[i]), i, s, None if (i + s) % 3 else 5 + i)
        for i, s in rows
    ]


@pytest.fixture(scope="module", params=["greedy", "sampled"])
def sampling(request):
    return GREEDY if request.param == "greedy" else SAMPLED


def run(generator, params, requests, sampling, **options) -> list[Completion]:
    completions = [Completion() for _ in requests]
    ended = []
    for rows in generator.run_in_chunks(
        params, requests, sampling, completions, **options
    ):
        ended += rows
    assert sorted(ended) == list(range(len(requests)))
    return completions


@pytest.fixture(scope="module")
def alone(generator, model, requests, sampling) -> list[Completion]:
    """Each row by itself: no neighbour, no slot but one, no prefix."""
    return [run(generator, model.params, [r], sampling)[0] for r in requests]


def assert_same(mine: list[Completion], expected: list[Completion]) -> None:
    for ours, theirs in zip(mine, expected, strict=True):
        assert ours.token_ids == theirs.token_ids
        assert ours.text == theirs.text
        assert ours.finish_reason == theirs.finish_reason
        for name in ("logprobs", "sampled_logprobs"):
            actual, wanted = getattr(ours, name), getattr(theirs, name)
            np.testing.assert_allclose(actual, wanted, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 4},
        {"batch_size": 4, "share_prefixes": False},
        {"batch_size": 16, "capacity": 101},
    ],
    ids=str,
)
def test_slots_neighbours_and_prefixes_change_nothing(
    generator, model, requests, sampling, alone, options
):
    mine = run(generator, model.params, requests, sampling, **options)
    assert_same(mine, alone)


def test_neither_order_nor_a_restart_changes_anything(
    generator, model, requests, sampling, alone
):
    order = list(range(len(requests)))
    random.Random(5).shuffle(order)
    for part in (order[:9], order[9:]):
        some = [requests[index] for index in part]
        mine = run(generator, model.params, some, sampling, batch_size=4)
        assert_same(mine, [alone[index] for index in part])


@pytest.mark.parametrize("guesses", [1, 3])
def test_guesses_change_nothing(generator, model, requests, sampling, alone, guesses):
    before = replace(generator.stats)
    guessing = replace(sampling, speculate=guesses)
    assert_same(run(generator, model.params, requests, guessing, batch_size=4), alone)
    assert generator.stats.drafted_tokens > before.drafted_tokens


def test_a_row_limit_is_its_own(alone, requests):
    for completion, request in zip(alone, requests, strict=True):
        limit = 17 if request.max_new_tokens is None else request.max_new_tokens
        room = 101 - len(request.prompt)
        assert len(completion.token_ids) == min(limit, room)


# Prefixes.


def shared(generator, params, requests, **options) -> int:
    before = generator.stats.shared_tokens
    run(generator, params, requests, replace(GREEDY, max_new_tokens=3), **options)
    return generator.stats.shared_tokens - before


def test_what_prompts_share_is_run_once_and_counted(generator, model):
    prompts = [tuple(SYSTEM + tail) for tail in ([1, 2], [3, 4, 5], [6], [1, 2])]
    some = [Request(prompt, index, 0) for index, prompt in enumerate(prompts)]
    # The third has 37 tokens before its last; the fourth is the first again, whose
    # place the third has taken where there are two.
    assert shared(generator, model.params, some, batch_size=4) == 37 + 37 + 38
    assert shared(generator, model.params, some, batch_size=2) == 37 + 37 + 37
    options = {"batch_size": 4, "share_prefixes": False}
    assert shared(generator, model.params, some, **options) == 0


def test_samples_of_a_prompt_share_all_but_its_last_token(generator, model):
    some = [Request((5, 6, 7), 0, sample) for sample in range(8)]
    assert shared(generator, model.params, some, batch_size=8) == 7 * 2
    short = [Request((5, 6, 7, index), index, 0) for index in range(8)]
    # Three tokens of four are all there is to run.
    assert shared(generator, model.params, short, batch_size=8) == 7 * 3
    own = [Request((5, 6, 7, index, 1, 2), index, 0) for index in range(8)]
    assert shared(generator, model.params, own, batch_size=8) == 0


def counted_tokens(generator, monkeypatch):
    """Returns a list that grows by the tokens of each prefill."""
    tokens, steps = [], generator.steps

    def prefill(params, cache, *args):
        tokens.append(int(args[3].sum()))
        return steps.prefill(params, cache, *args)

    monkeypatch.setattr(generator, "steps", steps._replace(prefill=prefill))
    return tokens


def test_a_shared_prefix_reaches_the_model_once(generator, model, monkeypatch):
    tokens = counted_tokens(generator, monkeypatch)
    some = [Request((*SYSTEM, 1, index, 2), index, 0) for index in range(4)]
    run(generator, model.params, some, replace(GREEDY, max_new_tokens=2))
    assert sum(tokens) == 39 + 3 * 1


@pytest.mark.parametrize("broken", ["copy", "_common_lengths"])
def test_a_prefix_that_is_wrong_is_seen(
    generator, model, requests, sampling, alone, monkeypatch, broken
):
    steps = generator.steps
    if broken == "copy":
        nothing = steps._replace(copy=lambda cache, *args: cache)
        monkeypatch.setattr(generator, "steps", nothing)
    else:
        monkeypatch.setattr(
            slots_module,
            "_common_lengths",
            lambda text, held, ids: np.minimum(held, len(ids)),
        )
    with pytest.raises(AssertionError):
        assert_same(run(generator, model.params, requests, sampling), alone)


def test_guesses_that_are_not_checked_are_seen(
    config, tokenizer, model, requests, alone, sampling, monkeypatch
):
    """Every guess is taken for what the model would have said."""

    def careless(carry, logits, text, made, going):
        text, made, chosen = choose(carry, logits, text, made, going)
        return text, made, Agreeing(chosen)

    class Agreeing:
        def __init__(self, chosen):
            self.chosen = chosen

        def __eq__(self, guess):
            return guess == guess

    choose = _Loop._choose
    monkeypatch.setattr(_Loop, "_choose", careless)
    generator = Generator(make_llama(config).apply, config, tokenizer, (66,))
    guessing = replace(sampling, speculate=2)
    with pytest.raises(AssertionError):
        assert_same(run(generator, model.params, requests[5:8], guessing), alone[5:8])


# Beams.


def test_beams_are_completions_with_scores(generator, model):
    sampling = replace(GREEDY, num_beams=3, num_return_sequences=2, max_new_tokens=5)
    prompts = [[5, 6, 7], [9], [11, 12, 13, 14]]
    requests = [
        Request(tuple(prompt), index, 0) for index, prompt in enumerate(prompts)
    ]
    found = generator.beam_search(model.params, requests, sampling, (66,))
    made = model.generate(prompts, sampling, batch_size=6)
    beams = [beam for beams in found for beam in beams]
    assert [c.token_ids for c in made] == [beam.token_ids for beam in beams]
    scores = [beam.score for beam in beams]
    np.testing.assert_allclose([c.score for c in made], scores, rtol=0, atol=1e-5)
    assert [c.text for c in made] == [
        model.tokenizer.decode(beam.token_ids) for beam in beams
    ]
    assert made[0].score > made[1].score


@pytest.mark.parametrize(
    "name, value", [("stop_strings", ["a"]), ("num_top_logprobs", 2)]
)
def test_what_beams_do_not_take_is_an_error(model, name, value):
    sampling = replace(GREEDY, num_beams=2, **{name: value})
    with pytest.raises(ValueError, match=rf"sampling.{name}=.* not go with beams"):
        model.generate([[1]], sampling)


def test_a_beam_that_there_is_not_is_none_and_no_other(generator, model):
    """Two choices are all that four beams can find."""
    sampling = replace(
        GREEDY,
        num_beams=4,
        num_return_sequences=4,
        constraint="choices",
        choices=("ab", "c"),
        ignore_eos=False,
    )
    reasons = [c.finish_reason for c in model.generate([[5, 6]], sampling)]
    assert reasons == ["stop", "stop", "none", "none"]
    both = model.generate([[5, 6]], replace(sampling, num_return_sequences=2))
    assert {c.text for c in both} == {"ab", "c"}
    one = replace(sampling, num_return_sequences=1)
    (second,) = run(generator, model.params, [Request((5, 6), 0, 1)], one)
    assert second.token_ids == both[1].token_ids
    with pytest.raises(
        ValueError, match=r"sample 4 is asked for: sampling.num_beams=4"
    ):
        run(generator, model.params, [Request((5, 6), 0, 4)], one)


# What a row leaves behind.


@pytest.mark.parametrize("scan_layers", [True, False])
def test_a_row_without_numbers_leaves_the_next_one_alone(
    make_config, make_params, tokenizer, scan_layers
):
    config = make_config(scan_layers=scan_layers)
    params = make_params(config)
    table = params["llama/embed_tokens"]["weight"].at[7].set(np.nan)
    params = {**params, "llama/embed_tokens": {"weight": table}}
    generator = Generator(make_llama(config).apply, config, tokenizer, (66,))
    poisoned, good = Request((7,) * 20, 0, 0), Request((5, 6), 1, 0)
    expected = run(generator, params, [good], GREEDY)
    both = run(generator, params, [poisoned, good], GREEDY, batch_size=1)
    assert np.isnan(both[0].logprobs[0])
    assert np.isfinite(both[1].logprobs).all()
    assert_same(both[1:], expected)


# Programs.


def test_a_hundred_ragged_prompts_compile_at_most_six_programs(
    make_config, make_params, tokenizer
):
    """On a mesh, as `relax.load` has it, which is part of what JAX compiles for."""
    config = make_config(max_position_embeddings=601, num_hidden_layers=1)
    generator = Generator(make_llama(config).apply, config, tokenizer, (66,))
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, tensor=1))
    params = jax.device_put(make_params(config), NamedSharding(mesh, PartitionSpec()))
    lengths = np.random.default_rng(2).integers(1, 501, 100)
    lengths[:2] = 1, 500
    some = [
        Request(tuple(RNG.integers(0, 66, length).tolist()), index, 0)
        for index, length in enumerate(lengths)
    ]
    sampling = replace(SAMPLED, max_new_tokens=8, ignore_eos=False)
    completions = run(generator, params, some, sampling, batch_size=16)
    assert generator.stats.programs <= 6
    first = generator.stats.programs
    assert first == generator.steps.programs() > 2
    run(generator, params, some[40:60], sampling, batch_size=16)
    run(generator, params, some[:1], replace(sampling, seed=5), batch_size=16)
    assert generator.stats.prompt_tokens == lengths.sum() + sum(
        len(r.prompt) for r in [*some[40:60], some[0]]
    )
    assert len({tuple(c.token_ids) for c in completions}) > 90


def test_a_change_of_shape_is_counted_as_a_program(generator, model):
    run(generator, model.params, [Request((1, 2), 0, 0)], GREEDY)
    before = generator.stats.programs
    run(generator, model.params, [Request((1, 2), 0, 0)], GREEDY)
    assert generator.stats.programs == before
    other = replace(GREEDY, tokens_per_dispatch=13)
    run(generator, model.params, [Request((1, 2), 0, 0)], other)
    assert generator.stats.programs == before + 1
