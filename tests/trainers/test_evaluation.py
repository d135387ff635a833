"""Held-out prompts: how many are solved, always by the same draws."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from relax.config import load_config
from relax.data.records import Records, RecordsConfig
from relax.data.sources import SOURCES, load_records
from relax.generation.requests import Completion
from relax.rewards import REWARDS, RewardScorer
from relax.sampling import SamplingConfig
from relax.text.tokenizers import TokenizerConfig, make_tokenizer
from relax.trainers.evaluation import (
    FIRST_INDEX,
    as_sample,
    held_out_prompts,
    make_completion_evaluation,
    pass_at_k,
)
from relax.trainers.prompts import Prompt

DATA = Path(__file__).parents[2] / "conf/data"
RECORDS = [{"prompt": f"{n}+{n}=", "answer": str(2 * n)} for n in range(1, 6)]


def setup_of(samples: int = 3, **fields):
    """Returns what an evaluation reads of a setup."""
    data = RecordsConfig(
        kind="prompts", template=None, loss_on="auto", packing=False, inspect=False
    )
    trainer = {"context": 13, "eval_samples": samples, "eval_batch_size": 7}
    return SimpleNamespace(
        trainer=SimpleNamespace(**{**trainer, "show_samples": 2, **fields}),
        sampling=SamplingConfig(max_new_tokens=5, seed=23),
        tokenizer=make_tokenizer(
            TokenizerConfig(kind="bytes", encoding=None, path=None)
        ),
        data=data,
        model=SimpleNamespace(max_position_embeddings=17),
        template=None,
        seed=17,
    )


class Sampler:
    """Gives texts by prompt and sample, and remembers what it was asked."""

    def __init__(self, texts, ended=True):
        self.texts, self.ended, self.calls = texts, ended, []

    def decoding_params(self, params):
        return f"decoding {params}"

    def complete(self, params, requests, sampling, rows):
        self.calls.append((params, tuple(requests), sampling, rows))
        texts = (
            self.texts[r.input_index - FIRST_INDEX][r.sample_index] for r in requests
        )
        reason = "stop" if self.ended else "length"
        return [Completion(t, list(t.encode()), finish_reason=reason) for t in texts]


@pytest.mark.parametrize(
    ("solved", "num_samples", "k", "expected"),
    [
        # By hand: 1 - C(n - c, k) / C(n, k).
        ([0, 1, 2, 5], 5, 2, (0 + (1 - 6 / 10) + (1 - 3 / 10) + 1) / 4),
        ([0, 1, 2, 5], 5, 1, (0 + 1 + 2 + 5) / 20),
        ([0, 1, 2, 5], 5, 5, 3 / 4),
        ([3], 7, 3, 1 - 4 / 35),
        ([0], 1, 1, 0.0),
    ],
)
def test_pass_at_k_by_hand(solved, num_samples, k, expected):
    assert pass_at_k(solved, num_samples, k) == pytest.approx(expected, rel=1e-12)


def held_out(records) -> Records:
    """Returns these as the held-out records after two that are trained on."""
    return Records([{}, {}], records, "here")


def evaluation(texts, reward=REWARDS["exact_match"], ended=True, **fields):
    """Returns the evaluation of the records, and the sampler that completes them."""
    sampler, setup = Sampler(texts, ended), setup_of(**fields)
    prompts = held_out_prompts(setup, held_out(RECORDS), len(texts))
    scorer = None
    if reward is not None:
        scorer = RewardScorer(["exact_match"])
        scorer._functions = [reward]
    return make_completion_evaluation(setup, sampler, prompts, scorer), sampler


TEXTS = [["2", "2", "3"], ["5", "6", "4"], ["0", "0", "0"]]


def test_what_an_evaluation_finds_by_hand():
    evaluate, sampler = evaluation(TEXTS)
    metrics, shown = evaluate("params")
    assert metrics == pytest.approx(
        {
            "val_ended": 1.0,
            "val_mean_length": 1.0,
            "val_pass@1": (2 + 1 + 0) / 9,
            "val_pass@3": 2 / 3,
        }
    )
    assert shown == [
        {"prompt": "1+1=", "completion": "2"},
        {"prompt": "2+2=", "completion": "5"},
    ]
    params, requests, sampling, rows = sampler.calls[0]
    assert (params, len(requests), rows) == ("decoding params", 9, 7)
    assert (sampling.seed, sampling.max_new_tokens) == (17, 5)


def test_every_evaluation_draws_the_same():
    evaluate, sampler = evaluation(TEXTS)
    evaluate("params"), evaluate("params")
    assert sampler.calls[0] == sampler.calls[1]
    requests = sampler.calls[0][1]
    assert len({(r.input_index, r.sample_index) for r in requests}) == 9
    # Those of training lie below.
    assert min(r.input_index for r in requests) == 2**31


def test_one_sample_of_each_has_one_metric():
    evaluate, _ = evaluation([["2"], ["5"]], samples=1, ended=False)
    metrics, _ = evaluate("params")
    expected = {"val_ended": 0.0, "val_mean_length": 1.0, "val_pass@1": 0.5}
    assert metrics == expected


def test_without_a_reward_only_the_ends_are_looked_at():
    evaluate, _ = evaluation(TEXTS, reward=None)
    assert evaluate("params").metrics == {"val_ended": 1.0, "val_mean_length": 1.0}


def test_prompts_that_no_reward_can_judge_do_not_count():
    def of_second(sample):
        return None if sample.answer != "4" else float(sample.completion == "4")

    evaluate, _ = evaluation(TEXTS, reward=of_second)
    metrics, _ = evaluate("params")
    assert (metrics["val_pass@1"], metrics["val_pass@3"]) == pytest.approx((1 / 3, 1))
    evaluate, _ = evaluation(TEXTS, reward=lambda sample: None)
    assert set(evaluate("params").metrics) == {"val_ended", "val_mean_length"}


@pytest.mark.parametrize("value", [SystemExit(3), ValueError("odd"), "1", float("nan")])
def test_what_fails_in_a_reward_is_not_right_and_ends_no_run(value):
    """A text is read as a number nowhere."""

    def odd(sample):
        if sample.completion != "2":
            return 1.0
        if isinstance(value, BaseException):
            raise value
        return value

    evaluate, _ = evaluation(TEXTS, reward=odd)
    assert evaluate("params").metrics["val_pass@1"] == pytest.approx(7 / 9)


def test_a_part_of_a_reward_solves_nothing():
    evaluate, _ = evaluation(TEXTS, reward=lambda sample: 0.999)
    assert evaluate("params").metrics["val_pass@1"] == 0.0


def test_what_a_reward_is_told():
    prompt = Prompt((49, 61), "1=", "1", {"answer": "1", "source": "here"})
    completion = Completion("12", [49, 50, 256], finish_reason="stop")
    sample = as_sample(prompt, completion, 7)
    assert sample == ("1=", "12", "1", prompt.record, 3, 7, True)
    cut = Completion("12", [49, 50], finish_reason="length")
    assert as_sample(prompt, cut, 7)[4:] == (2, 7, False)


def test_the_first_held_out_records_are_asked_as_far_as_there_are_some():
    prompts = held_out_prompts(setup_of(), held_out(RECORDS), 3)
    assert [prompt.text for prompt in prompts] == ["1+1=", "2+2=", "3+3="]
    assert len(held_out_prompts(setup_of(), held_out(RECORDS), 99)) == 5


def test_a_held_out_prompt_may_be_as_long_as_the_model_can_read():
    """What is only completed need not fit in trainer.context."""
    longest, longer = ({"prompt": "1" * count, "answer": "1"} for count in (12, 13))
    assert len(held_out_prompts(setup_of(), held_out([*RECORDS, longest]), 6)) == 6
    with pytest.raises(ValueError) as raised:
        held_out_prompts(setup_of(), held_out([*RECORDS, longer]), 6)
    assert str(raised.value).startswith(
        "prompt 7 of the data has 13 tokens, and with sampling.max_new_tokens=5 "
        "model.max_position_embeddings=17 has room for 1 to 12; "
    )


def test_held_out_prompts_need_records():
    with pytest.raises(
        ValueError, match=r"trainer\.eval_prompts=3, and the data holds"
    ):
        held_out_prompts(setup_of(), held_out([]), 3)


@pytest.mark.parametrize("kind", ["arithmetic", "countdown"])
def test_held_out_prompts_are_never_trained_on(kind):
    """In whatever order: those of operands are sums of the same numbers."""
    values = {
        **load_config(DATA / "_records.yaml"),
        **load_config(DATA / f"{kind}.yaml"),
    }
    values.pop("defaults")
    sizes = {"train_size": None, "digits": 1} if kind == "arithmetic" else {}
    sizes |= {"validation_size": 20}
    config, _ = SOURCES[kind]
    records = load_records(config(**{**values, **sizes}))

    def asked(some):
        texts = [record["prompt"] for record in some]
        return {
            "".join(sorted(text)) if kind == "arithmetic" else text for text in texts
        }

    assert len(records.validation) == 20
    assert not asked(records.train) & asked(records.validation)
