"""Rollouts without a model: the prompts that are taken, and what is made of them."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from relax.config import load_config
from relax.generation.requests import Completion, Request
from relax.rewards import RewardScorer
from relax.sampling import SamplingConfig
from relax.trainers import policy
from relax.trainers.grpo_config import GRPOConfig
from relax.trainers.prompts import Prompt
from relax.trainers.reward_journal import RewardJournal
from relax.trainers.rollout import (
    Counts,
    Group,
    RolloutMaker,
    completion_rows,
    rollout_metrics,
    to_arrays,
)

DEFAULTS = load_config(Path(__file__).parents[2] / "conf/trainer/grpo.yaml")
DEFAULTS.pop("defaults")
DEFAULTS["rewards"] = ["exact_match"]  # what auto stands for
EOS, LONGEST, CONTEXT = 256, 7, 13
RIGHT, WRONG = "1", "0"


def setup_of(**fields):
    """Returns what a rollout reads of a setup: three groups of three."""
    sizes = {"batch_size": 9, "num_generations": 3, "context": CONTEXT}
    return SimpleNamespace(
        trainer=GRPOConfig(**{**DEFAULTS, **sizes, **fields}),
        sampling=SamplingConfig(max_new_tokens=LONGEST, seed=5),
        seed=17,
    )


def completion(text: str, ended: bool = True, length: int | None = None) -> Completion:
    ids = [*text.encode(), EOS] if ended else list(text.encode())
    ids = ids if length is None else list(range(length))
    return Completion(
        text=text,
        token_ids=ids,
        sampled_logprobs=[-0.5 - place for place in range(len(ids))],
        finish_reason="stop" if ended else "length",
        support=[np.full(2, 3 + place, np.uint8) for place in range(len(ids))],
    )


class Sampler:
    """Gives the completions of a prompt's number, and remembers what it was asked."""

    def __init__(self, by_number=lambda number, sample: completion(WRONG)):
        self.by_number, self.calls = by_number, []

    def decoding_params(self, params):
        return f"decoding {params}"

    def complete(
        self, params, requests, sampling, rows, capacity=None, keep_support=False
    ):
        self.calls.append((params, sampling.seed, rows, capacity, keep_support))
        return [self.by_number(r.input_index, r.sample_index) for r in requests]


class Scorer(RewardScorer):
    """Counts the samples it is given, and is interrupted before one of them."""

    def __init__(self, rewards, stop_at=None):
        super().__init__(rewards)
        self.samples, self.stop_at = [], stop_at

    def _run_here(self, samples):
        for outcome in super()._run_here(samples):
            if len(self.samples) == self.stop_at:
                raise KeyboardInterrupt
            row, column, _ = outcome
            if column == 0:
                self.samples.append(samples[row])
            yield outcome


def prompt_at(number: int) -> Prompt:
    return Prompt((number % 7 + 65, 61), f"{number}=", RIGHT, {"answer": RIGHT})


def informative(*numbers):
    """Returns the completions of which those of some prompts differ in outcome."""
    return lambda number, sample: completion(
        RIGHT if number in numbers and sample == 1 else WRONG
    )


@pytest.fixture
def maker(tmp_path):
    """A callable: what makes rollouts, as it is in a new process of the same run."""
    journals = []

    def make(sampler, setup, scorer=None, keep_support=False, folder=tmp_path):
        scorer = scorer or Scorer(setup.trainer.rewards)
        journals.append(RewardJournal(folder, setup.trainer.rewards))
        places = scorer, journals[-1], prompt_at, keep_support
        return RolloutMaker(setup, sampler, *places)

    yield make
    for journal in journals:
        journal.close()


def numbers_of(groups) -> list[int]:
    return [group.requests[0].input_index for group in groups]


def test_a_rollout_is_groups_of_the_next_prompts(maker):
    sampler = Sampler()
    groups, counts = maker(sampler, setup_of(), keep_support=True).make("params", 10)
    assert numbers_of(groups) == [10, 11, 12]
    assert [r.sample_index for r in groups[1].requests] == [0, 1, 2]
    assert {r.prompt for r in groups[1].requests} == {prompt_at(11).ids}
    assert (counts.consumed, counts.groups, counts.wasted_tokens) == (3, 3, 0)
    assert counts.new_tokens == 9 * 2
    # The run's seed draws, not that of the sampling group.
    assert sampler.calls == [("decoding params", 17, 9, CONTEXT, True)]
    assert groups[0].values.tolist() == [[0.0]] * 3


def test_a_prompt_that_is_left_out_is_passed_over_and_counted(maker):
    made = maker(Sampler(), setup_of())
    made._prompt_at = lambda number: None if number == 11 else prompt_at(number)
    groups, counts = made.make("params", 10)
    assert numbers_of(groups) == [10, 12, 13]
    assert (counts.consumed, counts.groups) == (4, 3)
    made._prompt_at = lambda number: None
    with pytest.raises(ValueError, match=r"prompts didn't fit trainer\.context"):
        made.make("params", 10)


def test_the_seed_of_a_prompt_is_its_number_as_far_as_there_are_bits(maker):
    groups, _ = maker(Sampler(), setup_of()).make("params", 2**31 - 1)
    assert numbers_of(groups) == [2**31 - 1, 0, 1]


def test_silent_groups_are_replaced_until_enough_differ(maker):
    sampler = Sampler(informative(11, 14, 15))
    made = maker(sampler, setup_of(dynamic_sampling=True))
    groups, counts = made.make("params", 10)
    assert numbers_of(groups) == [11, 14, 15]
    assert [len(sampler.calls), counts.consumed, counts.groups] == [3, 6, 6]
    assert counts.wasted_tokens == 3 * 3 * 2
    assert counts.new_tokens == 6 * 3 * 2


def test_after_the_last_round_silent_groups_fill_up(maker):
    setup = setup_of(dynamic_sampling=True, dynamic_sampling_rounds=2)
    made = maker(Sampler(informative(11, 14, 15)), setup)
    groups, counts = made.make("params", 10)
    assert numbers_of(groups) == [11, 14, 10]
    assert (counts.consumed, counts.wasted_tokens) == (5, 2 * 3 * 2)


def test_without_dynamic_sampling_silent_groups_stay(maker):
    groups, counts = maker(Sampler(informative(11)), setup_of()).make("p", 10)
    assert numbers_of(groups) == [10, 11, 12]
    assert counts.wasted_tokens == 0


def test_the_outcome_reward_alone_says_what_is_silent(maker):
    """All groups differ in whether they end, that of prompt 14 in what is right."""
    setup = setup_of(
        rewards=["ends", "exact_match"],
        outcome_reward="exact_match",
        dynamic_sampling=True,
        dynamic_sampling_rounds=2,
    )

    def by_number(number, sample):
        text = RIGHT if number == 14 and sample else WRONG
        return completion(text, ended=sample > 1)

    groups, _ = maker(Sampler(by_number), setup).make("params", 10)
    assert numbers_of(groups) == [14, 10, 11]
    assert groups[0].totals.tolist() == [0.0, 1.0, 2.0]


@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [
        ([0.0, 0.0, 1.0], True),
        ([1.0, 1.0, 1.0], False),
        ([1.0, np.nan, 1.0], False),
        ([0.0, np.nan, 1.0], True),
        ([0.0, np.nan, np.nan], False),
        ([np.nan] * 3, False),
    ],
)
def test_rows_that_could_not_be_judged_make_no_difference(outcomes, expected):
    values = np.stack([np.arange(3.0), outcomes], axis=1)
    group = Group(prompt_at(0), [], [], values, values.sum(axis=1))
    assert group.is_informative(1) == expected


def test_finished_rewards_are_not_asked_for_again(maker, tmp_path_factory):
    setup = setup_of(rewards=["exact_match", "ends"])
    sampler = Sampler(informative(11))
    stopped = Scorer(setup.trainer.rewards, stop_at=5)
    with pytest.raises(KeyboardInterrupt):
        maker(sampler, setup, stopped).make("params", 10)
    rest = Scorer(setup.trainer.rewards)
    groups, _ = maker(sampler, setup, rest).make("params", 10)
    # What was being rewarded is asked for again: not all of its rewards were there.
    assert (len(stopped.samples), len(rest.samples)) == (5, 9 - 4)
    assert stopped.samples[4:] + rest.samples[1:] == rest.samples
    other = tmp_path_factory.mktemp("uninterrupted")
    whole, _ = maker(sampler, setup, folder=other).make("params", 10)
    for found, expected in zip(groups, whole, strict=True):
        np.testing.assert_array_equal(found.values, expected.values)
        np.testing.assert_array_equal(found.totals, expected.totals)


def test_failures_are_counted_over_all_rounds(maker, tmp_path, monkeypatch):
    (tmp_path / "picky_reward.py").write_text(
        "def picky(sample):\n    return 1 / (len(sample.prompt) - 3)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    setup = setup_of(
        rewards=["exact_match", "picky_reward:picky"],
        dynamic_sampling=True,
        dynamic_sampling_rounds=2,
    )
    groups, counts = maker(Sampler(informative(11)), setup).make("params", 10)
    assert counts.failed == {"exact_match": 0, "picky_reward:picky": 5 * 3}
    assert counts.timed_out == {"exact_match": 0, "picky_reward:picky": 0}
    # The other reward is left.
    assert groups[0].totals.tolist() == [0.0, 1.0, 0.0]


def group_of(number: int, completions, values, totals=None) -> Group:
    values = np.array(values, float)
    requests = [Request(prompt_at(number).ids, number, i) for i in range(len(values))]
    totals = np.nansum(values, axis=1) if totals is None else np.array(totals)
    return Group(prompt_at(number), requests, completions, values, totals)


def edge_group() -> Group:
    """A completion that is an EOS alone, one without any, one that no reward judged."""
    completions = [
        completion(""),
        completion("7531246", ended=False),
        completion("43"),
    ]
    return group_of(2, completions, [[1.0], [0.0], [np.nan]], [1.0, 0.0, np.nan])


def test_a_rollout_as_arrays():
    setup = setup_of(batch_size=3)
    arrays, advantages = to_arrays([edge_group()], setup, 2)
    first, second = prompt_at(2).ids
    digits = list(b"7531246")
    assert arrays["tokens"].tolist() == [
        [first, second, EOS, *[0] * 10],
        [first, second, *digits, *[0] * 4],
        [first, second, *b"43", EOS, *[0] * 8],
    ]
    assert arrays["prompt_lengths"].tolist() == [2, 2, 2]
    assert arrays["completions"].tolist() == [
        [EOS, *[0] * 6],
        digits,
        [*b"43", EOS, *[0] * 4],
    ]
    lengths = [1, 7, 3]
    mask = [[1.0] * n + [0.0] * (LONGEST - n) for n in lengths]
    assert arrays["completion_mask"].tolist() == mask
    assert arrays["loss_mask"].tolist() == mask
    assert arrays["rollout_logprobs"][2].tolist() == [-0.5, -1.5, -2.5, *[0.0] * 4]
    assert arrays["support"].shape == (3, LONGEST, 2)
    assert arrays["support"][2, :, 0].tolist() == [3, 4, 5, 0, 0, 0, 0]
    # By hand: ±1/2 over the sample's std 1/√2; what can't be scored has none.
    expected = [0.5 / (0.5**0.5 + 1e-4), -0.5 / (0.5**0.5 + 1e-4), 0.0]
    np.testing.assert_allclose(arrays["advantages"], expected, rtol=1e-6)
    np.testing.assert_allclose(advantages.advantages, expected, rtol=1e-6)
    assert arrays["loss_mask"].dtype == arrays["advantages"].dtype == np.float32


def test_without_a_support_none_is_kept():
    arrays, _ = to_arrays([edge_group()], setup_of(batch_size=3), 0)
    assert "support" not in arrays


def test_truncated_completions_may_be_left_out_of_the_loss():
    setup = setup_of(batch_size=3, mask_truncated_completions=True)
    arrays, _ = to_arrays([edge_group()], setup, 0)
    assert arrays["loss_mask"].sum(axis=1).tolist() == [1.0, 0.0, 3.0]
    assert arrays["completion_mask"].sum(axis=1).tolist() == [1.0, 7.0, 3.0]


def test_a_group_of_one_deviates_by_nothing():
    setup = setup_of(batch_size=1, num_generations=1, scale_rewards="none")
    group = group_of(2, [completion("43")], [[0.7]])
    arrays, advantages = to_arrays([group], setup, 0)
    assert arrays["advantages"].tolist() == [0.0]
    metrics = rollout_metrics([group], advantages, Counts(1, 1, 3, 0, 0.5), setup)
    assert metrics["reward"] == 0.7
    # Of one completion there is no std.
    assert not {"reward_std", "rewards/exact_match/std"} & set(metrics)


def two_groups() -> list[Group]:
    lengths = ((3, True), (5, False)), ((2, True), (7, False))
    first, second = (
        [completion(WRONG, ended, length) for length, ended in group]
        for group in lengths
    )
    return [
        group_of(3, first, [[1.0, 0.5], [0.0, np.nan]], [2.0, 0.0]),
        group_of(4, second, [[1.0, 1.0], [1.0, 0.0]], [3.0, 1.0]),
    ]


COUNTS = Counts(
    consumed=7,
    groups=5,
    new_tokens=46,
    wasted_tokens=29,
    sampling_seconds=0.25,
    reward_seconds=0.125,
    failed={"ends": 0, "format": 1},
    timed_out={"ends": 0, "format": 0},
)


def test_metrics_of_a_rollout_by_hand():
    setup = setup_of(
        batch_size=4,
        num_generations=2,
        rewards=["ends", "format"],
        reward_weights=[1.0, 2.0],
        dynamic_sampling=True,
    )
    groups = two_groups()
    _, advantages = to_arrays(groups, setup, 0)
    metrics = rollout_metrics(groups, advantages, COUNTS, setup)
    expected = {
        "completions/mean_length": 17 / 4,
        "completions/min_length": 2,
        "completions/max_length": 7,
        "completions/clipped_ratio": 0.5,
        "completions/mean_terminated_length": 2.5,
        "completions/min_terminated_length": 2,
        "completions/max_terminated_length": 3,
        "rewards/ends/mean": 0.75,
        "rewards/ends/std": 0.5,  # √(3/4 / 3)
        "rewards/format/mean": 0.5,
        "rewards/format/std": 0.5,  # √(1/2 / 2)
        "reward": 1.5,
        "reward_std": (5 / 3) ** 0.5,  # over all of them: 1/4 + 9/4 + 9/4 + 1/4
        "frac_reward_zero_std": 0.0,
        "rewards/ends/failed": 0,
        "rewards/format/failed": 1,
        "rewards/ends/timed_out": 0,
        "rewards/format/timed_out": 0,
        "dynamic_sampling/acceptance": 1 / 5,  # only the first differs in its outcome
        "dynamic_sampling/wasted_tokens": 29,
        "rollout/prompts": 7,
        "rollout/prompts_left_out": 2,
        "rollout/time": 0.25,
        "rollout/reward_time": 0.125,
        "rollout/tokens_per_second": 184,
    }
    assert metrics == pytest.approx(expected, rel=1e-12)


def test_rewards_that_are_all_the_same_have_no_spread():
    setup = setup_of(batch_size=2, num_generations=2)
    group = group_of(
        3, [completion(RIGHT, ended=False), completion(RIGHT, False)], [[1.0], [1.0]]
    )
    arrays, advantages = to_arrays([group], setup, 0)
    metrics = rollout_metrics([group], advantages, COUNTS, setup)
    assert arrays["advantages"].tolist() == [0.0, 0.0]
    assert (metrics["reward_std"], metrics["frac_reward_zero_std"]) == (0.0, 1.0)
    assert metrics["completions/clipped_ratio"] == 1.0
    # As in TRL, where none has ended.
    assert metrics["completions/mean_terminated_length"] == 0.0


def test_nothing_that_was_scored_gives_no_number():
    setup = setup_of(batch_size=2, num_generations=2)
    nan = [np.nan, np.nan]
    group = group_of(3, [completion(WRONG)] * 2, [[np.nan], [np.nan]], nan)
    _, advantages = to_arrays([group], setup, 0)
    metrics = rollout_metrics([group], advantages, COUNTS, setup)
    assert not {"reward", "reward_std", "rewards/exact_match/mean"} & set(metrics)


def test_rows_of_completions_hold_each_reward_and_the_advantage():
    setup = setup_of(batch_size=4, num_generations=2, rewards=["ends", "format"])
    groups = two_groups()
    _, advantages = to_arrays(groups, setup, 0)
    rows = completion_rows(groups, advantages, setup.trainer.rewards)
    keys = ["prompt", "completion", "ends", "format", "advantage"]
    assert [list(row) for row in rows] == [keys] * 4
    assert [row["prompt"] for row in rows] == ["3=", "3=", "4=", "4="]
    assert [row["ends"] for row in rows] == [1.0, 0.0, 1.0, 1.0]
    assert [row["advantage"] for row in rows] == advantages.advantages.tolist()


@pytest.mark.parametrize(
    ("prompt", "completion", "widths"),
    [
        (1, 1, (6, 2)),  # an eighth of 41 and of 13, rounded up
        (11, 3, (16, 5)),  # 14 of 41 is less than three eighths
        (1, 9, (31, 10)),  # 9 of 13 is less than six
        (28, 13, (41, 13)),
    ],
)
def test_a_batch_is_cut_to_eighths(prompt, completion, widths):
    mask = np.zeros((2, 13), np.float32)
    mask[0, :completion] = mask[1, :1] = 1.0
    batch = policy._cut(
        {
            "tokens": np.zeros((2, 41), np.int32),
            "prompt_lengths": np.array([prompt, 1]),
            "completion_mask": mask,
            "advantages": np.ones(2),
        }
    )
    assert (batch["tokens"].shape[1], batch["completion_mask"].shape[1]) == widths
    assert batch["completion_mask"].sum() == completion + 1
    assert batch["advantages"].shape == (2,)
