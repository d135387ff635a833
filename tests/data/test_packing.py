"""Which documents share a row, by hand and as TRL 1.16 has it."""

import json

import numpy as np
import pytest

from relax.data.packing import pack

ROWS = (
    12  # of TRL's "bfd"; its "bfd_split" and "wrapped" cut documents, and are not ours
)


def test_rows_are_those_of_trl(oracle_dir):
    text = (oracle_dir / "trl_sft_packing_collate.json").read_text()
    oracle = json.loads(text)
    size, documents = oracle["seq_length"], oracle["input_ids"]
    expected, lengths = (
        oracle["packed"]["bfd"][k] for k in ("input_ids", "seq_lengths")
    )
    rows = pack([len(document) for document in documents], size)
    assert len(rows) == len(expected) == ROWS
    made = [[token for i in row for token in documents[i][:size]] for row in rows]
    assert made == expected
    assert [[len(documents[i][:size]) for i in row] for row in rows] == lengths


@pytest.mark.parametrize(
    ("lengths", "size", "rows"),
    [
        ([5, 2, 4, 1], 4, [[0], [2], [1, 3]]),  # the example of TRL's docstring
        ([], 7, []),
        ([0, 0], 7, []),
        ([3, 0, 4], 7, [[2, 0]]),
        ([9, 9], 7, [[0], [1]]),
        # 2 goes where exactly 2 is left, not where 3 is; then 3 there.
        ([11, 10, 2, 3], 13, [[0, 2], [1, 3]]),
        # Three rows with 2 left: the oldest is filled first.
        ([5, 5, 5, 2, 1, 1], 7, [[0, 3], [1, 4, 5], [2]]),
        # The longest comes first, and its row is filled first.
        ([5, 5, 6, 1, 1], 7, [[2, 3], [0, 4], [1]]),
    ],
)
def test_best_fit_decreasing_by_hand(lengths, size, rows):
    assert pack(lengths, size) == rows


@pytest.mark.parametrize("seed", range(5))
def test_every_document_has_one_row_and_every_row_has_room(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 41, 997)
    rows = pack(lengths, 37)
    assert sorted(i for row in rows for i in row) == list(range(997))
    sums = [np.minimum(lengths[row], 37).sum() for row in rows]
    assert max(sums) <= 37
    # Whatever the order, no two rows that are at most half full are left.
    assert sum(2 * total <= 37 for total in sums) <= 1
