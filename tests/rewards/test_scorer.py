"""Scores of many samples: what fails costs its own value, and nothing else."""

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from relax.rewards import RewardScorer, Sample

MODULE = """
import os, sys, time
from pathlib import Path

def told(sample):
    return {"none": None, "nan": float("nan"), "inf": float("inf"), "text": "1"}.get(
        sample.completion, 11.0
    )

def picky(sample):
    if sample.completion == "leave":
        sys.exit(3)
    if sample.completion == "raise":
        class Odd(Exception):
            def __init__(self, one, other):
                super().__init__(f"{one} and {other}")
        raise Odd(2, 3)
    return float(sample.answer)

def slow(sample):
    time.sleep(60 * (sample.completion == "slow"))
    return 13.0

def has_jax(sample):
    return "jax" in sys.modules

def dies(sample):
    if sample.completion == "always":
        os._exit(5)
    try:
        Path(sample.completion).touch(exist_ok=False)
    except FileExistsError:
        return 17.0
    os._exit(5)

def waits(sample):
    Path(sample.completion).write_text(str(os.getpid()))
    time.sleep(60)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working directory with a module of rewards."""
    folder = tmp_path_factory.mktemp("rewards")
    (folder / "scored_67.py").write_text(MODULE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "path", list(sys.path))
        yield folder
    sys.modules.pop("scored_67", None)


def samples(*completions):
    """Returns a sample for each completion, its answer being its place."""
    return [Sample("", c, str(i), {}, 3, 7, True) for i, c in enumerate(completions)]


@pytest.mark.parametrize("processes", [0, 2])
def test_what_fails_drops_out_of_its_row(folder, processes, caplog):
    names = ["scored_67:told", "scored_67:picky", "length"]
    told = []
    with RewardScorer(names, [1.0, 2.0, 7.0], processes=processes) as scorer:
        scores = scorer.score(
            samples("a", "none", "nan", "raise", "inf", "text", "leave"),
            lambda *row: told.append(row),
        )
    nan = math.nan
    expected = [
        [11, 0, 4 / 7],
        [nan, 1, 4 / 7],
        [nan, 2, 4 / 7],
        [11, nan, 4 / 7],
        [nan, 4, 4 / 7],
        [nan, 5, 4 / 7],
        [11, nan, 4 / 7],
    ]
    np.testing.assert_array_equal(scores.values, expected)
    np.testing.assert_allclose(scores.total, [15, 6, 8, 15, 12, 14, 15], rtol=1e-15)
    assert scores.errors == {names[0]: 3, names[1]: 2, "length": 0}
    assert scores.timeouts == dict.fromkeys(names, 0)
    assert sorted(row for row, _, _ in told) == list(range(7))
    for row, values, states in told:
        np.testing.assert_array_equal(values, expected[row])
        assert states == scores.states[row].tolist()
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 2  # the first of each
    assert any("scored_67:told failed" in x and "returned nan" in x for x in warnings)
    assert any("scored_67:picky" in x and "Odd: 2 and 3" in x for x in warnings)


def test_a_row_without_any_reward_has_no_total(folder):
    scorer = RewardScorer(["scored_67:told", "exact_match"], [0.0, 3.0])
    scores = scorer.score(samples("none", "1", "nan", "a"))
    np.testing.assert_array_equal(
        scores.values, [[math.nan, 0], [11, 1], [math.nan, 0], [11, 0]]
    )
    np.testing.assert_array_equal(scores.total, [0, 3, 0, 0])
    alone = RewardScorer(["scored_67:told"]).score(samples("none", "b", "nan"))
    np.testing.assert_array_equal(alone.total, [math.nan, 11, math.nan])
    assert alone.errors == {"scored_67:told": 1}


def test_no_samples_are_no_scores():
    scores = RewardScorer(["ends", "length"]).score([])
    assert scores.values.shape == (0, 2) and scores.total.shape == (0,)


def test_a_time_limit_costs_what_took_too_long(folder, caplog):
    """Workers are replaced, other rows and the row's other reward are kept."""
    names = ["scored_67:slow", "scored_67:has_jax"]
    with RewardScorer(names, processes=2, time_limit_seconds=1.0) as scorer:
        for _ in range(2):
            start = time.monotonic()
            scores = scorer.score(samples("slow", "b", "slow", "d"))
            assert time.monotonic() - start < 30
            # The second column: workers are spared JAX.
            np.testing.assert_array_equal(
                scores.values, [[math.nan, 0], [13, 0], [math.nan, 0], [13, 0]]
            )
            np.testing.assert_array_equal(scores.total, [0, 13, 0, 13])
            assert scores.timeouts == {names[0]: 2, names[1]: 0}
            assert scores.errors == {names[0]: 0, names[1]: 0}
    (warning,) = caplog.records
    assert "took longer than trainer.reward_seconds=1.0" in warning.getMessage()


def test_a_worker_that_dies_costs_a_second_try(folder, caplog):
    with RewardScorer(["scored_67:dies"], processes=1) as scorer:
        scores = scorer.score(samples("marker_a", "always", "marker_b"))
    np.testing.assert_array_equal(scores.values, [[17], [math.nan], [17]])
    assert scores.errors == {"scored_67:dies": 1}
    assert "its process died, twice" in caplog.text


PROGRAM = """
from relax.rewards import RewardScorer, Sample

if __name__ == "__main__":
    with RewardScorer(["scored_67:waits"], processes=2) as scorer:
        scorer.score([Sample("", f"pid{i}", None, {}, 3, 7, True) for i in range(9)])
"""


def test_an_interrupt_ends_it_and_its_workers(folder):
    (folder / "program.py").write_text(PROGRAM)
    repository = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "program.py"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(repository)},
        stderr=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )
    pids = [folder / "pid0", folder / "pid1"]
    until = time.monotonic() + 60
    while not all(file.exists() and file.read_text() for file in pids):
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.02)
    # As a terminal does: the program and its workers alike.
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert errors.strip().endswith("KeyboardInterrupt")
    assert process.returncode == -signal.SIGINT
    for file in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(int(file.read_text()), 0)


@pytest.mark.parametrize(
    ("names", "weights", "options", "message"),
    [
        ([], [], {}, r"trainer\.rewards=\[\] must name at least one reward"),
        (
            ["ends", "ends"],
            [],
            {},
            r"trainer\.rewards=\[ends,ends\] names a rew",
        ),
        (
            ["ends"],
            [1, 2],
            {},
            r"trainer\.reward_weights=\[1, 2\] must have one n",
        ),
        (["ends"], [math.nan], {}, r"trainer\.reward_weights=\[nan\] must be finite"),
        (["end"], [], {}, r"trainer\.rewards=end is unknown"),
        (["ends"], [], {"processes": -1}, r"trainer\.reward_processes=-1 must be at"),
        (
            ["ends"],
            [],
            {"processes": 1, "time_limit_seconds": 0},
            r"trainer\.reward_seconds=0 must be above 0, or null",
        ),
        (
            ["ends"],
            [],
            {"time_limit_seconds": 2},
            r"trainer\.reward_seconds=2 needs trainer\.reward_processes>=1 \(now 0\)",
        ),
    ],
)
def test_mistakes_are_named(names, weights, options, message):
    with pytest.raises(ValueError, match=message):
        RewardScorer(names, weights, **options)
