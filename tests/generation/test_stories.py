"""A trained model against transformers 5.23 and against its published text."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest

from relax.generation.generator import Request
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
def greedy_cases(oracle_dir):
    """The runs of the peer that neither search with beams nor ban n-grams."""
    path = oracle_dir / "stories260K_generate.json"
    cases = json.loads(path.read_text())["cases"]
    assert len(cases) == 19
    unsupported = {"num_beams", "no_repeat_ngram_size"}
    return [case for case in cases if not unsupported & case["kwargs"].keys()]


def settings(case):
    """Returns a case's repetition penalty and end of text."""
    (eos_id,) = case["kwargs"].get("eos_token_id", [2])
    return case["kwargs"].get("repetition_penalty", 1.0), eos_id


def rows(cases):
    """Yields prompts without their left padding, and what the peer made of each."""
    for case in cases:
        inputs, masks = np.array(case["input_ids"]), np.array(case["attention_mask"])
        for ids, mask, made in zip(inputs, masks, case["sequences"], strict=True):
            yield tuple(ids[mask == 1].tolist()), made[len(ids) :]


def compare_with_peer(stories, params, cases):
    """Compares token ids exactly; returns how many rows were compared.

    Cases of equal settings run as one ragged batch; a longer run begins as a shorter
    one. After the end of text the peer pads with 0.
    """
    count = 0
    for (penalty, eos_id), group in itertools.groupby(cases, settings):
        prompts, expected = zip(*rows(group), strict=True)
        sampling = replace(
            GREEDY,
            repetition_penalty=penalty,
            max_new_tokens=max(map(len, expected)),
        )
        completions = stories.generator(eos_id).run(
            params, [Request(p, i, 0) for i, p in enumerate(prompts)], sampling
        )
        for completion, made in zip(completions, expected, strict=True):
            ids = completion.token_ids[: len(made)]
            assert ids + [0] * (len(made) - len(ids)) == made
            count += 1
    return count


def test_greedy_tokens_are_those_of_transformers(stories, greedy_cases):
    cases = sorted(greedy_cases, key=settings)
    assert [case["name"] for case in cases] == [
        "greedy_bos_256",
        "batch_leftpad_greedy",
        "greedy_eos_dot",
        "greedy_rep1.3",
        "batch_leftpad_greedy_rep1.3",
    ]
    assert compare_with_peer(stories, stories.params, cases) == 1 + 3 + 1 + 1 + 3


def test_wrong_parameters_give_other_tokens(stories, perturbed, greedy_cases):
    cases = [case for case in greedy_cases if case["name"] == "greedy_eos_dot"]
    with pytest.raises(AssertionError):
        compare_with_peer(stories, perturbed, cases)


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
