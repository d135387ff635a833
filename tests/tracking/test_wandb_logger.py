"""wandb runs: a stand-in module for what is logged, the real one for being offline."""

import json
import logging
import os
import pty
import subprocess
import sys
import types
from pathlib import Path

import pytest

from relax.tracking.config import LoggerConfig
from relax.tracking.wandb_logger import WandbLogger, stored_run_id

CONFIG = {
    "kind": "wandb",
    "project": "relax",
    "entity": None,
    "group": "ablation",
    "tags": "first, second",
    "mode": None,
}


class FakeRun:
    id = "abc123"
    url = "https://wandb.example/abc123"

    def __init__(self):
        self.rows, self.axes, self.summary = [], [], {}
        self.log = self.rows.append
        self.exit_code = None
        self.trouble = None

    def define_metric(self, name, step_metric=None):
        self.axes.append((name, step_metric))

    def finish(self, exit_code):
        if self.trouble:
            raise self.trouble
        self.exit_code = exit_code


class FakeWandb(types.ModuleType):
    """Notes what it is asked, as wandb 0.31 would be asked it."""

    class Error(Exception):
        pass

    def __init__(self, has_key, online_error=None):
        super().__init__("wandb")
        self.has_key, self.online_error = has_key, online_error
        self.run, self.inits, self.logins = FakeRun(), [], []

    def Settings(self, **settings):
        return settings

    def setup(self, settings):
        pass

    def teardown(self):
        pass

    def login(self, **options):
        self.logins.append(options)
        return self.has_key

    def init(self, **options):
        self.inits.append(options)
        if options["mode"] == "online" and self.online_error:
            raise self.online_error
        return self.run

    def Table(self, columns, data):
        return (columns, data)


@pytest.fixture
def started(monkeypatch, tmp_path):
    """Returns a started logger and the stand-in below it."""
    monkeypatch.delenv("WANDB_MODE", raising=False)

    def start(*, has_key=False, online_error=None, mode=None, resume_id=None):
        wandb = FakeWandb(has_key, online_error)
        monkeypatch.setitem(sys.modules, "wandb", wandb)
        config = LoggerConfig(**{**CONFIG, "mode": mode})
        run_config = {"model": {"num_layers": 3}}
        return WandbLogger(config, run_config, tmp_path, "tiny", resume_id), wandb

    return start


def modes(wandb):
    return [options["mode"] for options in wandb.inits]


def test_the_run_is_described_and_its_id_kept(started, tmp_path):
    _, wandb = started(has_key=True, resume_id="abc123")
    (options,) = wandb.inits
    assert options.pop("settings")["silent"]
    assert options == {
        "mode": "online",
        "project": "relax",
        "entity": None,
        "group": "ablation",
        "tags": ["first", "second"],
        "name": "tiny",
        "config": {"model": {"num_layers": 3}},
        "dir": str(tmp_path),
        "id": "abc123",
        "resume": "allow",
    }
    assert stored_run_id(tmp_path) == "abc123"


def test_a_folder_without_a_run_has_no_id(tmp_path):
    assert stored_run_id(tmp_path) is None


def test_without_a_key_the_run_is_offline_and_nobody_is_asked(started, caplog):
    _, wandb = started(has_key=False)
    assert modes(wandb) == ["offline"]
    assert wandb.logins == [{"prompt": False, "verify": False}]
    assert "no API key" in caplog.text


def test_a_failure_online_is_one_line_of_warning_and_an_offline_run(started, caplog):
    _, wandb = started(has_key=True, online_error=FakeWandb.Error("timed\nout"))
    assert modes(wandb) == ["online", "offline"]
    assert [record.getMessage() for record in caplog.records] == [
        "wandb stays offline: timed out"
    ]
    assert caplog.records[0].levelno == logging.WARNING


@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_a_given_mode_is_taken(started, mode):
    _, wandb = started(has_key=True, mode=mode)
    assert modes(wandb) == [mode] and wandb.logins == []


def test_the_environment_decides_where_the_config_does_not(started, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert modes(started(has_key=True)[1]) == ["disabled"]
    assert modes(started(has_key=True, mode="online")[1]) == ["online"]


def test_half_a_character_is_spelled_out_in_a_table(started):
    logger, wandb = started()
    logger.log_table(5, "samples", [{"prompt": "é\ud83d", "reward": 0.5}])
    table = (["prompt", "reward"], [["é\\ud83d", 0.5]])
    assert wandb.run.rows == [{"step": 5, "samples": table}]


def test_metrics_samples_and_checkpoints_are_logged_over_the_metric_step(started):
    logger, wandb = started()
    logger.log_metrics(7, {"loss": 3.25})
    logger.log_metrics(5, {"val_loss": 3.5})
    logger.log_table(
        5,
        "samples",
        [
            {"prompt": "a", "completion": "b"},
            {"prompt": "c", "completion": "d", "reward": 0.5},
        ],
    )
    logger.log_checkpoint(5, Path("runs/tiny/checkpoints/5"))
    assert wandb.run.axes == [("step", None), ("*", "step")]
    table = (["prompt", "completion", "reward"], [["a", "b", None], ["c", "d", 0.5]])
    assert wandb.run.rows == [
        {"step": 7, "loss": 3.25},
        {"step": 5, "val_loss": 3.5},
        {"step": 5, "samples": table},
    ]
    assert wandb.run.summary == {
        "checkpoint": "runs/tiny/checkpoints/5",
        "checkpoint_step": 5,
    }


@pytest.mark.parametrize(("failed", "exit_code"), [(False, 0), (True, 1)])
def test_finish_says_how_the_run_ended(started, failed, exit_code):
    logger, wandb = started()
    logger.finish(failed=failed)
    assert wandb.run.exit_code == exit_code


@pytest.mark.parametrize("error", [TimeoutError("60 s"), FakeWandb.Error("gone")])
def test_trouble_at_the_finish_is_a_warning(started, caplog, error):
    logger, wandb = started()
    wandb.run.trouble = error
    logger.finish()
    assert f"wandb did not finish: {error}" in caplog.text


SCRIPT = """
import logging
import sys
from pathlib import Path
from relax.tracking import wandb_logger
from relax.tracking.config import LoggerConfig

logging.basicConfig(stream=sys.stdout, level="INFO", format="%(levelname)s %(message)s")
wandb_logger._INIT_TIMEOUT = 2
config = LoggerConfig(
    kind="wandb", project="relax", entity=None, group=None, tags="tiny", mode=None
)
for resume_id in (None, "stored"):
    folder = Path.cwd()
    resume_id = resume_id and wandb_logger.stored_run_id(folder)
    logger = wandb_logger.WandbLogger(config, {"seed": 3}, folder, "tiny", resume_id)
    logger.log_metrics(7, {"loss": 3.28125})
    logger.log_table(7, "samples", [{"prompt": "Once", "completion": " upon a time"}])
    rows = [{"step": 7, "exact": None, "done": True}, {"step": 7, "exact": 0.5}]
    logger.log_table(7, "completions", rows)
    logger.log_checkpoint(7, folder / "checkpoints" / "7")
    logger.finish()
"""


def run_script(folder, stdin=subprocess.DEVNULL, stderr=subprocess.STDOUT, **variables):
    """Runs wandb for real, in a process that knows no key but one in `variables`."""
    environment = {
        name: value for name, value in os.environ.items() if "WANDB" not in name
    }
    environment |= {"HOME": str(folder), "NETRC": str(folder / "netrc")}
    environment.pop("XDG_CONFIG_HOME", None)
    return subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=folder,
        env=environment | variables,
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        timeout=60,
    )


def check_offline_run(folder, process):
    """Both parts of the run lie on disk; two lines each were all that was said."""
    assert process.returncode == 0, process.stdout
    said = [line.split(":")[0] for line in process.stdout.splitlines()]
    run_id = stored_run_id(folder)
    assert said[2:] == ["WARNING wandb stays offline", f"INFO wandb run {run_id}"]
    assert said[:2] == said[2:]
    parts = list(folder.glob(f"wandb/offline-run-*-{run_id}*/run-{run_id}.wandb"))
    assert len(parts) == 2
    for part in parts:
        for value in (b"3.28125", b"checkpoints/7", b"tiny", b"seed"):
            assert value in part.read_bytes()
        (table,) = part.parent.glob("files/media/table/samples*.table.json")
        assert " upon a time" in table.read_text()
        (table,) = part.parent.glob("files/media/table/completions*.table.json")
        columns, data = map(json.loads(table.read_text()).get, ("columns", "data"))
        assert columns == ["step", "exact", "done"]
        assert data == [[7, None, True], [7, 0.5, None]]


def test_real_wandb_without_a_key_writes_an_offline_run(tmp_path):
    check_offline_run(tmp_path, run_script(tmp_path))


def test_real_wandb_does_not_ask_at_a_terminal(tmp_path):
    keyboard, terminal = pty.openpty()
    os.set_blocking(keyboard, False)
    try:
        process = run_script(tmp_path, stdin=terminal, stderr=terminal, TERM="xterm")
        check_offline_run(tmp_path, process)
        with pytest.raises(BlockingIOError):  # nothing was shown on the terminal
            os.read(keyboard, 1)
    finally:
        os.close(keyboard)
        os.close(terminal)


def test_real_wandb_with_a_key_but_no_server_writes_an_offline_run(tmp_path):
    server = {"WANDB_API_KEY": "0123456789" * 4, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    check_offline_run(tmp_path, run_script(tmp_path, **server))
