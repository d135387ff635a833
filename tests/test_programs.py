"""train.py and infer.py as a user runs them: in processes of their own, from outside.

A `driver` is Python that a process runs before the program: it sends a signal at an
exact step, or breaks the program where a test must be seen to notice.
"""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import relax
from relax import training
from relax.build import abstract_train_state, with_vocabulary
from relax.checkpoints.native import RunCheckpoints
from relax.config import load_config
from relax.optim import make_optimizer
from relax.sharding import make_mesh
from relax.text.tokenizers import load_tokenizer
from relax.tracking.metrics_file import read_metrics

ROOT = Path(__file__).parents[1]
TIMINGS = {"step_time", "tokens_per_second", "mfu"}
SMALL = (
    "model.num_hidden_layers=2",
    "model.hidden_size=32",
    "model.intermediate_size=44",
    "model.max_position_embeddings=128",
)
# Checkpoints, evaluations and samples at steps 6, 12, 18 and 20.
RUN = (
    *SMALL,
    "model.dropout=0.1",
    "optimizer.warmup_steps=3",
    "trainer.num_steps=20",
    "trainer.batch_size=4",
    "trainer.accumulation=2",
    "trainer.steps_per_dispatch=2",
    "trainer.context=16",
    "trainer.eval_every=6",
    "trainer.sample_tokens=7",
)
# Quickly compiled, because each of these programs runs but once.
UNOPTIMISED = "runtime.xla_flags='--xla_backend_optimization_level=0'"
SMOKE = (*SMALL, "debug=smoke", "optimizer=adamw", UNOPTIMISED)

# Runs a program as `python program.py ...` would, after {patch}.
DRIVER = """
import os, runpy, signal, sys
from relax import training
from relax.checkpoints.native import RunCheckpoints
from relax.data.windows import TrainingBatches
from relax.tracking.tracker import Tracker

def send_at(owner, method, wanted, *numbers):
    original = getattr(owner, method)
    def wrapper(self, step, *rest):
        result = original(self, step, *rest)
        if step == wanted:
            for number in numbers:
                os.kill(os.getpid(), number)
        return result
    setattr(owner, method, wrapper)

{patch}
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Workplace:
    """A folder with a text and caches, and the programs run beside it."""

    def __init__(self, folder: Path):
        self.folder = folder
        text = (ROOT / "relax/data/shakespeare_excerpt.txt").read_text("utf-8")
        (folder / "text.txt").write_text(text[:6000], encoding="utf-8")
        self.programs = f"runtime.cache_dir={folder}/programs"
        self.settings = (
            *("data=text", f"data.path={folder}/text.txt"),
            *(f"data.cache_dir={folder}/tokens", self.programs),
        )
        hidden = ("WANDB_", "TIKTOKEN_", "JAX_", "XLA_")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(hidden)}
        # No one's keys or caches, and one CPU device on any machine.
        self.env = kept | {"HOME": str(folder), "JAX_PLATFORMS": "cpu"}

    def train(self, *overrides, **options) -> subprocess.CompletedProcess:
        """Runs train.py on the text; see `run`."""
        return self.run("train.py", *overrides, *self.settings, **options)

    def resume(self, run, *overrides, **options) -> subprocess.CompletedProcess:
        return self.run("train.py", f"resume={run}", *overrides, **options)

    def infer(self, run, *overrides, **options) -> subprocess.CompletedProcess:
        where = (f"checkpoint={run}", self.programs)
        return self.run("infer.py", *where, *overrides, **options)

    def run(self, program, *overrides, code=0, driver=None, cwd=None, **env):
        """Returns the finished process; fails unless it ended with `code`."""
        start = (sys.executable, str(ROOT / program))
        if driver is not None:
            start = (sys.executable, "-c", DRIVER.format(patch=driver), start[1])
        done = subprocess.run(
            [*start, *overrides],
            cwd=cwd or self.folder,
            env=self.env | env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr, done.stderr
        return done


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return Workplace(tmp_path_factory.mktemp("programs"))


@pytest.fixture(scope="module")
def whole(work):
    """The folder of a run that nothing interrupted."""
    work.train(*RUN, f"run_folder={work.folder}/whole")
    return work.folder / "whole"


@pytest.fixture(scope="module")
def stopped(work):
    """The folder of the same run, stopped by SIGINT after step 10, and its stderr.

    Metrics are read a dispatch late: those of step 7 while steps 9 and 10 run.
    """
    folder = work.folder / "stopped"
    driver = "send_at(Tracker, 'log_step', 7, signal.SIGINT)"
    done = work.train(*RUN, f"run_folder={folder}", driver=driver, code=130)
    return folder, done.stderr


def copied(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target


def last_state(folder: Path):
    """Returns the train state of a run's last checkpoint."""
    configs = training.typed(load_config(folder / "config.yaml"))
    model = with_vocabulary(configs.model, load_tokenizer(folder / "tokenizer"))
    optimizer = make_optimizer(configs.optimizer, configs.trainer.num_steps)
    abstract = abstract_train_state(model, optimizer, make_mesh(configs.mesh))
    with RunCheckpoints(folder, read_only=True) as checkpoints:
        return checkpoints.restore(checkpoints.step_named("last"), abstract)


def untimed_rows(folder: Path) -> list[dict]:
    rows = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in rows]


def differences(folder: Path, other: Path) -> set[str]:
    """Returns what of two runs is not the same to the last bit."""
    found = set()
    first, second = last_state(folder), last_state(other)
    for part in first._fields:
        leaves = [jax.tree.leaves(getattr(s, part)) for s in (first, second)]
        pairs = zip(*leaves, strict=True)
        if any(np.asarray(a).tobytes() != np.asarray(b).tobytes() for a, b in pairs):
            found.add(part)
    if untimed_rows(folder) != untimed_rows(other):
        found.add("metrics")
    samples = [(run / "samples.jsonl").read_bytes() for run in (folder, other)]
    if samples[0] != samples[1]:
        found.add("samples")
    return found


def checkpoint_steps(folder: Path) -> list[int]:
    with RunCheckpoints(folder, read_only=True) as checkpoints:
        return checkpoints.steps()


def snapshot(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def error_line(stderr: str) -> str:
    """Returns the only line of a program that had nothing else to say, or fails."""
    lines = [line for line in stderr.splitlines() if not line.startswith("data: ")]
    lines = [line for line in lines if not line.startswith("attention implementation")]
    assert len(lines) == 1, stderr
    return lines[0]


@pytest.mark.slow
def test_a_run_folder_holds_all_that_a_reader_needs(whole):
    assert {path.name for path in whole.iterdir()} == {
        *("config.yaml", "versions.yaml", "tokenizer", "checkpoints"),
        *("metrics.jsonl", "samples.jsonl", "loss.png"),
    }
    configs = training.typed(load_config(whole / "config.yaml"))
    assert (configs.trainer.num_steps, configs.model.dropout) == (20, 0.1)
    versions = load_config(whole / "versions.yaml")
    assert versions["jax"] == jax.__version__
    assert (whole / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert load_tokenizer(whole / "tokenizer").vocab_size == 257
    rows = read_metrics(whole / "metrics.jsonl")
    steps = [row["step"] for row in rows if row["kind"] == "train"]
    assert steps == list(range(1, 21))
    evals = [row for row in rows if row["kind"] == "eval"]
    assert [row["step"] for row in evals] == [6, 12, 18, 20]
    samples = read_metrics(whole / "samples.jsonl")
    assert [row["step"] for row in samples] == [6, 12, 18, 20]
    best = min(evals, key=lambda row: row["val_loss"])["step"]
    assert checkpoint_steps(whole) == sorted({best, 20})


# The checkpoint of step 6 is complete from the save at step 12 on.
KILLS = {
    "log_step, seed 2": ("log_step", random.Random(2).randint(13, 20)),
    "log_step, seed 5": ("log_step", random.Random(5).randint(13, 20)),
    "between evaluation and save": ("log_evaluation", 18),
}


@pytest.mark.slow
@pytest.mark.parametrize("kill", KILLS)
def test_a_killed_run_ends_where_the_uninterrupted_one_ends(
    work, whole, tmp_path, kill
):
    method, step = KILLS[kill]
    driver = f"send_at(Tracker, {method!r}, {step}, signal.SIGKILL)"
    folder = tmp_path / "run"
    work.train(*RUN, f"run_folder={folder}", driver=driver, code=-9)
    assert read_metrics(folder / "metrics.jsonl")[-1]["step"] == step
    assert max(checkpoint_steps(folder)) < step
    work.resume(folder)
    assert differences(folder, whole) == set(), f"killed at {kill}: step {step}"


@pytest.mark.slow
def test_a_kill_during_a_save_leaves_the_checkpoint_before(work, whole, tmp_path):
    driver = "send_at(RunCheckpoints, 'save', 12, signal.SIGKILL)"
    folder = tmp_path / "run"
    work.train(*RUN, f"run_folder={folder}", driver=driver, code=-9)
    names = {path.name for path in (folder / "checkpoints").iterdir()}
    assert names == {"6", "12.orbax-checkpoint-tmp"}
    model = relax.load(folder)
    assert model.score(["To be"])[0].logprobs[0] is None
    work.resume(folder)
    assert differences(folder, whole) == set()


@pytest.mark.slow
def test_sigint_saves_the_step_reached(stopped):
    folder, stderr = stopped
    assert stderr.splitlines()[-1] == (
        f"SIGINT: saved step 10; go on with resume={folder}"
    )
    assert max(checkpoint_steps(folder)) == 10
    assert read_metrics(folder / "metrics.jsonl")[-1]["step"] == 10


@pytest.mark.slow
def test_a_run_stopped_by_sigint_ends_where_the_uninterrupted_one_ends(
    work, whole, stopped, tmp_path
):
    folder = copied(stopped[0], tmp_path / "run")
    work.resume(folder)
    assert differences(folder, whole) == set()


@pytest.mark.slow
def test_sigterm_saves_and_resumes_like_sigint(work, whole, tmp_path):
    folder = tmp_path / "run"
    driver = "send_at(Tracker, 'log_step', 13, signal.SIGTERM)"
    done = work.train(*RUN, f"run_folder={folder}", driver=driver, code=143)
    assert done.stderr.splitlines()[-1] == (
        f"SIGTERM: saved step 16; go on with resume={folder}"
    )
    work.resume(folder)
    assert differences(folder, whole) == set()


@pytest.mark.slow
def test_a_second_sigint_stops_at_once(work, tmp_path):
    driver = "send_at(Tracker, 'log_step', 13, signal.SIGINT, signal.SIGINT)"
    folder = tmp_path / "run"
    done = work.train(*RUN, f"run_folder={folder}", driver=driver, code=130)
    assert done.stderr.splitlines()[-1] == "interrupted; checkpoints are kept"
    assert max(checkpoint_steps(folder)) == 12


FORGETFUL = {
    # Data ordered from the process's start on, as an unsaved iterator would be.
    "data": """
import itertools
count, original = itertools.count(), TrainingBatches.__getitem__
TrainingBatches.__getitem__ = lambda self, step: original(self, next(count))
""",
    # Moments and counts of steps that begin anew, parameters that go on.
    "optimizer": """
import jax
restore = RunCheckpoints.restore
def fresh(self, step, abstract):
    state = restore(self, step, abstract)
    return state._replace(opt_state=jax.tree.map(lambda x: x * 0, state.opt_state))
RunCheckpoints.restore = fresh
""",
}


@pytest.mark.slow
@pytest.mark.parametrize("forgotten", FORGETFUL)
def test_a_resume_that_forgets_is_noticed(work, whole, stopped, tmp_path, forgotten):
    folder = copied(stopped[0], tmp_path / "run")
    work.resume(folder, driver=FORGETFUL[forgotten])
    assert differences(folder, whole) >= {"params", "opt_state", "metrics"}


@pytest.mark.slow
def test_latest_is_resumed_and_extended(work, whole, tmp_path):
    runs = [copied(whole, tmp_path / "runs" / name) for name in ("newer", "older")]
    for run, time in zip(runs, (2_000_000_000, 1_000_000_000), strict=True):
        for step in (run / "checkpoints").iterdir():
            os.utime(step, (time, time))
    before = snapshot(runs[1])
    work.resume("latest", "trainer.num_steps=23", cwd=tmp_path)
    assert snapshot(runs[1]) == before
    assert max(checkpoint_steps(runs[0])) == 23
    assert load_config(runs[0] / "config.yaml")["trainer"]["num_steps"] == 23
    rows = untimed_rows(runs[0])
    assert rows[: len(untimed_rows(whole))] == untimed_rows(whole)
    steps = [row["step"] for row in rows if row["kind"] == "train"]
    assert steps == list(range(1, 24))


# By override, none first.
REFUSED = {
    "": "is at step 20, trainer.num_steps=20: nothing is left; raise",
    "trainer.num_steps=13": "is at step 20, trainer.num_steps=13: nothing is",
    "model=small": "model=small: a resumed run keeps its own configuration;",
    "experiment=shakespeare_tiny": "experiment=shakespeare_tiny: a resumed run",
    "run_folder=elsewhere": "run_folder=elsewhere: a resumed run goes on in its",
    "tokenizer.kind=bytes": "tokenizer.kind=bytes: a resumed run keeps its tok",
}
# Runs the program with one override after the other.
ONE_BY_ONE = """
program, resumed, *overrides = sys.argv[1:]
for override in overrides:
    sys.argv = [program, resumed, *override.split()]
    try:
        runpy.run_path(program, run_name="__main__")
    except SystemExit as end:
        print("ended with", end.code, file=sys.stderr)
sys.exit()
"""


@pytest.fixture(scope="module")
def refusals(work, whole) -> dict[str, str]:
    """What each override of REFUSED was answered on stderr; the run is as it was."""
    before = snapshot(whole)
    done = work.resume(whole, *REFUSED, driver=ONE_BY_ONE)
    assert snapshot(whole) == before
    *answers, rest = done.stderr.split("ended with 1\n")
    assert rest == ""
    return dict(zip(REFUSED, answers, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(("override", "message"), REFUSED.items())
def test_what_a_resume_cannot_do_is_said_in_one_line(refusals, override, message):
    assert message in error_line(refusals[override])


POISON = """
original = TrainingBatches.__getitem__
def poisoned(self, step):
    batch = original(self, step)
    return batch | {"loss_mask": batch["loss_mask"] * float("nan" if step == 9 else 1)}
TrainingBatches.__getitem__ = poisoned
"""


def strict_rows(path: Path) -> list[dict]:
    def refuse(constant):
        raise AssertionError(f"{path} holds {constant}")

    lines = path.read_text("utf-8").splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


@pytest.mark.slow
def test_a_poisoned_step_ends_the_run_and_keeps_the_checkpoint_before(work, tmp_path):
    folder = tmp_path / "run"
    done = work.train(*RUN, f"run_folder={folder}", driver=POISON, code=1)
    line = done.stderr.splitlines()[-1]
    assert line.startswith("step 10: grad_norm, loss, param_norm not finite;")
    assert "the checkpoint of step 6 is kept" in line
    assert checkpoint_steps(folder) == [6]
    rows = strict_rows(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6, 6, 7, 8, 9]
    assert np.isfinite(relax.load(folder).score(["To be"])[0].logprobs[1:]).all()


def test_a_rate_without_bounds_is_stopped(work, tmp_path):
    folder = tmp_path / "run"
    overrides = ("optimizer.learning_rate=1e30", "optimizer.clip_norm=null")
    done = work.train(*SMOKE, *overrides, f"run_folder={folder}", code=1)
    line = done.stderr.splitlines()[-1]
    assert line.startswith("step 1: param_norm not finite; none was saved. Lower")
    assert checkpoint_steps(folder) == []
    assert strict_rows(folder / "metrics.jsonl") == []


@pytest.mark.slow
def test_the_runs_of_a_sweep_do_not_collide(work, tmp_path):
    work.train(
        *("-m", *SMOKE, "optimizer.learning_rate=1e-3,3e-3"),
        "run_folder=runs/rates/one",  # of both, as two that start in one second
        cwd=tmp_path,
    )
    folders = sorted(path.parent for path in tmp_path.rglob("config.yaml"))
    assert folders == [tmp_path / "runs/rates/one", tmp_path / "runs/rates/one-1"]
    configs = [load_config(folder / "config.yaml") for folder in folders]
    rates = [config["optimizer"]["learning_rate"] for config in configs]
    assert rates == [1e-3, 3e-3]
    assert [checkpoint_steps(folder) for folder in folders] == [[2], [2]]


def test_an_interrupt_before_training_leaves_no_folder(work, tmp_path):
    driver = """
training.init_train_state = lambda *_: signal.raise_signal(signal.SIGINT)
"""
    overrides = (*SMOKE, f"run_folder={tmp_path}/run")
    done = work.train(*overrides, driver=driver, code=130)
    assert error_line(done.stderr) == "interrupted; checkpoints are kept"
    assert list(tmp_path.iterdir()) == []


def test_the_profile_lies_in_the_run_folder(work, tmp_path):
    window = ("trainer.profile_start=1", "trainer.profile_steps=1")
    work.train(*SMOKE, *window, f"run_folder={tmp_path}/run")
    assert len(list((tmp_path / "run/profile").rglob("*.xplane.pb"))) == 1


@pytest.mark.slow
def test_wandb_without_a_key_runs_offline_and_asks_nothing(work, tmp_path):
    folder = tmp_path / "run"
    driver = "send_at(Tracker, 'log_step', 1, signal.SIGTERM)"
    overrides = ("logger=wandb", "trainer.num_steps=5", f"run_folder={folder}")
    stopped = work.train(*SMOKE, *overrides, driver=driver, code=143)
    assert "wandb stays offline: no API key" in stopped.stderr
    run_id = (folder / "wandb_id.txt").read_text()
    done = work.resume(folder)
    assert done.stdout == ""
    assert (folder / "wandb_id.txt").read_text() == run_id
    offline = [path.name for path in (folder / "wandb").glob("offline-run-*")]
    assert len(offline) >= 1
    assert all(name.endswith(run_id.strip()) for name in offline)
    assert max(checkpoint_steps(folder)) == 5


@pytest.mark.slow
def test_infer_writes_texts_alone_to_stdout(work, whole, tmp_path):
    greedy = ("sampling=greedy", "sampling.max_new_tokens=13")
    one = work.infer(f"{whole}@last", "prompt=To be", *greedy)
    assert one.stdout.startswith("To be")
    assert one.stdout.endswith("\n")
    completion = one.stdout.removeprefix("To be").removesuffix("\n")

    (tmp_path / "prompts.txt").write_text("O\nTo be\nSpeak, speak.\n")
    files = (f"prompts_file={tmp_path}/prompts.txt", f"output_path={tmp_path}/o.jsonl")
    many = work.infer(f"{whole}@last", *files, *greedy)
    assert many.stdout == ""
    rows = strict_rows(tmp_path / "o.jsonl")
    assert [row["prompt"] for row in rows] == ["O", "To be", "Speak, speak."]
    assert rows[1]["completion"] == completion
    assert [len(row["token_ids"]) for row in rows] == [13, 13, 13]


@pytest.mark.slow
def test_a_run_with_tiktoken_needs_no_cache_afterwards(work, tmp_path, data_dir):
    cache = copied(data_dir / "tiktoken_cache", tmp_path / "cache")
    folder = tmp_path / "run"
    overrides = ("tokenizer=tiktoken", f"run_folder={folder}")
    work.train(*SMOKE, *overrides, TIKTOKEN_CACHE_DIR=str(cache))
    shutil.rmtree(cache)
    empty = tmp_path / "empty"
    empty.mkdir()
    done = work.infer(
        *(folder, "prompt=To be", "sampling.max_new_tokens=3"),
        TIKTOKEN_CACHE_DIR=str(empty),
    )
    assert done.stdout.startswith("To be")
    assert list(empty.iterdir()) == []


LAYOUTS = {
    "scanned, rematerialised, lion": (
        *("model.scan_layers=true", "model.remat=dots", "optimizer=lion"),
        "trainer.accumulation=2",
    ),
    "unrolled, rematerialised": ("model.scan_layers=false", "model.remat=full"),
    "data over 4": ("mesh=data", "runtime.host_devices=4"),
    "tensor and data over 4": ("mesh=tensor", "runtime.host_devices=4"),
}


@pytest.fixture(scope="module")
def plain_loss(work):
    """The loss of the first step on one device, unrolled and all at once."""
    work.train(*SMOKE, "model.scan_layers=false", f"run_folder={work.folder}/plain")
    return read_metrics(work.folder / "plain/metrics.jsonl")[0]["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_trains_the_same_model(work, plain_loss, tmp_path, layout):
    folder = tmp_path / "run"
    work.train(*SMOKE, *LAYOUTS[layout], f"run_folder={folder}")
    rows = read_metrics(folder / "metrics.jsonl")
    assert [(row["step"], row["kind"]) for row in rows] == [
        (1, "train"),
        (2, "train"),
        (2, "eval"),
    ]
    # Scanned layers draw their parameters in another order.
    tolerance = 1e-2 if "model.scan_layers=true" in LAYOUTS[layout] else 1e-5
    assert rows[0]["loss"] == pytest.approx(plain_loss, rel=tolerance)
    assert checkpoint_steps(folder) == [2]
