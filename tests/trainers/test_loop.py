"""The order of dispatches, readings and checkpoints; signals; what is not finite."""

import math
import os
import signal
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from relax.cli import exit_on_error
from relax.sharding import MeshConfig, make_mesh
from relax.trainers.loop import (
    Evaluation,
    Interrupted,
    Loop,
    NonFiniteError,
    Stopped,
    Task,
)

VAL = {"val_loss": 2.5}


class Metric:
    """A metric of one dispatch that notes when the host asks for its values."""

    def __init__(self, events, last, values):
        self.events, self.last, self.values = events, last, values

    def __array__(self, *_):
        self.events.append(f"read {self.last}")
        return np.array(self.values, np.float32)


class Run:
    """A loop over fakes that note, in `events`, what they are asked to do.

    The loss of step n is `losses.get(n, n / 10)`; `on_dispatch` is called within each
    dispatch, with the step that it reaches.
    """

    def __init__(self, folder, config, losses=None, val_loss=2.5, start=0, cost=()):
        self.events, self.rows, self.saved, self.messages = [], [], {}, []
        self.losses, self.val_loss, self.config = losses or {}, val_loss, config
        self.start = start
        self.on_dispatch = self.on_wait = self.on_evaluate = lambda *_: None
        self.state = SimpleNamespace(step=start, params=None)
        task = Task(
            train_step=self.train_step,
            batch_at=lambda step: {"tokens": np.array([step])},
            tokens_at=lambda step: config.batch_size * config.context,
            evaluate=self.evaluate if val_loss else None,
            schedule=self.schedule,
            cost=cost or (6.0, None),
        )
        mesh = make_mesh(MeshConfig(data=1, fsdp=1, tensor=1))
        self.loop = Loop(config, task, mesh, self, self, folder, {"model": "tiny"})

    def go(self):
        return self.loop.run(self.state)

    # The task.
    def schedule(self, step):
        self.events.append("schedule")
        return 100.0 * step

    def train_step(self, state, batches):
        steps = np.asarray(batches["tokens"])[:, 0] + 1
        assert steps[0] == state.step + 1
        last = int(steps[-1])
        self.events.append(f"dispatch {last}")
        self.on_dispatch(last)
        losses = [self.losses.get(int(step), step / 10) for step in steps]
        metrics = {"loss": Metric(self.events, last, losses)}
        return SimpleNamespace(step=last, params=last), metrics

    def evaluate(self, params):
        self.events.append(f"evaluate {params}")
        self.on_evaluate()
        return Evaluation({"val_loss": self.val_loss}, [{"prompt": ""}])

    # The checkpoints.
    def save(self, step, state, metrics, info):
        made = step - self.start
        tokens = made * self.config.batch_size * self.config.context
        progress = {"num_tokens": tokens, "reached": False}
        assert (state.step, info) == (step, {"model": "tiny", "progress": progress})
        self.events.append(f"save {step}")
        self.saved[step] = metrics
        return f"checkpoints/{step}"

    def wait(self):
        self.events.append("wait")
        self.on_wait()

    def latest_step(self):
        return max(self.saved, default=None)

    # The tracker.
    def log_step(self, step, metrics):
        self.rows.append((step, metrics))

    def log_evaluation(self, step, metrics):
        self.rows.append((step, metrics))

    def log_samples(self, step, samples):
        self.events.append("samples")

    def log_checkpoint(self, step, path):
        assert path == f"checkpoints/{step}"

    def message(self, text):
        self.messages.append(text)

    def steps(self, kind):
        """Returns the steps of the events `kind <step>`, in order."""
        events = (event.split() for event in self.events)
        return [int(event[1]) for event in events if event[0] == kind]


def test_metrics_are_read_one_dispatch_late(tmp_path, make_trainer):
    config = make_trainer(num_steps=7, steps_per_dispatch=2)
    run = Run(tmp_path, config, val_loss=None)
    state = run.go()
    assert state.step == 7
    assert run.events == [
        "schedule",
        "dispatch 2",
        "dispatch 4",
        "read 2",
        "dispatch 6",
        "read 4",
        "dispatch 7",
        "read 6",
        "read 7",
        "save 7",
        "wait",
    ]


def test_a_checkpoint_follows_all_metrics_up_to_its_step(tmp_path, make_trainer):
    config = make_trainer(num_steps=7, eval_every=5, save_every=4)
    run = Run(tmp_path, config)
    run.go()
    assert run.events == [
        *("schedule", "dispatch 1", "dispatch 2", "read 1", "dispatch 3", "read 2"),
        *("dispatch 4", "read 3", "read 4", "save 4", "dispatch 5", "read 5"),
        *("evaluate 5", "samples", "save 5"),
        *("dispatch 6", "dispatch 7", "read 6", "read 7"),
        *("evaluate 7", "samples", "save 7", "wait"),
    ]
    assert run.saved == {4: None, 5: {"val_loss": 2.5}, 7: {"val_loss": 2.5}}


def test_rows_hold_the_rate_of_their_step_and_the_tokens_so_far(tmp_path, make_trainer):
    config = make_trainer(num_steps=3, steps_per_dispatch=2)
    run = Run(tmp_path, config, val_loss=None, cost=(7.0, 1000.0))
    run.go()
    assert [step for step, _ in run.rows] == [1, 2, 3]
    assert [row["loss"] for _, row in run.rows] == pytest.approx([0.1, 0.2, 0.3])
    assert [row["learning_rate"] for _, row in run.rows] == [0.0, 100.0, 200.0]
    assert [row["tokens"] for _, row in run.rows] == [15, 30, 45]
    for _, row in run.rows:
        assert row["tokens_per_second"] == pytest.approx(15 / row["step_time"])
        assert row["mfu"] == pytest.approx(7 / 1000 * row["tokens_per_second"])


def test_without_a_peak_no_mfu_is_claimed(tmp_path, make_trainer):
    run = Run(tmp_path, make_trainer(num_steps=1))
    run.go()
    assert "mfu" not in run.rows[0][1]


def test_dispatches_keep_to_multiples_wherever_the_run_starts(tmp_path, make_trainer):
    """A run that ended at step 3 and is extended still meets its evaluations."""
    config = make_trainer(num_steps=14, steps_per_dispatch=4, eval_every=4)
    run = Run(tmp_path, config, start=3)
    run.go()
    assert run.steps("dispatch") == [4, 8, 12, 14]
    assert run.steps("evaluate") == run.steps("save") == [4, 8, 12, 14]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_ends_the_run_without_a_checkpoint(
    tmp_path, make_trainer, bad
):
    config = make_trainer(num_steps=12, steps_per_dispatch=2, save_every=4)
    run = Run(tmp_path, config, losses={7: bad})
    with pytest.raises(NonFiniteError) as raised:
        run.go()
    assert str(raised.value).startswith(
        "step 7: loss not finite; the checkpoint of step 4 is kept. Lower "
        "optimizer.learning_rate"
    )
    assert list(run.saved) == [4]
    assert [step for step, _ in run.rows] == [1, 2, 3, 4, 5, 6]
    assert run.events[-1] == "wait"


def test_a_bad_first_step_says_that_nothing_was_saved(tmp_path, make_trainer):
    run = Run(tmp_path, make_trainer(), losses={1: math.nan})
    with pytest.raises(NonFiniteError, match="step 1: loss not finite; none was saved"):
        run.go()
    assert run.saved == {}
    assert run.rows == []


def test_a_validation_loss_that_is_not_finite_is_not_saved(tmp_path, make_trainer):
    run = Run(tmp_path, make_trainer(save_every=2, eval_every=4), val_loss=math.inf)
    with pytest.raises(NonFiniteError, match=r"step 4: val_loss .* step 2 is kept"):
        run.go()
    assert list(run.saved) == [2]


def test_a_signal_finds_no_way_around_the_check(tmp_path, make_trainer):
    run = Run(tmp_path, make_trainer(), losses={2: math.nan})
    run.on_dispatch = lambda step: step == 2 and send(signal.SIGTERM)
    with pytest.raises(NonFiniteError):
        run.go()
    assert run.saved == {}


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)]
)
def test_a_signal_saves_the_step_reached(tmp_path, make_trainer, number, code):
    handlers = (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
    config = make_trainer(num_steps=12, steps_per_dispatch=2, eval_every=10)
    run = Run(tmp_path, config)
    run.on_dispatch = lambda step: step == 4 and send(number)
    with pytest.raises(Stopped) as raised:
        run.go()
    assert raised.value.exit_code == code
    assert str(raised.value) == (
        f"{signal.Signals(number).name}: saved step 4; go on with resume={tmp_path}"
    )
    assert run.events[-5:] == ["dispatch 4", "read 2", "read 4", "save 4", "wait"]
    assert run.messages == ["stopping after this step (Ctrl-C again: at once)"]
    assert handlers == (
        signal.getsignal(signal.SIGINT),
        signal.getsignal(signal.SIGTERM),
    )


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("save_every", [0, 3])
def test_a_second_interrupt_stops_at_once(tmp_path, make_trainer, first, save_every):
    run = Run(tmp_path, make_trainer(save_every=save_every))

    def twice(step):
        if step == 4:
            send(first)
            send(signal.SIGINT)
            pytest.fail("the second SIGINT did nothing")

    run.on_dispatch = twice
    with pytest.raises(Interrupted) as raised:
        run.go()
    assert list(run.saved) == [3] * bool(save_every)
    assert raised.value.has_checkpoint == bool(save_every)


def test_a_repeated_term_is_still_one_request(tmp_path, make_trainer):
    """Schedulers repeat SIGTERM until the job is gone."""
    run = Run(tmp_path, make_trainer())
    run.on_dispatch = lambda step: step >= 4 and send(signal.SIGTERM)
    run.on_wait = lambda: send(signal.SIGTERM)
    with pytest.raises(Stopped):
        run.go()
    assert list(run.saved) == [4]


@pytest.mark.parametrize(
    ("has_checkpoint", "line"),
    [(True, "interrupted; all is kept"), (False, "interrupted")],
)
def test_only_checkpoints_that_are_there_are_spoken_of(caplog, has_checkpoint, line):
    def interrupted():
        raise Interrupted(has_checkpoint)

    with pytest.raises(SystemExit) as raised:
        exit_on_error(interrupted, "all is kept")
    assert (raised.value.code, caplog.messages) == (130, [line])


def test_an_error_that_quotes_half_a_character_can_be_written(caplog):
    def failing():
        raise ValueError("bad \ud83d")

    with pytest.raises(SystemExit):
        exit_on_error(failing)
    assert caplog.messages == ["bad \\ud83d"]


@pytest.mark.parametrize("last", [4, 6])
def test_an_evaluation_that_fails_loses_no_step(tmp_path, make_trainer, last):
    run = Run(tmp_path, make_trainer(save_every=3, eval_every=4))

    def fail():
        if run.steps("evaluate")[-1] == last:
            raise RuntimeError("out of memory")

    run.on_evaluate = fail
    with pytest.raises(RuntimeError, match="out of memory"):
        run.go()
    assert run.saved == {4: {3: None, 4: None}, 6: {3: None, 4: VAL, 6: None}}[last]


def test_an_evaluation_that_cannot_be_logged_loses_no_step(tmp_path, make_trainer):
    run = Run(tmp_path, make_trainer(eval_every=4))

    def fail(step, samples):
        raise OSError("disk full")

    run.log_samples = fail
    with pytest.raises(OSError, match="disk full"):
        run.go()
    assert list(run.saved) == [4]


STOPPING = {"eval_every": 2, "stop_metric": "val_pass@1", "stop_value": 0.5}


def test_a_metric_to_stop_at_that_never_comes_is_told_of_at_once(
    tmp_path, make_trainer
):
    run = Run(tmp_path, make_trainer(**STOPPING))
    with pytest.raises(ValueError) as raised:
        run.go()
    assert str(raised.value).startswith(
        "trainer.stop_metric=val_pass@1 is not among what the evaluation of step 2 "
        "gave: val_loss; name one of these, or set trainer.stop_metric=null"
    )
    assert run.saved == {2: VAL}
    run = Run(tmp_path, make_trainer(**STOPPING, eval_at_start=True))
    with pytest.raises(ValueError, match="what the evaluation of step 0 gave"):
        run.go()
    assert run.steps("dispatch") == []


def test_a_signal_during_an_evaluation_keeps_it(tmp_path, make_trainer):
    run = Run(tmp_path, make_trainer(eval_every=4))
    run.on_evaluate = lambda: send(signal.SIGTERM)
    with pytest.raises(Stopped, match="saved step 4"):
        run.go()
    assert run.saved == {4: {"val_loss": 2.5}}


def test_a_signal_at_the_last_step_lets_the_run_end(tmp_path, make_trainer):
    run = Run(tmp_path, make_trainer())
    run.on_dispatch = lambda step: step == 6 and send(signal.SIGINT)
    assert run.go().step == 6
    assert list(run.saved) == [6]


def test_a_signal_while_the_last_checkpoint_is_written_lets_it_end(
    tmp_path, make_trainer
):
    run = Run(tmp_path, make_trainer())
    run.on_wait = lambda: send(signal.SIGINT)
    assert run.go().step == 6
    assert run.messages == ["stopping after this step (Ctrl-C again: at once)"]


@pytest.fixture
def profiler(monkeypatch):
    """The calls of the profiler, as (name, folder) pairs."""
    calls = []
    for name in ("start", "stop"):

        def note(folder=None, name=name):
            calls.append((name, folder))

        monkeypatch.setattr(jax.profiler, f"{name}_trace", note)
    return calls


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        pytest.param(0, {"start": 4, "stop": 8}, id="whole"),
        pytest.param(6, {"start": 6, "stop": 8}, id="resumed inside"),
        pytest.param(8, {}, id="resumed after"),
    ],
)
def test_the_profile_covers_the_dispatches_of_its_window(
    tmp_path, make_trainer, profiler, start, expected
):
    config = make_trainer(
        num_steps=12, steps_per_dispatch=2, profile_start=4, profile_steps=3
    )
    run = Run(tmp_path, config, start=start)
    seen = {}
    run.on_dispatch = lambda step: [
        seen.setdefault(name, step - 2) for name, _ in profiler
    ]
    run.go()
    assert seen == expected
    assert profiler == ([("start", tmp_path / "profile"), ("stop", None)] * bool(seen))


@pytest.mark.parametrize("ending", ["last step", "signal", "not finite"])
def test_a_run_that_ends_in_the_window_writes_its_profile(
    tmp_path, make_trainer, profiler, ending
):
    config = make_trainer(profile_start=2, profile_steps=99)
    losses = {4: math.nan} if ending == "not finite" else {}
    run = Run(tmp_path, config, losses=losses)
    if ending == "signal":
        run.on_dispatch = lambda step: step == 4 and send(signal.SIGTERM)
    try:
        run.go()
    except (Stopped, NonFiniteError):
        assert ending != "last step"
    assert profiler == [("start", tmp_path / "profile"), ("stop", None)]
    assert run.messages[-1] == f"profile of the steps from 2: {tmp_path / 'profile'}"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_steps": 0}, "trainer.num_steps=0 must be at least 1"),
        ({"steps_per_dispatch": 0}, "trainer.steps_per_dispatch=0 must be at least 1"),
        ({"eval_every": -1}, "trainer.eval_every=-1 must be at least 0"),
        ({"profile_start": -2}, "trainer.profile_start=-2 must be at least 0"),
        (
            {"z_loss": math.inf},
            "trainer.z_loss=inf must be finite; give a number of at least 0",
        ),
        ({"z_loss": math.nan}, "trainer.z_loss=nan must be at least 0"),
        (
            {**STOPPING, "stop_value": math.nan},
            "trainer.stop_value=nan must be finite, or null with "
            "trainer.stop_metric=null",
        ),
        ({"kind": "pretrian"}, "trainer.kind='pretrian' is not pretrain"),
        (
            {"batch_size": 7, "accumulation": 2},
            "trainer.batch_size=7 must be a multiple of trainer.accumulation=2",
        ),
        *(
            (
                {"steps_per_dispatch": 3, name: 7},
                f"trainer.{name}=7 must be a multiple of trainer.steps_per_dispatch=3",
            )
            for name in ("eval_every", "save_every", "profile_start")
        ),
    ],
)
def test_a_config_that_cannot_work_is_refused(make_trainer, fields, message):
    with pytest.raises(ValueError) as raised:
        make_trainer(**fields)
    assert str(raised.value) == message
