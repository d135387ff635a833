import json

import pytest

from relax.tasks.arc_grids import (
    CUT_OFF,
    EMPTY,
    NO_MARK,
    NO_ROWS,
    RAGGED,
    TOO_LARGE,
    Parsed,
    format_grid,
    format_prompt,
    parse_answer,
    parse_grid,
)

GRID = [[0, 1, 2], [9, 8, 7]]


@pytest.mark.parametrize(
    ("separator", "text"),
    [(" ", "0 1 2\n9 8 7"), ("", "012\n987"), (",", "0,1,2\n9,8,7")],
)
def test_a_grid_is_a_line_of_separated_digits_for_each_row(separator, text):
    assert format_grid(GRID, separator) == text
    assert parse_grid(text, separator) == Parsed(GRID, None)


@pytest.mark.parametrize("separator", [" ", "", ",", "\t", ", "])
def test_every_grid_of_the_training_tasks_is_read_back(data_dir, separator):
    files = sorted((data_dir / "arc_agi" / "training").glob("*.json"))
    grids = [
        pair[side]
        for file in files
        for pairs in (json.loads(file.read_text())[key] for key in ("train", "test"))
        for pair in pairs
        for side in ("input", "output")
    ]
    assert (len(files), len(grids)) == (400, 3436)
    for grid in grids:
        assert parse_grid(format_grid(grid, separator), separator).grid == grid


@pytest.mark.parametrize("text", ["0 1\n2 3", "\n 0 1\n2 3 \r\n\n", "\t0 1\n2 3\n"])
def test_blanks_around_a_grid_do_not_matter(text):
    assert parse_grid(text, " ") == Parsed([[0, 1], [2, 3]], None)


@pytest.mark.parametrize(
    ("text", "grid"),
    [
        ("7", [[7]]),
        ("1 2", [[1, 2]]),
        ("1\n2", [[1], [2]]),
        ("\n".join(["4"] * 30), [[4]] * 30),
        (" ".join(["4"] * 30), [[4] * 30]),
    ],
)
def test_the_smallest_and_largest_grids_are_read(text, grid):
    assert parse_grid(text, " ") == Parsed(grid, None)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", EMPTY),
        (" \n\t\r\n", EMPTY),
        ("0 1\n2 3\nInput:", NO_ROWS),
        ("The answer: 0 1", NO_ROWS),
        ("```\n0 1\n```", NO_ROWS),
        ("[[0, 1], [2, 3]]", NO_ROWS),
        ("01\n23", NO_ROWS),
        ("0 10", NO_ROWS),
        ("0 -1", NO_ROWS),
        ("0  1", NO_ROWS),
        ("0 1 \n2 3", NO_ROWS),
        ("0 1\n 2 3", NO_ROWS),
        ("0 1\r\n2 3", NO_ROWS),
        ("0 1\n\n2 3", NO_ROWS),
        ("0\t1", NO_ROWS),
        ("0\u00a01", NO_ROWS),
        ("0 ٣", NO_ROWS),  # a digit, but none of ASCII
        ("0 １", NO_ROWS),
        ("0 ²", NO_ROWS),
        ("\ufeff0 1", NO_ROWS),
        ("0 1\u20282 3", NO_ROWS),
        ("0 1\n2", RAGGED),
        ("0\n1 2", RAGGED),
        ("\n".join(["4"] * 31), TOO_LARGE),
        (" ".join(["4"] * 31), TOO_LARGE),
    ],
)
def test_what_is_no_grid_is_not_mended(text, reason):
    assert parse_grid(text, " ") == Parsed(None, reason)


@pytest.mark.parametrize("text", ["0 1\n2 3", "0,1", "012\n\n345", "01a"])
def test_rows_without_separators_hold_digits_alone(text):
    assert parse_grid(text, "") == Parsed(None, NO_ROWS)


def test_an_answer_that_was_cut_off_is_no_grid():
    """Its last row may look whole and not be the last."""
    assert parse_answer("0 1\n2 3", "length", " ", None) == Parsed(None, CUT_OFF)
    assert parse_answer("0 1\n2 3", "stop", " ", None).grid == [[0, 1], [2, 3]]


def test_an_answer_follows_the_last_mark():
    text = "<think>5 5 or </think> no\n</think>\n\n0 1\n2 3"
    assert parse_answer(text, "stop", " ", "</think>").grid == [[0, 1], [2, 3]]
    assert parse_answer(text, "stop", " ", None) == Parsed(None, NO_ROWS)
    assert parse_answer("0 1", "stop", " ", "</think>") == Parsed(None, NO_MARK)


def test_a_prompt_shows_every_pair_and_ends_where_the_answer_begins():
    pairs = [
        {"input": [[0, 7], [7, 0]], "output": [[7, 0], [0, 7]]},
        {"input": [[3]], "output": [[5, 6]]},
    ]
    assert format_prompt(pairs, [[1, 2]], " ") == (
        "Input:\n0 7\n7 0\nOutput:\n7 0\n0 7\n\n"
        "Input:\n3\nOutput:\n5 6\n\n"
        "Input:\n1 2\nOutput:\n"
    )
