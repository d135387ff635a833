"""One call reaches every place; a run that is killed or resumed leaves whole files."""

import logging
import subprocess
import sys

import pytest

from relax.tracking import tracker as tracker_module
from relax.tracking.config import LoggerConfig
from relax.tracking.metrics_file import read_metrics
from relax.tracking.tracker import Tracker

NONE = LoggerConfig(
    kind="none", project=None, entity=None, group=None, tags=None, mode=None
)
WANDB = LoggerConfig(
    kind="wandb", project="relax", entity=None, group=None, tags=None, mode=None
)


class FakeWandbLogger:
    """Notes every call; the last one made is `made`."""

    made = None

    def __init__(self, *arguments):
        self.arguments, self.calls = arguments, []
        FakeWandbLogger.made = self

    def __getattr__(self, name):
        return lambda *args, **kwargs: self.calls.append((name, *args, *kwargs.items()))


@pytest.fixture
def wandb_logger(monkeypatch):
    monkeypatch.setattr(tracker_module, "WandbLogger", FakeWandbLogger)
    return lambda: FakeWandbLogger.made


def make_tracker(folder, logger=NONE, start_step=0):
    return Tracker(folder, {"seed": 3}, logger, "tiny", 20, start_step)


def test_rows_of_a_run(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="relax.tracking.console")
    samples = [{"prompt": "Once", "completion": " upon", "reward": 0.5}]
    with make_tracker(tmp_path / "runs" / "tiny") as tracker:
        tracker.log_step(5, {"loss": 3.5, "tokens": 640})
        tracker.log_evaluation(5, {"val_loss": 3.25})
        tracker.log_samples(5, samples)
        tracker.log_checkpoint(5, tmp_path / "5")
        tracker.message("done")
    folder = tmp_path / "runs" / "tiny"
    assert read_metrics(folder / "metrics.jsonl") == [
        {"step": 5, "kind": "train", "loss": 3.5, "tokens": 640},
        {"step": 5, "kind": "eval", "val_loss": 3.25},
    ]
    assert read_metrics(folder / "samples.jsonl") == [{"step": 5, **samples[0]}]
    assert (folder / "loss.png").stat().st_size > 0
    shown = "\n".join(caplog.messages)
    for text in ("loss 3.5000", "val_loss 3.2500", "Once upon", "checkpoint", "done"):
        assert text in shown


def test_half_a_character_reaches_the_files_and_the_log(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="relax.tracking.console")
    row = {"prompt": "a\ud83d", "completion": "\udc00b", "ends": 1.0}
    with make_tracker(tmp_path) as tracker:
        tracker.log_samples(5, [row])
        tracker.log_completions(5, [row])
    for name in ("samples", "completions"):
        assert read_metrics(tmp_path / f"{name}.jsonl") == [{"step": 5, **row}]
    assert len(caplog.messages) == 2
    assert all(message.encode() for message in caplog.messages)


def test_a_resumed_run_continues_both_files(tmp_path):
    with make_tracker(tmp_path) as tracker:
        for step in (5, 7, 11):
            tracker.log_step(step, {"loss": 3.0})
            tracker.log_samples(step, [{"prompt": "a", "completion": str(step)}])
    with make_tracker(tmp_path, start_step=7) as tracker:
        tracker.log_step(8, {"loss": 2.0})
        tracker.log_samples(8, [{"prompt": "a", "completion": "8"}])
    for file in ("metrics.jsonl", "samples.jsonl"):
        assert [row["step"] for row in read_metrics(tmp_path / file)] == [5, 7, 8]


def test_an_exception_leaves_closed_files_and_a_picture(tmp_path, wandb_logger):
    with (
        pytest.raises(RuntimeError, match="out of memory"),
        make_tracker(tmp_path, WANDB) as tracker,
    ):
        tracker.log_step(5, {"loss": 3.5})
        raise RuntimeError("out of memory")
    assert (tmp_path / "loss.png").exists()
    with pytest.raises(ValueError, match="closed file"):
        tracker.log_step(6, {"loss": 3.5})
    assert wandb_logger().calls[-1] == ("finish", ("failed", True))


def test_files_are_closed_when_the_picture_fails(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(tracker_module, "plot_losses", fail)
    tracker = make_tracker(tmp_path)
    with pytest.raises(OSError, match="no space left"):
        tracker.finish()
    with pytest.raises(ValueError, match="closed file"):
        tracker.log_step(6, {"loss": 3.5})


def test_finishing_twice_is_finishing_once(tmp_path, wandb_logger):
    tracker = make_tracker(tmp_path, WANDB)
    tracker.finish()
    tracker.finish()
    assert wandb_logger().calls == [("finish", ("failed", False))]
    assert not (tmp_path / "loss.png").exists()  # there was no loss to draw


def test_wandb_gets_what_the_files_get(tmp_path, wandb_logger):
    samples = [{"prompt": "Once", "completion": " upon"}]
    with make_tracker(tmp_path, WANDB) as tracker:
        tracker.log_step(5, {"loss": 3.5})
        tracker.log_evaluation(5, {"val_loss": 3.25})
        tracker.log_samples(5, samples)
        tracker.log_checkpoint(5, tmp_path / "5")
    assert wandb_logger().arguments == (WANDB, {"seed": 3}, tmp_path, "tiny", None)
    assert wandb_logger().calls == [
        ("log_metrics", 5, {"loss": 3.5}),
        ("log_metrics", 5, {"val_loss": 3.25}),
        ("log_table", 5, "samples", samples),
        ("log_checkpoint", 5, tmp_path / "5"),
        ("finish", ("failed", False)),
    ]


COMPLETIONS = [
    {
        "prompt": "2+3=",
        "completion": "5",
        "exact": 1.0,
        "advantage": 0.5,
        "tokens": [5],
    },
    {"prompt": "2+3=", "completion": "7", "exact": None, "advantage": float("nan")},
]


def test_completions_reach_file_wandb_and_log(tmp_path, wandb_logger, caplog):
    caplog.set_level(logging.INFO, logger="relax.tracking.console")
    with make_tracker(tmp_path, WANDB) as tracker:
        tracker.log_completions(5, COMPLETIONS)
        tracker.log_completions(7, COMPLETIONS[:1], show=False)
        tracker.log_step(7, {"reward": 0.5})
    stepped = [{"step": 5, **row} for row in COMPLETIONS]
    assert wandb_logger().calls[0] == ("log_table", 5, "completions", stepped)
    assert read_metrics(tmp_path / "completions.jsonl") == [
        stepped[0],
        {**stepped[1], "advantage": None},
        {"step": 7, **COMPLETIONS[0]},
    ]
    assert "2+3= → 5  exact 1.000  advantage 0.500" in caplog.messages[0]
    assert len(wandb_logger().calls) == len(caplog.messages) + 1 == 3  # and finish
    assert {path.name for path in tmp_path.iterdir()} == {
        *("metrics.jsonl", "samples.jsonl", "completions.jsonl", "rewards.png")
    }


@pytest.mark.parametrize(("start", "kept"), [(7, [5, 7]), (0, [])])
def test_completions_are_cut_back_where_no_more_come(tmp_path, start, kept):
    path = tmp_path / "completions.jsonl"
    make_tracker(tmp_path).finish()
    assert not path.exists()
    with make_tracker(tmp_path) as tracker:
        for step in (5, 7, 11):
            tracker.log_completions(step, COMPLETIONS[:1])
    make_tracker(tmp_path, start_step=start).finish()
    assert path.exists() == bool(kept)
    with make_tracker(tmp_path, start_step=start) as tracker:
        tracker.log_completions(8, COMPLETIONS[:1])
    assert [row["step"] for row in read_metrics(path)] == [*kept, 8]


@pytest.mark.parametrize(("start_step", "resume_id"), [(0, None), (5, "abc123")])
def test_only_a_resumed_run_continues_the_wandb_run(
    tmp_path, wandb_logger, start_step, resume_id
):
    (tmp_path / "wandb_id.txt").write_text("abc123\n")
    make_tracker(tmp_path, WANDB, start_step).finish()
    assert wandb_logger().arguments[-1] == resume_id


def test_importing_the_tracker_loads_neither_wandb_nor_matplotlib():
    code = "import sys, relax.tracking.tracker; print(*sys.modules)"
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    loaded = set(process.stdout.split())
    assert "rich" in loaded and not loaded & {"wandb", "matplotlib"}
