"""Advantages against TRL's numbers, and against numbers worked out by hand."""

import json
import math

import numpy as np
import pytest

from relax.advantages import group_advantages

NUM_CASES = 6


def test_advantages_equal_trl(oracle_dir):
    cases = json.loads((oracle_dir / "trl_grpo_loss_vectors.json").read_text())
    ran = 0
    for case in cases["advantage_cases"]:
        rewards = [math.nan if r is None else r for r in case["rewards"]]
        group, scale = case["num_generations"], case["scale_rewards"]
        actual = group_advantages(rewards, group, scale)
        # TRL works in float32: advantages of up to 1.6, a spacing of 1.2e-7.
        np.testing.assert_allclose(
            actual.advantages, case["advantages"], rtol=0, atol=2.5e-7
        )
        assert actual.reward_mean == pytest.approx(case["reward"], abs=1e-7)
        assert actual.reward_std == pytest.approx(case["reward_std"], abs=1e-7)
        assert actual.frac_reward_zero_std == case["frac_reward_zero_std"]
        ran += 1
    print(f"{ran} advantage cases equal TRL 1.16.0")
    assert ran == NUM_CASES


def test_a_group_by_hand():
    # Mean 2, sample variance (4 + 0 + 4) / 2 = 4; the second group is 0 and 1 of 0.5.
    rewards = [0.0, 2.0, 4.0, 0.0, math.nan, 1.0]
    actual = group_advantages(rewards, 3, "group")
    half = 0.5 / (math.sqrt(0.5) + 1e-4)
    expected = [-2 / 2.0001, 0.0, 2 / 2.0001, -half, 0.0, half]
    assert actual.advantages.dtype == np.float32
    np.testing.assert_allclose(actual.advantages, expected, rtol=1e-6)
    # Of the five that are scored: mean 7/5, squares 21, variance (21 - 49/5) / 4.
    assert actual.reward_mean == pytest.approx(1.4)
    assert actual.reward_std == pytest.approx(math.sqrt(2.8))
    unscaled = group_advantages(rewards, 3, "none")
    np.testing.assert_array_equal(unscaled.advantages, [-2, 0, 2, -0.5, 0, 0.5])
    batch = group_advantages(rewards, 3, "batch")
    np.testing.assert_allclose(
        batch.advantages, unscaled.advantages / (math.sqrt(2.8) + 1e-4), rtol=1e-6
    )


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_rewards_that_are_all_the_same_have_no_advantage_at_all(scale):
    # 0.1 is no binary fraction: a mean of seven of them need not be 0.1.
    actual = group_advantages([0.1] * 14, 7, scale)
    np.testing.assert_array_equal(actual.advantages, 0.0)
    assert actual.frac_reward_zero_std == 1.0
    assert actual.reward_mean == pytest.approx(0.1)


@pytest.mark.parametrize("scale", ["group", "none"])
def test_a_group_of_one_has_no_advantage(scale):
    actual = group_advantages([3.0, 5.0], 1, scale)
    np.testing.assert_array_equal(actual.advantages, 0.0)
    assert (actual.frac_reward_zero_std, actual.reward_mean) == (1.0, 4.0)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_one_scored_row_of_a_group_has_no_advantage(scale):
    actual = group_advantages([math.nan, 3.0, 1.0, 2.0], 2, scale)
    np.testing.assert_array_equal(actual.advantages[:2], 0.0)
    assert actual.advantages[2] == -actual.advantages[3] != 0.0
    assert actual.frac_reward_zero_std == 0.0


def test_nothing_scored_is_no_advantage_and_no_number():
    actual = group_advantages([math.nan] * 4, 2, "group")
    np.testing.assert_array_equal(actual.advantages, 0.0)
    assert math.isnan(actual.reward_mean) and math.isnan(actual.reward_std)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="num_generations=4 must divide the 6 rewards"):
        group_advantages([0.0] * 6, 4, "group")
    with pytest.raises(
        ValueError, match="scale_rewards='row' is unknown; choose one of"
    ):
        group_advantages([0.0] * 6, 3, "row")
