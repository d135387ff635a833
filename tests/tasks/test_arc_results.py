import io
from itertools import combinations

import pytest

from relax.tasks.arc_grids import CUT_OFF, EMPTY, Parsed
from relax.tasks.arc_results import (
    OVER_CONTEXT,
    PLACEHOLDER,
    Answered,
    choose_two,
    pass_at,
    show,
    submission,
    summarise,
)

A, B, C = [[1]], [[2, 2]], [[3], [3]]


def answered(task_id, test, output, *grids, over_context=False):
    """A test input whose attempts gave the grids, or the reasons where a text is."""
    attempts = [
        Parsed(None, grid) if isinstance(grid, str) else Parsed(grid, None)
        for grid in grids
    ]
    return Answered(task_id, test, output, 11, over_context, attempts)


@pytest.mark.parametrize(
    ("grids", "chosen"),
    [
        ([A], [A, A]),
        ([None], [None, None]),
        ([A, B], [A, B]),
        ([A, A], [A, A]),
        ([None, B], [None, B]),
        ([A, None], [A, None]),
        ([A, B, B], [B, A]),
        ([A, B, C], [A, B]),  # ties: as they came
        ([C, A, B, A, B], [A, B]),
        ([A, C, C, B, B, A], [A, C]),
        ([A, A, A], [A, A]),
        ([None, None, B], [B, B]),
        ([None, B, None, A], [B, A]),  # attempts without a grid have no vote
        ([None, None, None], [None, None]),
    ],
)
def test_the_two_grids_that_most_attempts_gave_are_submitted(grids, chosen):
    assert choose_two(grids) == chosen


def test_a_submission_has_two_grids_for_each_test_input():
    given = [
        answered("a", 0, None, A, EMPTY),
        answered("a", 1, None, CUT_OFF, B),
        answered("b", 0, None, OVER_CONTEXT, OVER_CONTEXT, over_context=True),
    ]
    assert PLACEHOLDER == [[0, 0], [0, 0]]
    assert submission(given) == {
        "a": [
            {"attempt_1": A, "attempt_2": PLACEHOLDER},
            {"attempt_1": PLACEHOLDER, "attempt_2": B},
        ],
        "b": [{"attempt_1": PLACEHOLDER, "attempt_2": PLACEHOLDER}],
    }


def test_results_count_tasks_inputs_and_attempts():
    results = summarise(
        [
            answered("a", 0, A, A, B, B, C),  # 1 of 4, outvoted: B and then A
            answered("a", 1, B, B, B, B, EMPTY),
            answered("b", 0, C, A, A, B, C),  # right once, and not submitted
            answered("b", 1, A, A, A, A, A),
            answered("c", 0, None, A, A, A, CUT_OFF),
            answered("c", 1, A, B, CUT_OFF, B, B),
            answered("d", 0, A, *[OVER_CONTEXT] * 4, over_context=True),
        ]
    )
    by_task = results.pop("by_task")
    passes = results.pop("pass_at_k")
    assert results == {
        "tasks": 4,
        "tasks_known": 3,
        "tasks_solved": 1,
        "test_inputs": 7,
        "test_inputs_known": 6,
        "test_inputs_solved": 3,
        "attempts": 28,
        "attempts_right": 9,
        "attempts_without_grid": {CUT_OFF: 2, EMPTY: 1, OVER_CONTEXT: 4},
        "over_context": [{"task": "d", "test": 0, "tokens": 11}],
    }
    # Right of 4: 1, 3, 1, 4, 0, 0. At 2: 1/2, 1, 1/2, 1, 0, 0.
    assert passes == pytest.approx({"1": 9 / 24, "2": 0.5, "3": 3.5 / 6, "4": 4 / 6})
    assert by_task["a"] == {
        "solved": True,
        "test_inputs": [{"solved": True, "right": 1}, {"solved": True, "right": 3}],
    }
    assert by_task["b"]["solved"] is False
    assert by_task["c"] == {
        "solved": None,
        "test_inputs": [{"solved": None, "right": None}, {"solved": False, "right": 0}],
    }
    assert by_task["d"]["solved"] is False


def test_a_placeholder_is_never_right():
    one = answered("a", 0, PLACEHOLDER, EMPTY, B)
    assert one.solved is False and one.right == 0


@pytest.mark.parametrize(("n", "right"), [(1, 0), (1, 1), (5, 2), (7, 3), (4, 4)])
def test_pass_at_k_is_the_share_of_choices_with_a_right_one(n, right):
    for k in range(1, n + 1):
        choices = list(combinations(range(n), k))
        share = sum(min(choice) < right for choice in choices) / len(choices)
        assert pass_at(k, n, right) == pytest.approx(share)


def table_of(*given):
    terminal = io.StringIO()
    show(summarise(given), terminal)
    lines = [line.split() for line in terminal.getvalue().splitlines()]
    return [" ".join(line) for line in lines if line]


def test_the_table_shows_what_was_counted():
    assert table_of(
        answered("a", 0, A, A, B),
        answered("b", 0, A, B, EMPTY),
        answered("c", 0, B, A, A),
    ) == [
        "tasks 3",
        "solved of 3 known 1 (33.3%)",
        "test inputs 3",
        "solved of 3 known 1 (33.3%)",
        "pass@1 of test inputs 16.7%",
        "pass@2 of test inputs 33.3%",
        "attempts 6",
        "right 1",
        "without a grid 1",
        "empty 1",
    ]


def test_the_table_says_nothing_of_what_is_not_known():
    lines = table_of(answered("a", 0, None, A, B))
    assert lines[1] == "solved of 0 known -"
    assert not any(line.startswith("pass") for line in lines)


def test_of_many_attempts_the_table_shows_some_powers():
    lines = table_of(answered("a", 0, A, *[A] * 11))
    shown = [line.split()[0] for line in lines if line.startswith("pass")]
    assert shown == ["pass@1", "pass@2", "pass@4", "pass@8", "pass@11"]
