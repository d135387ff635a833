"""Beam search against transformers 5.23, by hand, and against all there is to find."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relax.checkpoints.pretrained import open_pretrained
from relax.generation.beam import (
    Beams,
    BeamSearch,
    advance,
    bucket,
    make_rules,
    may_improve,
    start_search,
)
from relax.generation.requests import Request
from relax.model.llama import LlamaOutput, make_llama
from relax.model.parameters import parameter_shapes, with_layers
from relax.sampling import SamplingConfig
from relax.sharding import MeshConfig, make_mesh, parameter_shardings

jitted = jax.jit(advance)

V, NEW = 29, 13
PROMPTS = ((4,), (17, 3, 22, 8, 12, 19, 1), (9, 25, 6))


def requests(prompts=PROMPTS, limits=None):
    limits = limits or [None] * len(prompts)
    pairs = enumerate(zip(prompts, limits, strict=True))
    return [Request(tuple(prompt), i, 0, limit) for i, (prompt, limit) in pairs]


def beam_config(num_beams: int, **fields) -> SamplingConfig:
    """Returns a configuration that gives back all of its beams."""
    given = {"max_new_tokens": NEW, "num_return_sequences": num_beams, **fields}
    return SamplingConfig(temperature=0.0, num_beams=num_beams, **given)


def alternate(state):
    """A constraint: odd ids follow even ones, and even ones odd ones."""
    last = jnp.take_along_axis(state.text, state.lengths[:, None] - 1, axis=1)
    return (jnp.arange(64) + last) % 2 == 1


class Tiny(NamedTuple):
    """A random Llama of transformers, and the same one here."""

    peer: Any
    config: Any
    params: Any
    search: Callable

    def expected(self, sampling, stop_ids, prompts=PROMPTS, **more):
        """Returns transformers' beams: ids up to the first stop id, and the score.

        Its n-grams begin in the padding of a prompt, which therefore has none there.
        """
        import torch

        if sampling.no_repeat_ngram_size and len(prompts) > 1:
            alone = [self.expected(sampling, stop_ids, [p], **more) for p in prompts]
            return flat(alone)

        width = max(map(len, prompts))
        ids = [[0] * (width - len(prompt)) + list(prompt) for prompt in prompts]
        mask = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
        made = self.peer.generate(
            torch.tensor(ids),
            attention_mask=torch.tensor(mask),
            do_sample=False,
            pad_token_id=0,
            eos_token_id=list(stop_ids) or None,
            return_dict_in_generate=True,
            output_scores=True,
            **peer_settings(sampling, width),
            **more,
        )
        rows = [cut(row[width:].tolist(), stop_ids) for row in made.sequences]
        beams = list(zip(rows, made.sequences_scores.tolist(), strict=True))
        n = sampling.num_return_sequences
        return [beams[first : first + n] for first in range(0, len(beams), n)]


def cut(ids, stop_ids):
    """Returns ids up to the first stop id: what comes after it is filling."""
    ends = [index for index, token in enumerate(ids) if token in stop_ids]
    return ids[: ends[0] + 1] if ends else ids


def peer_settings(sampling: SamplingConfig, prompt_width: int) -> dict:
    """Returns what generate() calls the settings that differ from its own."""
    from transformers import LogitsProcessor, LogitsProcessorList

    class Counts(LogitsProcessor):
        """Presence and frequency penalties, which transformers lacks."""

        def __call__(self, ids, scores):
            made = ids[:, prompt_width:]
            counts = scores.new_zeros(scores.shape)
            counts = counts.scatter_add(1, made, scores.new_ones(made.shape))
            scores = scores - sampling.frequency_penalty * counts
            return scores - sampling.presence_penalty * (counts > 0)

    early = {"true": True, "false": False, "never": "never"}
    settings = {
        "num_beams": sampling.num_beams,
        "num_return_sequences": sampling.num_return_sequences,
        "max_new_tokens": sampling.max_new_tokens,
        "length_penalty": sampling.length_penalty,
        "early_stopping": early[sampling.early_stopping],
        "repetition_penalty": sampling.repetition_penalty,
        "no_repeat_ngram_size": sampling.no_repeat_ngram_size,
        "logits_processor": LogitsProcessorList([Counts()]),
    }
    if sampling.min_new_tokens:
        settings["min_new_tokens"] = sampling.min_new_tokens
    if sampling.logit_bias:
        bias = {(token,): value for token, value in sampling.logit_bias}
        settings["sequence_bias"] = bias
    return settings


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Iterator[Tiny]:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=44,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=160,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        attn_implementation="eager",
    )
    peer = transformers.LlamaForCausalLM(config).eval()
    random = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            if not name.endswith("norm.weight"):
                parameter.normal_(std=0.3, generator=random)
    folder = tmp_path_factory.mktemp("beam_peer")
    peer.save_pretrained(folder)
    checkpoint = open_pretrained(folder, None, "cpu")
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, tensor=1))
    shardings = parameter_shardings(mesh, parameter_shapes(checkpoint.config))
    params = checkpoint.load_params(shardings)
    apply = make_llama(checkpoint.config).apply
    search = BeamSearch(apply, checkpoint.config, V)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Tiny(peer, checkpoint.config, params, search)
    torch.set_num_threads(threads)


def flat(found):
    return list(itertools.chain.from_iterable(found))


def assert_same_beams(found, expected):
    assert [[beam.token_ids for beam in beams] for beams in found] == [
        [ids for ids, _ in beams] for beams in expected
    ]
    scores = [[beam.score for beam in beams] for beams in found]
    theirs = [[score for _, score in beams] for beams in expected]
    np.testing.assert_allclose(scores, theirs, rtol=0, atol=1e-4)


def ids_and_scores(found):
    return [[(beam.token_ids, beam.score) for beam in beams] for beams in found]


class Case(NamedTuple):
    sampling: SamplingConfig
    stop_ids: tuple[int, ...]
    constraint: Callable | None = None


EVERYTHING = {
    "repetition_penalty": 1.3,
    "no_repeat_ngram_size": 2,
    "min_new_tokens": 3,
    "logit_bias": {3: -1.5, 5: 0.7, 14: 1.1},
    "presence_penalty": 0.3,
    "frequency_penalty": 0.2,
}
MODES = ("true", "false", "never")
PLAIN = [
    Case(beam_config(3, length_penalty=penalty, early_stopping=mode), (2, 7))
    for penalty, mode in itertools.product((-1.0, 0.0, 1.0, 2.0), MODES)
]
GRID = [
    *PLAIN,
    *[
        Case(beam_config(4, length_penalty=p, early_stopping=m, **EVERYTHING), (5,))
        for p, m in itertools.product((0.3, 1.0), MODES)
    ],
    Case(beam_config(3, repetition_penalty=1.4), (2, 7)),
    Case(beam_config(2, min_new_tokens=5, logit_bias={2: 0.9, 20: -2.5}), (2, 7, 11)),
    Case(beam_config(5, no_repeat_ngram_size=2, presence_penalty=-0.5), (2, 7, 11, 13)),
    Case(beam_config(3), (2, 7), alternate),
    *[Case(beam_config(3, early_stopping=mode), ()) for mode in ("true", "never")],
]


def name_of(case: Case) -> str:
    sampling = case.sampling
    fields = {
        "beams": sampling.num_beams,
        "penalty": sampling.length_penalty,
        "early": sampling.early_stopping,
        "stops": len(case.stop_ids),
    }
    return "-".join(f"{name}={value}" for name, value in fields.items())


@pytest.mark.parametrize("case", GRID, ids=name_of)
def test_beams_are_those_of_transformers(tiny, case):
    sampling, stop_ids, constraint = case
    more = {}
    if constraint is alternate:
        allowed = [list(range(1 - parity, V, 2)) for parity in (0, 1)]
        more["prefix_allowed_tokens_fn"] = lambda _, ids: allowed[int(ids[-1]) % 2]
    found = tiny.search(tiny.params, requests(), sampling, stop_ids, constraint)
    assert_same_beams(found, tiny.expected(sampling, stop_ids, **more))


def test_the_grid_is_wide_and_its_settings_matter(tiny):
    assert len(GRID) == 12 + 6 + 4 + 2
    results = [
        flat(tiny.search(tiny.params, requests(), sampling, stop_ids))
        for sampling, stop_ids, _ in PLAIN
    ]
    assert {beam.finish_reason for beam in flat(results)} == {"stop", "length"}
    ids = [str([beam.token_ids for beam in beams]) for beams in results]
    assert len(set(ids[1::3])) >= 3
    assert max(len(set(ids[row : row + 3])) for row in (0, 3, 6, 9)) >= 2


@pytest.mark.parametrize(
    "wrong",
    [{"length_penalty": 0.5}, {"repetition_penalty": 1.1}, {"max_new_tokens": 11}],
    ids=str,
)
def test_the_comparison_sees_a_wrong_search(tiny, wrong):
    sampling = beam_config(3, length_penalty=1.0)
    expected = tiny.expected(sampling, (2, 7))
    found = tiny.search(tiny.params, requests(), beam_config(3, **wrong), (2, 7))
    with pytest.raises(AssertionError):
        assert_same_beams(found, expected)


def test_every_prompt_gets_what_it_gets_alone(tiny):
    sampling = beam_config(3, early_stopping="never", repetition_penalty=1.2)
    together = tiny.search(tiny.params, requests(), sampling, (2, 7))
    turned = tiny.search(tiny.params, requests()[::-1], sampling, (2, 7))
    assert_same_beams(turned[::-1], ids_and_scores(together))
    for request, beams in zip(requests(), together, strict=True):
        (alone,) = tiny.search(tiny.params, [request], sampling, (2, 7))
        assert_same_beams([alone], ids_and_scores([beams]))
        for one, other in zip(alone, beams, strict=True):
            assert one.finish_reason == other.finish_reason
            np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=0, atol=5e-5)


def test_every_prompt_has_its_own_limit(tiny):
    limits = [2, 13, 7]
    sampling = beam_config(3, early_stopping="never", max_new_tokens=13)
    found = tiny.search(tiny.params, requests(limits=limits), sampling, (2, 7))
    for prompt, limit, beams in zip(PROMPTS, limits, found, strict=True):
        own = beam_config(3, early_stopping="never", max_new_tokens=limit)
        assert_same_beams([beams], tiny.expected(own, (2, 7), [prompt]))


def test_long_prompts_go_to_the_end_of_the_context(tiny):
    long = tuple(int(t) for t in np.random.default_rng(5).integers(0, V, 151))
    prompts = (long, long[:70], long[:3])
    sampling = beam_config(2, max_new_tokens=11)
    found = tiny.search(tiny.params, requests(prompts), sampling, ())
    assert [len(beams[0].token_ids) for beams in found] == [9, 11, 11]
    for prompt, beams in zip(prompts, found, strict=True):
        own = beam_config(2, max_new_tokens=min(11, 160 - len(prompt)))
        assert_same_beams([beams], tiny.expected(own, (), [prompt]))


def test_unrolled_layers_find_the_same_beams(tiny):
    assert tiny.config.scan_layers
    config, params = with_layers(tiny.config, tiny.params, scan_layers=False)
    search = BeamSearch(make_llama(config).apply, config, V)
    found = search(params, requests(), beam_config(3), (2, 7))
    plain = tiny.search(tiny.params, requests(), beam_config(3), (2, 7))
    assert_same_beams(found, ids_and_scores(plain))


def test_ids_that_the_tokenizer_lacks_are_never_chosen(tiny):
    search = BeamSearch(make_llama(tiny.config).apply, tiny.config, 19)
    sampling = beam_config(3)
    found = search(tiny.params, requests(), sampling, (2, 7))
    missing = list(range(19, V))
    expected = tiny.expected(sampling, (2, 7), suppress_tokens=missing)
    assert_same_beams(found, expected)
    plain = tiny.search(tiny.params, requests(), sampling, (2, 7))
    assert any(set(b.token_ids) & set(missing) for b in flat(plain))


def test_logprobs_are_those_of_the_model_whatever_processors_do(tiny):
    import torch

    sampling = beam_config(4, **EVERYTHING)
    found = tiny.search(tiny.params, requests(), sampling, (5,))
    for prompt, beams in zip(PROMPTS, found, strict=True):
        for beam in beams:
            with torch.no_grad():
                ids = torch.tensor([[*prompt, *beam.token_ids]])
                logprobs = last_logprobs(tiny.peer(ids).logits[0], beam.token_ids)
            np.testing.assert_allclose(beam.logprobs, logprobs, rtol=0, atol=1e-4)


def last_logprobs(logits, ids):
    """Returns the logprob of each of the last ids by the logits of all places."""
    logprobs = logits.log_softmax(-1)[-1 - len(ids) : -1]
    return [float(row[token]) for row, token in zip(logprobs, ids, strict=True)]


def test_stop_ids_can_be_ignored(tiny):
    sampling = beam_config(3, ignore_eos=True)
    found = tiny.search(tiny.params, requests(), sampling, (2, 7))
    assert_same_beams(found, tiny.expected(sampling, ()))
    assert {b.finish_reason for b in flat(found)} == {"length"}


def test_buckets_are_few():
    lengths = [1, 64, 65, 128, 129, 300, 500]
    assert [bucket(n, 500) for n in lengths] == [64, 64, 128, 128, 256, 500, 500]
    assert bucket(40, 50) == 50


# One prompt, two beams, four ids of which 3 stops, at most three tokens. For each step
# the next token's probabilities after each beam.
STEPS = [
    [[0.5, 0.25, 0.05, 0.2], [0.25, 0.25, 0.25, 0.25]],
    [[0.12, 0.2, 0.08, 0.6], [0.9, 0.05, 0.03, 0.02]],
    [[0.4, 0.3, 0.2, 0.1], [0.7, 0.1, 0.1, 0.1]],
]


def beams_of(beams: Beams):
    """Returns the first prompt's hypotheses and what their scores are the logs of."""
    return [
        (ids[:length].tolist(), round(float(np.exp(score)), 5))
        for ids, length, score in zip(
            beams.tokens[0], beams.lengths[0], beams.scores[0], strict=True
        )
        if score > -np.inf
    ]


def test_three_steps_by_hand():
    rules = make_rules(beam_config(2, length_penalty=0.0), [3], [3], 3)
    search = start_search(rules.limits, 2, 3)
    for number, probabilities in enumerate(STEPS):
        logprobs = jnp.log(jnp.asarray([probabilities]))
        search, parents = jitted(search, logprobs, logprobs, rules)
        if number == 0:
            # [3], the third candidate, is not among the first two: it is lost.
            assert beams_of(search.running) == [([0], 0.5), ([1], 0.25)]
            assert beams_of(search.finished) == []
        if number == 1:
            assert beams_of(search.running) == [([1, 0], 0.225), ([0, 1], 0.1)]
            assert beams_of(search.finished) == [([0, 3], 0.3)]
            assert parents.tolist() == [[1, 0]]
            assert search.alive.tolist() == [True]
    # At the limit 0.225 x 0.4 and 0.1 x 0.7 finish, and the better one has a place.
    assert beams_of(search.finished) == [([0, 3], 0.3), ([1, 0, 0], 0.09)]
    assert search.finished.stopped.tolist() == [[True, False]]
    assert search.alive.tolist() == [False]
    np.testing.assert_allclose(
        np.exp(search.finished.logprobs[0, 1]), [0.25, 0.9, 0.4], rtol=1e-6
    )


def test_a_length_penalty_divides_by_the_tokens_made():
    rules = make_rules(beam_config(2, length_penalty=2.0), [3], [3], 3)
    search = start_search(rules.limits, 2, 3)
    for probabilities in STEPS:
        logprobs = jnp.log(jnp.asarray([probabilities]))
        search, _ = jitted(search, logprobs, logprobs, rules)
    # log(0.3) / 4 = -0.301 loses against log(0.09) / 9 and log(0.07) / 9.
    expected = [np.log(0.09) / 9, np.log(0.07) / 9]
    np.testing.assert_allclose(search.finished.scores[0], expected, rtol=1e-6)


def test_an_ended_search_stays_as_it_is():
    rules = make_rules(beam_config(2), [1, 3], [3], 3)
    start = start_search(rules.limits, 2, 3)
    logprobs = jnp.log(jnp.asarray([STEPS[0]] * 2))
    first, _ = jitted(start, logprobs, logprobs, rules)
    assert first.alive.tolist() == [False, True]
    second, parents = jitted(first, logprobs[:, ::-1], logprobs, rules)
    assert parents[0].tolist() == [0, 1]
    for old, new in zip(first.finished, second.finished, strict=True):
        assert np.array_equal(old[0], new[0])
    assert beams_of(second.finished) == [([0], 0.5), ([1], 0.25)]


@pytest.mark.parametrize(
    ("mode", "penalty", "goes_on"),
    [
        ("false", 1.0, True),  # -1.2 / 2 > -0.7
        ("false", 0.0, False),  # -1.2 < -0.7
        ("false", -1.0, False),
        ("never", 1.0, True),  # -1.2 / 4 > -0.7
        ("never", 0.0, False),
        ("never", -1.0, False),  # -1.2 x 2: its length, not its limit
        ("true", 1.0, False),  # two have finished
    ],
)
@pytest.mark.parametrize("worst", [-0.7, -np.inf])
def test_when_a_search_ends(mode, penalty, goes_on, worst):
    """Two tokens of at most four, the best of the running beams has -1.2."""
    sampling = beam_config(2, length_penalty=penalty, early_stopping=mode)
    rules = make_rules(sampling, [4], [3], 4)
    none = start_search(rules.limits, 2, 4).finished
    running = none._replace(scores=jnp.asarray([[-1.2, -1.4]]))
    finished = none._replace(scores=jnp.asarray([[-0.5, worst]]))
    assert bool(may_improve(running, finished, 2, rules)[0]) == (
        goes_on or worst == -np.inf
    )
    exhausted = none._replace(scores=jnp.full((1, 2), -jnp.inf))
    assert not may_improve(exhausted, finished, 2, rules)[0]


def test_never_looks_as_far_as_the_limit():
    none = start_search(jnp.asarray([40]), 2, 40).finished
    running = none._replace(scores=jnp.asarray([[-9.0, -9.5]]))
    finished = none._replace(scores=jnp.asarray([[-0.2, -0.3]]))
    for mode, goes_on in [("false", False), ("never", True)]:
        rules = make_rules(beam_config(2, early_stopping=mode), [40], [3], 40)
        assert bool(may_improve(running, finished, 20, rules)[0]) == goes_on


class Table(NamedTuple):
    """A model whose logits depend on the last token and its place alone."""

    search: Callable
    logits: np.ndarray  # [place, token, next token]

    def logprobs(self, prompt, ids) -> list[float]:
        text, logprobs = [*prompt, *ids], []
        for place in range(len(prompt) - 1, len(text) - 1):
            row = self.logits[place, text[place]].astype(np.float64)
            logprobs.append(row[text[place + 1]] - np.log(np.exp(row).sum()))
        return logprobs


IDS, STOP, LENGTH = 4, 3, 4


@pytest.fixture(scope="module")
def table(make_config) -> Table:
    def apply(params, tokens, cache, lengths):
        slots = cache.lengths[:, None] + jnp.arange(tokens.shape[1])
        hidden = jnp.pad(params, ((0, 0), (0, 0), (0, 64 - IDS)))[slots, tokens]
        lengths = cache.lengths + lengths
        return LlamaOutput(hidden, jnp.eye(64), cache._replace(lengths=lengths))

    config = make_config(vocab_size=IDS, max_position_embeddings=71)
    logits = np.random.default_rng(2).normal(size=(71, IDS, IDS)).astype(np.float32)
    return Table(BeamSearch(apply, config, IDS), logits)


def completions():
    """Yields all completions of at most LENGTH tokens."""
    for length in range(1, LENGTH + 1):
        for ids in itertools.product(range(IDS), repeat=length):
            ends = ids[-1] == STOP or length == LENGTH
            if ends and STOP not in ids[:-1]:
                yield list(ids)


@pytest.mark.parametrize("penalty", [0.0, 0.7, 1.5])
def test_with_beams_for_all_it_finds_the_best_of_all(table, penalty):
    num_beams = IDS ** (LENGTH - 1)
    sampling = beam_config(
        num_beams,
        length_penalty=penalty,
        early_stopping="never",
        max_new_tokens=LENGTH,
    )
    prompts = [(1,), (0, 2, 1)]
    found = table.search(table.logits, requests(prompts), sampling, (STOP,))
    for prompt, beams in zip(prompts, found, strict=True):
        scores = {
            tuple(ids): sum(table.logprobs(prompt, ids)) / len(ids) ** penalty
            for ids in completions()
        }
        assert len(scores) == 1 + 3 + 9 + 27 + 3 * 27
        best = sorted(scores, key=scores.get, reverse=True)[:num_beams]
        expected = [(list(ids), scores[ids]) for ids in best]
        assert_same_beams([beams], [expected])


CHOICES = [[0, 1, STOP], [0, 2, 2, STOP], [2, STOP]]


def one_of_the_choices(state):
    """A constraint: allows what goes on from the text made so far to a choice."""
    place = state.lengths - state.prompt_lengths
    slots = state.prompt_lengths[:, None] + jnp.arange(LENGTH)
    made = jnp.take_along_axis(state.text, slots, axis=1)
    allowed = jnp.zeros((len(place), 64), bool)
    for choice in CHOICES:
        ids = jnp.asarray(choice + [0] * (LENGTH - len(choice)))
        same = (made == ids) | (jnp.arange(LENGTH) >= place[:, None])
        fits = jnp.all(same, axis=1) & (place < len(choice))
        allowed |= fits[:, None] & (jnp.arange(64) == ids[place][:, None])
    return allowed


@pytest.mark.parametrize("mode", MODES)
def test_a_constraint_may_leave_fewer_completions_than_beams(table, mode):
    sampling = beam_config(5, early_stopping=mode, max_new_tokens=9)
    prompt = (1, 0)
    (beams,) = table.search(
        table.logits, requests([prompt]), sampling, (STOP,), one_of_the_choices
    )
    logprobs = {tuple(ids): table.logprobs(prompt, ids) for ids in CHOICES}
    means = {ids: np.mean(values) for ids, values in logprobs.items()}
    ordered = sorted(means, key=means.get, reverse=True)
    assert_same_beams([beams], [[(list(ids), means[ids]) for ids in ordered]])
    for beam in beams:
        expected = logprobs[tuple(beam.token_ids)]
        np.testing.assert_allclose(beam.logprobs, expected, rtol=0, atol=1e-5)
        assert beam.finish_reason == "stop"


def test_programs_are_kept_between_calls(table):
    def search(prompts, num_beams, stop_ids, **fields):
        sampling = beam_config(num_beams, **fields)
        return table.search(table.logits, requests(prompts), sampling, stop_ids)

    first = search([(1,), (0, 2)], 3, (STOP,))
    before = table.search.programs
    second = search(
        [(2, 2, 1), (0,)],
        3,
        (1,),
        num_return_sequences=2,
        length_penalty=1.7,
        early_stopping="never",
        max_new_tokens=5,
    )
    assert table.search.programs == before
    assert [len(beams) for beams in (*first, *second)] == [3, 3, 2, 2]
    search([(1,), (0, 2)], 2, (STOP,))
    assert table.search.programs == before + 1
    assert search([], 3, (STOP,)) == []
