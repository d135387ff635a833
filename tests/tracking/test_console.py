"""Progress: a live line in a terminal, log records without one."""

import io
import logging
import re
import sys

import pytest
import rich.console

from relax.tracking.completions import shorten
from relax.tracking.console import Console

STEP = {
    "loss": 1.88625,
    "grad_norm": 0.875,
    "learning_rate": 3e-4,
    "param_norm": 31.0,
    "tokens": 7680.0,
    "tokens_per_second": 12345.0,
    "mfu": 0.4125,
}


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


ROWS = [
    {"prompt": "2+3=", "completion": "5", "exact": 1.0, "finished": True, "count": 2},
    {"prompt": "2+3=", "completion": "7[b]\x1b[31m\n" + "again " * 50, "exact": None},
    *[{"prompt": "4+5=", "completion": "9", "advantage": -0.25, "exact": 0.5}] * 5,
]


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.INFO, logger="relax.tracking.console")
    return lambda: [record.getMessage() for record in caplog.records]


@pytest.fixture
def screen():
    """A colour terminal, 90 wide, that remembers what was sent to it."""
    return rich.console.Console(
        force_terminal=True, file=io.StringIO(), width=90, legacy_windows=False
    )


def plain(screen):
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.file.getvalue())


def test_without_a_terminal_every_call_is_one_log_line(lines):
    clock = Clock()
    with Console(50, clock=clock) as console:
        clock.now += 65
        console.step(10, STEP)
        console.evaluation(10, {"val_loss": 1.5, "val_bits_per_byte": 2.16404})
        console.message("checkpoint saved")
    assert lines() == [
        "step 10/50  loss 1.8862  grad_norm 0.875  lr 3.00e-04  12.3k tok/s  "
        "mfu 41.2%  0:01:05 (0:04:20 left)",
        "step 10  val_loss 1.5000  val_bits_per_byte 2.1640",
        "checkpoint saved",
    ]


def test_unknown_metrics_are_left_out(lines):
    with Console(3, clock=Clock()) as console:
        console.step(1, {"loss": float("nan"), "tokens_per_second": 97.0})
    assert lines() == ["step 1/3  loss nan  97 tok/s  0:00:00 (0:00:00 left)"]


GRPO = {
    "loss": 0.0001,
    "reward": 0.51234,
    "reward_std": 0.25,
    "completions/mean_length": 12.34,
    "kl": 0.012345,
    "entropy": 0.75,
}


def test_the_lines_of_a_policy_and_of_its_evaluation(lines):
    with Console(50, clock=Clock()) as console:
        console.step(10, {**GRPO, "mean_token_accuracy": None})
        console.evaluation(
            10, {"val_pass@1": 0.5125, "val_pass@4": 0.9, "val_loss": 1.5, "val_n": 64}
        )
    assert lines() == [
        "step 10/50  loss 0.0001  reward 0.512  reward_std 0.250  length 12.3  "
        "kl 0.0123  entropy 0.750  0:00:00 (0:00:00 left)",
        "step 10  val_pass@1 51.2%  val_pass@4 90.0%  val_loss 1.5000  val_n 64",
    ]


@pytest.mark.parametrize(
    ("metrics", "shown"),
    [
        (GRPO, "reward 0.512  length 12.3  kl 0.0123"),
        ({**GRPO, "kl": None}, "reward 0.512  length 12.3  entropy 0.750"),
        ({**STEP, "mean_token_accuracy": 0.5}, "loss 1.8862  acc 50.0%  12.3k tok/s"),
    ],
)
def test_the_live_line_fits_in_80_columns(metrics, shown):
    screen = rich.console.Console(force_terminal=True, file=io.StringIO(), width=80)
    with Console(20000, terminal=screen, clock=Clock()) as console:
        console.step(12345, metrics)
    last = plain(screen).rstrip().rsplit("\r", 1)[-1]
    assert f" {shown} 0:00:00 " in last and "━" in last and len(last) <= 80


def test_time_left_leaves_the_compilation_out(lines):
    clock = Clock()
    console = Console(100, clock=clock)
    for step, seconds in ((10, 60), (20, 5), (30, 5)):
        clock.now += seconds
        console.step(step, {})
    left = [re.search(r"\((.*) left\)", line)[1] for line in lines()]
    assert left == ["0:09:00", "0:00:40", "0:00:35"]


def test_time_left_of_a_resumed_run_counts_the_steps_since(lines):
    clock = Clock()
    console = Console(1000, start_step=900, clock=clock)
    clock.now += 7
    console.step(910, {"loss": 2.0})
    assert lines() == ["step 910/1000  loss 2.0000  0:00:07 (0:01:03 left)"]


def test_samples_are_one_record_indented(lines):
    with Console(5) as console:
        console.samples(2, ["Once\nupon", "a time"])
    assert lines() == ["step 2  samples\n\n    Once\n    upon\n\n    a time"]


def test_completions_are_one_record_a_line_each(lines):
    with Console(5) as console:
        console.completions(2, ROWS)
    [record] = lines()
    header, *rows = record.splitlines()
    assert header == "step 2  completions (the first 4 of 7)"
    assert rows[0] == "    2+3= → 5  exact 1.000  count 2  advantage –"
    assert rows[1].startswith(r"    2+3= → 7[b]\x1b[31m\nagain again")
    assert "again ag…gain again" in rows[1]
    assert rows[1].endswith("  exact –  count –  advantage –")
    assert rows[2:] == ["    4+5= → 9  exact 0.500  count –  advantage -0.250"] * 2


def test_completions_are_a_table_in_a_terminal(screen):
    with Console(5, terminal=screen) as console:
        console.completions(2, ROWS[:3])
    shown = [re.split(r"\s*[│┃]\s*", line) for line in plain(screen).splitlines()]
    cells = [row[1:-1] for row in shown if len(row) > 3]
    assert "step 2  completions" in plain(screen)
    assert cells[0] == ["prompt", "completion", "exact", "count", "advantage"]
    assert cells[1] == ["2+3=", "5", "1.000", "2", "–"]
    assert cells[2] == ["2+3=", r"7[b]\x1b[31m", "–", "–", "–"]
    assert cells[-1] == ["4+5=", "9", "0.500", "–", "-0.250"]
    assert max(map(len, plain(screen).splitlines())) <= 90


def test_a_long_text_lacks_its_middle():
    short = [shorten("0123456789", limit) for limit in (10, 9, 4, 3)]
    assert short == ["0123456789", "012345…89", "01…9", "01…"]


def test_quiet_shows_nothing(lines, screen):
    with Console(5, quiet=True, terminal=screen) as console:
        console.step(1, STEP)
        console.evaluation(1, {"val_loss": 1.5})
        console.samples(1, ["Once"])
        console.completions(1, ROWS)
        console.message("saved")
    assert lines() == [] and screen.file.getvalue() == ""


def test_a_terminal_shows_the_latest_step_live(lines, screen):
    clock = Clock()
    with Console(2000, start_step=1000, terminal=screen, clock=clock) as console:
        clock.now += 10
        console.step(1200, STEP)
    last = plain(screen).rstrip().rsplit("\r", 1)[-1]
    assert "1200/2000" in last and "━" in last
    assert "loss 1.8862  12.3k tok/s  mfu 41.2%" in last
    assert "0:00:40 left" in last
    assert lines() == []


def test_a_terminal_keeps_evaluations_messages_and_samples(screen):
    with Console(20, terminal=screen) as console:
        console.evaluation(10, {"val_loss": 1.5})
        console.message("saved [bold]here")
        console.samples(10, ["[INST] two\nlines [/INST]"])
    shown = plain(screen)
    assert "step 10  val_loss 1.5000" in shown
    assert "saved [bold]here" in shown
    assert "    [INST] two" in shown and "    lines [/INST]" in shown
    assert "\x1b[2m[INST] two" in screen.file.getvalue()


def test_a_sample_cannot_send_escape_sequences(screen):
    with Console(5, terminal=screen) as console:
        console.samples(1, ["red\x1b[31m bell\x07 back\r"])
    assert r"red\x1b[31m bell\x07 back\r" in plain(screen)


def test_the_terminal_is_restored_after_an_exception(screen):
    with pytest.raises(KeyboardInterrupt), Console(5, terminal=screen) as console:
        console.step(1, STEP)
        raise KeyboardInterrupt
    shown = screen.file.getvalue()
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_log_lines_of_others_appear_above_the_live_line(monkeypatch):
    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    handler = logging.StreamHandler(terminal)
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        with Console(5) as console:
            console.step(1, STEP)
            assert handler.stream is not terminal
            logging.getLogger("another").warning("disk is nearly full")
        assert handler.stream is terminal is sys.stdout
    finally:
        root.removeHandler(handler)
    # The line is erased before the record and drawn again after it.
    assert re.search(
        r"\x1b\[2Kdisk is nearly full *\n.*1/5", terminal.getvalue(), re.DOTALL
    )


@pytest.mark.parametrize(
    ("piped", "name"), [("stdout", "piped_out"), ("stderr", "piped_err")]
)
def test_what_is_piped_into_a_file_stays_there(monkeypatch, piped, name):
    terminal, file = Terminal(), io.StringIO()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(sys, piped, file)
    with Console(5) as console:
        console.step(1, STEP)
        getattr(sys, piped).write(f"{name}\n")
    assert file.getvalue() == f"{name}\n"
    assert "1/5" in terminal.getvalue() and name not in terminal.getvalue()


def test_a_dumb_terminal_gets_log_lines(monkeypatch, lines):
    terminal = Terminal()
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(sys, "stderr", terminal)
    with Console(5) as console:
        console.message("saved")
    assert lines() == ["saved"] and terminal.getvalue() == ""
