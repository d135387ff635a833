"""The loop over steps: dispatch, read metrics one dispatch late, evaluate, save."""

import logging
import math
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from relax.checkpoints.native import RunCheckpoints
from relax.sharding import shard_batch
from relax.steps import TrainState
from relax.tracking.tracker import Tracker
from relax.trainers.config import LoopConfig

logger = logging.getLogger(__name__)


class NonFiniteError(ValueError):
    """A loss, gradient or parameter became NaN or infinite."""


class Stopped(Exception):
    """A signal asked the run to end; its state was saved."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.exit_code = 128 + signal_number


class Interrupted(KeyboardInterrupt):
    """A second Ctrl-C ended the run at once; `has_checkpoint`: whether one is kept.

    No Exception: what is interrupted must not take it for its own.
    """

    def __init__(self, has_checkpoint: bool):
        super().__init__()
        self.has_checkpoint = has_checkpoint


class Evaluation(NamedTuple):
    """What an evaluation found: metrics, and samples as `Tracker.log_samples` takes."""

    metrics: dict[str, float]
    samples: list[dict] = []


class Prepared(NamedTuple):
    """What was done before a dispatch: the state to go on with, and what to report."""

    state: TrainState
    metrics: dict[str, float]
    completions: list[dict]


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a trainer gives to the loop.

    train_step: `(state, batches) -> (state, metrics)`, metrics `[steps]` each.
    batch_at: step -> this process's rows. tokens_at: step -> tokens in the rows of all
    processes. schedule: step -> learning rate. cost: FLOPs per token, and the peak
    FLOP/s of all devices or None.

    evaluate: params -> Evaluation, or None where there is nothing to evaluate on;
    evaluates: the names of the metrics that it may give. rank:
    its metrics -> what the best checkpoint has least of, or None. prepare: `(state,
    step) -> Prepared`, before the step. conclude: `(step, metrics) -> more metrics`; it
    raises where these say that the run must not go on. extra: params -> what the train
    state is to keep besides. progress, restore: what a checkpoint keeps as JSON, and
    its way back. saved: told that a checkpoint has begun, the one before complete.
    close: ends what the task has opened. data_key: another where the data is.
    """

    train_step: Callable
    batch_at: Callable[[int], Mapping[str, np.ndarray]]
    tokens_at: Callable[[int], int]
    schedule: Callable[[int], Any]
    cost: tuple[float, float | None]
    evaluate: Callable[[Any], Evaluation] | None = None
    evaluates: tuple[str, ...] = ()
    rank: Callable[[Mapping[str, float]], float | None] = lambda m: m.get("val_loss")
    prepare: Callable[[TrainState, int], Prepared] | None = None
    conclude: Callable[[int, Mapping[str, float]], dict[str, float]] = (
        lambda step, metrics: {}
    )
    extra: Callable[[Any], Any] = lambda params: {}
    progress: Callable[[], dict[str, Any]] = dict
    saved: Callable[[], None] = lambda: None
    restore: Callable[[Mapping[str, Any]], None] = lambda progress: None
    close: Callable[[], None] = lambda: None
    data_key: str = ""


class Loop:
    """Runs a Task from a state to its last step."""

    def __init__(
        self,
        config: LoopConfig,
        task: Task,
        mesh: Mesh,
        checkpoints: RunCheckpoints,
        tracker: Tracker,
        folder: Path,
        info: dict,
        num_tokens: int = 0,
    ):
        """`info` is what a checkpoint keeps beside its arrays.

        num_tokens: trained on so far.
        """
        self._config = config
        self._task = task
        self._mesh = mesh
        self._checkpoints = checkpoints
        self._tracker = tracker
        self._folder = folder
        self._info = info
        self._num_tokens = num_tokens
        self._stop_signal: int | None = None
        self._is_reached = False
        self._has_evaluated = False
        self._is_profiling = False
        self._read_at = time.perf_counter()

    def run(self, state: TrainState) -> TrainState:
        """Returns the state after the last step.

        Raises NonFiniteError, having saved nothing since; Stopped after a SIGINT or
        SIGTERM, having saved the step it reached; Interrupted at a second SIGINT. Where
        an evaluation raises, the steps up to it are saved.
        """
        step = int(state.step)
        pending = None
        # All at once: a rate computed between two dispatches waits for the later one.
        every_step = jnp.arange(self._config.num_steps)
        self._rates = np.asarray(jax.jit(jax.vmap(self._task.schedule))(every_step))
        with self._signals(), self._profiler():
            if self._config.eval_at_start and not step and self._task.evaluate:
                self._check_stop_metric(step, self._evaluate(step, state))
            self._read_at = time.perf_counter()
            while step < self._config.num_steps and not self._is_reached:
                self._profile(step, state)
                count = self._steps_in_dispatch(step)
                prepared = self._prepare(state, step)
                state, metrics = self._task.train_step(
                    prepared.state, self._batches(step, count)
                )
                step += count
                # Read the dispatch before this one while the device runs this one.
                if pending is not None:
                    self._report(*pending)
                pending = (step, count, metrics, prepared)
                # Asked once: a signal may come at any time, and what it saves was read.
                is_milestone = self._is_milestone(step)
                if is_milestone or self._task.prepare:
                    self._report(*pending)
                    pending = None
                if is_milestone:
                    self._milestone(step, state)
            self._checkpoints.wait()
        return state

    def _prepare(self, state: TrainState, step: int) -> Prepared:
        if self._task.prepare is None:
            return Prepared(state, {}, [])
        return self._task.prepare(state, step)

    def _steps_in_dispatch(self, step: int) -> int:
        """Returns the steps up to a multiple of steps_per_dispatch or to the last."""
        size = self._config.steps_per_dispatch
        return min(size - step % size, self._config.num_steps - step)

    def _batches(self, step: int, count: int):
        """Returns the next `count` batches, stacked and sharded."""
        batches = [self._task.batch_at(step + index) for index in range(count)]
        stacked = {name: np.stack([b[name] for b in batches]) for name in batches[0]}
        return shard_batch(self._mesh, stacked, leading=1)

    def _report(
        self,
        step: int,
        count: int,
        metrics: Mapping[str, jax.Array],
        prepared: Prepared,
    ) -> None:
        """Reads a dispatch's metrics, checks them and logs each step."""
        values = jax.device_get(metrics)
        now = time.perf_counter()
        seconds, self._read_at = (now - self._read_at) / count, now
        flops_per_token, peak = self._task.cost
        for index in range(count):
            done = step - count + index + 1
            tokens = self._task.tokens_at(done - 1)
            self._num_tokens += tokens
            row = {name: float(value[index]) for name, value in values.items()}
            row |= prepared.metrics
            _check_finite(done, row, self._checkpoints)
            row["learning_rate"] = float(self._rates[done - 1])
            row["tokens"] = self._num_tokens
            row["step_time"] = seconds
            row["tokens_per_second"] = tokens / seconds
            if peak:
                row["mfu"] = flops_per_token * tokens / seconds / peak
            row |= self._task.conclude(done, row)
            self._tracker.log_step(done, row)
        if prepared.completions:
            self._tracker.log_completions(step, prepared.completions)

    def _is_milestone(self, step: int) -> bool:
        config = self._config
        return (
            self._stop_signal is not None
            or step >= config.num_steps
            or _due(step, config.eval_every)
            or _due(step, config.save_every)
        )

    def _milestone(self, step: int, state: TrainState) -> None:
        """Evaluates and saves where that is due; ends the run on a signal."""
        config = self._config
        last = step >= config.num_steps
        metrics: dict[str, float] = {}
        if self._task.evaluate and (last or _due(step, config.eval_every)):
            try:
                metrics = self._evaluate(step, state)
                self._check_stop_metric(step, metrics)
            except NonFiniteError:
                raise  # the state is worth nothing
            except Exception:
                self._save(step, state, metrics)  # the steps themselves are done
                raise
            self._is_reached = self._reaches(metrics)
        self._save(step, state, metrics)
        if self._stop_signal is not None and not last:
            self._checkpoints.wait()
            name = signal.Signals(self._stop_signal).name
            raise Stopped(
                f"{name}: saved step {step}; go on with resume={self._folder}",
                self._stop_signal,
            )

    def _evaluate(self, step: int, state: TrainState) -> dict[str, float]:
        """Evaluates, logs what was found and returns the metrics."""
        evaluation = self._task.evaluate(state.params)
        _check_finite(step, evaluation.metrics, self._checkpoints)
        self._tracker.log_evaluation(step, evaluation.metrics)
        if evaluation.samples:
            self._tracker.log_samples(step, evaluation.samples)
        return evaluation.metrics

    def _save(self, step: int, state: TrainState, metrics: dict[str, float]) -> None:
        rank = self._task.rank(metrics)
        progress = {
            "num_tokens": self._num_tokens,
            "reached": self._is_reached,
            **self._task.progress(),
        }
        path = self._checkpoints.save(
            step,
            state,
            None if rank is None else {"val_loss": rank},
            {**self._info, "progress": progress},
        )
        self._task.saved()
        self._tracker.log_checkpoint(step, path)
        self._read_at = time.perf_counter()

    def _check_stop_metric(self, step: int, metrics: dict[str, float]) -> None:
        """Raises ValueError where the first evaluation doesn't give `stop_metric`."""
        name = self._config.stop_metric
        if name is None or self._has_evaluated:
            return
        self._has_evaluated = True
        if name not in metrics:
            raise ValueError(
                f"trainer.stop_metric={name} is not among what the evaluation of step "
                f"{step} gave: {', '.join(metrics)}; name one of these, or set "
                "trainer.stop_metric=null and trainer.stop_value=null (val_pass needs "
                "trainer.eval_reward or rewards, and answers in the data)"
            )

    def _reaches(self, metrics: dict[str, float]) -> bool:
        """Returns whether the run may end here, as `stop_metric` says."""
        name, goal = self._config.stop_metric, self._config.stop_value
        if name is None or name not in metrics:  # of no prompt could it be judged now
            return False
        value = metrics[name]
        reached = value <= goal if name.endswith("loss") else value >= goal
        if reached:
            self._tracker.message(f"{name} {value:.4f} has reached {goal}: the end")
        return reached

    @contextmanager
    def _signals(self):
        """Turns SIGINT and SIGTERM into requests; a second SIGINT interrupts.

        A second SIGTERM does not: schedulers repeat theirs.
        """

        def request(number, frame):
            if self._stop_signal is not None and number == signal.SIGINT:
                raise Interrupted(self._checkpoints.latest_step() is not None)
            self._stop_signal = number
            self._tracker.message("stopping after this step (Ctrl-C again: at once)")

        numbers = (signal.SIGINT, signal.SIGTERM)
        before = [signal.signal(number, request) for number in numbers]
        try:
            yield
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)

    def _profile(self, step: int, state: TrainState) -> None:
        """Starts or stops the profiler where `step` enters or leaves its window."""
        start, length = self._config.profile_start, self._config.profile_steps
        inside = start is not None and start <= step < start + length
        if inside and not self._is_profiling:
            jax.profiler.start_trace(self._folder / "profile")
            self._is_profiling = True
        elif self._is_profiling and not inside:
            jax.block_until_ready(state)  # so that the last steps are in it
            self._stop_profile()

    def _stop_profile(self) -> None:
        jax.profiler.stop_trace()
        self._is_profiling = False
        start, where = self._config.profile_start, self._folder / "profile"
        self._tracker.message(f"profile of the steps from {start}: {where}")

    @contextmanager
    def _profiler(self):
        """Writes the profile of a run that ends inside the window."""
        try:
            yield
        finally:
            if self._is_profiling:
                self._stop_profile()


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _check_finite(
    step: int, row: dict[str, float], checkpoints: RunCheckpoints
) -> None:
    bad = [name for name, value in row.items() if not math.isfinite(value)]
    if bad:
        checkpoints.wait()
        latest = checkpoints.latest_step()
        kept = (
            f"the checkpoint of step {latest} is kept" if latest else "none was saved"
        )
        raise NonFiniteError(
            f"step {step}: {', '.join(bad)} not finite; {kept}. Lower "
            "optimizer.learning_rate, or set optimizer.clip_norm"
        )
