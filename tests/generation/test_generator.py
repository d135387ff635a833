"""What generation promises, each promise broken once on purpose."""

import io
import itertools
from dataclasses import replace

import numpy as np
import pytest
import sentencepiece

from relax.generation import generator as generator_module
from relax.generation.decode import choose_tokens
from relax.generation.generator import Generator
from relax.generation.requests import Completion, CompletionText, Request
from relax.generation.run import Run
from relax.sampling import SamplingConfig
from relax.text.tokenizers import SentencePieceTokenizer

LENGTHS = (3, 7, 41, 67)
SAMPLES = 2
SCRIPTED = SamplingConfig(temperature=0.0, max_new_tokens=29)
UNFILTERED = SamplingConfig(temperature=0.8, max_new_tokens=23, ignore_eos=True)


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(1)
    return [rng.integers(0, 66, length).tolist() for length in LENGTHS]


@pytest.fixture(scope="module")
def requests(prompts):
    return [
        Request(tuple(prompt), index, sample)
        for index, prompt in enumerate(prompts)
        for sample in range(SAMPLES)
    ]


@pytest.fixture(scope="module")
def completions(generator, model, requests, sampled):
    return generator.run(model.params, requests, sampled)


# Zero mismatch: logprobs of sampled tokens are those of a full forward pass.


def assert_logprobs_are_those_of_scoring(model, requests, completions):
    pairs = list(zip(requests, completions, strict=True))
    scores = model.score([[*r.prompt, *c.token_ids] for r, c in pairs])
    differences = []
    for (request, completion), score in zip(pairs, scores, strict=True):
        expected = score.logprobs[len(request.prompt) :]
        differences += list(np.subtract(completion.logprobs, expected))
    assert len(differences) == 23 * len(requests)
    assert np.mean(np.abs(differences)) <= 2e-6
    assert np.max(np.abs(differences)) <= 5e-5


def test_logprobs_are_those_of_scoring(model, requests, completions):
    assert_logprobs_are_those_of_scoring(model, requests, completions)


def test_a_shifted_position_is_a_mismatch(
    model, model_with_shifted_positions, requests
):
    broken = model_with_shifted_positions._generator
    completions = broken.run(model.params, requests[:1], UNFILTERED)
    with pytest.raises(AssertionError):
        assert_logprobs_are_those_of_scoring(model, requests[:1], completions)


def test_a_temperature_in_the_logprobs_is_a_mismatch(
    make_model, model, requests, monkeypatch
):
    def tempered(*args):
        choice = choose_tokens(*args)
        return choice._replace(logprobs=choice.sampled_logprobs)

    monkeypatch.setattr("relax.generation.decode.choose_tokens", tempered)
    broken = make_model()._generator
    completions = broken.run(model.params, requests[:1], UNFILTERED)
    with pytest.raises(AssertionError):
        assert_logprobs_are_those_of_scoring(model, requests[:1], completions)


def filtered_logprobs(logits, text, sampling):
    """Returns the logprobs drawn from, written out in float64 after one text."""
    logits = logits.astype(np.float64)
    for token in set(text):
        factor = sampling.repetition_penalty
        logits[token] *= factor if logits[token] < 0 else 1 / factor
    if sampling.no_repeat_ngram_size:
        assert sampling.no_repeat_ngram_size == 2
        for first, second in itertools.pairwise(text):
            if first == text[-1]:
                logits[second] = -np.inf
    logits /= sampling.temperature
    kept = np.argsort(-logits)[: sampling.top_k]
    kept = kept[: 1 + np.sum(np.cumsum(softmax(logits[kept])) < sampling.top_p)]
    probs = softmax(logits[kept])
    kept = kept[probs >= sampling.min_p * probs[0]]
    return dict(zip(kept.tolist(), np.log(softmax(logits[kept])), strict=True))


def softmax(logits):
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def assert_drawn_from_the_filtered(full_forward, requests, completions, sampling):
    for request, completion in zip(requests, completions, strict=True):
        ids = [*request.prompt, *completion.token_ids]
        logits, start = full_forward.logits(ids), len(request.prompt)
        for place, given in enumerate(completion.sampled_logprobs, start):
            expected = filtered_logprobs(logits[place - 1], ids[:place], sampling)
            assert abs(given - expected.get(ids[place], -np.inf)) <= 5e-5


def test_sampled_logprobs_are_those_of_the_filtered_distribution(
    full_forward, requests, completions, sampled
):
    assert_drawn_from_the_filtered(full_forward, requests, completions, sampled)


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": 1.0},
        {"repetition_penalty": 1.0},
        {"no_repeat_ngram_size": 0},
        {"top_k": 5},
        {"top_p": 0.5},
        {"min_p": 0.3},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_filter_counts_in_the_sampled_logprobs(
    full_forward, requests, completions, sampled, change
):
    others = replace(sampled, **change)
    with pytest.raises(AssertionError):
        assert_drawn_from_the_filtered(full_forward, requests, completions, others)


def support_of(completion, config):
    """Returns which ids each token was drawn from `[tokens, V]`."""
    marks = np.unpackbits(np.stack(completion.support), axis=1)
    assert marks.shape[1] == config.padded_vocab_size
    assert not marks[:, config.vocab_size :].any()
    return marks[:, : config.vocab_size].astype(bool)


def test_sampled_logprobs_are_renormalised_over_the_support(
    full_forward, generator, model, requests
):
    """Top-p leaves another number of ids at each place, top-k three."""
    for change, count in (({"top_k": 3}, 3), ({"top_p": 0.7}, None)):
        sampling = replace(UNFILTERED, **change)
        some = requests[2:4]
        made = generator.run(model.params, some, sampling, keep_support=True)
        for request, completion in zip(some, made, strict=True):
            ids = [*request.prompt, *completion.token_ids]
            support = support_of(completion, model.config)
            start = len(request.prompt)
            logits = full_forward.logits(ids)[start - 1 : -1].astype(np.float64)
            kept = np.where(support, logits / sampling.temperature, -np.inf)
            chosen = kept[np.arange(len(kept)), completion.token_ids]
            expected = chosen - np.logaddexp.reduce(kept, axis=1)
            np.testing.assert_allclose(
                completion.sampled_logprobs, expected, rtol=0, atol=5e-5
            )
            sizes = support.sum(axis=1)
            assert set(sizes) == {count} if count else len(set(sizes)) > 3
        assert "support" not in made[0].row()


def test_a_support_is_kept_where_it_is_asked_for(generator, model, requests, greedy):
    """What a greedy token was drawn from is that token; others keep nothing."""
    few = replace(greedy, max_new_tokens=2)
    (kept,) = generator.run(model.params, requests[:1], few, keep_support=True)
    marks = support_of(kept, model.config)
    assert [np.flatnonzero(row).tolist() for row in marks] == [
        [token] for token in kept.token_ids
    ]
    (plain,) = generator.run(model.params, requests[:1], few)
    assert plain.support == [] and plain == kept


def assert_no_pair_repeats(requests, completions):
    """Checks the pairs that end in a new token, where more often one came before."""
    for request, completion in zip(requests, completions, strict=True):
        pairs = list(itertools.pairwise([*request.prompt, *completion.token_ids]))
        for place in range(len(request.prompt) - 1, len(pairs)):
            assert pairs[place] not in pairs[:place]


def test_no_pair_of_tokens_comes_twice(generator, model, requests, completions, greedy):
    assert_no_pair_repeats(requests, completions)
    apart = replace(greedy, no_repeat_ngram_size=2)
    assert_no_pair_repeats(requests, generator.run(model.params, requests, apart))
    with pytest.raises(AssertionError):
        assert_no_pair_repeats(requests, generator.run(model.params, requests, greedy))


def test_slots_outlive_a_call_and_forget_other_parameters(
    generator, model, requests, completions, sampled
):
    slots = generator.new_slots(len(requests), 101)
    wanted = sum(len(request.prompt) - 1 for request in requests)

    def shared_and_made(params):
        before, made = generator.stats.shared_tokens, [Completion() for _ in requests]
        for _ in generator.run_in_chunks(params, requests, sampled, made, slots=slots):
            pass
        return generator.stats.shared_tokens - before, made

    first, made = shared_and_made(model.params)
    again, others = shared_and_made(model.params)
    assert [c.token_ids for c in made] == [c.token_ids for c in completions]
    assert [c.token_ids for c in others] == [c.token_ids for c in completions]
    assert (first, again) == (wanted // SAMPLES, wanted)
    fresh = {name: dict(leaves) for name, leaves in model.params.items()}
    table = fresh["llama/embed_tokens"]
    fresh["llama/embed_tokens"] = {"weight": table["weight"] + 0.5}
    assert shared_and_made(fresh)[0] == first


# Batch invariance: what else is in the batch changes no token.


def assert_same_in_any_company(run, requests, completions):
    """Checks rows alone, where less is padded, in smaller batches and other slots."""
    for rows in ([0], [4], [3, 7, 1, 6], [7, 6, 5, 4, 3, 2, 1, 0]):
        others = run([requests[row] for row in rows])
        for row, other in zip(rows, others, strict=True):
            assert other.token_ids == completions[row].token_ids


def test_a_row_is_the_same_in_any_company(
    generator, model, requests, completions, sampled
):
    assert_same_in_any_company(
        lambda some: generator.run(model.params, some, sampled), requests, completions
    )
    assert len({tuple(c.token_ids) for c in completions}) == len(requests)


def test_keys_by_row_number_are_seen_in_other_company(
    generator, model, requests, sampled
):
    def run(some):
        rows = [replace(r, input_index=i, sample_index=0) for i, r in enumerate(some)]
        return generator.run(model.params, rows, sampled)

    with pytest.raises(AssertionError):
        assert_same_in_any_company(run, requests, run(requests))


def test_batch_size_changes_no_completion(model, prompts, completions, sampled):
    """The first batch of four is shorter than the second, and than that of eight."""
    sampling = replace(sampled, num_return_sequences=SAMPLES)
    mine = model.generate(prompts, sampling, batch_size=4)
    assert [c.token_ids for c in mine] == [c.token_ids for c in completions]


def test_the_seed_changes_every_row(generator, model, requests, completions, sampled):
    others = generator.run(model.params, requests, replace(sampled, seed=5))
    for other, completion in zip(others, completions, strict=True):
        assert other.token_ids != completion.token_ids


def test_rows_that_fill_up_a_batch_give_nothing(config, scripted_apply, scripted):
    model = scripted([b"a", b"b", b"c", b"e"])
    tokenizer = model.generator._tokenizer
    generator = Generator(scripted_apply, config, tokenizer, (), batch_multiple=5)
    model = model._replace(generator=generator)
    completions = model.complete(replace(SCRIPTED, max_new_tokens=3), 1, 2, 1)
    assert [c.text for c in completions] == ["bce", "ce", "bce"]


# The size of a dispatch changes nothing, nor does streaming.


def assert_same_in_all_dispatches(run, sampling):
    """Returns what `run` gives, after a check for dispatches of 64, 1 and 3 tokens."""
    first, *others = (
        run(replace(sampling, tokens_per_dispatch=size)) for size in (64, 1, 3)
    )
    for other in others:
        assert other == first
    return first


def test_dispatches_change_no_completion_of_a_random_model(
    generator, model, requests, completions, sampled
):
    whole = completions[0]
    stop = whole.text[9:12]
    mine = assert_same_in_all_dispatches(
        lambda sampling: generator.run(model.params, requests, sampling),
        replace(sampled, ignore_eos=False, stop_strings=["absent", stop]),
    )
    assert mine[0].text == whole.text[: whole.text.index(stop)]
    assert mine[0].token_ids == whole.token_ids[: len(mine[0].text) + 3]
    assert any(c.token_ids[-1] == 66 for c in mine)
    assert {c.finish_reason for c in mine} == {"stop", "length"}


# "é" and "😀" are split over tokens, and so are the stop strings "n, x" and "ie".
SPOKEN = [b"b", b"h", b"\xc3", b"\xa9", b" ", b"\xf0\x9f", b"\x98", b"\x80", b"o"]
SPOKEN += [b"n", b", ", b"xyz", b"pie", b"c", b"e"]


@pytest.mark.parametrize(
    ("stops", "start", "text", "count"),
    [
        ((), 1, "hé 😀on, xyzpiece", 15),
        (("absent",), 3, "é 😀on, xyzpiece", 13),  # the prompt ends within the "é"
        (("n, x",), 1, "hé 😀o", 11),
        (("yz", "n, xyzp"), 1, "hé 😀on, x", 11),
        (("z", "yz"), 4, " 😀on, x", 8),
        (("ie", "piec"), 10, ", xyzp", 3),
        (("😀",), 1, "hé ", 7),
    ],
)
def test_texts_up_to_their_stop_strings(scripted, stops, start, text, count):
    model, sampling = scripted(SPOKEN), replace(SCRIPTED, stop_strings=stops)
    (completion,) = assert_same_in_all_dispatches(
        lambda sampling: model.complete(sampling, start), sampling
    )
    assert completion.text == text
    assert completion.token_ids == model.script[start : start + count]
    assert len(completion.logprobs) == len(completion.sampled_logprobs) == count
    assert completion.finish_reason == "stop"
    shown = model.stream(replace(sampling, tokens_per_dispatch=1), start)
    assert shown[-1] == text and len(shown) == count
    for earlier, later in itertools.pairwise(shown):
        assert later.startswith(earlier)


def test_tokens_after_a_stop_string_are_seen_in_larger_dispatches(
    scripted, monkeypatch
):
    def careless(run, index, tokens):
        text = run._work.texts[index]
        found = [text.add(token)[1] for token in tokens]
        return len(tokens), "", any(found)

    monkeypatch.setattr(Run, "_read", careless)
    model, sampling = scripted(SPOKEN), replace(SCRIPTED, stop_strings=["n, x"])
    with pytest.raises(AssertionError):
        assert_same_in_all_dispatches(lambda s: model.complete(s, 1), sampling)


@pytest.fixture(scope="module")
def spaces(scripted_generator):
    """A model that says "the fox jumps the ox" in sentencepiece's words."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the fox jumps", "the ox jumps"]),
        model_writer=model,
        model_type="word",
        vocab_size=7,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    tokenizer = SentencePieceTokenizer(model.getvalue())
    script = [tokenizer.bos_id, *tokenizer.encode("the fox jumps the ox")]
    return scripted_generator(tokenizer, [*script, tokenizer.eos_id])


def assert_spaces_after_a_prompt(spaces):
    texts = [c.text for c in spaces.complete(SCRIPTED, 1, 2, 3)]
    assert texts == ["the fox jumps the ox", " fox jumps the ox", " jumps the ox"]


def test_a_text_keeps_the_space_between_it_and_its_prompt(spaces):
    assert_spaces_after_a_prompt(spaces)


def test_a_text_without_its_prompt_loses_the_space(spaces, monkeypatch):
    class Alone(CompletionText):
        def __init__(self, tokenizer, prompt, stop_strings):
            super().__init__(tokenizer, [], stop_strings)

    monkeypatch.setattr(generator_module, "CompletionText", Alone)
    with pytest.raises(AssertionError):
        assert_spaces_after_a_prompt(spaces)


# How a completion ends; the end of text is id 16.


def test_the_end_of_text_is_kept_and_ends_a_completion(scripted):
    first, second = scripted([b"a", b"b", b"c"]).complete(SCRIPTED, 1, 2)
    assert (first.token_ids, first.text) == ([1, 2, 16], "bc")
    assert (second.token_ids, second.text) == ([2, 16], "c")
    assert first.finish_reason == second.finish_reason == "stop"


@pytest.mark.parametrize(
    ("count", "ids", "reason"), [(2, [1, 2], "length"), (3, [1, 2, 16], "stop")]
)
def test_the_last_token_allowed_may_be_the_end_of_text(scripted, count, ids, reason):
    sampling = replace(SCRIPTED, max_new_tokens=count)
    (completion,) = scripted([b"a", b"b", b"c"]).complete(sampling, 1)
    assert (completion.token_ids, completion.finish_reason) == (ids, reason)


def test_a_model_without_a_tokenizer_gives_all_its_ids_and_no_text(
    config, scripted_apply, scripted
):
    generator = Generator(scripted_apply, config, None, (66,))
    model = scripted([])._replace(generator=generator, script=[1, 60, 2, 66])
    (completion,) = model.complete(SCRIPTED, 1)
    assert (completion.token_ids, completion.text) == ([60, 2, 66], "")
    assert completion.finish_reason == "stop"
    stops = replace(SCRIPTED, stop_strings=["a"])
    with pytest.raises(ValueError, match=r"stop_strings=.'a'. need a tokenizer"):
        model.complete(stops, 1)


def test_ignoring_the_end_of_text_goes_on_past_it(scripted):
    sampling = replace(SCRIPTED, max_new_tokens=5, ignore_eos=True)
    (completion,) = scripted([b"a", b"b", b"c"]).complete(sampling, 1)
    assert completion.token_ids == [1, 2, 16, 0, 0]
    assert (completion.text, completion.finish_reason) == ("bcaa", "length")


def test_one_new_token_is_the_first_of_more(
    generator, model, requests, completions, sampled
):
    mine = generator.run(model.params, requests, replace(sampled, max_new_tokens=1))
    assert [c.token_ids for c in mine] == [c.token_ids[:1] for c in completions]
    assert {c.finish_reason for c in mine} == {"length"}


def test_a_completion_ends_where_the_context_of_101_is_full(scripted):
    model = scripted([b"a", b"b"] * 60)
    first, second = model.complete(SCRIPTED, 97, 100)
    assert (len(first.token_ids), first.finish_reason) == (4, "length")
    assert (len(second.token_ids), second.finish_reason) == (1, "length")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "prompt 1 has 0 tokens; give 1 to 100 "),
        ([1] * 101, "prompt 1 has 101 tokens; .* .model.max_position_embeddings=101"),
        ([1, 67], "prompt 1 holds ids from 1 to 67; .* model.vocab_size=67"),
        ([1, -1], "prompt 1 holds ids from -1 to 1; "),
    ],
)
def test_a_prompt_that_cannot_be_completed_is_named_before_any_work(
    model, monkeypatch, prompt, message
):
    monkeypatch.delattr(Generator, "run")
    with pytest.raises(ValueError, match=message):
        model.generate([[1], prompt], SamplingConfig(), batch_size=1)
