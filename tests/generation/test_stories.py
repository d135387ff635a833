"""A trained model against transformers 5.23 and against its published text."""

import itertools
import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from relax.generation.beam import BeamSearch
from relax.generation.requests import Request
from relax.model.llama import make_llama
from relax.sampling import SamplingConfig

GREEDY = SamplingConfig(temperature=0.0, tokens_per_dispatch=8)


@pytest.fixture(scope="module")
def model(stories):
    return stories.model()


@pytest.fixture(scope="module")
def perturbed(stories):
    """Parameters whose last norm has the wrong sign."""
    weight = stories.params["llama/norm"]["weight"]
    return {**stories.params, "llama/norm": {"weight": -weight}}


@pytest.fixture(scope="module")
def published(oracle_dir):
    return json.loads((oracle_dir / "stories260K_greedy_ids.json").read_text())


@pytest.fixture(scope="module")
def cases(oracle_dir):
    """The peer's runs by name."""
    path = oracle_dir / "stories260K_generate.json"
    return {case["name"]: case for case in json.loads(path.read_text())["cases"]}


@pytest.fixture(scope="module")
def greedy_cases(cases):
    """Those that do not search with beams."""
    return [case for case in cases.values() if "num_beams" not in case["kwargs"]]


@pytest.fixture(scope="module")
def beam_search(stories):
    apply = make_llama(stories.config).apply
    return BeamSearch(apply, stories.config, stories.tokenizer.vocab_size)


def settings(case):
    """Returns a case's repetition penalty, size of n-grams and ends of text."""
    kwargs = case["kwargs"]
    return (
        kwargs.get("repetition_penalty", 1.0),
        kwargs.get("no_repeat_ngram_size", 0),
        tuple(kwargs.get("eos_token_id", [2])),
    )


def rows(cases):
    """Yields prompts without their left padding, limits, and what the peer made.

    After the end of text the peer pads with 0, an id that no row has elsewhere.
    """
    for case in cases:
        limit, width = case["kwargs"]["max_new_tokens"], len(case["input_ids"][0])
        for prompt, made in zip(prompts_of(case), case["sequences"], strict=True):
            yield prompt, limit, [token for token in made[width:] if token != 0]


def prompts_of(case):
    """Returns a case's prompts without their left padding."""
    inputs, masks = np.array(case["input_ids"]), np.array(case["attention_mask"])
    pairs = zip(inputs, masks, strict=True)
    return [tuple(ids[mask == 1].tolist()) for ids, mask in pairs]


def compare_with_peer(stories, params, cases):
    """Compares token ids exactly; returns how many rows were compared.

    Cases of equal settings run as one ragged batch; a longer run begins as a shorter
    one.
    """
    count = 0
    for (penalty, ngram_size, stop_ids), group in itertools.groupby(cases, settings):
        prompts, limits, expected = zip(*rows(group), strict=True)
        sampling = replace(
            GREEDY,
            repetition_penalty=penalty,
            no_repeat_ngram_size=ngram_size,
            max_new_tokens=max(limits),
        )
        completions = stories.generator(*stop_ids).run(
            params, [Request(p, i, 0) for i, p in enumerate(prompts)], sampling
        )
        for completion, limit, made in zip(completions, limits, expected, strict=True):
            assert completion.token_ids[:limit] == made
            count += 1
    return count


def compare_beams_with_peer(search, params, case):
    """Compares token ids exactly, and scores; returns how many prompts had beams.

    The peer fills up shorter beams with the end of text, its pad id being 0.
    """
    kwargs, width = case["kwargs"], len(case["input_ids"][0])
    early, (stop_id,) = kwargs["early_stopping"], kwargs["eos_token_id"]
    sampling = SamplingConfig(
        temperature=0.0,
        max_new_tokens=kwargs["max_new_tokens"],
        num_beams=kwargs["num_beams"],
        num_return_sequences=kwargs["num_return_sequences"],
        length_penalty=kwargs["length_penalty"],
        early_stopping=early if early == "never" else str(early).lower(),
    )
    requests = [Request(p, i, 0) for i, p in enumerate(prompts_of(case))]
    found = search(params, requests, sampling, (stop_id,))
    beams = [beam for beams in found for beam in beams]
    made = [row[width:] for row in case["sequences"]]
    ends = [row.index(stop_id) + 1 if stop_id in row else None for row in made]
    expected = [row[:end] for row, end in zip(made, ends, strict=True)]
    assert [beam.token_ids for beam in beams] == expected
    reasons = ["length" if end is None else "stop" for end in ends]
    assert [beam.finish_reason for beam in beams] == reasons
    scores = [beam.score for beam in beams]
    np.testing.assert_allclose(scores, case["sequences_scores"], rtol=0, atol=1e-4)
    return len(found)


# All runs of the peer: these, and by their number of beams how many more.
GREEDY_CASES = [
    "greedy_bos_256",
    "batch_leftpad_greedy",
    "greedy_eos_dot",
    "greedy_no_repeat_ngram3",
    "greedy_rep1.3",
    "batch_leftpad_greedy_rep1.3",
]
BEAM_CASES = {2: 6, 3: 1, 4: 6}


def test_all_runs_of_the_peer_are_compared(cases):
    assert len(cases) == len(GREEDY_CASES) + sum(BEAM_CASES.values()) == 19
    beams = [case["kwargs"].get("num_beams", 1) for case in cases.values()]
    assert Counter(beams) == {1: len(GREEDY_CASES), **BEAM_CASES}


def test_greedy_tokens_are_those_of_transformers(stories, greedy_cases):
    cases = sorted(greedy_cases, key=settings)
    assert [case["name"] for case in cases] == GREEDY_CASES
    assert compare_with_peer(stories, stories.params, cases) == 1 + 3 + 1 + 1 + 1 + 3


@pytest.mark.parametrize(("num_beams", "count"), BEAM_CASES.items())
def test_beams_are_those_of_transformers(stories, beam_search, cases, num_beams, count):
    compared = [
        compare_beams_with_peer(beam_search, stories.params, case)
        for case in cases.values()
        if case["kwargs"].get("num_beams") == num_beams
    ]
    assert compared == ([3] if num_beams == 3 else [1] * count)


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("beam2_lp0.0_esTrue_eosdot", {"length_penalty": 1.0}),
        ("beam2_lp1.0_esnever_eosdot", {"early_stopping": False}),
        ("beam4_lp1.0_esFalse_eosdot", {"early_stopping": True}),
        ("beam3_batch_leftpad", {"length_penalty": 0.9}),
        ("beam4_lp2.0_esTrue_eosdot", {"eos_token_id": [432]}),
    ],
)
def test_every_setting_of_a_beam_search_counts(
    stories, beam_search, cases, name, setting
):
    case = cases[name]
    other = {**case, "kwargs": {**case["kwargs"], **setting}}
    with pytest.raises(AssertionError):
        compare_beams_with_peer(beam_search, stories.params, other)


def test_wrong_parameters_give_other_beams(perturbed, beam_search, cases):
    case = cases["beam2_lp1.0_esFalse_eosdot"]
    with pytest.raises(AssertionError):
        compare_beams_with_peer(beam_search, perturbed, case)


def test_wrong_parameters_give_other_tokens(stories, perturbed, greedy_cases):
    cases = [case for case in greedy_cases if case["name"] == "greedy_eos_dot"]
    with pytest.raises(AssertionError):
        compare_with_peer(stories, perturbed, cases)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_ngrams_of_a_long_text_are_held_apart_as_transformers_does_it(
    stories, data_dir, size
):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    peer = transformers.LlamaForCausalLM.from_pretrained(data_dir / "stories260K_hf")
    made = peer.generate(
        torch.tensor([[1]]),
        attention_mask=torch.ones(1, 1),
        do_sample=False,
        max_new_tokens=128,
        no_repeat_ngram_size=size,
        eos_token_id=2,
        pad_token_id=0,
    )
    case = {
        "input_ids": [[1]],
        "attention_mask": [[1]],
        "sequences": made.tolist(),
        "kwargs": {"no_repeat_ngram_size": size, "max_new_tokens": 128},
    }
    assert compare_with_peer(stories, stories.params, [case]) == 1
    case["kwargs"]["no_repeat_ngram_size"] = 0
    with pytest.raises(AssertionError):
        compare_with_peer(stories, stories.params, [case])


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("greedy_no_repeat_ngram3", {"no_repeat_ngram_size": 2}),
        ("greedy_rep1.3", {"repetition_penalty": 1.1}),
        ("greedy_eos_dot", {"eos_token_id": [427]}),
    ],
)
def test_every_setting_of_a_peer_counts(stories, greedy_cases, name, setting):
    (case,) = [case for case in greedy_cases if case["name"] == name]
    other = {**case, "kwargs": {**case["kwargs"], **setting}}
    with pytest.raises(AssertionError):
        compare_with_peer(stories, stories.params, [other])


def test_the_published_text_comes_back_whole_and_streamed(model, published):
    sampling = replace(GREEDY, max_new_tokens=256)
    (completion,) = model.generate([published[:1]], sampling)
    assert completion.token_ids == published[1:]
    start = "Once upon a time, there was a little girl named Lily. She loved to play"
    assert completion.text.startswith(start)
    assert "".join(model.stream(published[:1], sampling)) == completion.text


def test_text_goes_on_after_the_space_behind_its_prompt(model):
    sampling = replace(GREEDY, stop_strings=["named Lily. She"])
    prompt = "Once upon a time, there was a little"
    (completion,) = model.generate([prompt], sampling)
    assert completion.text == " girl "
    assert "".join(model.stream(prompt, sampling)) == " girl "


def assert_peer_logprobs(model, cases):
    scores = model.score([case["ids"] for case in cases], batch_size=1)
    for case, score in zip(cases, scores, strict=True):
        assert score.token_ids == case["ids"]
        assert score.logprobs[0] is None
        np.testing.assert_allclose(score.logprobs[1:], case["token_logprobs"], 0, 1e-4)


@pytest.fixture(scope="module")
def nll_cases(oracle_dir):
    path = oracle_dir / "stories260K_nll.json"
    return json.loads(path.read_text())["cases"]


def test_scores_are_those_of_transformers(model, nll_cases):
    assert len(nll_cases) == 3
    assert_peer_logprobs(model, list(nll_cases.values()))


def test_wrong_parameters_give_other_scores(model, perturbed, nll_cases, monkeypatch):
    monkeypatch.setattr(model, "params", perturbed)
    with pytest.raises(AssertionError):
        assert_peer_logprobs(model, list(nll_cases.values()))


def test_a_text_is_scored_as_the_ids_of_its_tokenizer(model, data_dir, nll_cases):
    text = (data_dir / "tinyshakespeare.txt").read_text()[:600]
    (score,) = model.score([text])
    expected = nll_cases["tinyshakespeare_600chars"]
    assert score.token_ids == expected["ids"]
    total = -sum(score.logprobs[1:])
    assert abs(total - expected["sum_nll"]) <= 1e-4 * len(expected["token_logprobs"])
