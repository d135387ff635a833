"""Many samples scored by several rewards, in this process or in others."""

import logging
import math
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from typing import NamedTuple

import numpy as np
from pebble import ProcessExpired, ProcessPool

from relax.rewards.registry import find_reward
from relax.rewards.samples import Reward, Sample

logger = logging.getLogger(__name__)

FAILED, TIMED_OUT = 1, 2


class Scores(NamedTuple):
    """Rewards of N samples by F functions.

    values: `[N, F]`, NaN where a function did not apply, failed or took too long.
    states: `[N, F]`, FAILED, TIMED_OUT or else 0. total: `[N]`, see
    `RewardScorer.total`. errors, timeouts: how many, by name.
    """

    values: np.ndarray
    states: np.ndarray
    total: np.ndarray
    errors: dict[str, int]
    timeouts: dict[str, int]


class _Outcome(NamedTuple):
    value: float = math.nan
    error: str | None = None
    timed_out: bool = False

    @property
    def state(self) -> int:
        return TIMED_OUT if self.timed_out else FAILED * (self.error is not None)


class RewardScorer:
    """Scores samples by named rewards; used as a context, which ends its processes.

    A reward that raises, or returns what is no finite number, is counted and drops out
    of its row; the first error of each is logged. None says that it does not apply.

    processes: how many workers call the rewards; 0: this process does. Workers import
    the rewards' modules, and the main program's where that has no `__main__` guard.
    time_limit_seconds: of one call of one reward, beyond which its worker is killed and
    another started; None: no limit. A worker that dies by itself costs no row: what it
    was at is tried once more.
    """

    def __init__(
        self,
        names: Sequence[str],
        weights: Sequence[float] = (),
        *,
        processes: int = 0,
        time_limit_seconds: float | None = None,
    ):
        """Raises ValueError for whatever of this can't be, the rewards' names included.

        weights: one for each name; empty: ones.
        """
        _check(names, weights, processes, time_limit_seconds)
        self.names = tuple(names)
        self.weights = np.asarray(weights or [1.0] * len(names), np.float64)
        self._functions = [find_reward(name) for name in self.names]
        self._time_limit = time_limit_seconds
        self._processes = processes
        self._pool = self._make_pool() if processes else None
        self._logged: set[str] = set()

    def __enter__(self) -> "RewardScorer":
        return self

    def __exit__(self, *error) -> None:
        if self._pool is not None:
            self._pool.stop()
            self._pool.join()

    def score(
        self,
        samples: Sequence[Sample],
        on_result: Callable[[int, list[float], list[int]], None] | None = None,
    ) -> Scores:
        """Returns the scores, rows in the order of `samples`.

        on_result: told the index, the values and the states of each row as soon as it
        is done, in whatever order that is.
        """
        shape = len(samples), len(self.names)
        values, states = np.full(shape, np.nan), np.zeros(shape, np.int8)
        missing = [len(self.names)] * len(samples)
        run = self._run_here if self._pool is None else self._run_in_pool
        for row, column, outcome in run(samples):
            values[row, column] = outcome.value
            states[row, column] = outcome.state
            self._log_first(self.names[column], outcome)
            missing[row] -= 1
            if on_result is not None and not missing[row]:
                on_result(row, values[row].tolist(), states[row].tolist())
        errors, timeouts = (self.count(states, state) for state in (FAILED, TIMED_OUT))
        return Scores(values, states, self.total(values), errors, timeouts)

    def count(self, states: np.ndarray, state: int) -> dict[str, int]:
        """Returns how many of states `[N, F]` are this one, by name."""
        counts = (states == state).sum(axis=0).tolist()
        return dict(zip(self.names, counts, strict=True))

    def total(self, values: np.ndarray) -> np.ndarray:
        """Returns the weighted sums `[N]` of values `[N, F]`.

        A NaN adds nothing to its row's sum, which is NaN where all of the row are.
        """
        sums = np.nansum(values * self.weights, axis=1)
        return np.where(np.isnan(values).all(axis=1), np.nan, sums)

    def _run_here(
        self, samples: Sequence[Sample]
    ) -> Iterator[tuple[int, int, _Outcome]]:
        for row, sample in enumerate(samples):
            for column, function in enumerate(self._functions):
                yield row, column, _call(function, sample)

    def _run_in_pool(
        self, samples: Sequence[Sample]
    ) -> Iterator[tuple[int, int, _Outcome]]:
        """Yields row, column and outcome of each call, in the order they end."""
        calls = [(i, j) for i in range(len(samples)) for j in range(len(self.names))]
        for last in (False, True):
            lost = []
            for row, column, outcome in self._run_once(samples, calls):
                if outcome is not None:
                    yield row, column, outcome
                elif last:
                    yield row, column, _Outcome(error="its process died, twice")
                else:
                    lost.append((row, column))
            calls = lost

    def _run_once(
        self, samples: Sequence[Sample], calls: list[tuple[int, int]]
    ) -> Iterator[tuple[int, int, _Outcome | None]]:
        """Yields what `_run_in_pool` does, and None for calls whose worker died."""
        if not self._pool.active:
            self._pool = self._make_pool()
        futures = {
            self._pool.schedule(
                _call_by_name,
                (self.names[column], samples[row]),
                timeout=self._time_limit,
            ): (row, column)
            for row, column in calls
        }
        try:
            for future in as_completed(futures):
                yield *futures[future], self._outcome(future)
        finally:
            for future in futures:
                future.cancel()

    def _outcome(self, future) -> _Outcome | None:
        try:
            return future.result()
        except TimeoutError:
            message = f"took longer than trainer.reward_seconds={self._time_limit}"
            return _Outcome(error=message, timed_out=True)
        except (ProcessExpired, BrokenProcessPool):
            return None
        except Exception as error:  # such as a record that can't be sent
            return _Outcome(error=f"{type(error).__name__}: {error}")

    def _make_pool(self) -> ProcessPool:
        return ProcessPool(
            max_workers=self._processes,
            initializer=_import_rewards,
            initargs=[self.names],
            # A fork of a process whose threads hold locks, as JAX's may, can hang.
            context=multiprocessing.get_context("spawn"),
        )

    def _log_first(self, name: str, outcome: _Outcome) -> None:
        if outcome.error is not None and name not in self._logged:
            self._logged.add(name)
            logger.warning(
                "the reward %s failed, and its row goes without it: %s (more failures "
                "are counted, not shown)",
                name,
                outcome.error,
            )


def _check(
    names: Sequence[str],
    weights: Sequence[float],
    processes: int,
    time_limit_seconds: float | None,
) -> None:
    shown = ",".join(names)
    if not names:
        raise ValueError("trainer.rewards=[] must name at least one reward")
    if len(set(names)) < len(names):
        raise ValueError(f"trainer.rewards=[{shown}] names a reward twice")
    if weights and len(weights) != len(names):
        raise ValueError(
            f"trainer.reward_weights={list(weights)} must have one number for each of "
            f"trainer.rewards=[{shown}], or be empty for ones"
        )
    if not all(math.isfinite(weight) for weight in weights):
        raise ValueError(f"trainer.reward_weights={list(weights)} must be finite")
    if processes < 0:
        raise ValueError(f"trainer.reward_processes={processes} must be at least 0")
    if time_limit_seconds is not None and time_limit_seconds <= 0:
        raise ValueError(
            f"trainer.reward_seconds={time_limit_seconds} must be above 0, or null for "
            "no limit"
        )
    if time_limit_seconds is not None and not processes:
        raise ValueError(
            f"trainer.reward_seconds={time_limit_seconds} needs "
            f"trainer.reward_processes>=1 (now {processes}): a limit is kept by "
            "killing a process"
        )


def _call(function: Reward, sample: Sample) -> _Outcome:
    """Returns what a reward gives; exceptions become texts, which any process reads."""
    try:
        value = function(sample)
        if value is None:
            return _Outcome()
        if isinstance(value, str):
            raise TypeError(f"returned the text {value!r}")
        value = float(value)
    except (Exception, SystemExit) as error:
        return _Outcome(error=f"{type(error).__name__}: {error}")
    if not math.isfinite(value):
        return _Outcome(error=f"returned {value}")
    return _Outcome(value)


def _call_by_name(name: str, sample: Sample) -> _Outcome:
    return _call(lambda sample: find_reward(name)(sample), sample)


def _import_rewards(names: Sequence[str]) -> None:
    """Imports the rewards before the first call, whose time limit they'd use up."""
    for name in names:
        # Each call of such a reward will say so.
        with suppress(ValueError):
            find_reward(name)
