"""Rewards that are kept: found again for the same completion, and for no other."""

from dataclasses import replace

import numpy as np
import pytest

from relax.generation.requests import Completion, Request
from relax.rewards import TIMED_OUT
from relax.trainers.reward_journal import BEFORE, FILE, Kept, RewardJournal

NAMES = ("exact_match", "ends")
REQUEST = Request((65, 61), 3, 1)
COMPLETION = Completion("12", [49, 50, 256], finish_reason="stop")
VALUES = Kept([0.1 + 0.2, float("nan")], [0, TIMED_OUT])


def journal(folder, names=NAMES) -> RewardJournal:
    return RewardJournal(folder, names)


@pytest.fixture
def kept(tmp_path):
    """A folder in which a killed run has kept the rewards of one completion."""
    opened = journal(tmp_path)
    opened.put(REQUEST, COMPLETION, VALUES)
    opened.close()
    return tmp_path


def find(folder, request=REQUEST, completion=COMPLETION, names=NAMES):
    opened = journal(folder, names)
    opened.close()
    return opened.get(request, completion)


def test_rewards_are_found_again_to_the_last_bit(kept):
    found = find(kept)
    assert found.values[0] == 0.1 + 0.2
    assert np.isnan(found.values[1])
    assert found.states == [0, TIMED_OUT]


@pytest.mark.parametrize(
    ("request_changes", "completion_changes", "names"),
    [
        ({"input_index": 4}, {}, NAMES),
        ({"sample_index": 2}, {}, NAMES),
        ({"prompt": (65, 62)}, {}, NAMES),
        ({}, {"token_ids": [49, 50, 51]}, NAMES),
        ({}, {"finish_reason": "length"}, NAMES),
        ({}, {}, ("ends", "exact_match")),
        ({}, {}, ("exact_match",)),
    ],
)
def test_another_completion_or_other_rewards_find_nothing(
    kept, request_changes, completion_changes, names
):
    request = replace(REQUEST, **request_changes)
    completion = replace(COMPLETION, **completion_changes)
    assert find(kept, request, completion, names) is None


def test_an_empty_folder_knows_nothing(tmp_path):
    assert find(tmp_path) is None


def test_a_checkpoint_forgets_what_is_older_than_the_one_before(kept):
    later = replace(REQUEST, input_index=7)
    opened = journal(kept)
    opened.rotate()
    opened.put(later, COMPLETION, VALUES)
    # This checkpoint may not have been completed: the one before it needs them.
    assert find(kept) is not None
    assert find(kept, later) is not None
    opened.rotate()
    assert find(kept) is None
    assert find(kept, later) is not None
    opened.rotate()
    assert find(kept, later) is None
    opened.close()


def test_a_run_that_goes_on_adds_to_what_is_there(kept):
    later = replace(REQUEST, input_index=7)
    opened = journal(kept)
    opened.put(later, COMPLETION, VALUES)
    opened.close()
    assert find(kept) is not None
    assert find(kept, later) is not None


@pytest.mark.parametrize("size", range(-30, 0, 7))
def test_a_line_that_a_kill_has_torn_costs_itself_alone(kept, size):
    first, later = (kept / FILE).read_bytes(), replace(REQUEST, input_index=7)
    opened = journal(kept)
    opened.put(later, COMPLETION, VALUES)
    opened.close()
    whole = (kept / FILE).read_bytes()
    (kept / FILE).write_bytes(whole[:size])
    assert find(kept) is not None
    assert find(kept, later) is None
    opened = journal(kept)
    opened.put(later, COMPLETION, VALUES)
    opened.close()
    assert find(kept, later) is not None
    assert (kept / FILE).read_bytes().startswith(first)


def test_every_reward_is_on_disk_at_once(tmp_path):
    opened = journal(tmp_path)
    opened.put(REQUEST, COMPLETION, VALUES)
    assert (tmp_path / FILE).read_bytes().endswith(b"\n")
    assert not (tmp_path / BEFORE).exists()
    opened.close()
